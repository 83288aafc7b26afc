"""Run by the tests in a process of ComfyUI: inside.py CHECKOUT PACK [CHECK ...]. Prints one JSON object, check ->
findings.

The pack is loaded as ComfyUI loads it, under a name that is a path. Oracle: the host's own Flux class with the same
weights, driven by the host's own code.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import importlib
import importlib.util
import inspect
import json
import logging
import sys
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

CHECKOUT, PACK, ONLY = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, str(CHECKOUT))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ldm.flux.layers  # noqa: E402
import comfy.ldm.flux.model  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
import utils.extra_config  # noqa: E402,F401 - first, as main.py does: core's nodes.py hides the package behind comfy/utils.py

import nodes as core_nodes  # noqa: E402

NAME = "/somewhere/custom_nodes/flux-kit"
TINY = PACK / "tiny_flux" / "models"
MODEL = TINY / "diffusion_models" / "tiny-flux-dev.safetensors"
ENCODERS = [TINY / "text_encoders" / name for name in ("tiny-clip_l.safetensors", "tiny-t5.safetensors")]
D = 128  # width of tiny-flux
SHARES = {"all": None, "a third": 3, "nothing": 10**9}
"""Of a model's bytes that are loaded, for `loading`."""


def load_pack() -> Any:
    spec = importlib.util.spec_from_file_location(NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None and spec.loader is not None
    pack = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    asyncio.run(pack.comfy_entrypoint())
    return sys.modules[NAME + ".hosts"].current()


HOST = load_pack()
ENGINE = NAME + ".engine"
OURS = sys.modules[NAME + ".hosts.comfyui.transformer"]
OBJECTS = sys.modules[NAME + ".hosts.comfyui.objects"]
LAYERS = sys.modules[NAME + ".hosts.comfyui.layers"]
ERRORS = sys.modules[ENGINE + ".errors"]
GENERATOR = torch.Generator().manual_seed(0)
CHECKS: dict[str, Any] = {}


def check(function: Any) -> Any:
    CHECKS[function.__name__] = function
    return function


def random(*shape: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR) * size


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def core_twin(ours: Any) -> Any:
    """The host's own Flux with the weights of ours."""
    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    params = {name: value for name, value in OURS.params_of(ours.spec).items() if name in known}
    with torch.device("meta"):
        twin = comfy.ldm.flux.model.Flux(dtype=ours.dtype, device="meta", operations=comfy.ops.manual_cast, **params)
    twin.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return twin.eval().requires_grad_(False)


def core_patcher(patcher: Any) -> Any:
    twin = core_twin(patcher.model.diffusion_model)
    # A copy of every weight: patches of one model must not show in the other.
    twin.load_state_dict({name: value.clone() for name, value in twin.state_dict().items()}, assign=True)
    twin.requires_grad_(False)
    model = comfy.model_base.Flux(patcher.model.model_config, model_type=patcher.model.model_type,
                                  unet_model=lambda **_: twin)
    return comfy.model_patcher.ModelPatcher(model, load_device=patcher.load_device,
                                            offload_device=patcher.offload_device)


def empty() -> dict[str, Any]:
    return {"samples": torch.zeros(1, 16, 12, 16)}


def sampled(patcher: Any, positive: Any, negative: Any = None, latent: Any = None, **changes: Any) -> torch.Tensor:
    """By core's KSampler. `negative`: `positive` if None; `latent`: an empty one, which is left as it was."""
    settings = {"seed": 3, "steps": 3, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", **changes}
    out: torch.Tensor = core_nodes.common_ksampler(
        patcher, positive=positive, negative=positive if negative is None else negative,
        latent=copy.deepcopy(latent) or empty(), **settings)[0]["samples"]
    return out


def our_sampler(patcher: Any, positive: Any, negative: Any = None, latent: Any = None, **changes: Any) -> torch.Tensor:
    """The same by ours."""
    settings = {"seed": 3, "steps": 3, "solver": "euler", "schedule": "simple", **changes}
    made = HOST.sample(patcher, positive, negative, copy.deepcopy(latent) or empty(), **settings)
    out: torch.Tensor = made["samples"]
    return out


def conditioning() -> Any:
    return HOST.encode_prompt(HOST.load_text_encoders(ENCODERS), "a red circle", guidance=3.5)


def pass_inputs() -> dict[str, Any]:
    """Of the host's `apply_model`."""
    (cond, values), = conditioning()
    return {"x": random(1, 16, 12, 16), "t": torch.tensor([0.8]), "c_crossattn": cond, "y": values["pooled_output"],
            "guidance": torch.tensor([3.5])}


# -- loading

@contextmanager
def loaded(patcher: Any, share: float | None = None) -> Iterator[int]:
    """The model with at most this share of its bytes loaded, the rest brought along layer by layer; None: with all.
    Gives the bytes that the host counts as loaded."""
    budget = {"full_load": True} if share is None else {"lowvram_model_memory": int(patcher.model_size() * share)}
    patcher.patch_model(device_to=None, load_weights=False)
    patcher.load(patcher.load_device, **budget)
    yield patcher.model.model_loaded_weight_memory
    patcher.unpatch_model(patcher.offload_device)


def in_part_and_whole(patcher: Any, run: Any) -> tuple[list[Any], float]:
    """What `run()` gives with a third of the model loaded and with all, and what share was loaded the first time."""
    with loaded(patcher, 1 / 3) as some:
        part = run()
    with loaded(patcher) as everything:
        return [part, run()], some / everything


@contextmanager
def loading(share: int | None) -> Iterator[None]:
    """The host loads one part in `share` of every model's weights; None: as it likes, which is all."""
    comfy.model_management.unload_all_models()  # what is loaded would stay so
    if share is None:
        yield
        return
    load = comfy.model_patcher.ModelPatcher.load

    def limited(self: Any, device_to: Any = None, lowvram_model_memory: int = 0, force_patch_weights: bool = False,
                full_load: bool = False) -> Any:
        return load(self, device_to, lowvram_model_memory=max(1, self.model_size() // share),
                    force_patch_weights=force_patch_weights, full_load=False)

    with mock.patch.object(comfy.model_patcher.ModelPatcher, "load", limited):
        yield


def held(patcher: Any) -> int:
    """Bytes of the weights."""
    return sum(p.numel() * p.element_size() for p in patcher.model.parameters())


def mapped(patcher: Any) -> int:
    """How many weights lie on a mapped file."""
    return sum(not p.untyped_storage().resizable() for p in patcher.model.parameters())


def loaded_anew(patcher: Any) -> dict[str, Any]:
    """By what the host keeps for that."""
    factory, arguments = patcher.cached_patcher_init[:2]
    again = factory(*arguments, disable_dynamic=True)
    pairs = zip(patcher.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    return {"same": all(torch.equal(a, b) for a, b in pairs), "apart": again.model is not patcher.model,
            "kind": type(again).__name__}


def freed(models: dict[str, Any]) -> dict[str, bool]:
    """Which of these weakly held models are gone once the host has unloaded all."""
    comfy.model_management.unload_all_models()
    gc.collect()
    return {name: model() is None for name, model in models.items()}


# -- one pass of the network

def replaced(args: Any, extra: Any) -> Any:
    out = extra["original_block"]({key: value for key, value in args.items() if key != "attn_mask"})
    return {**out, "img": out["img"] * 1.2}


def cases(tokens: int, hidden: int) -> dict[str, dict[str, Any]]:
    """Extra inputs of a pass on two latents of 13 x 16 and 20 text tokens."""
    length = 20 + tokens
    noise = random(2, tokens, hidden)
    return {
        "plain": {},
        "no guidance": {"guidance": None},
        "no pooled text": {"y": None},
        "control residuals": {"control": {"input": [random(2, 20, hidden), None, random(2, tokens, hidden)],
                                          "output": [random(2, 40, hidden)]}},
        "attention mask": {"attention_mask": torch.where(torch.rand(2, 1, length, length, generator=GENERATOR) < 0.2,
                                                         -5.0, 0.0)},
        "references, offset": {"ref_latents": [random(2, 16, 9, 12), random(2, 16, 8, 8)]},
        "references, index": {"ref_latents": [random(2, 16, 9, 12), random(2, 16, 8, 8)],
                              "ref_latents_method": "index"},
        "references, uxo": {"ref_latents": [random(2, 16, 9, 12), random(2, 16, 8, 8)], "ref_latents_method": "uxo"},
        "replaced blocks": options(patches_replace={"dit": {("double_block", 0): replaced,
                                                            ("single_block", 0): replaced}}),
        "patch after the input": options(patches={"post_input": [lambda a: {**a, "img": a["img"] + noise}]}),
        "attention override": options(optimized_attention_override=lambda kernel, *a, **k: kernel(*a, **k) * 1.1),
        "rope options": options(rope_options={"scale_y": 0.5, "scale_x": 1.5, "shift_y": 2.0, "shift_t": 1.0}),
        "attention patches": options(patches={
            "attn1_patch": [lambda q, k, v, pe, attn_mask, extra_options: {"q": q * 1.3}],
            "attn1_output_patch": [lambda a, extra: a * (1 + extra["img_slice"][0] / extra["img_slice"][1])]}),
        "wrapper": options(wrappers={comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL: {
            "test": [lambda executor, *a, **k: executor(*a, **k) * 1.5]}}),
    }


def options(**entries: Any) -> dict[str, Any]:
    return {"transformer_options": entries}


def copied(value: Any) -> Any:
    """Core adds to some inputs in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return [copied(entry) for entry in value] if isinstance(value, list) else value


def compared(ours: Any, names: set[str] | None = None) -> dict[str, Any]:
    """For each case: how far ours is from core's, and how much the case changes core's answer."""
    spec = ours.spec
    twin = core_twin(ours)
    x, sigma = random(2, spec.in_channels // 4, 13, 16), torch.tensor([0.7, 0.4])
    inputs = {"context": random(2, 20, spec.context_in_dim), "y": random(2, spec.vec_in_dim),
              "guidance": torch.tensor([3.5, 3.5])}
    plain = twin(x.clone(), sigma, **copied(inputs))
    found = {}
    for name, changes in cases(7 * 8, spec.hidden_size).items():
        if names is None or name in names:
            mine = ours(x.clone(), sigma, **copied({**inputs, **changes}))
            theirs = twin(x.clone(), sigma, **copied({**inputs, **changes}))
            found[name] = {"off": relative(mine, theirs), "changed": relative(theirs, plain)}
    return found


@check
def one_pass() -> Any:
    return compared(HOST.load_model(MODEL).model.diffusion_model)


@check
def full_width() -> Any:
    """One double and one single block of the published width."""
    spec = sys.modules[ENGINE + ".specs"].FluxSpec(depth=1, depth_single_blocks=1)
    with torch.device("meta"):
        ours = OURS.Flux(spec, torch.float32)
    weights = {name: torch.empty(tensor.shape).uniform_(-0.03, 0.03, generator=GENERATOR)
               + (1.0 if "_norm." in name else 0.0) for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(weights, assign=True)
    return compared(ours.eval().requires_grad_(False),
                    {"plain", "control residuals", "attention mask", "references, offset"})


@check
def half_precision() -> Any:
    """The same pass in bf16, where rounding is all that may differ."""
    ours = HOST.load_model(MODEL).model.diffusion_model
    half = OURS.Flux(ours.spec, torch.bfloat16)
    half.load_state_dict(ours.state_dict())
    half = half.to(torch.bfloat16).eval().requires_grad_(False)
    twin = core_twin(half)
    x, context, y = random(1, 16, 12, 16).bfloat16(), random(1, 20, 64).bfloat16(), random(1, 64).bfloat16()
    sigma, guidance = torch.tensor([0.7]), torch.tensor([3.5]).bfloat16()
    mine, theirs = (net(x.clone(), sigma, context, y=y, guidance=guidance) for net in (half, twin))
    return {"off": relative(mine, theirs)}


# -- patches on weights

def low_rank(sizes: dict[str, tuple[int, int]], down: str, up: str, prefix: str = "",
             alpha: bool = False) -> dict[str, torch.Tensor]:
    weights = {}
    for name, (rows, columns) in sizes.items():
        weights[f"{prefix}{name}.{down}.weight"] = random(4, columns, size=0.05)
        weights[f"{prefix}{name}.{up}.weight"] = random(rows, 4, size=0.05)
        if alpha:
            weights[f"{prefix}{name}.alpha"] = torch.tensor(4.0)
    return weights


def loras() -> dict[str, dict[str, torch.Tensor]]:
    kohya = {"double_blocks_0_img_attn_qkv": (3 * D, D), "double_blocks_1_txt_mlp_0": (4 * D, D),
             "single_blocks_0_linear1": (7 * D, D), "single_blocks_2_linear2": (D, 5 * D),
             "double_blocks_0_img_mod_lin": (6 * D, D)}
    diffusers = {"transformer_blocks.0.attn.to_q": (D, D), "transformer_blocks.0.attn.add_v_proj": (D, D),
                 "single_transformer_blocks.1.attn.to_k": (D, D), "single_transformer_blocks.1.proj_mlp": (4 * D, D),
                 "single_transformer_blocks.3.proj_out": (D, 5 * D), "transformer_blocks.1.ff.net.0.proj": (4 * D, D)}
    control = low_rank({"img_in": (D, 128), "double_blocks.0.img_attn.proj": (D, D)}, "lora_A", "lora_B")
    control["img_in.lora_B.bias"] = random(D, size=0.05)
    for name in ("double_blocks.0.img_attn.norm.query_norm", "single_blocks.0.norm.key_norm"):
        control[f"{name}.scale"] = 1 + random(D, size=0.3)
    return {"kohya": low_rank(kohya, "lora_down", "lora_up", "lora_unet_", alpha=True),
            "diffusers": low_rank(diffusers, "lora_A", "lora_B", "transformer."), "bfl control": control}


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def patched(patcher: Any, lora: dict[str, torch.Tensor]) -> Any:
    return comfy.sd.load_lora_for_models(patcher, None, dict(lora), 1.0, 0.0)[0]


@check
def lora() -> Any:
    """Against core's Flux with the same patches; the base model afterwards; what the host logs meanwhile."""
    ours, prompt = HOST.load_model(MODEL), conditioning()
    theirs = core_patcher(ours)
    base = sampled(ours, prompt)
    found = {}
    for name, weights in loras().items():
        logging.getLogger().addHandler(handler := Warnings())
        mine = sampled(patched(ours, weights), prompt)
        logging.getLogger().removeHandler(handler)
        found[name] = {"off": relative(mine, sampled(patched(theirs, weights), prompt)),
                       "changed": relative(mine, base), "base": relative(sampled(ours, prompt), base),
                       "said": handler.texts}
    return found


@check
def partial_load() -> Any:
    """A third of the weights loaded, the rest brought along layer by layer, against all loaded."""
    inputs, ours, found = pass_inputs(), HOST.load_model(MODEL), {}
    base = None
    for name, weights in {"no lora": None, **loras()}.items():
        if name == "bfl control":
            continue
        patcher = ours.clone() if weights is None else patched(ours, weights)
        (part, whole), share = in_part_and_whole(patcher, lambda model=patcher.model: model.apply_model(**inputs))
        base = whole if base is None else base
        found[name] = {"off": relative(part, whole), "share": share, "changed": relative(part, base)}
    return found


@check
def text_lora() -> Any:
    clip = HOST.load_text_encoders(ENCODERS)
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    weights, state = {}, clip.cond_stage_model.state_dict()
    for name in ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
                 "lora_te2_encoder_block_0_layer_0_SelfAttention_q"):
        rows, columns = state[keys[name]].shape
        weights |= low_rank({name: (rows, columns)}, "lora_down", "lora_up", alpha=True)
    (before, told), = HOST.encode_prompt(clip, "a red circle")
    changed = comfy.sd.load_lora_for_models(None, clip, weights, 0.0, 30.0)[1]
    (cond, values), = HOST.encode_prompt(changed, "a red circle")
    (after, _), = HOST.encode_prompt(clip, "a red circle")
    return {"t5": relative(cond, before), "clip_l": relative(values["pooled_output"], told["pooled_output"]),
            "base": relative(after, before)}


def patchers() -> dict[str, Any]:
    """Of a model, text encoders and an autoencoder."""
    return {"model": HOST.load_model(MODEL), "clip": HOST.load_text_encoders(ENCODERS).patcher,
            "vae": HOST.load_vae(TINY / "vae" / "tiny-ae.safetensors").patcher}


@check
def estimates() -> Any:
    """What the host believes the weights take, and what they take."""
    return {name: {"told": patcher.model_size(), "held": held(patcher)} for name, patcher in patchers().items()}


@check
def control_net() -> Any:
    """Core's ControlNet for Flux, of tiny sizes and random weights, by core's node."""
    import comfy.controlnet
    import comfy.latent_formats
    import comfy.ldm.flux.controlnet
    ours, prompt = HOST.load_model(MODEL), conditioning()
    config = {name: value for name, value in OURS.params_of(ours.model.diffusion_model.spec).items()
              if name in {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}}
    network = comfy.ldm.flux.controlnet.ControlNetFlux(latent_input=True, operations=comfy.ops.manual_cast,
                                                       dtype=torch.float32, device="cpu", **config)
    network.load_state_dict({name: random(*tensor.shape, size=0.2) for name, tensor in network.state_dict().items()})
    control = comfy.controlnet.ControlNet(
        network.requires_grad_(False), compression_ratio=1, latent_format=comfy.latent_formats.Flux(),
        load_device=ours.load_device, manual_cast_dtype=torch.float32, extra_conds=["y", "guidance"])
    picture = torch.rand(1, 96, 128, 3, generator=GENERATOR)
    vae = HOST.load_vae(TINY / "vae" / "tiny-ae.safetensors")
    positive, _ = core_nodes.ControlNetApplyAdvanced().apply_controlnet(
        prompt, prompt, control, picture, 0.8, 0.0, 1.0, vae=vae)
    mine = sampled(ours, positive)
    return {"off": relative(mine, sampled(core_patcher(ours), positive)),
            "changed": relative(mine, sampled(ours, prompt))}


@check
def progress() -> Any:
    """What the host's progress hook is told during a run of ours, with previews switched on."""
    import comfy.cli_args
    import comfy.utils
    comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.Latent2RGB
    told: list[Any] = []

    def hook(value: int, total: int, preview: Any, **more: Any) -> None:
        told.append([value, total, None if preview is None else list(preview[1].size)])

    comfy.utils.set_progress_bar_global_hook(hook)
    our_sampler(HOST.load_model(MODEL), conditioning())
    comfy.utils.set_progress_bar_global_hook(None)
    comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.NoPreviews
    return {"told": told}


@check
def lifetime() -> Any:
    """Nothing is left of models that nobody holds, nothing lies on a mapped file, and the host can load them anew."""
    made, found, gone = patchers(), {}, {}
    for name, patcher in made.items():
        found[name] = {**loaded_anew(patcher), "mapped": mapped(patcher)}
        if "force_deepcopy" in inspect.signature(patcher.clone).parameters:
            found[name]["deep copy apart"] = patcher.clone(force_deepcopy=True).model is not patcher.model
        gone[name] = weakref.ref(patcher.model)
        comfy.model_management.load_models_gpu([patcher])
    patcher = None
    made.clear()
    return {name: {**found[name], "freed": one} for name, one in freed(gone).items()}


def main() -> None:
    sys.modules["inside"] = sys.modules["__main__"]
    sys.path.insert(0, str(Path(__file__).parent))
    for file in sorted(Path(__file__).parent.glob("inside_*.py")):
        importlib.import_module(file.stem)  # its checks enter themselves
    torch.set_num_threads(1)
    found = {}
    for name, function in CHECKS.items():
        if ONLY and name not in ONLY:
            continue
        try:
            with torch.inference_mode():
                found[name] = function()
        except Exception:  # noqa: BLE001 - told to the test, which fails by it
            found[name] = {"error": traceback.format_exc()}
        comfy.model_management.unload_all_models()
    print("\n" + json.dumps(found))


main()
