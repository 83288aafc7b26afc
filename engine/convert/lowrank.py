"""Products of thin matrices: what adapters come to where they are such products, several put into one, and fewer ranks.

All in float64, so that what a file's type can hold is passed on bit by bit and errors that are told are the file's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, swapped
from ..adapters.algorithms import MAX_PAIR_RANK
from ..adapters.terms import LowRank

EXACT = torch.float64
NEEDS_BASE = ("GLoRA", "OFT", "OFTv2", "IA3", "set", "bias set")
"""Algorithms whose change depends on the weight that they change; so does any with a magnitude (DoRA)."""
OVERSAMPLED, ITERATIONS = 16, 4
DIRECT = 512
"""Up to this many rows or columns a matrix is taken apart as a whole; above, only its largest part is looked for."""


@dataclass(frozen=True)
class Pair:
    """`scale * up @ down` for some rows of a layer: `down` `(r, in)`, `up` `(rows, r)`, float64, CPU."""

    rows: slice
    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)

    def product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.up * self.scale).to(dtype) @ self.down.to(dtype)


def needs_base(adapter: Adapter) -> bool:
    return adapter.algorithm in NEEDS_BASE or "magnitude" in adapter.factors


def pair_of(adapter: Adapter, rows: slice, strength: float, inner: bool = False) -> Pair | None:
    """The adapter as a product that equals it, for the `rows` it changes; None if it has none of modest rank, or none
    without the base's weights. `inner`: what a DoRA adds before lengths are set."""
    if needs_base(adapter) and not inner:
        return None
    factors = adapter.numbers(EXACT, "cpu")
    if adapter.algorithm == "LoRA":
        down, up, scale = factors["down"], factors["up"], adapter.scale
        up = up @ factors["mid"] if "mid" in factors else up
    elif adapter.algorithm == "LoHa":
        (term,) = adapter.row.terms(factors, adapter.scale, _no_weight) or (None,)
        if not isinstance(term, LowRank):
            return None
        down, up, scale = term.down, term.up, term.scale
    elif adapter.algorithm == "LoKr" and "lokr_w2_a" in factors and "lokr_t2" not in factors:
        first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
        if first.shape[1] * len(factors["lokr_w2_b"]) > MAX_PAIR_RANK:
            return None
        up = torch.kron(first, factors["lokr_w2_a"])
        down = torch.kron(torch.eye(first.shape[1], dtype=EXACT), factors["lokr_w2_b"])
        scale = adapter.scale
    else:
        return None
    return Pair(rows, down, swapped(up) if adapter.destination.swapped else up, scale * strength)


def _no_weight(tile: slice) -> Tensor:
    raise AssertionError("asked for the weight of an algorithm that needs none")


def cut(pair: Pair, rows: slice) -> Pair | None:
    """The part of `pair` within `rows`; ranks that do nothing there are dropped. None if it has no rows there."""
    first, last = max(pair.rows.start, rows.start), min(pair.rows.stop, rows.stop)
    if first >= last:
        return None
    if (first, last) == (pair.rows.start, pair.rows.stop):
        return pair
    up = pair.up[first - pair.rows.start:last - pair.rows.start]
    used = up.any(dim=0)
    if bool(used.any()) and not bool(used.all()):
        return Pair(slice(first, last), pair.down[used], up[:, used], pair.scale)
    return Pair(slice(first, last), pair.down, up, pair.scale)


def joined(pairs: Sequence[Pair], rows: slice, width: int) -> Pair:
    """Their sum as one pair for all of `rows`: ranks add up, but not those of pairs with the same `down`, such as the
    parts of one adapter that was split. The scale is the largest; the others go into `up`."""
    scale = max(abs(pair.scale) for pair in pairs) or 1.0
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for pair in pairs:
        up = torch.zeros(rows.stop - rows.start, pair.rank, dtype=EXACT)
        up[pair.rows.start - rows.start:pair.rows.stop - rows.start] = pair.up * (pair.scale / scale)
        down = torch.nn.functional.pad(pair.down, (0, width - pair.down.shape[1]))
        same = next((i for i, other in enumerate(downs) if torch.equal(other, down)), None)
        if same is None:
            downs.append(down)
            ups.append(up)
        else:
            ups[same] = ups[same] + up
    return Pair(rows, torch.cat(downs), torch.cat(ups, 1), scale)


def folded(pair: Pair) -> Pair:
    """The same with a scale of 1."""
    return Pair(pair.rows, pair.down, pair.up * pair.scale)


def reduced(pair: Pair, rank: int) -> Pair:
    """The nearest pair of at most `rank`; the same one if it has no more."""
    if pair.rank <= rank:
        return pair
    left, small_left = torch.linalg.qr(pair.up)
    right, small_right = torch.linalg.qr(pair.down.T)
    u, s, vh = torch.linalg.svd(pair.scale * small_left @ small_right.T)
    root = s[:rank].sqrt()
    return Pair(pair.rows, (right @ (vh[:rank].T * root)).T, left @ (u[:, :rank] * root))


def nearest(matrix: Tensor, rank: int, rows: slice) -> Pair:
    """A pair of `rank` near a matrix `(rows, in)` fp32: the nearest for small ones; for large ones what subspace
    iteration finds (arXiv 0909.4061, algorithm 4.4), which is as good as the nearest but for the last digits. The same
    every time."""
    if min(matrix.shape) <= max(DIRECT, rank + OVERSAMPLED):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        start = torch.randn(matrix.shape[1], rank + OVERSAMPLED, generator=torch.Generator().manual_seed(0))
        q = torch.linalg.qr(matrix @ start).Q
        for _ in range(ITERATIONS):
            q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.T @ matrix, full_matrices=False)
        u = q @ u
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    return Pair(rows, (vh[:kept] * root[:, None]).to(EXACT), (u[:, :kept] * root).to(EXACT))


def length(pair: Pair) -> float:
    """Root of the sum of squares of the product, which is not formed."""
    return float(torch.linalg.vector_norm(_core(pair.up, pair.down))) * abs(pair.scale)


def distance(pair: Pair, other: Pair) -> float:
    """Length of the difference of two pairs for the same rows, without the digits that differences of lengths lose."""
    return float(torch.linalg.vector_norm(_core(torch.cat((pair.up * pair.scale, -other.up * other.scale), 1),
                                                torch.cat((pair.down, other.down)))))


def _core(up: Tensor, down: Tensor) -> Tensor:
    """A small matrix of the same singular values as `up @ down`."""
    left: Tensor = torch.linalg.qr(up, mode="r").R
    right: Tensor = torch.linalg.qr(down.T, mode="r").R
    return left @ right.T
