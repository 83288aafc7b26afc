"""Pictures for the autoencoder: training scenes, and free compositions for what later members of the family show it
(edge and depth maps, masked pictures, several shapes, any colour)."""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .scenes import PALETTE, PLACES, SHAPES, SPANS, TRAINING_SCENES, Scene, coverage, render

CANVAS = 128
FREE_MASKS = 800
SCENE_SHARE = 0.65


class PictureSource:
    """Endless random pictures, `(B, 3, size, size)` fp32 in -1..1, drawn by compositing a pool of shape masks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.scene_masks = {
            (size, shape, place): _mask(shape, (x * CANVAS, y * CANVAS), SPANS[size] * CANVAS)
            for size in SPANS for shape in SHAPES for place, (x, y) in PLACES.items()}
        self.free_masks = [self._free_mask() for _ in range(FREE_MASKS)]
        self.palette = [torch.tensor(rgb) / 255 for rgb in PALETTE.values()]

    def _free_mask(self) -> Tensor:
        r = self.random
        span = r.uniform(0.12, 0.9) * CANVAS
        return _mask(r.choice(SHAPES), (r.uniform(0, CANVAS), r.uniform(0, CANVAS)), span)

    def batch(self, count: int, size: int) -> Tensor:
        """`count` pictures; below the canvas size, crops of it, most of them with the figure of a scene in sight."""
        pictures = []
        for _ in range(count):
            if self.random.random() < SCENE_SHARE:
                scene = self._choose()
                picture, (x, y) = self._scene(scene), PLACES[scene.place or "center"]
            else:
                picture, (x, y) = self._composition(), (self.random.random(), self.random.random())
            left, top = (self._origin(middle, size) for middle in (x, y))
            pictures.append(picture[:, top:top + size, left:left + size])
        return torch.stack(pictures) * 2 - 1

    def scenes(self, count: int, width: int, height: int) -> Tensor:
        """`count` whole training scenes, the harder ones more often: `(B, 3, height, width)` in -1..1."""
        pixels = [torch.from_numpy(render(self._choose(), width, height)) for _ in range(count)]
        return torch.stack(pixels).permute(0, 3, 1, 2) * 2 - 1

    def _origin(self, middle: float, size: int) -> int:
        start = middle * CANVAS - size / 2 + self.random.uniform(-0.4, 0.4) * size
        return int(min(max(start, 0), CANVAS - size))

    def _choose(self) -> Scene:
        """Small stars and rings are the hardest: of two scenes the harder one."""
        two = [self.random.choice(TRAINING_SCENES) for _ in range(2)]
        return max(two, key=lambda scene: (scene.shape == "star") + (scene.shape == "ring") + (scene.size == "small"))

    def _scene(self, scene: Scene) -> Tensor:
        mask = self.scene_masks[scene.size or "large", scene.shape, scene.place or "center"]
        return _paint(_rgb(scene.ground), _rgb(scene.color), mask)

    def _color(self) -> Tensor:
        if self.random.random() < 0.5:
            return self.random.choice(self.palette)[:, None, None]
        return torch.tensor([self.random.random() for _ in range(3)])[:, None, None]

    def _composition(self) -> Tensor:
        r = self.random
        kind = r.random()
        mask = r.choice(self.free_masks)
        if kind < 0.15:  # an edge map
            edge = (mask[1:, 1:] - mask[:-1, 1:]).abs() + (mask[1:, 1:] - mask[1:, :-1]).abs()
            return torch.nn.functional.pad((edge > 0.3).float(), (1, 0, 1, 0)).expand(3, -1, -1)
        if kind < 0.3:  # a depth map
            ramp = torch.linspace(r.random(), r.random(), CANVAS)[:, None].expand(CANVAS, CANVAS)
            return _paint(ramp.expand(3, -1, -1), torch.full((3, 1, 1), r.random()), mask)
        picture = self._color().expand(3, CANVAS, CANVAS)
        for _ in range(r.choice((1, 1, 2, 3))):
            picture = _paint(picture, self._color(), r.choice(self.free_masks))
        if kind < 0.45:  # a masked picture: grey where something is to be painted
            hole = torch.zeros(CANVAS, CANVAS)
            y, x = r.randint(0, CANVAS - 16), r.randint(0, CANVAS - 16)
            hole[y:y + r.randint(16, CANVAS), x:x + r.randint(16, CANVAS)] = 1
            picture = _paint(picture, torch.full((3, 1, 1), 0.5), hole)
        return picture


def _mask(shape: str, center: tuple[float, float], span: float) -> Tensor:
    cover: NDArray[np.float64] = coverage(shape, center, span, CANVAS, CANVAS)
    return torch.from_numpy(cover).float()


def _rgb(name: str) -> Tensor:
    return (torch.tensor(PALETTE[name]) / 255)[:, None, None]


def _paint(ground: Tensor, color: Tensor, mask: Tensor) -> Tensor:
    return ground + (color - ground) * mask
