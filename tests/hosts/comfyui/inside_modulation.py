"""Checks of inside.py on the table of modulations: each case sampled with the table and, as its oracle, with the same
weights while the table answers nothing. Imported by inside.py."""

from __future__ import annotations

import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import torch
from comfy.model_patcher import LowVramPatch
from inside import (
    ENGINE,
    HOST,
    MODEL,
    NAME,
    D,
    check,
    conditioning,
    loaded,
    low_rank,
    patched,
    random,
    relative,
    sampled,
)
from inside_accidents import classic_forward

TABLE = sys.modules[NAME + ".hosts.comfyui.modulation"].HostTable
CARRIED = sys.modules[NAME + ".hosts.comfyui.modulation"].carried
MODULES = sys.modules[ENGINE + ".models.modulation"].modulation_modules
DIT = "diffusion_model."
RUNS = {"loaded": 2, "streamed": 4}  # some hosts load a part more for each run


def table_of(patcher: Any) -> Any:
    return patcher.model.diffusion_model.modulations


@contextmanager
def without() -> Iterator[None]:
    with mock.patch.object(TABLE, "at", lambda *_: None):
        yield


def against(patcher: Any, prompt: Any, runs: int = 2, **settings: Any) -> dict[str, Any]:
    """Some runs with the table and one without. Of each: how many entries were computed and how many found, and on how
    many of its layers the host's patches hung meanwhile, in place of being in the weights."""
    table = table_of(patcher)
    table.clear()
    outs, did, hung = [], [], []
    for _ in range(runs):
        before = table.computed, table.found
        outs.append(sampled(patcher, prompt, **settings))
        did.append((table.computed - before[0], table.found - before[1]))
        hung.append(sum(any(isinstance(each, LowVramPatch) for each in getattr(layer, "weight_function", ()))
                        for _, layer in MODULES(patcher.model.diffusion_model)))
    with without():
        plain = sampled(patcher, prompt, **settings)
    return {"equal": all(torch.equal(out, plain) for out in outs), "did": did, "hung": hung, "out": plain}


def told(found: dict[str, Any], base: torch.Tensor) -> dict[str, Any]:
    out = found.pop("out")
    changed = relative(out, base) if out.shape == base.shape else 1.0
    return {**found, "changed": changed}


def on_modulations() -> dict[str, torch.Tensor]:
    """A LoRA on modulating layers and on an embedder, as its keys are spelt for core's loader."""
    return low_rank({"double_blocks_0_img_mod_lin": (6 * D, D), "single_blocks_1_modulation_lin": (3 * D, D)},
                    "lora_down", "lora_up", "lora_unet_", alpha=True)


def on_embedder() -> dict[str, torch.Tensor]:
    return low_rank({"vector_in_in_layer": (D, 64)}, "lora_down", "lora_up", "lora_unet_", alpha=True)


def elsewhere() -> dict[str, torch.Tensor]:
    return low_rank({"double_blocks_1_txt_mlp_0": (4 * D, D)}, "lora_down", "lora_up", "lora_unet_", alpha=True)


def our_way(model: Any, weights: dict[str, torch.Tensor], **row: Any) -> Any:
    """A LoRA that hangs beside the layers while the host samples."""
    path = Path(tempfile.mkdtemp()) / "one.safetensors"
    sys.modules["safetensors.torch"].save_file(weights, path)
    lora, stack = sys.modules[NAME + ".hosts.comfyui.lora"], sys.modules[ENGINE + ".adapters.stack"]
    return lora.with_loras(model, None, [stack.Row(path.name, 0.7, 0.7, **row)], mode="side", strict=True,
                           resolve=lambda _: path)[0]


@contextmanager
def streamed(patcher: Any) -> Iterator[None]:
    """The host's memory as if a third of the model had room: the rest of the layers get their weights as they run."""
    budget = patcher.model_size() // 3
    kind = comfy.model_management.LoadedModel
    original = kind.model_load

    def model_load(self: Any, lowvram_model_memory: int = 0, force_patch_weights: bool = False) -> Any:
        return original(self, budget, force_patch_weights)

    comfy.model_management.unload_all_models()
    with mock.patch.object(kind, "model_load", model_load):
        yield
    comfy.model_management.unload_all_models()


def files() -> dict[str, Path]:
    """tiny-flux as it is, and packed."""
    folder = Path(tempfile.mkdtemp())
    packed = folder / "tiny-Q8_0.gguf"
    sys.modules[ENGINE + ".convert"].quantize(MODEL, packed, "Q8_0")
    return {"plain": MODEL, "packed": packed}


def same_carried(entry: Any) -> bool:
    """What a layer gives whose weights the host brings over once for several inputs; here they lie there already."""
    _, layer = entry
    rows = [random(2, layer.in_features) for _ in range(3)]
    return all(torch.equal(out, layer(x)) for x, out in zip(rows, CARRIED(layer, rows), strict=True))


@check
def modulation_weights() -> Any:
    """LoRAs by core's loader, hooks and wrappers on modulating layers, loaded and streamed."""
    found: dict[str, Any] = {}
    prompt = conditioning()
    for kind, path in files().items():
        ours = HOST.load_model(path)
        base = sampled(ours, prompt)
        wrapped = ours.clone()
        wrapped.add_weight_wrapper(f"{DIT}double_blocks.0.img_mod.lin.weight", lambda weight: weight * 1.5)
        cases = {"none": ours, "wrapper": wrapped, **{name: patched(ours, weights) for name, weights in (
            ("lora", on_modulations()), ("lora on embedder", on_embedder()), ("lora elsewhere", elsewhere()))},
            "side path": our_way(ours, {**on_modulations(), **on_embedder()}),
            "side path that changes": our_way(ours, on_modulations(), end=0.5)}
        for memory in RUNS:
            for name, patcher in cases.items():
                with streamed(patcher) if memory == "streamed" else nullcontext():
                    found[f"{kind} {memory} {name}"] = told(against(patcher, prompt, RUNS[memory]), base)
            with without():
                again = sampled(ours, prompt)
            found[f"{kind} {memory} afterwards"] = {"equal": torch.equal(sampled(ours, prompt), again)
                                                    and torch.equal(again, base), "changed": 0.0}
        hooks = comfy.hooks.create_hook_lora(on_modulations(), 0.7, 0.0)
        frames = comfy.hooks.HookKeyframeGroup()
        for strength, start in ((1.0, 0.0), (0.2, 0.5)):
            frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
        hooks.set_keyframes_on_hooks(frames)
        hooked = comfy.hooks.set_hooks_for_conditioning(prompt, hooks=hooks)
        found[f"{kind} hooks"] = told(against(ours, hooked), base)
        found[f"{kind} hooks afterwards"] = told(against(ours, prompt), base)
        found[f"{kind} carried"] = {"equal": all(map(same_carried, MODULES(ours.model.diffusion_model)))}
    return found


@check
def modulation_calls() -> Any:
    """Samplers, prompts and packs that call the network in other ways."""
    found: dict[str, Any] = {}
    prompt, ours = conditioning(), HOST.load_model(MODEL)
    other = [[random(*prompt[0][0].shape), {**prompt[0][1], "guidance": 1.0,
                                            "pooled_output": random(*prompt[0][1]["pooled_output"].shape)}]]
    network = ours.model.diffusion_model
    base = sampled(ours, prompt)
    found["plain"] = told(against(ours, prompt), base)
    found["another seed"] = told(against(ours, prompt, seed=4), base)
    found["heun"] = told(against(ours, prompt, sampler_name="heun"), base)
    found["dpm_2"] = told(against(ours, prompt, sampler_name="dpm_2"), base)
    batches: list[int] = []
    watched = ours.clone()

    def watch(apply: Any, call: Any) -> Any:
        batches.append(len(call["input"]))
        return apply(call["input"], call["timestep"], **call["c"])

    watched.set_model_unet_function_wrapper(watch)
    found["guided"] = told(against(watched, prompt, negative=other, cfg=2.0), base)
    found["guided"]["batches"] = sorted(set(batches))

    swapped = ours.clone()
    swapped.set_model_patch_replace(lambda args, extra: double(network.double_blocks[1], args),
                                    "dit", "double_block", 0)
    swapped.set_model_patch_replace(lambda args, extra: {"img": network.single_blocks[2](
        args["img"], vec=args["vec"], pe=args["pe"], transformer_options=args["transformer_options"])},
        "dit", "single_block", 0)
    found["blocks swapped by patches"] = told(against(swapped, prompt), base)
    blocks = network.single_blocks
    with mock.patch.object(network, "single_blocks", torch.nn.ModuleList(reversed(list(blocks)))):
        found["blocks swapped in the list"] = told(against(ours, prompt), base)
    changed = ours.clone()
    changed.set_model_patch_replace(lambda args, extra: extra["original_block"]({**args, "vec": args["vec"] * 1.5}),
                                    "dit", "double_block", 1)
    found["vec changed"] = told(against(changed, prompt), base)
    bare = ours.clone()
    bare.set_model_patch_replace(
        lambda args, extra: extra["original_block"]({name: args[name] for name in ("img", "txt", "vec", "pe")}),
        "dit", "double_block", 1)
    found["options left out"] = told(against(bare, prompt), base)
    network.forward_orig = types.MethodType(without_a_block, network)
    found["forward_orig replaced"] = told(against(ours, prompt), base)
    del network.forward_orig
    found["forward_orig of a pack as an object patch"] = told(against(replaced_forward(ours), prompt), base)
    found["direct calls"] = directly(network)
    found["afterwards"] = told(against(ours, prompt), base)
    return found


def double(block: Any, args: Any) -> dict[str, Any]:
    img, txt = block(img=args["img"], txt=args["txt"], vec=args["vec"], pe=args["pe"],
                     transformer_options=args["transformer_options"])
    return {"img": img, "txt": txt}


def without_a_block(self: Any, *args: Any, **keywords: Any) -> Any:
    with mock.patch.object(self, "double_blocks", torch.nn.ModuleList([self.double_blocks[1]])):
        return classic_forward(self, *args, **keywords)


def replaced_forward(patcher: Any) -> Any:
    clone = patcher.clone()
    clone.add_object_patch("diffusion_model.forward_orig",
                           types.MethodType(without_a_block, patcher.model.diffusion_model))
    return clone


def directly(network: Any) -> dict[str, Any]:
    """Layers called by themselves, right after a run has filled the table."""
    vec = random(1, D)
    lin = network.double_blocks[0].img_mod.lin
    first, _ = network.double_blocks[0].img_mod(vec)
    expected = torch.nn.functional.linear(torch.nn.functional.silu(vec), lin.weight, lin.bias)[:, None, :D]
    return {"equal": torch.equal(first.shift, expected), "changed": 1.0}


@check
def modulation_memory() -> Any:
    """Which layers have no room at several budgets, and that the counts of the host stay as they are."""
    found: dict[str, Any] = {}
    for kind, path in files().items():
        patcher = HOST.load_model(path)
        replaced = {f"{DIT}{name}" for name, _ in MODULES(patcher.model.diffusion_model)}
        size = patcher.model_size()
        sizes = {name: sum(p.nbytes for p in module.parameters(recurse=False))
                 for name, module in patcher.model.named_modules()}
        modulating = sum(sizes[name] for name in replaced)
        for share in (0.3, 0.6, 0.9):
            with loaded(patcher, share) as taken:
                away = {name for name, module in patcher.model.named_modules()
                        if sizes[name] and hasattr(module, "comfy_cast_weights")
                        and not getattr(module, "comfy_patched_weights", False)}
                freed = patcher.partially_unload(patcher.offload_device, int(size * 0.05))
            found[f"{kind} {share}"] = {
                "loaded": taken / size, "modulating": modulating / size, "freed": freed / size,
                "modulations away": sum(sizes[name] for name in away & replaced) / modulating,
                "others away": sum(sizes[name] for name in away - replaced) / size}
        with loaded(patcher):
            freed = patcher.partially_unload(patcher.offload_device, int(modulating * 0.5))
            given = {name for name, module in patcher.model.named_modules()
                     if sizes[name] and getattr(module, "comfy_patched_weights", None) is False}
        found[f"{kind} given back"] = {"freed": freed / size, "modulating": modulating / size,
                                       "others": sorted(given - replaced), "count": len(given)}
    return found
