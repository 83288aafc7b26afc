"""Resizing against PIL, bit for bit where the picture has 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flux_kit.engine.conditioning.resample import FILTERS, covering, fitting, is_8bit, resize
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes_8bit import noise

PIL = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SIDE = st.integers(1, 90)


@settings(max_examples=25, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE, st.sampled_from(sorted(FILTERS)))
def test_d30_8_bits_are_pil_s_and_are_rounded(height: int, width: int, new_height: int, new_width: int, name: str
                                              ) -> None:
    """Across, then down: each a call of its own, as the order of both in one call differs between versions of PIL."""
    image = noise(height, width)
    levels = (image[0].numpy() * 255).round().astype(np.uint8)
    across = Image.fromarray(levels).resize((new_width, height), PIL[name])
    expected = np.asarray(across.resize((new_width, new_height), PIL[name]))
    found = resize(image, new_height, new_width, name)
    assert is_8bit(found)
    assert np.array_equal((found[0].numpy() * 255).round().astype(np.uint8), expected)


@pytest.mark.parametrize("name", FILTERS)
def test_floats_keep_their_precision(name: str) -> None:
    """PIL's own mode of 32-bit floats, which neither rounds nor clips."""
    image = (noise(40, 50) * 0.5 + 0.25) + 1e-3
    one = Image.fromarray(image[0, ..., 0].numpy()).resize((31, 40), PIL[name])
    expected = np.asarray(one.resize((31, 70), PIL[name]))
    np.testing.assert_allclose(resize(image, 70, 31, name)[0, ..., 0].numpy(), expected, atol=2e-6)


def test_the_same_size_is_the_same_values() -> None:
    image = torch.randn(1, 5, 6, 3)
    assert torch.equal(resize(image, 5, 6), image)


def test_values_stay_in_their_range() -> None:
    image = (noise(30, 30) > 0.5).float() * 0.999
    found = resize(image, 77, 41)
    assert found.min() >= 0 and found.max() <= 1


@settings(max_examples=50, deadline=None)
@given(SIDE, SIDE, SIDE, SIDE)
def test_covering_and_fitting(a: int, b: int, c: int, d: int) -> None:
    big, small = covering((a, b), (c, d)), fitting((a, b), (c, d))
    assert big[0] >= c and big[1] >= d and (big[0] == c or big[1] == d)
    assert 1 <= small[0] <= c and 1 <= small[1] <= d and (small[0] == c or small[1] == d)
