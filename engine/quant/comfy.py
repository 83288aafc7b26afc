"""The block formats of ComfyUI's `comfy_quant` files: blocks `(n, bytes)` uint8 -> values `(n, weights)` fp32.

The files keep block scales in a tensor of their own, tiled; `weights.comfy_quant` puts them beside their codes, as
here. What all weights of a tensor or a row are multiplied by stays outside, as the layer's scale.
Sources: OCP Microscaling Formats 1.0 (e8m0, e2m1); ComfyUI, comfy/quant_ops.py (which of them a file may hold); the
rotation: regular Hadamard matrices, in which each row has the same sum, here powers of the one of order four.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from .floats import e4m3fn, e8m0
from .ggml import E2M1_DOUBLED, looked_up

MXFP8_BLOCK, NVFP4_BLOCK = 32, 16
ROTATED = (256, 4, 16, 64, 1024, 4096)
"""Weights that are rotated together, the usual number first; sums of so many int8 codes are exact in fp32."""
_BASE = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def rotated_name(group: int) -> str:
    """`INT8_CONVROT_256`."""
    return f"INT8_CONVROT_{group}"


def int8(blocks: Tensor) -> Tensor:
    return blocks.view(torch.int8).float()


def int8_rotated(group: int) -> Callable[[Tensor], Tensor]:
    """Blocks of `group` codes -> the weights that were rotated before they were rounded, turned back: exact."""
    return partial(_turned_back, group)


def _turned_back(group: int, blocks: Tensor) -> Tensor:
    # the matrix is its own inverse, and a Kronecker product: two small products for a large one
    left = 4 ** ((group.bit_length() - 1) // 4)
    codes = int8(blocks).view(-1, left, group // left)
    count = codes.shape[0]
    values = torch.bmm(hadamard(left, blocks.device).expand(count, -1, -1), codes)
    return torch.bmm(values, hadamard(group // left, blocks.device).expand(count, -1, -1)).view(-1, group)


@lru_cache(maxsize=64)
def hadamard(order: int, device: torch.device) -> Tensor:
    """The regular Hadamard matrix of `order`, a power of four, divided by its root; fp32, symmetric, orthogonal."""
    base = torch.tensor(_BASE, dtype=torch.float32)
    matrix: Tensor = torch.ones(1, 1)
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, base)
    normal: Tensor = matrix / order**0.5
    return normal.to(device)


def mxfp8(blocks: Tensor) -> Tensor:
    """A power of two, then 32 floats of e4m3fn."""
    return e4m3fn(blocks[:, 1:]).mul_(e8m0(blocks[:, :1]))


@lru_cache(maxsize=16)
def _pairs(device: torch.device) -> Tensor:
    """Byte -> its two floats of e2m1, the upper four bits first, `(256, 2)`."""
    values = torch.tensor(E2M1_DOUBLED, dtype=torch.float32) / 2
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1).to(device)


def nvfp4(blocks: Tensor) -> Tensor:
    """A float of e4m3fn, then 16 of e2m1, two in a byte."""
    values = looked_up(_pairs(blocks.device), blocks[:, 1:]).view(-1, NVFP4_BLOCK)
    return values.mul_(e4m3fn(blocks[:, :1]))
