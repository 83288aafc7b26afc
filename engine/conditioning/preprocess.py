"""Pictures to maps: edges by Canny, and what a depth model's numbers become as a picture.

Canny here is OpenCV's `Canny(picture, low, high)` with its defaults, to the bit, on RGB: no blur, 3 x 3 Sobel with
edges repeated, |dx| + |dy| of the channel where that is largest, thinned in whole numbers along four directions, weak
edges kept where they touch strong ones. So a map does not depend on which libraries are installed. Thresholds are in
OpenCV's units: a step of one level is 4 of them. Sources: J. Canny, IEEE PAMI 8(6), 1986; opencv/opencv,
modules/imgproc/src/canny.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, NotFinite
from .pictures import Notes, read_picture
from .resample import resize

TAN_22_5 = round(math.tan(math.pi / 8) * (1 << 15))
"""In 1/32768, as OpenCV counts."""
BFL_LOW, BFL_HIGH = 50, 200


def at_size(image: Tensor, width: int = 0, height: int = 0) -> tuple[Tensor, Notes]:
    """IMAGE stretched by LANCZOS to a size, as BFL does before it makes a map; 0: the picture's own side."""
    picture, notes = read_picture(image)
    old = picture.shape[1:3]
    if width < 0 or height < 0:
        raise BadInput(f"a picture of {width} x {height} pixels cannot be; 0 takes its own size")
    made = resize(picture, height or old[0], width or old[1])
    if made.shape[1:3] != old:
        notes.append(f"the picture was stretched from {old[1]} x {old[0]} to {made.shape[2]} x {made.shape[1]}")
    return made, notes


def map_of(image: Tensor, near: Tensor | None = None, thresholds: tuple[float, float] | None = None,
           scale: str = "min-max", invert: bool = False) -> tuple[Tensor, Notes]:
    """The map of IMAGE, and what there is to say: of its nearness if that is given, its edges if `thresholds` are, else
    the picture itself. `invert`: black for white."""
    made, notes = (depth_picture(near, scale) if near is not None
                   else edges(image, *thresholds) if thresholds is not None else (image, []))
    return 1 - made if invert else made, notes


def edges(image: Tensor, low: float, high: float) -> tuple[Tensor, Notes]:
    """`canny`, and what there is to say of it."""
    found = canny(image, low, high)
    notes = [f"low {low:g} is above high {high:g}: they were swapped"] if low > high else []
    if not bool(found.any()):
        notes.append("no edges were found: lower high, or look at the picture")
    return found, notes


def canny(image: Tensor, low: float = BFL_LOW, high: float = BFL_HIGH) -> Tensor:
    """IMAGE `(B, H, W, 3)` in 0..1 -> edges, 0 or 1, `(B, H, W, 3)` fp32. A pixel above `high` is an edge, one above
    `low` if it touches an edge; `low` above `high`: the other way round."""
    low, high = (math.floor(value) for value in sorted((low, high)))
    levels = (read_picture(image)[0].clamp(0, 1) * 255).round().int()
    found = torch.stack([_edges(picture, low, high) for picture in levels.cpu()])
    return _grey(found.float()).to(image.device)


def _edges(levels: Tensor, low: int, high: int) -> Tensor:
    """Of one picture `(H, W, 3)` of whole numbers: `(H, W)`, true on edges."""
    dx, dy, strength = _gradient(levels)
    candidates = _ridge(dx, dy, strength) & (strength > low)
    return _connected(candidates, candidates & (strength > high))


def _gradient(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dy and |dx| + |dy| `(H, W)` of the channel with the largest, the first of equals."""
    padded = F.pad(levels.movedim(-1, 0)[None].float(), (1, 1, 1, 1), mode="replicate")[0].int()  # (3, H + 2, W + 2)
    down = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    across = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    dx, dy = down[..., 2:] - down[..., :-2], across[:, 2:] - across[:, :-2]
    strength = dx.abs() + dy.abs()
    best = strength.max(0, keepdim=True).values
    channel = (strength == best).int().argmax(0, keepdim=True)
    return dx.gather(0, channel)[0], dy.gather(0, channel)[0], best[0]


def _ridge(dx: Tensor, dy: Tensor, strength: Tensor) -> Tensor:
    """Where the gradient is not below its neighbours on the line it points along, told to the nearest eighth turn."""
    height, width = strength.shape
    around = F.pad(strength, (1, 1, 1, 1))

    def at(down: int, right: int) -> Tensor:
        return around[1 + down:1 + down + height, 1 + right:1 + right + width]

    x, y = dx.abs().long() * TAN_22_5, dy.abs().long() << 15
    flat, steep = y < x, y > x + (dx.abs().long() << 16)
    rising = (dx ^ dy) < 0
    first = torch.where(rising, at(-1, 1), at(-1, -1))
    second = torch.where(rising, at(1, -1), at(1, 1))
    slanted = (strength > first) & (strength > second)
    along = torch.where(steep, (strength > at(-1, 0)) & (strength >= at(1, 0)), slanted)
    return torch.where(flat, (strength > at(0, -1)) & (strength >= at(0, 1)), along)


def _connected(candidates: Tensor, strong: Tensor) -> Tensor:
    """The candidates that a path of candidates joins with a strong one, corners included."""
    width = candidates.shape[1] + 2
    left = F.pad(candidates & ~strong, (1, 1, 1, 1)).flatten()
    found = F.pad(strong, (1, 1, 1, 1)).flatten()
    steps = torch.tensor([down * width + right for down in (-1, 0, 1) for right in (-1, 0, 1)])
    edge = found.nonzero()[:, 0]
    while len(edge):
        near = (edge[:, None] + steps).flatten()
        edge = near[left[near]].unique()
        left[edge], found[edge] = False, True
    return found.view(-1, width)[1:-1, 1:-1]


# -- depth

RANGES = ("min-max", "raw")
OWN_RESOLUTION = 518
"""Stands for a depth model's own size; it is Depth Anything's."""
NEAR = 1e-3
"""Metres; a metric depth below this counts as it."""
FILTERS = {2: "bilinear", 3: "bicubic", 1: "lanczos"}
"""PIL's numbers, which preprocessor_config.json has."""


@dataclass(frozen=True)
class DepthInput:
    """How a depth model wants its picture, as its preprocessor_config.json says. `pad`: edges mirrored first, and cut
    off again (ZoeDepth). `metric`: it tells distances, so that far is large; others tell nearness."""

    size: tuple[int, int] = (OWN_RESOLUTION, OWN_RESOLUTION)
    keep_aspect: bool = True
    multiple: int = 14
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    filter: str = "bicubic"
    pad: bool = False
    metric: bool = False

    def size_of(self, height: int, width: int, resolution: int = OWN_RESOLUTION) -> tuple[int, int]:
        """(height, width) that a picture is given to the model in: by the scale of the side that changes less, whole
        patches."""
        down, across = (side * resolution / OWN_RESOLUTION / old
                        for side, old in zip(self.size, (height, width), strict=True))
        if self.keep_aspect:
            down = across = across if abs(1 - across) < abs(1 - down) else down
        high, wide = (max(self.multiple, round(scale * old / self.multiple) * self.multiple)
                      for scale, old in ((down, height), (across, width)))
        return high, wide

    def margin(self, height: int, width: int) -> tuple[int, int]:
        """Pixels mirrored above and below, left and right."""
        high, wide = (min(int(math.sqrt(side / 2) * 3), side - 1) if self.pad else 0 for side in (height, width))
        return high, wide

    def pixels(self, image: Tensor, resolution: int = OWN_RESOLUTION) -> Tensor:
        """IMAGE `(B, H, W, 3)` -> what the model takes, `(B, 3, h, w)` fp32."""
        picture = read_picture(image)[0].clamp(0, 1)
        high, wide = self.margin(picture.shape[1], picture.shape[2])
        picture = F.pad(picture.movedim(-1, 1), (wide, wide, high, high), mode="reflect").movedim(1, -1)
        height, width = picture.shape[1:3]
        picture = resize(picture, *self.size_of(height, width, resolution), self.filter)
        return ((picture - picture.new_tensor(self.mean)) / picture.new_tensor(self.std)).movedim(-1, 1)

    def nearness(self, depth: Tensor, height: int, width: int) -> Tensor:
        """The model's answer `(B, h, w)` at the picture's size, near large: `(B, height, width)`. NotFinite."""
        if not bool(torch.isfinite(depth).all()):
            raise NotFinite("the depth model gave NaN or infinity. Check its file, or the picture")
        near = 1 / depth.float().clamp(min=NEAR) if self.metric else depth.float()
        high, wide = self.margin(height, width)
        whole = F.interpolate(near[:, None], (height + 2 * high, width + 2 * wide), mode="bicubic", antialias=True)
        return whole[:, 0, high:high + height, wide:wide + width]


def depth_picture(near: Tensor, scale: str = RANGES[0]) -> tuple[Tensor, Notes]:
    """Nearness `(B, H, W)` -> IMAGE `(B, H, W, 3)`, near white, and what there is to say.

    "min-max": each picture's own range to 0..1. "raw": as BFL's Depth tool takes it, 255 is white; may leave 0..1.
    """
    if scale not in RANGES:
        raise BadInput(f"depth range '{scale}' is not one of {', '.join(RANGES)}")
    if scale == "raw":
        return _grey(near / 255), []
    low, high = near.amin((1, 2), keepdim=True), near.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-6 * torch.maximum(high.abs(), low.abs()).clamp(min=1e-12)
    picture = torch.where(flat, 0.5, (near - low) / torch.where(flat, 1.0, high - low))
    return _grey(picture), (["the depth is the same everywhere: the map is mid grey"] if bool(flat.any()) else [])


def _grey(picture: Tensor) -> Tensor:
    return picture[..., None].expand(-1, -1, -1, 3).contiguous()
