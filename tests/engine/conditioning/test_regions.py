"""Region Crop and Paste: sizes at all sizes, pixels on small ones. What is not masked stays bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flux_kit.engine.conditioning.pictures import round_up
from flux_kit.engine.conditioning.regions import (
    Box,
    _explained,
    bounds,
    crop,
    crop_plan,
    is_own_size,
    matched,
    paste,
    region_box,
)
from flux_kit.engine.errors import BadInput, NotFinite
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

side = st.integers(17, 5000)
share = st.floats(0, 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(batch: int, height: int, width: int) -> Tensor:
    """Waves that a resampling hardly changes."""
    y, x = torch.arange(height)[:, None, None] / 40, torch.arange(width)[None, :, None] / 40
    phase = torch.arange(3) + torch.arange(batch)[:, None, None, None]
    return 0.5 + 0.4 * torch.sin(x + 2 * y + phase)


def block(height: int, width: int, box: Box, value: float = 1.0, batch: int = 1) -> Tensor:
    mask = torch.zeros(batch, height, width)
    box.of(mask)[:] = value
    return mask


def run(start: float, length: float, size: int) -> tuple[int, int]:
    first = min(int(start * size), size - 1)
    return first, min(first + 1 + int(length * size), size)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal as bits, NaN too."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


plans = {"height": side, "width": side, "place": st.tuples(share, share, share, share), "context": st.floats(1, 8),
         "min_context": st.integers(0, 1024), "megapixels": st.sampled_from([0.0, 0.05, 0.25, 1.0, 2.0, 4.0]),
         "multiple": st.sampled_from([16, 32])}


@settings(max_examples=150)
@given(**plans)
def test_a_plan_holds_the_mask_inside_the_picture_on_the_grid(
        height: int, width: int, place: tuple[float, ...], context: float, min_context: int, megapixels: float,
        multiple: int) -> None:
    (left, right), (top, bottom) = run(place[0], place[1], width), run(place[2], place[3], height)
    mask = Box(left, top, right, bottom)
    box, (w, h) = crop_plan(mask, (height, width), context=context, min_context=min_context, megapixels=megapixels,
                            multiple=multiple)
    assert 0 <= box.left <= left and right <= box.right <= width
    assert 0 <= box.top <= top and bottom <= box.bottom <= height
    assert w % multiple == 0 and h % multiple == 0
    assert box.width >= min(width, mask.width + 2 * min_context, math.ceil(mask.width * context))
    assert box.height >= min(height, mask.height + 2 * min_context, math.ceil(mask.height * context))
    own = (w, h) == (round_up(box.width, multiple), round_up(box.height, multiple))
    assert own == is_own_size(box, w, h), "a stretched size looks like one with pixels added"
    assert own or megapixels > 0
    assert own or _explained(box, w, h), "Region Paste would refuse what Region Crop gave"
    if megapixels == 0 and width >= round_up(box.width, multiple) and height >= round_up(box.height, multiple):
        assert (w, h) == (box.width, box.height), "pixels were added although the picture has them"
    if not own and box.width < width and box.height < height:
        assert abs(w / box.width * box.height / h - 1) <= 1.5 / min(box.width, box.height) + 1e-9, "it is stretched"
        if min(w, h) > 2 * multiple:
            assert w * h / (megapixels * 2**20) == pytest.approx(1, abs=0.02 + multiple / min(w, h))


@settings(max_examples=12)
@given(st.integers(17, 260), st.integers(17, 260), st.tuples(share, share, share, share),
       st.integers(1, 2), st.sampled_from([0.0, 0.05]), st.sampled_from([16, 32]), st.integers(0, 10**6))
def test_crop_and_paste_of_any_size(height: int, width: int, place: tuple[float, ...], batch: int, megapixels: float,
                                    multiple: int, seed: int) -> None:
    image = noise(batch, height, width, 3, seed=seed)
    (left, right), (top, bottom) = run(place[0], place[1] / 2, width), run(place[2], place[3] / 2, height)
    mask = block(height, width, Box(left, top, right, bottom))
    made = crop(image, mask, context=1.2, min_context=9, megapixels=megapixels, multiple=multiple)
    assert made.image.shape == (batch, made.height, made.width, 3) and made.mask.shape == made.image.shape[:3]
    assert made.region.shape == (1, height, width) and made.blend.shape == (batch, height, width)
    box = region_box(made.region)
    if is_own_size(box, made.width, made.height):
        assert torch.equal(made.image[:, :box.height, :box.width], box.of(image))
        assert torch.equal(made.mask[:, :box.height, :box.width], box.of(mask).expand(batch, -1, -1))
        assert torch.equal(paste(image, made.image, region=made.region, blend=made.blend)[0], image)
    edit = noise(*made.image.shape, seed=seed + 1)
    pasted, _ = paste(image, edit, region=made.region, blend=made.blend)
    kept = (made.blend == 0)[..., None].expand_as(image)
    assert torch.equal(pasted[kept], image[kept])
    assert (pasted != image)[~kept].float().mean() > 0.9, "the edit is not there"


def test_the_region_holds_the_masks_of_all_pictures_of_a_batch() -> None:
    masks = torch.cat([block(200, 300, Box(20, 30, 40, 50)), block(200, 300, Box(220, 90, 260, 120))])
    made = crop(noise(2, 200, 300, 3), masks, context=1.0, min_context=0, megapixels=0)
    assert region_box(made.region) == Box(20, 27, 260, 123)
    assert torch.equal(made.blend, masks) and made.mask.sum() == masks.sum()
    around = crop(noise(1, 200, 300, 3), masks[:1], context_mask=masks[1:], context=1.0, min_context=0, megapixels=0)
    assert torch.equal(around.region, made.region) and torch.equal(around.blend, masks[:1])


def test_resampling_there_and_back_is_below_a_level() -> None:
    image = smooth(1, 300, 420)
    made = crop(image, block(300, 420, Box(150, 100, 220, 180)), megapixels=0.25)
    box = region_box(made.region)
    assert made.width > 1.4 * box.width
    back, _ = paste(image, made.image, region=made.region, blend=made.blend)
    assert (back - image).abs().max() < 1 / 255 and not torch.equal(back, image)


def test_d30_no_step_of_8_bits() -> None:
    """A resampling by 8-bit pictures that cuts off loses half a level on average each time."""
    image = smooth(1, 200, 200)
    made = crop(image, block(200, 200, Box(60, 60, 140, 140)), megapixels=0.25)
    back = paste(image, made.image, region=made.region)[0]
    inside = region_box(made.region).of(back - image)
    assert inside.mean().abs() < 0.02 / 255


def test_ten_rounds_leave_what_is_not_masked_bit_for_bit() -> None:
    first = image = noise(2, 230, 310, 3)
    boxes = [Box(40 + 9 * n, 50 + 5 * n, 120 + 9 * n, 110 + 5 * n) for n in range(10)]
    masks = [block(230, 310, box, value=1 - n / 20) for n, box in enumerate(boxes)]
    for number, mask in enumerate(masks):
        made = crop(image, mask, megapixels=0.05 * (number % 3))
        image, _ = paste(image, noise(*made.image.shape, seed=number), region=made.region, blend=made.blend,
                         colour_match=0.5)
    touched = torch.stack(masks).amax(0)[..., None].expand_as(image) > 0
    assert torch.equal(image[~touched], first[~touched]) and int((~touched).sum()) > 1000
    assert (image != first)[touched].float().mean() > 0.9


def test_nan_outside_the_mask_stays_where_it_is_and_comes_from_nowhere() -> None:
    image, mask = noise(1, 96, 128, 3), block(96, 128, Box(32, 32, 64, 64))
    made = crop(image, mask, megapixels=0, min_context=16)
    edit, box = noise(*made.image.shape, seed=1), region_box(made.region)
    outside = box.of(mask) == 0
    edit[:, :box.height, :box.width][outside] = float("nan")
    edit[:, 0, 0] = float("inf")
    pasted, _ = paste(image, edit, region=made.region, blend=made.blend, colour_match=1.0)
    assert torch.equal(pasted[mask == 0], image[mask == 0]) and torch.isfinite(pasted).all()
    holed = image.clone()
    holed[:, 2, 3], holed[:, 40, 2] = float("nan"), float("-inf")
    pasted, _ = paste(holed, noise(*made.image.shape), region=made.region, blend=made.blend)
    assert same_bits(pasted[mask == 0], holed[mask == 0])


def test_nan_in_the_edit_is_named_and_not_pasted() -> None:
    image, mask = noise(1, 96, 128, 3), block(96, 128, Box(32, 32, 64, 64), value=0.01)
    made = crop(image, mask, megapixels=0, min_context=0, context=1.0)
    edit = made.image.clone()
    edit[0, 3, 4, 1] = float("nan")
    with pytest.raises(NotFinite, match=r"NaN or infinity in 1 pixels.*VAE Decode"):
        paste(image, edit, region=made.region, blend=made.blend)


@pytest.mark.parametrize("amount", [0.5, 1.0])
def test_a_planted_colour_shift_is_taken_out(amount: float) -> None:
    image = 0.3 + 0.4 * noise(2, 128, 160, 3)
    mask = block(128, 160, Box(48, 48, 96, 80), batch=2)
    made = crop(image, mask, megapixels=0)
    gain, offset = torch.tensor([1.1, 0.9, 1.0]), torch.tensor([-0.05, 0.08, 0.03])
    pasted, notes = paste(image, made.image * gain + offset, region=made.region, blend=made.blend, colour_match=amount)
    expected = torch.lerp(image * gain + offset, image, amount)
    assert (pasted - expected)[mask == 1].abs().max() < 1e-4
    assert torch.equal(pasted[mask == 0], image[mask == 0]) and "levels of 255" in notes[-1]


def test_colours_are_not_matched_on_too_few_pixels() -> None:
    image = noise(1, 64, 64, 3)
    mask = torch.ones(1, 64, 64)
    mask[:, :3, :64] = 0
    mask[:, 3, :63] = 0                                                     # 255 pixels
    pasted, notes = paste(image, image * 0.5, blend=mask, colour_match=1.0)
    assert torch.equal(pasted[mask == 1], (image * 0.5)[mask == 1]) and "255 pixels" in notes[0]
    mask[:, 3, 63] = 0
    pasted, notes = paste(image, image * 0.5, blend=mask, colour_match=1.0)
    assert (pasted - image).abs().max() < 1e-4
    flat, _ = matched(torch.full((1, 32, 32, 3), 0.4), torch.full((1, 32, 32, 3), 0.5), torch.ones(1, 32, 32) > 0, 1.0)
    assert torch.allclose(flat, torch.full_like(flat, 0.5)), "an area without contrast is shifted, not amplified"


def test_a_soft_blend_mixes_and_off_replaces_the_region() -> None:
    image, edit = torch.zeros(1, 32, 32, 3), torch.ones(1, 32, 32, 3)
    blend = torch.linspace(0, 1, 32).expand(1, 32, 32)
    mixed, _ = paste(image, edit, blend=blend)
    assert torch.allclose(mixed[..., 0], blend)
    assert paste(image, edit, blend=blend, use_blend=False)[0].min() == 1
    alpha = torch.cat([image, torch.full((1, 32, 32, 1), 0.3)], dim=-1)
    assert torch.equal(paste(alpha, edit)[0], torch.cat([edit, alpha[..., 3:]], dim=-1))


@pytest.mark.parametrize(("height", "width"), [(75, 101), (96, 101), (17, 33)])
def test_pixels_added_up_to_a_multiple_are_taken_off(height: int, width: int) -> None:
    """What Flux Fill pads and core's VAE Decode gives, without a region."""
    image = noise(1, height, width, 3)
    for multiple in (16, 32):
        padded = noise(1, round_up(height, multiple), round_up(width, multiple), 3, seed=1)
        pasted, notes = paste(image, padded)
        assert torch.equal(pasted, padded[:, :height, :width]) and "taken off" in notes[0]


def rectangle_without_a_corner() -> Tensor:
    mask = block(64, 64, Box(8, 8, 40, 40))
    mask[:, 8, 8] = 0
    return mask


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no rectangle": ({"region": rectangle_without_a_corner()}, "no rectangle.* 1 pixels"),
    "empty region": ({"region": torch.zeros(1, 64, 64)}, "region mask is empty"),
    "other aspect": ({"edited": torch.zeros(1, 64, 128, 3)}, "128 x 64, the region 64 x 64 at 0, 0: another aspect"),
    "batch": ({"edited": torch.zeros(3, 64, 64, 3), "blend": torch.ones(2, 64, 64)}, "image 1, edited 3, blend 2"),
    "mask of another picture": ({"blend": torch.ones(1, 64, 80)}, "blend is 80 x 64"),
    "no picture": ({"image": torch.zeros(64, 64, 3)}, r"image must be \(batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_paste(case: str) -> None:
    changes, words = BAD[case]
    with pytest.raises(BadInput, match=words):
        paste(**{"image": torch.zeros(1, 64, 64, 3), "edited": torch.zeros(1, 64, 64, 3), **changes})


def test_bad_input_to_crop() -> None:
    image = noise(1, 64, 96, 3)
    for empty in (torch.zeros(1, 64, 96), torch.zeros(1, 64, 64)):          # of Load Image, too
        with pytest.raises(BadInput, match=r"mask is empty.*alpha channel.*painted red"):
            crop(image, empty)
        made = crop(image, empty, whole_if_empty=True, megapixels=0)
        assert torch.equal(made.image, image) and not made.blend.any() and "the whole picture" in made.notes[0]
    whole = crop(image, torch.ones(1, 64, 96), megapixels=0)
    assert torch.equal(whole.image, image) and bounds(whole.region) == Box(0, 0, 96, 64)
    with pytest.raises(BadInput, match="image 2, mask 3"):
        crop(image.expand(2, -1, -1, -1), torch.ones(3, 64, 96))
    with pytest.raises(BadInput, match="another aspect"):
        crop(image, torch.ones(1, 64, 64))
    with pytest.raises(NotFinite, match="image holds NaN"):
        crop(image * float("nan"), torch.ones(1, 64, 96))
    assert "alpha" in crop(noise(1, 64, 96, 4), torch.ones(1, 64, 96)).notes[0]
