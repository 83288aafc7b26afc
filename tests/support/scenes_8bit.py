"""Pictures of 8 bits made by whole-number formulas, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor


def flat_shapes(height: int, width: int) -> Tensor:
    """A disc, a box and a bar in flat colours: `(1, H, W, 3)`, multiples of 1/255."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.tensor([40, 90, 160]).expand(height, width, 3).clone()
    image[(y - height // 3) ** 2 + (x - width // 3) ** 2 < (height // 4) ** 2] = torch.tensor([220, 60, 30])
    image[(y > height // 2) & (x > width // 2) & (y < height * 7 // 8)] = torch.tensor([60, 200, 90])
    image[(x - y).abs() < 4] = torch.tensor([250, 250, 240])
    return image[None].float() / 255


def soft_shapes(height: int, width: int) -> Tensor:
    """The same with soft edges and a fixed grain."""
    image = (flat_shapes(height, width) * 255).round().long()[0]
    soft = sum(image.roll((down, right), (0, 1)) for down in (0, 1, 2) for right in (0, 1, 2)) // 9  # type: ignore[union-attr]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grain = ((y * 7919 + x * 104729 + y * x * 31) % 41 - 20)[..., None]
    return (soft + grain).clamp(0, 255)[None].float() / 255


def noise(height: int, width: int) -> Tensor:
    y, x, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    return ((y * 7919 + x * 104729 + c * 1299709 + y * x * 31 + x * x * c * 17) % 256)[None].float() / 255


SCENES = {"flat": flat_shapes, "soft": soft_shapes, "noise": noise}
