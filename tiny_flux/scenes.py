"""The world of tiny-flux: one coloured shape on a coloured background, its pictures and its captions.

A scene is fully determined by five attributes; 2,800 of them exist. One in ten, chosen by a hash of the scene, is
held out: never trained on in any wording.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (252, 230, 40),
    "purple": (135, 60, 175), "orange": (245, 135, 30), "white": (242, 242, 242), "black": (22, 22, 22),
}
SPANS = {"small": 0.28, "large": 0.50}  # of the shorter side
SHAPES = ("circle", "square", "triangle", "ring", "star")
MORE_SHAPES = ("cross",)  # what tiny-flux cannot draw, and a LoRA teaches it
PLACES: dict[str, tuple[float, float]] = {  # centre, as shares of width and height
    "left": (0.27, 0.5), "right": (0.73, 0.5), "top": (0.5, 0.27), "bottom": (0.5, 0.73), "center": (0.5, 0.5),
}
RING_HOLE = 0.55          # of the diameter
STAR_INNER = 0.42         # of the outer radius
CROSS_ARM = 1 / 3         # width of a cross's arms, of its span
SUPERSAMPLING = 4

PLACE_WORDS: dict[str, tuple[str, ...]] = {  # the first wording is the canonical one
    "left": ("on the left", "at the left", "on the left side", "to the left"),
    "right": ("on the right", "at the right", "on the right side", "to the right"),
    "top": ("at the top", "on top", "near the top", "at the top side"),
    "bottom": ("at the bottom", "at the bottom side", "near the bottom", "on the bottom"),
    "center": ("in the center", "in the centre", "in the middle", "at the center", "centered"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}

WORDINGS = (
    "a {size} {color} {shape} {place} on a {ground} background",
    "a {size} {color} {shape} on a {ground} background {place}",
    "a {size} {color} {shape} on a {ground} background, {place}",
    "{place}, a {size} {color} {shape} on a {ground} background",
    "{place} a {size} {color} {shape} on a {ground} background",
    "on a {ground} background, a {size} {color} {shape} {place}",
    "a {ground} background with a {size} {color} {shape} {place}",
    "{ground} background, {size} {color} {shape} {place}",
    "{size} {color} {shape} {place}, {ground} background",
    "a {color} {shape}, {size}, {place}, {ground} background",
    "a picture of a {size} {color} {shape} {place} on a {ground} background",
    "the {shape} is {size} and {color}, it is {place}, the background is {ground}",
)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `size` and `place` may be None in a caption that does not tell them."""

    size: str | None
    color: str
    shape: str
    place: str | None
    ground: str

    @property
    def held_out(self) -> bool:
        """True for the tenth of all scenes that training never sees. Needs all five attributes."""
        text = f"{self.size} {self.color} {self.shape} {self.place} {self.ground}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10 == 0


def all_scenes(shapes: tuple[str, ...] = SHAPES) -> list[Scene]:
    return [Scene(size, color, shape, place, ground)
            for size, color, shape, place, ground
            in itertools.product(SPANS, PALETTE, shapes, PLACES, PALETTE) if color != ground]


TRAINING_SCENES = [scene for scene in all_scenes() if not scene.held_out]
HELD_OUT_SCENES = [scene for scene in all_scenes() if scene.held_out]


def shape_mask(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Inside of an upright shape of span 2 around the origin; y points down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "ring":
        return (radius <= 1) & (radius >= RING_HOLE)
    if shape == "square":
        return (np.abs(x) <= 1) & (np.abs(y) <= 1)
    if shape == "triangle":
        return (y <= 1) & (np.abs(x) <= (y + 1) / 2)
    if shape == "star":
        half = math.pi / 5
        angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)  # from the nearest tip
        # the edge runs from the tip (1, angle 0) to the notch (STAR_INNER, angle half)
        across, along = radius * np.sin(angle), radius * np.cos(angle)
        notch_x, notch_y = STAR_INNER * math.sin(half), STAR_INNER * math.cos(half)
        inside: NDArray[np.bool_] = (1 - along) * notch_x >= across * (1 - notch_y)
        return inside
    if shape == "cross":
        thin, thick = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
        return (thin <= CROSS_ARM) & (thick <= 1)
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join((*SHAPES, *MORE_SHAPES))}")


def coverage(shape: str, center: tuple[float, float], span: float, width: int, height: int) -> NDArray[np.float64]:
    """Share of each pixel covered by a shape, `(height, width)` in 0..1; centre and span in pixels."""
    n = SUPERSAMPLING
    x = (np.arange(width * n) + 0.5) / n - center[0]
    y = (np.arange(height * n) + 0.5) / n - center[1]
    mask = shape_mask(shape, x[None, :] / (span / 2), y[:, None] / (span / 2))
    return mask.reshape(height, n, width, n).mean(axis=(1, 3))


def render(scene: Scene, width: int = 128, height: int = 128) -> NDArray[np.float32]:
    """The picture of a scene: `(height, width, 3)` in 0..1."""
    if scene.size is None or scene.place is None:
        raise ValueError("a scene needs a size and a place to be drawn")
    across, down = PLACES[scene.place]
    alpha = coverage(scene.shape, (across * width, down * height), SPANS[scene.size] * min(width, height),
                     width, height)[..., None]
    figure, ground = np.array(PALETTE[scene.color]) / 255, np.array(PALETTE[scene.ground]) / 255
    return (alpha * figure + (1 - alpha) * ground).astype(np.float32)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """A sentence for a scene: the canonical one, or with `rng` any of the usual rewordings.

    Attributes that are None are left out.
    """
    pick = (lambda words: words[0]) if rng is None else rng.choice
    text: str = pick(WORDINGS).format(
        size="" if scene.size is None else pick(SIZE_WORDS[scene.size]), color=scene.color, shape=scene.shape,
        place="" if scene.place is None else pick(PLACE_WORDS[scene.place]), ground=scene.ground)
    return tidy(text)


def tidy(text: str) -> str:
    """Close the gaps that attributes left out leave behind."""
    text = text.replace("is  and ", "is ").replace(" it is ,", "")
    text = " ".join(text.split())
    while ", ," in text or " ," in text:
        text = text.replace(", ,", ",").replace(" ,", ",")
    return text.strip(" ,").replace("a orange", "an orange")
