"""Checks of inside.py: what other packs do to the network, bad input, accidents. Imported by it, in its process."""

from __future__ import annotations

import types
from typing import Any

import comfy.ldm.flux.layers
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch
from inside import ERRORS, HOST, MODEL, TINY, check, conditioning, random, relative, sampled

# -- what other packs do

def classic_forward(self: Any, img: Any, img_ids: Any, txt: Any, txt_ids: Any, timesteps: Any, y: Any,
                    guidance: Any = None, control: Any = None, transformer_options: Any = None,
                    attn_mask: Any = None) -> Any:
    """As packs that cache steps write it: the public parts of the class called in BFL's way."""
    embedding = comfy.ldm.flux.layers.timestep_embedding
    img = self.img_in(img)
    vec = self.time_in(embedding(timesteps, 256).to(img.dtype))
    if self.params.guidance_embed and guidance is not None:
        vec = vec + self.guidance_in(embedding(guidance, 256).to(img.dtype))
    vec = vec + self.vector_in(y[:, :self.params.vec_in_dim])
    txt = self.txt_in(txt)
    pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
    modulation, _ = self.double_blocks[0].img_mod(vec)
    normed = (1 + modulation.scale) * self.double_blocks[0].img_norm1(img) + modulation.shift
    assert normed.shape == img.shape and modulation.scale.shape[1] == 1
    for block in self.double_blocks:
        img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask)
    x = torch.cat((txt, img), 1)
    for block in self.single_blocks:
        x = block(x, vec=vec, pe=pe, attn_mask=attn_mask)
    return self.final_layer(x[:, txt.shape[1]:, ...], vec)


class Together(torch.nn.Module):
    """As packs that skip blocks write it: one module in place of a whole list."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, *streams: Any, **inputs: Any) -> Any:
        out: Any = streams[0] if streams else (inputs.pop("img"), inputs.pop("txt"))
        for block in self.blocks:
            out = block(out, **inputs) if streams else block(img=out[0], txt=out[1], **inputs)
        return out


@check
def other_packs() -> Any:
    patcher, prompt = HOST.load_model(MODEL), conditioning()
    network = patcher.model.diffusion_model
    before = sampled(patcher, prompt)
    found: dict[str, Any] = {"class": type(network).__name__}
    network.forward_orig = classic_forward.__get__(network, type(network))
    found["forward_orig set"] = relative(sampled(patcher, prompt), before)
    del network.forward_orig
    found["forward_orig given back"] = relative(sampled(patcher, prompt), before)
    swapped = patcher.clone()
    swapped.add_object_patch("diffusion_model.forward_orig", types.MethodType(classic_forward, network))
    found["forward_orig as object patch"] = relative(sampled(swapped, prompt), before)
    swapped = patcher.clone()
    swapped.add_object_patch("diffusion_model.double_blocks", torch.nn.ModuleList([Together(network.double_blocks)]))
    swapped.add_object_patch("diffusion_model.single_blocks", torch.nn.ModuleList([Together(network.single_blocks)]))
    found["block lists swapped"] = relative(sampled(swapped, prompt), before)
    found["afterwards"] = relative(sampled(patcher, prompt), before)
    return found


# -- bad input and accidents

def message(call: Any, *arguments: Any, **keywords: Any) -> str:
    try:
        call(*arguments, **keywords)
    except ERRORS.FluxKitError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@check
def refusals() -> Any:
    """Objects of other models, genuine ones of the host's classes."""
    patcher, prompt = HOST.load_model(MODEL), conditioning()
    vae = HOST.load_vae(TINY / "vae" / "tiny-ae.safetensors")
    config = comfy.supported_models.SD15({"disable_unet_model_creation": True, "in_channels": 4,
                                          "adm_in_channels": None})
    other = comfy.model_patcher.ModelPatcher(comfy.model_base.BaseModel(config), patcher.load_device,
                                             patcher.offload_device)
    wide = comfy.sd.CLIP(no_init=True)
    wide.tokenizer, wide.tokenizer_options = comfy.sdxl_clip.SDXLTokenizer(), {}
    wide.cond_stage_model = torch.nn.Identity()
    empty = {"samples": torch.zeros(1, 16, 8, 8)}
    run = {"seed": 1, "steps": 1}
    return {
        "model": message(HOST.sample, other, prompt, None, empty, **run),
        "clip": message(HOST.encode_prompt, wide, "a"),
        "vae": message(HOST.decode, comfy.sd.VAE(sd={}), empty),
        "latent": message(HOST.sample, patcher, prompt, None, {"samples": random(1, 4, 8, 8)}, **run),
        "decoded latent": message(HOST.decode, vae, {"samples": random(1, 4, 8, 8)}),
        "nan": message(HOST.sample, patcher, prompt, None, {"samples": torch.full((1, 16, 8, 8), torch.nan)}, **run),
        "empty of another width": message(HOST.sample, patcher, prompt, None,
                                          {"samples": torch.zeros(1, 4, 8, 8)}, **run)}


@check
def accidents() -> Any:
    """Out of memory, an interrupt, or NaN in the middle of a run; then the same run as before."""
    patcher, prompt = HOST.load_model(MODEL), conditioning()
    empty = {"samples": torch.zeros(1, 16, 8, 8)}

    def run() -> torch.Tensor:
        out: torch.Tensor = HOST.sample(patcher, prompt, None, empty, seed=1, steps=4)["samples"]
        return out

    before, calls = run(), []

    def after_two(action: Any) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            calls.append(None)
            return action(output) if len(calls) > 2 else output
        return hook

    def out_of_memory(output: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def interrupt(output: Any) -> Any:
        comfy.model_management.interrupt_current_processing(True)
        return output

    found = {}
    for name, action in {"out of memory": out_of_memory, "interrupt": interrupt,
                         "nan": lambda output: output * torch.nan}.items():
        calls.clear()
        handle = patcher.model.diffusion_model.final_layer.register_forward_hook(after_two(action))
        try:
            run()
            told = ""
        except BaseException as error:  # noqa: BLE001 - newer hosts' interrupt is no Exception
            told = f"{type(error).__name__}: {error}"
        handle.remove()
        found[name] = {"told": told, "again": relative(run(), before)}
    return found
