"""schnell, Fill and Control of tiny sizes with random weights, in a process of the host and in its server; and what
else of FLUX.1's conditioning and text encoders other nodes can ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_inside import Inside
from comfy_server import Failed, Server
from compare import relative
from family import write_flux
from prompts import Prompt, by_our_sampler, core, core_loader, node
from safetensors.torch import save_file

SAME = 1e-5
FAMILY = {"schnell": ("FluxSchnell", 64), "fill": ("FluxInpaint", 384), "control": ("Flux", 128)}
SIZES: dict[str, dict[str, Any]] = {"schnell": {"guidance_embed": False}, "fill": {"in_channels": 384},
                                    "control": {"in_channels": 128}}


@pytest.mark.parametrize("variant", FAMILY)
def test_a_variant_equals_core_s_network(inside: Inside, variant: str) -> None:
    case = inside("variants")[variant]
    assert (case["config"], case["channels"]) == FAMILY[variant]
    assert case["off"] <= SAME and case["our sampler"] <= SAME
    assert variant == "schnell" or case["changed"] > 1e-3, "the picture it is given changed nothing"


def test_a_control_lora_with_its_picture(inside: Inside) -> None:
    case = inside("control_lora")
    assert case["off"] <= SAME and case["our sampler"] <= SAME and case["picture"] > 1e-4 and case["base"] == 0


@pytest.fixture(scope="module")
def models(server: Server) -> Path:
    folder = server.base / "models" / "diffusion_models"
    for seed, (variant, sizes) in enumerate(SIZES.items()):
        write_flux(folder / f"random-{variant}.safetensors", seed, **sizes)
    return folder


def prompt_of(variant: str) -> Prompt:
    """Core's nodes for this variant on a picture that is made first; the transformer is node `load`, output 0."""
    name = f"random-{variant}.safetensors"
    prompt = core(steps=3)
    prompt["load"]["inputs"]["model"] = name
    prompt |= {"dev": node("FluxKitLoadTransformer", model="tiny-flux-dev.safetensors"),
               "picture": node("VAEDecode", samples=["first", 0], vae=["load", 2]),
               "mask": node("SolidMask", value=1.0, width=128, height=112),
               "first": node("KSampler", **{**prompt["sampler"]["inputs"], "model": ["dev", 0], "seed": 4})}
    extra = {"fill": node("InpaintModelConditioning", positive=["text", 0], negative=["text", 0], vae=["load", 2],
                          pixels=["picture", 0], mask=["mask", 0], noise_mask=True),
             "control": node("InstructPixToPixConditioning", positive=["text", 0], negative=["text", 0],
                             vae=["load", 2], pixels=["picture", 0])}.get(variant)
    if extra is not None:
        prompt["given"] = extra
        prompt["sampler"]["inputs"] |= {"positive": ["given", 0], "negative": ["given", 1],
                                        "latent_image": ["given", 2]}
    return prompt


@pytest.mark.parametrize("variant", FAMILY)
def test_a_variant_in_the_server(server: Server, models: Path, core_can_load: bool, variant: str) -> None:
    """Detection by our loader and, where it infers sizes, by core's."""
    prompt = prompt_of(variant)
    found = server.latents(prompt)["latent"]
    assert torch.isfinite(found).all() and found.std() > 0.1
    assert relative(server.latents(by_our_sampler(prompt))["latent"], found) <= SAME
    if core_can_load:
        theirs = core_loader(prompt)
        theirs["unet"]["inputs"]["unet_name"] = f"random-{variant}.safetensors"
        assert relative(found, server.latents(theirs)["latent"]) <= SAME


# -- what must not be silent

def test_references_at_time_zero_are_refused(server: Server) -> None:
    prompt = core(steps=1)
    prompt |= {"reference": node("ReferenceLatent", conditioning=["text", 0], latent=["size", 0]),
               "method": node("FluxKontextMultiReferenceLatentMethod", conditioning=["reference", 0],
                              reference_latents_method="index_timestep_zero")}
    prompt["sampler"]["inputs"]["positive"] = ["method", 0]
    with pytest.raises(Failed, match=r"index_timestep_zero.*choose offset, index, uxo") as failed:
        server.run(prompt)
    assert failed.value.node == "KSampler"


@pytest.mark.parametrize("layer", ["None", "-1", "-2", "beyond"])
def test_set_clip_last_layer_does_what_core_does(inside: Inside, layer: str) -> None:
    found = inside("last_layer")
    case = found[layer] if layer in found else found[min(found, key=lambda key: int(key) if key[0] == "-" else 0)]
    assert case["off"] <= SAME
    assert (case["changed"] > 1e-3) == (layer == "-2")
    assert bool(case["said"]) == (layer == "-2") and all("of its" in text for text in case["said"])
    assert found["afterwards"]["off"] == 0


def test_textual_inversions_are_told(inside: Inside) -> None:
    """Refused where the file is there, which core's encoders would put in; else a warning, as core gives one."""
    here, weighted, nobody = inside("textual_inversions").values()
    for case, name in ((here, "of/mine"), (weighted, "of/mine.safetensors")):
        assert case["refused"].startswith("BadInput") and f"'{name}'" in case["refused"]
        assert "DualCLIPLoader" in case["refused"]
    assert nobody["refused"] == "" and any("embedding:nobody-s" in text for text in nobody["said"])


def test_a_textual_inversion_in_the_server(server: Server) -> None:
    prompt = core(steps=1)
    prompt["text"] = node("CLIPTextEncode", clip=["load", 1], text="a circle, embedding:somebody-s")
    server.run(prompt)
    assert "'embedding:somebody-s' is read as plain text" in server.log.read_text()
    (server.base / "models" / "embeddings").mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": torch.zeros(1, 768)}, server.base / "models" / "embeddings" / "known.safetensors")
    prompt["text"]["inputs"]["text"] = "a circle, embedding:known"
    with pytest.raises(Failed, match="'known', which these text encoders cannot read") as failed:
        server.run(prompt)
    assert failed.value.node == "CLIPTextEncode"
