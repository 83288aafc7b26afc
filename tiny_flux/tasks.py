"""What the later members of tiny-flux are asked: to fill, to follow a map, to edit. Scenes in, scenes out, no weights.

Each task is judged like a plain prompt: by the scene that the picture should show (`score.matches`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .scenes import (
    HELD_OUT_SCENES,
    PALETTE,
    PLACE_WORDS,
    PLACES,
    SHAPES,
    SIZE_WORDS,
    SPANS,
    TRAINING_SCENES,
    Scene,
    caption,
    coverage,
    tidy,
)

SCENES = {False: TRAINING_SCENES, True: HELD_OUT_SCENES}
Size = tuple[int, int]  # width, height


def box(scene: Scene, size: Size) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a scene's figure in pixels."""
    assert scene.size is not None and scene.place is not None
    (x, y), half = PLACES[scene.place], SPANS[scene.size] * min(size) / 2
    return x * size[0] - half, y * size[1] - half, x * size[0] + half, y * size[1] + half


def figure(scene: Scene, size: Size) -> NDArray[np.float64]:
    """Share of each pixel that the figure covers, `(height, width)`."""
    left, top, right, bottom = box(scene, size)
    return coverage(scene.shape, ((left + right) / 2, (top + bottom) / 2), right - left, *size)


# -- Fill

@dataclass(frozen=True)
class FillTask:
    """`before` is the picture, `mask` `(height, width)` 1 where it is painted anew, `after` what it shows then."""

    before: Scene
    after: Scene
    prompt: str
    mask: NDArray[np.float32]


def fill_task(rng: random.Random, held_out: bool, size: Size = (128, 128)) -> FillTask:
    """Another figure on the same ground, under a mask that covers both."""
    after = rng.choice(SCENES[held_out])
    before = rng.choice([scene for scene in SCENES[held_out] if scene.ground == after.ground])
    corners = np.array([box(before, size), box(after, size)])
    around = (*corners[:, :2].min(0), *corners[:, 2:].max(0))
    mask = patch(rng, around, size, rng.choice(("box", "box", "ellipse")))
    return FillTask(before, after, caption(after, rng), mask)


def hole(rng: random.Random, scene: Scene, size: Size) -> NDArray[np.float32]:
    """A mask to train with: mostly over the whole figure; now and then anywhere, everywhere, or soft."""
    pick, (width, height) = rng.random(), size
    if pick < 0.06:
        return np.ones((height, width), np.float32)
    if pick < 0.16:
        left, top = rng.uniform(0, width * 0.8), rng.uniform(0, height * 0.8)
        around = (left, top, left + rng.uniform(8, width * 0.7), top + rng.uniform(8, height * 0.7))
    else:
        around = box(scene, size)
        if rng.random() < 0.4:  # over where another figure stood as well
            other = box(rng.choice(SCENES[False]), size)
            around = (min(around[0], other[0]), min(around[1], other[1]),
                      max(around[2], other[2]), max(around[3], other[3]))
    mask = patch(rng, around, size, rng.choice(("box", "box", "ellipse", "side")))
    if rng.random() < 0.25:
        mask = soften(mask, rng.choice((2, 4, 8)))
    return mask


def patch(rng: random.Random, around: Sequence[float], size: Size, kind: str) -> NDArray[np.float32]:
    """A box, an ellipse, or all up to some sides of the picture, round `around` with a margin."""
    width, height = size
    left, top, right, bottom = around
    left, top, right, bottom = (left - rng.uniform(3, 28), top - rng.uniform(3, 28), right + rng.uniform(3, 28),
                                bottom + rng.uniform(3, 28))
    if kind == "side":
        left, top = (0.0 if rng.random() < 0.5 else left), (0.0 if rng.random() < 0.5 else top)
        right, bottom = (width if rng.random() < 0.5 else right), (height if rng.random() < 0.5 else bottom)
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    if kind == "ellipse":  # through the corners of the box
        across, down = (right - left) / 2**0.5, (bottom - top) / 2**0.5
        inside = ((x - (left + right) / 2) / across) ** 2 + ((y - (top + bottom) / 2) / down) ** 2 <= 1
    else:
        inside = (x >= left) & (x <= right) & (y >= top) & (y <= bottom)
    return inside.astype(np.float32)


def soften(mask: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """A ramp of `width` pixels along the edges, half of it outside."""
    kernel = np.ones(width) / width
    for axis in (0, 1):
        padded = np.pad(mask, [(width // 2, width - 1 - width // 2) if i == axis else (0, 0) for i in (0, 1)], "edge")
        mask = np.apply_along_axis(lambda row: np.convolve(row, kernel, "valid"), axis, padded)
    return mask.astype(np.float32)


# -- Structure

def edges(scene: Scene, size: Size, rng: random.Random | None = None) -> NDArray[np.float32]:
    """The outline of the figure, white on black, one pixel wide, `(height, width)`; `rng` draws how it is traced."""
    level = 0.5 if rng is None else rng.uniform(0.3, 0.7)
    inside = np.pad(figure(scene, size) > level, 1)
    near = np.stack([np.roll(inside, shift, axis) for axis in (0, 1) for shift in (-1, 1)])
    outer = rng is not None and rng.random() < 0.5
    line = ~inside & near.any(0) if outer else inside & ~near.all(0)
    return line[1:-1, 1:-1].astype(np.float32)


def depth(scene: Scene, size: Size, rng: random.Random | None = None) -> NDArray[np.float32]:
    """How near everything is, `(height, width)`, 1 nearest: the figure before a wall; `rng` draws both distances."""
    near, far = (1.0, 0.0) if rng is None else (rng.uniform(0.7, 1.0), rng.uniform(0.0, 0.25))
    return (far + (near - far) * figure(scene, size)).astype(np.float32)


def misleading(scene: Scene, rng: random.Random) -> str:
    """A caption right in its colours alone: the map is to tell the rest."""
    shown = replace(scene, shape=rng.choice(SHAPES), size=rng.choice((*SPANS, None)), place=rng.choice((*PLACES, None)))
    return caption(shown, rng)


# -- Kontext

@dataclass(frozen=True)
class EditTask:
    references: tuple[Scene, ...]
    after: Scene
    prompt: str


EDITS: dict[str, tuple[str, ...]] = {  # attribute: wordings; the first is the canonical one
    "color": ("make the {shape} {new}", "change the color of the {shape} to {new}", "recolor the {shape} {new}",
              "turn the {shape} {new}"),
    "ground": ("change the background to {new}", "make the background {new}", "use a {new} background"),
    "shape": ("turn the {shape} into a {new}", "replace the {shape} with a {new}", "change the {shape} to a {new}"),
    "size": ("make the {shape} {new}", "resize the {shape}, make it {new}", "change the {shape} to be {new}"),
    "place": ("move the {shape} {new}", "put the {shape} {new}", "shift the {shape} {new}"),
}
CHOICES = {"color": tuple(PALETTE), "ground": tuple(PALETTE), "shape": SHAPES, "size": tuple(SPANS),
           "place": tuple(PLACES)}
PLACE_OF_OTHER = ("put the {shape} on the other background", "the {shape} on the other background",
                  "the {shape}, but use the other background")


def edit_task(rng: random.Random, held_out: bool) -> EditTask:
    """One attribute changed (now and then two); all others stay. Both scenes are held out, or neither."""
    while True:
        before = after = rng.choice(SCENES[held_out])
        prompts = []
        for attribute in rng.sample(list(EDITS), 2 if not held_out and rng.random() < 0.15 else 1):
            new = rng.choice([value for value in CHOICES[attribute] if value != getattr(before, attribute)])
            after = replace(after, **{attribute: new})
            words = rng.choice(SIZE_WORDS[new]) if attribute == "size" else (
                rng.choice(PLACE_WORDS[new]) if attribute == "place" else new)
            prompts.append(tidy(rng.choice(EDITS[attribute]).format(shape=before.shape, new=words)))
        if after.color != after.ground and after.held_out == held_out:
            return EditTask((before,), after, " and ".join(prompts))


def join_task(rng: random.Random, held_out: bool) -> EditTask:
    """The figure of one picture on the background of another."""
    while True:
        first, second = rng.choice(SCENES[held_out]), rng.choice(SCENES[held_out])
        after = replace(first, ground=second.ground)
        if after.color != after.ground and after.held_out == held_out:
            return EditTask((first, second), after, rng.choice(PLACE_OF_OTHER).format(shape=first.shape))
