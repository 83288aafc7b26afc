"""The official FLUX.1 text-to-image templates, as published, on tiny-flux under the file names they ask for."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfyui_workflow_templates_json
import numpy as np
import pytest
import torch
from family import ALL_IN_ONE
from flux_kit.cli import main
from flux_kit.engine.sampling import Denoiser, make_sigmas, process_out, table_for
from flux_kit.engine.text import TextEncoders, find_tokenizer
from flux_kit.engine.weights import load, open_checkpoint
from flux_kit.hosts.standalone.png import read_text
from PIL import Image
from safetensors.torch import save_file

TEMPLATES = Path(comfyui_workflow_templates_json.__file__).parent / "templates"
SHIPPED = Path(__file__).parents[3] / "tiny_flux" / "models"
T5, CLIP_L, VAE = "text_encoders/tiny-t5", "text_encoders/tiny-clip_l", "vae/tiny-ae"
DEV, SCHNELL = "diffusion_models/tiny-flux-dev", "diffusion_models/tiny-flux-schnell"
ASKED_FOR = {  # the names that the templates ask for
    "diffusion_models/flux1-dev": DEV, "diffusion_models/flux1-krea-dev_fp8_scaled": DEV,
    "diffusion_models/flux1-schnell": SCHNELL, "text_encoders/t5xxl_fp16": T5, "text_encoders/clip_l": CLIP_L,
    "vae/ae": VAE}
# template -> (ids of its sampler and its size node, transformer, whether that is an all-in-one)
CASES = {
    "flux_dev_full_text_to_image": ("194:50", "194:48", "diffusion_models/flux1-dev.safetensors"),
    "flux_dev_checkpoint_example": ("56:52", "56:50", "diffusion_models/flux1-dev.safetensors"),
    "flux1_krea_dev": ("200:197", "200:196", "diffusion_models/flux1-krea-dev_fp8_scaled.safetensors"),
    "flux_schnell_full_text_to_image": ("31", "27", "diffusion_models/flux1-schnell.safetensors"),
    "flux_schnell": ("31", "27", "checkpoints/flux1-schnell-fp8.safetensors"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with tiny-flux under the names of the real family, and an all-in-one file made of it."""
    models = tmp_path_factory.mktemp("models")
    for asked, shipped in ASKED_FOR.items():
        (models / asked).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SHIPPED / f"{shipped}.safetensors", models / f"{asked}.safetensors")
    tensors, words = {}, {}
    for role, shipped in (("transformer", SCHNELL), ("t5", T5), ("clip_l", CLIP_L), ("vae", VAE)):
        with open_checkpoint(SHIPPED / f"{shipped}.safetensors") as part:
            tensors.update({ALL_IN_ONE[role] + name: info.read() for name, info in part.items()})
            if "tokenizer.json" in part.metadata:
                words[f"{role}.tokenizer.json"] = part.metadata["tokenizer.json"]
    (models / "checkpoints").mkdir()
    save_file(tensors, models / "checkpoints" / "flux1-schnell-fp8.safetensors", metadata=words)
    return models


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
    """As published but for the size, so that the picture can be made a second time at little cost."""
    sampler, size, transformer = CASES[name]
    path = run(name, folder, tmp_path, capsys, f"{size}.width=64", f"{size}.height=48")
    prompt = json.loads(read_text(path, ["prompt"])["prompt"])
    picture = np.asarray(Image.open(path)).astype(float)
    assert picture.shape == (48, 64, 3) and picture.std() > 1
    assert np.abs(picture - expected(folder, transformer, prompt, sampler, (64, 48))).max() < 1.5


@pytest.mark.parametrize("name", CASES)
def test_a_template_runs_unmodified(name: str, folder: Path, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """All of it as published: 1024 x 1024, 20 steps or 4; 9 to 18 s of processor time."""
    path = run(name, folder, tmp_path, capsys)
    texts = read_text(path, ["prompt", "workflow"])
    published = json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))
    assert json.loads(texts["workflow"])["nodes"] == published["nodes"]
    inputs = json.loads(texts["prompt"])[CASES[name][0]]["inputs"]
    assert int(inputs["steps"]) == (4 if "schnell" in name else 20)
    with Image.open(path) as picture:
        assert picture.size == (1024, 1024) and np.asarray(picture).std() > 1
