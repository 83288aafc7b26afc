"""What LoRA loaders and hooks hang on a packed weight, as `engine.adapters` runs it: beside the weight wherever a side
path equals the host's sum of patches, else on a few unpacked rows at a time.

A patch of the host (`Entry`) is applied to what those before it left. A side path adds up changes of the base instead,
so an adapter whose change depends on the weight may only hang beside it where none came before it on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import comfy.weight_adapter
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter
from torch import Tensor

from ...engine.adapters import Adapter
from ...engine.adapters.algorithms import MAX_PAIR_RANK
from ...engine.adapters.costs import adapter_bytes, pairs_bytes
from ...engine.adapters.sidepath import Part, SidePath
from ...engine.adapters.terms import LowRank, RotateOutput, Term
from ...engine.adapters.vocabulary import Destination
from ...engine.quant.formats import WIDE_TILE

Entry = tuple[Any, ...]
"""A patch as the host keeps it: strength, adapter or values, strength of the weight itself, rows, function."""
Rows = Callable[[slice], Tensor]
EXACT = torch.float32
PATCHED_BYTES = 8
"""Bytes for each unpacked weight that patches are put on: fp32, and the change."""
LOKR = ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "magnitude")
LOHA = ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "magnitude")


class HostAdapter(comfy.weight_adapter.WeightAdapterBase):  # type: ignore[misc]
    """An adapter of ours as the host calls one. `weights` holds it, since the host makes copies from these two."""

    name = "flux_kit"

    def __init__(self, loaded_keys: set[str], weights: tuple[Adapter]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(self, weight: Tensor, key: str, strength: float, strength_model: float, offset: Any,
                         function: Any, intermediate_dtype: torch.dtype = torch.float32,
                         original_weight: Any = None) -> Tensor:
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight += self.weights[0].change(exact, strength).to(weight.dtype)
        return weight


def span_of(entry: Entry, rows: int) -> slice | None:
    """The rows that an entry changes; None if it changes columns, or what is not there."""
    offset = entry[3]
    if offset is None:
        return slice(0, rows)
    return slice(offset[1], offset[1] + offset[2]) if offset[0] == 0 and offset[1] + offset[2] <= rows else None


def pair_of(adapter: Any, rows: int, width: int) -> tuple[Tensor, Tensor, float] | None:
    """down `(rank, width)`, up `(rows, rank)` and the scale of a plain pair that fits; else None."""
    if type(adapter) is not LoRAAdapter:
        return None
    up, down, alpha, *special = adapter.weights
    if any(value is not None for value in special):
        return None
    up, down = up.flatten(1), down.flatten(1)
    if up.shape[0] != rows or down.shape[1] != width or up.shape[1] != down.shape[0]:
        return None
    return down, up, 1.0 if alpha is None else float(alpha) / down.shape[0]


def known(value: Any, rows: int, width: int) -> Adapter | None:
    """A patch as an adapter of the engine with the very change that the host makes of it; None for any other."""
    if isinstance(value, HostAdapter):
        return value.weights[0]
    names = LOKR if type(value) is LoKrAdapter else LOHA if type(value) is LoHaAdapter else None
    if names is None or len(value.weights) != len(names):
        return None
    found = {role: tensor for role, tensor in zip(names, value.weights, strict=True) if tensor is not None}
    alpha = found.pop("alpha", None)
    if "magnitude" in found or any(role in found for role in ("lokr_t2", "hada_t1", "hada_t2")):
        return None  # the host gives a DoRA another length, and folds convolutions otherwise
    made = Adapter(Destination("", ""), "LoKr" if names is LOKR else "LoHa", found, 1.0, None, None, (), (rows, width))
    shapes = {role: tuple(tensor.shape) for role, tensor in found.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or made.row.taken(set(shapes)) != set(shapes):
        return None
    try:
        extent, rank = made.row.extent(shapes), made.row.rank(shapes)
    except ValueError:
        return None
    scale = 1.0 if alpha is None or rank is None else float(alpha) / rank
    return replace(made, scale=scale) if extent == (rows, width) else None


def turned(adapter: Any, rows: int, strength: float) -> list[Term] | None:
    """The host's OFT as blocks, by asking it what it makes of blocks that are one; None for any other adapter."""
    if type(adapter) is not OFTAdapter or adapter.weights[3] is not None or adapter.weights[0].ndim != 3:
        return None
    count, side = adapter.weights[0].shape[:2]
    if count * side != rows:
        return None
    one = torch.eye(side).repeat(count, 1)
    blocks = adapter.calculate_weight(one.clone(), "", strength, 1.0, None, lambda change: change)
    return [RotateOutput(blocks.float().unflatten(0, (count, side)), None)]


def terms_of(entry: Entry, read: Rows, rows: int, width: int) -> tuple[list[Term], float, bool] | None:
    """The terms of an entry, the strength they get, and whether they depend on the weight `read` tells, fp32 on the
    CPU; None if the host's sum cannot be told so."""
    strength, value = entry[0], entry[1]
    pair = pair_of(value, rows, width)
    if pair is not None:
        down, up, scale = pair
        return [LowRank(down.cpu().to(EXACT), up.cpu().to(EXACT), scale)], strength, False
    blocks = turned(value, rows, strength)
    if blocks is not None:
        return blocks, 1.0, True
    adapter = known(value, rows, width)
    if adapter is None or not _sides(adapter):
        return None
    terms = adapter.terms(read, width, EXACT, "cpu")
    return None if terms is None else (terms, strength, adapter.depends)


def sides(adapters: Sequence[Adapter]) -> bool:
    """Whether adapters of ours on one layer, in this order and the first on it, hang beside its weight."""
    return all(_sides(adapter) and not (i and adapter.depends) for i, adapter in enumerate(adapters))


def _sides(adapter: Adapter) -> bool:
    """Whether beside the weight is where it costs less: LoHas of high rank and whole matrices are put on rows."""
    if adapter.algorithm == "LoHa" and len(adapter.factors["hada_w1_b"]) * len(adapter.factors["hada_w2_b"]) > (
            MAX_PAIR_RANK):
        return False
    return adapter.algorithm not in ("diff", "set")


@torch.inference_mode(False)
@torch.no_grad()
def beside(layer: Any, entries: Sequence[Entry], device: torch.device | None, dtype: torch.dtype) -> SidePath | None:
    """The side path of these entries on a packed linear layer, in `dtype`; None unless it can be one for all."""
    rows, width = layer.shape
    parts: list[Part] = []
    strengths: list[float] = []
    for entry in entries:
        span = span_of(entry, rows)
        if span is None or not _plain(entry, span):
            return None
        found = terms_of(entry, _reader(layer, span), span.stop - span.start, width)
        if found is None:
            return None
        terms, strength, depends = found
        if depends and _meets(span, [part.rows for part in parts]):
            return None
        parts.append(Part(len(parts), span, terms))
        strengths.append(strength)
    made = SidePath(parts, rows, dtype, "cpu" if device is None else device)
    made.to(made.strength.device)
    made.set(torch.tensor(strengths))
    return made


def _reader(layer: Any, span: slice) -> Rows:
    of = range(span.start, span.stop)

    def read(tile: slice) -> Tensor:
        chosen = of[tile]
        unpacked: Tensor = layer.unpacked(slice(chosen.start, chosen.stop), EXACT)
        return unpacked.cpu()

    return read


def of_rows(entry: Entry, tile: slice, rows: int, width: int) -> Entry | None:
    """An entry on `tile` of a weight's rows alone, as a patch of these; an entry of no effect (strength 0) where it
    changes none of them. None if the rows cannot be told apart."""
    span = span_of(entry, rows)
    if span is None or entry[4] is not None:
        return None
    first, last = max(span.start, tile.start), min(span.stop, tile.stop)
    value = _value_of(entry[1], slice(first - span.start, max(last, first) - span.start), span.stop - span.start, width)
    if value is None:
        return None
    return (entry[0], value, entry[2], (0, first - tile.start, last - first), None) if first < last else ()


def _value_of(value: Any, tile: slice, rows: int, width: int) -> Any:
    if isinstance(value, HostAdapter):
        adapter = value.weights[0].of_rows(tile)
        return None if adapter is None else HostAdapter(value.loaded_keys, (adapter,))
    if type(value) is LoRAAdapter:
        up, down, alpha, mid, magnitude, reshape = value.weights
        if mid is not None or reshape is not None or up.shape[0] != rows:
            return None
        cut = _lengths(magnitude, tile, rows)
        return None if cut is None else LoRAAdapter(value.loaded_keys, (up[tile], down, alpha, None, cut[0], None))
    if type(value) is LoHaAdapter:
        a1, b1, alpha, a2, b2, t1, t2, magnitude = value.weights
        cut = _lengths(magnitude, tile, rows)
        if t1 is not None or t2 is not None or a1.shape[0] != rows or cut is None:
            return None
        return LoHaAdapter(value.loaded_keys, (a1[tile], b1, alpha, a2[tile], b2, None, None, cut[0]))
    if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], Tensor):
        value = ("diff", value)
    if isinstance(value, tuple) and len(value) == 2 and value[0] in ("diff", "set"):
        whole = value[1][0]
        if isinstance(whole, Tensor) and tuple(whole.shape) == (rows, width):
            return (value[0], (whole[tile],))
    return None


def _lengths(magnitude: Tensor | None, tile: slice, rows: int) -> tuple[Tensor | None] | None:
    """The magnitudes of some rows; None if they are those of columns."""
    if magnitude is None:
        return (None,)
    return (magnitude[tile],) if magnitude.shape[0] == rows > 1 else None


def tiled(entries: Sequence[Entry], rows: int, width: int) -> list[tuple[slice, list[Entry]]] | None:
    """The entries by tiles of rows, None if one of them needs the weight as a whole."""
    made = []
    for tile in row_tiles(rows, width):
        own = [of_rows(entry, tile, rows, width) for entry in entries]
        if any(entry is None for entry in own):
            return None
        made.append((tile, [entry for entry in own if entry]))
    return made


def row_tiles(rows: int, width: int) -> Iterator[slice]:
    step = max(1, WIDE_TILE // width)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def nbytes(side: SidePath | None) -> int:
    return 0 if side is None else sum(tensor.nbytes for tensor in side.buffers())


def cost(entries: Sequence[Entry], rows: int, width: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a packed weight `(rows, width)` needs for these entries on the device all the time, and while it is
    used; told without making anything."""
    ranks: list[tuple[int, int]] = []
    spans: list[slice] = []
    stands = 0
    for entry in entries:
        span, value = span_of(entry, rows), entry[1]
        count = rows if span is None else span.stop - span.start
        pair = pair_of(value, count, width)
        adapter = None if pair is not None else known(value, count, width)
        turns = type(value) is OFTAdapter
        depends = turns or (adapter is not None and adapter.depends)
        if not (pair is not None or turns or (adapter is not None and _sides(adapter))) or not _plain(entry, span) or (
                depends and _meets(span, spans)):
            whole = tiled(entries, rows, width) is None
            return 0, PATCHED_BYTES * (rows * width if whole else min(rows * width, WIDE_TILE))
        if adapter is not None:
            rank, more = adapter_bytes(adapter, count, width, itemsize)
        else:
            rank, more = (len(pair[0]), 0) if pair is not None else (None, value.weights[0].numel() * EXACT.itemsize)
        stands += more
        ranks += [] if rank is None else [(count, rank)]
        spans += [] if span is None else [span]
    return stands + pairs_bytes(ranks, rows, width, itemsize), 0


def _plain(entry: Entry, span: slice | None) -> bool:
    """Whether an entry is on rows, and adds its change as it is to the weight as it is."""
    return span is not None and entry[2] == 1.0 and entry[4] is None


def _meets(span: slice | None, spans: Sequence[slice]) -> bool:
    return span is not None and any(other.start < span.stop and span.start < other.stop for other in spans)
