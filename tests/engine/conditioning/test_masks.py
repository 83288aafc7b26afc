"""Mask Refine: exact pixels, by brute force and scipy as oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flux_kit.engine.conditioning.masks import Refinement, feathered, grown, refine, snapped, without_holes
from flux_kit.engine.conditioning.pictures import fit_mask, read_mask
from flux_kit.engine.errors import BadInput, NotFinite
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor


def random_mask(seed: int, batch: int, height: int, width: int, *, soft: bool) -> Tensor:
    values = torch.rand(batch, height, width, generator=torch.Generator().manual_seed(seed))
    return torch.where(values > 0.8, values if soft else torch.ones(()), torch.zeros(()))


def disc(radius: int) -> np.ndarray:
    across = np.arange(-radius, radius + 1)
    return across[:, None] ** 2 + across[None] ** 2 <= radius**2


sizes = {"height": st.integers(1, 40), "width": st.integers(1, 40), "seed": st.integers(0, 10**6)}


@pytest.mark.parametrize("pixels", [-9, -1, 1, 5, 12])
@pytest.mark.parametrize("soft", [False, True])
def test_grow_moves_a_straight_edge_by_exactly_that(pixels: int, soft: bool) -> None:
    half = torch.zeros(1, 30, 40)
    half[..., :20] = 0.7 if soft else 1.0
    expected = torch.zeros(1, 30, 40)
    expected[..., :20 + pixels] = half.max()
    assert torch.equal(grown(half, pixels), expected)
    assert torch.equal(grown(half.mT, pixels), expected.mT)


@settings(max_examples=25)
@given(**sizes, radius=st.integers(1, 9), soft=st.booleans())
def test_grow_is_the_largest_in_a_disc(height: int, width: int, seed: int, radius: int, soft: bool) -> None:
    mask = random_mask(seed, 2, height, width, soft=soft)
    expected = [ndimage.grey_dilation(item.numpy(), footprint=disc(radius), mode="constant", cval=0) for item in mask]
    assert np.array_equal(grown(mask, radius).numpy(), np.stack(expected))
    smallest = [ndimage.grey_erosion(item.numpy(), footprint=disc(radius), mode="constant", cval=1) for item in mask]
    assert np.allclose(grown(mask, -radius).numpy(), np.stack(smallest), atol=1e-6)


@settings(max_examples=15)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.booleans())
def test_grow_then_shrink_of_a_block_is_the_block(height: int, width: int, pixels: int, soft: bool) -> None:
    block = torch.zeros(1, height + 2 * pixels + 2, width + 2 * pixels + 2)
    block[:, pixels + 1:pixels + 1 + height, pixels + 1:pixels + 1 + width] = 0.5 if soft else 1
    assert torch.equal(grown(grown(block, pixels), -pixels), block)


@settings(max_examples=15)
@given(**sizes, pixels=st.integers(1, 9), soft=st.booleans())
def test_more_is_never_less(height: int, width: int, seed: int, pixels: int, soft: bool) -> None:
    mask = random_mask(seed, 1, height, width, soft=soft)
    shrunk, rim, beyond = grown(mask, -pixels), feathered(mask, pixels), grown(mask, pixels + 1)
    assert (shrunk <= mask + 1e-6).all() and (mask <= rim).all() and (rim <= beyond).all()
    assert torch.equal(rim[mask > 0], mask[mask > 0]), "feather changed what is in the mask"


def test_feather_is_a_ramp_that_ends_after_exactly_its_width() -> None:
    half = torch.zeros(1, 3, 20)
    half[..., :5] = 1
    rim = feathered(half, 9)[0, 1]
    assert torch.allclose(rim[5:14], torch.arange(9, 0, -1) / 10) and (rim[14:] == 0).all() and (rim[:5] == 1).all()


@settings(max_examples=25)
@given(**sizes)
def test_holes_are_those_of_scipy(height: int, width: int, seed: int) -> None:
    mask = (random_mask(seed, 2, height, width, soft=False) + random_mask(seed + 1, 2, height, width, soft=False)
            + random_mask(seed + 2, 2, height, width, soft=False)).clamp(max=1)
    expected = np.stack([ndimage.binary_fill_holes(item.numpy() > 0) for item in mask])
    assert np.array_equal(without_holes(mask).numpy(), expected.astype(np.float32))


def test_a_hole_of_a_soft_mask_takes_its_nearest_value() -> None:
    ring = torch.zeros(1, 9, 9)
    ring[:, 2:7, 2:7] = 0.6
    ring[:, 4, 4] = 0
    filled = without_holes(ring)
    assert filled[0, 4, 4] == ring.max() and int((filled != ring).sum()) == 1


@settings(max_examples=15)
@given(**sizes, cell=st.sampled_from([8, 16]))
def test_snap_leaves_every_cell_constant(height: int, width: int, seed: int, cell: int) -> None:
    mask = random_mask(seed, 1, height, width, soft=True)
    made = snapped(mask, cell)
    for top in range(0, height, cell):
        for left in range(0, width, cell):
            part = made[:, top:top + cell, left:left + cell]
            assert (part == mask[:, top:top + cell, left:left + cell].max()).all()


def test_the_order_is_invert_threshold_holes_grow_feather_snap() -> None:
    mask = torch.ones(1, 64, 64)
    mask[:, 20:40, 20:40] = 0.2
    mask[:, 28:32, 28:32] = 0.9                                 # a hole once inverted
    made, notes = refine(mask, Refinement(grow=2, feather=3, invert=True, snap=8))
    block = torch.zeros(1, 64, 64)
    block[:, 20:40, 20:40] = 1
    assert torch.equal(made, snapped(feathered(grown(block, 2), 3), 8)) and notes == []
    soft, _ = refine(mask, Refinement(grow=0, threshold=0, fill_holes=False))
    assert torch.equal(soft, mask), "threshold 0 keeps soft values"
    edge, _ = refine(torch.full((1, 4, 4), 0.5), Refinement(grow=0))
    assert edge.min() == 1, "what reaches the threshold is in"


def test_what_is_wrong_is_repaired_and_told() -> None:
    mask = torch.zeros(8, 8)
    mask[0, 0], mask[4:, 4:], mask[7, 0] = float("nan"), 3.0, -1.0
    made, notes = refine(mask, Refinement(grow=0))
    assert made.shape == (1, 8, 8) and made[0, 0, 0] == 0 and made.sum() == 16
    assert "1 pixels were NaN" in notes[0] and "17 pixels were outside 0 ... 1" in notes[1]
    assert refine(torch.zeros(1, 8, 8), Refinement())[1] == ["the mask is empty"]
    assert "empty once it has shrunk" in refine(made, Refinement(grow=-9))[1][0]
    assert "covers the whole" in refine(torch.ones(1, 8, 8), Refinement())[1][0]
    with pytest.raises(BadInput, match=r"batch, height, width.*\(3,\)"):
        refine(torch.zeros(3), Refinement())
    with pytest.raises(NotFinite, match="Mask Refine"):
        read_mask(mask)


def test_a_mask_of_another_aspect_is_refused() -> None:
    same, notes = fit_mask(torch.ones(1, 50, 75), (100, 150))
    assert same.shape == (1, 100, 150) and same.min() == 1 and "stretched from 75 x 50 to 150 x 100" in notes[0]
    with pytest.raises(BadInput, match=r"64 x 64, the picture 96 x 64.*Load Image"):
        fit_mask(torch.zeros(1, 64, 64), (64, 96))
