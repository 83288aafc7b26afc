"""What a picture shows, judged by its pixels alone, and the score of a model over many prompts.

The judge knows the palette and the geometry of the grammar, and neither the prompt nor any rendered target: each pixel
goes to the nearest palette colour, the background is the most frequent colour of the border, the figure the most
frequent other one, and shape, size and place are measured on the figure's mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .scenes import PALETTE, PLACES, SHAPES, SPANS, Scene, shape_mask

FLAT_TOLERANCE = 20          # levels: how far a flat colour may be from its palette entry
NAMES = tuple(PALETTE)
COLORS = np.array([PALETTE[name] for name in NAMES], dtype=np.float64)


@dataclass(frozen=True)
class Reading:
    """What the judge saw; `problem` says why nothing could be told."""

    scene: Scene | None
    problem: str = ""


def read_picture(picture: NDArray[np.uint8]) -> Reading:
    """Judge a picture `(H, W, 3)` uint8."""
    height, width = picture.shape[:2]
    distance = np.abs(picture[:, :, None, :].astype(np.float64) - COLORS).max(axis=-1)
    nearest = distance.argmin(axis=-1)  # (H, W)
    ring = max(2, min(width, height) // 32)
    border = np.concatenate([nearest[:ring].ravel(), nearest[-ring:].ravel(),
                             nearest[:, :ring].ravel(), nearest[:, -ring:].ravel()])
    ground = int(np.bincount(border, minlength=len(NAMES)).argmax())
    counts = np.bincount(nearest.ravel(), minlength=len(NAMES))
    counts[ground] = 0
    figure = int(counts.argmax())
    if counts[figure] < 0.005 * width * height:
        return Reading(None, "no figure")
    for name, index in (("background", ground), ("figure", figure)):
        flat = np.median(picture[nearest == index].astype(np.float64), axis=0)
        if np.abs(flat - COLORS[index]).max() > FLAT_TOLERANCE:
            return Reading(None, f"{name} colour {flat.astype(int).tolist()} is not {NAMES[index]}")
    mask = nearest != ground
    if (mask & (nearest != figure)).mean() > 0.25 * mask.mean() + 0.002:
        return Reading(None, "a third colour")
    return _read_mask(mask, NAMES[figure], NAMES[ground])


def _read_mask(mask: NDArray[np.bool_], color: str, ground: str) -> Reading:
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.sum(axis=1) > 1), np.flatnonzero(mask.sum(axis=0) > 1)
    if not len(rows) or not len(columns):
        return Reading(None, "no figure")
    span = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = min(width, height)
    size = min(SPANS, key=lambda name: abs(span / side - SPANS[name]))
    if abs(span / side - SPANS[size]) > 0.10:
        return Reading(None, f"span {span / side:.2f} of the shorter side is neither small nor large")
    middle = ((columns[0] + columns[-1] + 1) / 2 / width, (rows[0] + rows[-1] + 1) / 2 / height)
    place = min(PLACES, key=lambda name: _far(PLACES[name], middle))
    if _far(PLACES[place], middle) > 0.09:
        return Reading(None, f"figure at {middle[0]:.2f}, {middle[1]:.2f} is in no named place")
    box = ((columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2)
    likeness = {shape: _likeness(mask, shape, box, float(span)) for shape in SHAPES}
    shape = max(likeness, key=lambda name: likeness[name])
    if likeness[shape] < 0.68:
        return Reading(None, f"no known shape (best {shape}, overlap {likeness[shape]:.2f})")
    return Reading(Scene(size, color, shape, place, ground))


def _far(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


def _likeness(mask: NDArray[np.bool_], shape: str, center: tuple[float, float], span: float) -> float:
    """Best intersection over union with an ideal shape of about the same bounding box.

    Thin tips fade, so the box may come out a few per cent short: a few spans and heights are tried.
    """
    height, width = mask.shape
    x, y = np.arange(width) + 0.5 - center[0], np.arange(height) + 0.5 - center[1]
    best = 0.0
    for stretch in (1.0, 1.06, 1.12):
        radius = span * stretch / 2
        for lower in (-0.05, 0.0, 0.05, 0.1):  # a star's box lies higher than its centre
            ideal = shape_mask(shape, x[None, :] / radius, y[:, None] / radius - lower)
            best = max(best, float((mask & ideal).sum() / max(1, (mask | ideal).sum())))
    return best


def matches(asked: Scene, picture: NDArray[np.uint8]) -> bool:
    """True when the picture shows all that was asked; attributes that are None may be anything."""
    seen = read_picture(picture).scene
    return seen is not None and all(
        want is None or want == got for want, got in zip(
            (asked.size, asked.color, asked.shape, asked.place, asked.ground),
            (seen.size, seen.color, seen.shape, seen.place, seen.ground), strict=True))
