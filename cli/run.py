"""`flux-kit run`: a workflow file, or the one inside a PNG, without ComfyUI."""

from __future__ import annotations

import argparse
import difflib
import time
from collections.abc import Mapping
from typing import Any

from ..hosts.standalone import io
from ..hosts.standalone.validation import Nodes, Prompt, label
from ..hosts.standalone.workflow import load_workflow, nodes_called
from . import session
from .parser import UsageError

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
SEED_INPUTS = ("seed", "noise_seed")


def main(options: argparse.Namespace) -> int:
    """Run the workflow and tell which pictures it made."""
    started = time.monotonic()
    host = session.open_host(options, inputs=options.input, out=options.out)
    nodes = session.node_classes()
    workflow = load_workflow(options.workflow, nodes)
    prompt = with_settings(workflow.prompt, options.settings, nodes)
    # After --set the drawn workflow would tell other values than those that made the picture: only the prompt goes in.
    session.executor(host, nodes).run(prompt, {} if options.settings else workflow.extra_pnginfo)
    session.tell(host, seed_of(prompt), started, as_json=options.json)
    return 0


def with_settings(prompt: Prompt, settings: list[tuple[str, str, str]], nodes: Nodes) -> Prompt:
    """The prompt with `--set` values in place. UsageError for a node or input that is not there, or not the only one.

    A value takes the place of a link to the input, too.
    """
    changed = {id_: {**node, "inputs": dict(node["inputs"])} for id_, node in prompt.items()}
    for name, key, text in settings:
        found = nodes_called(prompt, name)
        if len(found) != 1:
            raise UsageError(_not_one(name, found, prompt))
        node = changed[found[0]]
        specs = {spec.id: spec for spec in nodes[node["class_type"]].GET_SCHEMA().inputs}
        spec = specs.get(key)
        widgets = [id_ for id_, spec_ in specs.items() if isinstance(spec_, io.WidgetInput)]
        if not isinstance(spec, io.WidgetInput):
            why = "takes a link, not a value" if spec is not None else "is not there"
            raise UsageError(f"--set {name}.{key}: input {key} of {label(found[0], node)} {why}; its values are "
                             f"{', '.join(widgets) or 'none'}")
        node["inputs"][key] = _value(spec, text)
    return changed


def _not_one(name: str, found: list[str], prompt: Prompt) -> str:
    if found:
        return f"--set {name}: {len(found)} nodes have this title ({', '.join(found)}); use the id"
    known = [*prompt, *{str(node["_meta"]["title"]) for node in prompt.values() if "_meta" in node}]
    near = difflib.get_close_matches(name, known, n=3) or sorted(prompt)[:10]
    return f"--set {name}: no node has this id or title; near: {', '.join(near)}"


def _value(spec: io.Input, text: str) -> Any:
    """Booleans by their word, as bool("false") would be true; all else is coerced with the rest of the prompt."""
    if spec.io_type != "BOOLEAN":
        return text
    if text.lower() not in BOOLEANS:
        raise UsageError(f"--set {spec.id}={text}: {spec.id} is true or false")
    return BOOLEANS[text.lower()]


def seed_of(prompt: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The seed of the first node that has one as a value, in the order of the workflow."""
    for node in prompt.values():
        for name in SEED_INPUTS:
            value = node["inputs"].get(name)
            if isinstance(value, int | str) and str(value).isdecimal():
                return int(value)
    return None


