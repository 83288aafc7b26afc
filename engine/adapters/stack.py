"""Rows of a stack as a user writes them: what FLUX_LORAS carries between nodes. Nothing is read from disk here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput
from .blocks import parse_blocks

MAX_ROWS = 256
MAX_STRENGTH = 100.0
BORDER = 1e-4
"""A share of the run this far past a border still counts as on it: sigmas come from tables of 10,000 entries."""
NOTHING = ("", "None")
"""Names that other packs give a row without a file."""
Points = tuple[tuple[float, float], ...]
LoraStack = list[tuple[str, float, float]]


@dataclass(frozen=True, eq=False)
class Region:
    """Where a LoRA acts: `mask` `(h, w)` fp32, 1 = with its whole strength, 0 = with `background` of it. `text`: share
    for text tokens and for layers that see no tokens."""

    mask: Tensor
    background: float = 0.0
    text: float = 1.0

    def shares(self, height: int, width: int) -> Tensor:
        """`(height * width,)` fp32: the share of each image token, row by row."""
        mask = F.interpolate(self.mask[None, None], size=(height, width), mode="area")
        return (self.background + (1 - self.background) * mask).flatten()


@dataclass(frozen=True)
class Row:
    """One LoRA: `file`, its name below the loras folders; strengths on the model and on CLIP; `blocks` (`blocks.py`);
    `start` up to but without `end`, shares 0..1 of the run in which it acts; `schedule`: points (share of the run,
    factor) in order, straight lines between them; `region`: where in the picture."""

    file: str
    model: float = 1.0
    clip: float = 1.0
    blocks: str = ""
    start: float = 0.0
    end: float = 1.0
    schedule: Points | None = None
    region: Region | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("model", "clip"):
            _number(getattr(self, name), f"{name} strength", self.file, -MAX_STRENGTH, MAX_STRENGTH)
        for name in ("start", "end"):
            _number(getattr(self, name), name, self.file, 0, 1)
        if self.start > self.end:
            raise BadInput(f"LoRA '{self.file}': it starts at {self.start} of the run and ends at {self.end}; the end "
                           "must not lie before the start")
        parse_blocks(self.blocks)

    @property
    def reads(self) -> bool:
        """Whether the file is needed at all."""
        return self.file not in NOTHING and (self.model != 0 or self.clip != 0)

    @property
    def timed(self) -> bool:
        """Whether the strength changes in the course of a run."""
        return self.schedule is not None or (self.start, self.end) != (0, 1)

    @property
    def varies(self) -> bool:
        """Whether the strength differs between steps or tokens."""
        return self.timed or self.region is not None

    def factor(self, share: float) -> float:
        """Of the strength at this share of the run, 0..1."""
        if share + BORDER < self.start or (share + BORDER >= self.end and self.end < 1):
            return 0.0
        return 1.0 if self.schedule is None else between(self.schedule, share)

    def beyond_stack(self) -> list[str]:
        """What of this row LORA_STACK has no place for, in words."""
        return [words for words, there in (
            (f"block weights '{self.blocks}'", bool(self.blocks.strip())),
            (f"range {self.start:g} to {self.end:g}", (self.start, self.end) != (0, 1)),
            ("schedule", self.schedule is not None), ("region", self.region is not None)) if there]


FluxLoras = tuple[Row, ...]
"""The socket type FLUX_LORAS."""


def parse_rows(text: str) -> list[Row]:
    """Rows of a widget's JSON: a list of {"on", "lora", "model", "clip", "blocks", "start", "end"}, all but `lora`
    optional; `clip` follows `model`. Rows that are off are left out. BadInput names the row and what is wrong."""
    try:
        found = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the rows of a LoRA stack are no JSON list: {error}") from error
    if not isinstance(found, list) or len(found) > MAX_ROWS:
        raise BadInput(f"the rows of a LoRA stack must be a JSON list of at most {MAX_ROWS} rows")
    return [row for number, values in enumerate(found, start=1) if (row := _row(number, values)) is not None]


def _row(number: int, values: Any) -> Row | None:
    if not isinstance(values, dict) or not isinstance(values.get("lora"), str):
        raise BadInput(f"row {number} of a LoRA stack has no file name under 'lora'")
    on, blocks = values.get("on", True), values.get("blocks", "")
    if not isinstance(on, bool) or not isinstance(blocks, str):
        raise BadInput(f"row {number} of a LoRA stack: 'on' must be true or false, and 'blocks' a text")
    if not on:
        return None
    model = values.get("model", 1.0)
    numbers = {"model": model, "clip": values.get("clip", model), "start": values.get("start", 0.0),
               "end": values.get("end", 1.0)}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadInput(f"row {number} of a LoRA stack: '{name}' is {value!r}, expected a number")
    try:
        made = {name: float(value) for name, value in numbers.items()}
        row = Row(values["lora"], made["model"], made["clip"], blocks, made["start"], made["end"])
    except (BadInput, OverflowError) as error:
        raise BadInput(f"row {number} of a LoRA stack: {error}") from error
    return row


def rows_of(loras: Any) -> FluxLoras:
    """The rows of a FLUX_LORAS, or of a LORA_STACK made by any node. BadInput for anything else."""
    if loras is None:
        return ()
    if not isinstance(loras, (list, tuple)):
        raise BadInput(f"loras must be FLUX_LORAS or LORA_STACK, found {type(loras).__name__}")
    rows = []
    for item in loras:
        if isinstance(item, Row):
            rows.append(item)
        elif isinstance(item, (list, tuple)) and len(item) == 3 and isinstance(item[0], (str, type(None))):
            try:
                rows.append(Row(item[0] or "", float(item[1]), float(item[2])))
            except (TypeError, ValueError, OverflowError) as error:
                raise BadInput(f"a row of LORA_STACK is {item!r}: {error}") from error
        else:
            raise BadInput(f"a row of LORA_STACK must be (path, model strength, clip strength), found {item!r:.200}")
    return tuple(rows)


def stack_of(rows: Iterable[Row]) -> tuple[LoraStack, list[str]]:
    """LORA_STACK of these rows, and a line for each row that it cannot wholly express."""
    rows = list(rows)
    lost = [f"{row.file}: LORA_STACK has no place for its {', '.join(row.beyond_stack())}; use FLUX_LORAS"
            for row in rows if row.beyond_stack()]
    return [(row.file, row.model, row.clip) for row in rows], lost


def parse_points(text: str) -> Points:
    """`0: 1, 0.5: 0.3, 1: 0` -> points, in order. BadInput unless shares of the run lie in 0..1 and rise."""
    points = []
    for part in (part for part in text.replace("\n", ",").replace(";", ",").split(",") if part.strip()):
        share, colon, factor = part.partition(":")
        try:
            points.append((float(share), float(factor)))
        except ValueError:
            colon = ""
        if not colon or not all(math.isfinite(value) for value in points[-1]):
            raise BadInput(f"schedule: {part.strip()!r} is no point; write such as '0: 1, 0.5: 0.3, 1: 0'")
    shares = [share for share, _ in points]
    if not points or min(shares) < 0 or max(shares) > 1 or any(a > b for a, b in pairwise(shares)):
        raise BadInput(f"schedule: {text!r} must name shares of the run from 0 to 1, in order")
    return tuple(points)


def between(points: Points, share: float) -> float:
    """The factor at a share of the run: straight lines between points, flat before the first and after the last."""
    before = [point for point in points if point[0] <= share + BORDER]
    after = [point for point in points if point[0] > share + BORDER]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (left, low), (right, high) = before[-1], after[0]
    return low + (high - low) * min(max((share - left) / (right - left), 0.0), 1.0)


def with_blocks(rows: Sequence[Row], blocks: str) -> FluxLoras:
    """These block weights for every row; where a row says otherwise for a layer, they win."""
    return tuple(replace(row, blocks="; ".join(text for text in (row.blocks.strip(" ;,"), blocks) if text))
                 for row in rows)


def with_schedule(rows: Sequence[Row], start: float, end: float, points: Points | None) -> FluxLoras:
    """This range and these points for every row; a range narrows the row's own, points replace its points."""
    made = []
    for row in rows:
        first, last = max(row.start, start), min(row.end, end)
        made.append(replace(row, start=first, end=max(first, last), schedule=points or row.schedule))
    return tuple(made)


def with_region(rows: Sequence[Row], mask: Tensor, feather: int, background: float, text: float) -> FluxLoras:
    """A region for every row that has none. `mask` `(B, H, W)` or `(H, W)`, of which the first counts; `feather`:
    pixels of the mask over which its edge is softened."""
    if mask.ndim not in (2, 3) or 0 in mask.shape or not bool(torch.isfinite(mask).all()):
        raise BadInput(f"a mask must be (batch, height, width) of finite numbers, found shape {tuple(mask.shape)}")
    first = (mask if mask.ndim == 2 else mask[0]).detach().float().cpu().clamp(0, 1)
    region = Region(softened(first, feather), background, text)
    return tuple(replace(row, region=row.region or region) for row in rows)


def softened(mask: Tensor, feather: int) -> Tensor:
    """`(h, w)`, averaged twice over squares of about `feather` pixels, so that edges become ramps."""
    reach = min(feather // 2, min(mask.shape) - 1)
    if reach < 1:
        return mask
    soft = mask[None, None]
    for _ in range(2):
        soft = F.avg_pool2d(F.pad(soft, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    return soft[0, 0]


def swept(rows: Sequence[Row], strengths: str, number: int) -> tuple[list[FluxLoras], list[str]]:
    """The stack at each of these strengths, with a label each; `number`: the row that changes, 0 for all of them.
    Strengths of CLIP change in step with those of the model."""
    if not 0 <= number <= len(rows):
        raise BadInput(f"row {number} of {len(rows)}: choose 1 to {len(rows)}, or 0 for all rows")
    values = []
    for part in strengths.replace("\n", ",").replace(";", ",").split(","):
        if part.strip():
            try:
                values.append(float(part))
            except ValueError:
                raise BadInput(f"strengths: {part.strip()!r} is no number; write such as '0, 0.5, 1'") from None
    if not 1 <= len(values) <= MAX_ROWS:
        raise BadInput(f"strengths: write 1 to {MAX_ROWS} numbers, such as '0, 0.5, 1'")
    name = ", ".join(_short(row.file) for i, row in enumerate(rows, 1) if number in (0, i))
    stacks = [tuple(_at(row, value) if number in (0, i) else row for i, row in enumerate(rows, 1))
              for value in values]
    return stacks, [f"{name} {value:g}" for value in values]


def _at(row: Row, strength: float) -> Row:
    share = row.clip / row.model if row.model else 1.0
    return replace(row, model=strength, clip=strength * share)


def _short(file: str) -> str:
    return file.replace("\\", "/").rpartition("/")[2].rpartition(".")[0] or file


def _number(value: float, name: str, file: str, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise BadInput(f"LoRA '{file}': {name} {value} must be a number from {low:g} to {high:g}")
