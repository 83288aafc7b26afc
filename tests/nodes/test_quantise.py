"""The node that writes smaller files, in the standalone host."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
from bench import Bench
from flux_kit.cli import main, session
from flux_kit.engine.convert import RECIPES, quantize
from flux_kit.engine.errors import BadInput, BadModelFile, Interrupted
from flux_kit.engine.text import find_tokenizer
from flux_kit.engine.weights import load
from flux_kit.hosts.standalone.executor import Result
from flux_kit.hosts.standalone.folders import Folders
from prompts import Nodes

WIDGETS: dict[str, Any] = {"source": "diffusion_models/flux1-dev.safetensors", "type": "Q8_0", "part": "auto",
                           "name": "", "overwrite": False}


def quantised(bench: Bench, rows: list[dict[str, Any]] | None = None, **widgets: Any) -> Result:
    """`rows`: of a stack of LoRAs that is connected."""
    nodes: Nodes = {"q": ("FluxKitQuantize", {**WIDGETS, **widgets})}
    if rows is not None:
        nodes["stack"] = "FluxKitLoraStack", {"rows": json.dumps(rows)}
        nodes["q"][1]["loras"] = ["stack", 1]
    return bench.run(nodes)


def test_the_file_is_the_quantiser_s_and_the_report_is_shown(bench: Bench, tmp_path: Path,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    before = bench.files()
    with caplog.at_level(logging.WARNING):
        result = quantised(bench)
    made = "diffusion_models/flux1-dev-Q8_0.gguf"
    assert bench.files() - before == {made}
    quantize(bench.models / "diffusion_models/flux1-dev.safetensors", tmp_path / "same.gguf", "Q8_0")
    assert (bench.models / made).read_bytes() == (tmp_path / "same.gguf").read_bytes()
    (report,) = result.outputs["q"][0]
    assert str(bench.models / made) in report and "double_blocks.*.img_attn.qkv.weight" in report
    assert result.ui["q"] == {"text": [report]}
    assert [record.getMessage() for record in caplog.records] == report.splitlines()
    values = bench.percent()
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
    quantised(bench, **widgets)
    assert bench.files() - before == {made}
    role = "transformer" if made.startswith("diffusion") else "clip_l" if "clip_l" in made else "t5"
    load(bench.models / made, role)
    if role != "transformer":
        assert find_tokenizer(role, bench.models / made).ids("a red circle")


def test_nothing_is_overwritten_unless_asked(bench: Bench) -> None:
    path = bench.models / "diffusion_models" / "mine.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(BadInput, match="already") as caught:
        quantised(bench, name="mine")
    assert caught.value.node == "q" and path.read_bytes() == b"precious"
    quantised(bench, name="mine", overwrite=True)
    assert gguf.GGUFReader(path).tensors


@pytest.mark.parametrize("name", ["../out", "/out", "C:out", "a/../../out", "aux", "x\n", "..\\..\\out"])
def test_no_name_leaves_the_folder(bench: Bench, name: str) -> None:
    before = bench.files()
    with pytest.raises(BadInput, match="file name"):
        quantised(bench, name=name)
    assert bench.files() == before and not list(bench.models.parent.glob("out*"))


def test_a_link_that_leaves_the_folder(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (bench.models / "diffusion_models" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(BadInput, match="leaves"):
        quantised(bench, name="link/out")
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
        quantised(bench, **widgets)
    assert bench.files() == before


def test_stopping_leaves_nothing(bench: Bench) -> None:
    before = bench.files()
    bench.stop_at(40)
    with pytest.raises(Interrupted):
        quantised(bench)
    assert bench.files() == before


def test_without_a_folder_of_the_user_s_nothing_goes_into_tiny_flux(bench: Bench) -> None:
    tiny = session.TINY_MODELS / "diffusion_models"
    before = sorted(tiny.iterdir())
    bench.host.folders = Folders(models=[session.TINY_MODELS])
    with pytest.raises(BadInput, match="--models"):
        quantised(bench, source="diffusion_models/tiny-flux-dev.safetensors")
    assert sorted(tiny.iterdir()) == before


def test_the_widget_offers_every_type(bench: Bench) -> None:
    from flux_kit.nodes.quantise import FluxKitQuantize
    inputs = {spec.id: spec for spec in FluxKitQuantize.GET_SCHEMA().inputs}
    assert list(inputs["type"].options) == list(RECIPES)
    assert "checkpoints/flux1-schnell-fp8.safetensors" in FluxKitQuantize.define_schema().inputs[0].options


def test_loras_are_baked_as_on_the_command_line(bench: Bench, tmp_path: Path) -> None:
    rows = [{"lora": "peft.safetensors", "model": -2, "clip": 1}, {"lora": "kohya.safetensors", "on": False}]
    source = "diffusion_models/tiny-flux-dev.safetensors"
    result = quantised(bench, rows, source=source, type="Q4_0")
    made, same = bench.models / "diffusion_models/tiny-flux-dev-Q4_0-lora.gguf", tmp_path / "same.gguf"
    lora = bench.models / "loras" / "peft.safetensors"
    assert main(["quantize", str(session.TINY_MODELS / source), str(same), "--type", "Q4_0", "--lora",
                 f"{lora}:-2"]) == 0
    assert made.read_bytes() == same.read_bytes() and "peft.safetensors" in result.outputs["q"][0][0]
    quantised(bench, source=source, type="Q4_0", name="plain")
    assert (bench.models / "diffusion_models/plain.gguf").read_bytes() != made.read_bytes()


def test_an_empty_stack_bakes_nothing(bench: Bench) -> None:
    quantised(bench, [], source="text_encoders/clip_l.safetensors", name="stack")
    quantised(bench, source="text_encoders/clip_l.safetensors", name="plain")
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
        quantised(bench, rows, source="diffusion_models/tiny-flux-dev.safetensors")
    assert sorted((bench.models / "diffusion_models").iterdir()) == before
