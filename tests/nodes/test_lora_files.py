"""The node that writes LoRA files, in the standalone host."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench
from flux_kit.engine.adapters import read_lora
from flux_kit.engine.errors import BadInput, FluxKitError, Interrupted
from flux_kit.hosts.standalone.executor import Result
from lora_files import worst_error
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDGETS: dict[str, Any] = {"name": "merged", "layout": "kohya", "rank": 0, "dtype": "same", "base": "none"}
TWO = '[{"lora": "kohya.safetensors", "model": 0.5}, {"lora": "peft.safetensors", "model": -1, "on": true}]'


def saved(bench: Bench, rows: str = TWO, **widgets: Any) -> Result:
    return bench.run({"stack": ("FluxKitLoraStack", {"rows": rows}),
                      "save": ("FluxKitLoraSave", {"loras": ["stack", 1], **WIDGETS, **widgets})})


def change(path: Path, module: str) -> Tensor:
    adapters = [adapter for adapter in read_lora(path).adapters if adapter.destination.module == module]
    size = {"single_blocks.2.linear2": (128, 640), "single_blocks.3.linear2": (128, 640)}[module]
    return sum((adapter.change(torch.zeros(size, dtype=torch.float64)) for adapter in adapters),
               torch.zeros(size, dtype=torch.float64))


def test_a_stack_becomes_one_file(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    before = bench.files()
    with caplog.at_level(logging.WARNING):
        result = saved(bench)
    made = bench.loras / "merged.safetensors"
    assert bench.files() - before == {"loras/merged.safetensors"} and "merged.safetensors" in bench.host.list_files(
        "loras")
    for name, file, strength in (("single_blocks.2.linear2", "kohya", 0.5), ("single_blocks.3.linear2", "peft", -1)):
        expected = change(bench.loras / f"{file}.safetensors", name) * strength
        assert float((change(made, name) - expected).norm()) < 1e-6 * float(expected.norm())
    (report,) = result.outputs["save"][0]
    assert "0.5 x kohya.safetensors + -1 x peft.safetensors" in report and result.ui["save"] == {"text": [report]}
    assert worst_error(report) <= 1e-4
    assert set(report.splitlines()) <= {record.getMessage() for record in caplog.records}
    values = bench.percent()
    assert values == sorted(set(values)) and values[0] == 0 and values[-1] == 100 and len(values) > 5


def test_layout_rank_and_type(bench: Bench) -> None:
    result = saved(bench, '[{"lora": "kohya.safetensors"}]', name="small", layout="peft", rank=2, dtype="bf16")
    assert worst_error(result.outputs["save"][0][0]) > 10  # of rank 4 at random
    tensors = load_file(bench.loras / "small.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert {value.shape[0] for key, value in tensors.items() if "lora_A" in key} == {2}
    assert any(key.startswith("transformer.transformer_blocks.0.attn.to_q.") for key in tensors)


def test_block_weights_go_into_the_file_and_ranges_cannot(bench: Bench) -> None:
    saved(bench, '[{"lora": "kohya.safetensors", "blocks": "single = 0"}]')
    modules = {adapter.destination.module for adapter in read_lora(bench.loras / "merged.safetensors").adapters}
    assert modules and not any(module.startswith("single") for module in modules)
    before = bench.files()
    with pytest.raises(BadInput, match="cannot hold") as caught:
        saved(bench, '[{"lora": "kohya.safetensors", "end": 0.5}]', name="other")
    assert caught.value.node == "save" and bench.files() == before


def test_a_base_for_what_needs_one(bench: Bench) -> None:
    torch.manual_seed(0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.oft_blocks": torch.randn(12, 32, 32) * 0.1, f"{name}.alpha": torch.tensor(0.0)},
              bench.loras / "oft.safetensors")
    with pytest.raises(BadInput, match="--base"):
        saved(bench, '[{"lora": "oft.safetensors"}]', rank=8)
    result = saved(bench, '[{"lora": "oft.safetensors"}]', rank=128, base="flux1-dev.safetensors")
    assert "1 layers, rank 128" in result.outputs["save"][0][0]


@pytest.mark.parametrize("name", ["../out", "/out", "C:out", "a/../../out", "aux", "x\n", ""])
def test_no_name_leaves_the_folder(bench: Bench, name: str) -> None:
    before = bench.files()
    with pytest.raises(BadInput, match="file name"):
        saved(bench, name=name)
    assert bench.files() == before and not list(bench.models.parent.glob("out*"))


@pytest.mark.parametrize(("rows", "widgets", "words"), [
    (TWO, {"name": "kohya"}, "already"), (TWO, {"name": "sub/out"}, "no folder"), (TWO, {"name": "o.gguf"}, "gguf"),
    (TWO, {"base": "flux1-dex.safetensors"}, "flux1-dev"), (TWO, {"layout": "xlabs"}, "kohya"),
    ("[]", {}, "nothing to write"), ('[{"lora": "kohya.safetensors", "model": 0, "clip": 0}]', {}, "nothing to write"),
    ('[{"lora": "lokr.safetensors"}]', {}, "--rank")])
def test_what_cannot_be_is_told_and_leaves_nothing(bench: Bench, rows: str, widgets: dict[str, Any],
                                                   words: str) -> None:
    before = {path: path.read_bytes() for path in bench.loras.iterdir()}
    with pytest.raises(FluxKitError, match=words):
        saved(bench, rows, **widgets)
    assert {path: path.read_bytes() for path in bench.loras.iterdir()} == before


def test_stopping_leaves_nothing(bench: Bench) -> None:
    before = bench.files()
    bench.stop_at(40)
    with pytest.raises(Interrupted):
        saved(bench)
    assert bench.files() == before


def test_a_stack_of_another_pack_will_do(bench: Bench) -> None:
    from flux_kit.nodes.lora_files import make
    stack = [("kohya.safetensors", 0.5, 1.0), ("peft.safetensors", 0.0, 0.0)]
    report = make(stack, "other", "kohya", 0, "same", "none")
    assert "0.5 x kohya.safetensors, as kohya" in report and "peft" not in report
    with pytest.raises(BadInput, match="FLUX_LORAS"):
        make("kohya.safetensors", "other", "kohya", 0, "same", "none")
