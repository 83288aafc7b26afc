"""Rotary positions and attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rope(positions: Tensor, dim: int, theta: int) -> Tensor:
    """Rotation matrices of one axis: positions `(B, L)` -> `(B, L, dim/2, 2, 2)` fp32.

    Angles are taken in float64 on the CPU: fp32 loses digits at large positions, and MPS has no float64.
    """
    scale = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angle = positions.to("cpu", torch.float64)[..., None] / theta**scale  # (B, L, dim/2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    table = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    return table.float().to(positions.device)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate pairs of channels: x `(B, H, L, D)` by pe `(B, 1, L, D/2, 2, 2)`, in fp32, back to x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))  # (B, H, L, D/2, 1, 2)
    rotated = torch.addcmul(pe[..., 1] * pairs[..., 1], pe[..., 0], pairs[..., 0])
    return rotated.flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None = None, mask: Tensor | None = None,
              options: dict[str, Any] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, with rotary positions applied to q and k first when `pe` is given.

    q, k, v: `(B, H, L, D)`; pe: `(B, 1, L, D/2, 2, 2)` fp32 or None; mask: broadcastable to `(B, H, L, L)`, bool
    (True = attend) or added to the scores; options: for hosts' kernels, unused here. Returns `(B, L, H*D)`.
    """
    if pe is not None:
        q, k = apply_rope(q, pe), apply_rope(k, pe)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
