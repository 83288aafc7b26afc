"""The block formats of ggml, each as one pure function: blocks `(n, bytes)` uint8 -> values `(n, weights)` fp32.

Sources: ggml-common.h (layout of a block) and ggml-quants.c (`dequantize_row_*`) of ggml-org/ggml. Every product and
sum is rounded where the reference rounds it, so the values are the same bit for bit. Codes are unpacked as whole bytes,
scales as small tables: what touches each weight as a float is one conversion and one or two operations.

A block is read as 16- and 32-bit words in place, so the bytes must start at a multiple of 4 in memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

QK_K = 256
"""Weights in a block of a K type."""
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of a 4-bit float (OCP Microscaling Formats 1.0, table 5), as integers."""


def half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of every block, `(n, 1)` fp32."""
    return blocks.view(torch.float16)[:, at // 2:at // 2 + 1].float()


def planes(codes: Tensor, bits: int) -> Tensor:
    """Codes `(n, m)` of `bits` bits -> `(n, 8 / bits, m)` uint8: first the lowest bits of all bytes, then the next."""
    mask = (1 << bits) - 1
    return torch.stack([(codes >> shift) & mask for shift in range(0, 8, bits)], 1)


def signed(codes: Tensor, offset: int) -> Tensor:
    """`codes - offset` as int8, in place."""
    return codes.sub_(offset).view(torch.int8)


@lru_cache(maxsize=16)
def _e2m1(device: torch.device) -> tuple[Tensor, Tensor]:
    return by_byte(torch.tensor(E2M1_DOUBLED, dtype=torch.float32, device=device))


def looked_up(values: Tensor, codes: Tensor) -> Tensor:
    """Rows of `values` by code; one byte or two, the result has `codes`' shape and the rows' below it."""
    return values.index_select(0, codes.reshape(-1).int()).view(*codes.shape, *values.shape[1:])


def by_byte(values: Tensor) -> tuple[Tensor, Tensor]:
    """A table of 16 as two of 256: by the lower four bits of a byte, and by the upper ones."""
    return values.repeat(16), values.repeat_interleave(16)


def nibbles(tables: tuple[Tensor, Tensor], codes: Tensor) -> Tensor:
    """Codes `(n, m)` of four bits -> values `(n, 2, m)` of tables by `by_byte`: the lower four bits of all bytes first.

    Faster than to take the bits apart: a byte is widened to an index once, not twice.
    """
    index = codes.reshape(-1).int()
    return torch.stack([table.index_select(0, index).view(codes.shape) for table in tables], 1)


def scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """`codes` `(n, m)` times scales `(n, groups)`, each of `m / groups` neighbours."""
    values = codes.reshape(*scale.shape, -1).float()
    return values.mul_(scale[..., None]).view(scale.shape[0], -1)


def q4_0(blocks: Tensor) -> Tensor:
    return scaled(signed(planes(blocks[:, 2:].contiguous(), 4), 8), half(blocks, 0))


def q4_1(blocks: Tensor) -> Tensor:
    return scaled(planes(blocks[:, 4:].contiguous(), 4), half(blocks, 0)).add_(half(blocks, 2))


@lru_cache(maxsize=16)
def _spread_bits(device: torch.device) -> Tensor:
    """Byte -> its eight bits, lowest first, as bytes 0 or 16: `(256,)` int64."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return ((bits & 1) << 4).to(torch.uint8).view(torch.int64).view(-1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """The 32 bits at byte `at` as bytes 0 or 16, `(n, 2, 16)`."""
    return looked_up(_spread_bits(blocks.device), blocks[:, at:at + 4]).view(torch.uint8).view(-1, 2, 16)


def q5_0(blocks: Tensor) -> Tensor:
    codes = planes(blocks[:, 6:].contiguous(), 4).bitwise_or_(_fifth_bits(blocks, 2))
    return scaled(signed(codes, 16), half(blocks, 0))


def q5_1(blocks: Tensor) -> Tensor:
    codes = planes(blocks[:, 8:].contiguous(), 4).bitwise_or_(_fifth_bits(blocks, 4))
    return scaled(codes, half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: Tensor) -> Tensor:
    return blocks.view(torch.int8).float()[:, 2:] * half(blocks, 0)


def q2_k(blocks: Tensor) -> Tensor:
    levels = blocks[:, :16]
    scale, low = half(blocks, 80) * (levels & 15), half(blocks, 82) * (levels >> 4)
    codes = planes(blocks[:, 16:80].reshape(-1, 32), 2)
    return scaled(codes.view(-1, QK_K), scale).view(-1, 16, 16).sub_(low[..., None]).view(-1, QK_K)


def q3_k(blocks: Tensor) -> Tensor:
    low, high = planes(blocks[:, 96:104], 4).view(-1, 16), planes(blocks[:, 104:108], 2).view(-1, 16)
    scale = half(blocks, 108) * signed(low.bitwise_or_(high << 4), 32)
    top = planes(blocks[:, :32].contiguous(), 1).bitwise_left_shift_(2)  # 4 where nothing is taken away
    codes = planes(blocks[:, 32:96].reshape(-1, 32), 2).view(-1, 8, 32).bitwise_or_(top)
    return scaled(signed(codes, 4).view(-1, QK_K), scale)


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima `(n, 8)` fp32 of Q4_K and Q5_K: six bits each in twelve bytes, here three words of four bytes.

    a and b hold the six bits of groups 0 to 3 and, on top, the upper two of groups 4 to 7; c the lower four of those.
    """
    a, b, c = blocks.view(torch.int32)[:, 1:4].unbind(1)
    six, four, two = 0x3F3F3F3F, 0x0F0F0F0F, 0x30303030
    words = (a & six, (c & four) | ((a >> 2) & two), b & six, ((c >> 4) & four) | ((b >> 2) & two))
    levels = torch.stack(words, 1).view(torch.uint8)  # (n, 16)
    return half(blocks, 0) * levels[:, :8], half(blocks, 2) * levels[:, 8:]


def _scaled_above(codes: Tensor, blocks: Tensor) -> Tensor:
    scale, low = _scales_and_mins(blocks)
    return scaled(codes.view(-1, QK_K), scale).view(-1, 8, 32).sub_(low[..., None]).view(-1, QK_K)


def q4_k(blocks: Tensor) -> Tensor:
    return _scaled_above(planes(blocks[:, 16:].reshape(-1, 32), 4), blocks)


def q5_k(blocks: Tensor) -> Tensor:
    top = planes(blocks[:, 16:48].contiguous(), 1).bitwise_left_shift_(4)
    codes = planes(blocks[:, 48:].reshape(-1, 32), 4).view(-1, 8, 32)
    return _scaled_above(codes.bitwise_or_(top), blocks)


def q6_k(blocks: Tensor) -> Tensor:
    low = planes(blocks[:, :128].reshape(-1, 64), 4).view(-1, 4, 32)
    high = planes(blocks[:, 128:192].reshape(-1, 32), 2).bitwise_left_shift_(4)
    scale = half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    return scaled(signed(low.bitwise_or_(high), 32).view(-1, QK_K), scale)


def q8_k(blocks: Tensor) -> Tensor:
    """The type that llama.cpp rounds activations to; its last 32 bytes are sums of 16 codes each."""
    return blocks.view(torch.int8)[:, 4:4 + QK_K].float() * blocks.view(torch.float32)[:, :1]


def tq1_0(blocks: Tensor) -> Tensor:
    """Five numbers of -1, 0, 1 in a byte, as a fraction of 256 in base 3: times 3 the next number comes to the top."""
    parts = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    codes = torch.cat([(part * 3**i) for part, count in parts for i in range(count)], 1)
    return scaled(((codes.short() * 3) >> 8).sub_(1), half(blocks, 52))


def tq2_0(blocks: Tensor) -> Tensor:
    codes = planes(blocks[:, :64].reshape(-1, 32), 2)
    return scaled(signed(codes, 1).view(-1, QK_K), half(blocks, 64))


def mxfp4(blocks: Tensor) -> Tensor:
    exponent = blocks[:, :1].int()
    # half of 2^(e - 127): below 2 it is no normal number any more
    bits = torch.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
    values = nibbles(_e2m1(blocks.device), blocks[:, 1:]).view(-1, 32)
    return values.mul_(bits.view(torch.float32))


@lru_cache(maxsize=16)
def _halved_e4m3(device: torch.device) -> Tensor:
    """Byte -> half the float of 4 + 3 bits in its lower seven, `(256,)`; 0x7F is none and counts as 0."""
    byte = torch.arange(256, dtype=torch.int32, device=device)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).float()
    values = torch.where(exponent == 0, mantissa * 2.0**-10, torch.ldexp(1 + mantissa / 8, exponent - 8))
    return values.masked_fill(byte == 0x7F, 0)


def nvfp4(blocks: Tensor) -> Tensor:
    """Four scales, each for 16 weights; within these the lower four bits of eight bytes come first."""
    values = nibbles(_e2m1(blocks.device), blocks[:, 4:].reshape(-1, 8)).view(-1, 64)
    return scaled(values, looked_up(_halved_e4m3(blocks.device), blocks[:, :4]))
