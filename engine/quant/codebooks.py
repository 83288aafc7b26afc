"""The ggml formats that look groups of weights up in a codebook (IQ1 to IQ4).

The codebooks are read from the installed `gguf` package when first needed. As in `ggml`, each function takes blocks
`(n, bytes)` uint8 and returns `(n, weights)` fp32, equal to the reference bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import FluxKitError
from .ggml import QK_K, by_byte, half, looked_up, nibbles, scaled

DELTA = 0.125
"""By this much all weights of a group of IQ1 are shifted, up or down."""


class MissingCodebook(FluxKitError, ImportError):
    """The `gguf` package, which holds the codebooks of the IQ formats, is not installed or too old."""


@lru_cache(maxsize=64)
def _book(name: str, what: str, device: torch.device) -> Tensor:
    """`grid` `(entries, 4 or 8)`, `ksigns` `(128,)` or `kvalues` `(16,)` of the format `name`, fp32."""
    try:
        from gguf import quants
    except ImportError as error:
        raise MissingCodebook(f"weights stored as {name} need the codebook of the gguf package, which is not "
                              "installed. Run `pip install gguf`, or use a file of another type") from error
    try:
        source: Any = getattr(quants, name)
        if what == "grid":
            source.init_grid()
            values = torch.from_numpy(source.grid).view(*source.grid_shape)
        else:
            values = torch.tensor(list(getattr(source, what)))
    except AttributeError as error:
        raise MissingCodebook(f"weights stored as {name} need a codebook that the installed gguf package does not "
                              "have. Run `pip install -U gguf`, or use a file of another type") from error
    return values.to(torch.float32, copy=True).to(device)


def require(name: str) -> None:
    """Raises `MissingCodebook` unless weights of the format `name` can be unpacked here."""
    _book("IQ4_NL" if name == "IQ4_XS" else name, "kvalues" if name.startswith("IQ4") else "grid", torch.device("cpu"))
    if name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS"):
        _book("IQ2_XXS", "ksigns", torch.device("cpu"))


@lru_cache(maxsize=16)
def _byte_signs(device: torch.device) -> Tensor:
    """Byte -> eight signs, 1 or -1, lowest bit first, `(256, 8)`."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return 1 - 2 * (bits & 1).float()


@lru_cache(maxsize=16)
def _seven_bit_signs(device: torch.device) -> Tensor:
    """Seven bits -> eight signs, of which the last makes their product 1, `(128, 8)`."""
    return _byte_signs(device)[_book("IQ2_XXS", "ksigns", device).long()]


def _words(blocks: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    return blocks[:, begin:end].clone(memory_format=torch.contiguous_format).view(dtype)  # copied to be aligned


def _uint16(blocks: Tensor, begin: int, end: int) -> Tensor:
    return _words(blocks, begin, end, torch.int16).int() & 0xFFFF


def _shifted(words: Tensor, step: int, count: int) -> Tensor:
    """`(n, m)` -> `(n, m, count)`: every word shifted right by 0, `step`, 2 `step` ..."""
    return words[..., None] >> torch.arange(0, step * count, step, dtype=words.dtype, device=words.device)


def _levels(blocks: Tensor, begin: int, end: int) -> Tensor:
    """Four-bit scales, the lower first, `(n, 2 (end - begin))`."""
    return (_shifted(blocks[:, begin:end], 4, 2) & 15).reshape(blocks.shape[0], -1)


def _from_grid(name: str, index: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
    """Entries of the codebook times signs, times scales `(n, groups)`."""
    values = looked_up(_book(name, "grid", index.device), index)
    return scaled(values.view(index.shape[0], -1).mul_(signs.reshape(index.shape[0], -1)), scale)


def _scales_and_signs(words: Tensor) -> tuple[Tensor, Tensor]:
    """Of 32-bit words: `0.5 +` the upper four bits, and the signs of four groups of seven bits below them."""
    level = ((words >> 28) & 15).float().add_(0.5)
    return level, looked_up(_seven_bit_signs(words.device), _shifted(words, 7, 4) & 127)


def iq2_xxs(blocks: Tensor) -> Tensor:
    pairs = _words(blocks, 2, 66, torch.int32).view(-1, 8, 2)
    level, signs = _scales_and_signs(pairs[..., 1])
    index = pairs[..., 0].contiguous().view(torch.uint8)
    return _from_grid("IQ2_XXS", index, signs, half(blocks, 0) * level * 0.25)


def iq2_xs(blocks: Tensor) -> Tensor:
    words = _uint16(blocks, 2, 66)
    signs = looked_up(_seven_bit_signs(blocks.device), words >> 9)
    scale = half(blocks, 0) * _levels(blocks, 66, 74).float().add_(0.5) * 0.25
    return _from_grid("IQ2_XS", words & 511, signs, scale)


def iq2_s(blocks: Tensor) -> Tensor:
    high = (_shifted(blocks[:, 66:74], 2, 4) & 3).view(-1, 32).int()
    signs = looked_up(_byte_signs(blocks.device), blocks[:, 34:66])
    scale = half(blocks, 0) * _levels(blocks, 74, 82).float().add_(0.5) * 0.25
    return _from_grid("IQ2_S", blocks[:, 2:34] | (high << 8), signs, scale)


def iq3_xxs(blocks: Tensor) -> Tensor:
    level, signs = _scales_and_signs(_words(blocks, 66, 98, torch.int32))
    return _from_grid("IQ3_XXS", blocks[:, 2:66], signs, half(blocks, 0) * level * 0.5)


def iq3_s(blocks: Tensor) -> Tensor:
    high = (_shifted(blocks[:, 66:74], 1, 8) & 1).view(-1, 64).int()
    signs = looked_up(_byte_signs(blocks.device), blocks[:, 74:106])
    scale = half(blocks, 0) * (2 * _levels(blocks, 106, 110) + 1)
    return _from_grid("IQ3_S", blocks[:, 2:66] | (high << 8), signs, scale)


@lru_cache(maxsize=16)
def _shifted_grid(name: str, device: torch.device) -> Tensor:
    """The codebook shifted up, and below it shifted down, `(2 * 2048, 8)`."""
    grid = _book(name, "grid", device)
    return torch.cat([grid + DELTA, grid - DELTA])


def _from_shifted_grid(name: str, blocks: Tensor, tops: Tensor, scale: Tensor) -> Tensor:
    """Entries of eight times scales. An index is a byte of `blocks`, three bits above it, and one that says which way
    the group is shifted: these four are `tops`."""
    values = looked_up(_shifted_grid(name, blocks.device), blocks | (tops << 8))
    return scaled(values.view(blocks.shape[0], -1), scale)


def iq1_s(blocks: Tensor) -> Tensor:
    words = _uint16(blocks, 34, 50)
    tops = (_shifted(words, 3, 4) & 7) | ((words >> 12) & 8)[..., None]
    scale = half(blocks, 0) * (2 * ((words >> 12) & 7) + 1)
    return _from_shifted_grid("IQ1_S", blocks[:, 2:34], tops.view(-1, 32), scale)


def iq1_m_scale(blocks: Tensor) -> Tensor:
    bits = (_uint16(blocks, 48, 56) >> 12) << torch.arange(0, 16, 4, device=blocks.device, dtype=torch.int32)
    return bits.sum(1, keepdim=True).short().view(torch.float16).float()


def iq1_m(blocks: Tensor) -> Tensor:
    """The fp16 scale lies in the upper four bits of four words, which hold the scales of the groups below them."""
    words = _uint16(blocks, 48, 56)
    scale = iq1_m_scale(blocks) * (2 * (_shifted(words, 3, 4) & 7).view(-1, 16) + 1)
    return _from_shifted_grid("IQ1_M", blocks[:, :32], _levels(blocks, 32, 48).int(), scale)


@lru_cache(maxsize=16)
def _iq4_values(device: torch.device) -> tuple[Tensor, Tensor]:
    return by_byte(_book("IQ4_NL", "kvalues", device))


def iq4_nl(blocks: Tensor) -> Tensor:
    values = nibbles(_iq4_values(blocks.device), blocks[:, 2:]).view(-1, 32)
    return values.mul_(half(blocks, 0))


def iq4_xs(blocks: Tensor) -> Tensor:
    high = (_shifted(_uint16(blocks, 2, 4), 2, 8) & 3).view(-1, 8)
    scale = half(blocks, 0) * ((_levels(blocks, 4, 8) | (high << 4)) - 32)
    values = nibbles(_iq4_values(blocks.device), blocks[:, 8:].reshape(-1, 16)).view(-1, QK_K)
    return scaled(values, scale)
