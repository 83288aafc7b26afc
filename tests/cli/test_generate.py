"""`flux-kit generate`: pictures, the parts it finds, and its refusals."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
from budget import Budget
from family import Family
from flux_kit.cli import main
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.png import read_text
from PIL import Image
from safetensors.torch import save_file

FAST = ["--steps", "2", "--width", "32", "--height", "48"]


@pytest.fixture(autouse=True)
def _place(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(capsys: pytest.CaptureFixture[str], *words: str, prompt: str = "a red circle") -> dict[str, Any]:
    """The JSON answer, with the exit code and stderr put into it."""
    code = main(["generate", prompt, "--json", *words])
    out, err = capsys.readouterr()
    answer: dict[str, Any] = json.loads(out)
    return {**answer, "code": code, "err": err}


def pixels(path: Path | str) -> Any:
    return np.asarray(Image.open(path))


def test_without_a_model_tiny_flux_makes_128_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = generate(capsys, "--steps", "1", "-o", "new/folder/o.png", "--seed", "3")
    assert (answer["code"], answer["ok"], answer["seed"]) == (0, True, 3)
    assert answer["images"] == [str(Path("new/folder/o.png"))] and answer["seconds"] > 0
    assert answer["err"] == ""
    assert pixels("new/folder/o.png").shape == (128, 128, 3)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["o.png"]


def test_a_seed_is_a_picture_and_count_takes_the_next_ones(capsys: pytest.CaptureFixture[str]) -> None:
    several = generate(capsys, *FAST, "-o", "o.png", "--seed", "8", "--count", "2")
    assert [Path(path).name for path in several["images"]] == ["o_00001.png", "o_00002.png"]
    for number, path in enumerate(several["images"]):
        generate(capsys, *FAST, "-o", "single.png", "--seed", str(8 + number))
        assert np.array_equal(pixels("single.png"), pixels(path))
    assert not np.array_equal(*map(pixels, several["images"]))


def test_the_png_runs_again_to_the_same_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(capsys, *FAST, "-o", "o.png", "--seed", str(2**64 - 1), "--negative", "blue", "--cfg", "2",
             "--guidance", "2.5")
    assert main(["run", "o.png", "--out", "again", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["seed"] == 2**64 - 1
    assert np.array_equal(pixels(answer["images"][0]), pixels("o.png"))


def test_options_reach_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    generate(capsys, "--steps", "2", "--width", "32", "--height", "48", "--guidance", "2", "--seed", "5", "-o", "o.png",
             prompt="ein Körper (groß:1.2)")
    prompt = json.loads(read_text(Path("o.png"), ["prompt"])["prompt"])
    inputs = {name: value for node in prompt.values() for name, value in node["inputs"].items()}
    assert (inputs["prompt"], inputs["guidance"], inputs["steps"]) == ("ein Körper (groß:1.2)", 2.0, 2)
    assert (inputs["width"], inputs["height"], inputs["seed"]) == (32, 48, 5)


def test_negative_and_empty_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(capsys, *FAST, "-o", "plain.png", prompt="")["ok"]
    assert generate(capsys, *FAST, "-o", "cfg.png", "--cfg", "3", "--negative", "blue", prompt="")["ok"]
    assert not np.array_equal(pixels("plain.png"), pixels("cfg.png"))
    answer = generate(capsys, *FAST, "-o", "x.png", "--negative", "blue")
    assert answer["code"] == 2 and "--cfg" in answer["error"]["message"]


def test_parts_are_found_by_role(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = generate(capsys, *FAST, "--model", "flux1-dev.safetensors", "--models", str(models), "-o", "o.png")
    assert answer["code"] == 0
    for name in ("t5xxl_fp16.safetensors", "clip_l.safetensors", "ae.safetensors"):
        assert name in answer["err"]  # what was taken is told
    by_path = [str(models / "diffusion_models" / "flux1-dev.safetensors"), "--t5",
               str(models / "text_encoders" / "t5xxl_fp16.safetensors"), "--clip",
               str(models / "text_encoders" / "clip_l.safetensors"), "--vae", str(models / "vae" / "ae.safetensors")]
    other = generate(capsys, *FAST, "-o", "p.png", "--model", *by_path)
    assert (other["code"], other["err"]) == (0, "")
    assert np.array_equal(pixels("o.png"), pixels("p.png"))


def test_every_memory_mode_gives_the_same_picture(capsys: pytest.CaptureFixture[str]) -> None:
    for memory in ("auto", "full", "stream", "cpu"):
        answer = generate(capsys, *FAST, "-o", f"{memory}.png", "--memory", memory)
        assert answer["code"] == 0 and ("blocks stream" in answer["err"]) == (memory == "stream")
        assert np.array_equal(pixels(f"{memory}.png"), pixels("auto.png"))


@pytest.mark.parametrize(("budget", "code"), [(1_200_000, 1), (9_500_000, 0)])
def test_a_small_device_streams_or_is_told_before_anything_is_loaded(
        budget: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device = Budget(budget)
    monkeypatch.setattr("flux_kit.hosts.standalone.host.TorchDevice", lambda _: device)
    answer = generate(capsys, *FAST, "-o", "o.png")
    assert answer["code"] == code and device.peak <= budget
    if code:
        assert answer["error"]["type"] == "NotEnoughMemory" and "missing" in answer["error"]["message"]
        assert device.taken == [] and not Path("o.png").exists()
    else:
        assert "blocks stream" in answer["err"]
        generate(capsys, *FAST, "-o", "plain.png", "--memory", "cpu")
        assert np.array_equal(pixels("o.png"), pixels("plain.png"))


def test_an_all_in_one_file_needs_nothing_else(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models / "checkpoints" / "flux1-schnell-fp8.safetensors"
    answer = generate(capsys, "--model", str(path), "--width", "32", "--height", "32", "-o", "o.png")
    assert (answer["code"], answer["err"]) == (0, "")
    prompt = json.loads(read_text(Path("o.png"), ["prompt"])["prompt"])
    assert [node["inputs"]["steps"] for node in prompt.values() if "steps" in node["inputs"]] == [4]
    answer = generate(capsys, "--model", str(path), *FAST, "--guidance", "2", "-o", "o.png")
    assert "--guidance has no effect" in answer["err"]


def test_several_candidates_are_listed(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = family.write(tmp_path / "m", {"dev": "d.safetensors", "clip_l": "c.safetensors", "vae": "v.safetensors",
                                           "t5": "one.safetensors"})
    family.write(folder, {"t5": "two.safetensors"})
    answer = generate(capsys, *FAST, "--model", "d.safetensors", "--models", str(folder), "-o", "o.png")
    assert answer["code"] == 1
    for word in ("one.safetensors", "two.safetensors", "--t5"):
        assert word in answer["error"]["message"]
    assert not Path("o.png").exists()
    again = generate(capsys, *FAST, "--model", "d.safetensors", "--models", str(folder), "-o", "o.png", "--t5",
                     "two.safetensors")
    assert again["code"] == 0


def test_files_of_one_name_in_two_folders_are_told_apart(family: Family, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """A diffusers folder calls both encoders model.safetensors."""
    for part, folder in (("t5", "text_encoder_2"), ("clip_l", "text_encoder")):
        family.write(tmp_path / folder, {part: "model.safetensors"})
    answer = generate(capsys, *FAST, "-o", "o.png",
                      "--t5", str(tmp_path / "text_encoder_2" / "text_encoders" / "model.safetensors"),
                      "--clip", str(tmp_path / "text_encoder" / "text_encoders" / "model.safetensors"))
    assert answer["code"] == 0, answer


def test_an_existing_file_is_replaced_only_by_a_whole_picture(capsys: pytest.CaptureFixture[str]) -> None:
    Path("o.png").write_bytes(b"old")
    assert generate(capsys, "--width", "40", "-o", "o.png")["code"] == 1
    assert Path("o.png").read_bytes() == b"old"
    assert generate(capsys, *FAST, "-o", "o.png")["code"] == 0
    assert pixels("o.png").shape == (48, 32, 3)
    assert sorted(path.name for path in Path().iterdir()) == ["o.png"]


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-o", "o.jpg"], ["-o", "o.png", "--seed", str(2**64 - 1), "--count", "2"]):
        answer = generate(capsys, *words)
        assert (answer["code"], answer["error"]["type"]) == (2, "UsageError")


@pytest.fixture
def _control_c_is_heard() -> Iterator[None]:
    """As on a terminal; a shell starts its background jobs deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_control_c_is_heard")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_line_and_exit_code_1(number: signal.Signals, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(StandaloneHost, "decode", lambda *_, **__: signal.raise_signal(number))
    answer = generate(capsys, *FAST, "-o", "o.png", "--preview", "p.png")
    assert (answer["code"], answer["error"]["type"]) == (1, "Interrupted")
    assert answer["err"].count("\n") == 1 and [path.name for path in Path().iterdir()] == ["p.png"]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("words", [["-o", "there.png"], ["-o", "o.png", "--preview", "there.png"],
                                   ["-o", "n" * 300 + ".png"], ["-o", "file/o.png"]])
def test_what_cannot_be_written_is_told_before_anything_is_read(words: list[str],
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.png").mkdir()
    Path("file").touch()
    answer = generate(capsys, *FAST, *words, "--model", "absent.safetensors")
    assert answer["code"] == 1 and "absent" not in answer["error"]["message"]
    assert answer["err"].count("\n") == 1 and Path(answer["error"]["file"]).name in " ".join(words)
    assert sorted(path.name for path in Path().rglob("*")) == ["file", "there.png"]


def test_loras_change_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By path and by name, several of them, on transformer and text encoders; and nothing is left of them."""
    lora_files.write(tmp_path / "loras")
    plain = ["generate", *FAST][1:]
    outs = {}
    for name, loras in (("none", []), ("one", ["--lora", "loras/kohya.safetensors:0.7"]),
                        ("named", ["--lora", "kohya.safetensors:0.7"]), ("off", ["--lora", "kohya.safetensors:0"]),
                        ("two", ["--lora", "kohya.safetensors:0.7", "--lora", "text.safetensors"])):
        answer = generate(capsys, *plain, *loras, "--models", ".", "-o", f"{name}.png")
        assert answer["code"] == 0, answer
        assert ("on model: 5" in answer["err"]) == (name in ("one", "named", "two")), answer["err"]
        outs[name] = pixels(f"{name}.png")
    assert np.array_equal(outs["one"], outs["named"]) and np.array_equal(outs["none"], outs["off"])
    assert not np.array_equal(outs["one"], outs["none"]) and not np.array_equal(outs["one"], outs["two"])


@pytest.mark.parametrize("lora, code, says", [
    ("bad sdxl.safetensors:1", 1, "SDXL"), ("kohia.safetensors", 1, "near: kohya.safetensors"),
    ("kohya.safetensors:nan", 2, "finite"), ("bad cut.safetensors", 1, "incomplete"),
    ("kohya.safetensors:abc", 2, "strength 'abc' is no number"), ("kohya.safetensors:0,8", 2, "'0,8' is no number"),
    ("kohya.safetensors:1e9", 1, "-100 to 100"), ("bad checkpoint.safetensors", 1, "LoRA"),
    ("bad empty.safetensors:0.5", 1, "no "), ("wide.safetensors", 1, "does not fit"),
    ("control.safetensors", 1, "flux-kit run")])
def test_bad_loras(tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: str, code: int, says: str) -> None:
    """The option and its file are named, and no node of the workflow that `generate` is inside."""
    lora_files.write(tmp_path / "loras")
    save_file(lora_files.pairs({"lora_unet_double_blocks_0_img_attn_proj": (3072, 3072)}),
              tmp_path / "loras" / "wide.safetensors")
    answer = generate(capsys, *FAST, "--models", ".", "--lora", lora, "-o", "o.png")
    message = answer["error"]["message"]
    assert (answer["code"], answer["ok"]) == (code, False) and says in message
    assert "--lora" in message and lora.partition(".")[0] in message and "node" not in message
    assert answer["error"]["node"] is None and "tiny_flux" not in message
    assert not (tmp_path / "o.png").exists()
