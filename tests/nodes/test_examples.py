"""The example workflows: saved UI files that a frontend opens as they are, each run through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flux_kit.cli import main
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.io import WidgetInput
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "example_workflows"
# file -> settings that make it fit a test, size of the picture
CASES: dict[str, tuple[list[str], tuple[int, int]]] = {
    "hello_tiny_flux.json": (["Sampler.steps=2"], (128, 128)),
    "text_to_image.json": (["Sampler.steps=2", "Size.megapixels=0.01"], (128, 80)),
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_an_example_runs(name: str, models: Path, tiny_models: Path, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]) -> None:
    settings, size = CASES[name]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    code = main(["run", str(EXAMPLES / name), "--models", str(models), "--out", str(tmp_path), "--json", *flags])
    answer = json.loads(capsys.readouterr().out)
    assert code == 0, answer
    (path,) = answer["images"]
    with Image.open(path) as picture:
        assert picture.size == size


@pytest.mark.parametrize("name", CASES)
def test_an_example_is_whole(name: str, host: StandaloneHost) -> None:
    """Links join sockets that are there, of one type, both ends knowing of them; each node has its widgets' values."""
    from flux_kit.nodes import NODES
    schemas = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in NODES)}
    data = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    nodes: dict[int, Any] = {node["id"]: node for node in data["nodes"]}
    assert data["version"] == 0.4
    assert any(node["type"] in ("Note", "MarkdownNote") for node in nodes.values()), "nothing explains the workflow"
    for link, source, out, target, into, kind in data["links"]:
        assert link in nodes[source]["outputs"][out]["links"] and nodes[target]["inputs"][into]["link"] == link
        assert kind == nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][into]["type"]
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
