"""`flux-kit run`: settings, answers, and every kind of bad workflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flux_kit.cli import main
from PIL import Image
from PIL.PngImagePlugin import PngInfo

GOOD: dict[str, Any] = {
    "1": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
    "2": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1},
          "_meta": {"title": "Size"}},
    "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 0]}},
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "x"}},
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def changed(node: str, **inputs: Any) -> dict[str, Any]:
    return {**GOOD, node: {**GOOD[node], "inputs": {**GOOD[node]["inputs"], **inputs}}}


def upscaler(source: str) -> dict[str, Any]:
    return {"class_type": "LatentUpscaleBy", "inputs": {"samples": [source, 0], "upscale_method": "area",
                                                        "scale_by": 1.0}}


def run(capsys: pytest.CaptureFixture[str], models: Path, workflow: Any, *words: str) -> dict[str, Any]:
    """The JSON answer with exit code and stderr; `workflow` is a path, or text or JSON to write to one first."""
    if not isinstance(workflow, Path):
        text = workflow if isinstance(workflow, str) else json.dumps(workflow)
        workflow, text = Path("w.json"), text
        workflow.write_text(text, encoding="utf-8")
    code = main(["run", str(workflow), "--models", str(models), "--json", *words])
    out, err = capsys.readouterr()
    return {**json.loads(out), "code": code, "err": err}


def written() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file() and path.name != "w.json")


def test_a_run_tells_its_pictures(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, models, GOOD, "--out", "o")
    assert (answer["code"], answer["ok"], answer["seed"]) == (0, True, None)
    assert answer["images"] == [str(Path("o/x_00001_.png"))] == written()
    assert main(["run", "w.json", "--models", str(models), "--out", "o"]) == 0
    assert capsys.readouterr().out == f"{Path('o/x_00002_.png')}\n"


@pytest.mark.parametrize(("setting", "size"), [("2.width=48", (48, 32)), ("Size.height=64", (32, 64))])
def test_settings_by_id_and_title(models: Path, capsys: pytest.CaptureFixture[str], setting: str,
                                  size: tuple[int, int]) -> None:
    answer = run(capsys, models, GOOD, "--set", setting)
    with Image.open(answer["images"][0]) as picture:
        assert picture.size == size


@pytest.mark.parametrize(("setting", "words"), [
    ("9.width=8", "no node"), ("Sice.width=8", "Size"), ("2.depth=8", "width, height, batch_size"),
    ("3.vae=ae.safetensors", "takes a link"), ("VAEDecode.tile=1", "is not there")])
def test_settings_that_name_nothing_are_wrong_usage(models: Path, capsys: pytest.CaptureFixture[str], setting: str,
                                                    words: str) -> None:
    answer = run(capsys, models, GOOD, "--set", setting)
    assert (answer["code"], answer["error"]["type"]) == (2, "UsageError")
    assert words in answer["error"]["message"] and written() == []


def test_an_ambiguous_title_is_wrong_usage(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = {**GOOD, "5": GOOD["2"]}
    answer = run(capsys, models, twice, "--set", "Size.width=64")
    assert answer["code"] == 2 and "2, 5" in answer["error"]["message"]
    assert run(capsys, models, twice, "--set", "5.width=64")["code"] == 0


def test_booleans_are_words(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flux_kit.cli import session
    from flux_kit.cli.parser import UsageError
    from flux_kit.cli.run import with_settings
    run(capsys, models, GOOD)  # a host, so that nodes can be imported
    nodes = session.node_classes()
    prompt = {"1": {"class_type": "PrimitiveBoolean", "inputs": {"value": True}, "_meta": {"title": "b"}}}
    assert with_settings(prompt, [("b", "value", "false")], nodes)["1"]["inputs"]["value"] is False
    assert prompt["1"]["inputs"]["value"] is True
    with pytest.raises(UsageError):
        with_settings(prompt, [("b", "value", "maybe")], nodes)


BAD_WORKFLOWS: dict[str, tuple[Any, str]] = {
    "cut off": (json.dumps(GOOD)[:100], "JSON"),
    "empty": ("", "nothing in it"),
    "a list": ("[1, 2]", "no workflow"),
    "200 deep": ("[" * 200 + "]" * 200, "nested"),
    "50,000 deep": ('{"a":' * 50_000, "nested"),
    "cycle": ({**GOOD, "2": upscaler("5"), "5": upscaler("2")}, "cycle"),
    "missing link": (changed("3", samples=["77", 0]), "77"),
    "no such output": (changed("3", samples=["2", 4]), "output 4"),
    "wrong type": (changed("3", samples=["1", 0]), "LATENT"),
    "missing input": ({**GOOD, "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0]}}}, "vae"),
    "unknown nodes": ({**GOOD, "5": {"class_type": "NopeA", "inputs": {}}, "6": {"class_type": "NopeB", "inputs": {}}},
                      "NopeA"),
    "out of range": (changed("2", width=-5), "16 to 16384"),
    "not a number": (changed("2", width="wide"), "wide"),
    "missing file": (changed("1", vae_name="ea.safetensors"), "ae.safetensors"),
    "file without a name": (changed("1", vae_name=5), "no file name"),
    "file of an object": (changed("1", vae_name={"a": 1}), "no file name"),
    "nothing chosen": (changed("1", vae_name=None), "null"),
    "file outside": (changed("1", vae_name="../../../etc/passwd"), "passwd"),
    "absolute file": (changed("1", vae_name="/etc/passwd"), "passwd"),
    "prefix outside": (changed("4", filename_prefix="../x"), "leaves its folder"),
    "absolute prefix": (changed("4", filename_prefix="/tmp/x"), "leading slash"),
    "268 megapixels": (changed("2", width=16384, height=16384), "64 megapixels"),
    "4096 pictures": (changed("2", batch_size=4096), "at most 64"),
    "grown to 268 megapixels": (
        {**changed("2", width=2048, height=2048), "3": {**GOOD["3"], "inputs": {"samples": ["5", 0], "vae": ["1", 0]}},
         "5": {**upscaler("2"), "inputs": {**upscaler("2")["inputs"], "scale_by": 8.0}}}, "64 megapixels"),
    "unknown solver": ({**GOOD, "5": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "magic"}},
                        "4": {**GOOD["4"], "inputs": {**GOOD["4"]["inputs"], "images": ["5", 0]}}}, "euler"),
    "no output": ({"1": GOOD["1"]}, "no output node"),
}


@pytest.mark.parametrize("name", BAD_WORKFLOWS)
def test_bad_workflows_are_one_line_and_exit_code_1(models: Path, capsys: pytest.CaptureFixture[str],
                                                    name: str) -> None:
    workflow, words = BAD_WORKFLOWS[name]
    answer = run(capsys, models, workflow)
    assert (answer["code"], answer["ok"]) == (1, False)
    assert words in answer["error"]["message"]
    assert answer["err"].count("\n") == 1 and answer["error"]["message"] in answer["err"]
    assert written() == []


def test_a_bad_prefix_is_told_with_all_else_before_the_run(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = {"class_type": "FluxKitSave", "inputs": {"images": ["3", 0], "filename_prefix": "C:/x"}}
    workflow = {**changed("4", filename_prefix="a/../../%date:yyyy%"), "5": ours, "2": changed("2", width=-5)["2"]}
    message = run(capsys, models, workflow)["error"]["message"]
    for words in ("16 to 16384", "leaves its folder", "colon"):
        assert words in message


def test_all_unknown_nodes_are_listed_at_once(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = run(capsys, models, BAD_WORKFLOWS["unknown nodes"][0])["error"]["message"]
    assert "NopeA" in message and "NopeB" in message


def test_a_size_that_is_rounded_is_told(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, models, changed("2", width=100))
    with Image.open(answer["images"][0]) as picture:
        assert picture.size == (96, 32)
    assert answer["err"] == "flux-kit: a picture of 100 x 32 becomes 96 x 32: sides are multiples of 8\n"


def test_settings_are_checked_like_the_file(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for setting in ("4.filename_prefix=../x", "1.vae_name=/etc/passwd", "2.width=0", "2.width=1e9"):
        answer = run(capsys, models, GOOD, "--set", setting)
        assert (answer["code"], answer["ok"]) == (1, False), setting
    assert written() == [] and not Path("../x_00001_.png").exists()


def test_pngs_with_and_without_a_workflow(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save("none.png")
    assert "holds no workflow" in run(capsys, models, Path("none.png"))["error"]["message"]
    info = PngInfo()
    info.add_text("prompt", json.dumps(changed("4", filename_prefix="../../x")))
    Image.new("RGB", (4, 4)).save("evil.png", pnginfo=info)
    assert run(capsys, models, Path("evil.png"))["code"] == 1
    Path("cut.png").write_bytes(Path("evil.png").read_bytes()[:50])
    assert "cut off" in run(capsys, models, Path("cut.png"))["error"]["message"]
    assert written() == ["cut.png", "evil.png", "none.png"]


def test_missing_paths(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.json" in run(capsys, models, Path("absent.json"))["error"]["message"]
    assert "a folder" in run(capsys, models, Path())["error"]["message"]
    for words in (["--models", "absent"], ["--input", "absent"]):
        answer = run(capsys, models, GOOD, *words)
        assert (answer["code"], answer["error"]["type"]) == (1, "MissingFile")
    Path("file").write_text("x")
    assert "nothing can be saved" in run(capsys, models, GOOD, "--out", "file/o")["error"]["message"]


def test_memory_and_device_are_choices(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for memory in ("auto", "full", "stream", "cpu"):
        assert run(capsys, models, GOOD, "--memory", memory)["code"] == 0
    assert "nonsense" in run(capsys, models, GOOD, "--device", "nonsense")["error"]["message"]
