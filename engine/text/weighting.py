"""Prompt weights: `(word)`, `(word:1.2)`, nesting and the escapes `\\(` `\\)`, as ComfyUI reads them.

The rules, since they are habits of a user interface and no published grammar:

- round brackets multiply the weight in force by 1.1; `(text:number)` replaces it by the number;
- the number is what follows the last colon inside the bracket; when it is no number, the colon is text;
- a bracket that is never closed, and a closing bracket that was never opened, are text;
- `\\(` and `\\)` are brackets as text; every other backslash is itself.

`embedding:name` (textual inversion) is not supported: it stays in the prompt as plain text, and a warning says so.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator

from ..errors import BadInput

BRACKET_WEIGHT = 1.1
MAX_PROMPT_CHARS = 100_000
MAX_NESTING = 100

# Escaped brackets travel as lone surrogates: no valid prompt holds one (`check_prompt` refuses them).
_ESCAPES = (("\\)", "\udc29"), ("\\(", "\udc28"))
INVERSION = re.compile(r"(?:^|(?<=[\s(]))embedding:([^\s():]+)")

logger = logging.getLogger(__name__)


def check_prompt(text: str) -> None:
    """Refuse what no tokenizer can read: a text that is no valid Unicode, or absurdly long."""
    if not isinstance(text, str):
        raise BadInput(f"a prompt must be text, found {type(text).__name__}")
    if len(text) > MAX_PROMPT_CHARS:
        raise BadInput(f"the prompt has {len(text)} characters; at most {MAX_PROMPT_CHARS} are read. Shorten it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(f"the prompt is no valid Unicode text: character {error.start + 1} is a lone surrogate "
                       f"(U+{ord(text[error.start]):04X}). Type the prompt again or remove that character") from error


def parse_weights(text: str) -> list[tuple[str, float]]:
    """The prompt as `(text, weight)` segments, left to right; a prompt without brackets is one segment.

    Raises BadInput for a weight that is not finite and for brackets nested more than 100 deep.
    """
    check_prompt(text)
    for found in INVERSION.finditer(text):
        logger.warning("textual inversion is not supported: %r is read as plain text", found[0])
    for written, stand_in in _ESCAPES:
        text = text.replace(written, stand_in)
    return [(_unescape(part), weight) for part, weight in _segments(text, 1.0, 0)]


def _unescape(text: str) -> str:
    for written, stand_in in _ESCAPES:
        text = text.replace(stand_in, written[1])
    return text


def _segments(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    if depth > MAX_NESTING:
        raise BadInput(f"brackets in the prompt are nested more than {MAX_NESTING} deep. "
                       r"Remove some, or write \( and \) for brackets that are text")
    for part in _split_brackets(text):
        if len(part) >= 2 and part[0] == "(" and part[-1] == ")":
            yield from _segments(*_bracket(part[1:-1], weight), depth + 1)
        else:
            yield part, weight


def _split_brackets(text: str) -> Iterator[str]:
    """Cut at the outermost brackets. The level may fall below zero: then brackets are text until it is back at zero."""
    level = 0
    start = 0
    for i, char in enumerate(text):
        if char == "(":
            if level == 0 and i > start:
                yield text[start:i]
                start = i
            level += 1
        elif char == ")":
            level -= 1
            if level == 0:
                yield text[start:i + 1]
                start = i + 1
    if start < len(text):
        yield text[start:]


def _bracket(inside: str, weight: float) -> tuple[str, float]:
    """What a bracket holds and the weight it sets."""
    colon = inside.rfind(":")
    if colon > 0:
        try:
            number = float(inside[colon + 1:])
        except ValueError:
            return inside, weight * BRACKET_WEIGHT
        if not math.isfinite(number):
            raise BadInput(f"the weight {_unescape(inside[colon + 1:])!r} in the prompt is not finite. "
                           r"Write a number such as 1.2, or \( and \) for brackets that are text")
        return inside[:colon], number
    return inside, weight * BRACKET_WEIGHT
