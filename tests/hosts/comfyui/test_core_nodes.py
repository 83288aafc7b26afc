"""Core's nodes on Flux Kit's objects, one row of a table each: what works in which version of ComfyUI.

Where core's own loader takes the tiny transformer, the same prompt with it is the oracle. Elsewhere a row is compared
with a simpler prompt that means the same, or has at least to run and to change the latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from comfy_server import Server
from compare import relative
from prompts import TEXT, Prompt, core, core_loader, flux_kit, node
from safetensors.torch import save_file
from torch import Tensor

SAME = 1e-5
LORA = "test_lora.safetensors"


class Row(NamedTuple):
    changes: dict[str, dict[str, Any]]
    """Nodes put in place of, or beside, those of `prompts.core`."""
    like: dict[str, dict[str, Any]] | None = None
    """The same in other words; None: only known to change the latent of `without`."""
    without: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - never changed
    within: float = SAME


def sampler(kind: str = "KSampler", **inputs: Any) -> dict[str, Any]:
    """core()'s sampler with other inputs; a value None takes one away."""
    known = {**core()["sampler"]["inputs"], **inputs}
    return node(kind, **{name: value for name, value in known.items() if value is not None})


NO_KSAMPLER: dict[str, None] = dict.fromkeys((
    "seed", "steps", "cfg", "sampler_name", "scheduler", "denoise", "positive", "negative", "model"))
def changed_text(clip: list[Any]) -> dict[str, Any]:
    return node("CLIPTextEncodeFlux", clip=clip, clip_l=TEXT, t5xxl=TEXT, guidance=3.5)


OTHER = {"other": node("CLIPTextEncode", clip=["load", 1], text="a green square")}
CUSTOM = {
    "noise": node("RandomNoise", noise_seed=21), "select": node("KSamplerSelect", sampler_name="euler"),
    "sigmas": node("BasicScheduler", model=["load", 0], scheduler="simple", steps=4, denoise=1.0),
    "sampler": sampler("SamplerCustomAdvanced", **NO_KSAMPLER, noise=["noise", 0], guider=["guider", 0],
                       sampler=["select", 0], sigmas=["sigmas", 0]),
}
PICTURE = {
    "first": sampler(seed=5), "picture": node("VAEDecode", samples=["first", 0], vae=["load", 2]),
    "encoded": node("VAEEncode", pixels=["picture", 0], vae=["load", 2]),
}
MASKED = {
    **PICTURE, "mask": node("SolidMask", value=0.5, width=128, height=112),
    "masked": node("SetLatentNoiseMask", samples=["encoded", 0], mask=["mask", 0]),
}
HOOKED = {
    "hook": node("CreateHookLoraModelOnly", lora_name=LORA, strength_model=1.0),
    "hooked": node("ConditioningSetProperties", cond_NEW=["text", 0], strength=1.0, set_cond_area="default",
                   hooks=["hook", 0]),
}
LORA_ONLY = {"lora": node("LoraLoaderModelOnly", model=["load", 0], lora_name=LORA, strength_model=1.0),
             "sampler": sampler(model=["lora", 0])}


def through(kind: str, **inputs: Any) -> dict[str, dict[str, Any]]:
    """The model through one node."""
    return {"changed": node(kind, model=["load", 0], **inputs), "sampler": sampler(model=["changed", 0])}


def referred(**inputs: Any) -> dict[str, dict[str, Any]]:
    """Two references, by one method."""
    return {**PICTURE, "reference": node("ReferenceLatent", conditioning=["text", 0], latent=["encoded", 0]),
            "again": node("ReferenceLatent", conditioning=["reference", 0], latent=["encoded", 0]),
            "method": node("FluxKontextMultiReferenceLatentMethod", conditioning=["again", 0], **inputs),
            "sampler": sampler(positive=["method", 0])}


ROWS: dict[str, Row] = {
    "KSampler, CLIPTextEncodeFlux": Row({}, {"sampler": flux_kit()["sampler"]}),
    "SamplerCustom": Row({**CUSTOM, "sampler": sampler(
        "SamplerCustom", **NO_KSAMPLER | {"cfg": 1.0, "model": ["load", 0], "positive": ["text", 0],
                                          "negative": ["text", 0]},
        add_noise=True, noise_seed=21, sampler=["select", 0], sigmas=["sigmas", 0])}, {}),
    "KSamplerAdvanced": Row({"sampler": sampler(
        "KSamplerAdvanced", seed=None, denoise=None, add_noise="enable", noise_seed=21, start_at_step=0,
        end_at_step=10000, return_with_leftover_noise="disable")}, {}),
    "SamplerCustomAdvanced, BasicGuider": Row(
        {**CUSTOM, "guider": node("BasicGuider", model=["load", 0], conditioning=["text", 0])}, {}),
    "SamplerCustomAdvanced, CFGGuider": Row(
        {**CUSTOM, "guider": node("CFGGuider", model=["load", 0], positive=["text", 0], negative=["other", 0], cfg=2.0),
         **OTHER}, {"sampler": sampler(cfg=2.0, negative=["other", 0]), **OTHER}),
    "CLIPTextEncode, FluxGuidance": Row(
        {"plain": node("CLIPTextEncode", clip=["load", 1], text=TEXT),
         "text": node("FluxGuidance", conditioning=["plain", 0], guidance=3.5)}, {}),
    "FluxDisableGuidance": Row({"none": node("FluxDisableGuidance", conditioning=["text", 0]),
                                "sampler": sampler(positive=["none", 0])}),
    "CLIPSetLastLayer, last": Row({"last": node("CLIPSetLastLayer", clip=["load", 1], stop_at_clip_layer=-1),
                                   "text": changed_text(["last", 0])}, {}),
    "CLIPSetLastLayer, one before": Row({"last": node("CLIPSetLastLayer", clip=["load", 1], stop_at_clip_layer=-2),
                                         "text": changed_text(["last", 0])}),
    "ConditioningZeroOut": Row({"none": node("ConditioningZeroOut", conditioning=["text", 0]),
                                "sampler": sampler(positive=["none", 0])}),
    "ConditioningSetTimestepRange, ConditioningCombine": Row(
        {**OTHER, "early": node("ConditioningSetTimestepRange", conditioning=["text", 0], start=0.0, end=0.5),
         "late": node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.5, end=1.0),
         "both": node("ConditioningCombine", conditioning_1=["early", 0], conditioning_2=["late", 0]),
         "sampler": sampler(positive=["both", 0])}),
    "ConditioningSetMask": Row(
        {**OTHER, "half": node("SolidMask", value=0.5, width=128, height=112),
         "mask": node("ConditioningSetMask", conditioning=["other", 0], mask=["half", 0], strength=1.0,
                      set_cond_area="default"),
         "both": node("ConditioningCombine", conditioning_1=["text", 0], conditioning_2=["mask", 0]),
         "sampler": sampler(positive=["both", 0])}),
    "ModelSamplingFlux": Row(through("ModelSamplingFlux", max_shift=1.15, base_shift=0.5, width=128, height=112)),
    "LoraLoaderModelOnly": Row(LORA_ONLY),
    "LoraLoader": Row({"lora": node("LoraLoader", model=["load", 0], clip=["load", 1], lora_name=LORA,
                                    strength_model=1.0, strength_clip=1.0), "sampler": sampler(model=["lora", 0])},
                      LORA_ONLY),
    "ModelMergeSimple": Row(
        {**LORA_ONLY, "merged": node("ModelMergeSimple", model1=["load", 0], model2=["lora", 0], ratio=0.5),
         "sampler": sampler(model=["merged", 0])},
        {"lora": node("LoraLoaderModelOnly", model=["load", 0], lora_name=LORA, strength_model=0.5),
         "sampler": sampler(model=["lora", 0])}),
    "hook LoRA": Row({**HOOKED, "sampler": sampler(positive=["hooked", 0])}, LORA_ONLY),
    "VAEEncode": Row({**PICTURE, "sampler": sampler(latent_image=["encoded", 0], denoise=0.6)}),
    "VAEDecodeTiled": Row({**PICTURE, "picture": node("VAEDecodeTiled", samples=["first", 0], vae=["load", 2],
                                                      tile_size=512, overlap=64, temporal_size=64, temporal_overlap=8),
                           "sampler": sampler(latent_image=["encoded", 0], denoise=0.6)},
                          {**PICTURE, "sampler": sampler(latent_image=["encoded", 0], denoise=0.6)}, within=1e-4),
    "SetLatentNoiseMask": Row({**MASKED, "sampler": sampler(latent_image=["masked", 0], denoise=0.8)}),
    "DifferentialDiffusion": Row({**MASKED, **through("DifferentialDiffusion"),
                                  "sampler": sampler(model=["changed", 0], latent_image=["masked", 0], denoise=0.8)}),
    "InpaintModelConditioning": Row(
        {**MASKED, "inpaint": node("InpaintModelConditioning", positive=["text", 0], negative=["text", 0],
                                   vae=["load", 2], pixels=["picture", 0], mask=["mask", 0], noise_mask=True),
         "sampler": sampler(positive=["inpaint", 0], negative=["inpaint", 1], latent_image=["inpaint", 2])}),
    "ReferenceLatent": Row({**PICTURE, "reference": node("ReferenceLatent", conditioning=["text", 0],
                                                         latent=["encoded", 0]),
                            "sampler": sampler(positive=["reference", 0])}),
    "FluxKontextMultiReferenceLatentMethod, index": Row(referred(reference_latents_method="index")),
    "FluxKontextMultiReferenceLatentMethod, uxo": Row(referred(reference_latents_method="uxo/uno")),
    "EasyCache": Row(
        {**through("EasyCache", reuse_threshold=0.3, start_percent=0.0, end_percent=1.0, verbose=False),
         "sampler": sampler(model=["changed", 0], steps=12)}, without={"sampler": sampler(steps=12)}),
    "SkipLayerGuidanceDiT": Row(
        {"changed": node("SkipLayerGuidanceDiT", model=["load", 0], double_layers="1", single_layers="2", scale=3.0,
                         start_percent=0.0, end_percent=1.0, rescaling_scale=0.0),
         "sampler": sampler(model=["changed", 0], cfg=1.5)}),
    "NAGuidance": Row({**through("NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5), **OTHER,
                       "sampler": sampler(model=["changed", 0], cfg=2.0, negative=["other", 0])},
                      without={"sampler": sampler(cfg=2.0, negative=["other", 0]), **OTHER}),
    "RescaleCFG": Row({**through("RescaleCFG", multiplier=0.7), **OTHER,
                       "sampler": sampler(model=["changed", 0], cfg=2.0, negative=["other", 0])},
                      without={"sampler": sampler(cfg=2.0, negative=["other", 0]), **OTHER}),
    "TorchCompileModel": Row(through("TorchCompileModel", backend="inductor"), {}, within=1e-4),
}


@pytest.fixture(scope="session")
def latents(server: Server) -> Callable[[Prompt], Tensor]:
    """The latent of a prompt, with a LoRA for it to load."""
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(1)
    sizes = {"double_blocks_0_img_attn_qkv": (384, 128), "single_blocks_1_linear1": (896, 128)}
    weights = {}
    for name, (rows, columns) in sizes.items():
        weights[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, columns, generator=draw) * 0.1
        weights[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=draw) * 0.1
    save_file(weights, folder / LORA)
    return lambda prompt: server.latents(prompt)["latent"]


@pytest.mark.parametrize("name", ROWS)
def test_core_node(server: Server, latents: Callable[[Prompt], Tensor], core_can_load: bool, name: str,
                   record_property: Callable[[str, Any], None]) -> None:
    row = ROWS[name]
    prompt = {**core(), **row.changes}
    kinds = {entry["class_type"] for entry in prompt.values()}
    missing = kinds - set(server.call("/object_info"))
    if missing:
        pytest.skip(f"this version has no {', '.join(missing)}")
    found = latents(prompt)
    assert torch.isfinite(found).all()
    if row.like is None:
        assert relative(found, latents({**core(), **row.without})) > 1e-4, "the node changed nothing"
    else:
        off = relative(found, latents({**core(), **row.like}))
        record_property("off", off)  # for the table
        assert off <= row.within
    if core_can_load:
        off = relative(found, latents(core_loader(prompt)))
        record_property("off", off)
        assert off <= max(SAME, row.within)


def test_a_saved_model_loads_again(server: Server, latents: Callable[[Prompt], Tensor], core_can_load: bool) -> None:
    """ModelSave with a LoRA baked in; read by our loader and, where it can, by core's."""
    with_lora = {**core(), **LORA_ONLY}
    told = server.run({**with_lora, "kept": node("ModelSave", model=["lora", 0], filename_prefix="saved/lora")})
    assert "kept" in told or (server.base / "output" / "saved").is_dir()
    saved, = (server.base / "output" / "saved").glob("lora*.safetensors")
    (server.base / "models" / "diffusion_models").mkdir(parents=True, exist_ok=True)
    saved.rename(server.base / "models" / "diffusion_models" / "baked-lora.safetensors")
    prompt = core()
    prompt["load"]["inputs"]["model"] = "baked-lora.safetensors"
    assert relative(latents(prompt), latents(with_lora)) <= SAME
    if core_can_load:
        theirs = core_loader(prompt)
        theirs["unet"]["inputs"]["unet_name"] = "baked-lora.safetensors"
        assert relative(latents(theirs), latents(with_lora)) <= SAME
