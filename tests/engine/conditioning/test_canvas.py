"""Outpaint Canvas: nothing of the picture is lost, everything new is masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flux_kit.engine.conditioning.canvas import FILLS, Pads, outpaint, outpaint_to, overlaps, pads_for
from flux_kit.engine.errors import BadInput, NotFinite
from hypothesis import given, settings
from hypothesis import strategies as st

side = st.integers(17, 3000)
pad = st.integers(0, 700)
RATIOS = [None, (1, 1), (16, 9), (2, 3), (21, 9)]


@given(side, side, st.builds(Pads, pad, pad, pad, pad), st.sampled_from(RATIOS), st.sampled_from([16, 32]))
def test_canvas_sizes(width: int, height: int, pads: Pads, aspect: tuple[int, int] | None, multiple: int) -> None:
    try:
        made = pads_for(width, height, pads, aspect=aspect, multiple=multiple)
    except BadInput as error:
        assert "more than 16 megapixels" in str(error) and (width + 1400) * (height + 1400) * 10 > 16 * 2**20
        return
    across, down = made.of(width, height)
    assert across % multiple == 0 and down % multiple == 0
    assert all(getattr(made, name) >= getattr(pads, name) for name in ("left", "top", "right", "bottom"))
    asked = pads.of(width, height)
    if aspect is None:
        assert across - asked[0] < multiple and down - asked[1] < multiple, "more was added than rounding needs"
    else:
        assert abs(across - down * aspect[0] / aspect[1]) <= multiple * (1 + aspect[0] / aspect[1]) + 1
        assert across - asked[0] < multiple or down - asked[1] < multiple, "both sides grew for an aspect"
    for one, other in (("left", "right"), ("top", "bottom")):
        if getattr(pads, one) and not getattr(pads, other):
            assert getattr(made, other) == 0, "a side that was not asked for grew although its opposite could"


@given(st.integers(1, 3000), st.booleans(), st.booleans(), st.integers(0, 256))
def test_an_overlap_leaves_a_pixel_of_the_picture(size: int, before: bool, after: bool, overlap: int) -> None:
    first, second = overlaps(size, int(before), int(after), overlap)
    assert first + second < size and first <= overlap and second <= overlap
    assert (first == 0 or before) and (second == 0 or after)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 90), st.integers(1, 90), st.builds(Pads, *[st.integers(0, 120)] * 4),
       st.integers(0, 20), st.sampled_from(sorted(FILLS)), st.integers(0, 10**6))
def test_the_picture_keeps_its_pixels_and_all_else_is_masked(
        batch: int, height: int, width: int, pads: Pads, overlap: int, fill: str, seed: int) -> None:
    image = torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))
    made = pads_for(width, height, pads)
    canvas, mask, _ = outpaint(image, made, overlap=overlap, fill=fill)
    across, down = made.of(width, height)
    inside = (slice(None), slice(made.top, made.top + height), slice(made.left, made.left + width))
    assert canvas.shape == (batch, down, across, 3) and mask.shape == (1, down, across)
    assert torch.equal(canvas[inside], image) and torch.isfinite(canvas).all()
    assert canvas.min() >= 0 and canvas.max() <= 1
    new = torch.ones_like(mask)
    new[inside] = 0
    assert (mask[new == 1] == 1).all() and set(mask.unique().tolist()) <= {0.0, 1.0}
    assert mask.min() == 0, "nothing of the picture is kept"
    for name, strip in (("left", mask[inside][..., :1]), ("right", mask[inside][..., -1:]),
                        ("top", mask[inside][:, :1]), ("bottom", mask[inside][:, -1:])):
        if getattr(made, name) == 0 and overlap and min(height, width) > 2 * overlap:
            assert strip.min() == 0, f"the mask reaches into {name}, which was not padded"


@pytest.mark.parametrize(("fill", "mode"), [("edge", "edge"), ("mirror", "reflect")])
def test_edge_and_mirror_are_numpy_s(fill: str, mode: str) -> None:
    image = torch.rand(1, 6, 7, 3)
    pads = Pads(17, 20, 8, 22)
    canvas = outpaint(image, pads, fill=fill)[0][0].numpy()
    expected = np.pad(image[0].numpy(), ((20, 22), (17, 8), (0, 0)), mode=mode)  # type: ignore[call-overload]
    assert np.array_equal(canvas, expected)


def test_grey_is_mid_grey_and_blur_is_smooth() -> None:
    image = torch.rand(1, 64, 64, 3)
    pads = Pads(64, 0, 0, 0)
    assert (outpaint(image, pads)[0][:, :, :64] == 0.5).all()
    blurred = outpaint(image, pads, fill="blur")[0][:, :, :64]
    assert blurred.diff(dim=2).abs().max() < 0.1 and blurred.std() > 0


def official(width: int, height: int, left: int, top: int, right: int, bottom: int, share: float) -> torch.Tensor:
    """The mask of the official demo where its rounding to 32 changes nothing: it overlaps on every side."""
    mask = torch.ones(1, top + height + bottom, left + width + right)
    across, down = int(width * share), int(height * share)
    mask[:, top + down:top + height - down, left + across:left + width - across] = 0
    return mask


def test_equal_to_the_official_demo_where_all_sides_grow() -> None:
    image = torch.rand(1, 192, 192, 3)
    canvas, mask, _ = outpaint_to(image, Pads(32, 64, 32, 64), multiple=32, overlap=int(192 * 0.05))
    assert canvas.shape == (1, 320, 256, 3) and torch.equal(mask, official(192, 192, 32, 64, 32, 64, 0.05))


def test_d31_the_mask_is_binary_and_overlaps_on_padded_sides_only() -> None:
    """Core's pad node makes a soft ramp inside the picture, the official demo also masks sides that do not grow."""
    canvas, mask, notes = outpaint_to(torch.rand(1, 64, 96, 3), Pads(right=32), overlap=16)
    assert canvas.shape == (1, 64, 128, 3) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask[..., :80] == 0).all() and (mask[..., 80:] == 1).all()
    assert notes == ["96 x 64 becomes 128 x 64: left 0, top 0, right 32, bottom 0"]


def test_an_aspect_grows_where_there_are_pixels_else_evenly() -> None:
    assert pads_for(512, 512, Pads(), aspect=(2, 1)) == Pads(256, 0, 256, 0)
    assert pads_for(512, 512, Pads(left=16), aspect=(2, 1)) == Pads(512, 0, 0, 0)
    assert pads_for(512, 512, Pads(), aspect=(1, 2)) == Pads(0, 256, 0, 256)


def test_bad_input() -> None:
    image = torch.rand(1, 32, 48, 3)
    same, mask, notes = outpaint_to(image, Pads())
    assert torch.equal(same, image) and not mask.any() and notes == ["nothing is added: the mask is empty"]
    with pytest.raises(BadInput, match="16 megapixels"):
        pads_for(4000, 4000, Pads(right=4096))
    with pytest.raises(BadInput, match="only grow"):
        pads_for(64, 64, Pads(left=-8))
    with pytest.raises(NotFinite, match="1 pixels"):
        broken = image.clone()
        broken[0, 0, 0, 0] = float("nan")
        outpaint_to(broken, Pads(16))
    _, _, notes = outpaint_to(torch.rand(1, 32, 48, 4), Pads(16))
    assert "alpha" in notes[0]
    _, mask, notes = outpaint_to(image, Pads(16, 0, 0, 16), overlap=200)
    assert mask.min() == 0 and "too small for 200" in notes[0]
