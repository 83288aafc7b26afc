"""The node that writes smaller files, in the standalone host."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import lora_files
import pytest
from flux_kit import hosts
from flux_kit.cli import main, session
from flux_kit.engine.convert import RECIPES, quantize
from flux_kit.engine.errors import BadInput, BadModelFile, Interrupted
from flux_kit.engine.text import find_tokenizer
from flux_kit.engine.weights import load
from flux_kit.hosts.standalone.executor import Executor, Result
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost

WIDGETS: dict[str, Any] = {"source": "diffusion_models/flux1-dev.safetensors", "type": "Q8_0", "part": "auto",
                           "name": "", "overwrite": False}


class Bench:
    """A host on a models folder of its own, which tests may write to."""

    def __init__(self, models: Path, base: Path) -> None:
        self.models, self.steps = base / "models", []
        shutil.copytree(models, self.models)
        self.host = StandaloneHost(Folders(models=[self.models, session.TINY_MODELS], output=base), device="cpu",
                                   progress_bar=lambda total: lambda value, _: self.steps.append((value, total)))
        hosts.use(self.host)

    def run(self, **widgets: Any) -> Result:
        executor = Executor(session.node_classes(), check_interrupt=self.host.check_interrupt)
        return executor.run({"q": {"class_type": "FluxKitQuantize", "inputs": {**WIDGETS, **widgets},
                                   "_meta": {"title": "q"}}})

    def baked(self, rows: list[dict[str, Any]], **widgets: Any) -> Result:
        """With a stack of these LoRAs."""
        lora_files.write(self.models / "loras")
        graph: dict[str, Any] = {
            "stack": {"class_type": "FluxKitLoraStack", "inputs": {"rows": json.dumps(rows)},
                      "_meta": {"title": "stack"}},
            "q": {"class_type": "FluxKitQuantize", "inputs": {**WIDGETS, **widgets, "loras": ["stack", 1]},
                  "_meta": {"title": "q"}}}
        return Executor(session.node_classes(), check_interrupt=self.host.check_interrupt).run(graph)

    def files(self) -> set[str]:
        return {path.relative_to(self.models).as_posix() for path in self.models.rglob("*") if path.is_file()}


@pytest.fixture
def bench(models: Path, tmp_path: Path) -> Iterator[Bench]:
    before = hosts._current
    yield Bench(models, tmp_path)
    hosts._current = before


def test_the_file_is_the_quantiser_s_and_the_report_is_shown(bench: Bench, tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    before = bench.files()
    with caplog.at_level(logging.WARNING):
        result = bench.run()
    made = "diffusion_models/flux1-dev-Q8_0.gguf"
    assert bench.files() - before == {made}
    quantize(bench.models / "diffusion_models/flux1-dev.safetensors", tmp_path / "same.gguf", "Q8_0")
    assert (bench.models / made).read_bytes() == (tmp_path / "same.gguf").read_bytes()
    (report,) = result.outputs["q"][0]
    assert str(bench.models / made) in report and "double_blocks.*.img_attn.qkv.weight" in report
    assert result.ui["q"] == {"text": [report]}
    assert [record.getMessage() for record in caplog.records] == report.splitlines()
    values = [value for value, total in bench.steps if total == 100]
    assert values == sorted(set(values)) and values[0] == 0 and values[-1] == 100 and len(values) > 10
    assert "flux1-dev-Q8_0.gguf" in bench.host.list_files("diffusion_models")


@pytest.mark.parametrize(("widgets", "made"), [
    ({"name": "mine"}, "diffusion_models/mine.gguf"),
    ({"name": "mine.gguf"}, "diffusion_models/mine.gguf"),
    ({"type": "fp8_scaled"}, "diffusion_models/flux1-dev-fp8_scaled.safetensors"),
    ({"source": "text_encoders/t5xxl_fp16.safetensors"}, "text_encoders/t5xxl_fp16-Q8_0.gguf"),
    ({"source": "text_encoders\\clip_l.safetensors"}, "text_encoders/clip_l-Q8_0.gguf"),
    ({"source": "checkpoints/flux1-schnell-fp8.safetensors", "part": "t5"},
     "text_encoders/flux1-schnell-fp8-Q8_0.gguf"),
    ({"source": "checkpoints/flux1-schnell-fp8.safetensors", "part": "transformer"},
     "diffusion_models/flux1-schnell-fp8-Q8_0.gguf"),
    ({"source": "diffusion_models/tiny-flux-dev.safetensors"}, "diffusion_models/tiny-flux-dev-Q8_0.gguf"),
])
def test_where_it_goes_and_under_which_name(bench: Bench, widgets: dict[str, Any], made: str) -> None:
    before = bench.files()
    bench.run(**widgets)
    assert bench.files() - before == {made}
    role = "transformer" if made.startswith("diffusion") else "clip_l" if "clip_l" in made else "t5"
    load(bench.models / made, role)
    if role != "transformer":
        assert find_tokenizer(role, bench.models / made).ids("a red circle")


def test_nothing_is_overwritten_unless_asked(bench: Bench) -> None:
    path = bench.models / "diffusion_models" / "mine.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(BadInput, match="already") as caught:
        bench.run(name="mine")
    assert caught.value.node == "q" and path.read_bytes() == b"precious"
    bench.run(name="mine", overwrite=True)
    assert gguf.GGUFReader(path).tensors


@pytest.mark.parametrize("name", ["../out", "/out", "C:out", "a/../../out", "aux", "x\n", "..\\..\\out"])
def test_no_name_leaves_the_folder(bench: Bench, name: str) -> None:
    before = bench.files()
    with pytest.raises(BadInput, match="file name"):
        bench.run(name=name)
    assert bench.files() == before and not list(bench.models.parent.glob("out*"))


def test_a_link_that_leaves_the_folder(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bench.models / "diffusion_models" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(BadInput, match="leaves"):
        bench.run(name="link/out")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(("widgets", "error", "words"), [
    ({"source": "diffusion_models/flux1-dex.safetensors"}, BadInput, "flux1-dev"),
    ({"source": "../../etc/passwd"}, BadInput, "passwd"),
    ({"source": "vae/ae.safetensors"}, BadInput, "ae.safetensors"),
    ({"type": "Q9"}, BadInput, "Q4_K_M"),
    ({"part": "vae"}, BadInput, "clip_l"),
    ({"part": "t5"}, BadModelFile, "T5"),
    ({"name": "out.safetensors"}, BadInput, ".gguf"),
    ({"name": "sub/out"}, BadInput, "no folder"),
    ({"source": "checkpoints/flux1-schnell-fp8.safetensors"}, BadModelFile, "part"),
])
def test_what_cannot_be_is_told(bench: Bench, widgets: dict[str, Any], error: type[Exception], words: str) -> None:
    before = bench.files()
    with pytest.raises(error, match=words):
        bench.run(**widgets)
    assert bench.files() == before


def test_stopping_leaves_nothing(bench: Bench) -> None:
    before = bench.files()
    bench.host._progress_bar = lambda total: lambda value, _: bench.host.interrupt() if value >= 40 else None
    with pytest.raises(Interrupted):
        bench.run()
    assert bench.files() == before


def test_without_a_folder_of_the_user_s_nothing_goes_into_tiny_flux(bench: Bench) -> None:
    tiny = session.TINY_MODELS / "diffusion_models"
    before = sorted(tiny.iterdir())
    bench.host.folders = Folders(models=[session.TINY_MODELS])
    with pytest.raises(BadInput, match="--models"):
        bench.run(source="diffusion_models/tiny-flux-dev.safetensors")
    assert sorted(tiny.iterdir()) == before


def test_the_widget_offers_every_type(bench: Bench) -> None:
    from flux_kit.nodes.quantise import FluxKitQuantize
    inputs = {spec.id: spec for spec in FluxKitQuantize.GET_SCHEMA().inputs}
    assert list(inputs["type"].options) == list(RECIPES)
    assert "checkpoints/flux1-schnell-fp8.safetensors" in FluxKitQuantize.define_schema().inputs[0].options


def test_loras_are_baked_as_on_the_command_line(bench: Bench, tmp_path: Path) -> None:
    rows = [{"lora": "peft.safetensors", "model": -2, "clip": 1}, {"lora": "kohya.safetensors", "on": False}]
    source = "diffusion_models/tiny-flux-dev.safetensors"
    result = bench.baked(rows, source=source, type="Q4_0")
    made, same = bench.models / "diffusion_models/tiny-flux-dev-Q4_0-lora.gguf", tmp_path / "same.gguf"
    lora = bench.models / "loras" / "peft.safetensors"
    assert main(["quantize", str(session.TINY_MODELS / source), str(same), "--type", "Q4_0", "--lora",
                 f"{lora}:-2"]) == 0
    assert made.read_bytes() == same.read_bytes() and "peft.safetensors" in result.outputs["q"][0][0]
    bench.run(source=source, type="Q4_0", name="plain")
    assert (bench.models / "diffusion_models/plain.gguf").read_bytes() != made.read_bytes()


def test_an_empty_stack_bakes_nothing(bench: Bench) -> None:
    bench.baked([], source="text_encoders/clip_l.safetensors", name="stack")
    bench.run(source="text_encoders/clip_l.safetensors", name="plain")
    folder = bench.models / "text_encoders"
    assert (folder / "stack.gguf").read_bytes() == (folder / "plain.gguf").read_bytes()


@pytest.mark.parametrize(("rows", "error", "words"), [
    ([{"lora": "bad sdxl.safetensors"}], BadModelFile, "SDXL"),
    ([{"lora": "kohya.safetensors", "end": 0.5}], BadInput, "cannot hold"),
    ([{"lora": "kohia.safetensors"}], BadInput, "near: kohya")])
def test_loras_that_cannot_be_baked(bench: Bench, rows: list[dict[str, Any]], error: type[Exception], words: str
                                    ) -> None:
    before = sorted((bench.models / "diffusion_models").iterdir())
    with pytest.raises(error, match=words):
        bench.baked(rows, source="diffusion_models/tiny-flux-dev.safetensors")
    assert sorted((bench.models / "diffusion_models").iterdir()) == before
