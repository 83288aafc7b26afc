"""Saved workflow JSON (UI format 0.4 and 1.0) as checked dataclasses: what later steps read has its type assured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...engine.errors import BadWorkflow
from ..names import shown

MUTED, BYPASSED = 2, 4
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = "-10", "-20"  # ids that stand for a subgraph's own sockets
MAX_SUBGRAPHS = 2000
MAX_SOCKETS = 1000  # of one node: keeps every later search short


@dataclass(frozen=True)
class Socket:
    """An input or output of a node. `link`: id of the link that arrives; `widget`: it is a widget's socket."""

    name: str
    type: str
    link: str | None = None
    widget: bool = False


@dataclass(frozen=True)
class Node:
    id: str
    type: str
    title: str | None
    mode: int
    inputs: tuple[Socket, ...]
    outputs: tuple[Socket, ...]
    values: list[Any] | dict[str, Any]
    properties: dict[str, Any]

    @property
    def active(self) -> bool:
        return self.mode not in (MUTED, BYPASSED)


@dataclass(frozen=True)
class Link:
    id: str
    origin: str
    origin_slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class Graph:
    """A workflow or the inside of a subgraph. `inputs`: a subgraph's sockets with the ids of their links, in order."""

    name: str
    nodes: dict[str, Node]
    links: dict[str, Link]
    inputs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    outputs: tuple[str | None, ...] = ()  # for each output of the subgraph the link that leads there


@dataclass(frozen=True)
class Document:
    root: Graph
    subgraphs: dict[str, Graph]


def read_document(data: dict[str, Any]) -> Document:
    """A saved workflow and all its subgraph definitions; BadWorkflow names the place that is not as it should be."""
    definitions: dict[str, Graph] = {}
    waiting = [data]
    while waiting:
        for raw in _subgraphs(waiting.pop()):
            id_ = _id(raw.get("id"), "a subgraph's id")
            if len(definitions) >= MAX_SUBGRAPHS:
                raise BadWorkflow(f"more than {MAX_SUBGRAPHS} subgraphs")
            if id_ not in definitions:
                definitions[id_] = _graph(raw, f'subgraph "{shown(str(raw.get("name", id_)), 60)}"')
                waiting.append(raw)  # format 1.0 may nest definitions
    return Document(_graph(data, "the workflow"), definitions)


def _subgraphs(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    definitions = _dict(data.get("definitions") or {}, "definitions")
    for raw in _list(definitions.get("subgraphs") or [], "definitions.subgraphs"):
        yield _dict(raw, "a subgraph")


def _graph(data: dict[str, Any], where: str) -> Graph:
    nodes: dict[str, Node] = {}
    for raw in _list(data.get("nodes"), f"nodes of {where}"):
        node = _node(_dict(raw, f"a node of {where}"), where)
        if node.id in nodes:
            raise BadWorkflow(f"{where} has two nodes with the id {shown(node.id)}")
        nodes[node.id] = node
    raw_links = _list(data.get("links") or [], f"links of {where}")
    links = {link.id: link for link in (_link(raw, where) for raw in raw_links)}
    inputs, outputs = [], []
    for raw in _sockets(data.get("inputs"), f"inputs of {where}"):
        socket = _dict(raw, f"an input of {where}")
        inputs.append((_text(socket.get("name"), f"an input's name in {where}"), _link_ids(socket, where)))
    ending = {link.target_slot: link.id for link in links.values() if link.target == SUBGRAPH_OUTPUT}
    for slot, raw in enumerate(_sockets(data.get("outputs"), f"outputs of {where}")):
        ids = _link_ids(_dict(raw, f"an output of {where}"), where)
        outputs.append(ending.get(slot) or next((id_ for id_ in ids if id_ in links), None))
    return Graph(where, nodes, links, tuple(inputs), tuple(outputs))


def _node(data: dict[str, Any], where: str) -> Node:
    id_ = _id(data.get("id"), f"a node's id in {where}")
    here = f"node {shown(id_, 40)} of {where}"
    mode = data.get("mode", 0)
    title = data.get("title")
    values = data.get("widgets_values")
    if values is None:
        values = data.get("widgets_values_named") or []
    if not isinstance(values, list | dict):
        raise BadWorkflow(f"{here}: widgets_values is {shown(values)}, neither list nor object")
    return Node(
        id=id_, type=_text(data.get("type"), f"type of {here}"),
        title=title if isinstance(title, str) and title else None,
        mode=mode if isinstance(mode, int) else 0,
        inputs=tuple(_socket(raw, here) for raw in _sockets(data.get("inputs"), f"inputs of {here}")),
        outputs=tuple(_socket(raw, here) for raw in _sockets(data.get("outputs"), f"outputs of {here}")),
        values=values, properties=_dict(data.get("properties") or {}, f"properties of {here}"))


def _socket(raw: Any, here: str) -> Socket:
    data = _dict(raw, f"a socket of {here}")
    link, kind = data.get("link"), data.get("type")
    return Socket(name=_text(data.get("name"), f"a socket's name of {here}"),
                  type=kind if isinstance(kind, str) else "*",
                  link=None if link is None else _id(link, f"a link of {here}"), widget=bool(data.get("widget")))


def _link(raw: Any, where: str) -> Link:
    """[id, origin, slot, target, slot, type] or an object with the same under names."""
    if isinstance(raw, dict):
        raw = [raw.get(key) for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot")]
    fields = _list(raw, f"a link of {where}")
    if len(fields) < 5:
        raise BadWorkflow(f"a link of {where} is {shown(fields)}, not [id, from node, output, to node, input, type]")
    slots = fields[2], fields[4]
    if any(type(slot) is not int or slot < 0 for slot in slots):
        raise BadWorkflow(f"link {shown(fields[0])} of {where}: output and input are {shown(slots)}, not counts")
    id_, origin, target = (_id(fields[place], f"link {shown(fields)} of {where}") for place in (0, 1, 3))
    return Link(id_, origin, slots[0], target, slots[1])


def _link_ids(socket: dict[str, Any], where: str) -> tuple[str, ...]:
    return tuple(_id(id_, f"linkIds in {where}") for id_ in _list(socket.get("linkIds") or [], f"linkIds in {where}"))


def _sockets(value: Any, what: str) -> list[Any]:
    found = _list(value or [], what)
    if len(found) > MAX_SOCKETS:
        raise BadWorkflow(f"{what}: {len(found)}, more than any node has ({MAX_SOCKETS})")
    return found


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadWorkflow(f"{what}: expected a list, found {shown(value)}")
    return value


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        # An empty list is how some writers save an empty object.
        if value == []:
            return {}
        raise BadWorkflow(f"{what}: expected an object, found {shown(value)}")
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadWorkflow(f"{what}: expected text, found {shown(value)}")
    return value


def _id(value: Any, what: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BadWorkflow(f"{what}: expected a number or text, found {shown(value)}")
    return str(value)
