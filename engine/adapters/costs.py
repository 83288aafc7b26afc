"""Bytes that side paths take, told from shapes before any is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from . import layers
from .adapter import Adapter
from .algorithms import MAX_PAIR_RANK, Shapes, matrix
from .dialects import place
from .sidepath import ONE_PRODUCT_RANK, PAD


class Info(Protocol):
    """A tensor of a header; `engine.weights.TensorInfo` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


EXACT = torch.float32.itemsize
"""What vectors and rotations are kept in, whatever the layer computes in."""
VECTORS = torch.int64.itemsize + 2 * EXACT
"""Bytes of a rank beside its matrices: whose it is, its scale, and that times the strength."""


def header_bytes(checkpoint: Mapping[str, Info], itemsize: int) -> dict[str, int]:
    """Role of a model -> bytes of what a LoRA file has for it, in numbers of `itemsize` bytes; no weights are read."""
    found: dict[str, int] = {}
    keys = set(checkpoint)
    for key, info in checkpoint.items():
        where = place(key, keys)
        if where is not None and len(info.shape) > 0:
            role = where.destination.role
            found[role] = found.get(role, 0) + math.prod(info.shape) * itemsize
    return found


def pairs_bytes(ranks: Sequence[tuple[int, int]], rows: int, width: int, itemsize: int) -> int:
    """Of low-rank adapters, (rows they change, rank) each, joined on a layer `(rows, width)`."""
    padded = -(-sum(rank for _, rank in ranks) // PAD) * PAD
    ups = rows * padded if padded <= ONE_PRODUCT_RANK else sum(count * rank for count, rank in ranks)
    return (padded * width + ups) * itemsize + padded * VECTORS


def pair_rank(algorithm: str, shapes: Shapes) -> int | None:
    """The rank of the pair that an adapter becomes, None if it becomes something else."""
    if algorithm == "LoRA":
        return shapes["down"][0]
    if algorithm == "GLoRA":
        return 2 * min(matrix(shapes["glora_a1"]))
    if algorithm == "LoHa" and "hada_t1" not in shapes:
        rank = shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0]
        return rank if rank <= MAX_PAIR_RANK else None
    return None


def adapter_bytes(adapter: Adapter, rows: int, width: int, itemsize: int) -> tuple[int | None, int]:
    """The rank of one adapter's pair, if it becomes one, and the bytes of what else it becomes on `rows` rows."""
    shapes = {role: tuple(tensor.shape) for role, tensor in adapter.factors.items()}
    rank = pair_rank(adapter.algorithm, shapes)
    if rank is not None:
        return rank, (rows + width) * EXACT if "magnitude" in shapes else 0
    numbers = sum(tensor.numel() for tensor in adapter.factors.values())
    if adapter.algorithm == "OFTv2":
        numbers *= 2  # triangles become squares
    dense = adapter.algorithm in ("LoHa", "set") or "magnitude" in shapes
    matrices = dense or adapter.algorithm in ("LoKr", "diff")
    return None, (itemsize if matrices else EXACT) * (rows * width if dense else numbers)


def side_bytes(model: nn.Module, adapters: Iterable[Adapter], itemsize: int) -> int:
    """Of the side paths of these adapters on a model that computes in numbers of `itemsize` bytes."""
    ranks: dict[str, list[tuple[int, int]]] = {}
    total = 0
    for adapter in adapters:
        module = adapter.destination.module
        layer: Any = layers.layer_of(model, module)
        if layer is None or not hasattr(layer, "out_features"):
            continue
        size = layers.size_of(layer)
        rows = adapter.destination.rows(size)
        rank, more = adapter_bytes(adapter, rows.stop - rows.start, size[1], itemsize)
        total += more
        if rank is not None:
            ranks.setdefault(module, []).append((rows.stop - rows.start, rank))
    for module, found in ranks.items():
        size = layers.size_of(layers.layer_of(model, module))
        total += pairs_bytes(found, size[0], size[1], itemsize)
    return total
