"""Runs a prompt: checked as a whole first, then node by node; unchanged nodes are taken from the run before."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...engine.errors import FileChanged, FluxKitError
from . import io
from .validation import Checked, Link, Nodes, Prompt, check, label, naming

log = logging.getLogger(__name__)
_SERIAL = itertools.count()
Outputs = list[list[Any]]  # for each output of a node the list of its values, mostly of length 1


@dataclass
class Result:
    """`outputs` and `ui` by node id (all nodes that output nodes need), and which ids ran or came from the cache."""

    outputs: dict[str, Outputs] = field(default_factory=dict)
    ui: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    cached: list[str] = field(default_factory=list)


class Executor:
    """Holds the results of the last run, so that a second run computes only what changed.

    `nodes`: classes by type name. `check_interrupt` is called before each node and raises Interrupted to stop.
    `on_node` is told (node id, its type, place in the order from 0, number of nodes) before a node runs. `guard` begins
    a run; what it gives is called before each output node and at the end, and raises FileChanged where a model file is
    not what it was: then nothing of the run is kept.
    """

    def __init__(self, nodes: Nodes, *, check_interrupt: Callable[[], None] = lambda: None,
                 on_node: Callable[[str, str, int, int], None] = lambda *_: None,
                 guard: Callable[[], Callable[[], None]] = lambda: lambda: None) -> None:
        self.nodes = nodes
        self._check_interrupt = check_interrupt
        self._on_node = on_node
        self._guard = guard
        self._cache: dict[str, tuple[Outputs, dict[str, list[Any]] | None]] = {}

    def clear(self) -> None:
        """Forget all results, models included."""
        self._cache.clear()

    def run(self, prompt: Prompt, extra_pnginfo: dict[str, Any] | None = None) -> Result:
        """Run what the output nodes need. `extra_pnginfo`: what savers embed beside the prompt ({"workflow": ...}).

        Errors are FluxKitErrors with `.node` set; those of other libraries are wrapped and kept as `__cause__`.
        """
        checked = check(prompt, self.nodes)
        keys = self._keys(checked)
        wanted = set(keys.values())
        # What this prompt cannot use goes before anything new is loaded: two models need not fit side by side.
        self._cache = {key: value for key, value in self._cache.items() if key in wanted}
        result = Result()
        try:
            with torch.inference_mode():
                self._run(checked, keys, result, extra_pnginfo)
        except FileChanged:
            for node_id in result.executed:
                self._cache.pop(keys[node_id], None)
            raise
        return result

    def _run(self, checked: Checked, keys: dict[str, str], result: Result, extra_pnginfo: dict[str, Any] | None
             ) -> None:
        check_files = self._guard()
        for place, node_id in enumerate(checked.order):
            self._check_interrupt()
            key = keys[node_id]
            if key in self._cache:
                result.cached.append(node_id)
            else:
                node = checked.prompt[node_id]
                self._on_node(node_id, node["class_type"], place, len(checked.order))
                with naming(node_id, label(node_id, node)):
                    if checked.schemas[node_id].is_output_node:
                        check_files()
                    self._cache[key] = self._execute(checked, node_id, result.outputs, extra_pnginfo)
                result.executed.append(node_id)
            outputs, ui = self._cache[key]
            result.outputs[node_id] = outputs
            if ui is not None:
                result.ui[node_id] = ui
        check_files()

    def _keys(self, checked: Checked) -> dict[str, str]:
        """A node's key: its type, its inputs, its parents' keys and its fingerprint. Digests, since nested tuples of a
        diamond-shaped graph would double with every level."""
        keys: dict[str, str] = {}
        for node_id in checked.order:
            schema = checked.schemas[node_id]
            inputs = checked.inputs[node_id]
            parts = {name: [keys[value.node], value.slot] if isinstance(value, Link) else ["value", value]
                     for name, value in inputs.items()}
            own_id = node_id if schema.not_idempotent or io.Hidden.unique_id in schema.hidden else None
            identity = [checked.prompt[node_id]["class_type"], own_id, self._fingerprint(checked, node_id), parts]
            text = json.dumps(identity, sort_keys=True, default=repr)
            keys[node_id] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return keys

    def _fingerprint(self, checked: Checked, node_id: str) -> str | None:
        """What `fingerprint_inputs` says, given every input (links as None); NaN or a failure means: run anew."""
        prompt, schema = checked.prompt, checked.schemas[node_id]
        node = self.nodes[prompt[node_id]["class_type"]]
        if getattr(node, "fingerprint_inputs", None) is None:
            return None
        inputs = checked.inputs[node_id]
        arguments = {name: None if isinstance(value, Link) else value for name, value in inputs.items()}
        if schema.is_input_list:
            arguments = {name: [value] for name, value in arguments.items()}
        try:
            found = node.call("fingerprint_inputs", _hidden(schema, node_id, prompt, None), arguments)
        except (FluxKitError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:
            log.warning("%s: fingerprint_inputs failed (%s), so it runs anew", label(node_id, prompt[node_id]), error)
            found = math.nan
        if isinstance(found, float) and math.isnan(found):
            return f"never the same {next(_SERIAL)}"
        return repr(found)

    def _execute(self, checked: Checked, node_id: str, done: dict[str, Outputs], extra_pnginfo: dict[str, Any] | None,
                 ) -> tuple[Outputs, dict[str, list[Any]] | None]:
        schema = checked.schemas[node_id]
        node = self.nodes[checked.prompt[node_id]["class_type"]]
        hidden = _hidden(schema, node_id, checked.prompt, extra_pnginfo)
        arrived = {name: done[value.node][value.slot] if isinstance(value, Link) else [value]
                   for name, value in checked.inputs[node_id].items()}
        returned = [_normal(schema, node.call("execute", hidden, call)) for call in _calls(schema, arrived)]
        outputs: Outputs = []
        for index, spec in enumerate(schema.outputs):
            values = [output.args[index] for output in returned]
            outputs.append([item for value in values for item in value] if spec.is_output_list else values)
        return outputs, _merged_ui(returned)


def _hidden(schema: io.Schema, node_id: str, prompt: Prompt, extra_pnginfo: dict[str, Any] | None) -> io.HiddenHolder:
    offered: dict[str, Any] = {"unique_id": node_id, "prompt": prompt, "extra_pnginfo": extra_pnginfo}
    return io.HiddenHolder(**{name.name: offered[name.name] for name in schema.hidden if name.name in offered})


def _calls(schema: io.Schema, arrived: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The calls of `execute`: one with whole lists, or one for each item, short lists repeating their last."""
    if schema.is_input_list:
        yield arrived
        return
    empty = sorted(name for name, values in arrived.items() if not values)
    if empty:
        raise FluxKitError(f"input {', '.join(empty)} received an empty list")
    for index in range(max((len(values) for values in arrived.values()), default=1)):
        yield {name: values[min(index, len(values) - 1)] for name, values in arrived.items()}


def _normal(schema: io.Schema, returned: Any) -> io.NodeOutput:
    """What `execute` returned as NodeOutput: None, a tuple and a dict of result and ui are allowed, as in core."""
    if returned is None:
        returned = io.NodeOutput()
    elif isinstance(returned, tuple):
        returned = io.NodeOutput(*returned)
    elif isinstance(returned, dict):
        returned = io.NodeOutput(*returned.get("result", ()), ui=returned.get("ui"))
    if not isinstance(returned, io.NodeOutput):
        raise FluxKitError(f"execute returned a {type(returned).__name__}, not a NodeOutput")
    if len(returned.args) < len(schema.outputs):
        raise FluxKitError(f"execute returned {len(returned.args)} of {len(schema.outputs)} outputs")
    return returned


def _merged_ui(returned: list[io.NodeOutput]) -> dict[str, list[Any]] | None:
    merged: dict[str, list[Any]] = {}
    present = [output.ui if isinstance(output.ui, dict) else output.ui.as_dict()
               for output in returned if output.ui is not None]
    for ui in present:
        for key, values in ui.items():
            merged.setdefault(key, []).extend(values)
    return merged if present else None
