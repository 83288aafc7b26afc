"""Attention masks of conditionings: how much each of the text and image tokens sees of the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, NotFinite

log = logging.getLogger(__name__)

NOTHING = -65504.0
"""Stands for -inf: no weight after softmax in any dtype, and finite where masks are resized."""
LARGE = 100 * 2**20


@dataclass(frozen=True)
class AttentionMask:
    """`bias` `(B or 1, L, L)`, finite, is added to the scores of queries (first) for keys; L = text tokens + h * w of
    `grid`, text first. The image part is resized to the picture in hand."""

    bias: Tensor
    grid: tuple[int, int]

    def fitted(self, grid: tuple[int, int]) -> Tensor:
        """The bias `(B or 1, 1, L', L')` for a picture of `grid` tokens, in fp32."""
        bias = self.bias.float()
        if grid != self.grid:
            size = (bias.shape[-1] - math.prod(self.grid) + math.prod(grid)) ** 2 * bias.shape[0] * bias.itemsize
            if size > LARGE:
                log.warning("the attention mask of this conditioning takes %d MB for a picture of %d x %d tokens",
                            size >> 20, grid[1], grid[0])
            bias = _resized(_resized(bias, 1, self.grid, grid), 2, self.grid, grid)
        return bias[:, None]


def _resized(bias: Tensor, axis: int, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """One axis of a mask with its image tokens resized bilinearly, as ComfyUI does."""
    count = math.prod(old)
    text, image = bias.split([bias.shape[axis] - count, count], axis)
    image = image.movedim(axis, -1)
    scaled = F.interpolate(image.reshape(-1, 1, *old), size=new, mode="bilinear")
    return torch.cat((text, scaled.reshape(*image.shape[:-1], math.prod(new)).movedim(-1, axis)), axis)


def read_mask(options: Mapping[str, Any], tokens: int, role: str) -> AttentionMask | None:
    """The `attention_mask` of a conditioning of `tokens` text tokens, with `attention_mask_img_shape`, its (height,
    width) in image tokens. `(L, L)` or `(B, L, L)`; bool (True = attend) or added to the scores, where -inf hides.

    BadInput for shapes that do not fit, NotFinite for NaN and +inf.
    """
    mask = options.get("attention_mask")
    if mask is None:
        return None
    grid = options.get("attention_mask_img_shape")
    if grid is None or len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise BadInput(f"the {role} conditioning has an attention mask but not the (height, width) in image tokens it "
                       f"is made for, 'attention_mask_img_shape' (found {grid}); remove the node that added it")
    length = tokens + grid[0] * grid[1]
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or mask.shape[-2:] != (length, length):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(f"the {role} conditioning's attention mask has shape {found}; {tokens} text and {grid[0]} x "
                       f"{grid[1]} image tokens need sides of {length}. Apply the mask after all nodes that add text")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask.cpu(), NOTHING)
    if not bool((mask < math.inf).all()):
        raise NotFinite(f"the {role} conditioning's attention mask holds NaN or infinity; check the strength of the "
                        "node that made it")
    return AttentionMask(mask.reshape(-1, length, length).clamp(min=NOTHING), (grid[0], grid[1]))
