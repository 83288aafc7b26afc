"""Flux Kit against the host's own code in one process: what inside.py found there."""

from __future__ import annotations

import pytest
from comfy_inside import Inside

SAME = 1e-5
NOT_IN_OLD_CORE = {"rope options", "attention patches"}  # core's Flux of 0.3.64 ignores them, ours does not


def test_one_pass_equals_core_s_network(inside: Inside) -> None:
    found = inside("one_pass")
    known = {name: case for name, case in found.items() if name not in NOT_IN_OLD_CORE or case["changed"]}
    assert len(known) >= 12
    assert {name: case for name, case in known.items() if not case["off"] <= SAME} == {}
    assert [name for name, case in known.items() if name != "plain" and case["changed"] < 0.01] == []


def test_blocks_of_the_published_width(inside: Inside) -> None:
    found = inside("full_width")
    assert len(found) == 4
    assert {name: case for name, case in found.items() if not case["off"] <= SAME} == {}


def test_half_precision_differs_by_rounding(inside: Inside) -> None:
    assert 0 <= inside("half_precision")["off"] <= 0.015  # bf16 has 8 bits; gates are fused with their sums here


def test_loras_act_as_on_core_s_network(inside: Inside) -> None:
    found = inside("lora")
    assert set(found) == {"kohya", "diffusers", "bfl control"}
    for name, case in found.items():
        assert case["off"] <= SAME and case["changed"] > 1e-3, name
        assert case["base"] == 0, f"{name} stayed on the model it was not given to"
        assert case["said"] == [], name


def test_partly_loaded_gives_the_same(inside: Inside) -> None:
    found = inside("partial_load")
    assert set(found) == {"no lora", "kohya", "diffusers"}
    for name, case in found.items():
        assert case["off"] <= 1e-6, name
        assert case["share"] < 0.5, "everything was loaded, so nothing was tested"
        assert name == "no lora" or case["changed"] > 1e-3, name


def test_loras_reach_both_text_encoders(inside: Inside) -> None:
    found = inside("text_lora")
    assert found["t5"] > 1e-4 and found["clip_l"] > 1e-4 and found["base"] == 0


def test_sizes_told_are_sizes_held(inside: Inside) -> None:
    found = inside("estimates")
    assert set(found) == {"model", "clip", "vae"}
    for name, case in found.items():
        assert 0 <= case["told"] - case["held"] <= 65536, name  # the table of sigmas is counted in


def test_control_nets_act_as_on_core_s_network(inside: Inside) -> None:
    found = inside("control_net")
    assert found["off"] <= SAME and found["changed"] > 0.01


def test_progress_and_previews(inside: Inside) -> None:
    assert inside("progress")["told"] == [[1, 3, [16, 12]], [2, 3, [16, 12]], [3, 3, [16, 12]]]


@pytest.mark.parametrize("name", ["model", "clip", "vae"])
def test_models_are_loaded_anew_and_given_up(inside: Inside, name: str) -> None:
    case = inside("lifetime")[name]
    assert case["same"] and case["apart"] and case.get("deep copy apart", True)
    assert case["mapped"] == 0 and case["freed"]


def test_what_other_packs_do_to_the_network(inside: Inside) -> None:
    found = inside("other_packs")
    assert found.pop("class") == "Flux"
    assert {name: off for name, off in found.items() if not off <= SAME} == {}
    assert found["forward_orig given back"] == 0 and found["afterwards"] == 0


@pytest.mark.parametrize(("name", "both_sides"), [
    ("model", ("BaseModel", "FLUX.1")), ("clip", ("g, l", "CLIP-L and T5")), ("vae", ("4 channels", "16")),
    ("latent", ("4 channels", "16")), ("decoded latent", ("4 channels", "16")), ("nan", ("NaN",)),
])
def test_objects_of_other_models_are_refused(inside: Inside, name: str, both_sides: tuple[str, ...]) -> None:
    told = inside("refusals")[name]
    assert all(part in told for part in both_sides), told


def test_an_empty_latent_of_another_width_is_taken(inside: Inside) -> None:
    assert inside("refusals")["empty of another width"] == ""


@pytest.mark.parametrize(("name", "told"), [("out of memory", "OutOfMemoryError"), ("nan", "NotFinite: step 3 of 4"),
                                            ("interrupt", "InterruptProcessingException")])
def test_after_an_accident_the_same_run_gives_the_same(inside: Inside, name: str, told: str) -> None:
    case = inside("accidents")[name]
    assert case["told"].startswith(told) and case["again"] == 0
