"""Pictures of another size, by the filters of PIL, on tensors and without its 8 bits where there were more.

A filter makes each new pixel of a line of a few old ones; a picture is resized across, then down. Where it is one of
8 bits (every value a multiple of 1/255), both steps are rounded to 8 bits as PIL does, in its whole numbers, and the
answer is PIL's bit for bit. Source of the filters: python-pillow/Pillow, src/libImaging/Resample.c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import BadInput

LEVELS = 255
EIGHT_BITS = 1e-4
"""How far from a level a value may be to count as one of 8 bits, in levels; fp32 has 2e-5 there."""
WHOLE = 1 << 22
"""One, in the whole numbers that PIL's weights are."""
MAX_PIXELS = 64 << 20


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near, far = ((1.5 * x - 2.5) * x * x + 1), (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "lanczos": (_lanczos, 3.0), "bicubic": (_bicubic, 2.0), "bilinear": (_bilinear, 1.0)}
"""Name -> the curve, and where it ends, in pixels of the coarser grid."""


@lru_cache(maxsize=8)
def taps(old: int, new: int, name: str) -> tuple[Tensor, Tensor]:
    """Of each new pixel of a line: the first old one it is made of, `(new,)`, and weights `(new, taps)` fp64, which sum
    to 1 and are 0 beyond the edge."""
    curve, reach = FILTERS[name]
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    first = (centre - reach * stretch + 0.5).to(torch.int64).clamp(min=0)
    last = (centre + reach * stretch + 0.5).to(torch.int64).clamp(max=old)
    place = first[:, None] + torch.arange(int((last - first).max()))
    values = curve((place - centre[:, None] + 0.5) / stretch) * (place < last[:, None])
    return first, values / values.sum(1, keepdim=True)


def doubled(tensor: Tensor) -> Tensor:
    """fp64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def is_8bit(image: Tensor) -> bool:
    """Whether every value is a multiple of 1/255 in 0..1."""
    levels = doubled(image) * LEVELS
    inside = bool((levels >= -EIGHT_BITS).all()) and bool((levels <= LEVELS + EIGHT_BITS).all())
    return inside and bool(((levels - levels.round()).abs() <= EIGHT_BITS).all())


def check_size(old: Sequence[int], new: Sequence[int]) -> None:
    """BadInput for a picture (height, width) that would grow beyond what pictures may be."""
    if new[0] * new[1] > max(MAX_PIXELS, old[0] * old[1]):
        raise BadInput(f"a picture of {old[1]} x {old[0]} would become {new[1]} x {new[0]}, more than "
                       f"{MAX_PIXELS >> 20} megapixels. Choose a smaller size, or cut the picture to another aspect")


def resize(image: Tensor, height: int, width: int, name: str = "lanczos") -> Tensor:
    """IMAGE `(B, h, w, C)` -> `(B, height, width, C)` fp32, stretched. Of the same size: the very values.

    A picture of 8 bits stays one. Others keep their precision, and stay within 0..1 if they were. BadInput.
    """
    if image.shape[1:3] == (height, width):
        return image.float()
    check_size(image.shape[1:3], (height, width))
    eight, levels = is_8bit(image), doubled(image) * LEVELS
    levels = levels.round() if eight else levels
    low, high = (0.0, float(LEVELS)) if eight else (min(0.0, float(levels.min())), max(LEVELS, float(levels.max())))
    for axis, size in ((2, width), (1, height)):  # across first, as PIL until its version 12
        if levels.shape[axis] != size:
            levels = along(levels, axis, size, name, eight).clamp_(low, high)
    return (levels / LEVELS).float().to(image.device)


def along(levels: Tensor, axis: int, size: int, name: str, whole: bool = False) -> Tensor:
    """fp64 values with one axis brought to `size` by a filter. `whole`: whole numbers, rounded as PIL rounds them."""
    old = levels.shape[axis]
    first, values = (tensor.to(levels.device) for tensor in taps(old, size, name))
    if whole:  # sums of whole numbers below 2**53 are exact in fp64
        values = torch.where(values < 0, torch.ceil(values * WHOLE - 0.5), torch.floor(values * WHOLE + 0.5))
    shape = [1] * levels.ndim
    shape[axis] = size
    out = torch.zeros((), dtype=torch.float64, device=levels.device)
    for tap in range(values.shape[1]):
        place = (first + tap).clamp(max=old - 1)
        out = out + levels.index_select(axis, place) * values[:, tap].view(shape)
    return torch.floor((out + WHOLE // 2) / WHOLE) if whole else out


def covering(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    """The size (height, width) of `old`'s aspect that covers `new`, none smaller."""
    scale = max(new[0] / old[0], new[1] / old[1])
    return max(new[0], math.floor(old[0] * scale + 0.5)), max(new[1], math.floor(old[1] * scale + 0.5))


def fitting(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int]:
    """The size (height, width) of `old`'s aspect that fits into `new`, none larger."""
    scale = min(new[0] / old[0], new[1] / old[1])
    return tuple(min(b, max(1, math.floor(a * scale + 0.5))) for a, b in zip(old, new, strict=True))  # type: ignore[return-value]
