"""Plain layers: the default of the `ops` namespace that every model is built from.

A host hands in a namespace of the same shape to put its own layers and kernels in place. Models create parameters
through it and in no other way. It stands beside the models and not in `quant` because `attention` belongs to it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import HEADS_AT_ONCE, attention, runs_plainly_on_cpu


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in fp32 inside. `name` is what the checkpoint calls the parameter:
    `scale` in BFL's q/k norms, `weight` in T5."""

    def __init__(self, dim: int, eps: float, name: str = "scale") -> None:
        super().__init__()
        self.eps = eps
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.ones(dim)))

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = getattr(self, self.name)
        if x.ndim == 4 and runs_plainly_on_cpu(x):
            return self._by_heads(x, scale.float())
        return F.rms_norm(x, scale.shape, scale.to(x.dtype), self.eps)

    def _by_heads(self, x: Tensor, scale: Tensor) -> Tensor:
        """A few heads of `(B, H, L, D)` at a time, which stay in the cache: half the time of torch's kernel, which
        first makes q and k contiguous."""
        out = torch.empty(x.shape, dtype=x.dtype)
        for first in range(0, x.shape[1], HEADS_AT_ONCE):
            heads = slice(first, first + HEADS_AT_ONCE)
            part = x[:, heads].to(torch.float32, copy=True)
            length = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
            factor = length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
            out[:, heads] = part.mul_(scale).mul_(factor)
        return out


class Ops(Protocol):
    """What a model asks of its layers. Signatures are torch's, but for `RMSNorm(dim, eps, name)` and
    `attention(q, k, v, pe, mask, options)`, whose contract is `engine.models.attention.attention`."""

    Linear: Any
    Conv2d: Any
    Embedding: Any
    LayerNorm: Any
    GroupNorm: Any
    RMSNorm: Any
    attention: Any


class PlainOps:
    """torch's own layers and scaled-dot-product attention."""

    Linear = nn.Linear
    Conv2d = nn.Conv2d
    Embedding = nn.Embedding
    LayerNorm = nn.LayerNorm
    GroupNorm = nn.GroupNorm
    RMSNorm = RMSNorm
    attention = staticmethod(attention)


PLAIN: Ops = PlainOps()
