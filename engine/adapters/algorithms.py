"""What the tensors of an adapter do to a weight: one row per algorithm.

Each row gives the change of a weight as a whole, `delta`, and where there is one a way to add the change to the layer's
output without touching the weight, `terms` (engine.adapters.terms). Both are for strength 1 and taken against the
base's weight, so a stack of adapters is a sum and its order does not matter; strength multiplies the change (BOFT mixes
each of its stages with the identity, as its trainer does).

Sources: arXiv 2106.09685 (LoRA), 2108.06098 (LoHa), 2309.14859 (LyCORIS: LoKr), 2306.07967 (GLoRA), 2306.07280 (OFT),
2311.06243 (BOFT), 2506.19847 (OFTv2), 2402.09353 (DoRA), 2205.05638 (IA3); the trainers are KohakuBlueleaf/LyCORIS,
kohya-ss/sd-scripts and Nerogar/OneTrainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from . import rotations
from .layers import tiles
from .terms import Bias, ColumnScale, Kron, LowRank, RotateInput, RotateOutput, RowScale, Term

Factors = Mapping[str, Tensor]
"""Role of a tensor (`dialects.Suffix.role`) -> the tensor, in one floating dtype, matrices flattened to two axes."""
Shapes = Mapping[str, tuple[int, ...]]
Rows = Callable[[slice], Tensor]
"""Some rows of a weight: what asks for them a tile at a time never holds the whole of a packed one."""
MAX_PAIR_RANK = 256
"""A LoHa is a low-rank pair of rank r1 * r2; above this a changed copy of the weight costs less."""


class Mismatch(ValueError):
    """Tensors of one layer do not fit each other."""


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns once what follows the first axis is flattened."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


@dataclass(frozen=True)
class Algorithm:
    """`needs`: roles that must all be there; `groups`: of each of these choices one must be complete; `also`: roles
    that may be there. `extent`: shapes -> (out, in), None where any fits; raises `Mismatch`. `rank`: shapes -> the rank
    that alpha is divided by, None if the scale is 1. `delta(factors, scale, weight)`: the change of `weight`
    `(out, in)`. `terms(factors, scale, weight)`: how to add it to the output, None if there is no better way than
    `delta`; `weight` is called, for a tile of rows at a time, only if the terms need the numbers of the base.
    `at(factors, scale, weight, strength)`: `delta` at another strength, where that is not a multiple of it.
    """

    name: str
    needs: tuple[str, ...]
    extent: Callable[[Shapes], tuple[int | None, int | None]]
    delta: Callable[[Factors, float, Tensor], Tensor]
    terms: Callable[[Factors, float, Rows], list[Term] | None] = lambda factors, scale, weight: None
    rank: Callable[[Shapes], int | None] = lambda shapes: None
    also: tuple[str, ...] = ()
    groups: tuple[tuple[tuple[str, ...], ...], ...] = ()
    at: Callable[[Factors, float, Tensor, float], Tensor] | None = None

    def taken(self, roles: set[str]) -> set[str] | None:
        """The roles of these that this algorithm uses, None if it is not what they are."""
        if not set(self.needs) <= roles:
            return None
        used = {*self.needs, *(roles & set(self.also))}
        for choices in self.groups:
            found = next((choice for choice in choices if set(choice) <= roles), None)
            if found is None:
                return None
            used |= set(found)
        return used


def _chained(shapes: Shapes, *roles: str) -> tuple[int, int]:
    """(out, in) of a product of matrices, in order."""
    sizes = [matrix(shapes[role]) for role in roles if role in shapes]
    for (_, left), (right, _) in pairwise(sizes):
        if left != right:
            shown = " and ".join(f"{role} {list(shapes[role])}" for role in roles if role in shapes)
            raise Mismatch(f"ranks differ: {shown}")
    return sizes[0][0], sizes[-1][1]


# LoRA: W + scale * up @ mid @ down
def _lora_up(factors: Factors, scale: float) -> Tensor:
    up = factors["up"] @ factors["mid"] if "mid" in factors else factors["up"]
    return up if scale == 1 else up * scale


def _lora_terms(factors: Factors, scale: float, weight: Rows) -> list[Term]:
    return [LowRank(factors["down"], _lora_up(factors, 1), scale)]


def _cored(shapes: Shapes, a: str, b: str, core: str) -> tuple[int, int]:
    """(out, in) of `a @ b`, or, where there is a core, of `a^T @ core @ b`."""
    if core not in shapes:
        return _chained(shapes, a, b)
    rows, columns = matrix(shapes[a])
    return _chained({**shapes, a: (columns, rows)}, a, core, b)


# LoHa: W + scale * (a1 @ b1) * (a2 @ b2)
def _loha_extent(shapes: Shapes) -> tuple[int, int]:
    if ("hada_t1" in shapes) != ("hada_t2" in shapes):
        raise Mismatch("only one of its two products has a core")
    first, second = (_cored(shapes, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    if first != second:
        raise Mismatch(f"its two products are {list(first)} and {list(second)}")
    return first


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.T @ core @ b


def _loha_delta(factors: Factors, scale: float, weight: Tensor) -> Tensor:
    products = [_tucker(factors[f"hada_t{i}"], factors[f"hada_w{i}_a"], factors[f"hada_w{i}_b"])
                if f"hada_t{i}" in factors else factors[f"hada_w{i}_a"] @ factors[f"hada_w{i}_b"] for i in (1, 2)]
    return products[0] * products[1] * scale


def _loha_terms(factors: Factors, scale: float, weight: Rows) -> list[Term] | None:
    """An entry of a product of entrywise products is a sum over pairs of ranks: exact, of rank r1 * r2."""
    if "hada_t1" in factors or len(factors["hada_w1_b"]) * len(factors["hada_w2_b"]) > MAX_PAIR_RANK:
        return None
    up = (factors["hada_w1_a"][:, :, None] * factors["hada_w2_a"][:, None, :]).flatten(1)
    down = (factors["hada_w1_b"][:, None, :] * factors["hada_w2_b"][None, :, :]).flatten(0, 1)
    return [LowRank(down, up, scale)]


# LoKr: W + scale * kron(w1, w2), each of them whole or a product
def _lokr_sizes(shapes: Shapes) -> list[tuple[int, int]]:
    sizes = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in shapes:
            sizes.append(matrix(shapes[name]))
        else:
            sizes.append(_cored(shapes, f"{name}_a", f"{name}_b", f"lokr_t{name[-1]}"))
    return sizes


def _lokr_extent(shapes: Shapes) -> tuple[int, int]:
    (rows1, columns1), (rows2, columns2) = _lokr_sizes(shapes)
    return rows1 * rows2, columns1 * columns2


def _lokr_rank(shapes: Shapes) -> int | None:
    """None if both factors are whole: then alpha means nothing."""
    found = next((shapes[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)
    return None if found is None else found[0]


def _lokr_factors(factors: Factors) -> tuple[Tensor, Tensor]:
    first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if "lokr_w2" in factors:
        return first, factors["lokr_w2"]
    if "lokr_t2" in factors:
        return first, _tucker(factors["lokr_t2"], factors["lokr_w2_a"], factors["lokr_w2_b"])
    return first, factors["lokr_w2_a"] @ factors["lokr_w2_b"]


def _lokr_terms(factors: Factors, scale: float, weight: Rows) -> list[Term]:
    first, second = _lokr_factors(factors)
    if "lokr_w2_a" in factors and "lokr_t2" not in factors:
        return [Kron(first, factors["lokr_w2_b"], factors["lokr_w2_a"], scale)]
    return [Kron(first, second, None, scale)]


def _lokr_delta(factors: Factors, scale: float, weight: Tensor) -> Tensor:
    return torch.kron(*_lokr_factors(factors)) * scale


# GLoRA: W + scale * (W @ a1 @ a2 + b1 @ b2)
def _glora_sorted(factors: Factors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a1 `(in, r)`, a2 `(r, in)`, b1 `(out, r)`, b2 `(r, in)`; early files have each pair the other way round."""
    a1, a2, b1, b2 = (factors[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
    return (a1, a2, b1, b2) if a1.shape[0] >= a1.shape[1] else (a2, a1, b2, b1)


def _glora_extent(shapes: Shapes) -> tuple[int, int]:
    a1, a2, b1, b2 = (matrix(shapes[f"glora_{name}"]) for name in ("a1", "a2", "b1", "b2"))
    if a1[0] < a1[1]:
        a1, a2, b1, b2 = a2, a1, b2, b1
    if a1[1] != a2[0] or b1[1] != b2[0] or a1[0] != a2[1] or a2[1] != b2[1]:
        raise Mismatch(f"ranks differ: a {list(a1)} {list(a2)}, b {list(b1)} {list(b2)}")
    return b1[0], b2[1]


def _glora_delta(factors: Factors, scale: float, weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = _glora_sorted(factors)
    return ((weight @ a1) @ a2 + b1 @ b2) * scale


def _glora_terms(factors: Factors, scale: float, weight: Rows) -> list[Term]:
    a1, a2, b1, b2 = _glora_sorted(factors)
    turned = torch.cat([weight(tile) @ a1 for tile in tiles(len(b1), len(a1))])
    return [LowRank(torch.cat((a2, b2)), torch.cat((turned, b1), 1), scale)]


# Rotations: R @ W by blocks of rows (OFT, BOFT), or W @ R by blocks of columns (OFTv2)
def _oft_extent(shapes: Shapes) -> tuple[int, None]:
    blocks = shapes["oft"]
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2]:
        raise Mismatch(f"oft_blocks {list(blocks)} are no square blocks")
    return blocks[-3] * blocks[-2], None


def _oft_at(factors: Factors, scale: float, weight: Tensor, strength: float) -> Tensor:
    return rotations.changed(rotations.of_blocks(factors["oft"], scale), weight, _rescale(factors), strength)


def _oft_delta(factors: Factors, scale: float, weight: Tensor) -> Tensor:
    return _oft_at(factors, scale, weight, 1.0)


def _oft_terms(factors: Factors, scale: float, weight: Rows) -> list[Term]:
    return [RotateOutput(rotations.of_blocks(factors["oft"], scale), _rescale(factors))]


def _rescale(factors: Factors) -> Tensor | None:
    return factors["rescale"].reshape(-1) if "rescale" in factors else None


def _packed_extent(shapes: Shapes) -> tuple[None, int | None]:
    blocks, elements = matrix(shapes["oft_packed"])
    side = rotations.side(elements)
    if side is None:
        raise Mismatch(f"oft_R {list(shapes['oft_packed'])} holds no triangles")
    return None, None if blocks == 1 else blocks * side  # a single block is shared by all columns


def _packed_delta(factors: Factors, scale: float, weight: Tensor) -> Tensor:
    return rotations.columns(_packed(factors), weight) - weight


def _packed_terms(factors: Factors, scale: float, weight: Rows) -> list[Term]:
    return [RotateInput(_packed(factors))]


def _packed(factors: Factors) -> Tensor:
    return rotations.of_triangles(factors["oft_packed"], "oft_scaled" in factors)


# IA3: rows or columns of W times 1 + w
def _ia3_extent(shapes: Shapes) -> tuple[None, None]:
    return None, None


def _is_on_input(factors: Factors) -> bool:
    return bool(factors["on_input"].reshape(-1)[0] != 0)


def _ia3_delta(factors: Factors, scale: float, weight: Tensor) -> Tensor:
    vector = factors["ia3"].reshape(-1)
    return weight * vector if _is_on_input(factors) else weight * vector[:, None]


def _ia3_terms(factors: Factors, scale: float, weight: Rows) -> list[Term]:
    vector = factors["ia3"].reshape(-1)
    return [ColumnScale(vector)] if _is_on_input(factors) else [RowScale(vector)]


def _whole(role: str) -> Callable[[Shapes], tuple[int, int]]:
    return lambda shapes: matrix(shapes[role])


def _vector(role: str) -> Callable[[Shapes], tuple[int, None]]:
    return lambda shapes: (math.prod(shapes[role]), None)


def _replaced(role: str) -> Callable[[Factors, float, Tensor, float], Tensor]:
    """Whole at any strength but 0, as BFL's control LoRAs replace norms and ComfyUI does."""
    return lambda factors, scale, weight, strength: (factors[role].reshape(weight.shape) - weight) * (strength != 0)


# Biases: what PEFT trains beside `up` is scaled as the pair is
def _bias(factors: Factors, scale: float) -> Tensor:
    return factors["diff_b"].reshape(-1) * scale


_W1 = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
_W2 = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"), ("lokr_w2_a", "lokr_w2_b"))
ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm("LoRA", ("down", "up"), lambda shapes: _chained(shapes, "up", "mid", "down"),
              lambda factors, scale, weight: _lora_up(factors, scale) @ factors["down"], _lora_terms,
              lambda shapes: shapes["down"][0], ("mid", "alpha", "magnitude", "reshape_weight")),
    Algorithm("LoHa", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha_extent, _loha_delta, _loha_terms,
              lambda shapes: shapes["hada_w1_b"][0], ("hada_t1", "hada_t2", "alpha", "magnitude")),
    Algorithm("LoKr", (), _lokr_extent, _lokr_delta, _lokr_terms, _lokr_rank, ("alpha", "magnitude"), (_W1, _W2)),
    Algorithm("GLoRA", ("glora_a1", "glora_a2", "glora_b1", "glora_b2"), _glora_extent, _glora_delta, _glora_terms,
              lambda shapes: min(matrix(shapes["glora_a1"])), ("alpha",)),
    Algorithm("OFT", ("oft",), _oft_extent, _oft_delta, _oft_terms, also=("alpha", "rescale"),
              at=_oft_at),
    Algorithm("OFTv2", ("oft_packed",), _packed_extent, _packed_delta, _packed_terms, also=("alpha", "oft_scaled")),
    Algorithm("IA3", ("ia3", "on_input"), _ia3_extent, _ia3_delta, _ia3_terms),
    Algorithm("diff", ("diff",), _whole("diff"), lambda factors, scale, weight: factors["diff"], also=("alpha",)),
    Algorithm("set", ("set",), _whole("set"),
              lambda factors, scale, weight: _replaced("set")(factors, scale, weight, 1.0), at=_replaced("set")),
    Algorithm("bias", ("diff_b",), _vector("diff_b"), lambda factors, scale, weight: _bias(factors, scale),
              lambda factors, scale, weight: [Bias(_bias(factors, scale))]),
    Algorithm("bias set", ("set_b",), _vector("set_b"),
              lambda factors, scale, weight: _replaced("set_b")(factors, scale, weight, 1.0), at=_replaced("set_b")),
)
"""To add an algorithm: its roles in `dialects.SUFFIXES`, a row here."""
ON_BIAS = ("bias", "bias set")
"""These change the bias, or a norm's; the others the weight."""
REPLACING = ("set", "bias set")
"""These put other numbers in the place of a layer's own. Two of them do not add up: the later one counts."""
OF_THE_BASE = ("GLoRA", "OFT", "OFTv2", "IA3", "set", "bias set")
"""Their change is worked out from the weight that they change."""
BY_ROWS: Mapping[str, tuple[str, ...]] = {"LoRA": ("up",), "LoHa": ("hada_w1_a", "hada_w2_a"), "diff": ("diff",),
                                          "set": ("set",)}
"""Where each row of the change comes from the same row of these, and of the weight."""
VECTORS = ("diff", "set", "diff_b", "set_b", "magnitude", "rescale", "ia3", "on_input", "alpha", "reshape_weight")
"""Roles that may have fewer than two axes."""
CONSTRAINED = ("OFT",)
"""Here alpha bounds the rotation instead of scaling it."""


def algorithm(name: str) -> Algorithm:
    return next(row for row in ALGORITHMS if row.name == name)


# DoRA: the changed weight gets rows, or columns, of given length
def is_on_input(magnitude: tuple[int, ...]) -> bool:
    """Whether a magnitude belongs to columns; told by its shape, since a square layer's length tells nothing."""
    return len(magnitude) == 2 and magnitude[0] == 1 and magnitude[1] != 1


def decomposed(magnitude: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """`magnitude * (weight + delta) / |weight + delta| - weight`, by rows or by columns."""
    changed = weight + delta
    return changed * gain(magnitude, changed) - weight


def gain(magnitude: Tensor, changed: Tensor) -> Tensor:
    """What rows `(out, 1)` or columns `(1, in)` of the changed weight are multiplied by."""
    axis = 0 if is_on_input(tuple(magnitude.shape)) else 1
    shape = (1, -1) if axis == 0 else (-1, 1)
    length = torch.linalg.vector_norm(changed, dim=axis, keepdim=True)
    factor: Tensor = magnitude.reshape(shape) / _positive(length)
    return factor


def decomposed_terms(magnitude: Tensor, terms: list[Term] | None, weight: Rows) -> list[Term] | None:
    """Terms of a DoRA round a low-rank change; its gain needs the numbers of the base once, a tile at a time."""
    pairs = [term for term in terms or () if isinstance(term, LowRank)]
    if terms is None or len(pairs) != len(terms) or not pairs:
        return None

    def changed(tile: slice) -> Tensor:
        total = weight(tile)
        for term in pairs:
            total = torch.addmm(total, term.up[tile], term.down, alpha=term.scale)
        return total

    rows, width = len(pairs[0].up), pairs[0].down.shape[1]
    if is_on_input(tuple(magnitude.shape)):
        squares = sum((changed(tile).square().sum(0) for tile in tiles(rows, width)), torch.zeros(()).to(magnitude))
        factor = magnitude.reshape(1, -1) / _positive(squares.sqrt())[None]
        return [ColumnScale(factor[0] - 1), *(LowRank(term.down * factor, term.up, term.scale) for term in pairs)]
    lengths = [torch.linalg.vector_norm(changed(tile), dim=1) for tile in tiles(rows, width)]
    factor = (magnitude.reshape(-1) / _positive(torch.cat(lengths)))[:, None]
    return [RowScale(factor[:, 0] - 1), *(LowRank(term.down, term.up * factor, term.scale) for term in pairs)]


def _positive(lengths: Tensor) -> Tensor:
    return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
