"""The SigLIP vision tower, with the published checkpoint's names (google/siglip-so400m-patch14-384; arXiv 2303.15343),
and FLUX.1 Redux's projector (black-forest-labs/flux, src/flux/modules/image_embedders.py)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput, NotFinite
from ..specs import ReduxSpec, SiglipSpec
from .ops import PLAIN, Ops

MAX_RESIZED = 64 * 1024 * 1024
"""Pixels of a resized picture before the crop: a narrow strip must not fill the memory."""


class Embeddings(nn.Module):
    def __init__(self, spec: SiglipSpec, ops: Ops) -> None:
        super().__init__()
        self.patch_embedding = ops.Conv2d(spec.num_channels, spec.hidden_size, spec.patch_size, spec.patch_size)
        self.position_embedding = ops.Embedding(spec.num_positions, spec.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        positions = torch.arange(patches.shape[1], device=pixels.device)
        out: Tensor = patches + self.position_embedding(positions)
        return out


class Attention(nn.Module):
    def __init__(self, spec: SiglipSpec, ops: Ops) -> None:
        super().__init__()
        dim = spec.hidden_size
        self.heads = spec.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (ops.Linear(dim, dim) for _ in range(4))
        self.attention = ops.attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(self.attention(q, k, v))
        return out


class MLP(nn.Module):
    def __init__(self, spec: SiglipSpec, ops: Ops) -> None:
        super().__init__()
        self.fc1 = ops.Linear(spec.hidden_size, spec.intermediate_size)
        self.fc2 = ops.Linear(spec.intermediate_size, spec.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class Layer(nn.Module):
    def __init__(self, spec: SiglipSpec, ops: Ops) -> None:
        super().__init__()
        self.self_attn = Attention(spec, ops)
        self.layer_norm1 = ops.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.layer_norm2 = ops.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.mlp = MLP(spec, ops)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Encoder(nn.Module):
    def __init__(self, spec: SiglipSpec, ops: Ops) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec, ops) for _ in range(spec.num_hidden_layers))


class PoolingAttention(nn.Module):
    """One query over all states; q, k and v lie in one tensor, as torch's own attention module names it."""

    def __init__(self, spec: SiglipSpec, ops: Ops) -> None:
        super().__init__()
        dim = spec.hidden_size
        self.heads = spec.num_attention_heads
        fused = ops.Linear(dim, 3 * dim)
        self.in_proj_weight, self.in_proj_bias = fused.weight, fused.bias
        self.out_proj = ops.Linear(dim, dim)
        self.attention = ops.attention

    def forward(self, query: Tensor, states: Tensor) -> Tensor:
        inputs = (query, states, states)
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2) for x, weight, bias
                   in zip(inputs, self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True))
        out: Tensor = self.out_proj(self.attention(q, k, v))
        return out


class Head(nn.Module):
    """States `(B, L, hidden)` -> `(B, hidden)`. Hosts leave it out: its tensors outside layers cannot be streamed."""

    def __init__(self, spec: SiglipSpec, ops: Ops) -> None:
        super().__init__()
        # of all layers only this one makes a tensor of three axes, and no parameter comes from elsewhere
        self.probe = ops.LayerNorm((1, 1, spec.hidden_size)).weight
        self.attention = PoolingAttention(spec, ops)
        self.layernorm = ops.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.mlp = MLP(spec, ops)

    def forward(self, states: Tensor) -> Tensor:
        x = self.attention(self.probe.expand(states.shape[0], -1, -1), states)
        out: Tensor = x + self.mlp(self.layernorm(x))
        return out[:, 0]


class VisionModel(nn.Module):
    def __init__(self, spec: SiglipSpec, ops: Ops) -> None:
        super().__init__()
        self.embeddings = Embeddings(spec, ops)
        self.encoder = Encoder(spec, ops)
        self.post_layernorm = ops.LayerNorm(spec.hidden_size, eps=spec.layer_norm_eps)
        self.head = Head(spec, ops) if spec.vision_use_head else None


class SiglipVision(nn.Module):
    """Pixels `(B, 3, S, S)` -> states `(B, L, hidden)`, S = `spec.image_size`, L = `spec.num_positions`."""

    def __init__(self, spec: SiglipSpec, ops: Ops = PLAIN) -> None:
        super().__init__()
        self.spec = spec
        self.vision_model = VisionModel(spec, ops)

    def forward(self, pixels: Tensor) -> Tensor:
        """The normed last states: what Redux takes."""
        *_, last = self.layer_states(pixels)
        return self.normed(last)

    def layer_states(self, pixels: Tensor) -> Iterator[Tensor]:
        """States `(B, L, hidden)` before the first layer and after each."""
        x: Tensor = self.vision_model.embeddings(pixels)
        yield x
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
            yield x

    def normed(self, states: Tensor) -> Tensor:
        out: Tensor = self.vision_model.post_layernorm(states)
        return out

    def pooled(self, states: Tensor) -> Tensor:
        """One vector `(B, hidden)` of the states that `forward` gives."""
        if self.vision_model.head is None:
            raise ValueError("this vision tower was built without its pooling head")
        out: Tensor = self.vision_model.head(states)
        return out


class Redux(nn.Module):
    """States of a vision encoder `(B, L, redux_dim)` -> text tokens `(B, L, txt_in_features)`."""

    def __init__(self, spec: ReduxSpec, ops: Ops = PLAIN) -> None:
        super().__init__()
        self.spec = spec
        self.redux_up = ops.Linear(spec.redux_dim, spec.hidden_size)
        self.redux_down = ops.Linear(spec.hidden_size, spec.txt_in_features)

    def forward(self, states: Tensor) -> Tensor:
        """BadInput if the states are of another width."""
        check_width(states, self.spec.redux_dim)
        out: Tensor = self.redux_down(F.silu(self.redux_up(states)))
        return out


def check_width(states: Tensor, redux_dim: int) -> None:
    """BadInput unless states of a vision encoder have the width that a Redux model takes."""
    if states.shape[-1] != redux_dim:
        raise BadInput(f"the vision encoder gave states of width {states.shape[-1]}, this Redux model takes width "
                       f"{redux_dim}; FLUX.1 Redux goes with SigLIP so400m patch14 384 "
                       "(sigclip_vision_patch14_384.safetensors)")


def check_pictures(images: Tensor, size: int, crop: bool) -> None:
    """BadInput unless IMAGE is `(B, H, W, C)` with three channels or more, and no strip that would become too large on
    its way to the square of `size`; NotFinite for NaN and infinity."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[-1] < 3 or 0 in images.shape:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise BadInput(f"a picture must be (batch, height, width, 3), found {found}; a mask or a latent cannot be "
                       "seen by the vision encoder")
    if not bool(torch.isfinite(images).all()):
        raise NotFinite("the picture given to the vision encoder holds NaN or infinity; look at the node it comes from")
    height, width = images.shape[1:3]
    sides = resized_sides(height, width, size, crop)
    if sides[0] * sides[1] > MAX_RESIZED:
        raise BadInput(f"a picture of {width} x {height} would become {sides[1]} x {sides[0]} before its middle is cut "
                       "out, which is too large; cut it first, or set crop to 'none'")


def resized_sides(height: int, width: int, size: int, crop: bool) -> tuple[int, int]:
    """Sides of a picture before the square of `size` is cut out of its middle. `crop`: the shorter one fits; else the
    picture is stretched."""
    if not crop or (height, width) == (size, size):
        return size, size
    scale = size / min(height, width)
    return round(scale * height), round(scale * width)


def to_pixels(images: Tensor, spec: SiglipSpec, crop: bool = False) -> Tensor:
    """IMAGE `(B, H, W, 3 or more)` in 0..1 -> pixels `(B, 3, S, S)` in -1..1 for the vision tower, in images' dtype.

    Resized bicubically with antialiasing and rounded to 8 bits a channel, as ComfyUI does; further channels are
    dropped. BFL stretches (`crop` False); ComfyUI's node cuts the middle out unless told otherwise. BFL resizes 8-bit
    pictures with fixed-point arithmetic and differs by a few of 255 levels. BadInput and NotFinite as
    `check_pictures`.
    """
    size = spec.image_size
    check_pictures(images, size, crop)
    x = images[..., :3].movedim(-1, 1)  # (B, 3, H, W)
    if x.shape[2:] != (size, size):
        sides = resized_sides(x.shape[2], x.shape[3], size, crop)
        x = F.interpolate(x, size=sides, mode="bicubic", antialias=True)
        top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
        x = x[:, :, top:top + size, left:left + size]
    x = (x * 255).clamp(0, 255).round() / 255
    return (x - spec.image_mean) / spec.image_std
