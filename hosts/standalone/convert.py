"""A saved workflow (UI format) as the prompt a frontend would send: {id: {"class_type", "inputs", "_meta": {"title"}}}.

Subgraphs are unfolded (ids `57:3`), links followed through reroutes, bypassed nodes and subgraph borders, primitives
and promoted widgets turned into values. Nothing here recurses: chains may be as long as the file is.
"""

from __future__ import annotations

import logging
import random
import re
from dataclasses import dataclass, field
from typing import Any

from ...engine.errors import BadWorkflow
from ..names import shown
from . import io
from .graph import BYPASSED, MUTED, SUBGRAPH_INPUT, Document, Graph, Link, Node
from .validation import Nodes, Prompt, unknown_types
from .widgets import dynamic_prompt, widget_values

log = logging.getLogger(__name__)
NOTES = {"Note", "MarkdownNote"}
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
VIRTUAL = NOTES | {REROUTE, PRIMITIVE}
MAX_NODES = 20_000  # subgraphs within subgraphs double with every level
MAX_PREFIX = 1000  # of a file name; longer ones are refused when it comes to saving
_PREFIXED = re.compile(r"^\s*\d+\s*:\s*")  # "12: seed", how early files name a widget deeper inside


@dataclass(frozen=True)
class _Value:
    """What an input resolves to when it is no link."""

    value: Any


_Found = list[Any] | _Value | None  # [id, output], a value, or nothing (then the widget's own counts)
_Place = tuple[str, str, int, str]  # path, node, input, type wanted at the far end
_Known = dict[_Place, _Found]


@dataclass
class _Scope:
    """One use of a graph. `promoted`: values that the subgraph node holds for its inputs, `inner`: for widgets of nodes
    inside; `own`: widget values of the nodes here; `children`: the subgraphs used here; all by node id."""

    graph: Graph
    path: str = ""
    parent: _Scope | None = None
    host: Node | None = None
    promoted: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    children: dict[str, _Scope] = field(default_factory=dict)


def to_prompt(document: Document, nodes: Nodes, choose: random.Random | None = None) -> Prompt:
    """The prompt of a saved workflow. `choose` draws for `{a|b}` in prompts, as a frontend does on queueing."""
    scopes = _unfold(document)
    active = [(scope, node) for scope in scopes for node in scope.graph.nodes.values()
              if node.active and node.type not in VIRTUAL and node.id not in scope.children]
    unknown_types(((scope.path + node.id, node.type) for scope, node in active), nodes)
    schemas = {kind: nodes[kind].GET_SCHEMA() for kind in {node.type for _, node in active}}
    for scope, node in active:
        own = widget_values(schemas[node.type], node.values)
        own.update({name: value for name, value in scope.inner.get(node.id, {}).items() if name in own})
        scope.own[node.id] = own
    prompt: Prompt = {}
    known: _Known = {}
    for scope, node in active:
        id_ = scope.path + node.id
        if id_ in prompt:
            raise BadWorkflow(f"two nodes have the id {shown(id_)}")
        schema = schemas[node.type]
        inputs = _inputs(scope, node, schema, known, choose or random.Random())
        title = node.title or schema.display_name or node.type
        prompt[id_] = {"class_type": node.type, "inputs": inputs, "_meta": {"title": title}}
    _name_files(prompt, active)
    return prompt


def _inputs(scope: _Scope, node: Node, schema: io.Schema, known: _Known, choose: random.Random) -> dict[str, Any]:
    """The node's own widget values, prompts with their choices made, and over them what its sockets receive."""
    found = {socket.name: _resolve(scope, node, slot, known) for slot, socket in enumerate(node.inputs)}
    received = {name: what for name, what in found.items() if what is not None}
    values = dict(scope.own[node.id])
    for spec in schema.inputs:
        text = values.get(spec.id)
        dynamic = isinstance(spec, io.String.Input) and spec.dynamic_prompts and spec.id not in received
        if dynamic and isinstance(text, str):
            values[spec.id] = dynamic_prompt(text, choose)
            if values[spec.id] != text:
                log.info("node %s: prompt text became: %s", scope.path + node.id, shown(values[spec.id], 200))
    values.update({name: what.value for name, what in received.items() if isinstance(what, _Value)})
    inputs = {name: {"__value__": value} if isinstance(value, list) else value for name, value in values.items()}
    return inputs | {name: what for name, what in received.items() if isinstance(what, list)}


def _unfold(document: Document) -> list[_Scope]:
    """All uses of all graphs, the root first."""
    root = _Scope(document.root)
    scopes, count = [root], 0
    for scope in scopes:  # grows while it runs
        count += len(scope.graph.nodes)
        if count > MAX_NODES:
            raise BadWorkflow(f"with all subgraphs unfolded the workflow has more than {MAX_NODES} nodes")
        for node in scope.graph.nodes.values():
            definition = document.subgraphs.get(node.type)
            if definition is None or not node.active:
                continue
            above: _Scope | None = scope
            while above is not None:
                if above.graph is definition:
                    raise BadWorkflow(f"{definition.name} contains itself", node=scope.path + node.id)
                above = above.parent
            child = _Scope(definition, f"{scope.path}{node.id}:", scope, node)
            child.promoted.update(scope.inner.get(node.id, {}))
            _promote(child, node)
            scope.children[node.id] = child
            scopes.append(child)
    return scopes


def _promote(scope: _Scope, host: Node) -> None:
    """Hand the values that a subgraph node shows for widgets inside to where they belong."""
    if isinstance(host.values, dict):
        scope.promoted.update(host.values)
        return
    targets = {name: [scope.graph.links[id_] for id_ in ids if id_ in scope.graph.links]
               for name, ids in scope.graph.inputs}
    proxies = host.properties.get("proxyWidgets")
    if not isinstance(proxies, list) or not proxies:
        shown_inputs = [name for name, links in targets.items() if any(_is_widget(scope, link) for link in links)]
        pairs = zip(shown_inputs, host.values, strict=False)
        scope.promoted.update({name: value for name, value in pairs if value is not None})
        return
    fed = {(link.target, _socket_name(scope, link)): name for name, links in targets.items() for link in links}
    for proxy, value in zip(proxies, host.values, strict=False):
        if value is None or not isinstance(proxy, list) or len(proxy) < 2:
            continue
        inner_id, widget = str(proxy[0]), _PREFIXED.sub("", str(proxy[1]))
        name = fed.get((inner_id, widget))
        if inner_id == "-1" or name is not None:
            scope.promoted[name or widget] = value
        else:
            scope.inner.setdefault(inner_id, {})[widget] = value


def _socket_name(scope: _Scope, link: Link) -> str | None:
    node = scope.graph.nodes.get(link.target)
    return node.inputs[link.target_slot].name if node and link.target_slot < len(node.inputs) else None


def _is_widget(scope: _Scope, link: Link) -> bool:
    node = scope.graph.nodes.get(link.target)
    return bool(node and link.target_slot < len(node.inputs) and node.inputs[link.target_slot].widget)


def _resolve(scope: _Scope, node: Node, slot: int, known: _Known) -> _Found:
    """Where the value of input `slot` comes from. `known` keeps what is found for every place on the way, so that many
    nodes at the end of one long chain cost no more than one."""
    start = f"node {scope.path}{node.id}, input {shown(node.inputs[slot].name, 60)}"
    way: dict[_Place, None] = {}
    wanted = ""
    found: _Found = None
    while True:
        place = (scope.path, node.id, slot, wanted)
        if place in way:
            raise BadWorkflow(f"{start}: the links form a cycle", node=scope.path + node.id)
        if place in known:
            found = known[place]
            break
        way[place] = None
        socket = node.inputs[slot]
        if socket.link is None:
            break
        link = scope.graph.links.get(socket.link)
        if link is None:
            raise BadWorkflow(f"{start}: link {shown(socket.link)} is missing", node=scope.path + node.id)
        step = _origin(scope, link, wanted or socket.type, start)
        if not isinstance(step, _Step):
            found = step
            break
        scope, node, slot, wanted = step.scope, step.node, step.slot, step.wanted
    known.update(dict.fromkeys(way, found))
    return found


@dataclass(frozen=True)
class _Step:
    """Go on with this input."""

    scope: _Scope
    node: Node
    slot: int
    wanted: str


def _origin(scope: _Scope, link: Link, wanted: str, start: str) -> _Step | _Found:
    """One link back: out of a subgraph, into one, through a reroute or a bypassed node, or to a node that is real."""
    for _ in range(MAX_NODES):
        if link.origin == SUBGRAPH_INPUT and scope.host is not None and scope.parent is not None:
            if link.origin_slot >= len(scope.graph.inputs):
                raise BadWorkflow(f"{start}: {scope.graph.name} has no input {link.origin_slot}")
            outer = _host_slot(scope, link.origin_slot)
            if outer is None or scope.host.inputs[outer].link is None:
                return _promoted(scope, link.origin_slot)
            return _Step(scope.parent, scope.host, outer, "")
        node = scope.graph.nodes.get(link.origin)
        if node is None:
            raise BadWorkflow(f"{start}: linked to node {shown(scope.path + link.origin)}, which is not there")
        if node.type == PRIMITIVE:
            return _primitive(scope, node)
        if node.mode == MUTED or node.type in NOTES:
            return None
        if node.mode == BYPASSED:
            slot = _bypass(node, link.origin_slot, wanted)
            return None if slot is None else _Step(scope, node, slot, "")
        if node.type == REROUTE:
            return _Step(scope, node, 0, wanted) if node.inputs else None
        child = scope.children.get(node.id)
        if child is None:
            return [scope.path + node.id, link.origin_slot]
        if link.origin_slot >= len(child.graph.outputs):
            raise BadWorkflow(f"{start}: {child.graph.name} has no output {link.origin_slot}")
        inside = child.graph.outputs[link.origin_slot]
        if inside is None:
            return None
        scope, link = child, child.graph.links[inside]
    raise BadWorkflow(f"{start}: the links form a cycle")


def _host_slot(scope: _Scope, slot: int) -> int | None:
    """Index among the subgraph node's saved sockets of input `slot`; files leave out sockets that hold nothing."""
    host = scope.host
    name = scope.graph.inputs[slot][0]
    if host is None:
        return None
    if slot < len(host.inputs) and host.inputs[slot].name == name:
        return slot
    return next((index for index, socket in enumerate(host.inputs) if socket.name == name), None)


def _promoted(scope: _Scope, slot: int) -> _Value | None:
    """Value of an unlinked subgraph input, for all it is linked to: what the subgraph node holds, else the value of the
    first widget inside."""
    for _ in range(MAX_NODES):
        name, ids = scope.graph.inputs[slot]
        if name in scope.promoted:
            return _Value(scope.promoted[name])
        link = next((link for link in map(scope.graph.links.get, ids) if link and _is_widget(scope, link)), None)
        if link is None:
            return None
        target = _socket_name(scope, link)
        child = scope.children.get(link.target)
        if child is None:
            own = scope.own.get(link.target, {})
            return _Value(own[target]) if target in own else None
        names = [known for known, _ in child.graph.inputs]
        if target not in names:
            return None
        scope, slot = child, names.index(target)
    return None


def _primitive(scope: _Scope, node: Node) -> _Value | None:
    """The value of a PrimitiveNode; it counts whatever the node's mode, because frontends copy it before they look."""
    override = scope.inner.get(node.id)
    if override:
        return _Value(next(iter(override.values())))
    values = list(node.values.values()) if isinstance(node.values, dict) else node.values
    return _Value(values[0]) if values and values[0] is not None else None


def _bypass(node: Node, slot: int, wanted: str) -> int | None:
    """Which input of a bypassed node passes to its output `slot` towards a socket of type `wanted`."""
    if wanted in ("", "*"):
        return (slot if slot < len(node.inputs) else 0) if node.inputs else None
    given = node.outputs[slot].type if slot < len(node.outputs) else "*"

    def fits(kind: str) -> bool:
        return _connects(kind, given) and _connects(kind, wanted)

    if slot < len(node.inputs) and fits(node.inputs[slot].type):
        return slot
    exact = [index for index, socket in enumerate(node.inputs) if socket.type == wanted]
    loose = [index for index, socket in enumerate(node.inputs) if fits(socket.type)]
    return next(iter(exact + loose), None)


def _connects(a: str, b: str) -> bool:
    if {a, b} & {"", "*"}:
        return True
    return bool(set(a.lower().split(",")) & set(b.lower().split(",")))


def _name_files(prompt: Prompt, active: list[tuple[_Scope, Node]]) -> None:
    """`%Node.widget%` in the prefix of SaveImage: that widget's value, the node found by search name, else by title."""
    def value_of(match: re.Match[str]) -> str:
        name, _, widget = match.group(1).partition(".")
        if not widget or "." in widget:
            return match.group(0)
        by_name = [n for n in active if (n[1].properties.get("Node name for S&R") == name)]
        named = by_name or [n for n in active if prompt[n[0].path + n[1].id]["_meta"]["title"] == name]
        values = [prompt[scope.path + node.id]["inputs"].get(widget) for scope, node in named[:1]]
        if not values or values[0] is None or isinstance(values[0], list | dict):
            log.warning("%s in a file name prefix names no widget of this workflow", shown(match.group(0)))
            return match.group(0)
        return re.sub(r'[/?<>\\:*|"\x00-\x1f\x7f]', "_", str(values[0]))

    for node in prompt.values():
        prefix = node["inputs"].get("filename_prefix")
        if node["class_type"] == "SaveImage" and isinstance(prefix, str) and len(prefix) < MAX_PREFIX:
            node["inputs"]["filename_prefix"] = re.sub(r"%([^%]+)%", value_of, prefix)
