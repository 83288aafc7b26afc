"""Which value in a saved node's `widgets_values` belongs to which input.

The list is positional and holds more than inputs: the control below a seed ("randomize"), its filter on dropdowns, the
upload button. Converted widgets (now sockets) keep their place in it; inputs with `force_input` never had one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from . import io

SEEDS = {"seed", "noise_seed"}  # have a control although their schema may not say so
CONTROL, FILTER, UPLOAD = "control", "filter", "upload"  # places in the list that are no inputs
EXTRAS = {CONTROL: ("fixed", "increment", "decrement", "randomize"), UPLOAD: ("image",)}  # what they can hold
_BLANK: dict[str, Any] = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
_COMMENT = re.compile(r"/\*|//")
_NEWLINE = re.compile(r"[\n\r\u2028\u2029]")
_PIECE = re.compile(r"\\.|[{}|]|[^{}|\\]+|\\", re.DOTALL)


def widget_values(schema: io.Schema, saved: list[Any] | dict[str, Any]) -> dict[str, Any]:
    """Value of each widget input: as saved, else its default. `saved`: by position, or by name as some packs do."""
    values = saved if isinstance(saved, dict) else _by_position(schema, saved)
    found = {}
    for spec in _widgets(schema):
        value = values.get(spec.id)
        value = _default(spec) if value is None else value
        if value is not None:
            found[spec.id] = value
    return found


def _by_position(schema: io.Schema, saved: list[Any]) -> dict[str, Any]:
    places = list(_places(schema))
    found: dict[str, Any] = {}
    index = 0
    for done, place in enumerate(places):
        if index >= len(saved):
            break
        # Not every file has the extra values, old frontends saved fewer: take them only if they can be meant.
        inputs_left = sum(isinstance(later, io.Input) for later in places[done:])
        surplus = len(saved) - index > inputs_left
        if isinstance(place, io.Input):
            found[place.id] = saved[index]
            index += 1
        elif surplus if place == FILTER else saved[index] in EXTRAS[place]:
            index += 1
    return found


def _places(schema: io.Schema) -> Iterator[io.WidgetInput | str]:
    """Everything a frontend gives a place, in its order: required inputs first, whatever the schema's order."""
    upload = any(isinstance(spec, io.Combo.Input) and spec.upload for spec in _widgets(schema))
    for optional in (False, True):
        for spec in _widgets(schema):
            if spec.optional is not optional:
                continue
            yield spec
            control = getattr(spec, "control_after_generate", None)
            if control or (control is None and isinstance(spec, io.Int.Input) and spec.id in SEEDS):
                yield CONTROL
                if isinstance(spec, io.Combo.Input):
                    yield FILTER
        if upload and not optional:
            yield UPLOAD


def _widgets(schema: io.Schema) -> list[io.WidgetInput]:
    return [spec for spec in schema.inputs if isinstance(spec, io.WidgetInput) and not spec.force_input]


def _default(spec: io.WidgetInput) -> Any:
    if spec.default is not None:
        return spec.default
    if isinstance(spec, io.Combo.Input):
        options = list(spec.options or [])
        return options[0] if options else ""
    return _BLANK.get(spec.io_type)


def dynamic_prompt(text: str, choose: random.Random) -> str:
    """Prompt text as a frontend sends it: no comments, one choice of each `{a|b}`, escaped braces and bars plain."""
    text = _without_comments(text)
    stack: list[list[list[str]]] = [[[]]]  # for each open brace its choices so far, in pieces; the outermost has one

    def close() -> None:
        chosen = choose.choice(stack.pop())
        stack[-1][-1] += chosen

    for piece in _PIECE.findall(text):
        if piece == "{":
            stack.append([[]])
        elif piece == "}" and len(stack) > 1:
            close()
        elif piece == "|" and len(stack) > 1:
            stack[-1].append([])
        else:
            stack[-1][-1].append(piece)
    while len(stack) > 1:  # a brace that is never closed ends with the text
        close()
    return re.sub(r"\\([{}|])", r"\1", "".join(stack[0][0]))


def _without_comments(text: str) -> str:
    """Without `/* ... */` and `// ...`; a block that never ends is text. Linear, where a regular expression is not."""
    kept, done, blocks = [], 0, True
    while (found := _COMMENT.search(text, done)) is not None:
        block = found.group() == "/*"
        end = text.find("*/", found.end()) + 2 if block and blocks else -1
        if not block:
            newline = _NEWLINE.search(text, found.end())
            end = len(text) if newline is None else newline.start()
        blocks = blocks and (not block or end > 1)
        kept.append(text[done:found.start() if end > 1 else found.end()])
        done = end if end > 1 else found.end()
    return "".join(kept) + text[done:]
