"""The types that weights are stored in: one row each, with a pure function from packed bytes to numbers.

To add a type: one function from blocks to fp32, one row in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import codebooks, comfy, floats, fourbit, ggml

TILE_WEIGHTS = {"cpu": 1 << 19}
"""Weights unpacked at once, by kind of device. On a CPU the temporaries of a tile stay in its cache."""
WIDE_TILE = 1 << 24


@dataclass(frozen=True)
class QuantFormat:
    """`block` weights in `nbytes` bytes, named as containers name it.

    `unpack`: blocks `(n, nbytes)` uint8, contiguous -> values `(n, block)` fp32. `halves`: offsets in a block of its
    fp16 scales, `singles` of those in fp32; `scales` gives scales of another kind, blocks -> fp32. `codebook`: whether
    the `gguf` package is needed.
    """

    name: str
    block: int
    nbytes: int
    unpack: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    halves: tuple[int, ...] = field(default=(), repr=False)
    codebook: bool = False
    singles: tuple[int, ...] = field(default=(), repr=False)
    scales: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights; ValueError unless `width` is a multiple of the block."""
        if width % self.block:
            raise ValueError(f"{width} weights are no multiple of the {self.block} in a block of {self.name}")
        return width // self.block * self.nbytes

    def width(self, row_bytes: int) -> int:
        """Weights in a row of `row_bytes` bytes; ValueError unless these are whole blocks."""
        if row_bytes % self.nbytes:
            raise ValueError(f"{row_bytes} bytes are no multiple of the {self.nbytes} in a block of {self.name}")
        return row_bytes // self.nbytes * self.block

    def dequantize(self, packed: Tensor, dtype: torch.dtype = torch.float32, *, scale: Tensor | None = None,
                   out: Tensor | None = None) -> Tensor:
        """Packed rows `(..., row_bytes)` uint8 -> `(..., width)` in `dtype`, a tile of rows at a time.

        The numbers are worked out in fp32 and rounded once. `scale`: fp32, of shape `()`, one per row `(rows, 1)` or
        one per column `(1, width)`, multiplied in before that. `out`: where to put them, of the result's shape,
        contiguous.
        """
        width = self.width(packed.shape[-1])
        rows = packed.reshape(-1, packed.shape[-1])
        if out is None:
            out = torch.empty(*packed.shape[:-1], width, dtype=dtype, device=packed.device)
        into = out.view(-1, width)
        step = max(1, TILE_WEIGHTS.get(packed.device.type, WIDE_TILE) // max(width, 1))
        for first in range(0, rows.shape[0], step):
            tile = slice(first, first + step)
            values = self.unpack(rows[tile].reshape(-1, self.nbytes)).view(-1, width)
            if scale is not None:
                values = values * rows_of(scale, tile)
            into[tile] = values
        return out

    def is_finite(self, packed: Tensor) -> bool:
        """Whether every scale named in `packed`, whole blocks of uint8 in any shape, is a finite number."""
        blocks = packed.reshape(-1, self.nbytes)
        return (all(bool(((blocks.view(torch.int16)[:, at // 2] & 0x7C00) != 0x7C00).all()) for at in self.halves)
                and all(bool(blocks.view(torch.float32)[:, at // 4].isfinite().all()) for at in self.singles)
                and (self.scales is None or bool(self.scales(blocks).isfinite().all())))

    def require(self) -> None:
        """Raises `MissingCodebook` unless this type can be unpacked here."""
        if self.codebook:
            codebooks.require(self.name)


def rows_of(scale: Tensor, rows: slice | Tensor) -> Tensor:
    """The part of `scale` (see `dequantize`) that these rows are multiplied by."""
    return scale[rows] if scale.ndim and scale.shape[0] > 1 else scale


def _viewed(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.view(dtype).float()


K = ggml.QK_K
_ROWS: tuple[QuantFormat, ...] = (
    QuantFormat("F32", 1, 4, _viewed(torch.float32)),
    QuantFormat("F16", 1, 2, _viewed(torch.float16)),
    QuantFormat("BF16", 1, 2, _viewed(torch.bfloat16)),
    QuantFormat("F8_E4M3", 1, 1, floats.e4m3fn),
    QuantFormat("F8_E5M2", 1, 1, floats.e5m2),
    QuantFormat("Q4_0", 32, 2 + 16, ggml.q4_0, (0,)),
    QuantFormat("Q4_1", 32, 2 + 2 + 16, ggml.q4_1, (0, 2)),
    QuantFormat("Q5_0", 32, 2 + 4 + 16, ggml.q5_0, (0,)),
    QuantFormat("Q5_1", 32, 2 + 2 + 4 + 16, ggml.q5_1, (0, 2)),
    QuantFormat("Q8_0", 32, 2 + 32, ggml.q8_0, (0,)),
    QuantFormat("Q2_K", K, K // 16 + K // 4 + 2 + 2, ggml.q2_k, (80, 82)),
    QuantFormat("Q3_K", K, K // 8 + K // 4 + 12 + 2, ggml.q3_k, (108,)),
    QuantFormat("Q4_K", K, 2 + 2 + 12 + K // 2, ggml.q4_k, (0, 2)),
    QuantFormat("Q5_K", K, 2 + 2 + 12 + K // 8 + K // 2, ggml.q5_k, (0, 2)),
    QuantFormat("Q6_K", K, K // 2 + K // 4 + K // 16 + 2, ggml.q6_k, (208,)),
    QuantFormat("Q8_K", K, 4 + K + K // 8, ggml.q8_k, singles=(0,)),
    QuantFormat("TQ1_0", K, 48 + 4 + 2, ggml.tq1_0, (52,)),
    QuantFormat("TQ2_0", K, K // 4 + 2, ggml.tq2_0, (64,)),
    QuantFormat("MXFP4", 32, 1 + 16, ggml.mxfp4, scales=lambda blocks: floats.e8m0(blocks[:, 0])),
    QuantFormat("NVFP4", 64, 4 + 32, ggml.nvfp4),
    QuantFormat("IQ1_S", K, 2 + K // 8 + K // 16, codebooks.iq1_s, (0,), codebook=True),
    QuantFormat("IQ1_M", K, K // 8 + K // 16 + K // 32, codebooks.iq1_m, codebook=True,
                scales=codebooks.iq1_m_scale),
    QuantFormat("IQ2_XXS", K, 2 + K // 4, codebooks.iq2_xxs, (0,), codebook=True),
    QuantFormat("IQ2_XS", K, 2 + K // 4 + K // 32, codebooks.iq2_xs, (0,), codebook=True),
    QuantFormat("IQ2_S", K, 2 + K // 4 + K // 16, codebooks.iq2_s, (0,), codebook=True),
    QuantFormat("IQ3_XXS", K, 2 + K // 4 + K // 8, codebooks.iq3_xxs, (0,), codebook=True),
    QuantFormat("IQ3_S", K, 2 + K // 4 + K // 32 + K // 8 + 4, codebooks.iq3_s, (0,), codebook=True),
    QuantFormat("IQ4_NL", 32, 2 + 16, codebooks.iq4_nl, (0,), codebook=True),
    QuantFormat("IQ4_XS", K, 2 + 2 + K // 64 + K // 2, codebooks.iq4_xs, (0,), codebook=True),
    *(QuantFormat(fourbit.format_name(kind, block), block, fourbit.SCALE_BYTES + block // 2, fourbit.unpacker(kind),
                  singles=(0,)) for kind in fourbit.VALUES for block in fourbit.BLOCKS),
    QuantFormat("INT8", 1, 1, comfy.int8),
    *(QuantFormat(comfy.rotated_name(group), group, group, comfy.int8_rotated(group)) for group in comfy.ROTATED),
    QuantFormat("MXFP8", comfy.MXFP8_BLOCK, 1 + comfy.MXFP8_BLOCK, comfy.mxfp8,
                scales=lambda blocks: floats.e8m0(blocks[:, 0])),
    QuantFormat("NVFP4_16", comfy.NVFP4_BLOCK, 1 + comfy.NVFP4_BLOCK // 2, comfy.nvfp4,
                scales=lambda blocks: floats.e4m3fn(blocks[:, 0])),
)
FORMATS: Mapping[str, QuantFormat] = {row.name: row for row in _ROWS}
