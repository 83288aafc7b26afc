"""Pictures at other sizes, by ComfyUI's methods to the number: its nodes are made of these."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...engine.errors import BadInput
from .images import MAX_PIXELS

METHODS = ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]
CENTER, DISABLED = "center", "disabled"


def check_picture_size(width: int, height: int, count: int = 1) -> None:
    """BadInput for pictures that cannot be, or beyond the bounds on pictures that are read: a workflow of a stranger
    must not be able to fill the memory."""
    if min(width, height) < 1 or width * height * count > MAX_PIXELS:
        raise BadInput(f"{count} pictures of {width} x {height}: sides must be at least 1, and all together at most "
                       f"{MAX_PIXELS // 2**20} megapixels")


def scaled(image: Tensor, width: int, height: int, method: str, crop: str = DISABLED) -> Tensor:
    """IMAGE `(B, H, W, C)` -> `(B, height, width, C)`; `crop` "center" cuts to the new aspect before.

    "lanczos" is PIL's on 8 bits, to which values are cut off, not rounded, as in ComfyUI.
    """
    check_picture_size(width, height, len(image))
    pixels = image.movedim(-1, 1)
    if crop == CENTER:
        pixels = _cut(pixels, width / height)
    if method == "lanczos":
        return _lanczos(pixels.movedim(1, -1), width, height)
    return torch.nn.functional.interpolate(pixels, size=(height, width), mode=method).movedim(1, -1)


def _cut(pixels: Tensor, aspect: float) -> Tensor:
    """`(B, C, H, W)` without what sticks out of an aspect, evenly on both sides."""
    height, width = pixels.shape[-2:]
    old = width / height
    across = round((width - width * (aspect / old)) / 2) if old > aspect else 0
    down = round((height - height * (old / aspect)) / 2) if old < aspect else 0
    return pixels[..., down:height - down, across:width - across]


def _lanczos(image: Tensor, width: int, height: int) -> Tensor:
    made = []
    for item in (255.0 * image.float().cpu()).numpy().clip(0, 255).astype(np.uint8):
        picture = Image.fromarray(item.squeeze(-1) if item.shape[-1] == 1 else item)
        pixels = np.asarray(picture.resize((width, height), resample=Image.Resampling.LANCZOS), dtype=np.float32)
        made.append(torch.from_numpy(pixels / 255).reshape(height, width, -1))
    return torch.stack(made).to(image)
