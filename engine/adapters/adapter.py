"""One adapter of one layer: which rows, what algorithm, its tensors as stored, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .algorithms import (
    BY_ROWS,
    OF_THE_BASE,
    ON_BIAS,
    REPLACING,
    Algorithm,
    Factors,
    Rows,
    algorithm,
    decomposed,
    decomposed_terms,
    is_on_input,
)
from .terms import Bias, LowRank, RowScale, Term
from .vocabulary import Destination


@dataclass(frozen=True)
class Adapter:
    """`factors`: role -> tensor as stored. `scale`: alpha / rank and the like; for OFT the constraint. `keys`: the
    names in the file. `size`: (out, in) of what it changes, None where any fits."""

    destination: Destination
    algorithm: str
    factors: Mapping[str, Tensor] = field(repr=False)
    scale: float
    rank: int | None
    alpha: float | None
    keys: tuple[str, ...] = field(repr=False)
    size: tuple[int | None, int | None]

    @property
    def row(self) -> Algorithm:
        return algorithm(self.algorithm)

    @property
    def on_bias(self) -> bool:
        return self.algorithm in ON_BIAS

    def outdone(self, later: Adapter) -> bool:
        """Whether both replace the same numbers of a layer, so that only those of the later one count."""
        return (self.algorithm in REPLACING and self.algorithm == later.algorithm
                and self.destination == later.destination)

    def numbers(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """The factors in `dtype`, matrices with two axes. Converted before they travel: not every device takes what
        they are stored in (MPS has no 8-bit and no 64-bit floats)."""
        return {role: (tensor if role in ("oft", "on_input") else _flat(tensor)).to(dtype).to(device)
                for role, tensor in self.factors.items()}

    def change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """What is to be added to `weight`, the rows meant `(out, in)` of the base's weight, or a vector: its dtype and
        device. Columns that the adapter lacks (`img_in` of wider models) stay as they are."""
        factors = self.numbers(weight.dtype, weight.device)
        base = swapped(weight) if self.destination.swapped else weight
        width = self.size[1]
        narrow = weight.ndim == 2 and width is not None and width < weight.shape[1]
        base = base[:, :width] if narrow else base
        change = self._raw(factors, base, strength).reshape(base.shape)
        if narrow:
            change = torch.nn.functional.pad(change, (0, weight.shape[1] - change.shape[1]))
        return swapped(change) if self.destination.swapped else change

    @property
    def depends(self) -> bool:
        """Whether the change is another on another base, so that adapters before it count."""
        return "magnitude" in self.factors or self.algorithm in OF_THE_BASE

    def of_rows(self, tile: slice) -> Adapter | None:
        """The adapter of some of the rows it changes, None if these cannot be told apart from the others."""
        roles, magnitude = BY_ROWS.get(self.algorithm), self.factors.get("magnitude")
        sliced = {role: self.factors[role][tile] for role in roles or ()}
        if magnitude is not None:
            sliced["magnitude"] = magnitude.reshape(-1, 1)[tile]
        if (roles is None or self.destination.swapped or any(role.startswith("hada_t") for role in self.factors)
                or (magnitude is not None and is_on_input(tuple(magnitude.shape)))):
            return None
        rows = len(next(iter(sliced.values())))
        return replace(self, factors={**self.factors, **sliced}, size=(rows, self.size[1]))

    def _raw(self, factors: Factors, base: Tensor, strength: float) -> Tensor:
        if self.row.at is not None:
            return self.row.at(factors, self.scale, base, strength)
        delta = self.row.delta(factors, self.scale, base)
        delta = decomposed(factors["magnitude"], delta, base) if "magnitude" in factors else delta
        return delta if strength == 1 else delta * strength

    def terms(self, weight: Rows, width: int, dtype: torch.dtype, device: torch.device | str) -> list[Term] | None:
        """The same added to the layer's output, None if only a changed weight will do.

        `weight(tile)`: some of the rows meant, in `dtype` and on `device`; asked only by those that need the base's
        numbers. `width`: of the layer.
        """
        if self.size[1] not in (None, width) and (self.algorithm != "LoRA" or "magnitude" in self.factors):
            return None  # these would have to leave the columns alone that they do not know
        factors = self.numbers(dtype, device)
        base = (lambda tile: swapped(weight(slice(None)))[tile]) if self.destination.swapped else weight
        terms = self.row.terms(factors, self.scale, base)
        if "magnitude" in factors:
            terms = decomposed_terms(factors["magnitude"], terms, base)
        return _swapped_terms(terms) if self.destination.swapped and terms is not None else terms


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def swapped(rows: Tensor) -> Tensor:
    """Both halves of the rows in the other order."""
    return torch.cat(rows.chunk(2)[::-1])


def _swapped_terms(terms: list[Term]) -> list[Term] | None:
    """Only what ends in a matrix of rows, or is one vector, can be put in the other order by itself."""
    found: list[Term] = []
    for term in terms:
        if isinstance(term, LowRank):
            found.append(LowRank(term.down, swapped(term.up), term.scale))
        elif isinstance(term, (Bias, RowScale)):
            found.append(type(term)(swapped(term.vector)))
        else:
            return None
    return found
