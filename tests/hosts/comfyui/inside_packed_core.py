"""A check of inside.py: ComfyUI's own quantised layers against our reading of their files. Imported by inside.py."""

from __future__ import annotations

import sys
from typing import Any

import comfy.ops
import torch
from inside import ENGINE, check, random, relative
from inside_packed import FOLDER, OUT
from safetensors.torch import load_file, save_file

ROTATED = ("INT8 rotated", {"per_channel": True, "convrot": True, "convrot_groupsize": 64})
MADE = {"F8_E4M3": ("float8_e4m3fn", {"scale": "recalculate"}), "F8_E5M2": ("float8_e5m2", {"scale": "recalculate"}),
        "INT8": ("int8_tensorwise", {"per_channel": True}), "INT8 of one scale": ("int8_tensorwise", {}),
        ROTATED[0]: ("int8_tensorwise", ROTATED[1]), "MXFP8": ("mxfp8", {}), "NVFP4": ("nvfp4", {})}
"""What the host quantises, to which of its formats, with which options."""
COMPUTE = torch.float32


def host_layer(rows: int, width: int) -> Any:
    return comfy.ops.mixed_precision_ops({}, COMPUTE).Linear(width, rows, bias=False, device="cpu", dtype=COMPUTE)


def ours(path: Any) -> dict[str, torch.Tensor]:
    """All matrices of a file in fp32, as our loader unpacks them."""
    weights, stored = (sys.modules[f"{ENGINE}.weights"], sys.modules[f"{ENGINE}.weights.stored"])
    with weights.open_checkpoint(path) as checkpoint:
        numbers = stored.Stored(checkpoint, torch.float32)
        return {name: numbers.numbers(name) for name, info in checkpoint.items()
                if name.endswith(".weight") and len(info.shape) == 2}


@check
def packed_core_formats() -> Any:
    """Both ways: files of our tests read by the host's layers, and what these write read by our loader."""
    path = FOLDER / "flux-quant.safetensors"
    if not path.exists() or not hasattr(comfy.ops, "mixed_precision_ops"):
        return {}
    quant_ops = sys.modules["comfy.quant_ops"]
    if "mxfp8" not in quant_ops.QUANT_ALGOS:
        return {}
    state, read, found = load_file(path), ours(path), {"theirs": {}, "made": {}}
    for name in (name for name in state if name.endswith(".comfy_quant")):
        layer = name.removesuffix(".comfy_quant")
        mine = read[f"{layer}.weight"]
        module = host_layer(*mine.shape)
        module.load_state_dict({key.rpartition(".")[2]: value for key, value in state.items()
                                if key.startswith(f"{layer}.") and not key.endswith(".bias")})
        # the host multiplies its input by this; our layers the columns of the weight
        columns = getattr(module, "pre_quant_scale", None)
        theirs = module.weight.dequantize() * (1 if columns is None else columns)
        found["theirs"][layer] = relative(mine, theirs)
    for name, (format, options) in MADE.items():
        module, weight = host_layer(192, 320), random(192, 320, size=0.05)
        module.quant_format, module.layout_type = format, quant_ops.QUANT_ALGOS[format]["comfy_tensor_layout"]
        module.weight = torch.nn.Parameter(
            quant_ops.QuantizedTensor.from_float(weight, module.layout_type, **options), requires_grad=False)
        made = OUT / "made.safetensors"
        save_file({key: value.contiguous() for key, value in module.state_dict(prefix="x.").items()}, made)
        found["made"][name] = [relative(ours(made)["x.weight"], module.weight.dequantize()),
                               relative(module.weight.dequantize(), weight)]
    return found
