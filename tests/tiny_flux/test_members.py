"""What the later members of tiny-flux do, judged by pixels through the engine's own path.

The whole score (200 cases each) is `python -m flux_kit.tiny_flux.members`; these are samples of it with fixed seeds and
floors below what the shipped weights reach (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from flux_kit.engine.weights import detect, open_checkpoint
from flux_kit.tiny_flux.members import MODELS, Restyler, depths, edits, fills, likeness, maps
from flux_kit.tiny_flux.scenes import render
from flux_kit.tiny_flux.score import Studio
from flux_kit.tiny_flux.tasks import SCENES, edges, edit_task

CASES = 12
DEPTH_FLOOR, KONTEXT_FLOOR = 0.8, 0.75
KINDS = {  # file: role, variant
    "diffusion_models/tiny-flux-fill.gguf": ("transformer", "fill"),
    "diffusion_models/tiny-flux-canny.safetensors": ("transformer", "control"),
    "diffusion_models/tiny-flux-kontext.safetensors": ("transformer", "dev"),
    "clip_vision/tiny-siglip.safetensors": ("vision", None),
    "style_models/tiny-redux.safetensors": ("redux", None),
}


@pytest.mark.parametrize("file", KINDS)
def test_files_are_told_by_their_headers(file: str) -> None:
    with open_checkpoint(MODELS / file) as checkpoint:
        found = detect(checkpoint)
    assert not found.problems and (found.role, found.variant) == KINDS[file]


def test_all_of_tiny_flux_is_small() -> None:
    sizes = [path.stat().st_size for path in MODELS.rglob("*") if path.is_file()]
    assert max(sizes) <= 8e6 and sum(sizes) <= 40e6


def share(judged: Iterable[bool]) -> float:
    """How much was right, of all the cases asked for."""
    found = list(judged)
    assert len(found) == CASES
    return sum(found) / CASES


def test_fill_paints_what_the_prompt_says_inside_the_mask() -> None:
    assert share(fills(CASES)) >= 0.8


def test_canny_follows_the_map_while_the_prompt_picks_colours() -> None:
    assert share(maps(Studio("canny"), edges, 30, CASES)) >= 0.8


def test_the_depth_lora_does_the_same() -> None:
    assert share(depths(CASES)) >= DEPTH_FLOOR


def test_kontext_changes_what_was_asked() -> None:
    assert share(edits(CASES, edit_task)) >= KONTEXT_FLOOR


def test_redux_carries_the_reference_by_its_strength() -> None:
    found = likeness(6)
    assert found.right >= 0.8 and found.correlation >= 0.9


def test_redux_at_strength_0_is_no_redux() -> None:
    restyler, references = Restyler(), [render(SCENES[True][0])]
    plain = restyler.studio.pictures([""], guidance=2.5, seed=3)
    assert np.array_equal(restyler.pictures(references, 0.0, 3), plain)
    assert not np.array_equal(restyler.pictures(references, 0.5, 3), plain)
