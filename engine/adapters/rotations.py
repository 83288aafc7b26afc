"""Orthogonal matrices from what trainers store of them, and their products.

Blocks are stored before `Q = blocks - blocks^T`, or as the triangles above Q's diagonal; `R = (I + Q) (I - Q)^-1` by
Cayley. Blocks `(n, b, b)` turn the outputs group by group (OFT); stages `(m, n, b, b)` are a butterfly (BOFT).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEUMANN_TERMS = 5
"""OFTv2's trainers replace the inverse by a series, and the weights are trained with it (arXiv 2506.19847, 4.2)."""


def cayley(skew: Tensor) -> Tensor:
    """R `(..., b, b)` of skew-symmetric matrices."""
    home, skew = skew.device, skew.cpu() if skew.device.type == "mps" else skew  # which cannot solve in older torch
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    turned: Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
    return turned.to(home)


def of_blocks(blocks: Tensor, constraint: float) -> Tensor:
    """Rotations of the shape of `oft_blocks`, `(n, b, b)` or `(m, n, b, b)`.

    `constraint`: the largest norm of all Q together per row of the layer; 0 for none. A row of the result's block says
    what one output is made of; OFT's trainers multiply by its transpose, which is done here, BOFT's do not.
    """
    skew = blocks - blocks.transpose(-1, -2)
    limit = constraint * blocks.shape[-3] * blocks.shape[-2]
    length = float(torch.linalg.vector_norm(skew))
    if 0 < limit < length:
        skew = skew * (limit / length)
    return cayley(skew) if blocks.ndim == 4 else cayley(skew).transpose(-1, -2)


def side(elements: int) -> int | None:
    """Rows of the square whose part above the diagonal has so many elements, None if there is none."""
    rows = (1 + math.isqrt(1 + 8 * elements)) // 2
    return rows if elements > 0 and rows * (rows - 1) // 2 == elements else None


def of_triangles(packed: Tensor, scaled: bool) -> Tensor:
    """Blocks `(n, b, b)` from the triangles `(n, b (b - 1) / 2)` of OFTv2."""
    rows = side(packed.shape[1])
    assert rows is not None
    if scaled:
        packed = packed / math.sqrt(packed.shape[1])
    upper = torch.zeros(len(packed), rows, rows, dtype=packed.dtype, device=packed.device)
    at = torch.triu_indices(rows, rows, 1)
    upper[:, at[0], at[1]] = packed
    skew = upper - upper.transpose(-1, -2)
    power = torch.eye(rows, dtype=packed.dtype, device=packed.device).expand_as(skew)
    total = power
    for term in range(1, NEUMANN_TERMS):
        power = power @ skew
        total = total + (power if term == NEUMANN_TERMS - 1 else 2 * power)
    return total


def columns(blocks: Tensor, weight: Tensor) -> Tensor:
    """The weight `(out, in)` whose product with x is `weight`'s with x rotated, `x @ R` block by block."""
    split: Tensor = weight.unflatten(1, (-1, blocks.shape[-1]))
    if len(blocks) == 1:
        return (split @ blocks[0].T).flatten(1)
    return torch.einsum("onc,nkc->onk", split, blocks).flatten(1)


def inputs(blocks: Tensor, x: Tensor) -> Tensor:
    """`x` `(tokens, in)` rotated block by block."""
    split: Tensor = x.unflatten(1, (-1, blocks.shape[-1]))
    if len(blocks) == 1:
        return (split @ blocks[0]).flatten(1)
    return torch.einsum("tnk,nkc->tnc", split, blocks).flatten(1)


def changed(blocks: Tensor, rows: Tensor, rescale: Tensor | None, strength: float | Tensor) -> Tensor:
    """What the rotation adds to `rows` `(out, anything)`, each row one output of the layer.

    Each stage is mixed with the identity by `strength`, a number or one per column, and so is `rescale` `(out,)`
    with 1.
    """
    butterfly = blocks.ndim == 4
    size = blocks.shape[-1]
    now = rows
    for i, stage in enumerate(blocks if butterfly else blocks[None]):
        width = 2 ** i * size // 2
        parts = now.unflatten(0, (-1, 2, width)).transpose(1, 2).flatten(0, 2) if butterfly else now
        turned = torch.einsum("nij,nj...->ni...", stage, parts.unflatten(0, (-1, size))).flatten(0, 1)
        if butterfly:
            turned = turned.unflatten(0, (-1, width, 2)).transpose(1, 2).flatten(0, 2)
        now = now + strength * (turned - now)
    if rescale is not None:
        now = now * (1 + strength * (rescale[:, None] - 1))
    return now - rows
