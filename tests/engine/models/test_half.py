"""fp16: numbers beyond 65504 must not end a run. Weights are scaled until plain fp16 does overflow."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from flux_kit.engine.models import layers, t5
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.layers import within_half
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import FluxSpec, T5Spec
from oracles import loaded, on_meta, random_state
from torch import Tensor

FLUX = FluxSpec(hidden_size=128, num_heads=1, context_in_dim=64, vec_in_dim=48, depth=2, depth_single_blocks=3)
T5 = T5Spec(vocab_size=97, d_model=64, num_heads=1, d_ff=96, num_layers=3)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def unclamped(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layers, t5):
        monkeypatch.setattr(module, "within_half", lambda x: x)


def flux_answer(scaled: str, factor: float, dtype: torch.dtype = torch.float16) -> Tensor:
    state = {name: (value * factor if name.endswith(scaled) else value).to(dtype)
             for name, value in random_state(on_meta(Flux, FLUX)).items()}
    generator = torch.Generator().manual_seed(2)
    img, txt, y = (torch.randn(1, *shape, generator=generator).to(dtype) for shape in ((16, 64), (8, 64), (48,)))
    ids = torch.arange(16).float()
    img_ids = torch.stack((ids * 0, ids // 4, ids % 4), -1)[None]
    return loaded(on_meta(Flux, FLUX), state)(img, img_ids, txt, torch.zeros(1, 8, 3), torch.tensor([0.6]), y)


@pytest.mark.parametrize(("scaled", "factor"), [
    ("img_mlp.2.weight", 4e5),      # the image stream of a double block
    ("txt_mlp.2.weight", 4e5),      # the text stream, which overflows in real files too
    ("txt_attn.proj.weight", 4e5),
    ("linear2.weight", 4e5),        # single blocks
])
def test_flux_survives_overflow(monkeypatch: pytest.MonkeyPatch, scaled: str, factor: float) -> None:
    assert torch.isfinite(flux_answer(scaled, factor)).all()
    unclamped(monkeypatch)
    assert not torch.isfinite(flux_answer(scaled, factor)).all(), "the weights were not scaled enough to prove anything"


def t5_answer(scaled: str, factor: float, dtype: torch.dtype = torch.float16) -> Tensor:
    state = {name: (value * factor if name.endswith(scaled) else value).to(dtype)
             for name, value in random_state(on_meta(T5Encoder, T5)).items()}
    return loaded(on_meta(T5Encoder, T5), state)(torch.arange(12)[None])


@pytest.mark.parametrize(("scaled", "factor"), [
    ("wo.weight", 3e4),             # the residual stream
    ("wi_1.weight", 3e4),           # the product inside the gated layer
    ("o.weight", 6e4),
])
def test_t5_survives_overflow(monkeypatch: pytest.MonkeyPatch, scaled: str, factor: float) -> None:
    assert torch.isfinite(t5_answer(scaled, factor)).all()
    unclamped(monkeypatch)
    assert not torch.isfinite(t5_answer(scaled, factor)).all(), "the weights were not scaled enough to prove anything"


def test_clamp_is_for_half_alone() -> None:
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0])
    assert within_half(wild.half()).tolist() == [0, 65504, -65504, 2]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(within_half(wild.to(dtype)), wild.to(dtype)) or torch.isnan(within_half(wild.to(dtype))[0])


def test_clamp_changes_nothing_within_range(monkeypatch: pytest.MonkeyPatch) -> None:
    clamped = flux_answer("linear2.weight", 1), t5_answer("wo.weight", 1)
    unclamped(monkeypatch)
    assert torch.equal(clamped[0], flux_answer("linear2.weight", 1))
    assert torch.equal(clamped[1], t5_answer("wo.weight", 1))
