"""What a running ComfyUI serves to its frontend about the pack: help pages, English texts, templates, thumbnails."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from comfy_server import Server
from PIL import Image

ROOT = Path(__file__).parents[3]
PACK = "flux-kit"
EXAMPLES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))


def fetch(server: Server, path: str) -> tuple[int, str, bytes]:
    """Status, content type and body of what a browser would get."""
    url = f"http://127.0.0.1:{server.port}{urllib.parse.quote(path)}"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.headers.get_content_type(), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


@pytest.fixture(scope="session")
def ours(server: Server) -> dict[str, Any]:
    info: dict[str, Any] = server.call("/object_info")
    return {name: entry for name, entry in info.items() if entry["python_module"] == f"custom_nodes.{PACK}"}


def test_help_pages_as_frontends_ask_for_them(server: Server, ours: dict[str, Any]) -> None:
    """First `<node>/<locale>.md`, which must fail plainly, then `<node>.md`. HTML would be taken for a missing page."""
    assert ours
    for name in ours:
        docs = f"/extensions/{PACK}/docs/{name}"
        answers = {locale: fetch(server, f"{docs}/{locale}.md") for locale in ("en", "de")}
        for locale, (status, _, _) in answers.items():
            assert status == (200 if (ROOT / "web" / "docs" / name / f"{locale}.md").is_file() else 404)
        status, kind, body = fetch(server, f"{docs}.md")
        assert (status, kind != "text/html") == (200, True), name
        assert body == (ROOT / "web" / "docs" / f"{name}.md").read_bytes()
        assert body.decode().startswith(f"# {ours[name]['display_name']}\n")


def test_english_texts_are_served_and_fit_the_nodes(server: Server, ours: dict[str, Any]) -> None:
    texts = server.call("/i18n")["en"]
    assert {name for name in texts["nodeDefs"] if name.startswith("FluxKit")} == set(ours)
    for name, entry in ours.items():
        text = texts["nodeDefs"][name]
        assert (text["display_name"], text["description"]) == (entry["display_name"], entry["description"])
        shown = {**entry["input"].get("required", {}), **entry["input"].get("optional", {})}
        assert {key: told["tooltip"] for key, told in text["inputs"].items()} == \
            {key: spec[1]["tooltip"] for key, spec in shown.items()}
        assert [text["outputs"][str(index)]["tooltip"] for index in range(len(entry["output"]))] == \
            list(entry.get("output_tooltips") or [])
        assert set(entry["category"].split("/")) <= set(texts["nodeCategories"])
    assert texts["templateWorkflows"]["category"][PACK] == "Flux Kit"


def test_search_words_where_the_host_knows_them(ours: dict[str, Any]) -> None:
    told = {name: entry.get("search_aliases") for name, entry in ours.items()}
    if not any("search_aliases" in entry for entry in ours.values()):
        pytest.skip("this version has no search aliases")
    assert all(told.values()), told


def test_examples_are_in_the_template_browser_with_thumbnails(server: Server) -> None:
    assert sorted(server.call("/workflow_templates")[PACK]) == EXAMPLES
    for name in EXAMPLES:
        status, kind, body = fetch(server, f"/api/workflow_templates/{PACK}/{name}.jpg")
        assert (status, kind) == (200, "image/jpeg")
        with Image.open(BytesIO(body)) as picture:
            assert picture.format == "JPEG" and min(picture.size) >= 128
        status, _, body = fetch(server, f"/api/workflow_templates/{PACK}/{name}.json")
        assert status == 200 and json.loads(body)["nodes"]
