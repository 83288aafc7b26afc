"""What the later members are asked: masks that cover both figures, maps that follow the figure, edits of one thing."""

from __future__ import annotations

import random
from dataclasses import fields

import numpy as np
import pytest
from flux_kit.tiny_flux.scenes import PALETTE, SHAPES, caption, render
from flux_kit.tiny_flux.tasks import SCENES, depth, edges, edit_task, figure, fill_task, hole, join_task, misleading
from flux_kit.tiny_flux.vocabulary import t5_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = (128, 128)
RANDOM = st.integers(0, 10**6).map(random.Random)
SCENE = st.sampled_from(SCENES[True])


@given(RANDOM, st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_fill_covers_what_was_there_and_what_is_to_come(rng: random.Random, held_out: bool) -> None:
    task = fill_task(rng, held_out)
    assert task.before.ground == task.after.ground and task.before.held_out == task.after.held_out == held_out
    for scene in (task.before, task.after):
        assert task.mask[figure(scene, SIZE) > 0].min() == 1
    kept = task.mask == 0
    assert np.array_equal(render(task.before)[kept], render(task.after)[kept]), "outside the mask they differ"


@given(RANDOM, SCENE)
@settings(max_examples=60, deadline=None)
def test_a_hole_to_train_with_is_a_mask(rng: random.Random, scene: object) -> None:
    mask = hole(rng, scene, SIZE)  # type: ignore[arg-type]
    assert mask.shape == (128, 128) and mask.dtype == np.float32 and mask.min() >= 0 and mask.max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_lie_on_the_outline_and_depth_on_the_figure(shape: str) -> None:
    scene = next(scene for scene in SCENES[True] if scene.shape == shape)
    inside = figure(scene, SIZE)
    line, near = edges(scene, SIZE), depth(scene, SIZE)
    assert set(np.unique(line)) == {0, 1} and line[inside == 0].max() == 0
    gradient = np.hypot(*np.gradient(inside))
    assert gradient[line == 1].min() > 0, "a line where nothing changes"
    assert line[(inside > 0.5) & (gradient == 0)].max() == 0
    assert np.allclose(near, inside, atol=1e-6)


@given(RANDOM, SCENE)
@settings(max_examples=60, deadline=None)
def test_a_misleading_prompt_is_right_in_its_colours(rng: random.Random, scene: object) -> None:
    text = misleading(scene, rng)  # type: ignore[arg-type]
    told = [color for color in PALETTE if color in text.replace("colored", "").split() or f"{color}," in text.split()]
    assert set(told) == {scene.color, scene.ground}  # type: ignore[attr-defined]


@given(RANDOM, st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_edit_changes_what_it_names_and_nothing_else(rng: random.Random, held_out: bool) -> None:
    task = edit_task(rng, held_out)
    (before,) = task.references
    changed = [field.name for field in fields(before) if getattr(before, field.name) != getattr(task.after, field.name)]
    assert 1 <= len(changed) <= (1 if held_out else 2)
    assert (before.shape in task.prompt or changed == ["ground"]) and task.after.color != task.after.ground
    assert before.held_out == task.after.held_out == held_out
    unknown = [piece for piece in t5_tokenizer().encode(task.prompt).tokens if len(piece) == 1]
    assert set(unknown) <= {","}, "a word that the tokenizer spells in letters"


@given(RANDOM)
@settings(max_examples=40, deadline=None)
def test_two_references_give_the_figure_and_the_background(rng: random.Random) -> None:
    task = join_task(rng, True)
    first, second = task.references
    assert (task.after.shape, task.after.color, task.after.place, task.after.size) == (
        first.shape, first.color, first.place, first.size)
    assert task.after.ground == second.ground and first.shape in task.prompt
    assert caption(task.after) != task.prompt
