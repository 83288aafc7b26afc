"""Flux Fill, Region Crop and Region Paste in ComfyUI: the same tensors as in the standalone host, and the same pictures
by our sampler and by core's KSampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alone import tiny_host
from comfy_inside import Inside
from comfy_server import Failed, Server
from compare import relative
from family import DEV, write_flux
from flux_kit.cli import session
from flux_kit.engine.conditioning import fill
from flux_kit.engine.sampling.latents import patchify
from flux_kit.engine.sampling.slots import read_slots
from PIL import Image
from prompts import Prompt, by_our_sampler, core, flux_kit, node
from safetensors.torch import load_file

SAME = 1e-5
PIXELS = 1e-4  # of latents that were encoded from a picture
MODEL = "conditioning-fill.safetensors"
WIDTHS = {"dev": 64, "core's dev": 64, "core's loader": 128, "core's loader on core's": 128, "ours": 128,
          "ours beside": 128, "other lora": 64, "after them, dev": 64, "fill": 384, "control": 128,
          "core's dev, its sister loaded": 64}


def test_the_tensors_are_those_of_the_standalone_host(inside: Inside, tmp_path: Path) -> None:
    found = inside("fill_node")
    here = load_file(found["path"])
    host = tiny_host(tmp_path)
    vae = host.load_vae(session.TINY_MODELS / "vae" / "tiny-ae.safetensors")
    draw = torch.Generator().manual_seed(11)
    picture, mask = torch.rand(1, 75, 101, 3, generator=draw), torch.linspace(0, 1, 101).expand(1, 75, 101)
    parts = fill.prepare(picture, mask)
    masked, latent = (host.encode(vae, image)["samples"] for image in (parts.masked, parts.picture))
    assert torch.equal(here["mask"], parts.mask)
    assert relative(here["picture"], masked) <= PIXELS and relative(here["latent"], latent) <= PIXELS
    values = fill.values_of(parts, masked, 30.0)
    channels = read_slots(values, replace(DEV, in_channels=384), "positive").channels(latent)
    assert channels is not None and relative(patchify(here["channels"]), channels) <= PIXELS
    assert found["guidance"] == 30 and found["keys"] == [fill.PICTURE, "samples"] and "112 x 80" in found["report"]


def test_both_samplers_take_it_and_the_picture_comes_back(inside: Inside) -> None:
    found = inside("fill_node")
    assert found["off"] <= SAME and found["our sampler"] <= SAME
    assert found["decoded"] == found["pasted"] == [1, 75, 101, 3]
    assert found["kept"] and found["changed"] > 0.01


def test_the_width_of_img_in_of_every_kind_of_model(inside: Inside) -> None:
    found = inside("img_in_widths")
    assert {name: found[name] for name in WIDTHS} == WIDTHS
    assert "needs FLUX.1" in found["another model"]


# -- in the server

@pytest.fixture(scope="module")
def model(server: Server) -> str:
    write_flux(server.base / "models" / "diffusion_models" / MODEL, 9, in_channels=384)
    return MODEL


def inpainting(model: str, **changes: Any) -> Prompt:
    """A picture that is made first; its mask refined, the region cut out, filled by core's KSampler and pasted."""
    prompt = core(steps=2)
    first = {**prompt["sampler"]["inputs"], "seed": 4}
    prompt |= {
        "other": node("FluxKitLoadTransformer", model=model),
        "first": node("KSampler", **first), "picture": node("VAEDecode", samples=["first", 0], vae=["load", 2]),
        "black": node("SolidMask", value=0.0, width=128, height=112),
        "white": node("SolidMask", value=1.0, width=40, height=32),
        "mask": node("MaskComposite", destination=["black", 0], source=["white", 0], x=60, y=48, operation="add"),
        "refine": node("FluxKitMaskRefine", mask=["mask", 0], grow=4, feather=6, threshold=0.5, fill_holes=True,
                       invert=False, snap="none"),
        "crop": node("FluxKitRegionCrop", image=["picture", 0], mask=["refine", 0], context=1.2, min_context=8,
                     megapixels=0.0, multiple="16", if_empty="error"),
        "fill": node("FluxKitFill", positive=["text", 0], vae=["load", 2], image=["crop", 0], mask=["crop", 1],
                     model=["other", 0], guidance=30.0, mask_mode="official-soft", noise_mask="off", size="pad"),
        "paste": node("FluxKitRegionPaste", image=["picture", 0], edited=["decode", 0], region=["crop", 2],
                      blend=["crop", 3], colour_match=0.0, use_blend=True),
        "save": node("SaveImage", images=["paste", 0], filename_prefix="pasted"),
        "original": node("SaveImage", images=["picture", 0], filename_prefix="original")}
    prompt["sampler"]["inputs"] |= {"model": ["other", 0], "positive": ["fill", 0], "negative": ["fill", 1],
                                    "latent_image": ["fill", 2]}
    for name, inputs in changes.items():
        prompt[name]["inputs"] |= inputs
    return prompt


def pixels(server: Server, saved: dict[str, Any]) -> np.ndarray:
    with Image.open(server.path_of(saved["images"][0])) as file:
        return np.array(file.convert("RGB")).astype(int)


def test_inpainting_a_region_in_the_server(server: Server, model: str) -> None:
    outputs = server.run(inpainting(model))
    pasted, original = (pixels(server, outputs[name]) for name in ("save", "original"))
    box = slice(48 - 11, 80 + 11), slice(60 - 11, 100 + 11)                 # grown by 4 and feathered by 6
    outside = np.ones(original.shape[:2], dtype=bool)
    outside[box] = False
    assert pasted.shape == (112, 128, 3) and np.array_equal(pasted[outside], original[outside])
    assert np.abs(pasted - original)[box].mean() > 2
    our_nodes = {**by_our_sampler(inpainting(model)), "decode": flux_kit()["decode"]}
    ours = server.run(our_nodes)
    assert np.abs(pixels(server, ours["save"]) - pasted).max() <= 1


def test_a_wrong_model_is_named_in_the_server(server: Server, model: str) -> None:
    with pytest.raises(Failed, match=r"64 channels.*dev, schnell or Kontext.*384") as failed:
        server.run(inpainting(model, fill={"model": ["load", 0]}))
    assert failed.value.node == "FluxKitFill"
