"""The row editor of LoRA Stack in ComfyUI's own web interface, on the canvas and as Nodes 2.0.

With FLUX_KIT_LORA_SCREENSHOTS=FOLDER pictures of it are left there.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from comfy_server import Failed, Server
from frontend import Frontend
from stack_editor import NODE, opened, picture, rows_of, shown, sticking_out, text_of
from stack_files import HTML, INK, RED, png

pytestmark = pytest.mark.usefixtures("lora_files")


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
    tree.locator("[title=style]").wait_for()
    for path in ("style", "style/ink"):
        folder = tree.locator(f"[title='{path}']")
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


def test_undo_shows_the_rows_that_count(frontend: Frontend) -> None:
    editor, page = opened(frontend, [{"lora": RED, "model": 0.5}, {"lora": INK}]), frontend.page
    editor.get_by_role("button", name="Remove sumi-e flux rank16").click()
    page.mouse.click(900, 700)
    page.wait_for_timeout(300)
    assert rows_of(frontend) == [{"lora": RED, "model": 0.5}]
    page.keyboard.press("Control+z")
    page.wait_for_timeout(1000)
    assert rows_of(frontend) == [{"lora": RED, "model": 0.5}, {"lora": INK}]
    editor = shown(frontend)
    assert editor.get_by_role("listitem").count() == 2
    editor.get_by_role("switch").nth(1).click()
    assert rows_of(frontend) == [{"lora": RED, "model": 0.5}, {"lora": INK, "on": False}]


def test_what_is_typed_counts_at_once(frontend: Frontend) -> None:
    """A run by Ctrl+Enter comes before the browser tells of a change."""
    editor = opened(frontend, [{"lora": RED}])
    editor.get_by_role("button", name="More of red").click()
    editor.get_by_role("textbox", name="Block weights").click()
    frontend.page.keyboard.type("single = 0")
    assert rows_of(frontend) == [{"lora": RED, "blocks": "single = 0"}]


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
    assert sticking_out(editor) == []


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
