"""Floats of eight bits, each byte one number: codes of any shape, uint8 -> fp32."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .ggml import looked_up


def e5m2(codes: Tensor) -> Tensor:
    """An fp16 number without its lower eight bits."""
    return (codes.short() << 8).view(torch.float16).float()


def e4m3fn(codes: Tensor) -> Tensor:
    """Sign, four bits of exponent (bias 7), three of mantissa; no infinity, all ones is NaN (arXiv 2209.05433).

    By a table of all 256 codes: faster than torch's cast on a CPU, and right where the device has no fp8 at all.
    """
    return looked_up(_e4m3fn_table(codes.device), codes)


@lru_cache(maxsize=16)
def _e4m3fn_table(device: torch.device) -> Tensor:
    code = torch.arange(256, device=device, dtype=torch.int32)
    # the bits of an fp16 number 2^8 too small: its exponent has one bit more and a bias of 15
    bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    values = bits.short().view(torch.float16).float() * 256
    return values.masked_fill((code & 0x7F) == 0x7F, float("nan"))


def e8m0(codes: Tensor) -> Tensor:
    """2^(code - 127); 255 is NaN (OCP Microscaling Formats 1.0). 0 counts as 0, as where it marks an empty block."""
    return looked_up(_e8m0_table(codes.device), codes)


@lru_cache(maxsize=16)
def _e8m0_table(device: torch.device) -> Tensor:
    code = torch.arange(256, device=device, dtype=torch.int32)
    return (code << 23).view(torch.float32).masked_fill(code == 255, float("nan"))
