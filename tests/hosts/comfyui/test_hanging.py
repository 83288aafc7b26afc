"""LoRAs of every kind on packed weights inside ComfyUI: what the host's own function makes of the unpacked weight,
without unpacking it as a whole; and what the host is told of their bytes."""

from __future__ import annotations

import pytest
from comfy_inside import Inside

SAME = 2e-6
BESIDE = ("LoRA", "LoHa", "LoKr", "LoKr factored", "OFT", "OFT rescaled", "our DoRA by rows", "our DoRA by columns",
          "our GLoRA", "our OFT", "our BOFT", "our OFTv2", "our IA3 on outputs", "our IA3 on inputs", "slices of rows",
          "everything")
ON_TILES = ("LoRA with DoRA", "LoHa of high rank", "LoHa with DoRA", "diff", "named diff", "set",
            "our LoHa of high rank", "our diff", "our set", "a DoRA behind a LoRA", "a diff of some rows",
            "a DoRA of some rows", "a scaled weight")
WHOLE = ("LoRA with DoRA by columns", "a rotation behind a LoRA", "a function")
TILE = 100 / 768  # of the weight, in rows


def test_each_kind_is_tried(inside: Inside) -> None:
    assert set(inside("hanging_kinds")) == {*BESIDE, *ON_TILES, *WHOLE}


@pytest.mark.parametrize("kind", [*BESIDE, *ON_TILES, *WHOLE])
def test_it_gives_what_the_host_s_function_gives(inside: Inside, kind: str) -> None:
    found = inside("hanging_kinds")[kind]
    assert found["off"] <= SAME and found["dense"] <= SAME and found["changed"] > 1e-2
    assert found["after"] == 0, "something stayed on the layer"


@pytest.mark.parametrize("kind", BESIDE)
def test_beside_the_weight_nothing_is_unpacked_for_it(inside: Inside, kind: str) -> None:
    found = inside("hanging_kinds")[kind]
    assert not found["whole"] and found["told"] == pytest.approx(found["bytes"], rel=0.1, abs=600)


@pytest.mark.parametrize("kind", ON_TILES)
def test_or_a_few_rows_at_a_time(inside: Inside, kind: str) -> None:
    found = inside("hanging_kinds")[kind]
    assert found["whole"] and found["at once"] == pytest.approx(TILE) and found["told"] == found["bytes"] == 0


@pytest.mark.parametrize("kind", WHOLE)
def test_or_as_a_whole_where_rows_cannot_be_told_apart(inside: Inside, kind: str) -> None:
    assert inside("hanging_kinds")[kind]["at once"] == 1


def test_of_two_that_replace_a_weight_the_later_counts(inside: Inside) -> None:
    """At any strength, as `flux-kit run` and merged files have it."""
    found = inside("hanging_set_twice")
    assert found["from the later"] <= SAME and found["from the earlier"] > 0.1


def test_the_host_counts_their_bytes_and_loads_fewer_weights(inside: Inside) -> None:
    found = inside("hanging_memory")
    assert found["numbers"] > 0.1, "too few to tell anything"
    assert found["more"] == pytest.approx(1, rel=0.01) and found["base"] == found["full"] == found["clone"] == 1
    for share in ("loaded 0.5", "loaded 0.9"):
        case = found[share]
        assert case["beside"] == pytest.approx(1, rel=0.01) and case["after"] == 0
        assert 0.4 < case["taken"] <= 1 and case["told"] == pytest.approx(case["taken"], rel=0.02)


def test_the_host_makes_room_for_side_paths_of_a_run(inside: Inside) -> None:
    found = inside("hanging_room")
    assert found["more"] == pytest.approx([1, 1], rel=1e-3) and found["changed"] > 1e-3
