"""Plans from numbers, and the numbers from models on the meta device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux_kit.engine.errors import BadInput, NotEnoughMemory
from flux_kit.engine.memory import Activations, PartWeights, device_free, device_total, estimate_weights, plan
from flux_kit.engine.memory import activations as formulas
from flux_kit.engine.memory.weights import UNPACK_BYTES, unpack_bytes
from flux_kit.engine.models.attention import apply_rope
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.ops import PlainOps
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.models.tiling import decode_tiled
from flux_kit.engine.quant import FORMATS
from flux_kit.engine.specs import FLUX_AE, FLUX_DEV, T5_XXL
from hypothesis import given
from hypothesis import strategies as st
from tracer import peak_of

WORK = Activations(encode=10, sample=50, decode=80, strips=30)
PARTS = {"t5": PartWeights("t5", 10, (30,) * 4), "clip_l": PartWeights("clip_l", 5),
         "transformer": PartWeights("transformer", 20, (40,) * 2 + (20,) * 4), "vae": PartWeights("vae", 15)}


def test_all_at_once_one_at_a_time_streamed_refused() -> None:
    everything = 135 + 180 + 15 + 80
    assert plan(PARTS, WORK, everything, None).keep
    parted = plan(PARTS, WORK, everything - 1, None)
    assert not parted.keep and not any(stage.streamed or stage.strips for stage in parted.stages)
    assert [stage.peak for stage in parted.stages] == [145, 230, 95]
    tight = plan(PARTS, WORK, 229, None).stages[1]
    assert tight.streamed and tight.peak <= 229 and tight.resident + tight.streamed_bytes == 180
    least = plan(PARTS, WORK, 150, None).stages[1]
    assert len(least.streamed) == 6 and least.peak == 20 + 2 * 40 + 50
    with pytest.raises(NotEnoughMemory, match="sample") as caught:
        plan(PARTS, WORK, 149, None)
    assert caught.value.missing == 1


def test_modes() -> None:
    streamed = plan(PARTS, WORK, 10_000, None, "stream")
    assert [len(stage.streamed) for stage in streamed.stages] == [4, 6, 0] and not streamed.keep
    with pytest.raises(NotEnoughMemory, match="--memory auto"):
        plan(PARTS, WORK, 229, None, "full")
    for device, mode in ((None, "auto"), (10, "cpu")):
        assert not any(stage.on_device for stage in plan(PARTS, WORK, device, None, mode).stages)
    with pytest.raises(BadInput):
        plan(PARTS, WORK, 1, None, "none")


def test_strips_only_where_a_whole_picture_does_not_fit() -> None:
    only = {"vae": PARTS["vae"]}
    assert not plan(only, WORK, 95, None).stages[0].strips
    assert plan(only, WORK, 94, None).stages[0].strips
    assert not plan(only, WORK, 95, None, "stream").stages[0].strips
    with pytest.raises(NotEnoughMemory, match="smaller picture"):
        plan(only, WORK, 44, None)


def test_host_memory() -> None:
    cast = {"vae": replace(PARTS["vae"], made=100)}
    with pytest.raises(NotEnoughMemory, match="host memory"):
        plan(cast, WORK, 1000, 99)
    gib = 1 << 30
    large = {"transformer": PartWeights("transformer", gib, (gib,) * 10)}
    assert plan(large, WORK, 5 * gib, 16 * gib).stages[0].pinned
    assert not plan(large, WORK, 5 * gib, 8 * gib).stages[0].pinned


@given(st.lists(st.integers(1, 100), max_size=12), st.integers(0, 100), st.integers(0, 500), st.integers(0, 2000))
def test_a_plan_never_takes_more_than_there_is(blocks: list[int], rest: int, work: int, free: int) -> None:
    part = {"transformer": PartWeights("transformer", rest, tuple(blocks), scratch=7)}
    needs = Activations(0, work, 0, 0)
    try:
        made = plan(part, needs, free, None)
    except NotEnoughMemory as error:
        least = rest + work + 7 + min(sum(blocks), 2 * max(blocks, default=0))
        assert error.missing is not None and error.missing > 0 and free < least
        return
    stage = made.stages[0]
    assert stage.peak <= free and made.peak <= free
    assert stage.resident + stage.streamed_bytes == rest + sum(blocks)
    assert len(set(stage.streamed)) == len(stage.streamed) and all(0 <= i < len(blocks) for i in stage.streamed)


class Fused(PlainOps):
    """Attention that keeps no scores, as kernels on GPUs do."""

    @staticmethod
    def attention(q: Any, k: Any, v: Any, pe: Any = None, mask: Any = None, options: Any = None) -> Any:
        if pe is not None:
            q, k = apply_rope(q, pe), apply_rope(k, pe)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        return torch.empty(v.shape, dtype=v.dtype, device=v.device).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("side", "batch", "text"), [(512, 1, 256), (1024, 1, 512), (1024, 2, 512), (2048, 1, 512)])
def test_the_transformer_takes_what_the_formula_says(side: int, batch: int, text: int, dtype: torch.dtype) -> None:
    """At full width, two blocks of each kind: more blocks take no more."""
    tokens = (side // 16) ** 2
    with torch.device("meta"):
        model = Flux(replace(FLUX_DEV, depth=2, depth_single_blocks=2), Fused()).to(dtype)
        model.positions = lambda *_: torch.empty(batch, 1, tokens + text, 64, 2, 2, device="meta")  # type: ignore
        given_ = {"img": torch.empty(batch, tokens, 64, dtype=dtype), "img_ids": torch.empty(batch, tokens, 3),
                  "txt": torch.empty(batch, text, 4096, dtype=dtype), "txt_ids": torch.empty(batch, text, 3),
                  "timesteps": torch.empty(batch), "y": torch.empty(batch, 768, dtype=dtype),
                  "guidance": torch.empty(batch)}
        found = peak_of(lambda: model(**given_), *model.parameters(), *given_.values())
    told = formulas.sample_bytes(FLUX_DEV, side, side, batch, text, dtype.itemsize)
    assert found <= told <= 1.15 * found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 512), (1024, 1024), (2048, 2048)])
def test_the_autoencoder_takes_what_the_formulas_say(width: int, height: int, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = Autoencoder(FLUX_AE, Fused()).to(dtype)
        z = torch.empty(1, 16, height // 8, width // 8, dtype=dtype)
        x = torch.empty(1, 3, height, width, dtype=dtype)
    size = dtype.itemsize
    for run, told in ((lambda: model.decode(z), formulas.decode_bytes(FLUX_AE, width, height, size)),
                      (lambda: decode_tiled(model, z), formulas.strip_bytes(FLUX_AE, width, height, size)),
                      (lambda: model.encode(x), formulas.encode_bytes(FLUX_AE, width, height, size))):
        found = peak_of(run, *model.parameters(), z, x)
        assert 0.999 * found <= told <= 1.1 * found


@pytest.mark.parametrize(("batch", "tokens"), [(1, 256), (2, 512), (1, 2048)])
def test_t5_takes_what_the_formula_says(batch: int, tokens: int) -> None:
    with torch.device("meta"):
        model = T5Encoder(replace(T5_XXL, num_layers=2), Fused()).bfloat16()
        ids = torch.empty(batch, tokens, dtype=torch.long)
    found = peak_of(lambda: model(ids), *model.parameters(), ids)
    assert found <= formulas.text_bytes(T5_XXL, tokens, 2, batch) <= 1.15 * found


@pytest.mark.parametrize("name", [name for name in FORMATS if not FORMATS[name].codebook])
def test_unpacking_takes_no_more_than_said(name: str) -> None:
    """A tile of this size is unpacked as a large one is: the factor is per weight."""
    format = FORMATS[name]
    width = 4096 if 4096 % format.block == 0 else format.block
    packed = torch.zeros(64, format.row_bytes(width), dtype=torch.uint8)
    found = peak_of(lambda: format.dequantize(packed, torch.bfloat16), packed)
    assert found <= unpack_bytes(64 * width, 2) and UNPACK_BYTES < 20


def test_the_published_sizes() -> None:
    """FLUX.1-dev's bf16 file is 23.8 GB; Q4_K_S is a little more than a quarter."""
    from flux_kit.cli.plans import header
    with torch.device("meta"):
        model = Flux(FLUX_DEV)
    sizes = {}
    for precision in ("BF16", "Q4_K_S"):
        names = header("transformer", model, FLUX_DEV.depth, precision)
        part = SimpleNamespace(role="transformer", names={name: name for name in names})
        sizes[precision] = estimate_weights(names, {"transformer": part}, torch.bfloat16)["transformer"]
    assert sizes["BF16"] == sum(tensor.numel() for tensor in model.parameters()) * 2 == 23_802_816_640
    assert 6.7e9 < sizes["Q4_K_S"] < 6.9e9


def test_a_torch_that_does_not_tell_metal_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.4, the oldest that is taken, does not."""
    monkeypatch.delattr(torch.mps, "recommended_max_memory")
    assert device_free(torch.device("mps")) is None and device_total(torch.device("mps")) is None
