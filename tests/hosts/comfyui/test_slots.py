"""Pictures beside the latents in ComfyUI: our network by the host's own model class against core's network, and whole
workflows of core nodes against `flux-kit run`, whose equivalents of these nodes are compared with core's one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import Alone, tiny_host
from comfy_inside import Inside
from comfy_server import Server
from compare import relative
from family import write_flux
from flux_kit.hosts.standalone.core_conditioning import CONDITIONING_NODES
from flux_kit.hosts.standalone.core_pictures import PICTURE_NODES
from prompts import Prompt, core, node
from safetensors.torch import save_file
from torch import Tensor

SAME = 1e-5
PIXELS = 1e-4  # of latents that were encoded from a picture
SAMPLED = {"DifferentialDiffusion"}  # its effect shows in a run: below


def test_references_equal_core_s_network(inside: Inside) -> None:
    found = inside("references")
    assert len(found) == 6
    for name, case in found.items():
        assert case["off"] <= SAME and case["our sampler"] <= SAME and case["changed"] > 0.01, name


def test_masks_reach_references(inside: Inside) -> None:
    """Where core's own network stops with an error of shapes."""
    found = inside("masks_with_references")
    assert set(found) == {"any size", "own size", "hidden"}
    for name, case in found.items():
        assert case["off"] <= SAME and case["whole"] <= SAME and case["changed"] > 1e-3, name
        assert "must match" in case["core"] or "expand" in case["core"], name


def test_channels_ready_made(inside: Inside) -> None:
    found = inside("noise_concat")
    assert set(found) == {"fill", "control"} and all(case["off"] <= SAME for case in found.values())


def test_the_standalone_host_s_nodes_do_what_core_s_do(inside: Inside) -> None:
    found = inside("equivalents")
    assert found["nodes"] == sorted(one.GET_SCHEMA().node_id for one in (*PICTURE_NODES, *CONDITIONING_NODES))
    assert {name.split(",")[0] for name in found["off"]} | SAMPLED >= set(found["nodes"]) - {"ImageScaleToMaxDimension"}
    within = {name: PIXELS if name.endswith("Conditioning") or "Conditioning, " in name else 0 for name in found["off"]}
    assert {name: off for name, off in found["off"].items() if not off <= within[name]} == {}


# -- whole workflows in both hosts

@pytest.fixture(scope="module")
def models(server: Server) -> Path:
    """Random Fill and Control models and a control LoRA where both hosts find them."""
    folder = server.base / "models"
    for seed, (name, channels) in enumerate((("fill", 384), ("control", 128)), start=1):
        write_flux(folder / "diffusion_models" / f"both-{name}.safetensors", seed, in_channels=channels)
    draw = torch.Generator().manual_seed(5)
    sizes = {"img_in": (128, 128), "double_blocks.0.img_attn.proj": (128, 128)}
    lora = {f"{name}.lora_{side}.weight": torch.randn((4, size[1]) if side == "A" else (size[0], 4), generator=draw) / 9
            for name, size in sizes.items() for side in "AB"}
    lora["img_in.lora_B.bias"] = torch.randn(128, generator=draw) / 9
    lora["single_blocks.0.norm.key_norm.scale"] = 1 + torch.randn(128, generator=draw) / 9  # by which core knows it
    (folder / "loras").mkdir(exist_ok=True)
    save_file(lora, folder / "loras" / "both-control.safetensors")
    return folder


@pytest.fixture
def both(server: Server, models: Path, tmp_path: Path) -> Callable[[Prompt], tuple[Tensor, Tensor]]:
    """The latent of a prompt in the server, and of the same prompt by the standalone host."""
    alone = Alone(tiny_host(tmp_path, models))
    return lambda prompt: (server.latents(prompt)["latent"], alone.latents(prompt)["latent"])


def picture_first(model: str | None = None, **sampler: Any) -> Prompt:
    """core()'s prompt with a picture of tiny-flux that is made first, "picture", its latent "first", a soft mask."""
    prompt = core(steps=3)
    prompt |= {"first": node("KSampler", **{**prompt["sampler"]["inputs"], "seed": 4}),
               "picture": node("VAEDecode", samples=["first", 0], vae=["load", 2]),
               "solid": node("SolidMask", value=1.0, width=64, height=48),
               "pad": node("ImagePadForOutpaint", image=["picture", 0], left=16, top=0, right=24, bottom=8,
                           feathering=24)}
    if model is not None:
        prompt["other"] = node("FluxKitLoadTransformer", model=model)
        prompt["sampler"]["inputs"]["model"] = ["other", 0]
    prompt["sampler"]["inputs"] |= sampler
    return prompt


def conditioned(prompt: Prompt, kind: str, **inputs: Any) -> Prompt:
    """By a node that gives positive, negative and a latent."""
    prompt["given"] = node(kind, positive=["text", 0], negative=["text", 0], vae=["load", 2], **inputs)
    prompt["sampler"]["inputs"] |= {"positive": ["given", 0], "negative": ["given", 1], "latent_image": ["given", 2]}
    return prompt


def fill(keep: bool, differential: float | None, **sampler: Any) -> Prompt:
    prompt = conditioned(picture_first("both-fill.safetensors", **sampler), "InpaintModelConditioning",
                         pixels=["pad", 0], mask=["pad", 1], noise_mask=keep)
    if differential is not None:
        prompt["soft"] = node("DifferentialDiffusion", model=["other", 0], strength=differential)
        prompt["sampler"]["inputs"]["model"] = ["soft", 0]
    return prompt


def control_lora() -> Prompt:
    prompt = conditioned(picture_first(), "InstructPixToPixConditioning", pixels=["edges", 0])
    prompt |= {"edges": node("ImageInvert", image=["picture", 0]),  # the last bit of a pixel may make an edge
               "lora": node("LoraLoaderModelOnly", model=["load", 0], lora_name="both-control.safetensors",
                            strength_model=0.85)}
    prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    return prompt


def kontext(method: str) -> Prompt:
    """Two references and a third that two stitched pictures make."""
    prompt = picture_first()
    prompt |= {"two": node("ImageStitch", image1=["picture", 0], direction="down", match_image_size=True,
                           spacing_width=16, spacing_color="red", image2=["pad", 0]),
               "small": node("ImageScale", image=["two", 0], upscale_method="area", width=64, height=96,
                             crop="center"),
               "stitched": node("VAEEncode", pixels=["small", 0], vae=["load", 2]),
               "one": node("ReferenceLatent", conditioning=["text", 0], latent=["first", 0]),
               "more": node("ReferenceLatent", conditioning=["one", 0], latent=["stitched", 0]),
               "method": node("FluxKontextMultiReferenceLatentMethod", conditioning=["more", 0],
                              reference_latents_method=method)}
    prompt["sampler"]["inputs"]["positive"] = ["method", 0]
    return prompt


WORKFLOWS: dict[str, Callable[[], Prompt]] = {
    "Fill, noise mask": lambda: fill(True, None),
    "Fill without": lambda: fill(False, None, cfg=2.0),
    "Fill, Differential Diffusion": lambda: fill(True, 1.0, steps=6, scheduler="normal"),
    "Fill, half of it": lambda: fill(True, 0.5, steps=6, sampler_name="heun"),
    "Control": lambda: conditioned(picture_first("both-control.safetensors"), "InstructPixToPixConditioning",
                                   pixels=["pad", 0]),
    "control LoRA": control_lora,
    "Kontext, offset": lambda: kontext("offset"), "Kontext, index": lambda: kontext("index"),
    "Kontext, uxo": lambda: kontext("uxo/uno"),
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_gives_the_latents_of_flux_kit_run(both: Callable[[Prompt], tuple[Tensor, Tensor]], name: str
                                                      ) -> None:
    here, there = both(WORKFLOWS[name]())
    assert here.std() > 0.1 and relative(there, here) <= PIXELS
