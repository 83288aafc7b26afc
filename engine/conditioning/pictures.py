"""What all conditionings ask of pictures, masks and prompts: checked on the way in, brought to one size and one batch.

IMAGE is `(B, H, W, 3)` and MASK `(B, H, W)`, both fp32 0..1; a mask is 1 where the picture is to change. A CONDITIONING
is `[[cond, {key: value}], ...]`. Notes are sentences for the user on what was changed or ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, NotFinite
from ..specs import FLUX_AE
from .resample import along, check_size, doubled

Notes = list[str]
Entries = Sequence[Sequence[Any]]
SAME_ASPECT = 0.01
"""How far two aspects may differ for a mask to be stretched to its picture."""
HALF_LEVEL = 0.5 / 255
TOKEN = 2 * FLUX_AE.downscale
"""Pixels of a token, each way."""


def read_picture(image: Any, what: str = "image") -> tuple[Tensor, Notes]:
    """IMAGE `(B, H, W, 1, 3 or 4)` -> `(B, H, W, 3)` fp32; an alpha channel is dropped. BadInput, NotFinite."""
    picture, notes = read_colours(image, what)
    bad = ~torch.isfinite(picture).all(-1)
    if bad.any():
        raise NotFinite(f"{what} holds NaN or infinity in {int(bad.sum())} pixels. Look at the node it comes from; a "
                        "VAE that runs in fp16 is the usual cause")
    return picture, notes


def read_colours(image: Any, what: str = "image") -> tuple[Tensor, Notes]:
    """`read_picture` without the look for NaN."""
    if not isinstance(image, Tensor) or image.ndim != 4 or 0 in image.shape or image.shape[-1] not in (1, 3, 4):
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise BadInput(f"{what} must be (batch, height, width, 3), found {found}")
    notes = []
    if image.shape[-1] == 4:
        notes.append(f"{what}: its alpha channel is left out; only a mask says what may change")
    if image.shape[-1] == 1:
        image = image.expand(*image.shape[:-1], 3)
        notes.append(f"{what}: one channel, used for red, green and blue")
    picture = image[..., :3].float()
    return picture, [*notes, *beyond(picture, what)]


def beyond(picture: Tensor, what: str = "image") -> Notes:
    """What to say of a picture whose values leave 0..1 by half a level of 255 or more; of NaN others tell."""
    low, high = (float(end) for end in torch.aminmax(picture))
    if not math.isfinite(high - low) or (low > -HALF_LEVEL and high < 1 + HALF_LEVEL):
        return []
    advice = ". Divide a picture of 0 ... 255 by 255 first" if high > 2 else ""
    return [f"{what}: its values go from {low:g} to {high:g}, those of a picture from 0 to 1{advice}"]


def read_mask(mask: Any, what: str = "mask", *, repair: bool = False) -> tuple[Tensor, Notes]:
    """MASK `(H, W)`, `(B, H, W)` or `(B, 1, H, W)` -> `(B, H, W)` fp32 in 0..1; what lies outside is clamped and told.
    NaN becomes 0 with `repair`, else it raises NotFinite. BadInput."""
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or 0 in mask.shape:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(f"{what} must be (batch, height, width), found {found}")
    mask = mask.float().reshape(-1, *mask.shape[-2:])
    notes = []
    broken = torch.isnan(mask)
    if broken.any():
        if not repair:
            raise NotFinite(f"{what} holds NaN in {int(broken.sum())} pixels. Look at the node it comes from, or put "
                            "Mask Refine behind it")
        notes.append(f"{what}: {int(broken.sum())} pixels were NaN and count as 0")
        mask = mask.masked_fill(broken, 0.0)
    outside = int(((mask < 0) | (mask > 1)).sum())
    if outside:
        notes.append(f"{what}: {outside} pixels were outside 0 ... 1 and are clamped")
        mask = mask.clamp(0, 1)
    return mask, notes


def fit_mask(mask: Tensor, size: Sequence[int], what: str = "mask") -> tuple[Tensor, Notes]:
    """A mask `(B, h, w)` at `size` (height, width); it is stretched only to a size of its aspect, else BadInput."""
    old, new = tuple(mask.shape[-2:]), tuple(size)
    if old == new:
        return mask, []
    if not same_aspect(old, new):
        cause = (". It is empty: Load Image gives such a mask for a file without transparency"
                 if not mask.any() else "")
        raise BadInput(f"{what} is {old[1]} x {old[0]}, the picture {new[1]} x {new[0]}: another aspect{cause}. Make "
                       "the mask on this picture, or resize both alike")
    shape = mask.shape[0], 1, *old
    fitted = F.interpolate(mask.reshape(shape), size=(new[0], new[1]), mode="bilinear", antialias=True).clamp(0, 1)
    return fitted[:, 0], [f"{what}: stretched from {old[1]} x {old[0]} to {new[1]} x {new[0]}"]


def to_encode(image: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Notes]:
    """What there is to say of a picture that is encoded as it is, cut to whole latent pixels, and its mask in 0..1,
    which a sampler stretches to the latent. BadInput, NotFinite."""
    picture, notes = read_picture(image)
    old = picture.shape[1:3]
    high, wide = (side // FLUX_AE.downscale * FLUX_AE.downscale for side in old)
    if (high, wide) != old:
        notes.append(f"image: {old[1]} x {old[0]} is cut to {wide} x {high}")
    if high % TOKEN or wide % TOKEN:
        notes.append(f"image: {wide} x {high} is no multiple of {TOKEN}: half a token at its right or lower edge shows "
                     "the opposite edge while it is sampled")
    if mask is None:
        return None, notes
    made, told = read_mask(mask)
    if not made.any():
        told.append("the mask is empty: a sampler will change nothing. (Load Image gives such a mask for a picture "
                    "without transparency.)")
    elif not same_aspect(made.shape[-2:], old):
        told.append(f"the mask is {made.shape[-1]} x {made.shape[-2]}, another aspect than the picture's: it will be "
                    "stretched")
    return made, [*notes, *told]


def same_aspect(one: Sequence[int], other: Sequence[int], slack: float = SAME_ASPECT) -> bool:
    """Whether two sizes (height, width) have the same aspect, but for `slack`."""
    return abs(one[0] * other[1] / (one[1] * other[0]) - 1) <= slack


def one_batch(**tensors: Tensor) -> list[Tensor]:
    """Tensors of one batch: a batch of 1 is repeated, others must be equal; BadInput names both."""
    longest = max(len(tensor) for tensor in tensors.values())
    if any(len(tensor) not in (1, longest) for tensor in tensors.values()):
        counts = ", ".join(f"{name.replace('_', ' ')} {len(tensor)}" for name, tensor in tensors.items())
        raise BadInput(f"batches do not fit together ({counts}); give one for all, or as many of each")
    return [tensor.expand(longest, *tensor.shape[1:]) for tensor in tensors.values()]


def stretched(image: Tensor, height: int, width: int, name: str = "bicubic") -> Tensor:
    """`(B, h, w, C)` -> `(B, height, width, C)` fp32 in 0..1, antialiased, with no 8-bit step between. Of the same
    size: the very values. BadInput."""
    if image.shape[1:3] == (height, width):
        return image
    check_size(image.shape[1:3], (height, width))
    out = doubled(image)
    for axis, size in ((2, width), (1, height)):
        if out.shape[axis] != size:
            out = along(out, axis, size, name)
    return out.float().clamp(0, 1).to(image.device)


def extended(image: Tensor, height: int, width: int) -> Tensor:
    """`(B, h, w, ...)` -> `(B, height, width, ...)`: its last row and column repeated below and to the right."""
    rows = torch.arange(height, device=image.device).clamp(max=image.shape[1] - 1)
    columns = torch.arange(width, device=image.device).clamp(max=image.shape[2] - 1)
    return image[:, rows][:, :, columns]


def round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def with_values(conditioning: Entries, values: Mapping[str, Any], what: str = "positive") -> list[list[Any]]:
    """A CONDITIONING with these keys set on every entry; what was given stays as it is. BadInput if it is none."""
    if not isinstance(conditioning, Sequence) or not conditioning or not all(
            isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[1], Mapping)
            for entry in conditioning):
        raise BadInput(f"{what} is no conditioning; connect an encoded prompt (an empty text is allowed)")
    return [[entry[0], {**entry[1], **values}] for entry in conditioning]


def zeroed(conditioning: Entries) -> list[list[Any]]:
    """A CONDITIONING of zeros in the shape of another, which is what stands for no negative prompt where one has to be
    connected; with cfg 1 it is never run."""
    made = []
    for cond, values in conditioning:
        pooled = values.get("pooled_output")
        made.append([torch.zeros_like(cond), {**values, **({} if pooled is None else {
            "pooled_output": torch.zeros_like(pooled)})}])
    return made
