"""`flux-kit quantize`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family import Family
from flux_kit.cli import main
from flux_kit.cli.parser import PARTS
from flux_kit.engine.convert import RECIPES, ROLES
from safetensors.torch import save_file


def test_a_file_is_made_and_described(models: Path, family: Family, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    source, target = models / "diffusion_models" / "flux1-dev.safetensors", tmp_path / "out.gguf"
    assert main(["quantize", str(source), str(target), "--type", "q4_k_m", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == "" and told["ok"] and (told["path"], told["role"], told["type"]) == (
        str(target), "transformer", "Q4_K_M")
    assert told["bytes_after"] == target.stat().st_size < told["bytes_before"]
    assert sum(told["types"].values()) == len(family.dev) and 0 < told["relative_error"] < 0.1
    assert told["worst"][0]["relative_error"] >= told["worst"][-1]["relative_error"] > 0
    assert sum(layer["parameters"] for layer in told["layers"]) == sum(t.numel() for t in family.dev.values())
    assert main(["inspect", str(target), "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert (file["role"], file["precision"]) == ("transformer", told["types"])


def test_lines_for_people(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = models / "text_encoders" / "t5xxl_fp16.safetensors"
    assert main(["quantize", str(source), str(tmp_path / "t5.gguf"), "--type", "Q8_0"]) == 0
    out, err = capsys.readouterr()
    assert "t5 as Q8_0" in out and "shared.weight" in out and "farthest from the original" in out and err == ""


def test_a_tokenizer_beside_the_file_goes_along(family: Family, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    from flux_kit.engine.text import find_tokenizer
    folder = tmp_path / "pipeline"
    (folder / "text_encoder_2").mkdir(parents=True)
    (folder / "tokenizer_2").mkdir()
    save_file(family.t5, folder / "text_encoder_2" / "model.safetensors")
    (folder / "tokenizer_2" / "tokenizer.json").write_text(family.words["t5"], encoding="utf-8")
    assert main(["quantize", str(folder / "text_encoder_2"), str(tmp_path / "t5.gguf"), "--type", "Q8_0"]) == 0
    assert find_tokenizer("t5", tmp_path / "t5.gguf").ids("a red circle") == find_tokenizer(
        "t5", folder / "text_encoder_2" / "model.safetensors").ids("a red circle")
    alone = tmp_path / "alone.safetensors"
    save_file(family.t5, alone)
    capsys.readouterr()
    assert main(["quantize", str(alone), str(tmp_path / "alone.gguf"), "--type", "Q8_0"]) == 0
    assert "no tokenizer goes along" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "type", "code", "words"), [
    ("out.gguf", "Q4_K_X", 2, "Q4_K_M"), ("out.safetensors", "Q4_0", 2, ".gguf"),
    ("out.gguf", "fp8_scaled", 2, ".safetensors"), ("there.gguf", "Q8_0", 1, "--force"),
    ("no/out.gguf", "Q8_0", 1, "no folder")])
def test_what_cannot_be_is_one_line(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str,
                                    type: str, code: int, words: str) -> None:
    (tmp_path / "there.gguf").write_bytes(b"precious")
    source = models / "diffusion_models" / "flux1-dev.safetensors"
    assert main(["quantize", str(source), str(tmp_path / target), "--type", type]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_a_source_of_another_kind_or_damaged(models: Path, family: Family, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(models / "vae" / "ae.safetensors"), str(tmp_path / "o.gguf"), "--type", "Q8_0"]) == 1
    assert "autoencoder" in capsys.readouterr().err
    bad = {**family.dev, "img_in.bias": torch.full_like(family.dev["img_in.bias"], torch.nan)}
    save_file(bad, tmp_path / "bad.safetensors")
    assert main(["quantize", str(tmp_path / "bad.safetensors"), str(tmp_path / "o.gguf"), "--type", "Q8_0",
                 "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["type"] == "NotFinite" and "img_in.bias" in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_help_names_every_type_and_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    words = capsys.readouterr().out.replace("(", " ").replace(")", " ").replace(",", " ").split()
    assert set(RECIPES) <= set(words) and set(PARTS) == set(ROLES)
