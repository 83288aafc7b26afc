"""What ComfyUI shows about our nodes: help pages, English texts, words to search by, thumbnails of the examples."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flux_kit.hosts.standalone.host import StandaloneHost
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES, ENGLISH, EXAMPLES = ROOT / "web" / "docs", ROOT / "locales" / "en", ROOT / "example_workflows"
THUMBNAIL_BYTES = 200_000
NOT_IN_TEXTS = set("{}@|\n")  # syntax of the frontend's translations; a bar would also end a cell of a table


@pytest.fixture
def nodes(host: StandaloneHost) -> list[Any]:
    from flux_kit.nodes import NODES
    return list(NODES)


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections(page: str) -> dict[str, str]:
    """Text under each heading of the second level."""
    parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_english_texts_are_the_schemas(nodes: list[Any]) -> None:
    texts = json.loads((ENGLISH / "nodeDefs.json").read_text(encoding="utf-8"))
    schemas = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes)}
    assert set(texts) == set(schemas), "make looks"
    for node_id, schema in schemas.items():
        text = texts[node_id]
        assert (text["display_name"], text["description"]) == (schema.display_name, schema.description)
        assert set(text["inputs"]) == {spec.id for spec in schema.inputs}
        assert set(text["outputs"]) == {str(index) for index in range(len(schema.outputs))}
        shown = [(text["inputs"][spec.id], spec) for spec in schema.inputs]
        shown += [(text["outputs"][str(index)], output) for index, output in enumerate(schema.outputs)]
        for entry, spec in shown:
            assert entry == {"name": spec.display_name or spec.id, "tooltip": spec.tooltip}, f"{node_id}.{spec.id}"
    menus = json.loads((ENGLISH / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    assert set(menus) == {part for schema in schemas.values() for part in schema.category.split("/")}


def test_texts_are_free_of_the_translations_syntax(nodes: list[Any]) -> None:
    for schema in (node.GET_SCHEMA() for node in nodes):
        entries = (*schema.inputs, *schema.outputs)
        for text in (schema.display_name, schema.description, *(entry.tooltip for entry in entries)):
            assert not set(text) & NOT_IN_TEXTS, f"{schema.node_id}: {text}"


def test_generated_files_are_current(nodes: list[Any]) -> None:
    for path, text in tool("node_docs").generated(nodes).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)} is stale: make looks"


def test_every_node_has_a_help_page_and_every_page_a_node(nodes: list[Any]) -> None:
    there = {path.stem for path in PAGES.glob("*.md")}
    assert there == {node.GET_SCHEMA().node_id for node in nodes}


def test_help_pages_explain_everything(nodes: list[Any]) -> None:
    for node in nodes:
        schema = node.GET_SCHEMA()
        page = (PAGES / f"{schema.node_id}.md").read_text(encoding="utf-8")
        found, name = sections(page), schema.node_id
        assert page.startswith(f"# {schema.display_name}\n"), name
        assert len(page.split("## ")[0]) > 100, f"{name}: nothing says what it does"
        for heading, entries in (("Inputs", schema.inputs), ("Outputs", schema.outputs)):
            for entry in entries:
                row = f"| `{entry.display_name or entry.id}` |"
                assert row in found[heading] and entry.tooltip in found[heading], f"{name}: {entry.id}"
        assert found["Typical mistakes"].count("\n- **") >= 2 and len(found["Example"]) > 40, name
        for folder in set(getattr(node, "KINDS", {}).values()):
            assert f"`{folder}`" in found["Files"] or f"`models/{folder}`" in found["Files"], f"{name}: {folder}"


def test_help_pages_show_nothing_that_is_not_there() -> None:
    """ComfyUI strips scripts and styles from a page, and reads pictures from the folder of the pages."""
    for path in PAGES.rglob("*.md"):
        page = path.read_text(encoding="utf-8")
        assert "<" not in page, f"{path.name} holds HTML"
        for target in re.findall(r"\]\(([^)]+)\)", page):
            assert target.startswith("https://") or (PAGES / target).is_file(), f"{path.name}: {target}"


def test_every_node_is_found_by_other_words(nodes: list[Any]) -> None:
    for schema in (node.GET_SCHEMA() for node in nodes):
        words = schema.search_aliases
        assert words and len(words) == len(set(words)), f"{schema.node_id} has no search aliases, or one twice"
        wrong = [word for word in words if word != word.lower().strip()]
        assert not wrong, f"{schema.node_id}: {wrong}"


def test_every_example_has_a_thumbnail() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.json")}
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix != ".json"} == names, "make thumbnails"
    for name in names:
        path = EXAMPLES / f"{name}.jpg"
        assert path.stat().st_size < THUMBNAIL_BYTES
        with Image.open(path) as picture:
            assert (picture.format, picture.mode) == ("JPEG", "RGB") and 256 <= max(picture.size) <= 1024
            assert np.asarray(picture).std() > 10, f"{name}.jpg is flat"


def test_a_thumbnail_is_what_the_workflow_draws() -> None:
    drawn = tool("thumbnails").draw("hello_tiny_flux")
    with Image.open(EXAMPLES / "hello_tiny_flux.jpg") as thumbnail:
        small = np.asarray(thumbnail.resize(drawn.size, Image.Resampling.BOX), dtype=np.int16)
    assert np.abs(np.asarray(drawn, dtype=np.int16) - small).mean() < 6, "make thumbnails"
