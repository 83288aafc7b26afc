"""Attention masks of conditionings: how much each of the text and image tokens sees of the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..conditioning.attention import Grid, beside_references, stretched
from ..errors import BadInput, NotFinite

log = logging.getLogger(__name__)

NOTHING = -65504.0
"""Stands for -inf: no weight after softmax in any dtype, and finite where masks are resized."""
LARGE = 100 * 2**20


@dataclass(frozen=True)
class AttentionMask:
    """`bias` `(B or 1, L, L)`, finite, is added to the scores of queries (first) for keys; L = text tokens + h * w of
    `grid` + `references`, in this order. The part of the picture is resized to the one in hand. A mask made without
    references (0) treats each as it treats the picture."""

    bias: Tensor
    grid: Grid
    references: int = 0

    def fitted(self, grid: Grid, references: Sequence[Grid] = ()) -> Tensor:
        """The bias `(B or 1, 1, L', L')` for a picture of `grid` tokens and these references, in fp32."""
        bias, more = self.bias.float(), sum(map(math.prod, references))
        length = bias.shape[-1] - math.prod(self.grid) - self.references + math.prod(grid) + more
        if length != bias.shape[-1]:
            size = length**2 * bias.shape[0] * bias.itemsize
            if size > LARGE:
                log.warning("the attention mask of this conditioning takes %d MB for a picture of %d x %d tokens%s",
                            size >> 20, grid[1], grid[0], " with references" if references else "")
        if grid != self.grid:
            for axis in (1, 2):
                bias = _resized(bias, axis, self.grid, grid, self.references)
        if self.references == 0:
            bias = beside_references(bias, grid, references)
        return bias[:, None]


def _resized(bias: Tensor, axis: int, old: Grid, new: Grid, tail: int) -> Tensor:
    """One axis of a mask with its image tokens, which stand before the last `tail`, resized as ComfyUI does."""
    count = math.prod(old)
    text, image, rest = bias.split([bias.shape[axis] - count - tail, count, tail], axis)
    return torch.cat((text, stretched(image, axis, old, new), rest), axis)


def read_mask(options: Mapping[str, Any], tokens: int, role: str, references: int = 0) -> AttentionMask | None:
    """The `attention_mask` of a conditioning of `tokens` text tokens, with `attention_mask_img_shape`, its (height,
    width) in image tokens. `(L, L)` or `(B, L, L)`; bool (True = attend) or added to the scores, where -inf hides.
    It may cover the conditioning's `references` tokens of reference pictures, after those of the picture, or not.

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
    sides = (length, length + references)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or mask.shape[-2] != mask.shape[-1] or (
            mask.shape[-1] not in sides):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        more = f", or {sides[1]} with the references" if references else ""
        raise BadInput(f"the {role} conditioning's attention mask has shape {found}; {tokens} text and {grid[0]} x "
                       f"{grid[1]} image tokens need sides of {length}{more}. Apply the mask after all nodes that add "
                       "text or references")
    length = mask.shape[-1]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask.cpu(), NOTHING)
    if not bool((mask < math.inf).all()):
        raise NotFinite(f"the {role} conditioning's attention mask holds NaN or infinity; check the strength of the "
                        "node that made it")
    return AttentionMask(mask.reshape(-1, length, length).clamp(min=NOTHING), (grid[0], grid[1]),
                         length - sides[0])
