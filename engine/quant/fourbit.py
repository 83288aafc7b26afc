"""NF4 and FP4 of bitsandbytes: per block one fp32 scale, the largest magnitude, then two codes in a byte, first high.

bitsandbytes keeps scales and codes in tensors of their own; `weights.fourbit` puts them side by side, as here.
Sources: the values of NF4, arXiv 2305.14314, appendix E; those of FP4, a sign and seven fractions of twelve, and the
order of the codes, bitsandbytes-foundation/bitsandbytes, functional.py (`get_4bit_type`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import torch
from torch import Tensor

from .ggml import looked_up

SCALE_BYTES = 4
BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)
"""Weights that share a scale, the usual number first."""
_FP4 = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
VALUES: Mapping[str, tuple[float, ...]] = {
    "NF4": (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
            1.0),
    "FP4": (*_FP4, *(-value for value in _FP4)),
}


def format_name(kind: str, block: int) -> str:
    """`NF4` for the usual block, else with its size: `NF4_128`."""
    return kind if block == BLOCKS[0] else f"{kind}_{block}"


def unpacker(kind: str) -> Callable[[Tensor], Tensor]:
    """Blocks `(n, 4 + block / 2)` uint8 -> values `(n, block)` fp32, for `kind` of `VALUES`."""
    return partial(_unpack, kind)


def _unpack(kind: str, blocks: Tensor) -> Tensor:
    pairs = looked_up(_pairs(kind, blocks.device), blocks[:, SCALE_BYTES:])
    return pairs.view(blocks.shape[0], -1).mul_(blocks.view(torch.float32)[:, :1])


@lru_cache(maxsize=16)
def _pairs(kind: str, device: torch.device) -> Tensor:
    """Byte -> its two values, `(256, 2)`."""
    values = torch.tensor(VALUES[kind], dtype=torch.float32, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)
