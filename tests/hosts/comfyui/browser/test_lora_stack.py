"""The row editor of LoRA Stack in ComfyUI's own web interface, on the canvas and as Nodes 2.0.

With FLUX_KIT_LORA_SCREENSHOTS=FOLDER pictures of it are left there.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from comfy_server import Failed, Server
from frontend import Frontend
from stack_files import lora_file, png

NODE = "FluxKitLoraStack"
HTML = "people/<img src=x onerror=hacked()>.safetensors"
RED, INK = "red.safetensors", "style/ink/sumi-e flux rank16.safetensors"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", autouse=True)
def files(server: Server) -> None:
    folder = server.base / "models" / "loras"
    lora_file(folder / RED, {"modelspec.trigger_phrase": "r3d style", "modelspec.title": "Red all over"})
    thumbnail = base64.b64encode(png((20, 120, 60))).decode()
    lora_file(folder / INK, {"modelspec.thumbnail": f"data:image/png;base64,{thumbnail}"})
    lora_file(folder / HTML, {"modelspec.trigger_phrase": HTML, "modelspec.title": "<b onclick=hacked()>bold</b>"})
    for number in range(3):
        lora_file(folder / "people" / f"person_{number}.safetensors", {})
    (folder / "red.preview.png").write_bytes(png())


def opened(frontend: Frontend, rows: Rows | str, width: int = 340) -> Any:
    """The editor of a workflow of one node; larger than life, so that the mouse meets what it should."""
    text = rows if isinstance(rows, str) else json.dumps(rows)
    node = {"id": 1, "type": NODE, "pos": [100, 100], "size": [width, 200], "flags": {}, "order": 0, "mode": 0,
            "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text]}
    frontend.open("stack.json", {"version": 0.4, "last_node_id": 1, "last_link_id": 0, "nodes": [node], "links": [],
                                 "groups": [], "config": {}, "extra": {}})
    return shown(frontend)


def shown(frontend: Frontend) -> Any:
    frontend.page.evaluate("""() => { app.canvas.ds.scale = 1.2; app.canvas.ds.offset.splice?.(0, 2, 60, 40);
        app.canvas.ds.offset[0] = 60; app.canvas.ds.offset[1] = 40; app.graph.setDirtyCanvas(true, true) }""")
    editor = frontend.page.locator(".fk-loras:visible")
    editor.wait_for()
    frontend.page.wait_for_timeout(300)  # the node takes its height
    return editor


def text_of(frontend: Frontend) -> str:
    (node,) = (entry for entry in frontend.prompt().values() if entry["class_type"] == NODE)
    found: str = node["inputs"]["rows"]
    return found


def rows_of(frontend: Frontend) -> Rows:
    found: Rows = json.loads(text_of(frontend))
    return found


def picture(frontend: Frontend, name: str, request: pytest.FixtureRequest) -> None:
    folder = os.environ.get("FLUX_KIT_LORA_SCREENSHOTS")
    if folder:
        frontend.page.screenshot(path=Path(folder) / f"{name}-{request.node.name}.png")


def test_a_stack_is_made_by_hand(frontend: Frontend, request: pytest.FixtureRequest) -> None:
    """Add by search, type a strength, switch off, move, remove; then the workflow is saved and opened again."""
    editor, page = opened(frontend, []), frontend.page
    for words in ("red", "smi ink"):
        editor.get_by_role("button", name="Add LoRA").click()
        page.get_by_role("combobox", name="Search LoRA files").fill(words)
        page.get_by_role("treeitem").first.wait_for()
        page.keyboard.press("Enter")
    new = {"on": True, "model": 1, "clip": 1}
    assert rows_of(frontend) == [{**new, "lora": RED}, {**new, "lora": INK}]

    model, clip = (editor.get_by_role("spinbutton", name=name).first for name in ("Model strength", "CLIP strength"))
    model.click()
    page.keyboard.type("0,75")
    page.keyboard.press("Enter")
    clip.click()
    page.keyboard.press("ArrowDown")
    assert [(row["model"], row["clip"]) for row in rows_of(frontend)] == [(0.75, 0.95), (1, 1)]

    editor.get_by_role("switch").nth(1).click()
    assert [row["on"] for row in rows_of(frontend)] == [True, False]
    picture(frontend, "made", request)

    grips = editor.locator(".fk-grip")
    start, end = grips.nth(0).bounding_box(), grips.nth(1).bounding_box()
    page.mouse.move(start["x"] + 4, start["y"] + 8)
    page.mouse.down()
    page.mouse.move(end["x"] + 4, end["y"] + end["height"] + 4, steps=5)
    page.mouse.up()
    made = [{**new, "lora": INK, "on": False}, {**new, "lora": RED, "model": 0.75, "clip": 0.95}]
    assert rows_of(frontend) == made

    saved = json.loads(page.evaluate("() => JSON.stringify(app.graph.serialize())"))
    assert json.loads(saved["nodes"][0]["widgets_values"][0]) == made
    frontend.open("again.json", saved)
    editor = shown(frontend)
    assert rows_of(frontend) == made and editor.get_by_role("listitem").count() == 2

    editor.get_by_role("button", name="Remove sumi-e flux rank16").click()
    assert rows_of(frontend) == made[1:]
    assert frontend.problems == [] and frontend.look().red == []


def test_what_is_not_touched_stays_to_the_letter(frontend: Frontend) -> None:
    """Unknown keys, spaces and rows written by other programs; after an edit all keys are still there."""
    text = '[ {"lora":"red.safetensors", "mine": {"a": [1]}, "strength": 3}, {"lora": "style\\\\none.safetensors"} ]'
    editor = opened(frontend, text)
    assert text_of(frontend) == text
    editor.get_by_role("checkbox", name="All LoRAs on").click()
    on = [{**row, "on": False} for row in json.loads(text)]
    assert rows_of(frontend) == on
    editor.get_by_role("checkbox", name="All LoRAs on").click()
    assert [row["on"] for row in rows_of(frontend)] == [True, True]
    lost = editor.locator(".fk-lost")
    assert lost.count() == 1 and "not found" in lost.get_attribute("aria-label")


@pytest.mark.parametrize("text", ["{not json", '{"a": 1}', "[1, 2]", '[{"lora": 5}]'])
def test_a_text_that_is_no_list_of_rows_is_shown_and_kept(frontend: Frontend, text: str) -> None:
    editor = opened(frontend, text)
    assert text_of(frontend) == text and editor.get_by_role("alert").is_visible()
    field = editor.get_by_role("textbox", name="Rows as JSON")
    assert field.input_value() == text
    field.fill('[{"lora": "red.safetensors"}]')
    field.blur()
    assert rows_of(frontend) == [{"lora": RED}] and editor.get_by_role("listitem").count() == 1


def test_text_from_files_is_never_html(frontend: Frontend) -> None:
    page = frontend.page
    page.evaluate("() => { window.bad = 0; window.hacked = () => window.bad++ }")
    editor = opened(frontend, [{"lora": HTML, "blocks": "<b>x</b>"}])
    editor.get_by_role("button", name="More of").click()
    editor.get_by_text("<b onclick=hacked()>bold</b>").wait_for()
    editor.get_by_role("group", name="Trigger words").get_by_text(HTML).wait_for()
    editor.get_by_role("button", name="File:").click()
    page.get_by_role("combobox", name="Search LoRA files").fill("onerror")
    page.get_by_role("tree").get_by_text("<img src=x onerror=hacked()>").wait_for()
    page.locator(".fk-picker").get_by_text("<b onclick=hacked()>bold</b>").wait_for()
    assert page.evaluate("() => [window.bad, document.querySelectorAll('img[src=x], .fk-theme b').length]") == [0, 0]
    page.keyboard.press("Escape")
    assert page.locator(".fk-picker").count() == 0 and frontend.problems == []


def test_the_tree_opens_by_keyboard_and_shows_pictures(frontend: Frontend, request: pytest.FixtureRequest) -> None:
    """From Add LoRA to a file two folders down, without the mouse; the focus comes back to where it was."""
    editor, page = opened(frontend, []), frontend.page
    editor.get_by_role("button", name="Add LoRA").focus()
    page.keyboard.press("Enter")
    tree = page.get_by_role("tree")
    tree.get_by_role("treeitem", name="style").wait_for()
    for name in ("style", "ink"):
        folder = tree.get_by_role("treeitem", name=name)
        while folder.get_attribute("aria-selected") != "true":
            page.keyboard.press("ArrowDown")
        if folder.get_attribute("aria-expanded") != "true":
            page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    drawn = page.locator(".fk-side img")
    drawn.wait_for()
    page.wait_for_function("() => document.querySelector('.fk-side img').naturalWidth === 64")
    picture(frontend, "tree", request)
    page.keyboard.press("Enter")
    assert [row["lora"] for row in rows_of(frontend)] == [INK]
    page.wait_for_function("() => document.activeElement.matches('.fk-add')")
    editor.locator(".fk-grip").focus()
    page.keyboard.press("Delete")  # the row, not the node
    assert rows_of(frontend) == [] and page.evaluate("() => app.graph.nodes.length") == 1


def test_details_are_set_and_every_part_has_a_name(frontend: Frontend, request: pytest.FixtureRequest) -> None:
    editor, page = opened(frontend, [{"lora": RED}]), frontend.page
    editor.get_by_role("button", name="More of red").click()
    editor.get_by_role("textbox", name="Block weights").fill("single = 0")
    page.keyboard.press("Tab")
    end = editor.get_by_role("spinbutton", name="Up to this share of the steps")
    end.click()
    page.keyboard.type("7")  # more than all steps: as much as there is
    page.keyboard.press("Enter")
    assert rows_of(frontend) == [{"lora": RED, "blocks": "single = 0", "end": 1}]
    end.fill("much")
    page.keyboard.press("Enter")
    assert end.get_attribute("aria-invalid") == "true" and rows_of(frontend)[0]["end"] == 1
    editor.get_by_text("r3d style").wait_for()
    picture(frontend, "details", request)
    nameless = editor.evaluate("""root => [...root.querySelectorAll('button, input')].filter(part =>
        !part.getAttribute('aria-label') && !part.textContent.trim()).map(part => part.outerHTML)""")
    assert nameless == []


def test_a_strength_changes_by_dragging(frontend: Frontend) -> None:
    editor, page = opened(frontend, [{"lora": RED, "model": 0.5}]), frontend.page
    box = editor.get_by_role("spinbutton", name="Model strength").bounding_box()
    page.mouse.move(box["x"] + 10, box["y"] + 8)
    page.mouse.down()
    page.mouse.move(box["x"] + 23, box["y"] + 8, steps=6)
    page.mouse.up()
    assert rows_of(frontend) == [{"lora": RED, "model": 0.6}]


def test_nothing_sticks_out_of_a_narrow_node(frontend: Frontend, request: pytest.FixtureRequest) -> None:
    editor = opened(frontend, [{"lora": RED}, {"lora": HTML}, {"lora": "long/" + "n" * 90}], width=240)
    picture(frontend, "narrow", request)
    outside = editor.evaluate("""root => { const box = root.getBoundingClientRect();
        return [...root.querySelectorAll('button, input')].filter(part => part.checkVisibility()).filter(part => {
            const own = part.getBoundingClientRect();
            return own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1 || own.width < 8;
        }).map(part => part.outerHTML) }""")
    assert outside == []
    overlaps = editor.evaluate("""root => [...root.querySelectorAll('.fk-row')].filter(row => {
        const boxes = [...row.querySelectorAll('button, input')].map(part => part.getBoundingClientRect());
        return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right - 1 && b.left < a.right - 1
            && a.top < b.bottom - 1 && b.top < a.bottom - 1)); }).length""")
    assert overlaps == 0


def test_rows_inside_a_subgraph_and_on_its_outside(frontend: Frontend, request: pytest.FixtureRequest) -> None:
    """The node works inside; where its rows are made an input of the subgraph, they are edited from outside."""
    opened(frontend, [{"lora": RED}])
    page = frontend.page
    page.evaluate("() => { window.outer = app.graph.convertToSubgraph(new Set([app.graph.nodes[0]])).node }")
    assert rows_of(frontend) == [{"lora": RED}]
    page.evaluate("""() => { const inner = outer.subgraph.nodes[0], input = outer.subgraph.addInput('rows', 'STRING');
        input.connect(inner.inputs.find(slot => slot.name === 'rows'), inner); }""")
    editor = shown(frontend)
    picture(frontend, "subgraph", request)
    editor.get_by_role("switch").click()
    assert rows_of(frontend) == [{"lora": RED, "on": False}]
    assert frontend.problems == []


def test_the_server_runs_rows_that_never_saw_a_browser(server: Server) -> None:
    rows = [{"lora": "RED.safetensors", "model": 0.5, "end": 0.5}, {"on": False, "lora": "gone"}]
    prompt = {"1": {"class_type": NODE, "inputs": {"rows": json.dumps(rows)}},
              "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}},
              "3": {"class_type": "PreviewAny", "inputs": {"source": ["1", 3]}},
              "4": {"class_type": NODE, "inputs": {"rows": "[]", "loras": ["1", 0], "loras.0.lora_name": INK}},
              "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}}}
    told = {node: output["text"][0] for node, output in server.run(prompt).items()}
    assert told["2"] == "r3d style" and "no place for its range 0 to 0.5" in told["3"]
    assert RED in told["5"] and INK in told["5"]
    prompt["1"]["inputs"]["rows"] = json.dumps([{"lora": "rde.safetensors"}])
    with pytest.raises(Failed, match=r"near: red\.safetensors"):
        server.submit(prompt)


@pytest.mark.parametrize("name", ["../../custom_nodes/flux-kit/README.md", "/etc/passwd", "", "none"])
def test_routes_give_nothing_but_listed_files(server: Server, name: str) -> None:
    for route in ("lora", "lora/picture"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            server.call(f"/flux_kit/{route}?name={urllib.request.quote(name, safe='')}")
        assert caught.value.code == 404
        caught.value.close()


def test_routes_tell_of_a_file(server: Server) -> None:
    assert {RED, INK, HTML} <= set(server.call("/flux_kit/loras")["files"])
    told = server.call(f"/flux_kit/lora?name={RED}")
    assert told["words"] == ["r3d style"] and told["picture"] and told["problems"] == []
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/flux_kit/lora/picture?name={RED}") as answer:
        assert answer.headers["Content-Type"] == "image/png" and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.read() == png()
