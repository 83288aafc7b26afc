"""The official FLUX.1 text-to-image templates, as published, on the miniature family under the names they ask for."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfyui_workflow_templates_json
import numpy as np
import pytest
import torch
from family import Family
from flux_kit.cli import main
from flux_kit.engine.sampling import Denoiser, make_sigmas, process_out, table_for
from flux_kit.engine.text import TextEncoders, find_tokenizer
from flux_kit.engine.weights import load
from flux_kit.hosts.standalone.png import read_text
from PIL import Image

TEMPLATES = Path(comfyui_workflow_templates_json.__file__).parent / "templates"
NAMES = {"dev": "flux1-dev.safetensors", "schnell": "flux1-schnell.safetensors", "t5": "t5xxl_fp16.safetensors",
         "clip_l": "clip_l.safetensors", "vae": "ae.safetensors", "all-in-one": "flux1-schnell-fp8.safetensors"}
# template -> (ids of its sampler and its size node, transformer, whether that is an all-in-one)
CASES = {
    "flux_dev_full_text_to_image": ("194:50", "194:48", "diffusion_models/flux1-dev.safetensors"),
    "flux_dev_checkpoint_example": ("56:52", "56:50", "diffusion_models/flux1-dev.safetensors"),
    "flux1_krea_dev": ("200:197", "200:196", "diffusion_models/flux1-krea-dev_fp8_scaled.safetensors"),
    "flux_schnell_full_text_to_image": ("31", "27", "diffusion_models/flux1-schnell.safetensors"),
    "flux_schnell": ("31", "27", "checkpoints/flux1-schnell-fp8.safetensors"),
}


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = family.write(tmp_path_factory.mktemp("models"), NAMES)
    return family.write(models, {"dev": "flux1-krea-dev_fp8_scaled.safetensors"})


def run(name: str, folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> Path:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    code = main(["run", str(TEMPLATES / f"{name}.json"), "--models", str(folder), "--out", str(out), "--json", *flags])
    answer = json.loads(capsys.readouterr().out)
    assert (code, answer["ok"], len(answer["images"])) == (0, True, 1)
    return Path(answer["images"][0])


def expected(folder: Path, transformer: str, prompt: dict[str, Any], sampler: str, size: tuple[int, int]) -> Any:
    """The picture by the engine's own functions, put together here anew: euler on ComfyUI's simple schedule."""
    inputs = prompt[sampler]["inputs"]
    text = prompt[inputs["positive"][0]]["inputs"]
    alone = transformer.startswith("checkpoints")
    parts = {"t5": "text_encoders/t5xxl_fp16.safetensors", "clip_l": "text_encoders/clip_l.safetensors",
             "vae": "vae/ae.safetensors"}
    files = {role: folder / (transformer if alone else file) for role, file in parts.items()}
    flux = load(folder / transformer, "transformer")
    encoders = TextEncoders(load(files["clip_l"], "clip_l"), find_tokenizer("clip_l", files["clip_l"]),
                            load(files["t5"], "t5"), find_tokenizer("t5", files["t5"]))
    cond, pooled = encoders.encode(text.get("clip_l", text.get("text")), text.get("t5xxl"))
    denoiser = Denoiser(flux, [[cond, {"pooled_output": pooled, "guidance": 3.5}]])
    generator = torch.Generator().manual_seed(int(inputs["seed"]))
    x = torch.randn((1, 16, size[1] // 8, size[0] // 8), generator=generator)
    sigmas = make_sigmas("simple", int(inputs["steps"]), table=table_for(flux.spec)).tolist()
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            denoised = denoiser(x, torch.tensor([sigma]))
            x = x + (x - denoised) / sigma * (following - sigma)
        pixels = load(files["vae"], "vae").decode(process_out(x))
    return ((pixels + 1) / 2).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255


@pytest.mark.parametrize("name", CASES)
def test_a_template_gives_the_engine_s_picture(name: str, folder: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """Everything as published but the size: 1024 x 1024 costs half a minute here and shows nothing more."""
    sampler, size, transformer = CASES[name]
    path = run(name, folder, tmp_path, capsys, f"{size}.width=64", f"{size}.height=48")
    texts = read_text(path, ["prompt", "workflow"])
    prompt, saved = json.loads(texts["prompt"]), json.loads(texts["workflow"])
    published = json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))
    assert saved["nodes"] == published["nodes"]
    assert int(prompt[sampler]["inputs"]["steps"]) == (4 if "schnell" in name else 20)
    picture = np.asarray(Image.open(path)).astype(float)
    assert picture.shape == (48, 64, 3) and picture.std() > 1
    assert np.abs(picture - expected(folder, transformer, prompt, sampler, (64, 48))).max() < 1.5


def test_a_template_runs_unmodified(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run("flux_schnell", folder, tmp_path, capsys)
    with Image.open(path) as picture:
        assert picture.size == (1024, 1024)
    assert path.name == "ComfyUI_00001_.png"
