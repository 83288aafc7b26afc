"""Prompts in API format on tiny-flux, for ComfyUI and the standalone host alike."""

from __future__ import annotations

from typing import Any

Prompt = dict[str, dict[str, Any]]
TEXT = "a large red circle on the left on a blue background"
SETTINGS: dict[str, Any] = {
    "seed": 21, "steps": 4, "cfg": 1.0, "solver": "euler", "schedule": "simple", "denoise": 1.0,
    "denoise_meaning": "keep steps (ComfyUI)", "cfg_start": 0.0, "cfg_end": 1.0}
"""Widgets of FluxKitSampler that make it do what core's KSampler does."""


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def flux_kit(**sampler: Any) -> Prompt:
    """Text to image by Flux Kit's nodes; latents saved by node "latent", pictures by "save"."""
    return {
        "load": node("FluxKitLoadFlux", model="tiny-flux-dev.safetensors", clip_l="tiny-clip_l.safetensors",
                     t5="tiny-t5.safetensors", vae="tiny-ae.safetensors"),
        "text": encoded(TEXT),
        "size": node("FluxKitEmptyLatent", aspect="custom", megapixels=1.0, width=128, height=112, batch_size=1),
        "sampler": node("FluxKitSampler", model=["load", 0], positive=["text", 0], latent=["size", 0],
                        **{**SETTINGS, **sampler}),
        "decode": node("FluxKitDecode", latent=["sampler", 0], vae=["load", 2]),
        "save": node("FluxKitSave", images=["decode", 0], filename_prefix="pictures/flux"),
        "latent": node("SaveLatent", samples=["sampler", 0], filename_prefix="latent"),
    }


def encoded(text: str, guidance: float = 3.5) -> dict[str, Any]:
    return node("FluxKitEncodePrompt", clip=["load", 1], prompt=text, t5_prompt="", guidance=guidance,
                t5_length="auto")


def core(**sampler: Any) -> Prompt:
    """The same by core's nodes on objects that Flux Kit loaded."""
    settings = {"seed": 21, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        **flux_kit(),
        "text": node("CLIPTextEncodeFlux", clip=["load", 1], clip_l=TEXT, t5xxl=TEXT, guidance=3.5),
        "size": node("EmptySD3LatentImage", width=128, height=112, batch_size=1),
        "sampler": node("KSampler", model=["load", 0], positive=["text", 0], negative=["text", 0],
                        latent_image=["size", 0], **{**settings, **sampler}),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="pictures/core"),
    }


def core_loader(prompt: Prompt) -> Prompt:
    """The same prompt with core's own transformer on the same file, wherever Flux Kit's was used."""
    def swapped(value: Any) -> Any:
        return ["unet", 0] if value == ["load", 0] else value

    changed = {name: {**entry, "inputs": {key: swapped(value) for key, value in entry["inputs"].items()}}
               for name, entry in prompt.items()}
    return {**changed, "unet": node("UNETLoader", unet_name="tiny-flux-dev.safetensors", weight_dtype="default")}


def by_our_sampler(prompt: Prompt) -> Prompt:
    """The same prompt with Flux Kit's sampler in the place of core's."""
    theirs = prompt["sampler"]["inputs"]
    same = {name: theirs[name] for name in ("model", "positive", "seed", "steps")}
    return {**prompt, "sampler": node("FluxKitSampler", **{**SETTINGS, **same, "latent": theirs["latent_image"]})}


# -- as the fixture `run_prompt` takes nodes, on the files of `family_fixtures`

Nodes = dict[str, tuple[str, dict[str, Any]]]
"""id -> (type, inputs)"""
LOAD: Nodes = {
    "load": ("FluxKitLoadFlux", {"model": "flux1-dev.safetensors", "clip_l": "clip_l.safetensors",
                                 "t5": "t5xxl_fp16.safetensors", "vae": "ae.safetensors"}),
    "pos": ("FluxKitEncodePrompt", {"clip": ["load", 1], "prompt": "a red circle", "t5_prompt": "", "guidance": 3.5,
                                    "t5_length": "auto"}),
    "empty": ("FluxKitEmptyLatent", {"aspect": "custom", "megapixels": 1.0, "width": 48, "height": 32,
                                     "batch_size": 1}),
}
SAMPLE: dict[str, Any] = {"model": ["load", 0], "positive": ["pos", 0], "latent": ["empty", 0], **SETTINGS, "seed": 7}


def sampler(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "FluxKitSampler", {**SAMPLE, **changes}


def prompt_of(nodes: Nodes) -> Prompt:
    return {id_: {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
            for id_, (kind, inputs) in nodes.items()}
