"""The node that writes LoRA files, in the standalone host."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit import hosts
from flux_kit.cli import session
from flux_kit.engine.adapters import read_lora
from flux_kit.engine.errors import BadInput, FluxKitError, Interrupted
from flux_kit.hosts.standalone.executor import Executor, Result
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from lora_files import good
from safetensors.torch import load_file, save_file
from torch import Tensor

WIDGETS: dict[str, Any] = {"name": "merged", "layout": "kohya", "rank": 0, "dtype": "same", "base": "none"}
TWO = '[{"lora": "kohya.safetensors", "model": 0.5}, {"lora": "peft.safetensors", "model": -1, "on": true}]'


class Bench:
    """A host on a models folder of its own, which tests may write to."""

    def __init__(self, models: Path, base: Path) -> None:
        self.models, self.loras, self.steps = base / "models", base / "models" / "loras", []
        shutil.copytree(models, self.models)
        self.loras.mkdir(exist_ok=True)
        for name, tensors in good().items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, self.loras / f"{name}.safetensors")
        self.host = StandaloneHost(Folders(models=[self.models, session.TINY_MODELS], output=base), device="cpu",
                                   progress_bar=lambda total: lambda value, _: self.steps.append((value, total)))
        hosts.use(self.host)

    def run(self, rows: str = TWO, more: Any = None, **widgets: Any) -> Result:
        """`more`: a node between the stack and the one that saves."""
        graph: dict[str, Any] = {
            "stack": {"class_type": "FluxKitLoraStack", "inputs": {"rows": rows}, "_meta": {"title": "stack"}},
            "save": {"class_type": "FluxKitLoraSave", "inputs": {"loras": ["stack", 1], **WIDGETS, **widgets},
                     "_meta": {"title": "save"}}}
        if more is not None:
            graph["more"] = {"class_type": more[0], "inputs": {"loras": ["stack", 1], **more[1]},
                             "_meta": {"title": "more"}}
            graph["save"]["inputs"]["loras"] = ["more", 0]
        return Executor(session.node_classes(), check_interrupt=self.host.check_interrupt).run(graph)

    def files(self) -> set[str]:
        return {path.relative_to(self.models).as_posix() for path in self.models.rglob("*") if path.is_file()}


@pytest.fixture
def bench(models: Path, tmp_path: Path) -> Iterator[Bench]:
    before = hosts._current
    yield Bench(models, tmp_path)
    hosts._current = before


def change(path: Path, module: str) -> Tensor:
    adapters = [adapter for adapter in read_lora(path).adapters if adapter.destination.module == module]
    size = {"single_blocks.2.linear2": (128, 640), "single_blocks.3.linear2": (128, 640)}[module]
    return sum((adapter.change(torch.zeros(size, dtype=torch.float64)) for adapter in adapters),
               torch.zeros(size, dtype=torch.float64))


def test_a_stack_becomes_one_file(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    before = bench.files()
    with caplog.at_level(logging.WARNING):
        result = bench.run()
    made = bench.loras / "merged.safetensors"
    assert bench.files() - before == {"loras/merged.safetensors"} and "merged.safetensors" in bench.host.list_files(
        "loras")
    for name, file, strength in (("single_blocks.2.linear2", "kohya", 0.5), ("single_blocks.3.linear2", "peft", -1)):
        expected = change(bench.loras / f"{file}.safetensors", name) * strength
        assert float((change(made, name) - expected).norm()) < 1e-6 * float(expected.norm())
    (report,) = result.outputs["save"][0]
    assert "0.5 x kohya.safetensors + -1 x peft.safetensors" in report and result.ui["save"] == {"text": [report]}
    assert set(report.splitlines()) <= {record.getMessage() for record in caplog.records}
    values = [value for value, total in bench.steps if total == 100]
    assert values == sorted(set(values)) and values[0] == 0 and values[-1] == 100 and len(values) > 5


def test_layout_rank_and_type(bench: Bench) -> None:
    bench.run('[{"lora": "kohya.safetensors"}]', name="small", layout="peft", rank=2, dtype="bf16")
    tensors = load_file(bench.loras / "small.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    assert {value.shape[0] for key, value in tensors.items() if "lora_A" in key} == {2}
    assert any(key.startswith("transformer.transformer_blocks.0.attn.to_q.") for key in tensors)


def test_block_weights_go_into_the_file_and_ranges_cannot(bench: Bench) -> None:
    bench.run('[{"lora": "kohya.safetensors", "blocks": "single = 0"}]')
    modules = {adapter.destination.module for adapter in read_lora(bench.loras / "merged.safetensors").adapters}
    assert modules and not any(module.startswith("single") for module in modules)
    before = bench.files()
    with pytest.raises(BadInput, match="cannot hold") as caught:
        bench.run('[{"lora": "kohya.safetensors", "end": 0.5}]', name="other")
    assert caught.value.node == "save" and bench.files() == before


def test_a_base_for_what_needs_one(bench: Bench) -> None:
    torch.manual_seed(0)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.oft_blocks": torch.randn(12, 32, 32) * 0.1, f"{name}.alpha": torch.tensor(0.0)},
              bench.loras / "oft.safetensors")
    with pytest.raises(BadInput, match="--base"):
        bench.run('[{"lora": "oft.safetensors"}]', rank=8)
    result = bench.run('[{"lora": "oft.safetensors"}]', rank=128, base="flux1-dev.safetensors")
    assert "1 layers, rank 128" in result.outputs["save"][0][0]


@pytest.mark.parametrize("name", ["../out", "/out", "C:out", "a/../../out", "aux", "x\n", ""])
def test_no_name_leaves_the_folder(bench: Bench, name: str) -> None:
    before = bench.files()
    with pytest.raises(BadInput, match="file name"):
        bench.run(name=name)
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
        bench.run(rows, **widgets)
    assert {path: path.read_bytes() for path in bench.loras.iterdir()} == before


def test_stopping_leaves_nothing(bench: Bench) -> None:
    before = bench.files()
    bench.host._progress_bar = lambda total: lambda value, _: bench.host.interrupt() if value >= 40 else None
    with pytest.raises(Interrupted):
        bench.run()
    assert bench.files() == before


def test_a_stack_of_another_pack_will_do(bench: Bench) -> None:
    from flux_kit.nodes.lora_files import make
    stack = [("kohya.safetensors", 0.5, 1.0), ("peft.safetensors", 0.0, 0.0)]
    report = make(stack, "other", "kohya", 0, "same", "none")
    assert "0.5 x kohya.safetensors, as kohya" in report and "peft" not in report
    with pytest.raises(BadInput, match="FLUX_LORAS"):
        make("kohya.safetensors", "other", "kohya", 0, "same", "none")
