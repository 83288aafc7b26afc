"""Every stored type, bit for bit against gguf-py and torch's own casts."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from flux_kit.engine.quant import FORMATS, MissingCodebook, codebooks, formats
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf_files import GGML, random_blocks, unpack
from torch import Tensor

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
HALVES = {"zero": 0, "minus zero": 0x8000, "smallest": 1, "largest": 0x7BFF, "most negative": 0xFBFF}


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


@pytest.mark.parametrize("name", GGML)
def test_sizes_are_gguf_s(name: str) -> None:
    assert GGML_QUANT_SIZES[Type[name]] == (FORMATS[name].block, FORMATS[name].nbytes)


def test_no_type_that_gguf_can_unpack_is_left_out() -> None:
    from gguf import quants

    known = {type.name for type in quants._type_traits} | {"F32", "F16"}
    assert known == set(GGML)


@pytest.mark.parametrize("name", GGML)
def test_random_blocks_are_equal_bit_for_bit(name: str) -> None:
    packed = random_blocks(name, 600, 1024, high=6e4)
    before = packed.copy()
    ours = FORMATS[name].dequantize(torch.from_numpy(packed))
    theirs = unpack(packed, name)
    if name not in ("F32", "F16", "BF16"):
        assert torch.isfinite(theirs).all()
        assert theirs.unique().numel() > 2
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape == (600, 1024)
    assert torch.equal(bits(ours.nan_to_num()), bits(theirs.nan_to_num()))
    assert np.array_equal(packed, before)  # pure


@pytest.mark.parametrize("name", GGML)
def test_one_block_alone_and_inside_others(name: str) -> None:
    format = FORMATS[name]
    packed = random_blocks(name, 3, 256).reshape(-1, format.nbytes)
    ours = [format.dequantize(torch.from_numpy(packed)[i:i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(ours).nan_to_num(), unpack(packed[:3], name).nan_to_num())


@pytest.mark.parametrize("half", sorted(HALVES))
@pytest.mark.parametrize("byte", [0, 0x0F, 0x55, 0x80, 0xFF])
@pytest.mark.parametrize("name", [name for name in GGML if FORMATS[name].block > 1])
def test_extremes(name: str, byte: int, half: str) -> None:
    format = FORMATS[name]
    blocks = np.full((7, format.nbytes), byte, dtype=np.uint8)
    for at in format.halves:
        blocks[:, at:at + 2] = np.frombuffer(HALVES[half].to_bytes(2, "little"), np.uint8)
    ours, theirs = format.dequantize(torch.from_numpy(blocks)), unpack(blocks, name)
    assert torch.equal(bits(ours.nan_to_num(nan=7)), bits(theirs.nan_to_num(nan=7)))
    assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_scale_of_the_microscaling_types(name: str) -> None:
    blocks = random_blocks(name, 256, 64).reshape(-1, FORMATS[name].nbytes)[:256]
    blocks[:, :4 if name == "NVFP4" else 1] = np.arange(256, dtype=np.uint8)[:, None]
    ours = FORMATS[name].dequantize(torch.from_numpy(blocks))
    assert torch.equal(bits(ours), bits(unpack(blocks, name)))


def test_every_byte_of_tq1_0() -> None:
    blocks = np.full((256, 54), 0, dtype=np.uint8)
    blocks[:, :52], blocks[:, 52:] = np.arange(256, dtype=np.uint8)[:, None], np.float16([1]).view(np.uint8)
    assert torch.equal(bits(FORMATS["TQ1_0"].dequantize(torch.from_numpy(blocks))), bits(unpack(blocks, "TQ1_0")))


def test_q8_k_is_code_times_scale() -> None:
    """gguf-py has no function for it; ggml's is one product a weight."""
    rng = np.random.default_rng(1)
    scale, codes = rng.normal(size=(5, 1)).astype(np.float32), rng.integers(-128, 128, (5, 256)).astype(np.int8)
    sums = rng.integers(0, 255, (5, 32), dtype=np.uint8)
    packed = np.concatenate([scale.view(np.uint8), codes.view(np.uint8), sums], 1)
    assert FORMATS["Q8_K"].nbytes == packed.shape[1]
    assert torch.equal(FORMATS["Q8_K"].dequantize(torch.from_numpy(packed)), torch.from_numpy(scale * codes))


@pytest.mark.parametrize("name", sorted(FP8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp8_is_torch_s_cast_for_every_code(name: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    ours, theirs = FORMATS[name].dequantize(codes, dtype), codes.view(FP8[name]).to(dtype)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(nan=0).view(torch.uint8), theirs.nan_to_num(nan=0).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q3_K", "IQ3_S"])
def test_other_dtypes_are_the_exact_numbers_rounded_once(name: str, dtype: torch.dtype) -> None:
    packed = random_blocks(name, 9, 1024)
    assert torch.equal(FORMATS[name].dequantize(torch.from_numpy(packed), dtype), unpack(packed, name).to(dtype))


@pytest.mark.parametrize("tile", [1, 256, 1000, 4096])
@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q6_K", "F8_E4M3"])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str, tile: int) -> None:
    packed = torch.from_numpy(random_blocks(name, 11, 512)).view(11, -1)
    scales = torch.rand(11, 1)
    whole, whole_scaled = FORMATS[name].dequantize(packed), FORMATS[name].dequantize(packed, scale=scales)
    monkeypatch.setitem(formats.TILE_WEIGHTS, "cpu", tile)
    assert torch.equal(FORMATS[name].dequantize(packed).nan_to_num(), whole.nan_to_num())
    out = torch.empty(11, 512)
    assert FORMATS[name].dequantize(packed, out=out, scale=scales) is out
    assert torch.equal(out.nan_to_num(), whole_scaled.nan_to_num())
    assert torch.equal(whole_scaled.nan_to_num(), (whole * scales).nan_to_num())


def test_any_shape_and_strides() -> None:
    packed = torch.from_numpy(random_blocks("Q4_0", 24, 64))
    whole = FORMATS["Q4_0"].dequantize(packed)
    assert torch.equal(FORMATS["Q4_0"].dequantize(packed.view(2, 3, 4, -1)), whole.view(2, 3, 4, 64))
    assert torch.equal(FORMATS["Q4_0"].dequantize(packed[3]), whole[3])
    assert torch.equal(FORMATS["Q4_0"].dequantize(packed[1::2, :18]), whole[1::2, :32])
    assert FORMATS["Q4_0"].dequantize(packed[:0]).shape == (0, 64)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"40 weights .* 32 in a block of Q8_0"):
        FORMATS["Q8_0"].row_bytes(40)
    with pytest.raises(ValueError, match=r"35 bytes .* 34 in a block of Q8_0"):
        FORMATS["Q8_0"].dequantize(torch.zeros(2, 35, dtype=torch.uint8))
    assert FORMATS["Q4_K"].width(FORMATS["Q4_K"].row_bytes(3072)) == 3072


@pytest.mark.parametrize("bad", [0x7C00, 0xFC00, 0x7E01], ids=["inf", "-inf", "nan"])
@pytest.mark.parametrize("name", [name for name in GGML if FORMATS[name].halves])
def test_scales_that_are_no_numbers_are_found(name: str, bad: int) -> None:
    format = FORMATS[name]
    good = torch.from_numpy(random_blocks(name, 5, 1024, high=6e4))
    assert format.is_finite(good)
    for at in format.halves:
        packed = good.clone().view(-1, format.nbytes)
        packed[-1, at:at + 2] = torch.tensor([bad & 255, bad >> 8], dtype=torch.uint8)
        assert not format.is_finite(packed)
        assert not torch.isfinite(format.dequantize(packed)).all()


@pytest.fixture
def without_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in vars(codebooks).values():
        if hasattr(made, "cache_clear"):
            made.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)


@pytest.mark.usefixtures("without_gguf")
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_without_the_gguf_package_only_codebooks_are_missing(name: str) -> None:
    format = FORMATS[name]
    packed = torch.zeros(1, format.nbytes, dtype=torch.uint8)
    assert format.codebook == name.startswith("IQ")
    if not format.codebook:
        format.require()
        assert format.dequantize(packed).shape == (1, format.block)
        return
    with pytest.raises(MissingCodebook, match=rf"{name[:3]}.*pip install gguf"):
        format.require()
    with pytest.raises(MissingCodebook):
        format.dequantize(packed)
