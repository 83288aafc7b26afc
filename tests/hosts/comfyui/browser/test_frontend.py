"""The example workflows in ComfyUI's own web interface, both on the canvas and as Nodes 2.0.

With FLUX_KIT_SCREENSHOTS=docs/images the pictures of the documentation are made anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_server import Server
from frontend import Frontend, Seen
from PIL import Image

EXAMPLES = {path.name: path for path in sorted((Path(__file__).parents[4] / "example_workflows").glob("*.json"))}
CLEAN = Seen(missing=[], red=[], dialogs=[])
HELLO, SAVE = "hello_tiny_flux.json", 6
Workflow = Callable[[str], dict[str, Any]]


def coarse(picture: Image.Image) -> Any:
    """(height, width, 3), eight levels a channel."""
    return np.asarray(picture.convert("RGB")) // 32


def ground(picture: Image.Image) -> Any:
    """The colour that most of a picture has, coarsely."""
    colours, counts = np.unique(coarse(picture).reshape(-1, 3), axis=0, return_counts=True)
    return colours[counts.argmax()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens_and_would_queue_what_flux_kit_run_runs(
        frontend: Frontend, workflow: Workflow, standalone_prompt: Callable[[Path], dict[str, Any]],
        name: str) -> None:
    assert frontend.open(name, workflow(name)) == CLEAN
    assert frontend.prompt() == standalone_prompt(EXAMPLES[name])  # titles in _meta too
    assert frontend.look() == CLEAN and frontend.problems == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_nodes_of_an_example_stand_apart_and_show_all_they_say(frontend: Frontend, workflow: Workflow,
                                                                   name: str) -> None:
    frontend.open(name, workflow(name))
    touching = [(a.title, b.title) for a, b in combinations(frontend.boxes(), 2) if a.touches(b)]
    assert touching == [] and frontend.cut() == []


def test_a_node_that_is_missing_would_be_seen(frontend: Frontend, workflow: Workflow) -> None:
    """The tests above can fail."""
    broken = workflow(HELLO)
    broken["nodes"][0]["type"] = "NodeOfNobody"
    frontend.open("broken.json", broken)
    seen = frontend.look_when("seen.dialogs.length")
    assert any("NodeOfNobody" in told for told in seen.missing)
    assert any("NodeOfNobody" in told for told in seen.red)
    frontend.page.keyboard.press("Escape")
    frontend.open(HELLO, workflow(HELLO))
    assert frontend.look_when("!seen.dialogs.length") == CLEAN


def test_run_brings_the_picture_to_the_save_node(frontend: Frontend, server: Server, workflow: Workflow,
                                                 tmp_path: Path, request: pytest.FixtureRequest) -> None:
    frontend.open(HELLO, workflow(HELLO))
    (saved,) = frontend.run()[str(SAVE)]["images"]
    shown = frontend.picture_in(SAVE)
    with Image.open(server.path_of(saved)) as file:
        assert np.array_equal(np.asarray(shown), np.asarray(file)) and np.asarray(file).std() > 10
    assert frontend.look() == CLEAN and frontend.problems == []
    touching = [(a.title, b.title) for a, b in combinations(frontend.boxes(), 2) if a.touches(b)]
    assert touching == [], "with its picture in it a node has grown over another"

    folder = Path(os.environ.get("FLUX_KIT_SCREENSHOTS", tmp_path))
    target = folder / f"{request.node.callspec.params['frontend']}.png"
    frontend.screenshot(target)
    with Image.open(target) as picture:
        assert picture.width == 1400 and target.stat().st_size < 200_000
        there = (coarse(picture) == ground(shown)).all(axis=-1)
    assert there.sum() > 1000, "the finished picture is not in the screenshot"
