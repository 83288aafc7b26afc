"""Validation and execution by core's rules for V3 nodes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flux_kit.engine.errors import BadInput, BadWorkflow, FluxKitError, Interrupted, NotFinite
from flux_kit.hosts.standalone import io
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.validation import check, types_match
from hypothesis import given
from hypothesis import strategies as st

CALLS: list[tuple[str, dict[str, Any]]] = []


def make(name: str, inputs: list[io.Input], outputs: list[io.Output], run: Any, **more: Any) -> type[io.ComfyNode]:
    """A node class; `run(**inputs)` is its execute and is recorded. Functions in `more` become classmethods."""
    flags = {key: value for key, value in more.items() if not callable(value)}

    def define_schema(cls: Any) -> io.Schema:
        return io.Schema(node_id=name, inputs=list(inputs), outputs=list(outputs), **flags)

    def execute(cls: Any, **given_: Any) -> Any:
        CALLS.append((name, given_))
        return run(**given_)

    methods = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    methods |= {key: classmethod(value) for key, value in more.items() if callable(value)}
    return type(name, (io.ComfyNode,), methods)


INT, STR = io.Int.Output, io.String.Output
SEEN: list[dict[str, Any]] = []


def _remember(cls: Any, **given_: Any) -> bool:
    SEEN.append(given_)
    return True


def _fail(x: int = 0) -> Any:
    raise {0: ValueError("bad\nthing"), 1: NotFinite("NaN in step 3"), 2: Interrupted("stopped"),
           3: torch.OutOfMemoryError("no room"), 4: KeyError("k"),
           5: RuntimeError("alloc_cpu.cpp:1: can't allocate memory")}[x]


NODES = {node.GET_SCHEMA().node_id: node for node in [
    make("Number", [io.Int.Input("value", default=7, min=0, max=100)], [INT()], lambda value: io.NodeOutput(value)),
    make("Add", [io.Int.Input("a"), io.Int.Input("b", optional=True, default=5)], [INT()],
         lambda a, b=1000: io.NodeOutput(a + b)),
    make("Types", [io.Int.Input("i"), io.Float.Input("f", min=-1.5, max=1e3), io.String.Input("s"),
                   io.Boolean.Input("b"), io.Combo.Input("c", options=["x", "y"])], [STR()],
         lambda **given_: io.NodeOutput(repr(given_)), is_output_node=True),
    make("Split", [io.Int.Input("n")], [io.Int.Output(is_output_list=True)], lambda n: io.NodeOutput(list(range(n)))),
    make("Collect", [io.Int.Input("items"), io.Int.Input("k", optional=True)], [STR()],
         lambda **given_: io.NodeOutput(repr(given_)), is_input_list=True),
    make("Show", [io.AnyType.Input("value")], [], lambda value: io.NodeOutput(ui={"shown": [value]}),
         is_output_node=True),
    make("Picture", [], [io.Image.Output(), io.Mask.Output()], lambda: io.NodeOutput("image", "mask")),
    make("NeedsMask", [io.Mask.Input("mask")], [], lambda mask: None, is_output_node=True),
    make("Validates", [io.Int.Input("value", max=3), io.Combo.Input("file", options=["a"])], [],
         lambda value, file: None, is_output_node=True,
         validate_inputs=lambda cls, file=None: SEEN.append({"file": file}) or (file != "no" or "no such thing")),
    make("ValidatesAll", [io.Int.Input("value", max=3), io.Int.Input("other", optional=True)], [], lambda **_: None,
         is_output_node=True, validate_inputs=_remember),
    make("Touched", [io.Int.Input("value"), io.Int.Input("unused", optional=True)], [INT()],
         lambda value: io.NodeOutput(value), fingerprint_inputs=_remember),
    make("Always", [], [INT()], lambda: io.NodeOutput(1), fingerprint_inputs=lambda cls: math.nan),
    make("Broken", [], [INT()], lambda: io.NodeOutput(1), fingerprint_inputs=lambda cls, missing: 0),
    make("Fails", [io.Int.Input("x", optional=True)], [INT()], _fail),
    make("TooFew", [], [INT(), INT()], lambda: io.NodeOutput(1)),
    make("Old", [], [INT(), STR()], lambda: {"result": (4, "four"), "ui": {"note": ["hi"]}}, is_output_node=True),
    make("Random", [], [io.Custom("THING").Output()], lambda: io.NodeOutput(object()), not_idempotent=True),
]}


def prompt(**nodes: tuple[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """n1=("Type", inputs) ... -> a prompt with ids 1 ...; a node may carry a title as third item."""
    return {name.lstrip("n"): {"class_type": rest[0], "inputs": rest[1],
                               "_meta": {"title": rest[2] if len(rest) > 2 else rest[0]}}
            for name, rest in nodes.items()}


def shown(result: Any, node: str = "9") -> Any:
    return result.ui[node]["shown"]


@pytest.fixture(autouse=True)
def _fresh():
    CALLS.clear()
    SEEN.clear()


def calls() -> list[str]:
    return [name for name, _ in CALLS]


def test_values_are_coerced_as_core_does():
    values = {"i": 4.7, "f": "2.5", "s": 12, "b": "false", "c": "y"}
    Executor(NODES).run(prompt(n1=("Types", values)))
    # bool("false") is True in core, so it is here.
    assert CALLS == [("Types", {"i": 4, "f": 2.5, "s": "12", "b": True, "c": "y"})]
    values = {"i": "4", "f": 1, "s": "", "b": 0, "c": "x"}
    Executor(NODES).run(prompt(n1=("Types", values)))
    assert CALLS[1][1] == {"i": 4, "f": 1.0, "s": "", "b": False, "c": "x"}
    assert isinstance(CALLS[1][1]["f"], float)


@pytest.mark.parametrize(("change", "said"), [
    ({"i": "4.7"}, r"input i: 4\.7 is no INT"),
    ({"i": None}, "input i: None is no INT"),
    ({"f": "nan"}, "input f: nan is not finite"),
    ({"f": 1001}, r"input f is 1001\.0, allowed is -1\.5 to 1000\.0"),
    ({"f": -2}, r"input f is -2\.0, allowed is -1\.5 to 1000\.0"),
    ({"c": "zz"}, "input c is zz, allowed is x, y"),
    ({"c": {"__value__": ["x", "y"]}}, r"input c is \['x', 'y'\], allowed is x, y"),
])
def test_bad_values_name_node_input_value_and_what_is_allowed(change, said):
    good = {"i": 1, "f": 1, "s": "", "b": True, "c": "x"}
    with pytest.raises(BadInput, match=rf'node 57:3 "My types" \(Types\): {said}') as caught:
        Executor(NODES).run({"57:3": {"class_type": "Types", "inputs": good | change, "_meta": {"title": "My types"}}})
    assert caught.value.node == "57:3"
    assert "\n" not in str(caught.value)
    assert not CALLS


def test_missing_input_and_several_problems_at_once_and_nothing_runs():
    bad = prompt(n1=("Number", {"value": 101}), n2=("Add", {"b": ["1", 0]}), n9=("Show", {"value": ["2", 0]}))
    with pytest.raises(BadInput) as caught:
        Executor(NODES).run(bad)
    assert "node 1 (Number): input value is 101, allowed is 0 to 100" in str(caught.value)
    assert "node 2 (Add): input a (INT) is missing" in str(caught.value)
    assert not CALLS


def test_absent_optionals_are_not_filled_and_unknown_inputs_are_dropped():
    work = prompt(n1=("Number", {"value": 3}), n2=("Add", {"a": ["1", 0], "zz": 1}), n9=("Show", {"value": ["2", 0]}))
    assert shown(Executor(NODES).run(work)) == [1003], "Python's default counts, not the schema's"
    assert ("Add", {"a": 3}) in CALLS


@pytest.mark.parametrize(("inputs", "said"), [
    ({"value": ["8", 0]}, "node 8, which is not in the workflow"),
    ({"value": ["1", 1]}, r"output 1 of node 1 \(Number\), which has 1"),
    ({"value": ["1", -1]}, "output -1"),
    ({"value": ["1"]}, r"\['1'\] is no link"),
    ({"value": ["1", True]}, "is no link"),
    ({"value": []}, "is no link"),
])
def test_broken_links(inputs, said):
    with pytest.raises(BadWorkflow, match=said):
        Executor(NODES).run(prompt(n1=("Number", {"value": 1}), n9=("Show", inputs)))


def test_types_must_match():
    assert types_match("IMAGE", "*")
    assert types_match("*", "MODEL")
    assert types_match("INT,FLOAT", "FLOAT, STRING")
    assert not types_match("IMAGE", "MASK")
    good = prompt(n1=("Picture", {}), n2=("NeedsMask", {"mask": ["1", 1]}))
    Executor(NODES).run(good)
    good["2"]["inputs"]["mask"][1] = 0
    with pytest.raises(BadWorkflow, match=r"input mask needs MASK, but node 1 \(Picture\) gives IMAGE"):
        Executor(NODES).run(good)
    good["2"]["inputs"]["mask"] = "a mask"
    with pytest.raises(BadInput, match=r"input mask takes a link \(MASK\), not the value a mask"):
        Executor(NODES).run(good)


def test_unknown_types_are_listed_all_at_once():
    work = prompt(n1=("Zeta", {}), n2=("Alpha", {}), n3=("Zeta", {}), n9=("Old", {}))
    with pytest.raises(BadWorkflow, match=r"Alpha \(node 2\); Zeta \(node 1, 3\)"):
        Executor(NODES).run(work)


def test_no_output_node_and_cycles():
    with pytest.raises(BadWorkflow, match="no output node"):
        Executor(NODES).run(prompt(n1=("Number", {"value": 1})))
    work = prompt(n1=("Add", {"a": ["2", 0]}), n2=("Add", {"a": ["1", 0]}), n9=("Show", {"value": ["1", 0]}))
    with pytest.raises(BadWorkflow, match=r"cycle: (2 \u2192 1 \u2192 2|1 \u2192 2 \u2192 1)"):
        Executor(NODES).run(work)


def test_long_chains_do_not_recurse():
    length = 5_000
    work = {str(i): {"class_type": "Add", "inputs": {"a": [str(i - 1), 0], "b": 1}} for i in range(1, length)}
    work["0"] = {"class_type": "Number", "inputs": {"value": 0}}
    work["end"] = {"class_type": "Show", "inputs": {"value": [str(length - 1), 0]}}
    assert check(work, NODES).order[-1] == "end"
    assert len(check(work, NODES).order) == length + 1


def test_only_what_outputs_need_is_checked_and_run():
    work = prompt(n1=("Number", {"value": 1}), n2=("Add", {}), n9=("Show", {"value": ["1", 0]}))
    Executor(NODES).run(work)
    assert calls() == ["Number", "Show"]


def test_validate_inputs_takes_over_the_checks_of_the_inputs_it_names():
    run = Executor(NODES).run
    run(prompt(n1=("Validates", {"value": 1, "file": "not listed"})))
    assert SEEN == [{"file": "not listed"}]
    with pytest.raises(BadInput, match=r"node 1 \(Validates\): no such thing"):
        run(prompt(n1=("Validates", {"value": 1, "file": "no"})))
    with pytest.raises(BadInput, match="value is 4"):
        run(prompt(n1=("Validates", {"value": 4, "file": "a"})))


def test_validate_inputs_with_kwargs_takes_all_and_sees_links_as_none():
    work = prompt(n1=("Number", {"value": 1}), n2=("ValidatesAll", {"value": ["1", 0], "other": "77", "unknown": 1}))
    Executor(NODES).run(work)
    assert SEEN == [{"value": None, "other": 77}]


def test_fingerprint_gets_every_input_present_and_decides_about_the_cache():
    executor = Executor(NODES)
    work = prompt(n1=("Number", {"value": 1}), n2=("Touched", {"value": ["1", 0], "unused": 3, "unknown": 1}),
                  n9=("Show", {"value": ["2", 0]}))
    work["2"]["inputs"].pop("unused")
    executor.run(work)
    assert SEEN == [{"value": None}]
    assert executor.run(work).executed == []
    SEEN.clear()


@pytest.mark.parametrize("kind", ["Always", "Broken"])
def test_nan_or_failing_fingerprints_run_anew(kind):
    executor = Executor(NODES)
    work = prompt(n1=(kind, {}), n2=("Number", {"value": 2}), n3=("Add", {"a": ["1", 0], "b": ["2", 0]}),
                  n9=("Show", {"value": ["3", 0]}))
    executor.run(work)
    assert executor.run(work).executed == ["1", "3", "9"]


def test_unchanged_nodes_are_cached_and_what_follows_a_change_is_not():
    executor = Executor(NODES)
    work = prompt(n1=("Number", {"value": 1}), n2=("Number", {"value": 2}), n3=("Add", {"a": ["1", 0], "b": ["2", 0]}),
                  n9=("Show", {"value": ["3", 0]}))
    assert shown(executor.run(work)) == [3]
    again = executor.run(work)
    assert (again.executed, again.cached, shown(again)) == ([], ["1", "2", "3", "9"], [3])
    work["2"]["inputs"]["value"] = 5
    changed = executor.run(work)
    assert (changed.executed, changed.cached, shown(changed)) == (["2", "3", "9"], ["1"], [6])
    renamed = {{"1": "x1", "9": "99"}.get(k, k): v for k, v in work.items()}
    renamed["3"]["inputs"]["a"] = ["x1", 0]
    assert executor.run(renamed).executed == [], "ids do not matter, only what a node computes"
    executor.clear()
    assert len(executor.run(renamed).executed) == 4


def test_types_and_slots_count_in_the_cache():
    executor = Executor(NODES)
    for value, fresh in ((1, True), (1, False), ("1", True), ("2", True), ("1", True)):
        result = executor.run(prompt(n9=("Show", {"value": value})))
        assert bool(result.executed) is fresh
    two = prompt(n1=("Picture", {}), n9=("Show", {"value": ["1", 0]}))
    assert shown(executor.run(two)) == ["image"]
    two["9"]["inputs"]["value"] = ["1", 1]
    assert shown(executor.run(two)) == ["mask"]


def test_not_idempotent_nodes_do_not_share_results():
    work = prompt(n1=("Random", {}), n2=("Random", {}), n8=("Show", {"value": ["1", 0]}),
                  n9=("Show", {"value": ["2", 0]}))
    result = Executor(NODES).run(work)
    assert shown(result, "8") != shown(result, "9")


def test_lists_map_over_nodes_and_gather():
    work = prompt(n1=("Split", {"n": 3}), n2=("Add", {"a": ["1", 0], "b": 10}), n3=("Split", {"n": ["2", 0]}),
                  n4=("Collect", {"items": ["3", 0]}), n8=("Show", {"value": ["2", 0]}),
                  n9=("Show", {"value": ["4", 0]}))
    result = Executor(NODES).run(work)
    assert shown(result, "8") == [10, 11, 12]
    assert len(result.outputs["3"][0]) == 10 + 11 + 12, "output lists of all calls in one"
    assert CALLS[[name for name, _ in CALLS].index("Collect")][1]["items"] == result.outputs["3"][0]
    work["4"]["inputs"] = {"items": 1, "k": 3}
    assert shown(Executor(NODES).run(work)) == ["{'items': [1], 'k': [3]}"], "is_input_list makes widgets lists too"


def test_short_lists_repeat_their_last():
    work = prompt(n1=("Split", {"n": 4}), n2=("Split", {"n": 2}), n3=("Add", {"a": ["1", 0], "b": ["2", 0]}),
                  n9=("Show", {"value": ["3", 0]}))
    assert shown(Executor(NODES).run(work)) == [0, 2, 3, 4]


def test_empty_list_is_an_error_that_names_the_input():
    work = prompt(n1=("Split", {"n": 0}), n2=("Add", {"a": ["1", 0]}), n9=("Show", {"value": ["2", 0]}))
    with pytest.raises(FluxKitError, match=r"node 2 \(Add\): input a received an empty list"):
        Executor(NODES).run(work)


def test_dicts_and_too_few_outputs():
    result = Executor(NODES).run(prompt(n1=("Old", {}), n9=("Show", {"value": ["1", 1]})))
    assert result.ui == {"1": {"note": ["hi"]}, "9": {"shown": ["four"]}}
    with pytest.raises(FluxKitError, match="returned 1 of 2 outputs"):
        Executor(NODES).run(prompt(n1=("TooFew", {}), n9=("Show", {"value": ["1", 0]})))


@pytest.mark.parametrize(("x", "kind", "said"), [
    (0, FluxKitError, r"^node 1 \(Fails\) failed: ValueError: bad thing$"),
    (1, NotFinite, r"^node 1 \(Fails\): NaN in step 3$"),
    (2, Interrupted, r"^node 1 \(Fails\): stopped$"),
    (3, FluxKitError, "OutOfMemoryError: no room. There was not enough memory"),
    (5, FluxKitError, r"RuntimeError: .*can't allocate memory. There was not enough memory"),
])
def test_errors_name_the_node_and_keep_type_and_cause(x, kind, said):
    executor = Executor(NODES)
    work = prompt(n0=("Number", {"value": x}), n1=("Fails", {"x": ["0", 0]}), n9=("Show", {"value": ["1", 0]}))
    with pytest.raises(kind, match=said) as caught:
        executor.run(work)
    assert caught.value.node == "1"
    assert type(caught.value) is kind
    assert (caught.value.__cause__ is not None) is (kind is FluxKitError)
    work["1"] = {"class_type": "Add", "inputs": {"a": ["0", 0]}}
    assert executor.run(work).cached == ["0"], "what was done before the failure is kept, nothing else"


def test_interrupt_between_nodes_stops_before_the_next():
    def stop() -> None:
        if len(CALLS) == 1:
            raise Interrupted("stopped")

    work = prompt(n1=("Number", {"value": 1}), n9=("Show", {"value": ["1", 0]}))
    with pytest.raises(Interrupted):
        Executor(NODES, check_interrupt=stop).run(work)
    assert calls() == ["Number"]


def test_told_before_each_node_and_runs_in_inference_mode():
    told: list[Any] = []
    modes: list[bool] = []
    mode = make("Mode", [], [INT()], lambda: (modes.append(torch.is_inference_mode_enabled()), 1)[1:])
    nodes = {**NODES, "Mode": mode}
    work = prompt(n1=("Mode", {}), n9=("Show", {"value": ["1", 0]}))
    Executor(nodes, on_node=lambda *args: told.append(args)).run(work)
    assert told == [("1", "Mode", 0, 2), ("9", "Show", 1, 2)]
    assert modes == [True]


def test_hidden_values_reach_output_nodes():
    got: list[Any] = []

    class Saver(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="Saver", is_output_node=True)

        @classmethod
        def execute(cls) -> None:
            got.append(cls.hidden)

    work = prompt(n1=("Saver", {}))
    Executor({"Saver": Saver}).run(work, {"workflow": {"nodes": []}})
    assert got[0].prompt == work
    assert got[0].extra_pnginfo == {"workflow": {"nodes": []}}
    assert got[0].unique_id is None, "was not asked for"


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=4), inner, max_size=3)))
def test_any_json_value_in_any_input_is_taken_or_refused_cleanly(value):
    for kind in NODES:
        names = [spec.id for spec in NODES[kind].GET_SCHEMA().inputs]
        work = prompt(n1=(kind, dict.fromkeys(names, value)), n9=("Old", {}))
        work["9"] = {"class_type": "Types", "inputs": dict.fromkeys("ifsbc", value)}
        try:
            check(work, NODES)
        except FluxKitError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
