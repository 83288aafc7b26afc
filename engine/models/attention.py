"""Rotary positions and attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 8 * 2**20
"""Scores held at a time on the CPU: 16 MB of bf16, what a core can expect to find in its last cache."""

HEADS_AT_ONCE = 4
"""Heads rotated at a time on the CPU, so that fp32 copies stay in the cache."""


def rope(positions: Tensor, dim: int, theta: int) -> Tensor:
    """Rotation matrices of one axis: positions `(B, L)` -> `(B, L, dim/2, 2, 2)` fp32.

    Angles are taken in float64 on the CPU: fp32 loses digits at large positions, and MPS has no float64.
    """
    scale = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    angle = positions.cpu().double()[..., None] / theta**scale  # (B, L, dim/2); one after the other, or MPS casts
    cos, sin = torch.cos(angle), torch.sin(angle)
    table: Tensor = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))
    return table.float().to(positions.device)


def apply_rope(x: Tensor, pe: Tensor) -> Tensor:
    """Rotate pairs of channels: x `(B, H, L, D)` by pe `(B, 1, L, D/2, 2, 2)`, in fp32, back to x's dtype."""
    if runs_plainly_on_cpu(x):
        turns, out = _turns(pe), torch.empty(x.shape, dtype=x.dtype)
        for first in range(0, x.shape[1], HEADS_AT_ONCE):
            heads = slice(first, first + HEADS_AT_ONCE)
            out[:, heads] = _turned(x[:, heads], turns)
        return out
    pairs = x.float().unflatten(-1, (-1, 1, 2))  # (B, H, L, D/2, 1, 2)
    rotated: Tensor = torch.addcmul(pe[..., 1] * pairs[..., 1], pe[..., 0], pairs[..., 0]).flatten(-2)
    return rotated.to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None = None, mask: Tensor | None = None,
              options: dict[str, Any] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, with rotary positions applied to q and k first when `pe` is given.

    q, k, v: `(B, H, L, D)`; pe: `(B, 1, L, D/2, 2, 2)` fp32 or None; mask: broadcastable to `(B, H, L, L)`, bool
    (True = attend) or added to the scores; options: for hosts' kernels, unused here. Returns `(B, L, H*D)`.
    """
    if mask is None and q.dtype == torch.bfloat16 and runs_plainly_on_cpu(q):
        return _by_groups(q, k, v, pe)
    if pe is not None:
        q, k = apply_rope(q, pe), apply_rope(k, pe)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def _by_groups(q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None) -> Tensor:
    """Attention in plain products of as many heads (or rows of one head) as fit the cache.

    On a CPU with bf16 instructions a third of the time of torch's own kernel, which works on small blocks; the price is
    that scores are rounded to bf16. In fp32 torch's kernel is the faster one.
    """
    batch, heads, length, dim = q.shape
    group = max(1, SCORES // (length * k.shape[2]))
    rows = length if group > 1 else max(1, min(length, SCORES // k.shape[2]))
    turns = None if pe is None else _turns(pe).expand(batch, -1, -1, -1)
    out = q.new_empty(batch, length, heads, dim)
    for b in range(batch):
        for first in range(0, heads, group):
            part = slice(first, first + group)
            qs, ks = q[b, part], k[b, part]  # (group, L, D)
            if turns is not None:
                qs, ks = (_turned(x, turns[b]).to(x.dtype) for x in (qs, ks))
            for row in range(0, length, rows):
                some = slice(row, row + rows)
                scores = torch.baddbmm(qs.new_empty(()), qs[:, some], ks.mT, beta=0, alpha=dim**-0.5)
                out[b, some, part] = torch.bmm(torch.softmax(scores, dim=-1), v[b, part]).transpose(0, 1)
    return out.flatten(2)


def runs_plainly_on_cpu(x: Tensor) -> bool:
    """Not traced for gradients or a compiler: in-place work, Python loops and complex numbers are then in order."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _turns(pe: Tensor) -> Tensor:
    """Rotation matrices as complex numbers: `(B, 1, L, D/2, 2, 2)` -> `(B, 1, L, D/2)`."""
    return torch.view_as_complex(pe[..., 0].float().contiguous())


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """x `(..., L, D)` rotated, fp32; a product of complex numbers takes a quarter of the matrix form's time."""
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    rotated: Tensor = torch.view_as_real(pairs * turns).flatten(-2)
    return rotated
