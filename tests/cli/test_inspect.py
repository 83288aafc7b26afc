"""`flux-kit inspect` and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from family import Family
from flux_kit.cli import main
from safetensors.torch import save_file

KEYS = {"path", "role", "variant", "layout", "precision", "parameters", "bytes", "parts", "missing", "metadata",
        "problems", "absent", "memory"}


def inspect(capsys: pytest.CaptureFixture[str], *paths: Path) -> tuple[int, list[dict[str, Any]], str]:
    code = main(["inspect", "--json", *map(str, paths)])
    out, err = capsys.readouterr()
    return code, json.loads(out)["files"], err


def test_every_part_is_told(models: Path, family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {"diffusion_models/flux1-dev.safetensors": ("transformer", "dev", "bfl", family.dev),
             "diffusion_models/flux1-schnell.safetensors": ("transformer", "schnell", "bfl", family.schnell),
             "text_encoders/t5xxl_fp16.safetensors": ("t5", None, "hf", family.t5),
             "text_encoders/clip_l.safetensors": ("clip_l", None, "hf", family.clip_l),
             "vae/ae.safetensors": ("vae", None, "bfl", family.vae)}
    code, files, err = inspect(capsys, *(models / name for name in cases))
    assert (code, err) == (0, "")
    for file, (name, (role, variant, layout, state)) in zip(files, cases.items(), strict=True):
        assert set(file) >= KEYS and file["path"] == str(models / name)
        assert (file["role"], file["variant"], file["layout"]) == (role, variant, layout)
        assert file["precision"] == {"F16": len(state)}
        assert file["parameters"] == sum(tensor.numel() for tensor in state.values())
        assert file["bytes"] == 2 * file["parameters"] and file["missing"] == file["problems"] == []
    assert "tokenizer.json" in files[2]["metadata"]


def test_an_all_in_one_lists_its_parts(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (file,), _ = inspect(capsys, models / "checkpoints" / "flux1-schnell-fp8.safetensors")
    assert (code, file["role"], file["variant"]) == (0, "all-in-one", "schnell")
    assert {part["role"] for part in file["parts"]} == {"transformer", "t5", "clip_l", "vae"} == set(file["memory"])
    for key in ("parameters", "bytes", "tensors"):
        assert sum(part[key] for part in file["parts"]) == file.get(key, sum(file["precision"].values()))
    assert file["absent"] == []


def test_what_a_file_lacks_and_the_memory_it_takes(models: Path, family: Family,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    path = models / "diffusion_models" / "flux1-dev.safetensors"
    code, (file,), _ = inspect(capsys, path)
    assert (code, file["absent"]) == (0, ["clip_l", "t5", "vae"])
    weights = sum(tensor.numel() for tensor in family.dev.values())
    assert file["memory"] == {"transformer": 2 * weights}  # fp16 there, bf16 in memory
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "not inside: CLIP-L, T5, autoencoder (VAE)" in out and "memory for weights: transformer" in out
    code, (file,), _ = inspect(capsys, models / "vae" / "ae.safetensors")
    assert (code, file["absent"]) == (0, [])


def test_hostile_names_stay_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"\x1b[2J\n\u202e": torch.zeros(3)}, path, {"key\n\x1b]0;title\x07" + "k" * 999: "v\r\n" * 500})
    assert main(["inspect", str(path)]) == 1
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).splitlines()) and len(out.splitlines()) < 10
    assert max(map(len, out.splitlines())) < 700


def test_a_block_of_an_endless_number_is_one_unknown_tensor(family: Family, tmp_path: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.safetensors"
    save_file({**family.dev, f"double_blocks.{'1' * 5000}.img_attn.qkv.weight": torch.zeros(1, 1)}, path)
    code, (file,), _ = inspect(capsys, path)
    assert code == 1 and "1 tensors are unknown" in file["problems"][0] and file["memory"]["transformer"] > 0


def test_a_refused_file_is_exit_code_1_and_the_others_are_told(models: Path, family: Family, tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    good = models / "vae" / "ae.safetensors"
    holes = {name: tensor for name, tensor in family.vae.items() if name != "decoder.conv_out.weight"}
    save_file(holes, tmp_path / "holes.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:5000])
    save_file({"some.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    names = ["holes.safetensors", "cut.safetensors", "other.safetensors", "absent.safetensors"]
    code, files, err = inspect(capsys, good, *(tmp_path / name for name in names))
    assert code == 1 and err.count("\n") == 4
    assert files[0]["problems"] == [] and all(file["problems"] for file in files[1:])
    assert files[1]["missing"] == ["decoder.conv_out.weight"]
    assert [file["role"] for file in files] == ["vae", "vae", "unknown", "unknown", "unknown"]
    for name, line in zip(names, err.splitlines(), strict=True):
        assert name in line


def test_lines_for_people(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(models / "vae" / "ae.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "autoencoder" in out and "1.27 million parameters" in out and "F16" in out


def test_doctor(tiny_models: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--models", str(models), "--device", "cpu"]) == 0
    answer = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in answer["checks"]}
    assert answer["ok"] and checks["torch"]["detail"] == torch.__version__
    assert "float32" in checks["device"]["detail"] and str(models) in checks["vae"]["detail"]
    assert checks["tiny-flux"]["status"] == "ok"


def test_doctor_finds_what_is_wrong(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    from flux_kit.cli import session
    monkeypatch.setattr(session, "TINY_MODELS", tmp_path)
    assert main(["doctor", "--device", "cuda:77"]) == 1
    out, err = capsys.readouterr()
    assert "problem  device" in out and "problem  tiny-flux" in out and err.count("\n") == 2


def test_a_lora_is_told_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lora_files.write(tmp_path / "loras")
    code, (file,), err = inspect(capsys, folder / "kohya.safetensors")
    assert (code, err, file["role"]) == (0, "", "lora") and set(file) >= KEYS
    assert [file[key] for key in ("format", "rank", "alpha", "matched", "unmatched", "skipped", "problems")] == [
        "kohya", 4, 2.0, 15, 0, [], []]
    code, (file,), _ = inspect(capsys, folder / "bad unknown.safetensors")
    assert (code, file["matched"], file["unmatched"]) == (0, 15, 1)
    assert main(["inspect", str(folder / "peft.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "format PEFT, rank 4, alpha none, effective scale 1" in out and "12 tensors matched, 0 unknown" in out


@pytest.mark.parametrize("name, says", [("bad sdxl", "SDXL"), ("bad sd3", "SD3"), ("bad flux2", "FLUX.2"),
                                        ("bad halves", "half of a pair"), ("bad ranks", "ranks differ"),
                                        ("bad cut", "incomplete"), ("bad empty", "without tensors")])
def test_a_bad_lora_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, says: str) -> None:
    path = lora_files.write(tmp_path / "loras") / f"{name}.safetensors"
    code, (file,), err = inspect(capsys, path)
    assert code == 1 and says in file["problems"][0] and f"{name}.safetensors" in err
