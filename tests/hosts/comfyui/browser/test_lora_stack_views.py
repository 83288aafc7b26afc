"""The rows of LoRA Stack where its node is not seen: on the outside of subgraphs and in App mode."""

from __future__ import annotations

import json
from typing import Any

import pytest
from frontend import Frontend
from stack_editor import (
    OUTSIDE,
    PREVIEW,
    Rows,
    opened,
    picture,
    rows_of,
    shown,
    stack_alone,
    stack_in_subgraph,
    sticking_out,
    texts_of,
)
from stack_files import HTML, INK, RED

pytestmark = pytest.mark.usefixtures("lora_files")

NEW = {"on": True, "model": 1, "clip": 1}
FORM = "[data-testid=linear-widgets]"
INNER = "() => app.graph.nodes.find(node => node.subgraph).subgraph.nodes[0].widgets[0].value"
ENTER = """() => { const outside = app.graph.nodes.find(node => node.subgraph);
    app.canvas.openSubgraph(outside.subgraph, outside); }"""
LEAVE = "() => app.canvas.setGraph(app.rootGraph ?? app.graph)"
HACKED = "() => { window.bad = 0; window.hacked = () => window.bad++ }"


def saved_rows(workflow: dict[str, Any]) -> tuple[Rows, Rows]:
    """Of a saved workflow with one subgraph: the rows of the subgraph node, and those of the stack inside."""
    outside = next(node for node in workflow["nodes"] if node["id"] == OUTSIDE)
    (inside,) = workflow["definitions"]["subgraphs"][0]["nodes"]
    return json.loads(outside["widgets_values"][0]), json.loads(inside["widgets_values"][0])


def add(frontend: Frontend, editor: Any, words: str) -> None:
    editor.get_by_role("button", name="Add LoRA").click()
    frontend.page.get_by_role("combobox", name="Search LoRA files").fill(words)
    frontend.page.get_by_role("treeitem").first.wait_for()
    frontend.page.keyboard.press("Enter")


def edit(frontend: Frontend, editor: Any) -> Rows:
    """From RED and HTML: one off, a strength typed, one added; and what the rows should be then."""
    editor.get_by_role("switch").first.click()
    editor.get_by_role("spinbutton", name="Model strength").nth(1).click()
    frontend.page.keyboard.type("0.25")
    frontend.page.keyboard.press("Enter")
    add(frontend, editor, "smi ink")
    return [{"lora": RED, "on": False}, {"lora": HTML, "model": 0.25}, {**NEW, "lora": INK}]


def test_a_stack_goes_into_a_subgraph_and_its_rows_out_again(frontend: Frontend) -> None:
    """As a user does it: pack the node, make `rows` an input, edit outside, unpack."""
    opened(frontend, [{"lora": RED}])
    page = frontend.page
    page.evaluate("() => { window.outer = app.graph.convertToSubgraph(new Set([app.graph.nodes[0]])).node }")
    assert rows_of(frontend) == [{"lora": RED}]
    page.evaluate("""() => { const inner = outer.subgraph.nodes[0], input = outer.subgraph.addInput('rows', 'STRING');
        input.connect(inner.inputs.find(slot => slot.name === 'rows'), inner); }""")
    shown(frontend).get_by_role("switch").click()
    assert rows_of(frontend) == [{"lora": RED, "on": False}] and frontend.problems == []
    page.evaluate("() => app.graph.unpackSubgraph(outer)")
    frontend.problems.clear()  # both interfaces report a link to the input that is gone
    editor = shown(frontend)
    assert rows_of(frontend) == [{"lora": RED, "on": False}]
    editor.get_by_role("switch").click()
    assert rows_of(frontend) == [{"lora": RED, "on": True}]


def test_rows_edited_outside_a_subgraph_are_saved_and_shown_inside(frontend: Frontend,
                                                                   request: pytest.FixtureRequest) -> None:
    frontend.open("outside.json", stack_in_subgraph([{"lora": "inside"}], [{"lora": RED}, {"lora": HTML}]))
    editor = shown(frontend)
    assert rows_of(frontend) == [{"lora": RED}, {"lora": HTML}]
    made = edit(frontend, editor)
    assert rows_of(frontend) == made and json.loads(frontend.page.evaluate(INNER)) == made
    assert sticking_out(editor) == []
    saved = frontend.saved()
    assert saved_rows(saved) == (made, made)

    frontend.open("again.json", saved)
    editor = shown(frontend)
    picture(frontend, "outside", request)
    assert rows_of(frontend) == made and editor.get_by_role("listitem").count() == 3
    editor.get_by_role("button", name="Remove red").click()
    assert rows_of(frontend) == made[1:] and frontend.problems == []

    frontend.page.evaluate(ENTER)
    frontend.page.wait_for_timeout(600)
    picture(frontend, "inside", request)
    inside = frontend.page.locator(".fk-loras:visible")  # the newer canvas draws nothing for what is connected
    for at in range(inside.count()):
        fields = inside.nth(at).get_by_role("spinbutton").all()
        assert [field.input_value() for field in fields] == ["0.25", "", "1", "1"]
        with pytest.raises(Exception, match=r"Timeout"):  # and it is not for editing
            inside.nth(at).get_by_text("Add LoRA").click(timeout=1000)
    assert rows_of(frontend) == made[1:]
    frontend.page.evaluate(LEAVE)
    frontend.problems.clear()  # the older interface reports its own listeners when a subgraph is entered


def test_each_outside_of_a_subgraph_has_rows_of_its_own(frontend: Frontend, request: pytest.FixtureRequest) -> None:
    first, second = [{"lora": RED}], [{"lora": HTML, "model": 0.5}]
    frontend.open("two.json", stack_in_subgraph([{"lora": "inside"}], first, second))
    editors = shown(frontend, 2)
    ids = [f"{OUTSIDE + at}:1" for at in range(2)]
    read = {number: json.loads(text) for number, text in texts_of(frontend).items()}
    assert read == dict(zip(ids, (first, second), strict=True))
    editors.filter(has_text="red").get_by_role("switch").click()
    first = [{"lora": RED, "on": False}]
    for _ in range(2):
        read = {number: json.loads(text) for number, text in texts_of(frontend).items()}
        assert read == dict(zip(ids, (first, second), strict=True))
        frontend.open("two.json", frontend.saved())
        shown(frontend, 2)
    picture(frontend, "two", request)
    assert frontend.problems == []


def test_rows_named_as_proxy_widgets_are_kept(frontend: Frontend) -> None:
    """Interfaces between the two wrote so. The newer makes an input of it, the older leaves the rows to the inside."""
    rows = [{"lora": RED}, {"lora": HTML}]
    frontend.open("proxy.json", stack_in_subgraph(rows, rows, proxy=True))
    assert rows_of(frontend) == rows
    if frontend.page.evaluate("() => app.graph.nodes.some(node => node.subgraph && node.inputs.length)"):
        rows = edit(frontend, shown(frontend))
        assert rows_of(frontend) == rows
    frontend.open("again.json", frontend.saved())
    assert rows_of(frontend) == rows and frontend.problems == []


def test_connected_rows_are_not_for_editing(frontend: Frontend) -> None:
    """A text from another node counts, so the editor must not look as if its rows did."""
    frontend.open("linked.json", stack_alone([{"lora": RED}]))
    editor = shown(frontend)
    frontend.page.evaluate("""() => {
        const text = LiteGraph.createNode('PrimitiveString'), stack = app.graph.getNodeById(1);
        text.pos = [100, 600];
        app.graph.add(text);
        text.connect(0, stack, stack.inputs.findIndex(slot => slot.name === 'rows'));
    }""")
    frontend.page.wait_for_timeout(600)
    with pytest.raises(Exception, match=r"Timeout"):
        editor.get_by_role("switch").click(timeout=1000)
    frontend.page.evaluate("""() => { const stack = app.graph.getNodeById(1);
        stack.disconnectInput(stack.inputs.findIndex(slot => slot.name === 'rows')) }""")
    shown(frontend).get_by_role("switch").click()
    assert rows_of(frontend) == [{"lora": RED, "on": False}] and frontend.problems == []


APPS = {"node": (1, "1", lambda rows: stack_alone(rows)),
        "subgraph": (OUTSIDE, f"{OUTSIDE}:1", lambda rows: stack_in_subgraph([{"lora": "inside"}], rows))}


def opened_as_app(frontend: Frontend, kind: str, rows: Rows) -> Any:
    """The editor in the form of App mode, of a workflow whose app asks for the rows."""
    if not frontend.offers_app_mode:
        pytest.skip("this interface has no App mode")
    owner, _, make = APPS[kind]
    chosen = {"linearMode": True, "linearData": {"inputs": [[owner, "rows"]], "outputs": [PREVIEW]}}
    frontend.open("app.json", {**make(rows), "extra": chosen})
    return in_form(frontend)


def in_form(frontend: Frontend) -> Any:
    editor = frontend.page.locator(f"{FORM} .fk-loras:visible")
    editor.wait_for(timeout=30_000)
    return editor


@pytest.mark.parametrize("kind", APPS)
def test_rows_are_edited_in_app_mode(frontend: Frontend, kind: str, request: pytest.FixtureRequest) -> None:
    editor = opened_as_app(frontend, kind, [{"lora": RED}, {"lora": HTML}])
    made = edit(frontend, editor)
    picture(frontend, "app", request)
    assert rows_of(frontend) == made and sticking_out(editor) == []

    frontend.toggle_app_mode()
    assert shown(frontend).get_by_role("listitem").count() == 3 and rows_of(frontend) == made
    shown(frontend).get_by_role("switch").first.click()
    made[0]["on"] = True
    frontend.toggle_app_mode()
    assert in_form(frontend).get_by_role("switch", name="On: red").get_attribute("aria-checked") == "true"
    frontend.open("again.json", frontend.saved())
    frontend.page.wait_for_timeout(600)
    editor = in_form(frontend)
    assert editor.get_by_role("listitem").count() == 3 and rows_of(frontend) == made
    editor.get_by_role("button", name="Remove red").click()  # not in an editor of the workflow from before
    assert rows_of(frontend) == made[1:] and frontend.problems == []
    frontend.toggle_app_mode()


def test_the_wheel_scrolls_the_form_and_not_the_canvas_behind_it(frontend: Frontend,
                                                                 request: pytest.FixtureRequest) -> None:
    editor = opened_as_app(frontend, "node", [{"lora": RED}] * 30)
    scale, box = frontend.page.evaluate("() => app.canvas.ds.scale"), editor.bounding_box()
    frontend.page.mouse.move(box["x"] + 60, box["y"] + 200)
    frontend.page.mouse.wheel(0, 400)
    frontend.page.wait_for_function("() => document.querySelector('.fk-list').scrollTop > 100")
    picture(frontend, "app", request)
    for _ in range(20):
        frontend.page.mouse.wheel(0, 400)
    frontend.page.wait_for_timeout(300)
    add_button, form = editor.get_by_role("button", name="Add LoRA").bounding_box(), frontend.page.locator(FORM)
    assert add_button["y"] + add_button["height"] <= form.bounding_box()["y"] + form.bounding_box()["height"] + 1
    assert frontend.page.evaluate("() => app.canvas.ds.scale") == scale
    frontend.toggle_app_mode()


def test_app_mode_from_within_a_subgraph_loses_nothing(frontend: Frontend) -> None:
    """There the interface looks for the widget in the subgraph and shows none; the rows stay in the prompt."""
    rows = [{"lora": RED}]
    opened_as_app(frontend, "subgraph", rows)
    frontend.toggle_app_mode()
    frontend.page.evaluate(ENTER)
    frontend.page.wait_for_timeout(600)
    frontend.toggle_app_mode()
    frontend.page.locator(FORM).wait_for()
    assert rows_of(frontend) == rows
    frontend.toggle_app_mode()
    frontend.page.evaluate(LEAVE)
    shown(frontend).get_by_role("switch").click()
    assert rows_of(frontend) == [{"lora": RED, "on": False}] and frontend.problems == []


@pytest.mark.parametrize("view", ["outside", *APPS])
def test_text_from_files_is_never_html_elsewhere(frontend: Frontend, view: str, request: pytest.FixtureRequest) -> None:
    page = frontend.page
    page.evaluate(HACKED)
    rows = [{"lora": HTML, "blocks": "<b>x</b>"}]
    if view == "outside":
        frontend.open("outside.json", stack_in_subgraph([], rows))
        editor = shown(frontend)
    else:
        editor = opened_as_app(frontend, view, rows)
    editor.get_by_role("button", name="More of").click()
    editor.get_by_text("<b onclick=hacked()>bold</b>").wait_for()
    editor.get_by_role("group", name="Trigger words").get_by_text(HTML).wait_for()
    picture(frontend, "html", request)
    assert sticking_out(editor) == []
    editor.get_by_role("button", name="File:").click()
    page.get_by_role("combobox", name="Search LoRA files").fill("onerror")
    page.get_by_role("tree").get_by_text("<img src=x onerror=hacked()>").wait_for()
    page.locator(".fk-picker").get_by_text("<b onclick=hacked()>bold</b>").wait_for()
    page.keyboard.press("Escape")
    found = page.locator(".fk-loras b, .fk-loras img[src=x], .fk-picker b, .fk-picker img[src=x]").count()
    assert (found, page.evaluate("() => window.bad")) == (0, 0)
    if view != "outside":
        frontend.toggle_app_mode()
    assert rows_of(frontend) == rows
