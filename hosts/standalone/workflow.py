"""Reads workflow files: API format, saved UI format, or a PNG that holds one. Their text is hostile input."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.errors import BadWorkflow, MissingFile
from ..names import shown
from .convert import to_prompt
from .graph import read_document
from .png import PNG_SIGNATURE, read_text
from .validation import Nodes, Prompt, is_link, title_of, unknown_types

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 100  # nested brackets; the deepest official template has 12
MAX_CONTAINERS = 500_000  # lists and objects: parsed they take 60 times the space of "[],"
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


@dataclass(frozen=True)
class Workflow:
    """`prompt` runs; `ui` is the saved UI-format workflow it came from, for embedding, or None."""

    prompt: Prompt
    ui: dict[str, Any] | None

    @property
    def extra_pnginfo(self) -> dict[str, Any]:
        return {} if self.ui is None else {"workflow": self.ui}


def load_workflow(path: str | Path, nodes: Nodes, choose: random.Random | None = None) -> Workflow:
    """The workflow in a .json or .png file. `nodes`: classes by type name, needed for the order of widgets.

    BadWorkflow (with `.file`) says what is wrong: not JSON, too deep, broken links, unknown nodes (all of them).
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder, not a workflow file" if path.is_dir() else "there is no such workflow file"
        raise MissingFile(f"{path}: {kind}", file=path)
    try:
        with path.open("rb") as file:
            start = file.read(MAX_BYTES + 1)
        if start.startswith(PNG_SIGNATURE):
            return _from_png(path, nodes, choose)
        if len(start) > MAX_BYTES:
            raise BadWorkflow(f"larger than {MAX_BYTES // 2**20} MB, which no workflow is")
        return from_json(parse_json(start), nodes, choose)
    except BadWorkflow as error:
        error.file = error.file or str(path)
        if not error.message.startswith(path.name):
            error.message = f"{path.name}: {error.message}"
        raise


def _from_png(path: Path, nodes: Nodes, choose: random.Random | None) -> Workflow:
    """The `prompt` text of a PNG is exactly what ran, so it goes before the `workflow` text."""
    texts = read_text(path, ("prompt", "workflow"))
    ui = parse_json(texts["workflow"]) if "workflow" in texts else None
    if "prompt" in texts:
        found = from_json(parse_json(texts["prompt"]), nodes, choose)
        return Workflow(found.prompt, ui if isinstance(ui, dict) else found.ui)
    if ui is not None:
        return from_json(ui, nodes, choose)
    raise BadWorkflow("this PNG holds no workflow: no text chunk named prompt or workflow")


def parse_json(data: bytes | str) -> Any:
    """JSON with bounds: size, nesting, digits of a number. NaN, which old files hold, becomes None."""
    if len(data) > MAX_BYTES:
        raise BadWorkflow(f"larger than {MAX_BYTES // 2**20} MB, which no workflow is")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise BadWorkflow(f"not UTF-8 text (byte {error.start}), so no workflow JSON") from None
    if not text.strip():
        raise BadWorkflow("not JSON: there is nothing in it")
    depth = count = 0
    for match in _TOKEN.finditer(text):
        opens, closes = match.group() in ("[", "{"), match.group() in ("]", "}")
        depth += opens - closes
        count += opens
        if depth > MAX_DEPTH:
            raise BadWorkflow(f"nested more than {MAX_DEPTH} deep at character {match.start()}, which no workflow is")
        if count > MAX_CONTAINERS:
            raise BadWorkflow(f"more than {MAX_CONTAINERS} lists and objects, which no workflow has")
    try:
        return json.loads(text, parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        raise BadWorkflow(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number of thousands of digits
        raise BadWorkflow(f"not usable JSON: {shown(str(error))}") from None


def from_json(data: Any, nodes: Nodes, choose: random.Random | None = None) -> Workflow:
    """A workflow from parsed JSON: a saved workflow, an API prompt, or the object a client posts ({"prompt": ...})."""
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        return Workflow(to_prompt(read_document(data), nodes, choose), data)
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict) and "class_type" not in data["prompt"]:
        data = data["prompt"]
    if not isinstance(data, dict) or not data:
        raise BadWorkflow(f"no workflow: expected an object with nodes, found {shown(data)}")
    return Workflow(_api_prompt(data, nodes), None)


def _api_prompt(data: dict[str, Any], nodes: Nodes) -> Prompt:
    prompt: Prompt = {}
    for id_, node in data.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            raise BadWorkflow(f"no workflow: no list named nodes, and {shown(id_, 40)} is no node with a class_type")
        inputs = node.get("inputs", {})
        if not isinstance(inputs, dict):
            raise BadWorkflow(f"node {shown(id_, 40)}: inputs is {shown(inputs)}, not an object", node=id_)
        meta = node.get("_meta")
        title = meta.get("title") if isinstance(meta, dict) else None
        prompt[id_] = {"class_type": node["class_type"], "inputs": {k: _link(v) for k, v in inputs.items()},
                       "_meta": {"title": title if isinstance(title, str) and title else node["class_type"]}}
    unknown_types(((id_, node["class_type"]) for id_, node in prompt.items()), nodes)
    return prompt


def _link(value: Any) -> Any:
    """Links of hand-written prompts may name a node by number."""
    if isinstance(value, list) and len(value) == 2 and type(value[0]) is int:
        linked = [str(value[0]), value[1]]
        return linked if is_link(linked) else value
    return value


def nodes_called(prompt: Prompt, name: str) -> list[str]:
    """Ids of the nodes a user means by `name`: an id (`57:3`), else all nodes of that title. Empty: no such node."""
    return [name] if name in prompt else [id_ for id_, node in prompt.items() if title_of(node) == name]
