"""The T5 v1.1 encoder, with the published checkpoints' names (google/t5-v1_1-xxl; arXiv 1910.10683, 2002.05202)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..specs import T5Spec
from .layers import within_half
from .ops import PLAIN, Ops


def relative_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """Bucket of every (query, key) pair, `(L, L)` int64: half for each direction, exact when near, then logarithmic."""
    position = torch.arange(length)
    distance = position[None, :] - position[:, None]  # key - query
    half = buckets // 2
    bucket = torch.where(distance > 0, half, 0)
    distance = distance.abs()
    exact = half // 2
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
                   * (half - exact)).long()
    return bucket + torch.where(distance < exact, distance, far.clamp(max=half - 1))


class SelfAttention(nn.Module):
    def __init__(self, spec: T5Spec, has_bias: bool, ops: Ops) -> None:
        super().__init__()
        inner = spec.num_heads * spec.d_kv
        self.spec = spec
        self.q = ops.Linear(spec.d_model, inner, bias=False)
        self.k = ops.Linear(spec.d_model, inner, bias=False)
        self.v = ops.Linear(spec.d_model, inner, bias=False)
        self.o = ops.Linear(inner, spec.d_model, bias=False)
        self.attention = ops.attention
        self.relative_attention_bias = ops.Embedding(
            spec.relative_attention_num_buckets, spec.num_heads) if has_bias else None

    def bias(self, length: int, x: Tensor) -> Tensor:
        """The position bias of all layers, `(1, H, L, L)`; held by the first layer only."""
        buckets = relative_buckets(length, self.spec.relative_attention_num_buckets,
                                   self.spec.relative_attention_max_distance).to(x.device)
        assert self.relative_attention_bias is not None
        bias: Tensor = self.relative_attention_bias(buckets)
        return bias.permute(2, 0, 1)[None].to(x.dtype)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.spec.num_heads, -1)).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        # T5 does not divide by sqrt(d): undo what attention does
        out: Tensor = self.o(self.attention(q * math.sqrt(self.spec.d_kv), k, v, None, bias))
        return out


class LayerSelfAttention(nn.Module):
    def __init__(self, spec: T5Spec, has_bias: bool, ops: Ops) -> None:
        super().__init__()
        self.SelfAttention = SelfAttention(spec, has_bias, ops)
        self.layer_norm = ops.RMSNorm(spec.d_model, spec.layer_norm_epsilon, "weight")

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return out


class DenseGatedActDense(nn.Module):
    def __init__(self, spec: T5Spec, ops: Ops) -> None:
        super().__init__()
        self.wi_0 = ops.Linear(spec.d_model, spec.d_ff, bias=False)
        self.wi_1 = ops.Linear(spec.d_model, spec.d_ff, bias=False)
        self.wo = ops.Linear(spec.d_ff, spec.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        out: Tensor = self.wo(within_half(hidden))
        return out


class LayerFF(nn.Module):
    def __init__(self, spec: T5Spec, ops: Ops) -> None:
        super().__init__()
        self.DenseReluDense = DenseGatedActDense(spec, ops)
        self.layer_norm = ops.RMSNorm(spec.d_model, spec.layer_norm_epsilon, "weight")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.DenseReluDense(self.layer_norm(x))
        return out


class Block(nn.Module):
    def __init__(self, spec: T5Spec, has_bias: bool, ops: Ops) -> None:
        super().__init__()
        self.layer = nn.ModuleList([LayerSelfAttention(spec, has_bias, ops), LayerFF(spec, ops)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = within_half(self.layer[0](x, bias))
        return within_half(self.layer[1](x))


class Stack(nn.Module):
    def __init__(self, spec: T5Spec, ops: Ops) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(spec, i == 0, ops) for i in range(spec.num_layers))
        self.final_layer_norm = ops.RMSNorm(spec.d_model, spec.layer_norm_epsilon, "weight")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        first: Any = self.block[0]
        bias: Tensor = first.layer[0].SelfAttention.bias(x.shape[1], x)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(x.dtype).min)
        for block in self.block:
            x = block(x, bias)
        out: Tensor = self.final_layer_norm(x)
        return out


class T5Encoder(nn.Module):
    """Token ids `(B, L)` -> states `(B, L, d_model)`."""

    def __init__(self, spec: T5Spec, ops: Ops = PLAIN) -> None:
        super().__init__()
        self.spec = spec
        self.shared = ops.Embedding(spec.vocab_size, spec.d_model)
        self.encoder = Stack(spec, ops)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask `(B, L)` bool, True = attend. FLUX.1 uses none: padding is attended to, as in training."""
        out: Tensor = self.encoder(self.shared(ids), mask)
        return out
