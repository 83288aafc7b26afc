"""Masks made to measure: binary or soft, holes filled, grown or shrunk by exact pixels, feathered, on a grid.

A mask is `(B, H, W)` fp32 in 0..1, 1 = change. Distances are Euclidean, from centre to centre of pixels, and what lies
outside the picture counts as its nearest pixel: a mask that touches the border neither grows nor shrinks there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .pictures import Notes, read_mask


@dataclass(frozen=True)
class Refinement:
    """`grow` pixels, negative shrinks; `feather` pixels outward; `threshold` 0 keeps soft values, else what reaches it
    is 1 and the rest 0; `snap`: side of the cells that are wholly in or out, 0 for none."""

    grow: int = 8
    feather: int = 0
    threshold: float = 0.5
    fill_holes: bool = True
    invert: bool = False
    snap: int = 0


def refine(mask: Tensor, settings: Refinement) -> tuple[Tensor, Notes]:
    """A mask refined, in the order invert, threshold, holes, grow, feather, snap. NaN counts as 0, values outside 0..1
    are clamped, and both are told. BadInput for what is no mask."""
    made, notes = read_mask(mask, repair=True)
    made = 1 - made if settings.invert else made
    made = (made >= settings.threshold).float() if settings.threshold > 0 else made
    if not made.any():
        return made, [*notes, "the mask is empty"]
    made = without_holes(made) if settings.fill_holes else made
    made = grown(made, settings.grow)
    if not made.any():
        notes.append(f"the mask is empty once it has shrunk by {-settings.grow} pixels")
    made = snapped(feathered(made, settings.feather), settings.snap)
    if made.min() == 1:
        notes.append("the mask covers the whole picture")
    return made, notes


def grown(mask: Tensor, pixels: int) -> Tensor:
    """Every pixel becomes the largest within `pixels`, or, below 0, the smallest: edges move by that many pixels."""
    if pixels < 0:
        return 1 - grown(1 - mask, -pixels)
    if pixels == 0:
        return mask
    if bool(((mask == 0) | (mask == 1)).all()):
        return _each(mask, lambda item: _distance(item) <= pixels)
    return _largest_within(mask, pixels)


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A ramp outward: a pixel at distance d from the mask gets 1 - d / (pixels + 1) of the nearest pixel in it. What is
    in the mask keeps its value."""
    if pixels <= 0:
        return mask

    def ramp(item: np.ndarray) -> np.ndarray:
        distance, nearest = _nearest(item)
        share: np.ndarray = np.maximum(item, item[nearest] * np.clip(1 - distance / (pixels + 1), 0, None))
        return share

    return _each(mask, ramp)


def without_holes(mask: Tensor) -> Tensor:
    """What the mask encloses gets the value of the mask's nearest pixel; holes may touch only at corners."""
    from scipy.ndimage import binary_fill_holes  # type: ignore[import-untyped]  # takes a while to load

    def fill(item: np.ndarray) -> np.ndarray:
        holes = binary_fill_holes(item > 0) & (item <= 0)
        return np.where(holes, item[_nearest(item)[1]], item) if holes.any() else item

    return _each(mask, fill)


def snapped(mask: Tensor, cell: int) -> Tensor:
    """Every cell of `cell` x `cell` pixels gets its largest value; 0 or 1 leaves the mask as it is."""
    if cell <= 1:
        return mask
    height, width = mask.shape[-2:]
    cells = F.max_pool2d(mask[:, None], cell, ceil_mode=True)[:, 0]
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, :height, :width]


def _each(mask: Tensor, change: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Each item of a mask changed as an array; empty ones stay so."""
    items = [torch.from_numpy(np.ascontiguousarray(change(item.cpu().numpy()), dtype=np.float32)) if item.any()
             else item.cpu() for item in mask]
    return torch.stack(items).to(mask.device)


def _distance(item: np.ndarray) -> np.ndarray:
    """From each pixel to the nearest in the mask."""
    from scipy.ndimage import distance_transform_edt

    found: np.ndarray = distance_transform_edt(item <= 0)
    return found


def _nearest(item: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The distance, and rows and columns of the nearest pixels in the mask."""
    from scipy.ndimage import distance_transform_edt

    distance, (rows, columns) = distance_transform_edt(item <= 0, return_indices=True)
    return distance, (rows, columns)


def _largest_within(mask: Tensor, radius: int) -> Tensor:
    """The largest value within a disc. Row by row of the disc, each a run whose maximum is that of two runs of a power
    of two: about four passes over the mask for each pixel of the radius, exact for any values."""
    width, height = mask.shape[-1], mask.shape[-2]
    padded = F.pad(mask, (radius, radius))                      # 0 is no larger than anything
    powers = [padded]                                           # [k][..., x] = largest of x .. x + 2**k - 1
    while 2 ** len(powers) <= 2 * radius + 1:
        half = 2 ** (len(powers) - 1)
        powers.append(torch.maximum(powers[-1], F.pad(powers[-1][..., half:], (0, half))))
    out = mask.clone()
    for down in range(min(radius, height - 1) + 1):
        reach = math.isqrt(radius * radius - down * down)
        k = (2 * reach + 1).bit_length() - 1
        first, last = radius - reach, radius + reach + 1 - 2**k
        run = torch.maximum(powers[k][..., first:first + width], powers[k][..., last:last + width])
        above, below = out[..., down:, :], out[..., :height - down, :]
        torch.maximum(above, run[..., :height - down, :], out=above)
        torch.maximum(below, run[..., down:, :], out=below)
    return out
