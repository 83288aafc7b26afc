"""Edges against OpenCV's own answers, kept in tests/data/canny.json (4.14) and live where it is installed; depth maps
against the formulas."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_kit.engine.conditioning import preprocess
from flux_kit.engine.conditioning.preprocess import DepthInput, canny, depth_picture
from flux_kit.engine.errors import BadInput, NotFinite
from scenes_8bit import SCENES

KEPT: dict[str, str] = json.loads((Path(__file__).parents[2] / "data" / "canny.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", KEPT)
def test_d26_edges_are_opencv_s_to_the_bit(case: str) -> None:
    name, height, width, low, high = case.split()
    size = int(height), int(width)
    found = canny(SCENES[name](*size), float(low), float(high))
    kept = np.unpackbits(np.frombuffer(bytes.fromhex(KEPT[case]), np.uint8))[:size[0] * size[1]].reshape(size)
    assert found.shape == (1, *size, 3) and kept.any()
    assert torch.equal(found[0, ..., 0], torch.from_numpy(kept).float())
    assert torch.equal(found[..., 0], found[..., 2])


@pytest.mark.parametrize(("low", "high"), [(50, 200), (0, 40), (30.5, 90.2), (400, 200)])
def test_d26_edges_are_the_installed_opencv_s(low: float, high: float) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed; its kept answers are compared")
    rng = np.random.default_rng(3)
    for height, width in ((1, 9), (33, 20), (64, 80)):
        for scene in SCENES.values():
            image = scene(height, width)
            levels = np.ascontiguousarray((image[0].numpy() * 255).round().astype(np.uint8))
            assert np.array_equal(canny(image, low, high)[0, ..., 0].numpy() * 255, cv2.Canny(levels, low, high))
    levels = rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)
    image = torch.from_numpy(levels)[None].float() / 255
    assert np.array_equal(canny(image, low, high)[0, ..., 0].numpy() * 255, cv2.Canny(levels, low, high))


def test_edges_of_a_batch_and_what_is_said() -> None:
    images = torch.cat([SCENES["flat"](32, 32), SCENES["soft"](32, 32)])
    found, notes = preprocess.edges(images, 200, 50)
    assert "swapped" in notes[0] and torch.equal(found, canny(images, 50, 200))
    assert torch.equal(found[1:], canny(images[1:]))
    nothing, notes = preprocess.edges(torch.full((1, 16, 16, 3), 0.5), 50, 200)
    assert not nothing.any() and "no edges" in notes[0]
    with pytest.raises(NotFinite):
        canny(torch.full((1, 8, 8, 3), float("nan")))
    with pytest.raises(BadInput):
        canny(torch.zeros(8, 8, 3))


def test_invert_and_as_is() -> None:
    image = SCENES["flat"](16, 16)
    assert torch.equal(preprocess.map_of(image)[0], image)
    assert torch.equal(preprocess.map_of(image, invert=True)[0], 1 - image)


@pytest.mark.parametrize(("size", "resolution", "expected"), [
    ((480, 640), 518, (518, 686)), ((640, 480), 518, (686, 518)), ((1024, 1024), 518, (518, 518)),
    ((300, 900), 518, (168, 518)), ((64, 64), 140, (140, 140)), ((2000, 100), 518, (518, 28))])
def test_the_size_a_picture_is_given_to_a_depth_model_in(size: tuple[int, int], resolution: int,
                                                         expected: tuple[int, int]) -> None:
    """Worked out by hand: the scale nearer to 1, then whole patches of 14."""
    assert DepthInput().size_of(*size, resolution) == expected


def test_the_size_is_transformers_own() -> None:
    module = pytest.importorskip("transformers.models.dpt.image_processing_pil_dpt")
    resize = getattr(module, "get_resize_output_image_size", None)
    if resize is None:
        pytest.skip("this transformers has no such function")
    for height, width in ((97, 300), (640, 427), (518, 1037)):
        found = resize(torch.zeros(3, height, width), (518, 518), True, 14)
        sides = (found.height, found.width) if hasattr(found, "height") else tuple(found)
        assert DepthInput().size_of(height, width) == tuple(map(int, sides))


def test_d27_depth_is_stretched_to_its_range_or_left_raw() -> None:
    near = torch.linspace(3, 40, 12 * 16).view(1, 12, 16)
    picture, notes = depth_picture(near)
    assert not notes and picture.shape == (1, 12, 16, 3)
    torch.testing.assert_close(picture[..., 1], (near - 3) / 37)
    raw, _ = depth_picture(near, "raw")
    torch.testing.assert_close(raw[..., 0] * 2 - 1, near / 127.5 - 1)  # what BFL hands the autoencoder
    assert raw.max() < 0.2, "the table's warning: raw maps look dark"
    with pytest.raises(BadInput, match="min-max, raw"):
        depth_picture(near, "log")


@pytest.mark.parametrize("value", [0.0, 7.5])
def test_a_constant_depth_is_mid_grey(value: float) -> None:
    two = torch.stack([torch.full((8, 8), value), torch.linspace(0, 1, 64).view(8, 8)])
    picture, notes = depth_picture(two)
    assert (picture[0] == 0.5).all() and "the same everywhere" in notes[0]
    assert picture[1].min() == 0 and picture[1].max() == 1  # each picture by its own range


def test_near_is_white_for_both_kinds_of_models() -> None:
    ramp = torch.linspace(1, 5, 20).expand(1, 14, 20).contiguous()
    relative = DepthInput().nearness(ramp, 28, 40)
    metric = DepthInput(metric=True).nearness(ramp, 28, 40)
    assert relative.shape == metric.shape == (1, 28, 40)
    assert (relative.diff(dim=2) > -1e-6).all() and (metric.diff(dim=2) < 1e-6).all()
    with pytest.raises(NotFinite):
        DepthInput().nearness(torch.full((1, 4, 4), float("inf")), 8, 8)


def test_zoe_s_mirrored_margin_is_cut_off_again() -> None:
    """The picture's own pixels come back where a model would answer with the brightness it sees."""
    zoe = DepthInput((384, 512), True, 32, (0.0,) * 3, (1.0,) * 3, "bilinear", True)
    image = torch.linspace(0, 1, 400 * 600).view(1, 400, 600, 1).expand(-1, -1, -1, 3)
    assert zoe.margin(400, 600) == (42, 51)
    seen = zoe.pixels(image)
    assert seen.shape[2] % 32 == 0 and seen.shape[3] % 32 == 0
    torch.testing.assert_close(zoe.nearness(seen[:, 0], 400, 600), image[..., 0], atol=6e-3, rtol=0)
