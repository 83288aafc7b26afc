"""Picture sizes: aspects times megapixels, on the grid of 16 pixels that FLUX.1 works on."""

from __future__ import annotations

import math

from ..engine.errors import BadInput

GRID = 16
MIN_SIDE = 16
MAX_SIDE = 16384
MEGAPIXEL = 1024 * 1024  # so that 1:1 at 1.0 is 1024 x 1024
MAX_PIXELS = 64 * MEGAPIXEL
CUSTOM = "custom"
ASPECTS: dict[str, tuple[int, int] | None] = {
    CUSTOM: None, "1:1": (1, 1), "5:4": (5, 4), "4:3": (4, 3), "3:2": (3, 2), "16:10": (16, 10), "16:9": (16, 9),
    "21:9": (21, 9), "4:5": (4, 5), "3:4": (3, 4), "2:3": (2, 3), "10:16": (10, 16), "9:16": (9, 16), "9:21": (9, 21),
}


def check_side(name: str, value: int | None) -> None:
    """BadInput unless `value` is a side that can be generated; None (linked, not known yet) passes."""
    if value is None:
        return
    if not MIN_SIDE <= value <= MAX_SIDE:
        raise BadInput(f"{name} {value} is outside {MIN_SIDE} ... {MAX_SIDE}")
    if value % GRID:
        low = value // GRID * GRID
        raise BadInput(f"{name} {value} is not a multiple of {GRID}; the nearest are {low} and {low + GRID}")


def picture_size(aspect: str, megapixels: float, width: int, height: int) -> tuple[int, int]:
    """(width, height) of a preset, each side rounded to the grid; of "custom", the given sides, checked."""
    ratio = ASPECTS[aspect]
    if ratio is not None:
        unit = math.sqrt(megapixels * MEGAPIXEL / (ratio[0] * ratio[1]))
        width, height = (max(MIN_SIDE, round(side * unit / GRID) * GRID) for side in ratio)
    for name, value in (("width", width), ("height", height)):
        check_side(name, value)
    if width * height > MAX_PIXELS:
        raise BadInput(f"{width} x {height} is more than {MAX_PIXELS // MEGAPIXEL} megapixels")
    return width, height
