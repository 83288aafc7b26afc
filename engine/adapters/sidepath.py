"""The side path: all adapters of one layer, added to its output in one pass.

The low-rank adapters stand one below the other in `down` `(R, in)`, whose product with x gives every adapter's
coordinates at once; a vector of R numbers holds strength times scale; `up` brings them back, in one product for the
rows of each slice, or in one for all while R is small. R is padded to a multiple of 16 so that shapes stay the same in
compiled code. A change of strength writes this vector and one number per adapter, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput
from .layers import STORED, Source
from .terms import Dense, Kron, LowRank, Term

PAD = 16
ONE_PRODUCT_RANK = 64
"""Up to this rank slices of rows share one `up` with zeros; above, each has its own product."""
NAME = "flux_kit_adapters"
"""The attribute of a layer that holds its side path."""

Place = tuple[slice, slice, Tensor]
"""Rows of the layer, rows of `down`, and the `up` that leads from these to those."""


@dataclass(frozen=True)
class Part:
    """One adapter's terms for rows of the layer. `entry`: its number in the stack."""

    entry: int
    rows: slice
    terms: Sequence[Term]


class SidePath(nn.Module):
    """A forward hook of a layer, and a child of it, so that its buffers move with the layer's weights. `varies`: its
    strengths change in the course of a run; `told`: those it was given last."""

    down: Tensor | None
    owner: Tensor
    scale: Tensor
    vector: Tensor
    strength: Tensor

    def __init__(self, parts: Sequence[Part], out_features: int, dtype: torch.dtype,
                 device: torch.device | str, source: Source = STORED) -> None:
        super().__init__()
        self.source = source
        numbers = torch.float64 if dtype == torch.float64 else torch.float32
        self.entries = tuple(dict.fromkeys(part.entry for part in parts))
        self.out_features = out_features
        self.stream: str | None = None
        self.mask: Mask | None = None
        self.varies = False
        self.told: list[float] | None = None
        self._state = object()
        self.rows: list[tuple[int, slice]] = []
        self.terms = nn.ModuleList()
        self._full: Tensor | None = None
        self.register_buffer("strength", torch.zeros(len(self.entries), dtype=numbers, device=device), persistent=False)
        self._join(parts, dtype, numbers, device)
        for part in parts:
            for term in part.terms:
                if not isinstance(term, LowRank):
                    self.rows.append((self.entries.index(part.entry), part.rows))
                    self.terms.append(term.to(dtype) if isinstance(term, (Kron, Dense)) else term)
        self.needs_plain = any(term.needs_plain for term in self.terms)

    def _join(self, parts: Sequence[Part], dtype: torch.dtype, numbers: torch.dtype,
              device: torch.device | str) -> None:
        """Sorts the low-rank terms by the rows they change and puts them into one matrix."""
        found = [(part.rows.start, part.rows.stop, part.entry, term) for part in parts for term in part.terms
                 if isinstance(term, LowRank)]
        found.sort(key=lambda item: item[:2])
        ranks = [len(term.down) for *_, term in found]
        total = sum(ranks)
        padded = -(-total // PAD) * PAD
        owner, scale = torch.zeros(padded, dtype=torch.long), torch.zeros(padded, dtype=numbers)
        width = max((term.down.shape[1] for *_, term in found), default=0)
        down = torch.zeros(padded, width, dtype=dtype, device=device)
        at = 0
        places: list[Place] = []
        for (first, last, entry, term), rank in zip(found, ranks, strict=True):
            down[at:at + rank, :term.down.shape[1]] = term.down
            owner[at:at + rank], scale[at:at + rank] = self.entries.index(entry), term.scale
            places.append((slice(first, last), slice(at, at + rank), term.up))
            at += rank
        self.register_buffer("down", down if found else None, persistent=False)
        self.register_buffer("owner", owner.to(device), persistent=False)
        self.register_buffer("scale", scale.to(device), persistent=False)
        self.register_buffer("vector", torch.zeros_like(scale).to(device), persistent=False)
        self.products: list[tuple[slice, slice]] = []
        for rows, own in self._grouped(places, padded):
            last = padded if own[-1] is places[-1] else own[-1][1].stop
            start = own[0][1].start
            up = torch.zeros(rows.stop - rows.start, last - start, dtype=dtype, device=device)
            for place, ranks_of, values in own:
                to = slice(place.start - rows.start, place.stop - rows.start)
                up[to, ranks_of.start - start:ranks_of.stop - start] = values
            self.register_buffer(f"up_{len(self.products)}", up, persistent=False)
            self.products.append((rows, slice(start, last)))

    def _grouped(self, places: list[Place], padded: int) -> Iterator[tuple[slice, list[Place]]]:
        """The products to make: one for all rows, or one for each slice of them."""
        if places and padded <= ONE_PRODUCT_RANK:
            yield slice(0, self.out_features), places
            return
        for (start, stop), own in groupby(places, key=lambda place: (place[0].start, place[0].stop)):
            yield slice(start, stop), list(own)

    @property
    def rank(self) -> int:
        return 0 if self.down is None else len(self.down)

    @property
    def width(self) -> int:
        """Inputs that the low-rank adapters take; more than the layer's where a control LoRA widens it."""
        return 0 if self.down is None else self.down.shape[1]

    def set(self, strengths: Tensor) -> None:
        """Strength of each of `entries`, in order."""
        self.strength.copy_(strengths)
        self.vector.copy_(self.strength[self.owner] * self.scale)
        self._state = object()

    def set_mask(self, mask: Mask | None) -> None:
        """`mask`: of this layer's `entries`."""
        self.mask, self._state = mask, object()

    def steady(self) -> object | None:
        """For who keeps the layer's outputs (`models.modulation.state_of`): another object whenever what is added to
        them has changed; None where it does from step to step."""
        return None if self.varies else self._state

    def narrowed(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A hook before a layer that takes fewer inputs than come (control LoRA on `img_in`): those it knows."""
        if args[0].shape[-1] < self.width:
            raise BadInput(f"a control LoRA is attached, which takes {self.width} channels, and there are "
                           f"{args[0].shape[-1]}: connect its control picture (FLUX.1 Depth or Canny)")
        self._full = args[0]
        return (args[0][..., :layer.in_features], *args[1:])

    def forward(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """x `(..., in)` and the layer's output `(..., out)` -> the output with the adapters' part."""
        x = args[0]
        if self._full is not None:
            x, self._full = self._full, None
        given = x
        x = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and out.requires_grad:
            out = out.clone()
        flat = out.view(-1, self.out_features)
        tokens = None if self.mask is None else self._token_strengths(given)
        plain = None
        if self.needs_plain:  # before anything is added
            bias = self.source.bias(layer, flat)
            plain = flat.clone() if bias is None else flat - bias
        if self.down is not None:
            self._low_rank(x, flat, tokens)
        for (entry, rows), term in zip(self.rows, self.terms, strict=True):
            strength = self.strength[entry] if tokens is None else tokens[:, entry, None]
            cast(Term, term).add(flat[:, rows], x, None if plain is None else plain[:, rows],
                                 partial(self._product, layer, rows), strength)
        return out

    def _product(self, layer: nn.Module, rows: slice, x: Tensor) -> Tensor:
        return self.source.product(layer, x, rows)

    def _low_rank(self, x: Tensor, flat: Tensor, tokens: Tensor | None) -> None:
        assert self.down is not None
        x = x[:, :self.down.shape[1]]
        h = F.linear(x, self.down if self.down.dtype == x.dtype else self.down.to(x.dtype))
        h = (h * (self.vector if tokens is None else tokens[:, self.owner] * self.scale)).to(flat.dtype)
        for i, (rows, ranks) in enumerate(self.products):
            up: Tensor = getattr(self, f"up_{i}")
            flat[:, rows].addmm_(h[:, ranks], up.to(flat.dtype).T)

    def _token_strengths(self, x: Tensor) -> Tensor:
        """`(tokens, entries)`: the strengths times each token's share."""
        assert self.mask is not None
        length = x.shape[-2] if x.ndim > 2 else 1
        shares = self.mask.shares(self.stream if x.ndim > 2 else None, length) * self.strength
        return shares.expand(x.numel() // x.shape[-1] // length, *shares.shape).reshape(-1, shares.shape[-1])


@dataclass(frozen=True)
class Mask:
    """Each entry's share of the strength by token.

    `image` `(L_img, entries)`; `text`, `rest` (image tokens behind those of `image`: references) and `other` (layers
    that see no tokens: modulations, embedders) `(1, entries)`. `text_tokens`: None if all that is not image is text.
    """

    image: Tensor
    text: Tensor
    rest: Tensor
    other: Tensor
    text_tokens: int | None = None

    def of(self, entries: Sequence[int], like: Tensor) -> Mask:
        """Only these entries, in `like`'s dtype and on its device."""
        at = list(entries)
        image, text, rest, other = (part[:, at].to(like) for part in (self.image, self.text, self.rest, self.other))
        return Mask(image, text, rest, other, self.text_tokens)

    def shares(self, stream: str | None, length: int) -> Tensor:
        """`(length, entries)` for a layer's input; `stream` as in `layers.stream_of`."""
        if stream is None:
            return self.other.expand(length, -1)
        if stream == "txt":
            return self.text.expand(length, -1)
        text = 0
        if stream == "both":
            text = max(length - len(self.image), 0) if self.text_tokens is None else min(self.text_tokens, length)
        image = self.image[:length - text]
        return torch.cat((self.text.expand(text, -1), image, self.rest.expand(length - text - len(image), -1)))
