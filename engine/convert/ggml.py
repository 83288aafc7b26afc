"""Numbers to ggml's blocks: one pure function a type, blocks `(n, weights)` fp32 -> `(n, bytes)` uint8.

The layout of each block is that of `quant.ggml`, whose functions are the inverses. Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and
BF16 give the bytes of gguf-py; K and IQ4 types search for scales (`search`) as ggml-quants.c does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from ..quant.formats import FORMATS
from .search import columns, extremes, fit_scale, fit_scale_and_low

TILE_WEIGHTS = {"cpu": 1 << 17}
"""Weights encoded at once, by kind of device: on a CPU, by each of its threads, so that what a search needs stays in
the caches."""
WIDE_TILE = 1 << 23
TRIALS = 9
"""Steps of a tenth to either side of the scale that fits a group's extreme (Q3_K, Q6_K)."""
IQ4_TRIALS = 7

Encoder = Callable[[Tensor], Tensor]


def encode(rows: Tensor, name: str) -> Tensor:
    """`(rows, width)` of finite numbers -> packed rows `(rows, row_bytes)` uint8 in the type `name`, on `rows`' device.

    The width must be a multiple of the type's block. Numbers too large for a block's fp16 scales become infinite.
    """
    format, encoder = FORMATS[name], ENCODERS[name]
    out = torch.empty(rows.shape[0], format.row_bytes(rows.shape[1]), dtype=torch.uint8, device=rows.device)
    blocks, into = rows.reshape(-1, format.block), out.view(-1, format.nbytes)
    tile_weights = TILE_WEIGHTS.get(rows.device.type, WIDE_TILE)
    if rows.device.type == "cpu":
        tile_weights *= torch.get_num_threads()
    step = max(1, tile_weights // format.block)
    for first in range(0, blocks.shape[0], step):
        tile = slice(first, first + step)
        into[tile] = encoder(blocks[tile].float())
    return out


def half(values: Tensor) -> Tensor:
    """`(n, m)` as fp16 bytes `(n, 2 m)`."""
    return values.to(torch.float16).view(torch.uint8)


def gathered(codes: Tensor, bits: int) -> Tensor:
    """Codes `(n, 8 / bits, m)` below `2^bits` -> bytes `(n, m)`, the first in the lowest bits; undoes `planes`."""
    packed = codes[:, 0].to(torch.uint8)
    for i in range(1, 8 // bits):
        packed = packed | (codes[:, i].to(torch.uint8) << (bits * i))
    return packed


def _neighbours(codes: Tensor, bits: int) -> Tensor:
    """Codes `(n, m)`, `8 / bits` neighbours in each byte, `(n, m bits / 8)`."""
    return gathered(codes.view(codes.shape[0], -1, 8 // bits).transpose(1, 2), bits)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is no finite number: then the fp16 scale is 0, and codes mean nothing."""
    inverse = 1 / scale
    return inverse.masked_fill_(~inverse.isfinite(), 0)


def _symmetric(blocks: Tensor, half_range: int) -> tuple[Tensor, Tensor]:
    """Scale `(n, 1)` that maps the extreme to `-half_range`, and codes above 0, `(n, 32)`."""
    scale = extremes(blocks.T)[:, None] / -half_range
    codes = (blocks * _reciprocal(scale) + (half_range + 0.5)).to(torch.uint8)
    return scale, codes.clamp_(max=2 * half_range - 1)


def _between(blocks: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum `(n, 1)` that map the range to 0 ... top, and the codes."""
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = (high - low) / top
    codes = ((blocks - low) * _reciprocal(scale) + 0.5).to(torch.uint8)
    return scale, low, codes.clamp_(max=top)


def q4_0(blocks: Tensor) -> Tensor:
    scale, codes = _symmetric(blocks, 8)
    return torch.cat([half(scale), gathered(codes.view(-1, 2, 16), 4)], 1)


def q4_1(blocks: Tensor) -> Tensor:
    scale, low, codes = _between(blocks, 15)
    return torch.cat([half(scale), half(low), gathered(codes.view(-1, 2, 16), 4)], 1)


def _five_bits(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The fifth bits in four bytes, the lower four in sixteen."""
    return _neighbours(codes >> 4, 1), gathered((codes & 15).view(-1, 2, 16), 4)


def q5_0(blocks: Tensor) -> Tensor:
    scale, codes = _symmetric(blocks, 16)
    return torch.cat([half(scale), *_five_bits(codes)], 1)


def q5_1(blocks: Tensor) -> Tensor:
    scale, low, codes = _between(blocks, 31)
    return torch.cat([half(scale), half(low), *_five_bits(codes)], 1)


def q8_0(blocks: Tensor) -> Tensor:
    scale = blocks.abs().amax(1, keepdim=True) / 127
    exact = blocks * _reciprocal(scale)
    whole = exact.trunc()
    away = whole + (2 * (exact - whole)).trunc()  # halves away from zero, as C's roundf
    return torch.cat([half(scale), away.to(torch.int8).view(torch.uint8)], 1)


def _super_scale(scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Non-negative scales `(n, groups)` as multiples 0 ... top of a number `(n, 1)`; that number, rounded to fp16."""
    most = scales.amax(1, keepdim=True)
    levels = (scales * (top / most.masked_fill(most == 0, torch.inf))).round_().clamp_(0, top)
    return levels, (most / top).half().float()


def _signed_super_scale(scales: Tensor, half_range: int) -> tuple[Tensor, Tensor]:
    """Scales of any sign as multiples `-half_range` ... `half_range - 1`; the largest in size is the lowest of them."""
    extreme = extremes(scales.T)[:, None]
    inverse = -half_range / extreme.masked_fill(extreme == 0, torch.inf)
    levels = (scales * inverse).round_().clamp_(-half_range, half_range - 1)
    return levels, (extreme / -half_range).half().float()


def _recoded(blocks: Tensor, scale: Tensor, low: Tensor | None, bottom: int, top: int) -> Tensor:
    """The integers `bottom` ... `top` nearest to the blocks, given what the groups' scales `(n, groups)` became."""
    grouped = blocks.view(*scale.shape, -1)
    if low is not None:
        grouped = grouped + low[..., None]
    scale = scale.masked_fill(scale == 0, torch.inf)
    return (grouped / scale[..., None]).round_().clamp_(bottom, top).view(blocks.shape)


def _with_low(blocks: Tensor, size: int, top: int, offsets: list[float], absolute: bool) -> tuple[Tensor, Tensor]:
    """Scales and minima, taken as positive numbers, of the groups of each block, `(n, groups)`."""
    x = columns(blocks, size)
    weights = x.abs()
    if not absolute:
        weights += x.square().mean(0).sqrt()
    scale, low = fit_scale_and_low(x, weights, top, offsets, absolute=absolute)
    return scale.view(blocks.shape[0], -1), low.neg_().view(blocks.shape[0], -1)


def _tenths(first: int, count: int) -> list[float]:
    return [(first + i) / 10 for i in range(count)]


def q2_k(blocks: Tensor) -> Tensor:
    scales, lows = _with_low(blocks, 16, 3, _tenths(-5, 16), absolute=True)
    levels, d = _super_scale(scales, 15)
    low_levels, d_low = _super_scale(lows, 15)
    codes = _recoded(blocks, d * levels, d_low * low_levels, 0, 3)
    both = levels.to(torch.uint8) | (low_levels.to(torch.uint8) << 4)
    return torch.cat([both, gathered(codes.view(-1, 4, 32), 2).view(-1, 64), half(d), half(d_low)], 1)


def _with_sign(blocks: Tensor, half_range: int, floor: float) -> Tensor:
    """Scales of either sign of groups of 16, `(n, 16)`.

    Weights count by their square, plus `floor` times the mean square of the group.
    """
    x = columns(blocks, 16)
    extreme, squares = extremes(x), x.square()
    trials = [0, *range(-TRIALS, 0), *range(1, TRIALS + 1)]
    scales = fit_scale(x, squares + floor * squares.mean(0), (-(half_range + 0.1 * i) / extreme for i in trials),
                       lambda scaled: scaled.round_().clamp_(-half_range, half_range - 1))
    return scales.view(blocks.shape[0], -1)


def q3_k(blocks: Tensor) -> Tensor:
    """ggml moves single codes of a group instead; with the floor this search is 0.2 to 0.9 % closer than that."""
    levels, d = _signed_super_scale(_with_sign(blocks, 4, 0.5), 32)
    codes = (_recoded(blocks, d * levels, None, -4, 3) + 4).to(torch.uint8)
    levels = (levels + 32).to(torch.uint8)
    return torch.cat([gathered((codes >> 2).view(-1, 8, 32), 1), gathered((codes & 3).view(-1, 4, 32), 2).view(-1, 64),
                      gathered((levels & 15).view(-1, 2, 8), 4), gathered((levels >> 4).view(-1, 4, 4), 2), half(d)], 1)


def _six_bits(scales: Tensor, lows: Tensor) -> Tensor:
    """Eight scales and eight minima of six bits in twelve bytes (see `quant.ggml`)."""
    first, last = scales[:, :4], scales[:, 4:]
    first_low, last_low = lows[:, :4], lows[:, 4:]
    return torch.cat([first | ((last >> 4) << 6), first_low | ((last_low >> 4) << 6),
                      (last & 15) | ((last_low & 15) << 4)], 1)


def _above_low(blocks: Tensor, top: int, offsets: list[float]) -> tuple[Tensor, Tensor]:
    """The sixteen bytes of scales of Q4_K and Q5_K, and the codes."""
    scales, lows = _with_low(blocks, 32, top, offsets, absolute=False)
    levels, d = _super_scale(scales, 63)
    low_levels, d_low = _super_scale(lows, 63)
    codes = _recoded(blocks, d * levels, d_low * low_levels, 0, top).to(torch.uint8)
    return torch.cat([half(d), half(d_low), _six_bits(levels.to(torch.uint8), low_levels.to(torch.uint8))], 1), codes


def q4_k(blocks: Tensor) -> Tensor:
    head, codes = _above_low(blocks, 15, _tenths(-10, 21))
    return torch.cat([head, gathered(codes.view(-1, 2, 32), 4).view(-1, 128)], 1)


def q5_k(blocks: Tensor) -> Tensor:
    head, codes = _above_low(blocks, 31, _tenths(-5, 16))
    low = gathered((codes & 15).view(-1, 2, 32), 4).view(-1, 128)
    return torch.cat([head, gathered((codes >> 4).view(-1, 8, 32), 1), low], 1)


def q6_k(blocks: Tensor) -> Tensor:
    levels, d = _signed_super_scale(_with_sign(blocks, 32, 0), 128)
    codes = (_recoded(blocks, d * levels, None, -32, 31) + 32).to(torch.uint8)
    return torch.cat([gathered((codes & 15).view(-1, 2, 64), 4).view(-1, 128),
                      gathered((codes >> 4).view(-1, 4, 32), 2).view(-1, 64),
                      levels.to(torch.int8).view(torch.uint8), half(d)], 1)


@lru_cache(maxsize=16)
def _codebook(device: torch.device) -> tuple[Tensor, Tensor]:
    """IQ4's values as `(512,)` fp32, and the index of each of them as `(512,)` uint8.

    Entry `i` belongs to numbers from `(i - 256) / 2` up to the next half. The values are integers, so the middles
    between them are halves and no entry straddles one; a number in the middle goes to the upper value.
    """
    block = torch.cat([half(torch.ones(1, 1)), torch.arange(16, dtype=torch.uint8)[None]], 1)
    values = FORMATS["IQ4_NL"].unpack(block)[0, :16]  # of scale 1
    index = torch.bucketize(torch.arange(-128, 128, 0.5), (values[1:] + values[:-1]) / 2, right=True)
    return values[index].to(device), index.to(torch.uint8).to(device)


def _nearest(x: Tensor, *, values: bool) -> Tensor:
    """Of the value nearest to each number, itself or the index."""
    table = _codebook(x.device)[0 if values else 1]
    entry = (x * 2).floor_().add_(256).clamp_(0, 511).to(torch.int32)
    return table.index_select(0, entry.view(-1)).view(x.shape)


def _iq4_scales(blocks: Tensor) -> Tensor:
    """Scales of groups of 32, `(n, groups)`."""
    x = columns(blocks, 32)
    lowest, extreme = float(_codebook(x.device)[0][0]), extremes(x)
    inverses = ((trial + lowest) / extreme for trial in (0, *range(-IQ4_TRIALS, IQ4_TRIALS + 1)))
    scales = fit_scale(x, x.square(), inverses, lambda scaled: _nearest(scaled.nan_to_num_(0), values=True))
    return scales.view(blocks.shape[0], -1)


def iq4_nl(blocks: Tensor) -> Tensor:
    scale = _iq4_scales(blocks)
    codes = _nearest(blocks * _reciprocal(scale), values=False)
    return torch.cat([half(scale), gathered(codes.view(-1, 2, 16), 4)], 1)


def iq4_xs(blocks: Tensor) -> Tensor:
    levels, d = _signed_super_scale(_iq4_scales(blocks), 32)
    grouped = blocks.view(*levels.shape, 32)
    codes = _nearest(grouped * _reciprocal(d * levels)[..., None], values=False)
    levels = (levels + 32).to(torch.uint8)
    return torch.cat([half(d), _neighbours(levels >> 4, 2), _neighbours(levels & 15, 4),
                      gathered(codes.view(-1, 2, 16), 4).view(-1, 128)], 1)


def _cast(dtype: torch.dtype) -> Encoder:
    return lambda blocks: blocks.to(dtype).view(torch.uint8)


ENCODERS: Mapping[str, Encoder] = {
    "F32": _cast(torch.float32), "F16": _cast(torch.float16), "BF16": _cast(torch.bfloat16),
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0,
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs,
}
"""Type -> its encoder."""
