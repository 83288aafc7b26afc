"""Workflow files to prompts: official templates, every feature of the saved format, hostile text."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from flux_kit import hosts
from flux_kit.engine.errors import BadWorkflow, FluxKitError, MissingFile
from flux_kit.hosts.standalone import convert, io
from flux_kit.hosts.standalone.graph import read_document
from flux_kit.hosts.standalone.widgets import dynamic_prompt, widget_values
from flux_kit.hosts.standalone.workflow import from_json, load_workflow, nodes_called, parse_json
from hypothesis import given
from hypothesis import strategies as st

OFFICIAL = ("flux_dev_full_text_to_image", "flux_dev_checkpoint_example", "flux1_krea_dev",
            "flux_schnell_full_text_to_image", "flux_schnell")


def node_class(name: str, inputs: list[io.Input], *, output: bool = False) -> type[io.ComfyNode]:
    def define_schema(cls: Any) -> io.Schema:
        return io.Schema(node_id=name, display_name=f"The {name}", inputs=list(inputs), is_output_node=output,
                         outputs=[io.Image.Output(), io.Int.Output()])

    return type(name, (io.ComfyNode,), {"define_schema": classmethod(define_schema)})


NODES = {kind.GET_SCHEMA().node_id: kind for kind in [
    node_class("Make", [io.Int.Input("width", default=64), io.Int.Input("seed"), io.Float.Input("scale", default=1.5),
                        io.Combo.Input("mode", options=["a", "b"])]),
    node_class("Blend", [io.Image.Input("one"), io.Image.Input("two", optional=True), io.Float.Input("amount")]),
    node_class("Order", [io.Int.Input("late", optional=True, default=9), io.String.Input("text", force_input=True),
                         io.Combo.Input("picture", options=[], upload=io.UploadType.image), io.Int.Input("early"),
                         io.Combo.Input("pick", options=["x", "y"], control_after_generate=True, optional=True)]),
    node_class("Prompt", [io.String.Input("text", multiline=True, dynamic_prompts=True)]),
    node_class("SaveImage", [io.Image.Input("images"), io.String.Input("filename_prefix")], output=True),
]}


class Sketch:
    """Builds a saved workflow (or the inside of a subgraph) the way frontends write it."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def node(self, id_: Any, kind: str, inputs: dict[str, Any] | None = None, values: Any = None,
             **more: Any) -> Sketch:
        """`inputs`: name -> (type, source id, source slot), a type alone for an empty socket; "*name" is a widget's."""
        sockets = []
        for slot, (name, given_) in enumerate((inputs or {}).items()):
            kind_, *source = (given_,) if isinstance(given_, str) else given_
            socket: dict[str, Any] = {"name": name.lstrip("*"), "type": kind_, "link": None}
            if name.startswith("*"):
                socket["widget"] = {"name": name[1:]}
            if source:
                self.links.append([len(self.links) + 1, *source, id_, slot, kind_])
                socket["link"] = len(self.links)
            sockets.append(socket)
        outputs = [{"name": "IMAGE", "type": "IMAGE"}, {"name": "INT", "type": "INT"}]
        self.nodes.append({"id": id_, "type": kind, "mode": 0, "inputs": sockets, "outputs": outputs,
                           "widgets_values": values or []} | more)
        return self

    def save(self, **more: Any) -> dict[str, Any]:
        return {"nodes": self.nodes, "links": self.links, "version": 0.4} | more

    def subgraph(self, id_: str, inputs: list[str], outputs: dict[str, tuple[Any, int]], **more: Any) -> dict[str, Any]:
        """Definition; inside, node id -10 stands for `inputs`. `outputs`: name -> (inner node, slot)."""
        for slot, source in enumerate(outputs.values()):
            self.links.append([len(self.links) + 1, *source, -20, slot, "IMAGE"])
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        fed = {slot: [link[0] for link in self.links if link[1:3] == [-10, slot]] for slot in range(len(inputs))}
        return {"id": id_, "name": f"Sub {id_}", "nodes": self.nodes,
                "links": [dict(zip(names, link, strict=True)) for link in self.links],
                "inputs": [{"name": name, "type": "*", "linkIds": fed[slot]} for slot, name in enumerate(inputs)],
                "outputs": [{"name": name, "type": "IMAGE", "linkIds": []} for name in outputs]} | more


def convert_(sketch: Sketch | dict[str, Any], *subgraphs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Inputs by node id."""
    data = sketch.save() if isinstance(sketch, Sketch) else sketch
    if subgraphs:
        data["definitions"] = {"subgraphs": list(subgraphs)}
    data = json.loads(json.dumps(data))
    return {id_: node["inputs"] for id_, node in from_json(data, NODES, random.Random(0)).prompt.items()}


MAKE = {"width": 64, "seed": 0, "scale": 1.5, "mode": "a"}


# -- widgets

@pytest.mark.parametrize(("saved", "expected"), [
    ([512, 42, "randomize", 2.5, "b"], {"width": 512, "seed": 42, "scale": 2.5, "mode": "b"}),
    ([512, 42, 2.5, "b"], {"width": 512, "seed": 42, "scale": 2.5, "mode": "b"}),
    ([512, 42, "fixed"], {"width": 512, "seed": 42, "scale": 1.5, "mode": "a"}),
    ([None, None, "fixed", None, None], MAKE),
    ([], MAKE),
    ({"seed": 5, "other": 1}, MAKE | {"seed": 5}),
    ([1, 2, "increment", 3, "b", "more", "than", "needed"], {"width": 1, "seed": 2, "scale": 3, "mode": "b"}),
])
def test_widget_values_by_position_and_name(saved, expected):
    assert widget_values(NODES["Make"].GET_SCHEMA(), saved) == expected


@pytest.mark.parametrize("saved", [
    ["cat.png", 3, "image", 8, "y", "fixed", ""],  # all places: upload button, control and filter of the dropdown
    ["cat.png", 3, 8, "y", "fixed"],
    ["cat.png", 3, 8, "y"],
])
def test_required_widgets_come_first_and_extras_are_passed_over(saved):
    got = widget_values(NODES["Order"].GET_SCHEMA(), saved)
    assert got == {"picture": "cat.png", "early": 3, "late": 8, "pick": "y"}


def test_converted_widgets_keep_their_place_and_links_win():
    work = Sketch().node(1, "Make", values=[1, 2, "fixed", 3, "b"])
    work.node(2, "Make", {"*scale": ("FLOAT", 1, 1)}, values=[10, 20, "fixed", 30, "b"])
    assert convert_(work)["2"] == {"width": 10, "seed": 20, "scale": ["1", 1], "mode": "b"}


def test_dynamic_prompts():
    assert dynamic_prompt("a {red} b // gone\nnext /* gone */ end", random.Random(0)) == "a red b \nnext  end"
    assert dynamic_prompt(r"a \{b\|c\} (word:1.2) \(x\)", random.Random(0)) == r"a {b|c} (word:1.2) \(x\)"
    seen = {dynamic_prompt("{a|{b|c}d|}", random.Random(seed)) for seed in range(50)}
    assert seen == {"a", "bd", "cd", ""}
    assert dynamic_prompt("} | {open", random.Random(0)) == "} | open"
    assert convert_(Sketch().node(1, "Prompt", values=["x {y}"]))["1"]["text"] == "x y"


@given(st.text(alphabet="/*a\n{", max_size=40))
def test_comments_go_as_the_frontend_takes_them_out(text):
    stripped = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text).replace("{", "")
    assert dynamic_prompt(text, random.Random(0)) == stripped


@pytest.mark.parametrize(("text", "becomes"), [
    ("/* " * 100_000, "/* " * 100_000), ("{" * 50_000, ""), ("//" * 100_000, ""),
    ("{" * 50_000 + "a" + "}" * 50_000, "a"), ("/* */" * 50_000 + "/*", "/*"), ("\\" * 100_000, "\\" * 100_000)])
def test_deep_and_long_prompts_need_no_recursion_and_no_search_to_the_end_again_and_again(text, becomes):
    assert dynamic_prompt(text, random.Random(0)) == becomes


# -- links

def test_plain_workflow_with_titles():
    work = Sketch().node(1, "Make", values=[1, 2, "fixed", 3, "b"])
    work.node(2, "SaveImage", {"images": ("IMAGE", 1, 0)}, ["out"], title="Keep it")
    work.node(3, "Note", values=["text"]).node(4, "MarkdownNote", values=["# text"])
    prompt = from_json(work.save(), NODES).prompt
    assert prompt == {
        "1": {"class_type": "Make", "inputs": {"width": 1, "seed": 2, "scale": 3, "mode": "b"},
              "_meta": {"title": "The Make"}},
        "2": {"class_type": "SaveImage", "inputs": {"filename_prefix": "out", "images": ["1", 0]},
              "_meta": {"title": "Keep it"}}}
    assert nodes_called(prompt, "Keep it") == ["2"]
    assert (nodes_called(prompt, "1"), nodes_called(prompt, "none")) == (["1"], [])


def test_links_as_objects_and_ids_as_text():
    work = Sketch().node("a", "Make").node("b", "SaveImage", {"images": ("IMAGE", "a", 0)}, ["out"])
    data = work.save(version=1)
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    data["links"] = [dict(zip(names, link, strict=True)) for link in data["links"]]
    assert convert_(data)["b"]["images"] == ["a", 0]


def test_reroutes_primitives_muted_and_bypassed():
    work = Sketch().node(1, "Make").node(2, "Reroute", {"": ("*", 1, 0)}).node(3, "Reroute", {"": ("*", 2, 0)})
    work.node(4, "Blend", {"one": ("IMAGE", 3, 0), "two": ("IMAGE", 5, 0), "*amount": ("FLOAT", 6, 0)}, [0.5])
    work.node(5, "Make", mode=2).node(6, "PrimitiveNode", values=[0.25, "fixed"])
    work.node(7, "Blend", {"one": ("IMAGE", 3, 0), "two": ("IMAGE", 4, 0)}, mode=4)
    work.node(8, "SaveImage", {"images": ("IMAGE", 7, 0)}, ["x"])
    work.node(9, "Blend", {"one": ("INT", 7, 1), "*amount": ("FLOAT", 5, 0)}, [0.75])
    got = convert_(work)
    assert got["4"] == {"one": ["1", 0], "amount": 0.25}, "muted: no input; primitive: its value"
    assert got["8"]["images"] == ["1", 0], "bypassed: the input of the same slot and type"
    assert got["9"] == {"amount": 0.75}, "INT has no input to pass through; the widget's own value counts"
    assert set(got) == {"1", "4", "8", "9"}


def test_bypass_takes_the_first_input_of_the_type_and_unknown_types_may_be_bypassed():
    work = Sketch().node(1, "Make").node(2, "Make")
    work.node(3, "Foreign", {"model": ("MODEL", 1, 0), "pixels": ("IMAGE", 2, 0)}, mode=4)
    work.node(4, "SaveImage", {"images": ("IMAGE", 3, 0)}, ["x"])
    assert convert_(work)["4"]["images"] == ["2", 0]


def test_a_list_as_widget_value_is_wrapped_as_the_frontend_does():
    assert convert_(Sketch().node(1, "Prompt", values=[["a", 0]]))["1"]["text"] == {"__value__": ["a", 0]}


def test_primitive_core_nodes_are_nodes():
    with pytest.raises(BadWorkflow, match=r"PrimitiveInt \(node 1\)"):
        convert_(Sketch().node(1, "PrimitiveInt", values=[1]))


def test_widget_names_in_file_prefixes():
    work = Sketch().node(1, "Make", values=[1, 7, "fixed", 3, "b"], properties={"Node name for S&R": "Maker"})
    work.node(2, "Prompt", values=["a/b:c"], title="Words").node(3, "SaveImage", values=["%Maker.seed%_%Words.text%"])
    work.node(4, "SaveImage", values=["%date:yyyy%-%width%-%No.such%-%Maker.no%"])
    got = convert_(work)
    assert got["3"]["filename_prefix"] == "7_a_b_c"
    assert got["4"]["filename_prefix"] == "%date:yyyy%-%width%-%No.such%-%Maker.no%"


# -- subgraphs

def inner(**more: Any) -> dict[str, Any]:
    """picture in, width and amount promoted; Make -> Blend -> out."""
    work = Sketch().node(1, "Make", {"*width": ("INT", -10, 1)}, [1, 2, "fixed", 3, "b"])
    work.node(2, "Blend", {"one": ("IMAGE", 1, 0), "two": ("IMAGE", -10, 0), "*amount": ("FLOAT", -10, 2)}, [0.5])
    return work.subgraph("S", ["picture", "width", "amount"], {"out": (2, 0)}, **more)


def test_subgraph_is_unfolded_with_values_from_inside():
    work = Sketch().node(5, "Make").node(7, "S", {"picture": ("IMAGE", 5, 0)})
    work.node(9, "SaveImage", {"images": ("IMAGE", 7, 0)}, ["x"])
    assert convert_(work, inner()) == {
        "5": MAKE, "9": {"filename_prefix": "x", "images": ["7:2", 0]},
        "7:1": {"width": 1, "seed": 2, "scale": 3, "mode": "b"},
        "7:2": {"one": ["7:1", 0], "two": ["5", 0], "amount": 0.5}}


def test_values_on_the_subgraph_node_by_position_by_proxy_and_by_link():
    work = Sketch().node(1, "Make")
    work.node(7, "S", values=[111, 0.125])
    work.node(8, "S", values=[0.875, 222, 99, "fixed"], properties={
        "proxyWidgets": [["2", "amount"], ["1", "width"], ["1", "seed"], ["1", "control_after_generate"]]})
    work.node(9, "S", {"*width": ("INT", 1, 1), "*amount": "FLOAT"}, [111, 0.125])
    work.node(10, "S", {"*amount": ("FLOAT", 11, 0)}).node(11, "PrimitiveNode", values=[0.0625])
    got = convert_(work, inner())
    assert (got["7:1"]["width"], got["7:2"]["amount"]) == (111, 0.125)
    assert (got["8:1"]["width"], got["8:2"]["amount"], got["8:1"]["seed"]) == (222, 0.875, 99)
    assert (got["9:1"]["width"], got["9:2"]["amount"]) == (["1", 1], 0.125)
    assert got["10:2"]["amount"] == 0.0625


def test_one_promoted_value_feeds_all_widgets_it_is_linked_to():
    work = Sketch()
    for number in (1, 2):
        work.node(number, "Make", {"*width": ("INT", -10, 0)}, [number * 10])
    got = convert_(Sketch().node(7, "S"), work.subgraph("S", ["width"], {}))
    assert (got["7:1"]["width"], got["7:2"]["width"]) == (10, 10)


def test_subgraphs_within_subgraphs():
    outer = Sketch().node(3, "S", {"picture": ("IMAGE", -10, 0), "*width": ("INT", -10, 1)}, [33, 0.5])
    definition = outer.subgraph("T", ["image", "size"], {"result": (3, 0)})
    work = Sketch().node(1, "Make").node(57, "T", {"image": ("IMAGE", 1, 0)}, [44])
    work.node(58, "T", {"image": ("IMAGE", 57, 0)}).node(59, "SaveImage", {"images": ("IMAGE", 58, 0)}, ["x"])
    for definitions in ([inner(), definition], [definition | {"definitions": {"subgraphs": [inner()]}}]):
        got = convert_(Sketch.save(work), *definitions)
        assert set(got) == {"1", "59", "57:3:1", "57:3:2", "58:3:1", "58:3:2"}
        assert got["57:3:1"]["width"] == 44
        assert got["58:3:1"]["width"] == 33
        assert got["58:3:2"]["two"] == ["57:3:2", 0]
        assert got["57:3:2"]["two"] == ["1", 0]


def test_muted_and_bypassed_subgraphs_and_straight_through():
    through = Sketch().subgraph("P", ["image"], {"same": (-10, 0)})
    work = Sketch().node(1, "Make").node(2, "P", {"image": ("IMAGE", 1, 0)})
    work.node(3, "S", {"picture": ("IMAGE", 2, 0)}, mode=4).node(4, "S", mode=2)
    work.node(5, "Blend", {"one": ("IMAGE", 3, 0), "two": ("IMAGE", 4, 0)})
    assert convert_(work, inner(), through)["5"] == {"one": ["1", 0], "amount": 0.0}


# -- what is wrong

def loop() -> Sketch:
    return Sketch().node(1, "Reroute", {"": ("*", 2, 0)}).node(2, "Reroute", {"": ("*", 1, 0)}).node(
        3, "SaveImage", {"images": ("IMAGE", 1, 0)}, ["x"])


def recursive() -> dict[str, Any]:
    definition = Sketch().node(1, "R").subgraph("R", [], {})
    return Sketch().node(1, "R").save(definitions={"subgraphs": [definition]})


def doubling() -> dict[str, Any]:
    levels = [Sketch().node(1, f"L{n + 1}").node(2, f"L{n + 1}").subgraph(f"L{n}", [], {}) for n in range(40)]
    return Sketch().node(1, "L0").save(definitions={"subgraphs": [*levels, Sketch().subgraph("L40", [], {})]})


def with_(**change: Any) -> dict[str, Any]:
    work = Sketch().node(1, "Make").node(2, "SaveImage", {"images": ("IMAGE", 1, 0)}, ["x"]).save()
    return work | change


@pytest.mark.parametrize(("data", "said"), [
    (loop().save(), "node 3, input images: the links form a cycle"),
    (recursive(), 'subgraph "Sub R" contains itself'),
    (doubling(), "more than 20000 nodes"),
    (with_(links=[]), "node 2, input images: link 1 is missing"),
    (with_(links=[[1, 77, 0, 2, 0, "IMAGE"]]), "linked to node 77, which is not there"),
    (with_(links=[[1, 1, 0]]), r"a link of the workflow is \[1, 1, 0\]"),
    (with_(links=[[1, 1, "0", 2, 0, "IMAGE"]]), "output and input are"),
    (with_(links=[[1, 1, -5, 2, 0, "IMAGE"]]), "output and input are"),
    (with_(links={"1": 2}), "links of the workflow: expected a list"),
    (with_(nodes=[1]), "a node of the workflow: expected an object, found 1"),
    (with_(nodes=[{"id": 1}]), "type of node 1 .*expected text, found None"),
    (with_(nodes=[{"type": "Make"}]), "a node's id .*expected a number or text"),
    (with_(nodes=[{"id": True, "type": "Make"}]), "expected a number or text, found True"),
    (with_(nodes=[{"id": 1, "type": "Make"}] * 2), "two nodes with the id 1"),
    (with_(nodes=[{"id": 1, "type": "Make", "widgets_values": "x"}]), "neither list nor object"),
    (with_(nodes=[{"id": 1, "type": "Make", "inputs": [{}]}]), "a socket's name of node 1"),
    (with_(nodes=[{"id": 1, "type": "Make", "inputs": [{"name": "x"}] * 1001}]), "1001, more than any node has"),
    (with_(definitions=3), "definitions: expected an object"),
    (with_(definitions={"subgraphs": [{"id": "x"}]}), "nodes of subgraph .*expected a list"),
    (with_(nodes=[{"id": 1, "type": "Zeta"}, {"id": 2, "type": "Alpha"}]), r"Alpha \(node 2\); Zeta \(node 1\)"),
    ([], r"expected an object with nodes, found \[\]"),
    ({}, "expected an object with nodes"),
    ({"a": 1}, "a is no node with a class_type"),
    ({"1": {"class_type": "Make", "inputs": []}}, r"node 1: inputs is \[\]"),
    ({"1": {"class_type": "Nope"}, "2": {"class_type": "Naught"}}, r"Naught \(node 2\); Nope \(node 1\)"),
])
def test_broken_workflows_are_told_in_one_line(data, said):
    with pytest.raises(BadWorkflow, match=said) as caught:
        from_json(data, NODES)
    assert "\n" not in str(caught.value)


def test_api_format():
    data = {"57:3": {"class_type": "Make", "inputs": {"width": 1}, "_meta": {"title": "M"}, "is_changed": [None]},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["57:3", 0], "list": {"__value__": [1, 2]}}}}
    workflow = from_json(data, NODES)
    assert workflow.prompt == {
        "57:3": {"class_type": "Make", "inputs": {"width": 1}, "_meta": {"title": "M"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["57:3", 0], "list": {"__value__": [1, 2]}},
              "_meta": {"title": "SaveImage"}}}
    assert workflow.extra_pnginfo == {}
    assert from_json({"prompt": data, "client_id": "x"}, NODES) == workflow
    by_number = {"5": {"class_type": "Make"}, "6": {"class_type": "SaveImage", "inputs": {"images": [5, 0]}}}
    assert from_json(by_number, NODES).prompt["6"]["inputs"]["images"] == ["5", 0]


@pytest.mark.parametrize(("text", "said"), [
    (b"", "not JSON: there is nothing"),
    (b"{", "not JSON: .*line 1, column 2"),
    (b'{"nodes": [}', "not JSON: .*column 12"),
    (b"\xff\xfe{\x00", "not UTF-8"),
    (b"[" * 200, "nested more than 100 deep"),
    (b"[" * 100_000 + b"]" * 100_000, "nested more than 100 deep"),
    (b'{"a":' * 200 + b"1" + b"}" * 200, "nested more than 100 deep"),
    (b"[" + b"9" * 5000 + b"]", "not usable JSON"),
    (b"[" + b"[]," * 500_001 + b"1]", "more than 500000 lists"),
    (b" " * (16 * 2**20 + 1), "larger than 16 MB"),
    (b'"' + b"\\" * 100_001, "not JSON"),
])
def test_hostile_json(text, said, tmp_path):
    with pytest.raises(BadWorkflow, match=said):
        parse_json(text)
    path = tmp_path / "wörk.json"
    path.write_bytes(text)
    with pytest.raises(BadWorkflow, match=rf"^wörk\.json: {said}") as caught:
        load_workflow(path, NODES)
    assert caught.value.file == str(path)


def test_brackets_in_text_do_not_count_and_nan_becomes_none():
    assert parse_json('{"a": "[[[[\\"[[" , "b": [NaN, -Infinity]}' ) == {"a": '[[[["[[', "b": [None, None]}
    assert parse_json(json.dumps({"a": "[" * 1000})) == {"a": "[" * 1000}
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]


def test_missing_file(tmp_path):
    with pytest.raises(MissingFile, match="no such workflow file"):
        load_workflow(tmp_path / "none.json", NODES)


def test_long_chains_cost_no_recursion_and_no_square(monkeypatch):
    steps = 0
    origin = convert._origin

    def counted(*args):
        nonlocal steps
        steps += 1
        return origin(*args)

    monkeypatch.setattr(convert, "_origin", counted)
    work = Sketch().node(0, "Make")
    for number in range(1, 4_000):
        work.node(number, "Reroute", {"": ("*", number - 1, 0)})
    for number in range(4_000, 8_000):
        work.node(number, "SaveImage", {"images": ("IMAGE", 3_999, 0)}, ["x"])
    assert convert_(work)["7999"]["images"] == ["0", 0]
    assert steps < 2 * 8_000


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inside in items for found in _paths(inside, (*path, key)))]


_WORK = Sketch().node(5, "Make").node(7, "S", {"picture": ("IMAGE", 5, 0)}, [3]).node(
    9, "SaveImage", {"images": ("IMAGE", 7, 0)}, ["x"]).save(definitions={"subgraphs": [inner()]})


@given(st.sampled_from(_paths(_WORK)[1:]), st.sampled_from(
    [None, True, -1, 10**30, 1.5, "", "x", [], {}, [[]], [1, 2], {"a": 1}, [None] * 3, "-10", 7]))
def test_any_place_holding_anything_else_is_read_or_refused_cleanly(path, value):
    work = json.loads(json.dumps(_WORK))
    at = work
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    try:
        from_json(work, NODES)
    except FluxKitError as error:
        assert "\n" not in str(error)


# -- official templates

@pytest.fixture(scope="module")
def templates() -> Path:
    spec = importlib.util.find_spec("comfyui_workflow_templates_json")
    if spec is None or spec.origin is None:
        pytest.skip("comfyui-workflow-templates-json is not installed")
    return Path(spec.origin).parent / "templates"


@pytest.fixture
def core(monkeypatch, tmp_path):
    """Schemas of the core nodes."""
    from flux_kit.hosts.standalone.folders import Folders
    from flux_kit.hosts.standalone.host import StandaloneHost

    monkeypatch.setattr(hosts, "_current", None)
    hosts.use(StandaloneHost(Folders(models=[tmp_path]), device="cpu"))
    from flux_kit.hosts.standalone.core_nodes import CORE_NODES

    return {node.GET_SCHEMA().node_id: node for node in CORE_NODES}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_templates_become_prompts(name, templates, core):
    workflow = load_workflow(templates / f"{name}.json", core)
    prompt = workflow.prompt
    kinds = Counter(node["class_type"] for node in prompt.values())
    by_kind = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert workflow.ui == json.loads((templates / f"{name}.json").read_bytes())
    assert kinds["KSampler"] == kinds["VAEDecode"] == kinds["SaveImage"] == 1
    sampler = by_kind["KSampler"]
    steps = 4 if "schnell" in name else 20
    assert {key: sampler[key] for key in ("steps", "cfg", "sampler_name", "scheduler", "denoise")} == {
        "steps": steps, "cfg": 1, "sampler_name": "euler", "scheduler": "simple", "denoise": 1}
    seeds = {"flux_schnell": 173805153958730, "flux_dev_checkpoint_example": 53943644181156}
    assert sampler["seed"] == seeds.get(name, sampler["seed"])
    assert by_kind["EmptySD3LatentImage"] == {"width": 1024, "height": 1024, "batch_size": 1}
    if name == "flux_schnell":
        assert by_kind["CheckpointLoaderSimple"] == {"ckpt_name": "flux1-schnell-fp8.safetensors"}
    else:
        assert by_kind["DualCLIPLoader"] == {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors",
                                             "type": "flux", "device": "default"}
    for node in prompt.values():  # complete: every required input is there, every link leads somewhere
        for spec in core[node["class_type"]].GET_SCHEMA().inputs:
            assert spec.optional or spec.id in node["inputs"]
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in prompt


def test_positions_agree_with_the_names_the_frontend_saves_beside_them(templates, core):
    """Oracle: newer templates hold `widgets_values_named` next to the positional list."""
    schemas = {name: node.GET_SCHEMA() for name, node in core.items()}
    counted: Counter[str] = Counter()
    for path in sorted(templates.glob("*.json"))[::2]:
        text = path.read_bytes()
        if b"widgets_values_named" not in text:
            continue
        data = json.loads(text)
        document = read_document(data)
        for graph in [data, *data.get("definitions", {}).get("subgraphs", [])]:
            for node in graph["nodes"]:
                named, values = node.get("widgets_values_named"), node.get("widgets_values")
                if not named or not values or list(named.values()) != values:  # some files hold stale names
                    continue
                if node["type"] in schemas:
                    got = widget_values(schemas[node["type"]], values)
                    counted["nodes"] += 1
                    wrong = {key: value for key, value in got.items() if key in named and named[key] != value}
                    assert not wrong, (path.name, node["id"])
                elif node["type"] in document.subgraphs:
                    read = read_document({"nodes": [node]}).root.nodes[str(node["id"])]
                    scope = convert._Scope(document.subgraphs[node["type"]])
                    convert._promote(scope, read)
                    counted["subgraphs"] += 1
                    assert scope.promoted == {key: value for key, value in named.items() if value is not None}
    assert counted["nodes"] > 200, counted
    assert counted["subgraphs"] > 20, counted
