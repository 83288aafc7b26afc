"""What quantising did: sizes, types, and how far the new weights are from the old."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .bake import Baked

_BLOCK = re.compile(r"(?<=blocks[._])\d+(?=[._])|(?<=layers[._])\d+(?=[._])|(?<=block[._])\d+(?=[._])")
WORST = 10
SHOWN_WORST = 5


def kind_of(name: str) -> str:
    """A layer's name with `*` for the number of its block, dotted or flat."""
    return _BLOCK.sub("*", name)


@dataclass
class Deviation:
    """Sums over weights: each tile in fp32, the tiles in double precision."""

    difference: float = 0.0
    total: float = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        self.difference += _sum_of_squares(after - before)
        self.total += _sum_of_squares(before)

    @property
    def relative(self) -> float:
        """Root mean square of the differences over that of the weights."""
        return math.sqrt(self.difference / self.total) if self.total > 0 else 0.0


def _sum_of_squares(values: Tensor) -> float:
    largest = float(torch.stack(values.aminmax()).abs().max())
    # in units of the largest: the square of an fp32 number need not fit fp32
    return float((values / largest).square_().sum()) * largest**2 if largest else 0.0


@dataclass(frozen=True)
class Row:
    """One tensor, by our name."""

    name: str
    type: str
    weights: int
    nbytes: int
    deviation: Deviation


@dataclass(frozen=True)
class LayerClass:
    """Tensors that differ only in the number of their block (`*`)."""

    name: str
    types: tuple[str, ...]
    weights: int
    nbytes: int
    relative_error: float


@dataclass(frozen=True)
class Report:
    """`bytes_before` counts the part that was taken, `bytes_after` the whole file. `types`: tensors of each type."""

    role: str
    type: str
    bytes_before: int
    bytes_after: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    loras: tuple[Baked, ...] = ()

    @property
    def types(self) -> dict[str, int]:
        return dict(Counter(row.type for row in self.rows).most_common())

    @property
    def relative_error(self) -> float:
        return _joined(self.rows).relative

    @property
    def classes(self) -> tuple[LayerClass, ...]:
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(kind_of(row.name), []).append(row)
        return tuple(LayerClass(name, tuple(dict.fromkeys(row.type for row in rows)), sum(row.weights for row in rows),
                                sum(row.nbytes for row in rows), _joined(rows).relative)
                     for name, rows in groups.items())

    @property
    def worst(self) -> tuple[Row, ...]:
        """The tensors farthest from what they were, the farthest first."""
        changed = [row for row in self.rows if row.deviation.difference > 0]
        return tuple(sorted(changed, key=lambda row: -row.deviation.relative)[:WORST])


def _joined(rows: tuple[Row, ...] | list[Row]) -> Deviation:
    return Deviation(sum(row.deviation.difference for row in rows), sum(row.deviation.total for row in rows))


def lines_of(made: Report, path: Path) -> list[str]:
    """The report for people, without its notes; `path`: the file that was made."""
    types = ", ".join(f"{count} {type}" for type, count in made.types.items())
    lines = [f"{path}: {made.role} as {made.type}, {made.bytes_before / 1e6:.1f} -> {made.bytes_after / 1e6:.1f} MB "
             f"({100 * made.bytes_after / max(made.bytes_before, 1):.0f} %); tensors: {types}",
             *(f"  {lora.line()}" for lora in made.loras),
             f"  relative error {made.relative_error:.3%}; by kind of layer:"]
    lines += [f"  {row.relative_error:8.3%}  {row.name}  {'/'.join(row.types)}"
              for row in sorted(made.classes, key=lambda row: -row.relative_error) if row.relative_error > 0]
    if made.worst:
        lines.append("  farthest from the original:")
        lines += [f"  {row.deviation.relative:8.3%}  {row.name}  {row.type}" for row in made.worst[:SHOWN_WORST]]
    return lines
