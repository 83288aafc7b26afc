"""Checks a whole prompt before any node runs, by core's rules for V3 nodes, and coerces widget values in place of core.

Rules that are easy to get wrong and are kept as core has them: an input named in a node's `validate_inputs` loses the
built-in range and list check; it arrives there as None when linked; absent optional inputs are not filled from the
schema; inputs the schema lacks are dropped. One thing differs: core drops a bad branch and runs the rest, we refuse.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from ...engine.errors import BadInput, BadWorkflow, FluxKitError
from ..names import shown
from . import io
from .memory import is_out_of_memory

Prompt = dict[str, dict[str, Any]]  # {id: {"class_type", "inputs": {name: value or [id, slot]}, "_meta": {"title"}}}
Nodes = Mapping[str, type[io.ComfyNode]]
SHOWN = 5  # problems told in full
ELSEWHERE: Mapping[str, str] = {  # core nodes of FLUX.1 templates that serve models of other kinds
    **dict.fromkeys(("LotusConditioning", "SetFirstSigma"), "for Lotus, a depth model of another family: connect a "
                    "depth map in its place, from a file or Flux Kit's Structure Map"),
    **dict.fromkeys(("ModelPatchLoader", "USOStyleReference"), "for the projector of USO, which is no FLUX.1 model")}
COERCIONS: dict[str, Any] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


def title_of(node: Mapping[str, Any]) -> str:
    """The title a user gave a node, else its type."""
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, Mapping) else None
    return str(title or node["class_type"])


def label(node_id: str, node: Mapping[str, Any]) -> str:
    """How errors name a node: its id, type, and title if it has one of its own."""
    title, kind = title_of(node), node["class_type"]
    return f"node {node_id} ({kind})" if title == kind else f'node {node_id} "{shown(title, 60)}" ({kind})'


def is_link(value: Any) -> bool:
    """A link is [node id, output index]; any other list is an error, as lists are reserved for links."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int


class Link(NamedTuple):
    """A checked link, told apart from a value that is a list."""

    node: str
    slot: int


@dataclass(frozen=True)
class Checked:
    """A prompt fit to run: schemas and coerced inputs by node id, and an order: each node after those it needs."""

    prompt: Prompt
    schemas: dict[str, io.Schema]
    order: list[str]
    inputs: dict[str, dict[str, Any]]


def check(prompt: Prompt, nodes: Nodes) -> Checked:
    """The prompt made ready, or one error that names every unknown type, else the first problems of all nodes."""
    unknown_types(((id_, node["class_type"]) for id_, node in prompt.items()), nodes)
    kinds = {kind: nodes[kind].GET_SCHEMA() for kind in {node["class_type"] for node in prompt.values()}}
    schemas = {id_: kinds[node["class_type"]] for id_, node in prompt.items()}
    outputs = [id_ for id_, schema in schemas.items() if schema.is_output_node]
    if not outputs:
        raise BadWorkflow("the workflow has no output node, such as SaveImage, so there is nothing to make")
    order = _ordered(prompt, outputs)
    problems: list[FluxKitError] = []
    inputs = {id_: _check_node(id_, prompt, nodes, schemas, problems) for id_ in order}
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        problems[0].message = "; ".join([problem.message for problem in problems[:SHOWN]] + more)
        raise problems[0]
    return Checked(prompt, schemas, order, inputs)


def unknown_types(found: Any, nodes: Mapping[str, Any]) -> None:
    """BadWorkflow that lists every type of `found` (pairs of id and type) that is not in `nodes`."""
    missing: dict[str, list[str]] = {}
    for node_id, kind in found:
        if kind not in nodes:
            missing.setdefault(kind, []).append(node_id)
    if missing:
        listed = [f"{shown(kind, 60)} (node {', '.join(ids[:3])}{', …' if len(ids) > 3 else ''}{_reason(kind)})"
                  for kind, ids in sorted(missing.items())[:50]]
        more = f" and {len(missing) - 50} more" if len(missing) > 50 else ""
        raise BadWorkflow(f"unknown node types: {'; '.join(listed)}{more}. Only Flux Kit's nodes and the core nodes "
                          "of FLUX.1 workflows run here; replace these or run the workflow in ComfyUI")


def _reason(kind: str) -> str:
    return f"; {ELSEWHERE[kind]}" if kind in ELSEWHERE else ""


def _ordered(prompt: Prompt, outputs: list[str]) -> list[str]:
    """Depth-first from the outputs, without recursion: a chain of 100,000 nodes is legal, a cycle is not."""
    order: list[str] = []
    done: dict[str, bool] = {}  # False while on the current path
    for output in outputs:
        stack = [(output, iter(_parents(prompt, output)))] if output not in done else []
        done.setdefault(output, False)
        while stack:
            node_id, parents = stack[-1]
            parent = next(parents, None)
            if parent is None:
                done[node_id] = True
                order.append(node_id)
                stack.pop()
            elif parent not in done:
                done[parent] = False
                stack.append((parent, iter(_parents(prompt, parent))))
            elif not done[parent]:
                path = [id_ for id_, _ in stack]
                ring = path[path.index(parent):]
                told = shown(" \u2192 ".join([*reversed(ring), ring[-1]]))
                raise BadWorkflow(f"the links form a cycle: {told}", node=parent)
    return order


def _parents(prompt: Prompt, node_id: str) -> list[str]:
    links = [v for v in prompt[node_id]["inputs"].values() if is_link(v)]
    return [link[0] for link in links if link[0] in prompt]


def _check_node(node_id: str, prompt: Prompt, nodes: Nodes, schemas: dict[str, io.Schema],
                problems: list[FluxKitError]) -> dict[str, Any]:
    node, schema = prompt[node_id], schemas[node_id]
    given: dict[str, Any] = node["inputs"]
    named, takes_all = _named(nodes[node["class_type"]])
    where = label(node_id, node)
    ready: dict[str, Any] = {}
    received: dict[str, str] = {}
    count = len(problems)
    for spec in schema.inputs:
        if spec.id not in given:
            if not spec.optional:
                problems.append(BadWorkflow(f"{where}: input {spec.id} ({spec.io_type}) is missing", node=node_id))
            continue
        value = given[spec.id]
        try:
            if isinstance(value, list):
                received[spec.id] = _check_link(where, spec, value, prompt, schemas, "input_types" in named)
                ready[spec.id] = Link(*value)
            else:
                ready[spec.id] = _check_value(where, spec, value, takes_all or spec.id in named)
        except (BadInput, BadWorkflow) as error:
            error.node = node_id
            problems.append(error)
    if len(problems) == count and (named or takes_all):
        problems += _ask_node(node_id, where, nodes[node["class_type"]], schema, ready, received)
    return ready


def _check_link(where: str, spec: io.Input, value: list[Any], prompt: Prompt, schemas: dict[str, io.Schema],
                types_left_to_node: bool) -> str:
    """The type that arrives; BadWorkflow says what is wrong with the link."""
    if not is_link(value):
        raise BadWorkflow(f"{where}: input {spec.id}: {shown(value)} is no link [node id, output number]")
    source, slot = value
    if source not in prompt:
        raise BadWorkflow(f"{where}: input {spec.id} is linked to node {shown(source)}, which is not in the workflow")
    outputs = schemas[source].outputs
    if not 0 <= slot < len(outputs):
        raise BadWorkflow(f"{where}: input {spec.id} is linked to output {slot} of {label(source, prompt[source])}, "
                          f"which has {len(outputs)}")
    received: str = outputs[slot].io_type
    if not types_left_to_node and not types_match(received, spec.io_type):
        raise BadWorkflow(f"{where}: input {spec.id} needs {spec.io_type}, but {label(source, prompt[source])} "
                          f"gives {received}")
    return received


def types_match(received: str, wanted: str) -> bool:
    """Types are names or comma lists of names; "*" fits all."""
    if "*" in (received, wanted):
        return True
    return bool({t.strip() for t in received.split(",")} & {t.strip() for t in wanted.split(",")})


def _check_value(where: str, spec: io.Input, value: Any, unchecked: bool) -> Any:
    """The coerced value; BadInput names input, value and what is allowed."""
    if isinstance(value, dict) and "__value__" in value:  # how a list travels that is no link
        value = value["__value__"]
    if not isinstance(spec, io.WidgetInput) and spec.io_type != "*":
        raise BadInput(f"{where}: input {spec.id} takes a link ({spec.io_type}), not the value {shown(value)}")
    coerce = COERCIONS.get(spec.io_type)
    if value is None and isinstance(spec, io.Combo.Input):  # to a node's own check None would mean a link
        raise BadInput(f"{where}: input {spec.id} is null, {_allowed('', list(spec.options or []))}")
    if coerce is not None:
        try:
            value = coerce(value)
        except (ValueError, TypeError, OverflowError):
            raise BadInput(f"{where}: input {spec.id}: {shown(value)} is no {spec.io_type}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{where}: input {spec.id}: {value} is not finite")
    if not unchecked:
        _check_range(where, spec, value)
    return value


def _check_range(where: str, spec: io.Input, value: Any) -> None:
    if isinstance(spec, io.Int.Input | io.Float.Input):
        low, high = spec.min, spec.max
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = f"{'…' if low is None else low} to {'…' if high is None else high}"
            raise BadInput(f"{where}: input {spec.id} is {value}, allowed is {bounds}")
    if isinstance(spec, io.Combo.Input) and spec.options is not None:
        options: list[Any] = list(spec.options)
        if value not in options:
            raise BadInput(f"{where}: input {spec.id} is {shown(value)}, {_allowed(value, options)}")


def _allowed(value: Any, options: list[Any]) -> str:
    if not options:
        return "but there is nothing to choose from"
    near = difflib.get_close_matches(str(value), [str(option) for option in options], n=3, cutoff=0.5)
    listed = near if len(options) > 20 and near else [str(option) for option in options[:20]]
    more = f" … ({len(options)} in all)" if len(options) > len(listed) else ""
    return f"allowed is {', '.join(listed)}{more}"


def _named(node: type[io.ComfyNode]) -> tuple[set[str], bool]:
    """The inputs a node's `validate_inputs` names, and whether it takes all."""
    method = getattr(node, "validate_inputs", None)
    if method is None:
        return set(), False
    spec = inspect.getfullargspec(method)
    return {*spec.args, *spec.kwonlyargs} - {"cls"}, spec.varkw is not None


def _ask_node(node_id: str, where: str, node: type[io.ComfyNode], schema: io.Schema, ready: dict[str, Any],
              received: dict[str, str]) -> list[FluxKitError]:
    """What the node's own `validate_inputs` says, called for the inputs it names that are there."""
    named, takes_all = _named(node)
    arguments = {name: None if name in received else value for name, value in ready.items()
                 if takes_all or name in named}
    if schema.is_input_list:
        arguments = {name: [value] for name, value in arguments.items()}
    if "input_types" in named:
        arguments["input_types"] = received
    try:
        with naming(node_id, where):
            answer = node.call("validate_inputs", io.HiddenHolder(), arguments)
    except FluxKitError as error:
        return [error]
    if answer is True:
        return []
    said = answer if isinstance(answer, str) else "its inputs are refused"
    return [BadInput(f"{where}: {said}", node=node_id)]


class naming:  # noqa: N801 - reads as a statement: with naming(...)
    """Errors that leave this block name the node: ours get `.node`, others are wrapped with their cause kept.

    An `__exit__` and no `except`, so that what is no error (KeyboardInterrupt) passes as it is.
    """

    def __init__(self, node_id: str, where: str) -> None:
        self.node_id, self.where = node_id, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, FluxKitError):
            if error.node is None:
                error.node = self.node_id
                error.message = f"{self.where}: {error.message}"
        elif isinstance(error, Exception):
            advice = ""
            if is_out_of_memory(error):
                advice = ". There was not enough memory: a smaller picture or batch, or --memory stream, may help"
            said = shown(" ".join(str(error).split()), 300)
            message = f"{self.where} failed: {type(error).__name__}: {said}{advice}"
            raise FluxKitError(message, node=self.node_id) from error
