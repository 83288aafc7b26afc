"""The official templates of Fill, Canny, Depth, Redux, Kontext and USO, on small models under the file names they ask
for: they run, or stop before the run and say what for.

Steps and sizes are smaller than published. What the nodes in them do is compared with core's in tests/hosts/comfyui.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfyui_workflow_templates_json
import numpy as np
import pytest
import torch
from family import DEV, Family, random_weights
from flux_kit.cli import main, session
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.vision import Redux, SiglipVision
from flux_kit.engine.specs import REDUX, SIGLIP
from flux_kit.hosts.standalone import core_conditioning, io
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.workflow import load_workflow
from PIL import Image
from safetensors.torch import save_file

TEMPLATES = Path(comfyui_workflow_templates_json.__file__).parent / "templates"
SIZE = (80, 64)
PICTURES = ("flux_fill_inpaint_example_input_image.png", "flux_fill_outpaint_example_input_image.png",
            "image_flux.1_fill_dev_OneReward_input_image.png", "flux_canny_model_example_input_image.png",
            "flux_depth_lora_example_input_image.png", "flux_redux_model_example_reference_image_1.png",
            "flux_redux_model_example_reference_image_2.png", "flux_kontext_dev_basic_input_image.jpg",
            "flux1_dev_uso_reference_image_gen_input_image.png")
# template -> (what is set, sizes of the pictures it gives)
RUN: dict[str, tuple[list[str], list[tuple[int, int]]]] = {
    "flux_fill_inpaint_example": (["47:3.steps=3"], [SIZE]),
    "flux_fill_outpaint_example": (["3.steps=3", "44.left=16", "44.right=16", "44.bottom=32"], [(112, 96)]),
    "image_flux.1_fill_dev_OneReward": (["108:3.steps=3"], [SIZE, SIZE]),
    "flux_canny_model_example": (["3.steps=3"], [SIZE, SIZE]),
    "flux_redux_model_example": (["17.steps=3", "27.width=64", "27.height=48"], [(64, 48)]),
    "flux_kontext_dev_basic": (["192:31.steps=3"], [(96, 80)]),
}


def lora(*layers: tuple[str, int, int]) -> dict[str, torch.Tensor]:
    """Rank 4: (layer, inputs, outputs)."""
    draw = torch.Generator().manual_seed(8)
    found = {}
    for name, inputs, outputs in layers:
        found[f"{name}.lora_A.weight"] = torch.randn(4, inputs, generator=draw) / 10
        found[f"{name}.lora_B.weight"] = torch.randn(outputs, 4, generator=draw) / 10
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, family: Family) -> Path:
    """A models folder with a family in miniature, and the pictures, under the names that the templates ask for."""
    fill, control = (random_weights(Flux(replace(DEV, in_channels=width)), width) for width in (384, 128))
    vision = replace(SIGLIP, hidden_size=64, num_attention_heads=1, intermediate_size=96, num_hidden_layers=1,
                     image_size=56)
    files = {
        "diffusion_models/flux1-fill-dev": fill, "diffusion_models/flux1-canny-dev": control,
        "diffusion_models/flux.1-fill-dev-OneReward-transformer_fp8": fill,
        "loras/removal_timestep_alpha-2-1740": lora(("double_blocks.0.img_attn.proj", 128, 128)),
        "loras/flux1-depth-dev-lora": lora(("img_in", 128, 128), ("single_blocks.1.linear2", 640, 128)),
        "clip_vision/sigclip_vision_patch14_384": random_weights(SiglipVision(vision), 1),
        "style_models/flux1-redux-dev": random_weights(Redux(replace(REDUX, redux_dim=64, txt_in_features=64)), 2)}
    base = tmp_path_factory.mktemp("base")
    for name, state in files.items():
        (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, base / "models" / f"{name}.safetensors")
    for dev, t5 in (("flux1-dev", "t5xxl_fp16"), ("flux1-dev-fp8", "t5xxl_fp8_e4m3fn_scaled"),
                    ("flux1-dev-kontext_fp8_scaled", "t5xxl_fp16")):
        family.write(base / "models", {"dev": f"{dev}.safetensors", "t5": f"{t5}.safetensors",
                                       "clip_l": "clip_l.safetensors", "vae": "ae.safetensors"})
    (base / "input").mkdir()
    for seed, name in enumerate(PICTURES):
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 10, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize(SIZE)
        if name.endswith("png"):
            picture.putalpha(Image.linear_gradient("L").resize(SIZE))
        picture.save(base / "input" / name)
    return base


def run(name: str, folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> dict[str, Any]:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    code = main(["run", str(TEMPLATES / f"{name}.json"), "--models", str(folder / "models"), "--input",
                 str(folder / "input"), "--out", str(out), "--json", *flags])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (0 if told["ok"] else 1)
    return told


@pytest.mark.parametrize("name", RUN)
def test_a_template_runs(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_conditioning, "KONTEXT_SIZES", [(64, 64), (96, 80), (80, 96)])  # official ones take long
    settings, sizes = RUN[name]
    told = run(name, folder, tmp_path, capsys, *settings)
    assert told["ok"], told
    found = []
    for path in told["images"]:
        with Image.open(path) as picture:
            found.append(picture.size)
            assert np.asarray(picture).std() > 1
    assert sorted(found) == sorted(sizes)


@pytest.mark.parametrize(("name", "words"), [
    ("flux_depth_lora_example", ["LotusConditioning (node 150:41:96; for Lotus, a depth model", "Structure Map"]),
    ("flux1_dev_uso_reference_image_gen", ["ModelPatchLoader (node 112:39; for the projector of USO"])])
def test_a_template_stops_for_models_of_another_kind(name: str, words: list[str], folder: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    told = run(name, folder, tmp_path, capsys)
    assert not told["ok"] and told["error"]["type"] == "BadWorkflow"
    assert all(word in told["error"]["message"] for word in words) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "transformer"), [
    ("flux_fill_inpaint_example", "flux1-fill-dev"), ("flux_canny_model_example", "flux1-canny-dev"),
    ("flux_kontext_dev_basic", "flux1-dev-kontext_fp8_scaled")])
def test_a_template_names_the_files_that_are_missing(name: str, transformer: str, folder: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models").mkdir()
    shutil.copytree(folder / "input", tmp_path / "input")
    told = run(name, tmp_path, tmp_path / "out", capsys)
    assert not told["ok"] and "ae.safetensors" in told["error"]["message"]
    assert transformer in told["error"]["message"] and not (tmp_path / "out").exists()


class Lotus(io.ComfyNode):
    """Stands for the nodes of Lotus while the template is read; none of them runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="LotusConditioning", inputs=[], outputs=[io.Conditioning.Output()])


class FirstSigma(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="SetFirstSigma", inputs=[io.Sigmas.Input("sigmas"), io.Float.Input("sigma")],
                         outputs=[io.Sigmas.Output()])


def test_the_depth_template_runs_with_another_map(folder: Path, tmp_path: Path) -> None:
    """Without Lotus: the picture itself stands for its depth map. A control LoRA on dev."""
    host = StandaloneHost(Folders(models=[folder / "models"], input=[folder / "input"], output=tmp_path), device="cpu")
    session.hosts.use(host)
    nodes = session.node_classes()
    prompt = load_workflow(TEMPLATES / "flux_depth_lora_example.json",
                           {**nodes, "LotusConditioning": Lotus, "SetFirstSigma": FirstSigma}).prompt
    kept = {key: entry for key, entry in prompt.items() if not key.startswith("150:41:")}
    cut = [(key, name) for key, entry in kept.items() for name, value in entry["inputs"].items()
           if isinstance(value, list) and value[0] not in kept]
    assert [kept[key]["class_type"] for key, _ in cut] == ["InstructPixToPixConditioning"]
    for key, name in cut:
        kept[key]["inputs"][name] = ["17", 0]
    (sampler,) = (entry for entry in kept.values() if entry["class_type"] == "KSampler")
    sampler["inputs"]["steps"] = 2
    Executor(nodes).run(kept)
    with Image.open(*host.saved) as picture:
        assert picture.size == SIZE and np.asarray(picture).std() > 1
