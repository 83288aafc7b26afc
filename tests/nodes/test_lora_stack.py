"""LoRA Stack without a browser: what its rows may be, what it gives, what it refuses."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from flux_kit.engine.errors import BadInput, FluxKitError, MissingFile
from flux_kit.hosts import lora_rows as loras
from flux_kit.hosts.standalone.host import StandaloneHost
from stack_files import lora_file, png

Rows = list[dict[str, Any]]


@pytest.fixture
def files(models: Path, host: StandaloneHost) -> Path:
    """Two LoRAs with words in the header, one in a folder, and one that is no LoRA at all."""
    folder = models / "loras"
    lora_file(folder / "red.safetensors", {"modelspec.trigger_phrase": "r3d style"})
    lora_file(folder / "shapes" / "Star.safetensors", {"ss_tag_frequency": json.dumps({"1_x": {"st4r": 9, "sky": 3}})})
    (folder / "broken.safetensors").write_bytes(b"\0" * 100)
    return folder


def stack(run_prompt: Any, rows: Any, **inputs: Any) -> Any:
    text = rows if isinstance(rows, str) else json.dumps(rows)
    result = run_prompt({"s": ("FluxKitLoraStack", {"rows": text, **inputs})}, "s")
    return [slot[0] for slot in result.outputs["s"]]


def test_rows_become_both_socket_types_words_and_a_report(files: Path, run_prompt: Any) -> None:
    pairs, rows, words, report = stack(run_prompt, [
        {"lora": "red.safetensors", "model": 0.8, "clip": 0.5},
        {"lora": "shapes/Star.safetensors", "blocks": "single = 0", "start": 0.25, "mine": 7}])
    assert pairs == [("red.safetensors", 0.8, 0.5), ("shapes/Star.safetensors", 1.0, 1.0)]
    assert all(type(pair) is tuple and [type(x) for x in pair] == [str, float, float] for pair in pairs)
    assert (rows[1].blocks, rows[1].start, rows[1].end) == ("single = 0", 0.25, 1.0)
    assert words == "r3d style, st4r"
    assert "Star.safetensors: LORA_STACK has no place for its block weights 'single = 0', range 0.25 to 1" in report
    assert report.count("no place") == 1


def test_rows_that_are_off_or_zero_read_nothing(files: Path, run_prompt: Any) -> None:
    """Their files are not even there."""
    pairs, rows, words, report = stack(run_prompt, [
        {"on": False, "lora": "gone.safetensors"}, {"lora": "gone too", "model": 0, "clip": 0},
        {"lora": "", "model": 1}])
    assert (pairs, rows, words, report) == ([], (), "", "no LoRA is on")


def test_clip_follows_model_and_one_zero_still_counts(files: Path, run_prompt: Any) -> None:
    pairs, *_ = stack(run_prompt, [{"lora": "red.safetensors", "model": 0.3},
                                   {"lora": "shapes/Star.safetensors", "model": 0, "clip": 1}])
    assert pairs == [("red.safetensors", 0.3, 0.3), ("shapes/Star.safetensors", 0.0, 1.0)]


@pytest.mark.parametrize("name", ["Star.safetensors", "star.SAFETENSORS", "other\\Star.safetensors",
                                  "shapes\\Star.safetensors"])
def test_names_resolve_by_base_name_and_the_stack_carries_what_others_find(files: Path, run_prompt: Any,
                                                                          name: str) -> None:
    pairs, *_ = stack(run_prompt, [{"lora": name}])
    assert pairs == [("shapes/Star.safetensors", 1.0, 1.0)]


def test_a_stack_of_any_pack_goes_in_front(files: Path, run_prompt: Any) -> None:
    result = run_prompt({
        "a": ("FluxKitLoraStack", {"rows": json.dumps([{"lora": "red.safetensors", "start": 0.5}])}),
        "b": ("FluxKitLoraStack", {"rows": json.dumps([{"lora": "Star.safetensors"}]), "loras": ["a", 1]}),
        "c": ("FluxKitLoraStack", {"rows": "[]", "loras": ["b", 0]})}, "c")
    assert [row.start for row in result.outputs["b"][1][0]] == [0.5, 0.0]
    assert result.outputs["c"][0][0] == [("red.safetensors", 1.0, 1.0), ("shapes/Star.safetensors", 1.0, 1.0)]


def test_the_same_file_twice_is_told(files: Path, run_prompt: Any) -> None:
    *_, report = stack(run_prompt, [{"lora": "red.safetensors"}, {"lora": "RED.safetensors", "model": 0.5}])
    assert "red.safetensors stands in the stack 2 times; its strengths add" in report


@pytest.mark.parametrize("dotted", [
    {"loras.0.lora_name": "red.safetensors", "loras.0.strength": 0.5, "loras.10.lora_name": "Star.safetensors",
     "loras.10.strength": 2, "loras.2.lora_name": "gone", "loras.2.enabled": False}])
def test_rows_of_core_s_own_stack_are_taken(files: Path, run_prompt: Any, dotted: dict[str, Any]) -> None:
    """As a prompt's inputs, as its API format writes them, and as the text of the widget."""
    wanted = [("red.safetensors", 0.5, 0.5), ("shapes/Star.safetensors", 2.0, 2.0)]
    assert stack(run_prompt, "[]", **dotted)[0] == wanted
    assert stack(run_prompt, json.dumps(dotted))[0] == wanted


@pytest.mark.parametrize(("rows", "words"), [
    ("{not json", "JSON"), ("3", "JSON list"), ('{"a": 1}', "JSON list"), ('["x"]', "row 1"), ("[" * 100_000, "JSON"),
    ('[{"lora": "red.safetensors"}, {"lora": 3}]', "row 2"), ('[{}]', "row 1"),
    ('[{"lora": "red.safetensors", "model": NaN}]', "row 1.*model strength nan"),
    ('[{"lora": "red.safetensors", "clip": Infinity}]', "row 1.*clip strength inf"),
    ('[{"lora": "red.safetensors", "model": 1e999}]', "row 1"),
    ('[{"lora": "red.safetensors", "model": "1"}]', "row 1.*model.*'1'"),
    ('[{"lora": "red.safetensors", "model": true}]', "row 1.*model.*True"),
    ('[{"lora": "red.safetensors", "on": 1}]', "row 1.*on"),
    ('[{"lora": "red.safetensors", "start": 0.8, "end": 0.2}]', "row 1.*end"),
    ('[{"lora": "red.safetensors"}, {"lora": "red.safetensors", "blocks": "doubel = 1"}]', "row 2.*doubel"),
    (json.dumps([{"lora": "red.safetensors"}] * 1000), "at most"),
    ('[{"lora": "rde.safetensors"}]', "near: red.safetensors"),
    ('[{"lora": "../red/../../x"}]', "loras"),
    ('{"loras.0.lora_name": 5}', "row 1"),
])
def test_what_is_wrong_is_said_before_the_run(files: Path, run_prompt: Any, rows: str, words: str) -> None:
    from flux_kit.nodes.lora_stack import FluxKitLoraStack
    with pytest.raises((BadInput, MissingFile), match=words) as caught:
        stack(run_prompt, rows)
    assert caught.value.node == "s" and len(str(caught.value)) < 500
    told = FluxKitLoraStack.validate_inputs(rows)
    assert isinstance(told, str) and told in str(caught.value)


def test_linked_rows_are_checked_when_they_arrive(files: Path, run_prompt: Any) -> None:
    from flux_kit.nodes.lora_stack import FluxKitLoraStack
    assert FluxKitLoraStack.validate_inputs(None) is True and FluxKitLoraStack.fingerprint_inputs(None) == []
    nodes = {"t": ("PrimitiveString", {"value": '[{"lora": "none at all"}]'}),
             "s": ("FluxKitLoraStack", {"rows": ["t", 0]})}
    with pytest.raises(FluxKitError, match="none at all"):
        run_prompt(nodes, "s")


def test_a_file_that_changed_runs_anew(files: Path, run_prompt: Any) -> None:
    rows = [{"lora": "red.safetensors"}]
    assert stack(run_prompt, rows)[2] == "r3d style"
    lora_file(files / "red.safetensors", {"modelspec.trigger_phrase": "crimson!"})
    assert stack(run_prompt, rows)[2] == "crimson!"


@pytest.mark.parametrize(("ending", "told"), [
    (".civitai.info", {"trainedWords": ["one", "two,"]}),
    (".metadata.json", {"civitai": {"trainedWords": ["one", "two"]}}),
    (".safetensors.rgthree-info.json", {"trainedWords": [{"word": "one"}, {"word": "two"}, {"word": 3}]}),
    (".json", {"activation text": "one, two"})])
def test_words_beside_a_file_win(files: Path, ending: str, told: Any) -> None:
    (files / f"red{ending}").write_text(json.dumps(told))
    try:
        assert ", ".join(loras.trigger_words(files / "red.safetensors")) == "one, two"
    finally:
        (files / f"red{ending}").unlink()


@pytest.mark.parametrize("told", [b"\xff\xfe", b"[" * 90_000, b'{"trainedWords": 5}',
                                  b'{"trainedWords": [null, {}]}', b""])
def test_a_file_beside_that_is_damaged_is_passed_over(files: Path, told: bytes) -> None:
    beside = files / "red.civitai.info"
    beside.write_bytes(told)
    try:
        assert loras.trigger_words(files / "red.safetensors") == ["r3d style"]
    finally:
        beside.unlink()


def test_facts_tell_format_rank_and_words_and_a_broken_file_is_a_problem(files: Path) -> None:
    told = loras.facts(files / "red.safetensors")
    assert any("kohya" in line for line in told.lines) and any("rank 2" in line for line in told.lines)
    assert told.words == ["r3d style"] and told.problems == [] and not told.picture
    assert loras.facts(files / "broken.safetensors").problems and not loras.facts(files / "broken.safetensors").lines


def test_pictures_are_taken_by_what_they_hold(files: Path) -> None:
    """Beside the file, else in its header; a text with the name of a picture is none."""
    beside, named = files / "red.preview.png", files / "Star.jpg"
    beside.write_bytes(png())
    named.write_text("<svg onload=alert(1)>")
    try:
        assert loras.picture(files / "red.safetensors") == ("image/png", png())
        assert loras.picture(files / "shapes" / "Star.safetensors") is None
        beside.write_text("<html>")
        assert loras.picture(files / "red.safetensors") is None
    finally:
        beside.unlink()
        named.unlink()
    for kind, data, found in (("png", base64.b64encode(png()).decode(), ("image/png", png())),
                              ("svg+xml", "PHN2Zz4=", None), ("png", "%%%", None)):
        lora_file(files / "own.safetensors", {"modelspec.thumbnail": f"data:image/{kind};base64,{data}"})
        assert loras.picture(files / "own.safetensors") == found
    (files / "own.safetensors").unlink()


