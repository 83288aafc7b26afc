"""The official FLUX.1 templates in a running ComfyUI, core's loaders replaced by ours.

Turned into API prompts by the standalone host's converter. tiny-flux stands under the file names they ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import Host, Server
from compare import relative
from flux_kit.cli import session
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.workflow import load_workflow
from flux_kit.tiny_flux.score import matches, read_picture
from PIL import Image
from prompts import Prompt, node
from templates import CASES, KONTEXT_TEMPLATE, TEMPLATES, prompt_of, sampler_of, write_models

SAME = 1e-5
AT_1024 = 5e-5
"""Kontext brings its picture to 1024 x 1024: two steps over 8,192 tokens, eight times as many as elsewhere here."""
NAMES = ("flux_dev_full_text_to_image", "flux_dev_checkpoint_example", "flux1_krea_dev",
         "flux_schnell_full_text_to_image", "flux_schnell")
JUDGED = [name for name in CASES if name != KONTEXT_TEMPLATE]


@pytest.fixture(scope="module")
def models(server: Server) -> Path:
    """tiny-flux under the names of the real family, and the pictures, put there while the server runs."""
    (server.base / "input").mkdir(exist_ok=True)
    for case in CASES.values():
        case.write_inputs(server.base / "input")
    return write_models(server.base / "models")


@pytest.fixture
def host(server: Server, models: Path, tmp_path: Path) -> None:
    """The standalone host, with the models and pictures of the server, is the one in use."""
    session.hosts.use(StandaloneHost(Folders(models=[models], input=[server.base / "input"], output=tmp_path),
                                     device="cpu", dtype="fp32"))


@pytest.fixture
def published(host: None) -> Callable[[str], Prompt]:
    """Gives a template as an API prompt."""
    return lambda name: load_workflow(TEMPLATES / f"{name}.json", session.node_classes()).prompt


@pytest.fixture
def asked(host: None, server: Server, comfy: Host) -> Callable[[str], Prompt]:
    """Gives a template of `CASES` as an API prompt, with its sampler's latent saved too. It skips where the server
    lacks a node. Kontext's has a megapixel, and therefore few steps; and a PNG, as hosts decode a JPEG each its own
    way (0.33 by FFmpeg: up to 62 levels apart along an edge)."""
    def made(name: str) -> Prompt:
        prompt = prompt_of(name, session.node_classes())
        absent = {entry["class_type"] for entry in prompt.values()} - set(server.call("/object_info"))
        if absent:
            pytest.skip(f"{comfy.path.name} has no {', '.join(sorted(absent))}")
        if name == KONTEXT_TEMPLATE:  # of a JPEG with sharp colours 0.33.0 makes other pixels than Pillow does
            prompt[sampler_of(prompt)]["inputs"]["steps"] = 2
            reader, = (entry for entry in prompt.values() if entry["class_type"] == "LoadImage")
            picture = (server.base / "input" / reader["inputs"]["image"]).with_suffix(".png")
            CASES[name].inputs[reader["inputs"]["image"]].draw().save(picture)
            reader["inputs"]["image"] = picture.name
        return with_latent(prompt)

    return made


# core's loader -> (ours, {its widget: ours})
OURS = {"UNETLoader": ("FluxKitLoadTransformer", {"unet_name": "model"}),
        "DualCLIPLoader": ("FluxKitLoadTextEncoders", {"clip_name1": "clip_l", "clip_name2": "t5"}),
        "VAELoader": ("FluxKitLoadVAE", {"vae_name": "vae"}),
        "CheckpointLoaderSimple": ("FluxKitLoadFlux", {"ckpt_name": "model"})}
# what a LoRA goes on when core's loader is the oracle: core rounds the sum to fp8 again, at random
IN_16_BITS = {"flux.1-fill-dev-OneReward-transformer_fp8.safetensors": "flux1-fill-dev.safetensors",
              "flux1-dev-fp8.safetensors": "flux1-dev.safetensors"}
VISION, STYLE = "CLIPVisionLoader", "StyleModelLoader"


def by_our_loaders(prompt: Prompt) -> Prompt:
    """The same sockets: nothing but the loaders changes. Those of Redux become one."""
    def replaced(entry: dict[str, Any]) -> dict[str, Any]:
        if entry["class_type"] not in OURS:
            return entry
        kind, names = OURS[entry["class_type"]]
        inside = dict.fromkeys(("clip_l", "t5", "vae"), "from the model file") if kind == "FluxKitLoadFlux" else {}
        return {**entry, "class_type": kind,
                "inputs": {**inside, **{mine: entry["inputs"][theirs] for theirs, mine in names.items()}}}

    return by_our_redux({key: replaced(entry) for key, entry in prompt.items()})


def by_our_redux(prompt: Prompt) -> Prompt:
    at = {entry["class_type"]: key for key, entry in prompt.items() if entry["class_type"] in (VISION, STYLE)}
    if not at:
        return prompt
    both = node("FluxKitLoadRedux", clip_vision=prompt[at[VISION]]["inputs"]["clip_name"],
                style_model=prompt[at[STYLE]]["inputs"]["style_model_name"])
    rest = {key: entry for key, entry in prompt.items() if key not in at.values()}
    return {**relinked(relinked(rest, [at[VISION], 0], ["redux", 0]), [at[STYLE], 0], ["redux", 1]), "redux": both}


def relinked(prompt: Prompt, old: list[Any], new: list[Any]) -> Prompt:
    return {key: {**entry, "inputs": {name: new if value == old else value for name, value in entry["inputs"].items()}}
            for key, entry in prompt.items()}


def by_core_s_transformer(prompt: Prompt) -> Prompt:
    """Core's loader for the transformer; all else by ours, since core reads no encoders and autoencoders so small."""
    ours = by_our_loaders(prompt)
    for key, entry in prompt.items():
        if entry["class_type"] == "UNETLoader":
            return {**ours, key: entry}
        if entry["class_type"] == "CheckpointLoaderSimple":
            return {**relinked(ours, [key, 0], ["unet", 0]), "unet": node(
                "UNETLoader", unet_name="flux1-schnell.safetensors", weight_dtype="default")}
    raise AssertionError("the template loads no transformer")


def with_latent(prompt: Prompt) -> Prompt:
    return {**prompt, "latent": node("SaveLatent", samples=[sampler_of(prompt), 0], filename_prefix="template")}


def small(prompt: Prompt) -> Prompt:
    """At 160 x 128, with the sampler's latent saved too."""
    sizes = {"width": 160, "height": 128}
    return with_latent({key: {**entry, "inputs": {name: sizes.get(name, value)
                                                  for name, value in entry["inputs"].items()}}
                        for key, entry in prompt.items()})


def by_flux_kit_run(prompt: Prompt) -> torch.Tensor:
    """The sampler's latent there, with the loaders as published: the standalone host has equivalents of them."""
    kept = {key: entry for key, entry in prompt.items() if key != "latent"}
    latent: torch.Tensor = Executor(session.node_classes()).run(kept).outputs[sampler_of(prompt)][0][0]["samples"]
    return latent


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
    prompt = small(published(name))
    assert relative(server.latents(by_our_loaders(prompt))["latent"], by_flux_kit_run(prompt)) <= SAME


@pytest.mark.parametrize("name", ["flux_schnell_full_text_to_image", "flux_schnell"])
def test_a_template_runs_at_its_own_size(server: Server, published: Callable[[str], Prompt], name: str) -> None:
    """As published, but for the loaders: 1024 x 1024."""
    told = server.run(by_our_loaders(published(name)))
    picture, = (image for entry in told.values() for image in entry.get("images", []))
    with Image.open(server.path_of(picture)) as found:
        assert found.size == (1024, 1024) and np.asarray(found).std() > 1


@pytest.mark.parametrize("name", CASES)
def test_a_conditioned_template_gives_the_latents_of_flux_kit_run(server: Server, asked: Callable[[str], Prompt],
                                                                  name: str) -> None:
    prompt = asked(name)
    bound = AT_1024 if name == KONTEXT_TEMPLATE else SAME
    assert relative(server.latents(by_our_loaders(prompt))["latent"], by_flux_kit_run(prompt)) <= bound


@pytest.mark.parametrize("name", CASES)
def test_a_conditioned_template_gives_core_s_latents(server: Server, asked: Callable[[str], Prompt],
                                                     core_can_load: bool, name: str) -> None:
    if not core_can_load:
        pytest.skip("core's own loader cannot take the tiny transformer")
    prompt = asked(name)
    for entry in prompt.values():
        if entry["class_type"] == "UNETLoader":
            entry["inputs"]["unet_name"] = IN_16_BITS.get(entry["inputs"]["unet_name"], entry["inputs"]["unet_name"])
    assert relative(server.latents(by_our_loaders(prompt))["latent"],
                    server.latents(by_core_s_transformer(prompt))["latent"]) <= SAME


@pytest.mark.parametrize("name", JUDGED)
def test_a_conditioned_template_paints_what_it_is_asked(server: Server, asked: Callable[[str], Prompt], name: str
                                                        ) -> None:
    told, pictures = server.run(by_our_loaders(asked(name))), []
    for image in (image for entry in told.values() for image in entry.get("images", [])):
        with Image.open(server.path_of(image)) as opened:
            pictures.append(np.asarray(opened.convert("RGB")))
    assert any(matches(CASES[name].shows, picture) for picture in pictures), [read_picture(each) for each in pictures]
