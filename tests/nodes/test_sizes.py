"""Picture sizes: presets and the grid of 16."""

from __future__ import annotations

import pytest
from flux_kit.engine.errors import BadInput
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def sizes(host):  # type: ignore[no-untyped-def]
    from flux_kit.nodes import sizes as module
    return module


def test_one_to_one_at_one_megapixel_is_1024(sizes) -> None:  # type: ignore[no-untyped-def]
    assert sizes.picture_size("1:1", 1.0, 0, 0) == (1024, 1024)
    assert sizes.picture_size("16:9", 1.0, 0, 0) == (1360, 768)
    assert sizes.picture_size("9:16", 1.0, 0, 0) == (768, 1360)
    assert sizes.picture_size("custom", 1.0, 640, 480) == (640, 480)


@pytest.mark.parametrize(("value", "words"), [(1000, "992 and 1008"), (17, "16 and 32"), (0, "16 ... 16384"),
                                              (16400, "16 ... 16384")])
def test_bad_sides_are_told_with_the_nearest(sizes, value: int, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match=words):
        sizes.picture_size("custom", 1.0, value, 64)
    with pytest.raises(BadInput, match=words):
        sizes.picture_size("custom", 1.0, 64, value)


def test_no_more_than_64_megapixels(sizes) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match="64 megapixels"):
        sizes.picture_size("custom", 1.0, 16384, 8192)


def test_presets_have_their_aspect_and_area(sizes) -> None:  # type: ignore[no-untyped-def]
    ratios = {name: ratio for name, ratio in sizes.ASPECTS.items() if ratio is not None}

    @given(st.sampled_from(sorted(ratios)), st.floats(0.25, 60))
    def check(name: str, megapixels: float) -> None:
        width, height = sizes.picture_size(name, megapixels, 1, 1)
        across, down = ratios[name]
        assert width % 16 == 0 and height % 16 == 0
        assert width * height / (megapixels * 2**20) == pytest.approx(1, abs=0.08)
        assert (width / height) / (across / down) == pytest.approx(1, abs=0.08)

    check()
