"""The command line's grammar, and what it costs to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flux_kit.cli import main
from flux_kit.cli.parser import UsageError, build_parser


def parse(*words: str) -> object:
    return build_parser().parse_args(words)


@pytest.mark.parametrize("words", [
    [], ["paint"], ["generate"], ["generate", "x"], ["generate", "x", "-o", "o.png", "--steps", "0"],
    ["generate", "x", "-o", "o.png", "--seed", "-1"], ["generate", "x", "-o", "o.png", "--seed", str(2**64)],
    ["generate", "x", "-o", "o.png", "--seed", "1.5"], ["generate", "x", "-o", "o.png", "--guidance", "nan"],
    ["generate", "x", "-o", "o.png", "--cfg", "-2"], ["generate", "x", "-o", "o.png", "--width", "wide"],
    ["generate", "x", "-o", "o.png", "--dtype", "int3"], ["generate", "x", "-o", "o.png", "--memory", "lots"],
    ["generate", "x", "-o", "o.png", "--count", "0"], ["run"], ["run", "w.json", "--set", "steps=4"],
    ["run", "w.json", "--set", "3.steps"], ["run", "w.json", "--set", ".steps=4"], ["inspect"],
])
def test_wrong_usage_is_one_line_and_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("flux-kit: ") and "--help" in err
    assert main([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["ok"] is False and set(error["error"]) == {"type", "message", "file", "node"}


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_seeds_have_64_bits(seed: int) -> None:
    assert parse("generate", "x", "-o", "o.png", "--seed", str(seed)).seed == seed  # type: ignore[attr-defined]


@pytest.mark.parametrize(("text", "parts"), [
    ("31.seed=7", ("31", "seed", "7")), ("57:3.text=a=b.c", ("57:3", "text", "a=b.c")),
    ("My v1.5 node.steps=", ("My v1.5 node", "steps", "")),
])
def test_settings_are_taken_apart(text: str, parts: tuple[str, str, str]) -> None:
    assert parse("run", "w.json", "--set", text).settings == [parts]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("text", "file", "strength"), [
    ("style.safetensors", "style.safetensors", 1), ("style.safetensors:0.8", "style.safetensors", 0.8),
    ("style:-1e-1", "style", -0.1), ("a:b.safetensors", "a:b.safetensors", 1),
    ("a:0.5.safetensors:2", "a:0.5.safetensors", 2), ("C:\\loras\\a.safetensors", "C:\\loras\\a.safetensors", 1),
    ("C:\\loras\\a.safetensors:.5", "C:\\loras\\a.safetensors", 0.5), ("C:/loras/a", "C:/loras/a", 1),
    ("C:a.sft:2", "C:a.sft", 2), ("really:here", "really:here", 1), ("here:0.5", "here:0.5", 1),
    ("here:0.5:0.5", "here:0.5", 0.5),
])
def test_a_lora_and_its_strength(text: str, file: str, strength: float, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "here" in text and os.name == "nt":
        pytest.skip("no file can be called so on this system")
    for name in ("really:here", "here:0.5") if "here" in text else ():
        Path(name).touch()
    found = (Path(file), strength)
    assert parse("generate", "x", "-o", "o.png", "--lora", text).loras == [found]  # type: ignore[attr-defined]
    assert parse("quantize", "a", "b", "--type", "F16", "--lora", text).lora == [found]  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["style.safetensors:abc", "style:0,8", "style:", ":0.5", ":", "a:nan", "a:inf",
                                  "C:\\loras\\a.safetensors:x", "a:0.5x"])
def test_no_strength(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["generate", "x", "-o", "o.png", "--lora"], ["quantize", "a", "b", "--type", "F16", "--lora"],
                  ["lora", "merge"]):
        assert main([*words, text, *(["o.safetensors"] if words[0] == "lora" else [])]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and text in err.replace("\\\\", "\\") and (
            "is no number" in err or "not a finite number" in err or "FILE:STRENGTH" in err)


def test_options_that_may_repeat() -> None:
    options = parse("run", "w.json", "--models", "a", "--models", "b", "--input", "c", "--input", "d")
    assert [list(map(str, found)) for found in (options.models, options.input)] == [  # type: ignore[attr-defined]
        ["a", "b"], ["c", "d"]]


def test_an_error_of_usage_is_no_exit() -> None:
    with pytest.raises(UsageError, match="COMMAND"):
        parse()


def test_help_and_import_load_nothing_heavy() -> None:
    code = ("import sys, flux_kit, flux_kit.cli\n"
            "try: flux_kit.cli.main(['generate', '--help'])\n"
            "except SystemExit as stop: assert stop.code == 0\n"
            "heavy = {'torch', 'numpy', 'PIL', 'tokenizers', 'safetensors', 'scipy', 'tqdm'} & set(sys.modules)\n"
            "assert not heavy, heavy\n")
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for word in ("--model", "--negative", "--count", "--guidance", "-o"):
        assert word in done.stdout


def test_a_missing_package_is_named() -> None:
    code = ("import sys; sys.modules['torch'] = None\n"
            "from flux_kit.cli import main; sys.exit(main(['run', 'w.json', '--json']))")
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    error = json.loads(done.stdout)["error"]
    assert "package torch" in error["message"] and "flux-kit[standalone]" in error["message"]
