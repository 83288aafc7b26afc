"""The attention mask of a conditioning: who sees whom among text, picture and reference tokens, in that order.

A mask is a bias `(B or 1, L, L)`, queries first, added to the scores; 0 sees, `FLOOR` does not. L = text tokens
+ height * width of the picture's grid of tokens + tokens of the references. Samplers of ComfyUI stretch the part of the
picture where another size is sampled, which they can only do without references; a grid of (1, 1) fits every size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, NotFinite

FLOOR = -10_000.0
"""Hides a token in every dtype. Finite where -inf is not enough: a mask of -inf that is stretched holds NaN, and so
does a row of scores of which nothing is left. Far from the end of fp16, so that a score can be added."""
LARGE = 100 * 2**20
PATCH = 2
ANY_SIZE = (1, 1)

Grid = tuple[int, int]


@dataclass(frozen=True)
class Joint:
    """A mask with what its sides are made of."""

    bias: Tensor  # (B or 1, L, L) fp16
    text: int
    grid: Grid

    @property
    def image(self) -> slice:
        return slice(self.text, self.text + math.prod(self.grid))

    def keys(self, device: torch.device) -> dict[str, Any]:
        """As a conditioning carries it."""
        return {"attention_mask": self.bias.to(device), "attention_mask_img_shape": self.grid}


def open_mask(text: int, grid: Grid, references: Sequence[Grid]) -> Joint:
    """Everybody sees everybody."""
    length = text + sum(map(math.prod, (grid, *references)))
    return Joint(torch.zeros(1, length, length, dtype=torch.float16), text, grid)


def mask_of(values: Mapping[str, Any], text: int) -> Joint | None:
    """The mask of an entry of `text` text tokens, widened for its references if it was made before they were there.
    BadInput for a shape that does not fit, NotFinite for NaN and +inf."""
    mask = values.get("attention_mask")
    if mask is None:
        return None
    grid, references = values.get("attention_mask_img_shape"), reference_grids(values)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or grid is None or len(grid) != 2:
        raise BadInput("the conditioning holds an attention mask without the size of the picture that it is for "
                       "('attention_mask_img_shape'); remove the node that added it")
    height, width = (int(side) for side in grid)
    lengths = [text + height * width, text + height * width + sum(map(math.prod, references))]
    if mask.shape[-2] != mask.shape[-1] or mask.shape[-1] not in lengths:
        raise BadInput(f"the conditioning's attention mask has shape {tuple(mask.shape)}, {text} text and {height} x "
                       f"{width} picture tokens need sides of {lengths[0]}, with its references {lengths[1]}; remove "
                       "the node that added it")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, FLOOR)
    if not bool((mask < math.inf).all()):
        raise NotFinite("the conditioning's attention mask holds NaN or infinity; check the node that made it")
    joint = Joint(mask.reshape(-1, *mask.shape[-2:]).clamp(min=FLOOR).half().cpu(), text, (height, width))
    return joint if mask.shape[-1] == lengths[1] else with_references(joint, references)


def with_text(joint: Joint, count: int) -> Joint:
    """`count` tokens more behind the text. They are seen by all, and see of the text what that token of the picture
    sees that sees least of it: without a place in the picture, they belong to none of its parts."""
    old, at, length = joint.bias, joint.text, joint.bias.shape[-1]
    before, after = slice(0, at), slice(at + count, length + count)
    bias = old.new_zeros(old.shape[0], length + count, length + count)
    for rows, old_rows in ((before, slice(0, at)), (after, slice(at, length))):
        bias[:, rows, before], bias[:, rows, after] = old[:, old_rows, :at], old[:, old_rows, at:]
    bias[:, at:at + count, :at] = old[:, joint.image, :at].amin(dim=1, keepdim=True)
    return Joint(bias, at + count, joint.grid)


def with_references(joint: Joint, references: Sequence[Grid]) -> Joint:
    """The same with references behind the picture."""
    return Joint(beside_references(joint.bias, joint.grid, references), joint.text, joint.grid)


def beside_references(mask: Tensor, grid: Grid, references: Sequence[Grid]) -> Tensor:
    """A mask `(..., L, L)`, bool or added to the scores, over text and a picture of `grid` tokens, wider by references
    of these grids, which see and are seen as the places of the picture that lie where theirs do."""
    if not references:
        return mask
    wide, count = (mask.float() if mask.dtype == torch.bool else mask), math.prod(grid)
    for axis in (-2, -1):
        image = wide.narrow(axis, wide.shape[axis] - count, count)
        wide = torch.cat((wide, *(stretched(image, axis, grid, each) for each in references)), dim=axis)
    return wide > 0.5 if mask.dtype == torch.bool else wide


def stretched(image: Tensor, axis: int, old: Grid, new: Grid) -> Tensor:
    """An axis of picture tokens from one grid to another, bilinearly."""
    if old == new:
        return image
    moved = image.movedim(axis, -1)
    scaled = F.interpolate(moved.reshape(-1, 1, *old).float(), size=new, mode="bilinear").to(image.dtype)
    return scaled.reshape(*moved.shape[:-1], math.prod(new)).movedim(-1, axis)


def on_grid(joint: Joint, grid: Grid) -> Joint:
    """A mask that fits every size, for one of `grid` tokens. BadInput for a mask of another size."""
    if grid == joint.grid:
        return joint
    if joint.grid != ANY_SIZE:
        raise BadInput(f"the conditioning holds an attention mask for a picture of {joint.grid[1]} x {joint.grid[0]} "
                       f"tokens, this one has {grid[1]} x {grid[0]}; give every node in the chain the latent that is "
                       "sampled")
    first, last = joint.text, joint.bias.shape[-1]
    places = torch.cat((torch.arange(first), torch.full((math.prod(grid),), first), torch.arange(first + 1, last)))
    return Joint(joint.bias[:, places[:, None], places], joint.text, grid)


def reference_grids(values: Mapping[str, Any]) -> list[Grid]:
    """Tokens (down, across) of each reference that an entry carries, latents `(B, 16, h, w)`."""
    latents: Sequence[Tensor] = values.get("reference_latents") or ()
    return [grid_of(latent) for latent in latents]


def grid_of(latents: Tensor) -> Grid:
    """Tokens (down, across) of latents `(B, C, h, w)`."""
    return math.ceil(latents.shape[-2] / PATCH), math.ceil(latents.shape[-1] / PATCH)
