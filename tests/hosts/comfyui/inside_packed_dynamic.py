"""A check of inside.py: packed weights under the host's dynamic VRAM, on the CPU, with a stand-in for its allocator.

Everything else is the host's own code: its patcher, its streaming of weights, its reading of byte layouts. What the
stand-in cannot show is anything of the device: speed, overlap, real memory pressure.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from inside import HOST, NAME, OURS, check, pass_inputs, patched, relative
from inside_accidents import message
from inside_packed import FILES, all_loras, dense_of, packed_layers

DEVICE = torch.device("cpu", 0)  # the host takes it for another device than "cpu", torch for the same


class Allocator:
    """Hands out places in one buffer; `fits` of them are kept from use to use, the others are streamed each time."""

    def __init__(self, size: int, device: Any) -> None:
        self.buffer, self.offset, self.places = torch.zeros(size, dtype=torch.uint8), 0, []
        self.fits, self.faults, self.unpinned = 10**9, 0, 0

    def alloc(self, size: int) -> Any:
        place = (self, self.offset, size)
        self.places.append(place)
        self.offset += size
        return place

    def prioritize(self) -> None:
        pass

    def loaded_size(self) -> int:
        return sum(size for _, _, size in self.places[:self.fits])

    def free_memory(self, size: float) -> int:
        return 0


def fault(place: Any) -> Any:
    vbar = place[0]
    vbar.faults += 1
    return place[1:] if place in vbar.places[:vbar.fits] else None


def unpin(place: Any) -> None:
    place[0].unpinned += 1


class HostBuffer:
    def __init__(self, *sizes: int) -> None:
        self.size = 0


@contextlib.contextmanager
def dynamic_host() -> Iterator[None]:
    """The host as it is with its dynamic VRAM on, and our setting too."""
    management, cast = comfy.model_management, comfy.ops.cast_bias_weight

    def is_cpu(device: Any) -> bool:
        return device == torch.device("cpu")

    def on_device(layer: Any, input: Any = None, dtype: Any = None, device: Any = None, **options: Any) -> Any:
        return cast(layer, input, dtype=dtype, device=DEVICE, **options)

    vbar = comfy.model_patcher.comfy_aimdo.model_vbar
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
                (management, "is_device_cpu", is_cpu), (management, "get_torch_device", lambda: DEVICE),
                (comfy.memory_management, "aimdo_enabled", True), (comfy.ops, "cast_bias_weight", on_device),
                (vbar, "ModelVBAR", Allocator), (vbar, "vbar_fault", fault), (vbar, "vbar_unpin", unpin),
                (vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b),
                (comfy.ops.comfy_aimdo.torch, "aimdo_to_tensor",
                 lambda place, device: place[0].buffer[place[1]:place[1] + place[2]]),
                (comfy.model_patcher.comfy_aimdo, "host_buffer", SimpleNamespace(HostBuffer=HostBuffer)),
                (management.args, "disable_pinned_memory", True)):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(os.environ, {"FLUX_KIT_DYNAMIC_VRAM": "1"}))
        yield


def passed(patcher: Any, inputs: dict[str, Any]) -> torch.Tensor:
    patcher.partially_load(patcher.load_device)
    out: torch.Tensor = patcher.model.apply_model(**{key: value.clone() for key, value in inputs.items()})
    return out


def static(patcher: Any, inputs: dict[str, Any]) -> torch.Tensor:
    patcher.patch_model(device_to=None, load_weights=False)
    patcher.load(torch.device("cpu"), full_load=True)
    out: torch.Tensor = patcher.model.apply_model(**{key: value.clone() for key, value in inputs.items()})
    patcher.unpatch_model(torch.device("cpu"))
    return out


def stored(patcher: Any) -> dict[str, torch.Tensor]:
    return {name: layer.weight._qdata.clone() for name, layer in patcher.layers().items()
            if hasattr(layer.weight, "_qdata")}


def layouts(patcher: Any) -> dict[str, Any]:
    """What the host makes of our tensors' bytes."""
    memory, found = comfy.memory_management, {"tensors": 0, "sizes": True, "same": True, "scaled": 0}
    for layer in patcher.layers().values():
        names, _ = layer.weight.__tensor_flatten__()
        parts = [getattr(layer.weight, name) for name in names]
        size = memory.vram_aligned_size([layer.weight])
        gathered = torch.zeros(size, dtype=torch.uint8)
        comfy.model_management.cast_to_gathered([layer.weight], gathered)
        again, = memory.interpret_gathered_like([layer.weight], gathered)
        found["tensors"] += 1
        found["scaled"] += len(parts) == 2
        found["sizes"] &= size == sum(-(-part.nbytes // 1024) * 1024 for part in parts)
        found["sizes"] &= layer.weight.nbytes == parts[0].nbytes and parts[0].dtype == torch.uint8
        found["same"] &= torch.equal(again.dequantize(), layer.weight.dequantize())
        found["same"] &= tuple(again.shape) == (layer.out_features, layer.in_features)
    return found


def assigned(patcher: Any, inputs: dict[str, Any]) -> bool:
    """The host's own loading by assignment, into a fresh model that has no weights yet."""
    model = patcher.model
    state = {f"p.{key.removeprefix('diffusion_model.')}": value for key, value in model.state_dict().items()
             if key.startswith("diffusion_model.")}
    with torch.device("meta"):
        fresh = OURS.Flux(model.diffusion_model.spec, torch.float32)
    held, model.diffusion_model = model.diffusion_model, fresh
    try:
        model.load_model_weights(dict(state), "p.", assign=True)
        got = [fresh.get_submodule(name.removeprefix("diffusion_model.")).weight for name in patcher_names(held)]
        want = [held.get_submodule(name).weight for name in patcher_names(held)]
        return all(type(a.data) is type(b.data) and a._qdata.data_ptr() == b._qdata.data_ptr()
                   for a, b in zip(got, want, strict=True))
    finally:
        model.diffusion_model = held


def patcher_names(model: Any) -> list[str]:
    return [name for name, layer in model.named_modules() if type(layer).__name__ == "DynamicLinear"
            and hasattr(layer.weight, "_qdata")]


@check
def packed_dynamic() -> Any:
    if not FILES or not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        return {}
    inputs = pass_inputs()
    found: dict[str, Any] = {"unasked": {"kind": type(HOST.load_model(FILES[0])).__name__}}
    with mock.patch.dict(os.environ, {"FLUX_KIT_DYNAMIC_VRAM": "1"}):
        found["unasked"]["on a cpu"] = type(HOST.load_model(FILES[0])).__name__
    loras = all_loras()
    for path in FILES:
        plain = HOST.load_model(path)
        expected = {name: static(plain if weights is None else patched(plain, weights), inputs)
                    for name, weights in {"no lora": None, **loras}.items()}
        with dynamic_host():
            found[path.name] = one_file(path, inputs, loras, expected)
    return found


def one_file(path: Any, inputs: dict[str, Any], loras: dict[str, Any], expected: dict[str, torch.Tensor]
             ) -> dict[str, Any]:
    patcher = HOST.load_model(path)
    case: dict[str, Any] = {"kind": type(patcher).__name__, "own": len(packed_layers(patcher.model)),
                            "layout": layouts(patcher), "assigned": assigned(patcher, inputs)}
    before = stored(patcher)
    bits = sum(value.nbytes for value in before.values())
    case["told"] = (patcher.model_size() - bits) / bits
    base = passed(patcher, inputs)
    vbar = patcher.model.dynamic_vbars[DEVICE]
    case["no lora"] = relative(base, expected["no lora"])
    case["places"] = [len(vbar.places), vbar.faults > 0, vbar.faults == vbar.unpinned]
    for fits in (10**9, 7, 0):
        vbar.fits = fits
        case[f"again, {min(fits, 99)} fit"] = relative(passed(patcher, inputs), base)
    held = vbar.buffer.clone()
    for fits in (10**9, 0):
        vbar.fits = fits
        for name, weights in loras.items():
            changed = patched(patcher, weights)
            case[f"{name}, {min(fits, 99)} fit"] = relative(passed(changed, inputs), expected[name])
            case[f"{name}, moved"] = all(layer.weight_lowvram_function is None for layer in changed.layers().values()
                                         if hasattr(layer, "weight_lowvram_function"))
            case[f"base after {name}, {min(fits, 99)} fit"] = relative(passed(patcher, inputs), base)
    case["packed bytes kept"] = all(torch.equal(before[name], value) for name, value in stored(patcher).items())
    case["held bytes kept"] = kept(vbar.buffer, held, patcher)
    changed = patched(patcher, loras["kohya"])
    copy = changed.get_non_dynamic_delegate()
    case["static copy"] = [type(copy).__name__, copy.model is not patcher.model,
                           relative(static(copy, inputs), expected["kohya"])]
    case["static copy, no lora"] = relative(static(patcher.clone(disable_dynamic=True), inputs), expected["no lora"])
    case["saved"] = saved(path, patcher, changed)
    layout = sys.modules[NAME + ".hosts.comfyui.dynamic"].PackedLayout
    case["packed anew"] = message(layout.quantize, torch.zeros(2, 2))
    return case


def kept(now: torch.Tensor, before: torch.Tensor, patcher: Any) -> bool:
    """The packed part of every place; a bias behind it may have a LoRA put in, by the host."""
    same = True
    for layer in patcher.layers().values():
        if hasattr(layer, "_v") and hasattr(layer.weight, "_qdata"):
            _, first, _ = layer._v
            part = slice(first, first + layer.weight._qdata.nbytes)
            same &= torch.equal(now[part], before[part]) and torch.equal(now[part], layer.weight._qdata.view(-1))
    return same


def saved(path: Any, patcher: Any, changed: Any) -> list[float]:
    """What saving nodes get, against plain weights with the host's LoRA."""
    state = patcher.model_state_dict_for_saving(patcher.model.diffusion_model, "diffusion_model.")
    plain = HOST.load_model(dense_of(path)).model.diffusion_model.state_dict()
    off = max(relative(state[key].to("cpu"), value) for key, value in plain.items() if key.endswith("linear1.weight"))
    key = "single_blocks.0.linear1.weight"
    name = f"diffusion_model.{key}"
    with_lora = changed.model_state_dict_for_saving(changed.model.diffusion_model, "diffusion_model.")[key]
    expected = comfy.lora.calculate_weight(changed.patches[name], plain[key].clone(), name)
    return [off, relative(with_lora, expected), float(len(state) - len(plain))]
