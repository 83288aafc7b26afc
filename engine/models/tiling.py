"""Decoding in strips: the same picture as `Autoencoder.decode`, in less than half its memory and without seams.

Usual tiling decodes overlapping squares and blends them; every square normalises itself by its own statistics, which
shows as shifts of colour. Here nothing is approximated. The bottleneck is computed whole. Above it every GroupNorm
takes the statistics of the whole map, gathered strip by strip; convolutions run on strips of full width with one row
more on either side, and a residual block writes its answer over its own intermediate result. The widest map of all, the
one after the last upsampling, is never stored but computed three times (for statistics, convolution and shortcut),
about a quarter more work in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import Autoencoder, Decoder, Level, ResnetBlock, Upsample

ROWS = 64
"""Rows of a strip. Fewer save memory; each strip computes two rows more than it keeps."""

ReadRows = Callable[[int, int], Tensor]


class Map(Protocol):
    """A feature map `(B, C, height, W)` that is read by rows `first..last-1`."""

    @property
    def height(self) -> int: ...

    def rows(self, first: int, last: int) -> Tensor: ...


@dataclass(frozen=True)
class Stored:
    tensor: Tensor

    @property
    def height(self) -> int:
        return self.tensor.shape[2]

    def rows(self, first: int, last: int) -> Tensor:
        return self.tensor[:, :, first:last]


@dataclass(frozen=True)
class Upsampled:
    """What `layer` makes of `tensor`, computed when it is read."""

    layer: Upsample
    tensor: Tensor

    @property
    def height(self) -> int:
        return 2 * self.tensor.shape[2]

    def rows(self, first: int, last: int) -> Tensor:
        return _convolved(self.layer.conv, self._doubled, self.height, first, last)

    def _doubled(self, first: int, last: int) -> Tensor:
        source = self.tensor[:, :, first // 2:(last + 1) // 2]
        twice = F.interpolate(source, scale_factor=2.0, mode="nearest")
        return twice[:, :, first % 2:first % 2 + last - first]


@torch.no_grad()
def decode_tiled(autoencoder: Autoencoder, z: Tensor, *, rows: int = ROWS) -> Tensor:
    """Raw latents `(B, 16, h, w)` to pixels `(B, 3, 8h, 8w)`, one picture after the other, in strips of `rows` rows.

    Differs from `autoencoder.decode(z)` by rounding alone. ValueError: `rows` below 1.
    """
    if rows < 1:
        raise ValueError(f"a strip needs at least 1 row, not {rows}")
    return torch.cat([_decode(autoencoder.decoder, one, rows) for one in z.split(1)])


def _decode(decoder: Decoder, z: Tensor, rows: int) -> Tensor:
    x: Map = Stored(decoder.mid(decoder.conv_in(z)))
    for level in reversed(decoder.up):
        assert isinstance(level, Level)
        for block in level.block:
            assert isinstance(block, ResnetBlock)
            x = Stored(_resnet(block, x, rows))
        if level.upsample is not None:
            assert isinstance(x, Stored)
            x = Upsampled(level.upsample, x.tensor)
            if level is not decoder.up[1]:
                x = Stored(_written(x, rows))
    norm = _whole_norm(decoder.norm_out, x, rows)
    last = [_convolved(decoder.conv_out, lambda a, b: norm(x.rows(a, b)), x.height, a, b)
            for a, b in _strips(x.height, rows)]
    return torch.cat(last, dim=2)


def _strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + rows, height)) for first in range(0, height, rows))


def _convolved(conv: nn.Module, read: ReadRows, height: int, first: int, last: int) -> Tensor:
    """Rows of a 3x3 convolution. The layer pads with zeros all round: right at the edges of the map, and elsewhere in
    the two rows that are cut off again."""
    above, below = max(first - 1, 0), min(last + 1, height)
    out: Tensor = conv(read(above, below))
    return out[:, :, first - above:last - above]


def _written(source: Map, rows: int) -> Tensor:
    out: Tensor | None = None
    for first, last in _strips(source.height, rows):
        part = source.rows(first, last)
        if out is None:
            out = part.new_empty(*part.shape[:2], source.height, part.shape[3])
        out[:, :, first:last] = part
    assert out is not None
    return out


def _resnet(block: ResnetBlock, x: Map, rows: int) -> Tensor:
    """The block's answer for the whole map; needs memory for one map of its output besides `x`."""
    norm = _whole_norm(block.norm1, x, rows)
    h: Tensor | None = None
    for first, last in _strips(x.height, rows):
        part = _convolved(block.conv1, lambda a, b: norm(x.rows(a, b)), x.height, first, last)
        if h is None:
            h = part.new_empty(*part.shape[:2], x.height, part.shape[3])
        h[:, :, first:last] = part
    assert h is not None
    return _second_half(block, x, h, rows)


def _second_half(block: ResnetBlock, x: Map, h: Tensor, rows: int) -> Tensor:
    """x + conv2(norm2(h)), written over h; the row of h above a strip is kept as it was before it was written over."""
    norm = _whole_norm(block.norm2, Stored(h), rows)
    above = h[:, :, :0]
    for first, last in _strips(x.height, rows):
        def read(a: int, b: int, first: int = first, above: Tensor = above) -> Tensor:
            return norm(torch.cat((above, h[:, :, first:b]), dim=2))

        part = _convolved(block.conv2, read, x.height, first, last)
        above = h[:, :, last - 1:last].clone()
        shortcut = x.rows(first, last)
        if block.nin_shortcut is not None:
            shortcut = block.nin_shortcut(shortcut)
        torch.add(part, shortcut, out=h[:, :, first:last])
    return h


def _whole_norm(norm: nn.GroupNorm, x: Map, rows: int) -> Callable[[Tensor], Tensor]:
    """Swish of GroupNorm by the statistics of the whole map, for any rows of it.

    Strips' means and squared deviations are joined by Chan's formula in fp32: no float64, which some devices lack, and
    no difference of large sums.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())  # (B, groups)
    for first, last in _strips(x.height, rows):
        part = x.rows(first, last).float().unflatten(1, (norm.num_groups, -1)).flatten(2)  # (B, groups, N)
        var, middle = torch.var_mean(part, dim=2, correction=0)
        size = part.shape[2]
        if count == 0:
            count, mean, squares = size, middle, var * size
            continue
        delta = middle - mean
        total = count + size
        mean = mean + delta * (size / total)
        squares = squares + var * size + delta.square() * (count * (size / total))
        count = total
    scale = torch.rsqrt(squares / count + norm.eps)
    weight, bias = (p.to(mean.device, torch.float32).unflatten(0, (norm.num_groups, -1))
                    for p in (norm.weight, norm.bias))  # (groups, C / groups)
    scale = scale[..., None] * weight  # (B, groups, C / groups)
    shift = bias - mean[..., None] * scale
    scale, shift = (t.flatten(1)[:, :, None, None] for t in (scale, shift))  # (B, C, 1, 1)

    def apply(part: Tensor) -> Tensor:
        return F.silu(torch.addcmul(shift, part.float(), scale), inplace=True).to(part.dtype)

    return apply
