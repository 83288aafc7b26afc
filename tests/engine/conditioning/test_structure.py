"""Maps for Depth and Canny: sizes, hints, widths, and what the conditioning carries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flux_kit.engine.conditioning import structure
from flux_kit.engine.conditioning.preprocess import canny
from flux_kit.engine.conditioning.structure import check_model, guided, hints, prepare, with_map
from flux_kit.engine.errors import BadInput, NotFinite
from PIL import Image
from scenes_8bit import flat_shapes, soft_shapes

PROMPT: list[list[Any]] = [[torch.zeros(1, 8, 64), {"pooled_output": torch.zeros(1, 64), "guidance": 3.5}]]


def pil(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """BFL's resize: 8 bits, LANCZOS, across and then down."""
    levels = Image.fromarray((image[0].numpy() * 255).round().astype(np.uint8))
    lanczos = Image.Resampling.LANCZOS
    made = levels.resize((width, levels.height), lanczos).resize((width, height), lanczos)
    return torch.from_numpy(np.asarray(made).copy())[None].float() / 255


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (208, 128)])
def test_d25_the_map_is_resized_in_pixels_before_it_is_encoded(size: tuple[int, int]) -> None:
    image = soft_shapes(120, 200)
    made = prepare(image, "depth", *size)
    assert made.size == size
    torch.testing.assert_close(made.image, pil(image, *size), atol=1e-6, rtol=0)
    assert any("resized from 200 x 120" in note for note in made.notes)


def test_the_map_s_own_size_is_left_alone() -> None:
    image = torch.rand(2, 64, 96, 3)
    made = prepare(image, "custom")
    assert torch.equal(made.image, image) and made.size == (96, 64) and not made.notes


@pytest.mark.parametrize(("given", "asked", "expected"), [
    ((100, 75), (0, 0), (96, 80)), ((120, 200), (0, 64), (32, 64)), ((200, 100), (96, 0), (96, 48)),
    ((5, 3), (0, 0), (16, 16)), ((64, 64), (50, 40), (48, 48))])
def test_sides_are_multiples_of_16_and_said(given: tuple[int, int], asked: tuple[int, int],
                                            expected: tuple[int, int]) -> None:
    """(width, height) each; what was asked and not got is named."""
    made = prepare(flat_shapes(given[1], given[0]), "custom", *asked)
    assert made.size == expected
    assert any("resized" in note for note in made.notes)
    assert any("multiples of 16" in note for note in made.notes) == (asked == (50, 40))


def test_fits() -> None:
    image = torch.ones(1, 32, 64, 3)
    image[:, :, :16] = 0.5
    crop, pad = (prepare(image, "custom", 32, 32, fit).image for fit in ("crop", "pad"))
    assert (crop == 1).all(), "the middle is cut out"
    assert pad.shape == (1, 32, 32, 3) and (pad[:, :8] == 0).all() and (pad[:, 24:] == 0).all() and pad[:, 8:24].all()
    notes = prepare(image, "custom", 32, 32).notes
    assert any("aspect changed by 50 %" in note for note in notes)
    with pytest.raises(BadInput, match="stretch, crop, pad"):
        prepare(image, "custom", 32, 32, "tile")


def test_bad_maps() -> None:
    with pytest.raises(NotFinite, match="map holds NaN"):
        prepare(torch.full((1, 16, 16, 3), float("nan")))
    with pytest.raises(BadInput):
        prepare(torch.zeros(1, 16, 16, 3), width=-16)
    assert any("alpha" in note for note in prepare(torch.rand(1, 16, 16, 4)).notes)


def test_hints_tell_maps_that_look_wrong() -> None:
    edges = canny(flat_shapes(64, 64))
    ramp = torch.linspace(0, 1, 64)[None, :, None, None].expand(1, 64, 64, 3)  # near below
    assert hints(edges, "canny") == [] and hints(ramp, "depth") == []
    for image, kind, word in ((edges * 0, "canny", "nearly black"), (1 - edges, "canny", "inverted"),
                              (ramp, "canny", "may be a depth map"), (edges, "depth", "may hold edges"),
                              (1 - ramp, "depth", "inverted"), (flat_shapes(64, 64), "depth", "coloured"),
                              (ramp * 0.05, "depth", "nearly black")):
        assert any(word in hint for hint in hints(image, kind)), (kind, word)
    assert hints(1 - ramp, "custom") == []


def test_d9_guidance_presets() -> None:
    assert (guided("depth", 0), guided("canny", 0), guided("custom", 0)) == (10.0, 30.0, None)
    assert guided("depth", 4.5) == 4.5


def test_the_width_of_a_model_decides() -> None:
    check_model(None)
    check_model(128)
    with pytest.raises(BadInput, match=r"64 channels.*load FLUX\.1 Depth or Canny"):
        check_model(64)
    with pytest.raises(BadInput, match=r"Fill model .*384 channels"):
        check_model(384)
    with pytest.raises(BadInput, match="96 channels"):
        check_model(96)


def test_d32_the_key_that_asks_nothing_of_the_model() -> None:
    """`noise_concat` holds BFL's numbers: 0.3611 * (z - 0.1159); and nothing given is changed."""
    z = torch.randn(1, 16, 4, 6)
    with_both = with_map(PROMPT, z, 10.0, beside_noise=True)
    plain = with_map([[PROMPT[0][0], {**PROMPT[0][1], "concat_mask": z, "noise_concat": z}]], z, None)
    torch.testing.assert_close(with_both[0][1]["noise_concat"], 0.3611 * (z - 0.1159))
    assert torch.equal(with_both[0][1]["concat_latent_image"], z) and with_both[0][1]["guidance"] == 10
    assert not {"concat_mask", "noise_concat"} & set(plain[0][1]) and plain[0][1]["guidance"] == 3.5
    assert set(PROMPT[0][1]) == {"pooled_output", "guidance"}


def test_without_a_negative_it_is_zeros() -> None:
    z = torch.randn(1, 16, 4, 6)
    prompt = [[torch.ones(1, 8, 64), PROMPT[0][1]]]
    made, other = structure.both(prompt, None, z, 30.0)
    assert made[0][0].all() and not other[0][0].any()
    assert all(torch.equal(one[0][1]["concat_latent_image"], z) for one in (made, other))
