"""A part of a picture cut out at a size that models like, and put back where it came from.

The place travels as an ordinary MASK: a rectangle of ones as large as the picture, which can be looked at, saved or
drawn by hand. Sizes tell the rest. What was cut out either has the region's own pixels, with rows and columns added
below and to the right up to a multiple (taken off again), or it was stretched (stretched back); `crop_plan` never
stretches to a size that would look like the former.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput, NotFinite
from .pictures import (
    Notes,
    extended,
    fit_mask,
    one_batch,
    read_colours,
    read_mask,
    read_picture,
    round_up,
    same_aspect,
    stretched,
)
from .resample import doubled

MULTIPLES = (16, 32)
MEGAPIXEL = 1024 * 1024
ENOUGH = 256
"""Pixels that a colour match needs to measure."""
MAX_GAIN = 2.0
FLAT = 1e-4
"""Standard deviation below which an area has no contrast to compare."""


@dataclass(frozen=True)
class Box:
    """Pixels left <= x < right, top <= y < bottom."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def of(self, tensor: Tensor) -> Tensor:
        """The part of `(B, H, W, ...)`, a view."""
        return tensor[:, self.top:self.bottom, self.left:self.right]

    def __str__(self) -> str:
        return f"{self.width} x {self.height} at {self.left}, {self.top}"


@dataclass(frozen=True)
class Crop:
    """What Region Crop gives. `image` `(B, h, w, 3)`, `mask` `(B, h, w)`; `region` `(1, H, W)` and `blend` `(B, H, W)`
    as large as the picture."""

    image: Tensor
    mask: Tensor
    region: Tensor
    blend: Tensor
    width: int
    height: int
    notes: Notes


def bounds(mask: Tensor) -> Box | None:
    """The smallest box round what is above 0 in any item of a mask `(B, H, W)`; None for an empty one."""
    used = (mask > 0).any(0)
    rows, columns = used.any(1).nonzero().flatten().tolist(), used.any(0).nonzero().flatten().tolist()
    return Box(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else None


def widened(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """The run start .. stop grown to `length` about its middle and moved inside 0 .. limit; never shrunk."""
    length = min(max(length, stop - start), limit)
    first = start - (length - (stop - start)) // 2
    first = min(max(first, 0), limit - length)
    return first, first + length


def grown_to(box: Box, width: int, height: int, size: tuple[int, int]) -> Box:
    """A box of at least these sides round `box`, as far as the picture (height, width) goes."""
    left, right = widened(box.left, box.right, width, size[1])
    top, bottom = widened(box.top, box.bottom, height, size[0])
    return Box(left, top, right, bottom)


def padded_sizes(box: Box) -> list[tuple[int, int]]:
    """(width, height) that a cut-out of this box may have with its own pixels."""
    return [(round_up(box.width, multiple), round_up(box.height, multiple)) for multiple in MULTIPLES]


def crop_plan(box: Box, size: tuple[int, int], *, context: float = 1.5, min_context: int = 64, megapixels: float = 1.0,
              multiple: int = 16) -> tuple[Box, tuple[int, int]]:
    """The box to cut out round `box`, within a picture (height, width), and the (width, height) to bring it to.

    The box grows by the factor `context` and by at least `min_context` pixels a side, then to the aspect of the size to
    be. Where the border is in the way it moves, and where that does not help its aspect stays another: nothing is
    invented outside the picture. `megapixels` 0, or a size that is nearly the box's own: no stretching.
    """
    box = grown_to(box, max(box.width + 2 * min_context, math.ceil(box.width * context)),
                   max(box.height + 2 * min_context, math.ceil(box.height * context)), size)
    if megapixels > 0:
        scale = max(math.sqrt(megapixels * MEGAPIXEL / (box.width * box.height)), multiple / min(box.width, box.height))
        width, height = (round(side * scale / multiple) * multiple for side in (box.width, box.height))
        made = grown_to(box, round(box.height * width / height), round(box.width * height / width), size)
        if (width, height) not in padded_sizes(made):
            return made, (width, height)
    made = grown_to(box, round_up(box.width, multiple), round_up(box.height, multiple), size)
    return made, (round_up(made.width, multiple), round_up(made.height, multiple))


def is_own_size(box: Box, width: int, height: int) -> bool:
    """Whether a picture of this size has the box's own pixels, perhaps with some added below and to the right."""
    return (width, height) in [(box.width, box.height), *padded_sizes(box)]


def crop(image: Tensor, mask: Tensor, *, context_mask: Tensor | None = None, context: float = 1.5,
         min_context: int = 64, megapixels: float = 1.0, multiple: int = 16, whole_if_empty: bool = False) -> Crop:
    """Cuts out what the mask covers, in any item of the batch, with its surroundings.

    image `(B, H, W, 3)`, mask and `context_mask` `(B, H, W)` or one for all; what is masked in `context_mask` is cut
    out too, but not painted. At scale 1 the cut-out is the slice bit for bit. An empty mask raises BadInput, or with
    `whole_if_empty` takes the whole picture.
    """
    picture, notes = read_picture(image)
    size = picture.shape[1], picture.shape[2]
    blend, told = _mask_of(mask, size, "mask")
    notes += told
    around = blend
    if context_mask is not None:
        more, told = _mask_of(context_mask, size, "context_mask")
        around, notes = torch.cat([blend, more]), [*notes, *told]
    picture, blend = one_batch(image=picture, mask=blend)
    found = bounds(around) if blend.any() else None
    if found is None and not whole_if_empty:
        raise BadInput("the mask is empty, so there is no region to cut out. Was it painted into another channel (Load "
                       "Image gives the alpha channel; masks painted red need Convert Image to Mask), or inverted?")
    if found is None:
        notes.append("the mask is empty: the whole picture is taken")
        found = Box(0, 0, size[1], size[0])
    box, (width, height) = crop_plan(found, size, context=context, min_context=min_context, megapixels=megapixels,
                                     multiple=multiple)
    region = picture.new_zeros(1, *size)
    region[:, box.top:box.bottom, box.left:box.right] = 1
    notes.append(_told(box, width, height))
    return Crop(_cut(picture, box, width, height, "bicubic"), _cut(blend[..., None], box, width, height,
                                                                  "bilinear")[..., 0],
                region, blend, width, height, notes)


def _mask_of(mask: Tensor, size: tuple[int, int], what: str) -> tuple[Tensor, Notes]:
    made, notes = read_mask(mask, what)
    if not made.any():
        return made.new_zeros(len(made), *size), notes          # of whatever size: Load Image makes 64 x 64
    made, told = fit_mask(made, size, what)
    return made, notes + told


def _cut(tensor: Tensor, box: Box, width: int, height: int, name: str) -> Tensor:
    part = box.of(tensor)
    own = is_own_size(box, width, height)
    return extended(part, height, width).clone() if own else stretched(part, height, width, name)


def _told(box: Box, width: int, height: int) -> str:
    if (width, height) == (box.width, box.height):
        return f"the region is {box}, cut out as it is"
    if is_own_size(box, width, height):
        return f"the region is {box}, its edge repeated up to {width} x {height}"
    return f"the region is {box}, brought to {width} x {height} ({width / box.width:.2f} times)"


def region_box(region: Tensor) -> Box:
    """The rectangle of a region mask `(B, H, W)`, the same in every item; BadInput if it is none."""
    inside = region >= 0.5
    box = bounds(inside.float())
    if box is None:
        raise BadInput("the region mask is empty; connect the region of Region Crop, or nothing for the whole picture")
    if not box.of(inside).all():
        raise BadInput(f"the region mask is no rectangle: of the {box} that it spans "
                       f"{int((~box.of(inside)).sum())} pixels are missing. Connect the region of Region Crop; shapes "
                       "go into blend")
    return box


def paste(image: Tensor, edited: Tensor, *, region: Tensor | None = None, blend: Tensor | None = None,
          use_blend: bool = True, colour_match: float = 0.0) -> tuple[Tensor, Notes]:
    """Puts an edited region back: `(B, H, W, 3 or 4)` as the picture.

    edited `(B, h, w, 3)`: of the region's size, of that with pixels added below and to the right up to a multiple of 16
    or 32, or of its aspect. region `(1, H, W)`: a rectangle of ones; None: the whole picture. blend `(B, H, W)`: share
    of the edit, 0 keeps the picture's pixel bit for bit, whatever stands there in either picture; None, or without
    `use_blend`: 1 everywhere in the region. `colour_match` 0..1: how much of the difference in brightness and contrast,
    channel by channel, between both pictures outside `blend` is taken out of the edit. BadInput; NotFinite for NaN in
    the edit where it would be seen.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[-1] not in (3, 4):
        read_picture(image)
        raise BadInput(f"image must have 3 channels to paste into, found {image.shape[-1]}")
    size = image.shape[1], image.shape[2]
    edit, notes = read_colours(edited, "edited")
    box = Box(0, 0, size[1], size[0])
    if region is not None:
        made, told = read_mask(region, "region")
        made, more = fit_mask(made, size, "region")
        box, notes = region_box(made), [*notes, *told, *more]
    share = edit.new_ones(1, *size)
    if blend is not None and use_blend:
        share, told = _mask_of(blend, size, "blend")
        notes += told
    base, edit, share = one_batch(image=image.float(), edited=edit, blend=share)
    edit, told = _back(edit, box)
    share = box.of(share)[..., None]
    if not share.any():
        notes.append("blend is empty inside the region: the picture stays as it is")
    bad = ~torch.isfinite(edit).all(-1, keepdim=True)
    if (bad & (share > 0)).any():
        raise NotFinite(f"the edited picture holds NaN or infinity in {int((bad & (share > 0)).sum())} pixels that "
                        "would be pasted; nothing was. Look at the VAE Decode it comes from: run the VAE in bf16 or "
                        "fp32, and look at the sampler's model")
    before = box.of(base)[..., :3]
    if colour_match > 0:
        edit, more = matched(edit, before, share[..., 0] == 0, colour_match)
        told += more
    mixed = torch.where(share >= 1, edit, before + (edit - before) * share)
    out = base.clone()
    box.of(out)[..., :3] = torch.where(share > 0, mixed, before)
    return out, notes + told


def _back(edit: Tensor, box: Box) -> tuple[Tensor, Notes]:
    """An edited cut-out at the size of its box."""
    height, width = edit.shape[1:3]
    if is_own_size(box, width, height):
        cut = edit[:, :box.height, :box.width]
        return cut, ([] if cut.shape == edit.shape else
                     [f"edited is {width} x {height}: what lies right of and below {box.width} x {box.height} is taken "
                      "off"])
    if not _explained(box, width, height):
        raise BadInput(f"edited is {width} x {height}, the region {box}: another aspect. Connect what was made of the "
                       "picture that Region Crop cut out, and its region")
    return stretched(edit, box.height, box.width), [f"edited is brought from {width} x {height} to {box}"]


def _explained(box: Box, width: int, height: int) -> bool:
    """Whether the sizes are one another's but for a stretch of 1 % or the rounding of `crop_plan`: then some scale
    brings both sides of the box to within half a multiple of the size, and a pixel of the box."""
    if same_aspect((box.height, box.width), (height, width)):
        return True
    on_grid = width % min(MULTIPLES) == 0 and height % min(MULTIPLES) == 0
    half = max(MULTIPLES) / 2
    scales = [((now - half) / (side + 1), (now + half) / (side - 1 or 1)) for side, now in ((box.width, width),
                                                                                           (box.height, height))]
    return on_grid and max(low for low, _ in scales) <= min(high for _, high in scales)


def matched(edit: Tensor, original: Tensor, outside: Tensor, amount: float) -> tuple[Tensor, Notes]:
    """The edit `(B, h, w, 3)` with the mean and standard deviation of each channel that the original has, measured on
    `outside` `(B, h, w)` only, where both should be the same. Channels are matched as stored, so a change of
    brightness or contrast is taken out exactly; LAB would need gamma and gain nothing on one picture seen twice."""
    made, notes = [], []
    for number, (now, before, where) in enumerate(zip(edit, original, outside, strict=True), start=1):
        usable = where & torch.isfinite(now).all(-1) & torch.isfinite(before).all(-1)
        if int(usable.sum()) < ENOUGH:
            notes.append(f"picture {number}: no colour match, {int(usable.sum())} pixels outside the mask are fewer "
                         f"than {ENOUGH}. Give Region Crop more context")
            made.append(now)
            continue
        seen, wanted = doubled(now[usable]), doubled(before[usable])          # (n, 3)
        gain = torch.where(seen.std(0) > FLAT, wanted.std(0) / seen.std(0).clamp(min=FLAT), 1.0)
        gain = gain.clamp(1 / MAX_GAIN, MAX_GAIN)
        offset = wanted.mean(0) - gain * seen.mean(0)
        fitted = (doubled(now) * gain + offset).clamp(0, 1).float().to(now.device)
        made.append(torch.lerp(now, fitted, min(amount, 1.0)))
        notes.append(f"picture {number}: colours of the edit moved by {_levels(wanted.mean(0) - seen.mean(0), amount)} "
                     "levels of 255")
    return torch.stack(made), notes


def _levels(shift: Tensor, amount: float) -> str:
    return ", ".join(f"{255 * amount * value:+.1f}" for value in shift.tolist())


