"""Unpacked weights kept: the same numbers as without, within the budget, never those of other bytes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from flux_kit.engine.quant import FORMATS, Linear, UnpackedCache, ops
from flux_kit.engine.quant.cache import traffic
from gguf_files import weight_blocks
from torch import Tensor, nn

ROWS, WIDTH = 96, 512
KINDS = ("Q8_0", "Q4_K", "Q6_K", "IQ2_S", "Q4_0")
WEIGHT = ROWS * WIDTH * 2
"""Bytes of one weight in bf16."""


def layer_of(name: str, seed: int = 0) -> Linear:
    layer = Linear(WIDTH, ROWS, format=FORMATS[name])
    layer.weight.data = torch.from_numpy(weight_blocks(name, ROWS, WIDTH, seed))
    layer.bias.data = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed))
    return layer


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({name: layer_of(name) for name in KINDS})


def outputs(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [layer(x) for layer in model.values()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("tile", [1, 40 * WIDTH, 1 << 21], ids=["rows", "40 rows", "whole"])
@pytest.mark.parametrize("weights", [0, 2, 5])
def test_the_same_bit_for_bit(model: nn.Module, monkeypatch: pytest.MonkeyPatch, weights: int, tile: int) -> None:
    monkeypatch.setattr(ops, "LINEAR_TILE_WEIGHTS", tile)
    without, whole = outputs(model), outputs(model, torch.float32)
    cache = UnpackedCache(weights * WEIGHT + 5)
    cache.attach(model, torch.bfloat16)
    assert cache.nbytes == 0
    for _ in range(3):
        assert same(outputs(model), without)
        assert cache.nbytes == weights * WEIGHT
    assert same(outputs(model, torch.float32), whole)  # of another dtype nothing is kept
    cache.detach()
    assert cache.nbytes == 0
    assert same(outputs(model), without)
    assert cache.nbytes == 0


def test_kept_weights_are_not_unpacked_again(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[str] = []
    dequantize = type(FORMATS["Q8_0"]).dequantize

    def counted(self: object, *args: object, **options: object) -> Tensor:
        unpacked.append(self.name)  # type: ignore[attr-defined]
        return dequantize(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(FORMATS["Q8_0"]), "dequantize", counted)
    cache = UnpackedCache(3 * WEIGHT)
    cache.attach(model, torch.bfloat16)
    outputs(model)
    assert sorted(unpacked) == sorted(KINDS)
    unpacked.clear()
    outputs(model)
    assert len(unpacked) == 2
    # what is cheapest to unpack is what is not kept
    assert set(unpacked) == set(sorted(KINDS, key=lambda name: traffic(FORMATS[name]))[:2])


def test_traffic() -> None:
    """By hand: Q8_0 reads 34 bytes a block and writes them as fp32, reads 32 of these and a scale, and writes 32."""
    found = {name: traffic(FORMATS[name]) for name in FORMATS if not FORMATS[name].codebook}
    scale = 2 + 4 + 4
    assert abs(found["Q8_0"] - (34 + 4 * 34 + 4 * 32 + scale + 4 * 32) / 32) < 0.2
    assert found["F8_E4M3"] < found["Q8_0"] < found["Q4_K"] < found["Q6_K"]


def test_shrinking_gives_the_least_valuable_back(model: nn.Module) -> None:
    without = outputs(model)
    cache = UnpackedCache(10**9)
    cache.attach(model, torch.bfloat16)
    outputs(model)
    order = sorted(KINDS, key=lambda name: -traffic(FORMATS[name]))
    for count in (5, 3, 1, 0):
        cache.shrink(count * WEIGHT + 3)
        assert cache.nbytes == count * WEIGHT
        kept = [name for name in order if cache.weight(model[name], torch.bfloat16) is not None]
        assert kept == order[:count]
        assert same(outputs(model), without)
        assert cache.nbytes == count * WEIGHT
    cache.shrink(10**9)
    outputs(model)
    assert cache.nbytes == 0, "a budget given up does not come back"


def test_memory_is_given_back(model: nn.Module) -> None:
    import weakref

    cache = UnpackedCache(10**9)
    cache.attach(model, torch.bfloat16)
    outputs(model)
    kept = [weakref.ref(cache.weight(layer, torch.bfloat16)) for layer in model.values()]
    cache.shrink(2 * WEIGHT)
    assert sum(reference() is not None for reference in kept) == 2
    model.clear()
    gc.collect()
    assert all(reference() is None for reference in kept), "layers that are gone are forgotten"
    assert cache.nbytes == 0


def other(layer: Linear) -> Tensor:
    return torch.from_numpy(weight_blocks(layer.format.name, ROWS, WIDTH, 9))


def assigned(layer: Linear) -> None:
    layer.weight = nn.Parameter(other(layer), requires_grad=False)


def data_assigned(layer: Linear) -> None:
    layer.weight.data = other(layer)


def copied(layer: Linear) -> None:
    with torch.no_grad():
        layer.weight.copy_(other(layer))


def loaded(layer: Linear) -> None:
    layer.load_state_dict({"weight": other(layer), "bias": layer.bias})


def loaded_by_assignment(layer: Linear) -> None:
    layer.load_state_dict({"weight": other(layer), "bias": layer.bias}, assign=True)


def into_the_same_place(layer: Linear) -> None:
    """Bytes that are freed, and others that the allocator puts where they were."""
    place = layer.weight.data_ptr()
    layer.weight.data = torch.empty(0, dtype=torch.uint8)
    for _ in range(50):
        layer.weight.data = other(layer).clone()
        if layer.weight.data_ptr() == place:
            return


@pytest.mark.parametrize("replace", [assigned, data_assigned, copied, loaded, loaded_by_assignment,
                                     into_the_same_place])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_other_bytes_are_not_served_stale(name: str, replace: Callable[[Linear], None]) -> None:
    model = nn.ModuleDict({name: layer_of(name)})
    model[name].weight.data = model[name].weight.data.clone()
    cache = UnpackedCache(10**9)
    cache.attach(model, torch.bfloat16)
    before = outputs(model)
    replace(model[name])
    after, fresh = outputs(model), nn.ModuleDict({name: layer_of(name)})
    fresh[name].weight.data = other(fresh[name])
    assert same(after, outputs(fresh))
    assert not same(after, before)
    assert cache.nbytes == WEIGHT


def test_other_scales_are_not_served_stale() -> None:
    layer = Linear(WIDTH, ROWS, False, format=FORMATS["F8_E4M3"], scale=())
    layer.weight.data = torch.full((ROWS, WIDTH), 0x38, dtype=torch.uint8)
    layer.scale_weight.data = torch.tensor(1.0)
    cache = UnpackedCache(10**9)
    cache.attach(layer, torch.float32)
    x = torch.ones(1, WIDTH)
    assert (layer(x) == WIDTH).all()
    layer.scale_weight.data = torch.tensor(2.0)
    assert (layer(x) == 2 * WIDTH).all()


def test_under_inference_mode(model: nn.Module) -> None:
    without = outputs(model)
    cache = UnpackedCache(10**9)
    cache.attach(model, torch.bfloat16)
    with torch.inference_mode():
        model["Q8_0"].weight = nn.Parameter(model["Q8_0"].weight.clone(), requires_grad=False)
        assert same(outputs(model), without)
        assert same(outputs(model), without)
    assert cache.nbytes == 5 * WEIGHT


def test_a_copy_of_a_model_keeps_nothing(model: nn.Module) -> None:
    without = outputs(model)
    cache = UnpackedCache(10**9)
    cache.attach(model, torch.bfloat16)
    twin = copy.deepcopy(model)
    assert same(outputs(twin), without)
    assert cache.nbytes == 0


def test_attaching_another_model_lets_go_of_the_first(model: nn.Module) -> None:
    cache, second = UnpackedCache(10**9), nn.ModuleDict({"Q8_0": layer_of("Q8_0", 3)})
    cache.attach(model, torch.bfloat16)
    outputs(model)
    cache.attach(second, torch.bfloat16)
    assert cache.nbytes == 0
    outputs(model)
    outputs(second)
    assert cache.nbytes == WEIGHT
