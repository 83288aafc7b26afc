"""The CLIP-L text tower, with the published checkpoint's names (openai/clip-vit-large-patch14; arXiv 2103.00020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..specs import ClipTextSpec
from .ops import PLAIN, Ops


class Embeddings(nn.Module):
    def __init__(self, spec: ClipTextSpec, ops: Ops) -> None:
        super().__init__()
        self.token_embedding = ops.Embedding(spec.vocab_size, spec.hidden_size)
        self.position_embedding = ops.Embedding(spec.max_position_embeddings, spec.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        out: Tensor = self.token_embedding(ids) + self.position_embedding(positions)
        return out


class Attention(nn.Module):
    def __init__(self, spec: ClipTextSpec, ops: Ops) -> None:
        super().__init__()
        dim = spec.hidden_size
        self.heads = spec.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (ops.Linear(dim, dim) for _ in range(4))
        self.attention = ops.attention

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(self.attention(q, k, v, None, mask))
        return out


class MLP(nn.Module):
    def __init__(self, spec: ClipTextSpec, ops: Ops) -> None:
        super().__init__()
        self.fc1 = ops.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = ops.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        out: Tensor = self.fc2(h * torch.sigmoid(1.702 * h))  # quick GELU
        return out


class Layer(nn.Module):
    def __init__(self, spec: ClipTextSpec, ops: Ops) -> None:
        super().__init__()
        self.layer_norm1 = ops.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.self_attn = Attention(spec, ops)
        self.layer_norm2 = ops.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.mlp = MLP(spec, ops)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Encoder(nn.Module):
    def __init__(self, spec: ClipTextSpec, ops: Ops) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec, ops) for _ in range(spec.num_hidden_layers))


class TextModel(nn.Module):
    def __init__(self, spec: ClipTextSpec, ops: Ops) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec, ops)
        self.encoder = Encoder(spec, ops)
        self.final_layer_norm = ops.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        length = ids.shape[1]
        causal = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for layer in self.encoder.layers:
            x = layer(x, causal)
        out: Tensor = self.final_layer_norm(x)
        return out


class ClipText(nn.Module):
    """Token ids `(B, L <= 77)` -> last states `(B, L, hidden)` and pooled `(B, hidden)`."""

    def __init__(self, spec: ClipTextSpec, ops: Ops = PLAIN) -> None:
        super().__init__()
        self.spec = spec
        self.text_model = TextModel(spec, ops)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled is the normed state at the first end-of-text token, unprojected: what FLUX.1 takes."""
        states = self.text_model(ids)
        end = (ids == self.spec.eos_token_id).int().argmax(dim=-1)
        return states, states[torch.arange(len(ids), device=ids.device), end]
