"""The blocks of the flow transformer, with BFL's names (black-forest-labs/flux, modules/layers.py).

Shapes: `img` `(B, L_img, hidden)`, `txt` `(B, L_txt, hidden)`, `vec` `(B, hidden)`, `pe` `(B, 1, L, D/2, 2, 2)` fp32
with text first. Blocks run from (img, txt, vec, pe) alone, since other packs call them so; `transformer_options` goes
to a host's attention, and may bring what `Modulation` would compute (`engine.models.modulation`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..specs import FluxSpec
from .attention import rope
from .ops import Ops

Options = dict[str, Any] | None
ROWS = "flux_kit_modulations"
"""The key in `transformer_options` of a block's `BlockRows`."""
BlockRows = tuple[Tensor, tuple[tuple[Tensor, Tensor | None], ...]]
"""The `vec` that rows were made from; for each modulating layer of the block its weight and its output for that vec,
`(B, out_features)`."""


class EmbedND(nn.Module):
    """Rotation matrices `(B, 1, L, D/2, 2, 2)` fp32 for ids `(B, L, axes)`."""

    def __init__(self, dim: int, theta: int, axes_dim: tuple[int, ...]) -> None:
        super().__init__()
        self.dim, self.theta, self.axes_dim = dim, theta, axes_dim

    def forward(self, ids: Tensor) -> Tensor:
        parts = [rope(ids[..., i], dim, self.theta) for i, dim in enumerate(self.axes_dim)]
        return torch.cat(parts, dim=-3).unsqueeze(1)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000, time_factor: float = 1000.0) -> Tensor:
    """Sinusoids of t `(B,)`, cosines first: `(B, dim)` in t's dtype.

    The product with `time_factor` is taken in t's dtype and the rest in fp32. For a bf16 guidance of 3.5 this gives
    3504, as every published implementation has it; in fp32 the picture would change.
    """
    t = time_factor * t
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    embedding = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return embedding.to(t.dtype)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, ops: Ops) -> None:
        super().__init__()
        self.in_layer = ops.Linear(in_dim, hidden_dim)
        self.out_layer = ops.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return out


class QKNorm(nn.Module):
    def __init__(self, dim: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.query_norm = ops.RMSNorm(dim, eps)
        self.key_norm = ops.RMSNorm(dim, eps)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype)


class SelfAttention(nn.Module):
    """Holds the weights of one stream's attention; the double block joins the streams."""

    def __init__(self, spec: FluxSpec, ops: Ops) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.qkv = ops.Linear(spec.hidden_size, spec.hidden_size * 3, bias=spec.qkv_bias)
        self.norm = QKNorm(spec.head_dim, spec.norm_eps, ops)
        self.proj = ops.Linear(spec.hidden_size, spec.hidden_size)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed q and k, and v, each `(B, H, L, D)`."""
        q, k, v = split_heads(self.qkv(x), self.num_heads)
        q, k = self.norm(q, k, v)
        return q, k, v


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`(B, L, 3*H*D)` -> three `(B, H, L, D)`."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class ModulationOut(NamedTuple):
    """Each `(B, 1, hidden)`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    def __init__(self, dim: int, double: bool, ops: Ops) -> None:
        super().__init__()
        self.is_double = double
        self.multiplier = 6 if double else 3
        self.lin = ops.Linear(dim, self.multiplier * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        return self.parts(self.lin(F.silu(vec)))

    def parts(self, row: Tensor) -> tuple[ModulationOut, ModulationOut | None]:
        """Cuts what `lin` gives, `(B, multiplier * hidden)`."""
        parts = row[:, None, :].chunk(self.multiplier, dim=-1)
        return ModulationOut(*parts[:3]), ModulationOut(*parts[3:]) if self.is_double else None


def row_of(options: Options, vec: Tensor, index: int, layer: Any) -> Tensor | None:
    """The output of a block's modulating layer from its options, if it was made from this very vec and weight.

    Told by identity, which makes neither a device wait nor a compiled block compile again.
    """
    rows: BlockRows | None = None if options is None else options.get(ROWS)
    if rows is None or rows[0] is not vec or index >= len(rows[1]):
        return None
    weight, row = rows[1][index]
    return row if weight is layer.weight else None


def modulation(module: Any, vec: Tensor, options: Options, index: int) -> Any:
    """`module(vec)` of a `Modulation`, or the same from the row that the options bring."""
    row = row_of(options, vec, index, module.lin) if isinstance(module, Modulation) else None
    return module(vec) if row is None else module.parts(row)


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, 1 + scale, norm(x))


def within_half(x: Tensor) -> Tensor:
    """fp16 only: what overflowed comes back as the largest finite number, undefined sums as 0, as ComfyUI does."""
    if x.dtype == torch.float16:
        return torch.nan_to_num(x, nan=0.0, posinf=65504.0, neginf=-65504.0)
    return x


def _mlp(dim: int, hidden: int, ops: Ops) -> nn.Sequential:
    return nn.Sequential(ops.Linear(dim, hidden), nn.GELU(approximate="tanh"), ops.Linear(hidden, dim))


class DoubleStreamBlock(nn.Module):
    def __init__(self, spec: FluxSpec, ops: Ops) -> None:
        super().__init__()
        dim, hidden = spec.hidden_size, int(spec.hidden_size * spec.mlp_ratio)
        self.num_heads, self.hidden_size = spec.num_heads, dim
        self.attention = ops.attention
        self.img_mod = Modulation(dim, True, ops)
        self.img_norm1 = ops.LayerNorm(dim, elementwise_affine=False, eps=spec.norm_eps)
        self.img_attn = SelfAttention(spec, ops)
        self.img_norm2 = ops.LayerNorm(dim, elementwise_affine=False, eps=spec.norm_eps)
        self.img_mlp = _mlp(dim, hidden, ops)
        self.txt_mod = Modulation(dim, True, ops)
        self.txt_norm1 = ops.LayerNorm(dim, elementwise_affine=False, eps=spec.norm_eps)
        self.txt_attn = SelfAttention(spec, ops)
        self.txt_norm2 = ops.LayerNorm(dim, elementwise_affine=False, eps=spec.norm_eps)
        self.txt_mlp = _mlp(dim, hidden, ops)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, attn_mask: Tensor | None = None,
                transformer_options: Options = None) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = modulation(self.img_mod, vec, transformer_options, 0)
        txt_mod1, txt_mod2 = modulation(self.txt_mod, vec, transformer_options, 1)
        img_q, img_k, img_v = self.img_attn.heads(modulate(self.img_norm1, img, img_mod1.shift, img_mod1.scale))
        txt_q, txt_k, txt_v = self.txt_attn.heads(modulate(self.txt_norm1, txt, txt_mod1.shift, txt_mod1.scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        attn = self.attention(q, k, v, pe, attn_mask, transformer_options)  # (B, L_txt + L_img, hidden)
        txt_attn, img_attn = attn[:, :txt.shape[1]], attn[:, txt.shape[1]:]

        img = torch.addcmul(img, img_mod1.gate, self.img_attn.proj(img_attn))
        img = torch.addcmul(img, img_mod2.gate, self.img_mlp(modulate(self.img_norm2, img, img_mod2.shift,
                                                                      img_mod2.scale)))
        txt = torch.addcmul(txt, txt_mod1.gate, self.txt_attn.proj(txt_attn))
        txt = torch.addcmul(txt, txt_mod2.gate, self.txt_mlp(modulate(self.txt_norm2, txt, txt_mod2.shift,
                                                                      txt_mod2.scale)))
        return within_half(img), within_half(txt)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joined stream `x` `(B, L_txt + L_img, hidden)`."""

    def __init__(self, spec: FluxSpec, ops: Ops) -> None:
        super().__init__()
        dim = spec.hidden_size
        self.hidden_size, self.num_heads = dim, spec.num_heads
        self.mlp_hidden_dim = int(dim * spec.mlp_ratio)
        self.attention = ops.attention
        self.linear1 = ops.Linear(dim, dim * 3 + self.mlp_hidden_dim)
        self.linear2 = ops.Linear(dim + self.mlp_hidden_dim, dim)
        self.norm = QKNorm(spec.head_dim, spec.norm_eps, ops)
        self.pre_norm = ops.LayerNorm(dim, elementwise_affine=False, eps=spec.norm_eps)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(dim, False, ops)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, attn_mask: Tensor | None = None,
                transformer_options: Options = None) -> Tensor:
        mod, _ = modulation(self.modulation, vec, transformer_options, 0)
        fused = self.linear1(modulate(self.pre_norm, x, mod.shift, mod.scale))  # (B, L, 3 hidden + mlp)
        qkv, mlp = fused.split([3 * self.hidden_size, self.mlp_hidden_dim], dim=-1)
        q, k, v = split_heads(qkv, self.num_heads)
        q, k = self.norm(q, k, v)
        attn = self.attention(q, k, v, pe, attn_mask, transformer_options)
        return within_half(torch.addcmul(x, mod.gate, self.linear2(self._join(attn, mlp, fused))))

    def _join(self, attn: Tensor, mlp: Tensor, fused: Tensor) -> Tensor:
        """attn and the activated mlp side by side, `(B, L, hidden + mlp)`.

        Outside training both are put where v and the mlp lay in linear1's output, which nobody reads again: one copy
        of the smaller part instead of one of both, and no second buffer.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat((attn, self.mlp_act(mlp)), 2)
        torch.ops.aten.gelu_(mlp, approximate="tanh")
        fused[..., 2 * self.hidden_size:3 * self.hidden_size] = attn
        return fused[..., 2 * self.hidden_size:]


class LastLayer(nn.Module):
    def __init__(self, spec: FluxSpec, ops: Ops) -> None:
        super().__init__()
        dim = spec.hidden_size
        self.norm_final = ops.LayerNorm(dim, elementwise_affine=False, eps=spec.norm_eps)
        self.linear = ops.Linear(dim, spec.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor, *, transformer_options: Options = None) -> Tensor:
        row = None if transformer_options is None else row_of(transformer_options, vec, 0, self.adaLN_modulation[-1])
        row = self.adaLN_modulation(vec) if row is None else row
        shift, scale = row[:, None, :].chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm_final, x, shift, scale))
        return out
