"""Blocks of ggml: equal to gguf-py's where it has the type, else as close to the weights as ggml's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flux_kit.engine.convert import ENCODERS, encode
from flux_kit.engine.quant import FORMATS
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

LEGACY = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SHAPES = ((48, 768), (24, 768), (8, 768), (32, 768), (8, 3072), (56, 768), (8, 3840))
"""The seven matrices of a FLUX.1 block, at a quarter and less of their size."""
REFERENCE = {
    # relative RMS errors of ggml_quantize_chunk (llama-cpp-python 0.3.36) on Gaussian and on heavy-tailed weights
    "F16": (0.00021, 0.00021), "BF16": (0.00166, 0.00166), "Q4_0": (0.0860, 0.1157), "Q4_1": (0.0782, 0.0938),
    "Q5_0": (0.0428, 0.0580), "Q5_1": (0.0379, 0.0453), "Q8_0": (0.00536, 0.00730), "Q2_K": (0.2967, 0.3433),
    "Q3_K": (0.1510, 0.1841), "Q4_K": (0.0715, 0.0868), "Q5_K": (0.0362, 0.0439), "Q6_K": (0.0178, 0.0229),
    "IQ4_NL": (0.0761, 0.0932), "IQ4_XS": (0.0767, 0.0941),
}
NAMES = [name for name in ENCODERS if name != "F32"]


def gaussian(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Student's t with four degrees of freedom."""
    squares = torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed + 1)).square().mean(-1)
    return gaussian(shape, seed) / squares.sqrt()


def decoded(packed: Tensor, name: str) -> Tensor:
    """gguf-py's numbers."""
    return torch.from_numpy(quants.dequantize(packed.numpy(), Type[name]).astype(np.float32))


def error(weight: Tensor, name: str) -> float:
    return float((decoded(encode(weight, name), name) - weight).norm() / weight.norm())


@pytest.mark.parametrize("name", LEGACY)
@pytest.mark.parametrize("make", [gaussian, heavy])
def test_legacy_types_are_gguf_py_bit_for_bit(name: str, make: object) -> None:
    weight = torch.cat([make((64, 512)), make((8, 512), 5) * 1e4, make((8, 512), 6) * 1e-3])  # type: ignore[operator]
    weight[3] = 0
    weight[4] = 0.25
    weight[5] = -0.25
    weight[6, ::3] = 0
    weight[7] = weight[7].round(decimals=2)  # ties
    theirs = quants.quantize(weight.numpy(), Type[name])
    assert np.array_equal(encode(weight, name).numpy(), theirs.view(np.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("make", "column"), [(gaussian, 0), (heavy, 1)])
def test_errors_are_those_of_ggml(name: str, make: object, column: int) -> None:
    """Within 2 % of ggml's, and 2 % more for the draw of these small matrices; not far below either, which would mean
    that the wrong thing is measured."""
    pairs = [(make(shape, seed), shape) for seed, shape in enumerate(SHAPES)]  # type: ignore[operator]
    differences = sum(float((decoded(encode(weight, name), name) - weight).square().sum()) for weight, _ in pairs)
    relative = (differences / sum(float(weight.square().sum()) for weight, _ in pairs)) ** 0.5
    assert 0.95 * REFERENCE[name][column] <= relative <= 1.04 * REFERENCE[name][column]


@pytest.mark.parametrize("name", NAMES)
def test_what_was_encoded_stays(name: str) -> None:
    """Encoding what blocks can hold gives it back; where scales are searched, all but exactly."""
    once = decoded(encode(gaussian((32, 1024)) * 50, name), name)
    again = decoded(encode(once, name), name)
    assert float((again - once).norm() / once.norm()) <= {"Q2_K": 0.02, "Q3_K": 0.005, "Q5_K": 0.01}.get(name, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_weights_four_times_as_large_become_numbers_four_times_as_large(name: str) -> None:
    weight = gaussian((8, 1024)) * 50
    assert torch.equal(decoded(encode(4 * weight, name), name), 4 * decoded(encode(weight, name), name))


@pytest.mark.parametrize("name", NAMES)
def test_odd_groups(name: str) -> None:
    """Zeros, one value throughout, one spike among zeros, numbers too small for fp16."""
    rows = torch.zeros(8, 256)
    rows[1], rows[2] = 0.75, -0.75
    rows[3, 17], rows[4, 200] = 3.0, -3.0
    rows[5], rows[6], rows[7] = 1e-30, -1e-42, torch.linspace(-1, 1, 256)
    found = decoded(encode(rows, name), name)
    assert found.isfinite().all() and not found[0].any()
    assert found[5:7].abs().max() <= 1e-6
    step = {"Q2_K": 0.4, "Q3_K": 0.2}.get(name, 0.1)
    assert (found[1:5] - rows[1:5]).abs().max() <= step * 3 and (found[7] - rows[7]).abs().max() <= step
    assert float((found[1] - rows[1]).abs().max()) <= 0.02 and float((found[2] - rows[2]).abs().max()) <= 0.02


@pytest.mark.parametrize("name", NAMES)
def test_tiles_and_strides_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scales are searched, sums in another order may decide a near tie the other way."""
    weight = gaussian((12, 512))
    whole = decoded(encode(weight, name), name)
    monkeypatch.setattr("flux_kit.engine.convert.ggml.TILE_WEIGHTS", {"cpu": 700})
    for same in (weight, weight.T.contiguous().T, weight.double()):
        found = decoded(encode(same, name), name)
        assert float((found - whole).norm() / whole.norm()) <= (0 if name in LEGACY else 0.01)
        assert float((found - weight).norm() / (whole - weight).norm()) == pytest.approx(1, rel=0.003)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
@given(data=st.data())
def test_no_weight_goes_astray(name: str, data: st.DataObject) -> None:
    """Whatever the numbers: finite, and off by at most a coarse step of what the block spans."""
    exponents = data.draw(st.lists(st.integers(-8, 8), min_size=16, max_size=16))
    seed = data.draw(st.integers(0, 1 << 16))
    scales = torch.tensor(exponents, dtype=torch.float32).exp2().repeat_interleave(16)
    block = torch.randn(1, 256, generator=torch.Generator().manual_seed(seed)) * scales
    found = decoded(encode(block, name), name)
    span = float(torch.cat([block.flatten(), torch.zeros(1)]).aminmax().max) - min(float(block.min()), 0)
    assert found.isfinite().all()
    assert float((found - block).abs().max()) <= span * (0.25 if FORMATS[name].nbytes < 60 or name == "Q3_K" else 0.13)


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        encode(torch.zeros(2, 128), "Q4_K")
