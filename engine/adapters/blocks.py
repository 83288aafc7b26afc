"""Block weights: a short text that gives each layer of the transformer a factor.

    double 3-5 = 0.5, single 0-9 = 0, img = 1.2, mlp = 0.8, base = 0

A term is words and a number. Words choose layers: `double` or `single` with numbers of blocks as they are counted in
the model, whatever the LoRA holds; `img` or `txt` (the streams of double blocks); `attn`, `mlp` or `mod`; `base` for
all that stands outside the blocks; `all`. Words of one term narrow it down; of several terms that fit the last counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import BadInput
from ..specs import FLUX_DEV

DEPTHS = {"double": FLUX_DEV.depth, "single": FLUX_DEV.depth_single_blocks}
WORDS = ("img", "txt", "attn", "mlp", "mod", "base", "all")
_TERM = re.compile(r"\s*(?P<words>[^=:]*?)\s*[=:]\s*(?P<value>[-+]?(?:\d+\.?\d*|\.\d+))\s*")
_RANGE = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?")
_NAME = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Term:
    """`blocks`: kind and numbers, empty for both kinds and all; `words`: the others."""

    kind: str | None
    blocks: frozenset[int]
    words: frozenset[str]
    factor: float

    def fits(self, module: str) -> bool:
        found = _NAME.fullmatch(module)
        if found is None:
            return self.kind is None and bool(self.words & {"base", "all"})
        kind, index, layer = found[1], int(found[2]), found[3]
        if "base" in self.words or self.kind not in (None, kind) or (self.blocks and index not in self.blocks):
            return False
        return all(word == "all" or word in _words_of(layer) for word in self.words)


def _words_of(layer: str) -> set[str]:
    """`linear1` and `linear2` hold attention and MLP at once."""
    words = {"img"} if layer.startswith("img_") else {"txt"} if layer.startswith("txt_") else set()
    if "mod" in layer:
        return words | {"mod"}
    if layer in ("linear1", "linear2"):
        return {"attn", "mlp"}
    return words | ({"mlp"} if "mlp" in layer else {"attn"})


def parse_blocks(text: str) -> tuple[Term, ...]:
    """The terms of a text. Raises `BadInput` naming the term that is wrong."""
    return tuple(_term(part) for part in re.split(r"[,;\n]", text) if part.strip())


def _term(part: str) -> Term:
    match = _TERM.fullmatch(part)
    if match is None:
        raise BadInput(f"block weights: {part.strip()!r} is no term; write such as 'double 0-9 = 0.5, single = 0'")
    kind: str | None = None
    blocks: set[int] = set()
    words: set[str] = set()
    for word in match["words"].lower().replace("+", " ").split():
        numbers = _RANGE.fullmatch(word)
        if word in DEPTHS and kind is None:
            kind = word
        elif numbers is not None and kind is not None:
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            if not first <= last < DEPTHS[kind]:
                raise BadInput(f"block weights: {part.strip()!r} asks for {kind} blocks {word}; there are 0 to "
                               f"{DEPTHS[kind] - 1}")
            blocks |= set(range(first, last + 1))
        elif word in WORDS:
            words.add(word)
        else:
            raise BadInput(f"block weights: {word!r} in {part.strip()!r} is not known; known are double and single "
                           f"with numbers such as 0-9, {', '.join(WORDS)}")
    if kind is None and not words:
        raise BadInput(f"block weights: {part.strip()!r} names no blocks")
    return Term(kind, frozenset(blocks), frozenset(words), float(match["value"]))


def block_weights(text: str) -> Callable[[str], float]:
    """Our name of a layer -> factor, by the last term that fits; 1 where none does."""
    terms = parse_blocks(text)

    def factor(module: str) -> float:
        return next((term.factor for term in reversed(terms) if term.fits(module)), 1.0)
    return factor
