"""The official FLUX.1 text-to-image templates in a running ComfyUI, core's loaders replaced by ours.

Turned into API prompts by the standalone host's converter. tiny-flux stands under the file names they ask for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import Server
from compare import relative
from flux_kit.cli import session
from flux_kit.engine.weights import open_checkpoint
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.workflow import load_workflow
from PIL import Image
from prompts import Prompt, node
from safetensors.torch import save_file

templates = pytest.importorskip("comfyui_workflow_templates_json")
TEMPLATES = Path(templates.__file__).parent / "templates"
SHIPPED = Path(__file__).parents[3] / "tiny_flux" / "models"
SAME = 1e-5
T5, CLIP_L, VAE = "text_encoders/tiny-t5", "text_encoders/tiny-clip_l", "vae/tiny-ae"
DEV, SCHNELL = "diffusion_models/tiny-flux-dev", "diffusion_models/tiny-flux-schnell"
ASKED_FOR = {"diffusion_models/flux1-dev": DEV, "diffusion_models/flux1-krea-dev_fp8_scaled": DEV,
             "diffusion_models/flux1-schnell": SCHNELL, "text_encoders/t5xxl_fp16": T5,
             "text_encoders/clip_l": CLIP_L, "vae/ae": VAE}
PREFIXES = {"model.diffusion_model.": SCHNELL, "text_encoders.clip_l.transformer.": CLIP_L,
            "text_encoders.t5xxl.transformer.": T5, "vae.": VAE}
NAMES = ("flux_dev_full_text_to_image", "flux_dev_checkpoint_example", "flux1_krea_dev",
         "flux_schnell_full_text_to_image", "flux_schnell")
IN_ONE = "flux1-schnell-fp8.safetensors"


@pytest.fixture(scope="module")
def models(server: Server) -> Path:
    """tiny-flux under the names of the real family, and an all-in-one file of it, put there while the server runs."""
    folder = server.base / "models"
    for asked, shipped in ASKED_FOR.items():
        (folder / asked).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SHIPPED / f"{shipped}.safetensors", folder / f"{asked}.safetensors")
    tensors, words = {}, {}
    for prefix, shipped in PREFIXES.items():
        with open_checkpoint(SHIPPED / f"{shipped}.safetensors") as part:
            tensors |= {prefix + name: info.read() for name, info in part.items()}
            if "tokenizer.json" in part.metadata:
                words["t5.tokenizer.json" if shipped == T5 else "clip_l.tokenizer.json"] = part.metadata[
                    "tokenizer.json"]
    (folder / "checkpoints").mkdir(exist_ok=True)
    save_file(tensors, folder / "checkpoints" / IN_ONE, metadata=words)
    return folder


@pytest.fixture
def published(models: Path, tmp_path: Path) -> Callable[[str], Prompt]:
    """Gives a template as an API prompt; the standalone host, which has the same models, is the one in use."""
    session.hosts.use(StandaloneHost(Folders(models=[models], output=tmp_path), device="cpu", dtype="fp32"))
    return lambda name: load_workflow(TEMPLATES / f"{name}.json", session.node_classes()).prompt


def sampler_of(prompt: Prompt) -> str:
    sampler, = (key for key, entry in prompt.items() if entry["class_type"] == "KSampler")
    return sampler


# core's loader -> (ours, {its widget: ours})
OURS = {"UNETLoader": ("FluxKitLoadTransformer", {"unet_name": "model"}),
        "DualCLIPLoader": ("FluxKitLoadTextEncoders", {"clip_name1": "clip_l", "clip_name2": "t5"}),
        "VAELoader": ("FluxKitLoadVAE", {"vae_name": "vae"}),
        "CheckpointLoaderSimple": ("FluxKitLoadFlux", {"ckpt_name": "model"})}


def by_our_loaders(prompt: Prompt) -> Prompt:
    """The same sockets: nothing but the loaders changes."""
    def replaced(entry: dict[str, Any]) -> dict[str, Any]:
        if entry["class_type"] not in OURS:
            return entry
        kind, names = OURS[entry["class_type"]]
        inside = dict.fromkeys(("clip_l", "t5", "vae"), "from the model file") if kind == "FluxKitLoadFlux" else {}
        return {**entry, "class_type": kind,
                "inputs": {**inside, **{mine: entry["inputs"][theirs] for theirs, mine in names.items()}}}

    return {key: replaced(entry) for key, entry in prompt.items()}


def by_core_s_transformer(prompt: Prompt) -> Prompt:
    """Core's loader for the transformer; the small encoders and autoencoder by ours, since core reads no such sizes."""
    ours = by_our_loaders(prompt)
    for key, entry in prompt.items():
        if entry["class_type"] == "UNETLoader":
            return {**ours, key: entry}
        if entry["class_type"] == "CheckpointLoaderSimple":
            def swapped(value: Any, link: list[Any] = [key, 0]) -> Any:  # noqa: B006 - read only
                return ["unet", 0] if value == link else value

            changed = {id_: {**other, "inputs": {name: swapped(value) for name, value in other["inputs"].items()}}
                       for id_, other in ours.items()}
            return {**changed, "unet": node("UNETLoader", unet_name="flux1-schnell.safetensors",
                                            weight_dtype="default")}
    raise AssertionError("the template loads no transformer")


def small(prompt: Prompt) -> Prompt:
    """At 160 x 128, with the sampler's latent saved too."""
    sizes = {"width": 160, "height": 128}
    changed = {key: {**entry, "inputs": {name: sizes.get(name, value) for name, value in entry["inputs"].items()}}
               for key, entry in prompt.items()}
    return {**changed, "latent": node("SaveLatent", samples=[sampler_of(prompt), 0], filename_prefix="template")}


@pytest.mark.parametrize("name", NAMES)
def test_a_template_gives_core_s_latents(server: Server, published: Callable[[str], Prompt], core_can_load: bool,
                                         name: str) -> None:
    prompt = small(published(name))
    assert {entry["class_type"] for entry in prompt.values()} & set(OURS)
    ours = server.latents(by_our_loaders(prompt))["latent"]
    assert ours.shape == (1, 16, 16, 20) and torch.isfinite(ours).all()
    if core_can_load:  # elsewhere there is nothing to compare with
        assert relative(ours, server.latents(by_core_s_transformer(prompt))["latent"]) <= SAME


@pytest.mark.parametrize("name", NAMES)
def test_a_template_gives_the_latents_of_flux_kit_run(server: Server, published: Callable[[str], Prompt], name: str
                                                      ) -> None:
    """There with the loaders as published, since the standalone host has equivalents of them."""
    prompt = small(published(name))
    here = server.latents(by_our_loaders(prompt)).pop("latent")
    del prompt["latent"]
    result = Executor(session.node_classes()).run(prompt)
    assert relative(here, result.outputs[sampler_of(prompt)][0][0]["samples"]) <= SAME


@pytest.mark.parametrize("name", ["flux_schnell_full_text_to_image", "flux_schnell"])
def test_a_template_runs_at_its_own_size(server: Server, published: Callable[[str], Prompt], name: str) -> None:
    """As published, but for the loaders: 1024 x 1024."""
    told = server.run(by_our_loaders(published(name)))
    picture, = (image for entry in told.values() for image in entry.get("images", []))
    with Image.open(server.path_of(picture)) as found:
        assert found.size == (1024, 1024) and np.asarray(found).std() > 1
