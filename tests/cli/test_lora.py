"""`flux-kit lora`, and LoRAs put into the weights by `flux-kit quantize`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family import Family
from flux_kit.cli import main
from flux_kit.cli.parser import LAYOUTS, LORA_DTYPES, build_parser
from flux_kit.engine.adapters import read_lora
from flux_kit.engine.convert import lora_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

H = 128
QKV, LINEAR2 = "double_blocks.0.img_attn.qkv", "single_blocks.3.linear2"


def exact(rows: int, width: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors of few digits, so that sums of their products are exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randint(-2, 3, (rank, width), generator=generator) / 16
    return down, torch.randint(-2, 3, (rows, rank), generator=generator) / 16


@pytest.fixture()
def lora(tmp_path: Path) -> Path:
    tensors: dict[str, Tensor] = {}
    for i, (name, rows, width) in enumerate(((QKV, 3 * H, H), (LINEAR2, H, 5 * H))):
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = exact(rows, width, 4, i)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    path = tmp_path / "blue.safetensors"
    save_file({key: value.contiguous().half() for key, value in tensors.items()}, path,
              {"modelspec.title": "Blue", "ss_network_dim": "4"})
    return path


def deltas(path: Path) -> dict[str, Tensor]:
    """The change of each layer, by hand from kohya's keys."""
    tensors = load_file(path)
    found = {}
    for name in (QKV, LINEAR2):
        stem = "lora_unet_" + name.replace(".", "_")
        down, up = tensors[f"{stem}.lora_down.weight"].double(), tensors[f"{stem}.lora_up.weight"].double()
        found[name] = float(tensors[f"{stem}.alpha"]) / len(down) * up @ down
    return found


def test_there_and_back(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peft, back = tmp_path / "peft.safetensors", tmp_path / "back.safetensors"
    assert main(["lora", "convert", str(lora), str(peft), "--to", "peft", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == "" and told["ok"] and (told["path"], told["layout"], told["dtype"]) == (str(peft), "peft", "F16")
    assert told["relative_error"] == 0 and told["ranks"] == [4] and told["bytes"] == peft.stat().st_size
    assert told["from"] == [{"file": "blue.safetensors", "strength": 1.0}] and told["worst"] == []
    assert {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
            "transformer.single_transformer_blocks.3.proj_out.lora_B.weight"} <= set(load_file(peft))
    assert main(["lora", "convert", str(peft), str(back), "--to", "kohya", "--dtype", "fp32"]) == 0
    out, err = capsys.readouterr()
    assert "exact" in out and "as kohya, F32" in out and err == ""
    for name, value in deltas(lora).items():
        assert torch.equal(deltas(back)[name], value)
    with safe_open(back, "pt") as file:
        assert file.metadata()["modelspec.title"] == "Blue"


def test_a_merge_and_a_smaller_rank(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "red.safetensors"
    save_file({key: value.flip(-1).contiguous() if value.ndim else value for key, value in load_file(lora).items()},
              other)
    merged, small = tmp_path / "merged.safetensors", tmp_path / "small.safetensors"
    assert main(["lora", "merge", f"{lora}:0.75", f"{other}:-0.5", str(merged), "--dtype", "fp32"]) == 0
    assert "0.75 x blue.safetensors + -0.5 x red.safetensors" in capsys.readouterr().out
    total = {name: 0.75 * deltas(lora)[name] - 0.5 * deltas(other)[name] for name in (QKV, LINEAR2)}
    for name, value in total.items():
        assert torch.allclose(deltas(merged)[name], value, rtol=0, atol=1e-6)
    assert main(["lora", "resize", str(merged), str(small), "--rank", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    off = sum(float((deltas(small)[name] - value).square().sum()) for name, value in total.items())
    best = sum(float(torch.linalg.svdvals(value)[3:].square().sum()) for value in total.values())
    whole = sum(float(value.square().sum()) for value in total.values())
    assert off == pytest.approx(best, rel=1e-4)
    assert told["relative_error"] == pytest.approx((off / whole) ** 0.5, rel=1e-4) and told["ranks"] == [3]
    assert [layer["ranks"] for layer in told["layers"]] == [[3], [3]] and len(told["worst"]) == 2


def test_lines_show_the_error_by_kind_and_the_worst(lora: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora", "resize", str(lora), str(tmp_path / "o.safetensors"), "--rank", "1"]) == 0
    out = capsys.readouterr().out
    assert "lora_unet_double_blocks_*_img_attn_qkv" in out and "farthest" in out and "%" in out


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["convert", "blue.safetensors", "o.safetensors"], 2, "--to"),
    (["convert", "blue.safetensors", "o.safetensors", "--to", "xlabs"], 2, "xlabs"),
    (["resize", "blue.safetensors", "o.safetensors"], 2, "--rank"),
    (["resize", "blue.safetensors", "o.safetensors", "--rank", "0"], 2, "below 1"),
    (["merge", "blue.safetensors:inf", "o.safetensors"], 2, "finite"),
    (["merge", "o.safetensors"], 2, "DST"),
    (["bake"], 2, "bake"),
    (["convert", "none.safetensors", "o.safetensors", "--to", "peft"], 1, "none.safetensors"),
    (["convert", "blue.safetensors", "o.gguf", "--to", "peft"], 1, ".safetensors"),
    (["convert", "blue.safetensors", "there.safetensors", "--to", "peft"], 1, "--force"),
    (["convert", "blue.safetensors", "blue.safetensors", "--to", "peft", "--force"], 1, "same file"),
    (["convert", "ae.safetensors", "o.safetensors", "--to", "peft"], 1, "LoRA"),
    (["convert", "full.safetensors", "o.safetensors", "--to", "peft"], 1, "--rank"),
    (["resize", "oft.safetensors", "o.safetensors", "--rank", "4"], 1, "--base"),
    (["resize", "oft.safetensors", "o.safetensors", "--rank", "4", "--base", "ae.safetensors"], 1, "autoencoder")])
def test_what_cannot_be_is_one_line(lora: Path, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int,
                                    words: str) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(family.vae, "ae.safetensors")
    Path("there.safetensors").write_bytes(b"precious")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.diff": torch.randn(3 * H, H)}, "full.safetensors")
    save_file({f"{name}.oft_blocks": torch.randn(12, 32, 32), f"{name}.alpha": torch.tensor(0.0)}, "oft.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["lora", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_base_makes_what_depends_on_it_a_lora(family: Family, models: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    torch.manual_seed(0)
    save_file({f"{name}.oft_blocks": torch.randn(12, 32, 32) * 0.1, f"{name}.alpha": torch.tensor(0.0)},
              tmp_path / "oft.safetensors")
    base = models / "diffusion_models" / "flux1-dev.safetensors"
    assert main(["lora", "resize", str(tmp_path / "oft.safetensors"), str(tmp_path / "o.safetensors"), "--rank", "128",
                 "--dtype", "fp32", "--base", str(base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["relative_error"] < 1e-5
    (adapter,) = read_lora(tmp_path / "oft.safetensors").adapters
    expected = adapter.change(family.dev[f"{QKV}.weight"].double())
    (made,) = read_lora(tmp_path / "o.safetensors").adapters
    assert float((made.change(torch.zeros_like(expected)) - expected).norm()) < 1e-5 * float(expected.norm())


def test_the_grammar_names_what_the_engine_knows() -> None:
    assert LAYOUTS == lora_files.LAYOUTS and set(LORA_DTYPES) == {"same", *lora_files.DTYPES}
    parse = build_parser().parse_args
    assert parse(["lora", "merge", r"C:\a.safetensors", "b:-0.5", "o"]).loras == [
        (Path(r"C:\a.safetensors"), 1.0), (Path("b"), -0.5)]


@pytest.mark.parametrize(("type", "suffix"), [("F16", "gguf"), ("Q8_0", "gguf"), ("Q4_K_M", "gguf"),
                                              ("fp8_scaled", "safetensors")])
def test_baking_equals_quantising_what_was_merged_by_hand(family: Family, lora: Path, tmp_path: Path, type: str,
                                                          suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = {name: tensor.float() for name, tensor in family.dev.items()}
    by_hand = dict(base)
    for name, value in deltas(lora).items():
        by_hand[f"{name}.weight"] = base[f"{name}.weight"] + (0.5 * value).float()
    save_file(base, tmp_path / "base.safetensors")
    save_file(by_hand, tmp_path / "hand.safetensors")
    made, expected = tmp_path / f"made.{suffix}", tmp_path / f"expected.{suffix}"
    assert main(["quantize", str(tmp_path / "base.safetensors"), str(made), "--type", type, "--lora", f"{lora}:0.5",
                 "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["loras"] == [{"file": "blue.safetensors", "strength": 0.5, "layers": 2, "skipped": []}]
    assert main(["quantize", str(tmp_path / "hand.safetensors"), str(expected), "--type", type]) == 0
    assert made.read_bytes() == expected.read_bytes()
    assert main(["quantize", str(tmp_path / "base.safetensors"), str(expected), "--type", type, "--force"]) == 0
    assert made.read_bytes() != expected.read_bytes()


def test_baking_into_a_file_of_the_same_type_changes_only_its_layers(models: Path, lora: Path, tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """Packed rows are passed on as they are, but not those of a changed layer."""
    import gguf
    source, first, second = (models / "diffusion_models" / "flux1-dev.safetensors", tmp_path / "a.gguf",
                             tmp_path / "b.gguf")
    assert main(["quantize", str(source), str(first), "--type", "Q8_0"]) == 0
    capsys.readouterr()
    assert main(["quantize", str(first), str(second), "--type", "Q8_0", "--lora", str(lora)]) == 0
    assert "blue.safetensors at 1 was put into 2 layers" in capsys.readouterr().out
    before, after = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (first, second))
    assert {name for name in before if (before[name].data != after[name].data).any()} == {
        f"{QKV}.weight", f"{LINEAR2}.weight"}
    value = gguf.quants.dequantize(after[f"{QKV}.weight"].data, after[f"{QKV}.weight"].tensor_type)
    base = gguf.quants.dequantize(before[f"{QKV}.weight"].data, before[f"{QKV}.weight"].tensor_type)
    moved = torch.from_numpy(value - base).double()
    assert float((moved - deltas(lora)[QKV]).norm()) < 0.1 * float(deltas(lora)[QKV].norm())


def test_of_norms_replaced_twice_the_later_is_baked(models: Path, lora: Path, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    norm, made = "double_blocks.0.img_attn.norm.query_norm", tmp_path / "made.gguf"
    files = [tmp_path / name for name in ("three.safetensors", "five.safetensors")]
    for file, value in zip(files, (3.0, 5.0), strict=True):
        save_file({f"{norm}.scale": torch.full((H,), value)}, file)
    source = models / "diffusion_models" / "flux1-dev.safetensors"
    assert main(["quantize", str(source), str(made), "--type", "F16", "--json",
                 *(flag for file in files for flag in ("--lora", str(file)))]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["skipped"] for row in told["loras"]] == [
        [[norm, "five.safetensors, later in the stack, replaces it too"]], []]
    import gguf
    scale, = (tensor.data for tensor in gguf.GGUFReader(made).tensors if tensor.name == f"{norm}.scale")
    assert (scale == 5).all()


def test_baking_refuses_what_matches_nothing(models: Path, lora: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    t5 = models / "text_encoders" / "t5xxl_fp16.safetensors"
    target = tmp_path / "o.gguf"
    assert main(["quantize", str(t5), str(target), "--type", "Q8_0", "--lora", f"{lora}:1"]) == 1
    assert "nothing of it fits" in capsys.readouterr().err and not target.exists()
    some = {**load_file(lora), "lora_unet_guidance_in_in_layer.lora_down.weight": torch.ones(4, 256),
            "lora_unet_guidance_in_in_layer.lora_up.weight": torch.ones(H, 4)}
    save_file(some, tmp_path / "some.safetensors")
    source = models / "diffusion_models" / "flux1-schnell.safetensors"
    assert main(["quantize", str(source), str(target), "--type", "Q8_0", "--lora", str(tmp_path / "some.safetensors"),
                 "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["loras"]
    assert told["layers"] == 2 and told["skipped"] == [["guidance_in.in_layer", "not in this model"]]
