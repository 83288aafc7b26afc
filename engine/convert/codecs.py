"""How one tensor is written: its numbers in tiles of rows, and what stands beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quant.formats import FORMATS
from .ggml import encode
from .writers import Planned

FP8_MAX = 448.0
"""The largest number of e4m3fn."""
INT8_MAX = 127.0
MIN_SCALE = 1e-30
INT8_CONFIG = json.dumps({"format": "int8_tensorwise"}).encode()


@dataclass(frozen=True)
class Codec:
    """`encode`: rows of numbers and which they are -> their bytes uint8; `decode` the reverse, in fp32; `beside`: the
    bytes of the side tensors, in the order of `side_tensors`."""

    encode: Callable[[Tensor, slice], Tensor]
    decode: Callable[[Tensor, slice], Tensor]
    beside: tuple[Tensor, ...] = ()


def side_tensors(name: str, shape: tuple[int, ...], type: str) -> tuple[Planned, ...]:
    """What ComfyUI looks for beside the weight `name` of a packed layer."""
    layer = name.removesuffix(".weight")
    if type == "F8_E4M3":
        return (Planned(f"{layer}.scale_weight", (), "F32"),)
    if type == "I8":
        return (Planned(f"{layer}.weight_scale", (shape[0], 1), "F32"),
                Planned(f"{layer}.comfy_quant", (len(INT8_CONFIG),), "U8"))
    return ()


def codec(type: str, weight: Tensor) -> Codec:
    """The codec of `type` for `weight` `(rows, width)`."""
    if type == "F8_E4M3":
        return _fp8(weight)
    if type == "I8":
        return _int8(weight)
    format = FORMATS[type]
    return Codec(lambda tile, _: encode(tile, type), lambda packed, _: format.dequantize(packed))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _fp8(weight: Tensor) -> Codec:
    """One scale a tensor, a number of bf16: hosts that multiply by it in bf16 do so without another rounding."""
    low, high = weight.aminmax()  # unlike abs, no second weight in memory
    least = torch.maximum(-low, high).float() / FP8_MAX
    bits = least.view(torch.int32)
    scale = ((bits + 0xFFFF) & -0x10000).view(torch.float32)  # rounded up
    scale = torch.where(least > 0, scale, 1.0)

    def encoded(tile: Tensor, _: slice) -> Tensor:
        codes = (tile.float() / scale.to(tile.device)).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return codes.view(torch.uint8)

    return Codec(encoded, lambda packed, _: FORMATS["F8_E4M3"].dequantize(packed, scale=scale.to(packed.device)),
                 (_bytes(scale),))


def _int8(weight: Tensor) -> Codec:
    """One scale a row."""
    low, high = weight.aminmax(dim=1, keepdim=True)
    scales = (torch.maximum(-low, high).float() / INT8_MAX).clamp_(min=MIN_SCALE)

    def encoded(tile: Tensor, rows: slice) -> Tensor:
        codes = (tile.float() / scales[rows].to(tile.device)).round_().clamp_(-INT8_MAX, INT8_MAX)
        return codes.to(torch.int8).view(torch.uint8)

    def decoded(packed: Tensor, rows: slice) -> Tensor:
        return packed.view(torch.int8).float() * scales[rows].to(packed.device)

    return Codec(encoded, decoded, (_bytes(scales), torch.frombuffer(bytearray(INT8_CONFIG), dtype=torch.uint8)))
