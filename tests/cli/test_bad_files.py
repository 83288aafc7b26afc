"""Model files that cannot be used: one clear line that names the file, exit code 1, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family import DEV, Family, random_weights
from flux_kit.cli import main
from flux_kit.engine.models.flux import Flux
from safetensors.torch import save_file


def truncated(family: Family, path: Path) -> None:
    save_file(family.dev, path)
    path.write_bytes(path.read_bytes()[:-1000])


def wrong_role(family: Family, path: Path) -> None:
    save_file(family.vae, path)


def wrong_shape(family: Family, path: Path) -> None:
    save_file({**family.dev, "img_in.bias": torch.zeros(64).half()}, path)


def missing_tensor(family: Family, path: Path) -> None:
    save_file({name: tensor for name, tensor in family.dev.items() if name != "time_in.in_layer.weight"}, path)


def nan_in_a_norm(family: Family, path: Path) -> None:
    name = "double_blocks.0.img_attn.norm.query_norm.scale"
    save_file({**family.dev, name: torch.full_like(family.dev[name], float("nan"))}, path)


def nan_in_a_large_weight(family: Family, path: Path) -> None:
    """Not looked at when the file is opened: a real one has 24 GB of them."""
    name = "single_blocks.0.linear1.weight"
    save_file({**family.dev, name: torch.full_like(family.dev[name], float("nan"))}, path)


def fill_model(family: Family, path: Path) -> None:
    save_file(random_weights(Flux(replace(DEV, in_channels=384)), 9), path)


def text_file(family: Family, path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 23802932552\n")


def empty_file(family: Family, path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(("make", "words"), [
    (truncated, "m.safetensors"), (wrong_role, "autoencoder"), (wrong_shape, "img_in.bias"),
    (missing_tensor, "time_in.in_layer.weight"), (nan_in_a_norm, "query_norm"), (fill_model, "Fill"),
    (text_file, "m.safetensors"), (empty_file, "m.safetensors")])
def test_a_bad_transformer_is_named(family: Family, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str], make: Callable[[Family, Path], None],
                                    words: str) -> None:
    monkeypatch.chdir(tmp_path)
    make(family, tmp_path / "m.safetensors")
    assert main(["generate", "x", "--model", "m.safetensors", "-o", "o.png", "--json", "--steps", "1"]) == 1
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert "m.safetensors" in error["message"] and words in error["message"]
    assert error["file"] is not None and Path(error["file"]).name == "m.safetensors"
    refusal = [line for line in err.splitlines() if "took" not in line]
    assert refusal == [f"flux-kit: {error['message']}"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("option", ["--t5", "--clip", "--vae"])
def test_a_part_of_the_wrong_role_is_named(models: Path, tiny_models: Path, tmp_path: Path, option: str,
                                           monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    other = models / "diffusion_models" / "flux1-dev.safetensors"
    assert main(["generate", "x", option, str(other), "-o", "o.png"]) == 1
    err = capsys.readouterr().err
    assert "flux1-dev.safetensors" in err and "transformer" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_names_the_option(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "x", "--model", "absent.safetensors", "-o", "o.png"]) == 1
    err = capsys.readouterr().err
    assert "--model absent.safetensors" in err and err.count("\n") == 1


def test_nan_in_the_middle_of_a_run_stops_it(family: Family, tiny_models: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    nan_in_a_large_weight(family, tmp_path / "m.safetensors")
    assert main(["generate", "x", "--model", "m.safetensors", "-o", "o.png", "--json", "--steps", "3"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "NotFinite" and "step 1 of 3" in error["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("option", ["--t5", "--clip"])
def test_an_sdxl_encoder_is_named_in_either_place(tiny_models: Path, tmp_path: Path, option: str,
                                                  monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"text_model.encoder.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    names += ["text_model.embeddings.token_embedding.weight"]
    save_file({name: torch.zeros(1280, 1280).half() for name in names}, "g.safetensors")
    assert main(["generate", "x", option, "g.safetensors", "-o", "o.png", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert Path(error["file"]).name == "g.safetensors" and "SDXL" in error["message"]
