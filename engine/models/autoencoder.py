"""The 16-channel autoencoder of FLUX.1, with BFL's module names (black-forest-labs/flux, modules/autoencoder.py).

Latents here are raw: the model's latents are `scale_factor * (raw - shift_factor)` of the spec
(`engine.sampling.latents`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..specs import GROUP_NORM_EPS, GROUP_NORM_GROUPS, AutoencoderSpec
from .ops import PLAIN, Ops


def _norm(channels: int, ops: Ops) -> nn.GroupNorm:
    norm: nn.GroupNorm = ops.GroupNorm(GROUP_NORM_GROUPS, channels, eps=GROUP_NORM_EPS)
    return norm


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x), in place where nothing is being trained."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class AttnBlock(nn.Module):
    """One-head attention over all positions of the bottleneck."""

    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self.norm = _norm(channels, ops)
        self.q = ops.Conv2d(channels, channels, 1)
        self.k = ops.Conv2d(channels, channels, 1)
        self.v = ops.Conv2d(channels, channels, 1)
        self.proj_out = ops.Conv2d(channels, channels, 1)
        self.attention = ops.attention

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, 1, H*W, C), contiguous: kernels that need no (H*W)^2 memory refuse strided channels
        q, k, v = (layer(h).flatten(2).mT.contiguous()[:, None] for layer in (self.q, self.k, self.v))
        out: Tensor = self.proj_out(self.attention(q, k, v).mT.reshape(x.shape))  # attention gives (B, H*W, C)
        return x + out


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, ops: Ops) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, ops)
        self.conv1 = ops.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, ops)
        self.conv2 = ops.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = ops.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(swish(self.norm1(x)))
        h = self.norm2(h)
        h = self.conv2(swish(h))
        shortcut: Tensor = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return h + shortcut


class Downsample(nn.Module):
    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))  # pads right and bottom only
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """One resolution: residual blocks, then a change of resolution unless it is the last."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, ops: Ops) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, ops) for i in range(blocks))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def layers(self) -> list[nn.Module]:
        """Run by the caller one after the other: a `forward` here would keep its caller's input alive to the end, which
        at 2048 x 2048 is 2 GB."""
        changes = (self.downsample, self.upsample)
        return [*self.block, *(change for change in changes if change is not None)]


class Mid(nn.Module):
    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, ops)
        self.attn_1 = AttnBlock(channels, ops)
        self.block_2 = ResnetBlock(channels, channels, ops)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    def __init__(self, spec: AutoencoderSpec, ops: Ops) -> None:
        super().__init__()
        widths = [spec.ch * m for m in spec.ch_mult]
        self.conv_in = ops.Conv2d(spec.in_channels, spec.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(spec.ch if i == 0 else widths[i - 1], width, spec.num_res_blocks, ops)
            if i != len(widths) - 1:
                level.downsample = Downsample(width, ops)
            self.down.append(level)
        self.mid = Mid(widths[-1], ops)
        self.norm_out = _norm(widths[-1], ops)
        self.conv_out = ops.Conv2d(widths[-1], 2 * spec.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            assert isinstance(level, Level)
            for layer in level.layers():
                h = layer(h)
        out: Tensor = self.conv_out(swish(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    def __init__(self, spec: AutoencoderSpec, ops: Ops) -> None:
        super().__init__()
        widths = [spec.ch * m for m in spec.ch_mult]
        self.conv_in = ops.Conv2d(spec.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], ops)
        levels: list[Level] = []
        for i in reversed(range(len(widths))):
            level = Level(widths[min(i + 1, len(widths) - 1)], widths[i], spec.num_res_blocks + 1, ops)
            if i != 0:
                level.upsample = Upsample(widths[i], ops)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)  # up[0] is the full resolution, run last
        self.norm_out = _norm(widths[0], ops)
        self.conv_out = ops.Conv2d(widths[0], spec.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            assert isinstance(level, Level)
            for layer in level.layers():
                h = layer(h)
        out: Tensor = self.conv_out(swish(self.norm_out(h)))
        return out


class Autoencoder(nn.Module):
    """Pixels `(B, 3, H, W)` in -1..1 <-> raw latents `(B, 16, H/8, W/8)`."""

    def __init__(self, spec: AutoencoderSpec, ops: Ops = PLAIN) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec, ops)
        self.decoder = Decoder(spec, ops)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each `(B, 16, H/8, W/8)`."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """The posterior mean, as ComfyUI takes it; BFL and diffusers sample in places."""
        return self.moments(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents to pixels; values may leave -1..1 a little."""
        out: Tensor = self.decoder(z)
        return out
