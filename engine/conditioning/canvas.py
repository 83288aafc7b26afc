"""A larger canvas round a picture, for Fill to paint on: where its new pixels lie, what they show and how far the mask
reaches into the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput
from .pictures import Notes, read_picture, round_up

MAX_PIXELS = 16 * 1024 * 1024
GREY = 0.5
COARSE = 32
"""Pixels to one of the coarse picture that `blur` is drawn from."""


@dataclass(frozen=True)
class Pads:
    """New pixels on each side."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the canvas round a picture."""
        return self.left + width + self.right, self.top + height + self.bottom


def pads_for(width: int, height: int, pads: Pads, *, aspect: tuple[int, int] | None = None, multiple: int = 16) -> Pads:
    """The pads of a canvas whose sides are multiples of `multiple`, of an aspect (width, height) if one is given.

    What is missing is added, never cut: to the sides that are padded already, and where none is, to both evenly for an
    aspect and right or below for the multiple. BadInput for a canvas above 16 megapixels and for negative pads.
    """
    if min(pads.left, pads.top, pads.right, pads.bottom) < 0:
        raise BadInput(f"{pads} takes pixels away; the picture can only grow here. Crop it before")
    if aspect is not None:
        across, down = pads.of(width, height)
        wide = max(across, round(down * aspect[0] / aspect[1]))
        high = max(down, round(across * aspect[1] / aspect[0]))
        pads = _with(pads, wide - across, high - down, even=True)
    across, down = pads.of(width, height)
    pads = _with(pads, round_up(across, multiple) - across, round_up(down, multiple) - down, even=False)
    across, down = pads.of(width, height)
    if across * down > MAX_PIXELS:
        raise BadInput(f"the canvas would be {across} x {down}, more than {MAX_PIXELS // 2**20} megapixels. Make the "
                       "picture smaller first, or add less")
    return pads


def _with(pads: Pads, across: int, down: int, even: bool) -> Pads:
    left, right = _shares(across, pads.left, pads.right, even)
    top, bottom = _shares(down, pads.top, pads.bottom, even)
    return replace(pads, left=pads.left + left, right=pads.right + right, top=pads.top + top,
                   bottom=pads.bottom + bottom)


def _shares(extra: int, first: int, second: int, even: bool) -> tuple[int, int]:
    if bool(first) == bool(second):
        before = extra // 2 if even or first else 0
        return before, extra - before
    return (extra, 0) if first else (0, extra)


def overlaps(size: int, before: int, after: int, overlap: int) -> tuple[int, int]:
    """How far the mask reaches into a side of `size` pixels, on padded sides only; a pixel in the middle stays."""
    reach = min(overlap, (size - 1) // (2 if before and after else 1))
    return (reach if before else 0), (reach if after else 0)


def outpaint_to(image: Tensor, pads: Pads, *, aspect: tuple[int, int] | None = None, multiple: int = 16,
                overlap: int = 16, fill: str = "grey") -> tuple[Tensor, Tensor, Notes]:
    """`outpaint` with the pads that `pads_for` makes of these for the picture."""
    height, width = read_picture(image)[0].shape[1:3]
    return outpaint(image, pads_for(width, height, pads, aspect=aspect, multiple=multiple), overlap=overlap, fill=fill)


def outpaint(image: Tensor, pads: Pads, *, overlap: int = 16, fill: str = "grey") -> tuple[Tensor, Tensor, Notes]:
    """A picture `(B, H, W, 3)` on its canvas, and the mask `(1, H', W')`: 1 on every new pixel and on `overlap` pixels
    of the picture next to them. The picture's own pixels are bit-identical. `fill`: a name of FILLS."""
    if fill not in FILLS:
        raise BadInput(f"fill '{fill}' is not one of {', '.join(FILLS)}")
    picture, notes = read_picture(image)
    height, width = picture.shape[1:3]
    across, down = pads.of(width, height)
    mask = picture.new_ones(1, down, across)
    (left, right), (top, bottom) = (overlaps(width, pads.left, pads.right, overlap),
                                    overlaps(height, pads.top, pads.bottom, overlap))
    mask[:, pads.top + top:pads.top + height - bottom, pads.left + left:pads.left + width - right] = 0
    if (across, down) == (width, height):
        return picture, mask, [*notes, "nothing is added: the mask is empty"]
    canvas = FILLS[fill](picture, pads).clone()
    canvas[:, pads.top:pads.top + height, pads.left:pads.left + width] = picture
    if max(left, right, top, bottom) < overlap and overlap:
        notes.append(f"the overlap is {max(left, right, top, bottom)} pixels: the picture is too small for {overlap}")
    return canvas, mask, [*notes, f"{width} x {height} becomes {across} x {down}: left {pads.left}, top {pads.top}, "
                                  f"right {pads.right}, bottom {pads.bottom}"]


def _grey(picture: Tensor, pads: Pads) -> Tensor:
    across, down = pads.of(picture.shape[2], picture.shape[1])
    return picture.new_full((picture.shape[0], down, across, picture.shape[3]), GREY)


def _edge(picture: Tensor, pads: Pads) -> Tensor:
    return _taken(picture, pads, lambda place, size: place.clamp(0, size - 1))


def _mirror(picture: Tensor, pads: Pads) -> Tensor:
    def reflected(place: Tensor, size: int) -> Tensor:
        period = max(2 * (size - 1), 1)                         # the border pixel stands once
        place = place.remainder(period)
        return torch.minimum(place, period - place).clamp(0, size - 1)

    return _taken(picture, pads, reflected)


def _blur(picture: Tensor, pads: Pads) -> Tensor:
    mirrored = _mirror(picture, pads).movedim(-1, 1)
    coarse = [max(1, side // COARSE) for side in mirrored.shape[2:]]
    small = F.interpolate(mirrored, size=coarse, mode="area")
    return F.interpolate(small, size=mirrored.shape[2:], mode="bilinear").movedim(1, -1)


def _taken(picture: Tensor, pads: Pads, place: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Every pixel of the canvas from a pixel of the picture."""
    height, width = picture.shape[1:3]
    rows, columns = (place(torch.arange(-before, size + after, device=picture.device), size)
                     for before, size, after in ((pads.top, height, pads.bottom), (pads.left, width, pads.right)))
    return picture[:, rows][:, :, columns]


FILLS: Mapping[str, Callable[[Tensor, Pads], Tensor]] = {
    "grey": _grey, "edge": _edge, "mirror": _mirror, "blur": _blur}
"""What new pixels show until they are painted. Fill itself never sees them; img2img, previews and other models do."""
