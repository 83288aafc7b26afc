"""Rows of a stack: what is read from a widget or another pack's stack, and how rows are shaped."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from flux_kit.engine.adapters import Region, Row, parse_rows, rows_of, stack_of
from flux_kit.engine.adapters.stack import (
    MAX_ROWS,
    parse_points,
    softened,
    swept,
    with_blocks,
    with_region,
    with_schedule,
)
from flux_kit.engine.errors import BadInput


def test_rows_of_a_widget() -> None:
    found = parse_rows(json.dumps([
        {"on": True, "lora": "a/b.safetensors", "model": 0.8, "clip": 0.5, "blocks": "double = 0", "start": 0.1,
         "end": 0.9},
        {"on": False, "lora": "off.safetensors"}, {"lora": "c.safetensors", "model": -1}, {"lora": "d.safetensors"}]))
    assert found == [Row("a/b.safetensors", 0.8, 0.5, "double = 0", 0.1, 0.9), Row("c.safetensors", -1.0, -1.0),
                     Row("d.safetensors")]
    assert parse_rows("") == parse_rows("[]") == []


@pytest.mark.parametrize("text, says", [
    ("{", "no JSON"), ("{}", "JSON list"), ("[1]", "row 1"), ('[{"lora": 3}]', "row 1"),
    ('[{"lora": "a"}, {"lora": "b", "model": "x"}]', "row 2.*model"), ('[{"lora": "a", "model": true}]', "model"),
    ('[{"lora": "a", "model": NaN}]', "model"), ('[{"lora": "a", "model": 1e999}]', "model"),
    ('[{"lora": "a", "start": 0.9, "end": 0.1}]', "row 1.*end"), ('[{"lora": "a", "end": 2}]', "end"),
    ('[{"lora": "a", "blocks": "doubble=1"}]', "doubble"), ('[{"lora": "a", "on": "yes"}]', "'on'"),
    ("[" * 100_000, "no JSON"), (json.dumps([{"lora": "a"}] * (MAX_ROWS + 1)), "at most"),
    ('[{"lora": "a", "model": ' + "9" * 400 + "}]", "row 1"),
])
def test_bad_rows_are_named(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse_rows(text)


def test_stacks_of_other_packs_and_back() -> None:
    rows = rows_of([("a.safetensors", 1, 0.5), ["None", 1.0, 1.0], (None, 1.0, 1.0), Row("b", 0.0, 0.0)])
    assert [row.reads for row in rows] == [True, False, False, False]
    assert rows_of(None) == ()
    stack, lost = stack_of([rows[0], Row("c", blocks="single = 0"), Row("d", end=0.5)])
    assert stack == [("a.safetensors", 1.0, 0.5), ("c", 1.0, 1.0), ("d", 1.0, 1.0)]
    assert all(type(item) is tuple and [type(part) for part in item] == [str, float, float] for item in stack)
    assert len(lost) == 2 and "single = 0" in lost[0] and "range 0 to 0.5" in lost[1]


@pytest.mark.parametrize("value", ["a", 3, [("a", 1.0)], [(1, 1.0, 1.0)], [("a", "x", 1.0)], [{"lora": "a"}],
                                   [("a", math.nan, 1.0)]])
def test_what_is_no_stack_is_refused(value: Any) -> None:
    with pytest.raises(BadInput):
        rows_of(value)


def test_ranges_and_curves() -> None:
    row = Row("a", start=0.25, end=0.75)
    assert [row.factor(share) for share in (0, 0.24, 0.25, 0.5, 0.74, 0.75, 1)] == [0, 0, 1, 1, 1, 0, 0]
    assert Row("a").factor(1.0) == 1 and not Row("a").timed and row.timed
    points = parse_points("0: 1, 0.5: 0.3\n1: 0")
    assert points == ((0, 1), (0.5, 0.3), (1, 0))
    curve = Row("a", schedule=points)
    expected = {0.0: 1.0, 0.25: 0.65, 0.5: 0.3, 0.75: 0.15, 1.0: 0.0}
    assert all(math.isclose(curve.factor(share), value, abs_tol=1e-9) for share, value in expected.items())
    step = Row("a", schedule=parse_points("0.5: 0, 0.5: 1"))
    assert [step.factor(share) for share in (0.0, 0.4, 0.5, 0.9)] == [0, 0, 1, 1]


@pytest.mark.parametrize("text", ["", "1", "0: x", "0.5: 1, 0.2: 1", "2: 1", "-1: 1", "0: inf", "nan: 1"])
def test_bad_curves_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="schedule"):
        parse_points(text)


def test_shapes_of_rows() -> None:
    rows = (Row("a", blocks="double = 0.5"), Row("b", start=0.2, end=0.6))
    assert [row.blocks for row in with_blocks(rows, "single = 0")] == ["double = 0.5; single = 0", "single = 0"]
    narrowed = with_schedule(rows, 0.4, 1.0, None)
    assert [(row.start, row.end) for row in narrowed] == [(0.4, 1.0), (0.4, 0.6)]
    assert [(row.start, row.end) for row in with_schedule(rows, 0.7, 1.0, None)][1] == (0.7, 0.7)
    made = with_region(with_region(rows[:1], torch.ones(4, 4), 0, 0.0, 1.0) + rows[1:], torch.zeros(1, 4, 4), 0, 0.2, 0)
    assert [float(row.region.mask.mean()) for row in made if row.region] == [1.0, 0.0]
    with pytest.raises(BadInput):
        with_region(rows, torch.full((4, 4), math.nan), 0, 0.0, 1.0)


def test_region_at_the_size_of_the_picture() -> None:
    region = Region((torch.arange(8) < 4).float().expand(8, 8), background=0.25)
    shares = region.shares(2, 4).view(2, 4)
    assert torch.equal(shares, torch.tensor([[1.0, 1.0, 0.25, 0.25]] * 2))
    assert region.shares(5, 7).shape == (35,)
    hard = (torch.arange(64) < 32).float().expand(64, 64).contiguous()
    soft = softened(hard, 16)
    assert torch.equal(softened(hard, 0), hard) and soft.shape == hard.shape
    assert float(soft[0, 0]) == 1 and float(soft[0, -1]) == 0 and 0.3 < float(soft[0, 32]) < 0.7
    assert bool((soft[:, 1:] <= soft[:, :-1] + 1e-6).all()) and softened(hard[:2, :2], 1000).shape == (2, 2)


def test_sweeps() -> None:
    rows = (Row("x/a.safetensors", 0.5, 0.25), Row("b.safetensors"))
    stacks, labels = swept(rows, "0, 0.5;1", 1)
    assert [(stack[0].model, stack[0].clip, stack[1].model) for stack in stacks] == [
        (0, 0, 1), (0.5, 0.25, 1), (1, 0.5, 1)]
    assert labels == ["a 0", "a 0.5", "a 1"]
    assert swept(rows, "2", 0)[1] == ["a, b 2"] and [row.model for row in swept(rows, "2", 0)[0][0]] == [2, 2]
    for strengths, number in (("", 0), ("x", 0), ("1", 3), ("nan", 0), ("1e9", 0)):
        with pytest.raises(BadInput):
            swept(rows, strengths, number)
