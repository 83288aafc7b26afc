"""What was written into a LoRA file, and how far it is from what it was made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .report import SHOWN_WORST, WORST, kind_of


@dataclass(frozen=True)
class Source:
    file: str
    strength: float


@dataclass(frozen=True)
class Made:
    """One layer. `stem`: its name in the file without the ending; `kind`: the algorithms it came from; ranks are None
    for norms, biases and what was no product; `length`: of the change, `off`: of the difference."""

    role: str
    stem: str
    kind: str
    rank_before: int | None
    rank: int | None
    length: float
    off: float

    @property
    def error(self) -> float:
        return error((self,))


def error(rows: Sequence[Made]) -> float:
    """Length of the differences over that of the changes."""
    whole = sum(row.length ** 2 for row in rows)
    return math.sqrt(sum(row.off ** 2 for row in rows) / whole) if whole > 0 else 0.0


@dataclass(frozen=True)
class Written:
    """`layout`: kohya or peft; `dtype`: as safetensors names it."""

    path: Path
    layout: str
    dtype: str
    nbytes: int
    layers: tuple[Made, ...]
    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({row.rank for row in self.layers if row.rank is not None}))

    @property
    def error(self) -> float:
        return error(self.layers)

    @property
    def classes(self) -> dict[str, list[Made]]:
        """Layers that differ only in the number of their block (`*`)."""
        found: dict[str, list[Made]] = {}
        for row in self.layers:
            found.setdefault(kind_of(row.stem), []).append(row)
        return found

    @property
    def worst(self) -> tuple[Made, ...]:
        return tuple(sorted((row for row in self.layers if row.off > 0), key=lambda row: -row.error)[:WORST])

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path), "layout": self.layout, "dtype": self.dtype, "bytes": self.nbytes,
            "ranks": list(self.ranks), "relative_error": self.error,
            "from": [{"file": source.file, "strength": source.strength} for source in self.sources],
            "layers": [{"name": name, "count": len(rows), "from": sorted({row.kind for row in rows}),
                        "ranks": sorted({row.rank for row in rows if row.rank is not None}),
                        "relative_error": error(rows)} for name, rows in self.classes.items()],
            "worst": [{"name": row.stem, "rank": row.rank, "relative_error": row.error} for row in self.worst],
            "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """The same for people, without the notes."""
        made_of = " + ".join(source.file if source.strength == 1 else f"{source.strength:g} x {source.file}"
                             for source in self.sources)
        found = [f"{self.path}: {made_of}, as {self.layout}, {self.dtype}, {len(self.layers)} layers, rank "
                 f"{_span(self.ranks)}, {self.nbytes / 1e6:.1f} MB"]
        if not self.worst:
            return [*found, "  exact: nothing was rounded or left out of any layer's change"]
        found.append(f"  relative error of the change {_shown(self.error)}; by kind of layer:")
        found += [f"  {_shown(error(rows)):>9}  {name}  rank {_span([row.rank for row in rows if row.rank])}"
                  for name, rows in sorted(self.classes.items(), key=lambda item: -error(item[1])) if error(rows) > 0]
        found.append("  farthest from what they were:")
        return [*found, *(f"  {_shown(row.error):>9}  {row.stem}" for row in self.worst[:SHOWN_WORST])]


def _shown(value: float) -> str:
    """Per cent, with as many digits as a rounding needs."""
    return f"{100 * value:.3g} %"


def _span(ranks: Sequence[int]) -> str:
    return "-" if not ranks else f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
