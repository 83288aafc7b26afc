"""The row editor of LoRA Stack on a page of ComfyUI's interface: opened alone or in a subgraph, read and measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from frontend import Frontend

NODE = "FluxKitLoraStack"
OUTSIDE, PREVIEW = 10, 20  # ids of the first subgraph node and of the node that shows its report
Rows = list[dict[str, Any]]

_SUBGRAPH = "11111111-2222-4333-8444-555555555555"
_SLOTS = [f"aaaaaaaa-0000-4000-8000-00000000000{number}" for number in (1, 2)]
_OUTPUTS = {"LORA_STACK": "LORA_STACK", "FLUX_LORAS": "FLUX_LORAS", "trigger words": "STRING", "report": "STRING"}
_STICKING_OUT = """root => {
    const box = root.getBoundingClientRect();
    const out = [...root.querySelectorAll('button, input')].filter(part => part.checkVisibility()).filter(part => {
        const own = part.getBoundingClientRect();
        return own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1 || own.width < 8;
    });
    const over = [...root.querySelectorAll('.fk-row')].filter(row => {
        const boxes = [...row.querySelectorAll('button, input')].map(part => part.getBoundingClientRect());
        return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 1 && b.top < a.bottom - 1));
    });
    return [...out, ...over].map(part => part.outerHTML);
}"""


def node(text: str, width: int = 340, report: int | None = None, rows: int | None = None) -> dict[str, Any]:
    """A stack of id 1; `report` and `rows`: ids of the links at its last output and at its widget."""
    outputs = [{"name": name, "type": kind, "links": [report] if name == "report" and report else []}
               for name, kind in _OUTPUTS.items()]
    inputs = [{"name": "loras", "type": "FLUX_LORAS,LORA_STACK", "link": None, "shape": 7},
              {"name": "rows", "type": "STRING", "widget": {"name": "rows"}, "link": rows}]
    return {"id": 1, "type": NODE, "pos": [100, 100], "size": [width, 200], "flags": {}, "order": 0, "mode": 0,
            "inputs": inputs, "outputs": outputs, "properties": {}, "widgets_values": [text]}


def preview(number: int, link: int, left: int = 600, top: int = 100) -> dict[str, Any]:
    return {"id": number, "type": "PreviewAny", "pos": [left, top], "size": [300, 150], "flags": {}, "order": 9,
            "mode": 0, "inputs": [{"name": "source", "type": "*", "link": link}], "outputs": [], "properties": {},
            "widgets_values": []}


def workflow(nodes: Any, links: Any = (), **more: Any) -> dict[str, Any]:
    return {"version": 0.4, "last_node_id": 99, "last_link_id": 99, "nodes": list(nodes), "links": list(links),
            "groups": [], "config": {}, "extra": {}, **more}


def stack_alone(rows: Rows) -> dict[str, Any]:
    """A stack of id 1 whose report is shown by node PREVIEW."""
    return workflow([node(json.dumps(rows), report=1), preview(PREVIEW, 1)], [[1, 1, 3, PREVIEW, 0, "STRING"]])


def stack_in_subgraph(inside: Rows, *outside: Rows, proxy: bool = False) -> dict[str, Any]:
    """One subgraph with a stack in it, as often as there are rows `outside`, each shown by a node of its own.

    The rows are an input of the subgraph; with `proxy` they are named in its property `proxyWidgets` instead.
    """
    links = [{"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 1, "target_slot": 1, "type": "STRING"},
             {"id": 2, "origin_id": 1, "origin_slot": 3, "target_id": -20, "target_slot": 0, "type": "STRING"}]
    rows = {"id": _SLOTS[0], "name": "rows", "type": "STRING", "linkIds": [1], "pos": [100, 120]}
    report = {"id": _SLOTS[1], "name": "report", "type": "STRING", "linkIds": [2], "pos": [820, 120]}
    subgraph = {"id": _SUBGRAPH, "version": 1, "revision": 0, "config": {}, "name": "Stacked", "widgets": [],
                "state": {"lastGroupId": 0, "lastNodeId": 1, "lastLinkId": 2, "lastRerouteId": 0},
                "inputNode": {"id": -10, "bounding": [-100, 100, 120, 60]},
                "outputNode": {"id": -20, "bounding": [800, 100, 120, 60]}, "inputs": [] if proxy else [rows],
                "outputs": [report], "nodes": [node(json.dumps(inside), report=2, rows=None if proxy else 1)],
                "links": links[proxy:], "groups": [], "extra": {}}
    slot = {"name": "rows", "type": "STRING", "widget": {"name": "rows"}, "link": None}
    nodes, outer = [], []
    for at, own in enumerate(outside):
        nodes += [{"id": OUTSIDE + at, "type": _SUBGRAPH, "pos": [100 + 420 * at, 100], "size": [340, 200],
                   "flags": {}, "order": at, "mode": 0, "inputs": [] if proxy else [slot],
                   "outputs": [{"name": "report", "type": "STRING", "links": [at + 1]}],
                   "properties": {"proxyWidgets": [["1", "rows"]]} if proxy else {},
                   "widgets_values": [json.dumps(own)]}, preview(PREVIEW + at, at + 1, 100 + 420 * at, 500)]
        outer.append([at + 1, OUTSIDE + at, 0, PREVIEW + at, 0, "STRING"])
    return workflow(nodes, outer, definitions={"subgraphs": [subgraph]})


def opened(frontend: Frontend, rows: Rows | str, width: int = 340) -> Any:
    """The editor of a workflow of one node; larger than life, so that the mouse meets what it should."""
    text = rows if isinstance(rows, str) else json.dumps(rows)
    frontend.open("stack.json", workflow([node(text, width)]))
    return shown(frontend)


def shown(frontend: Frontend, count: int = 1) -> Any:
    """The editor that is to be seen now, once there are as many as `count`."""
    frontend.page.evaluate("""() => { app.canvas.ds.scale = 1.2; app.canvas.ds.offset.splice?.(0, 2, 60, 40);
        app.canvas.ds.offset[0] = 60; app.canvas.ds.offset[1] = 40; app.graph.setDirtyCanvas(true, true) }""")
    editors = frontend.page.locator(".fk-loras:visible")
    for at in range(count):
        editors.nth(at).wait_for(timeout=30_000)
    frontend.page.wait_for_timeout(300)  # the node takes its height
    assert editors.count() == count
    return editors


def texts_of(frontend: Frontend) -> dict[str, str]:
    """The rows of every stack in the prompt, by node id."""
    return {number: entry["inputs"]["rows"] for number, entry in frontend.prompt().items()
            if entry["class_type"] == NODE}


def text_of(frontend: Frontend) -> str:
    (found,) = texts_of(frontend).values()
    return found


def rows_of(frontend: Frontend) -> Rows:
    found: Rows = json.loads(text_of(frontend))
    return found


def sticking_out(editor: Any) -> list[str]:
    """Buttons and fields that leave the editor or are too small to press, and rows in which two of them overlap."""
    found: list[str] = editor.evaluate(_STICKING_OUT)
    return found


def picture(frontend: Frontend, name: str, request: pytest.FixtureRequest) -> None:
    """A picture of the page, where FLUX_KIT_LORA_SCREENSHOTS names a folder."""
    folder = os.environ.get("FLUX_KIT_LORA_SCREENSHOTS")
    if folder:
        frontend.page.screenshot(path=Path(folder) / f"{name}-{request.node.name}.png")
