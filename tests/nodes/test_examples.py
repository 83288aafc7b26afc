"""The example workflows: saved UI files that a frontend opens as they are, each run through the command line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flux_kit.cli import main
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.io import WidgetInput
from flux_kit.tiny_flux.examples import STANDS
from flux_kit.tiny_flux.score import matches, read_picture
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "example_workflows"
STEPS = 12
SAMPLERS = ("Sampler", "Final")
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.json"))


def test_every_example_has_its_tiny_models_and_a_thumbnail() -> None:
    assert set(NAMES) == set(STANDS) == {path.stem for path in EXAMPLES.glob("*.jpg")}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_shows_what_it_is_to_show(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                                      ) -> None:
    stand, inputs, out = STANDS[name], tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    stand.write_inputs(inputs)
    titles = {node.get("title") for node in read(name)["nodes"]}
    steps = [f"{title}.steps={STEPS}" for title in SAMPLERS if title in titles]
    flags = [flag for setting in [*stand.all_settings(), *steps] for flag in ("--set", setting)]
    code = main(["run", str(EXAMPLES / f"{name}.json"), "--input", str(inputs), "--out", str(out), "--json", *flags])
    answer = json.loads(capsys.readouterr().out)
    assert code == 0, answer
    with Image.open(answer["images"][-1]) as opened:
        picture = np.asarray(opened.convert("RGB"))
    assert np.ptp(picture) > 50, "nothing is on it"
    if stand.shows is not None:
        assert matches(stand.shows, picture), read_picture(picture)


def test_the_examples_are_what_their_table_says() -> None:
    spec = importlib.util.spec_from_file_location("examples_tool", ROOT / "docs/tools/examples.py")
    assert spec is not None and spec.loader is not None
    tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    known = tool.shapes()
    for example in tool.EXAMPLES_TABLE:
        assert tool.workflow(example, known) == read(example.name), f"run docs/tools/examples.py: {example.name}"


def read(name: str) -> Any:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_whole(name: str, host: StandaloneHost) -> None:
    """Links join sockets that are there, of one type, both ends knowing of them; each node has its widgets' values."""
    from flux_kit.nodes import NODES
    schemas = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in NODES)}
    data = read(name)
    nodes: dict[int, Any] = {node["id"]: node for node in data["nodes"]}
    assert data["version"] == 0.4
    assert any(node["type"] in ("Note", "MarkdownNote") for node in nodes.values()), "nothing explains the workflow"
    for link, source, out, target, into, kind in data["links"]:
        assert link in nodes[source]["outputs"][out]["links"] and nodes[target]["inputs"][into]["link"] == link
        assert kind == nodes[source]["outputs"][out]["type"]
        assert kind in nodes[target]["inputs"][into]["type"].split(",")
    boxes = [(*node["pos"], *node["size"]) for node in nodes.values()]
    for i, (x, y, w, h) in enumerate(boxes):
        for other_x, other_y, other_w, other_h in boxes[i + 1:]:
            beside = x + w <= other_x or other_x + other_w <= x
            assert beside or y + h <= other_y or other_y + other_h <= y, "nodes overlap"
    for node in nodes.values():
        schema = schemas.get(node["type"])
        if schema is not None:
            sockets = [spec for spec in schema.inputs if not isinstance(spec, WidgetInput)]
            assert [(entry["name"], entry["type"]) for entry in node["inputs"]] == [
                (spec.id, spec.io_type) for spec in sockets]
            assert [(entry["name"], entry["type"]) for entry in node["outputs"]] == [
                (output.id, output.io_type) for output in schema.outputs]
            widgets = [spec for spec in schema.inputs if isinstance(spec, WidgetInput)]
            controls = sum(bool(getattr(spec, "control_after_generate", None)) for spec in widgets)
            assert len(node["widgets_values"]) == len(widgets) + controls
