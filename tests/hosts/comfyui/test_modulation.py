"""The table of modulations inside ComfyUI: latents with it are those without it, bit for bit, whatever others do."""

from __future__ import annotations

from itertools import pairwise

import pytest
from comfy_inside import Inside

MEMORIES = [f"{kind} {memory}" for kind in ("plain", "packed") for memory in ("loaded", "streamed")]
ONCE, FOUND, NEVER = [3, 2], [0, 3], [0, 0]  # computed, found: in three steps


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("case", ["none", "lora", "lora on embedder", "lora elsewhere", "wrapper"])
def test_patches_on_weights_give_what_they_give_without_it(inside: Inside, memory: str, case: str) -> None:
    """0.33.0 loads more of a streamed model for each run. When it loads a layer that a LoRA hung on, it puts the LoRA
    into the weight, which is another one then: the table is filled anew, that once.
    """
    found = inside("modulation_weights")[f"{memory} {case}"]
    assert found["equal"] and (found["changed"] > 1e-3) == (case != "none")
    did, hung = found["did"], found["hung"]
    assert did == [ONCE, *(FOUND if after == before else ONCE for before, after in pairwise(hung))]
    assert did.count(ONCE) == len(set(hung)) <= 2 and did[-1] == FOUND
    if memory.endswith("loaded") or not case.startswith("lora"):
        assert hung == [0] * len(hung)


@pytest.mark.parametrize("memory", MEMORIES)
def test_side_paths_on_modulations_are_computed_once_a_run(inside: Inside, memory: str) -> None:
    found = inside("modulation_weights")[f"{memory} side path"]
    assert found["equal"] and found["changed"] > 1e-3
    assert all(each == ONCE for each in found["did"])  # each run puts it on anew


@pytest.mark.parametrize("memory", MEMORIES)
def test_one_that_changes_in_a_run_leaves_the_other_layers_in_it(inside: Inside, memory: str) -> None:
    found = inside("modulation_weights")[f"{memory} side path that changes"]
    assert found["equal"] and found["changed"] > 1e-3
    assert found["did"] == [ONCE, *[FOUND] * (len(found["did"]) - 1)]


@pytest.mark.parametrize("memory", MEMORIES)
def test_nothing_of_a_patch_stays_in_it(inside: Inside, memory: str) -> None:
    assert inside("modulation_weights")[f"{memory} afterwards"]["equal"]


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_weights_brought_over_once_give_what_the_layer_gives(inside: Inside, kind: str) -> None:
    assert inside("modulation_weights")[f"{kind} carried"]["equal"]


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_it_stands_aside_while_hooks_change_weights_during_a_run(inside: Inside, kind: str) -> None:
    found = inside("modulation_weights")
    during, after = found[f"{kind} hooks"], found[f"{kind} hooks afterwards"]
    assert during["equal"] and during["changed"] > 1e-3 and during["did"] == [NEVER, NEVER]
    assert after["equal"] and after["changed"] == 0 and after["did"][1] == FOUND


@pytest.mark.parametrize(("case", "first", "second"), [
    ("plain", ONCE, FOUND), ("another seed", ONCE, FOUND), ("guided", ONCE, FOUND), ("heun", [3, 4], [0, 5]),
    ("dpm_2", [5, 2], [0, 5]), ("blocks swapped by patches", ONCE, FOUND), ("blocks swapped in the list", ONCE, FOUND),
    ("vec changed", ONCE, FOUND), ("options left out", ONCE, FOUND), ("forward_orig replaced", NEVER, NEVER),
    ("forward_orig of a pack as an object patch", NEVER, NEVER), ("afterwards", ONCE, FOUND)])
def test_samplers_prompts_and_other_packs(inside: Inside, case: str, first: list[int], second: list[int]
                                          ) -> None:
    """The entries of a run are computed at its first step; what a sampler asks for between two sigmas, when it does."""
    found = inside("modulation_calls")[case]
    assert found["equal"] and (found["changed"] > 1e-3) == (case not in ("plain", "options left out", "afterwards"))
    assert found["did"] == [first, second]


def test_prompts_of_two_guidances_go_in_one_batch(inside: Inside) -> None:
    assert inside("modulation_calls")["guided"]["batches"] == [2]


def test_layers_called_directly_compute_from_their_weights(inside: Inside) -> None:
    assert inside("modulation_calls")["direct calls"]["equal"]


@pytest.mark.parametrize("kind", ["plain", "packed"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_where_a_model_does_not_fit_these_weights_stay_away_first(inside: Inside, kind: str, share: float
                                                                  ) -> None:
    found = inside("modulation_memory")[f"{kind} {share}"]
    assert found["loaded"] <= share and found["freed"] >= 0.05
    if share < 1 - found["modulating"]:
        assert found["modulations away"] == 1
    else:  # their largest may stay away in part, anything else not at all
        assert 0 < found["modulations away"] <= 1 and found["others away"] == 0


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_what_the_host_asks_back_it_gets_of_them_first(inside: Inside, kind: str) -> None:
    found = inside("modulation_memory")[f"{kind} given back"]
    assert found["others"] == [] and found["count"] > 0 and found["freed"] >= 0.5 * found["modulating"]
