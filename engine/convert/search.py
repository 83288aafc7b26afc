"""The searches for scales of the K and IQ4 types: weighted least squares over a few rounded candidates.

Method: ggml-quants.c of ggml-org/ggml (k-quants, ggml-org/llama.cpp pull 1684). A group is rounded with several trial
scales near the one that fits its extreme; for the integers so found, the scale (and minimum) of least weighted error
has a closed form; the best of the trials is kept. Here all groups of a tile are searched at once: groups are columns,
`(weights in a group, groups)`, so that sums run along the first axis, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


def columns(blocks: Tensor, size: int) -> Tensor:
    """`(n, m)` -> groups of `size` neighbours as columns, `(size, n * m / size)`, contiguous."""
    return blocks.reshape(-1, size).T.contiguous()


def extremes(x: Tensor) -> Tensor:
    """Of each column the value largest in size, with its sign, `(groups,)`."""
    return x.gather(0, x.abs().argmax(0, keepdim=True))[0]


def fit_scale(x: Tensor, weights: Tensor, inverses: Iterable[Tensor], rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """The scale `s` of each column that makes `sum w (x - s q)^2` least, q one of `rounded(x * inverse)`.

    For fixed q it is `s = sum wxq / sum wqq`, and the error falls by `(sum wxq)^2 / sum wqq`: the largest is kept.
    Columns of zeros get 0.
    """
    weighted = weights * x
    scale, best = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for inverse in inverses:
        levels = rounded(x * inverse)
        along = (weighted * levels).sum(0)
        square = levels.square_().mul_(weights).sum(0)
        gain = along * along / square
        better = gain > best  # not where it is NaN: all levels 0
        scale = torch.where(better, along / square, scale)
        best = torch.where(better, gain, best)
    return scale


def fit_scale_and_low(x: Tensor, weights: Tensor, top: int, offsets: Sequence[float], *,
                      absolute: bool) -> tuple[Tensor, Tensor]:
    """Scale and minimum, both `(groups,)`, of `x ~ scale * q + low` with q from 0 to `top` and `low <= 0`.

    Trials divide the range into `top + offset` steps; for each, scale and low are those of least weighted squares.
    `absolute`: trials are compared by absolute, not by squared errors.
    """
    low, high = x.amin(0).clamp_(max=0), x.amax(0)
    is_flat = low == high
    sum_w, sum_x = weights.sum(0), (weights * x).sum(0)

    def levels_for(steps: float, low: Tensor) -> Tensor:
        inverse = steps / (high - low).masked_fill_(is_flat, torch.inf)
        return (x - low).mul_(inverse).round_().clamp_(0, top)

    def error(levels: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        difference = (levels * scale).add_(low).sub_(x)
        return (difference.abs_() if absolute else difference.square_()).mul_(weights).sum(0)

    scale = (high - low) / top
    least = error(levels_for(top, low), scale, low)
    for offset in offsets:
        levels = levels_for(top + offset, low)  # from the best minimum so far: the trials climb
        weighted = weights * levels
        sum_l, sum_ll, sum_xl = weighted.sum(0), (weighted * levels).sum(0), weighted.mul_(x).sum(0)
        determinant = sum_w * sum_ll - sum_l * sum_l
        try_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        try_low = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        above_zero = try_low > 0
        try_scale = torch.where(above_zero, sum_xl / sum_ll, try_scale)
        try_low = try_low.masked_fill_(above_zero, 0)
        found = error(levels, try_scale, try_low)
        better = (determinant > 0) & (found < least)
        scale, low = torch.where(better, try_scale, scale), torch.where(better, try_low, low)
        least = torch.where(better, found, least)
    return scale.masked_fill(is_flat, 0), low
