"""Packed layers: the numbers of the unpacked ones, and what torch's module machinery does to them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import relative
from flux_kit.engine.models.ops import PLAIN
from flux_kit.engine.quant import FORMATS, Embedding, Linear, QuantFormat, ops, packed_like
from gguf_files import unpack, weight_blocks
from torch import Tensor

ROWS, WIDTH = 96, 512
NAMES = ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "IQ2_XXS", "MXFP4"]


def linear(name: str, bias: bool = True, format: QuantFormat | None = None, **options: Any) -> tuple[Linear, Tensor]:
    """A packed layer of random blocks and gguf-py's numbers of them."""
    packed = weight_blocks(name, ROWS, WIDTH)
    layer = Linear(WIDTH, ROWS, bias, format=format or FORMATS[name], **options)
    layer.weight.data = torch.from_numpy(packed)
    if bias:
        layer.bias.data = torch.randn(ROWS)
    return layer, unpack(packed, name)


@pytest.mark.parametrize("tile", [1, 5 * WIDTH, 1 << 21], ids=["row", "5 rows", "whole"])
@pytest.mark.parametrize("name", NAMES)
def test_a_packed_product_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, name: str, tile: int) -> None:
    monkeypatch.setattr(ops, "LINEAR_TILE_WEIGHTS", tile)
    layer, weight = linear(name)
    x = torch.randn(2, 7, WIDTH)
    ours, theirs = layer(x), F.linear(x, weight, layer.bias)
    assert ours.shape == (2, 7, ROWS)
    # each output is one sum of WIDTH products: two orders of adding differ by 2 * WIDTH roundings at most
    bound = 2 * WIDTH * torch.finfo(torch.float32).eps * F.linear(x.abs(), weight.abs(), layer.bias.abs())
    assert ((ours - theirs).abs() <= bound).all()
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", [8 * WIDTH, 1 << 21], ids=["8 rows", "whole"])
def test_it_computes_in_the_dtype_of_its_input(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tile: int) -> None:
    monkeypatch.setattr(ops, "LINEAR_TILE_WEIGHTS", tile)
    layer, weight = linear("Q4_K")
    x = torch.randn(33, WIDTH, dtype=dtype)
    ours, theirs = layer(x), F.linear(x, weight.to(dtype), layer.bias.to(dtype))
    assert ours.dtype == dtype
    assert relative(ours, theirs) < torch.finfo(dtype).eps


def test_shapes_at_the_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LINEAR_TILE_WEIGHTS", 40 * WIDTH)
    layer, weight = linear("Q8_0", bias=False)
    assert layer(torch.zeros(0, WIDTH)).shape == (0, ROWS)
    assert layer(torch.zeros(3, 0, WIDTH)).shape == (3, 0, ROWS)
    one = torch.randn(WIDTH)
    assert relative(layer(one), F.linear(one, weight)) < 1e-6
    strided = torch.randn(4, WIDTH, 5).transpose(1, 2)
    assert relative(layer(strided), F.linear(strided, weight)) < 1e-6


def counting(format: QuantFormat, calls: list[int]) -> QuantFormat:
    def unpack(blocks: Tensor) -> Tensor:
        calls.append(len(blocks) * format.block)
        return format.unpack(blocks)

    return replace(format, unpack=unpack)


def test_no_more_than_a_tile_is_unpacked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LINEAR_TILE_WEIGHTS", 16 * WIDTH)
    calls: list[int] = []
    layer, _ = linear("Q4_0", format=counting(FORMATS["Q4_0"], calls))
    layer(torch.randn(3, WIDTH))
    assert calls == [16 * WIDTH] * (ROWS // 16)


@pytest.mark.parametrize("scale", [torch.tensor(0.37), torch.rand(ROWS, 1)], ids=["one", "per row"])
def test_scales(monkeypatch: pytest.MonkeyPatch, scale: Tensor) -> None:
    monkeypatch.setattr(ops, "LINEAR_TILE_WEIGHTS", 7 * WIDTH)
    codes = torch.randn(ROWS, WIDTH).to(torch.float8_e4m3fn)
    layer = Linear(WIDTH, ROWS, False, format=FORMATS["F8_E4M3"], scale=tuple(scale.shape))
    layer.load_state_dict({"weight": codes.view(torch.uint8), "scale_weight": scale}, assign=True)
    x = torch.randn(9, WIDTH)
    assert relative(layer(x), F.linear(x, codes.float() * scale)) < 1e-6
    table = Embedding(ROWS, WIDTH, format=FORMATS["F8_E4M3"], scale=tuple(scale.shape))
    table.load_state_dict({"weight": codes.view(torch.uint8), "scale_weight": scale}, assign=True)
    ids = torch.tensor([[3, 95], [0, 3]])
    assert torch.equal(table(ids), F.embedding(ids, codes.float() * scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_an_embedding_unpacks_the_rows_it_gathers(name: str, dtype: torch.dtype) -> None:
    calls: list[int] = []
    packed = weight_blocks(name, ROWS, WIDTH)
    table = Embedding(ROWS, WIDTH, format=counting(FORMATS[name], calls), dtype=dtype)
    table.weight.data = torch.from_numpy(packed)
    ids = torch.tensor([[5, 0, 95], [5, 5, 17]])
    assert torch.equal(table(ids), F.embedding(ids, unpack(packed, name)).to(dtype))
    assert sum(calls) == 6 * WIDTH
    with pytest.raises(IndexError):
        table(torch.tensor([ROWS]))


def test_parameters_are_the_packed_bytes() -> None:
    layer, weight = linear("Q4_K")
    assert {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in layer.named_parameters()} == {
        "weight": (torch.uint8, (ROWS, WIDTH // 256 * 144)), "bias": (torch.float32, (ROWS,))}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert (layer.in_features, layer.out_features) == (WIDTH, ROWS)
    assert sum(parameter.nbytes for parameter in layer.parameters()) == ROWS * (288 + 4)
    assert "Q4_K" in repr(layer)
    assert weight.shape == (ROWS, WIDTH)


def test_casts_of_the_module_leave_bytes_and_scales_alone() -> None:
    layer = Linear(WIDTH, ROWS, format=FORMATS["F8_E5M2"], scale=())
    layer.scale_weight.data = torch.tensor(1 / 3)
    layer.weight.data.fill_(7)
    for moved in (copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).half()):
        assert moved.weight.dtype == torch.uint8
        assert moved.bias.dtype != torch.float32
        assert moved.scale_weight.dtype == torch.float32
        assert moved.scale_weight == torch.tensor(1 / 3)
        assert not any(parameter.requires_grad for parameter in moved.parameters())
    assert layer.to("meta").scale_weight.is_meta


def test_a_copy_and_a_state_dict_give_the_same_numbers() -> None:
    layer, _ = linear("Q6_K")
    x = torch.randn(4, WIDTH)
    twin = Linear(WIDTH, ROWS, format=FORMATS["Q6_K"])
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_each_kind_of_layer_has_its_packed_one() -> None:
    made = packed_like(PLAIN.Linear(64, 10, bias=False), FORMATS["Q8_0"], None, torch.float32)
    assert isinstance(made, Linear)
    assert made.bias is None
    assert made.weight.shape == (10, 68)
    assert made.weight.is_meta
    table = packed_like(PLAIN.Embedding(10, 64), FORMATS["Q8_0"], (), torch.bfloat16)
    assert isinstance(table, Embedding)
    assert table.dtype == torch.bfloat16
    assert packed_like(PLAIN.Conv2d(1, 1, 1), FORMATS["Q8_0"], None, torch.float32) is None


def test_a_width_of_no_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="48 weights"):
        Linear(48, 4, format=FORMATS["Q8_0"])
