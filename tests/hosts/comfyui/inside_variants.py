"""Checks of inside.py: Fill, Control and schnell against core's network with the same random weights, a control LoRA
with its picture, and text encoders against core's own of the same sizes. Imported by it, in its process."""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.text_encoders.flux
import folder_paths
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from inside import (
    ENCODERS,
    ENGINE,
    HOST,
    MODEL,
    TINY,
    Warnings,
    check,
    conditioning,
    core_patcher,
    empty,
    loras,
    our_sampler,
    patched,
    random,
    relative,
    sampled,
)
from inside_accidents import message
from safetensors.torch import save_file

import nodes as core_nodes

VAE = TINY / "vae" / "tiny-ae.safetensors"
KEPT = tempfile.TemporaryDirectory()


def random_file(name: str, **sizes: Any) -> Path:
    """A transformer file of tiny-flux's sizes, but for `sizes`, in fp32."""
    known = HOST.load_model(MODEL).model.diffusion_model.spec
    network = sys.modules[ENGINE + ".models.flux"].Flux(replace(known, **sizes))
    weights = {key: random(*tensor.shape, size=0.08) + (1.0 if "_norm." in key else 0.0)
               for key, tensor in network.state_dict().items()}
    path = Path(KEPT.name) / f"{name}.safetensors"
    save_file(weights, path)
    return path


def of(answer: Any) -> tuple[Any, ...]:
    """What a node gave, older or newer."""
    return tuple(getattr(answer, "result", answer))


def picture_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(1, 96, 128)
    mask[:, 24:72, 40:100] = 1.0
    return random(1, 96, 128, 3).sigmoid(), mask


def control(prompt: Any, vae: Any) -> tuple[Any, ...]:
    execute = getattr(InstructPixToPixConditioning, "execute", None) or InstructPixToPixConditioning().encode
    return of(execute(positive=prompt, negative=prompt, pixels=picture_and_mask()[0], vae=vae))


def fill(prompt: Any, vae: Any) -> tuple[Any, ...]:
    picture, mask = picture_and_mask()
    return of(core_nodes.InpaintModelConditioning().encode(
        positive=prompt, negative=prompt, pixels=picture, vae=vae, mask=mask, noise_mask=True))


def text_only(prompt: Any, vae: Any) -> tuple[Any, ...]:
    return prompt, prompt, empty()


VARIANTS: dict[str, tuple[dict[str, Any], Any]] = {
    "schnell": ({"guidance_embed": False}, text_only), "fill": ({"in_channels": 384}, fill),
    "control": ({"in_channels": 128}, control)}


@check
def variants() -> Any:
    vae, prompt, found = HOST.load_vae(VAE), conditioning(), {}
    for name, (sizes, prepare) in VARIANTS.items():
        patcher = HOST.load_model(random_file(name, **sizes))
        positive, negative, latent = prepare(prompt, vae)
        twin = core_patcher(patcher)
        theirs = sampled(twin, positive, negative, latent)
        found[name] = {
            "config": type(patcher.model.model_config).__name__,
            "channels": patcher.model.diffusion_model.img_in.weight.shape[1],
            "off": relative(sampled(patcher, positive, negative, latent), theirs),
            "our sampler": relative(our_sampler(patcher, positive, None, latent), theirs),
            "changed": relative(theirs, sampled(twin, prompt))}
    return found


@check
def control_lora() -> Any:
    """BFL's kind of LoRA that widens img_in, with the picture it is for, on ours and on core's dev."""
    ours, vae, prompt = HOST.load_model(MODEL), HOST.load_vae(VAE), conditioning()
    twin, weights = core_patcher(ours), loras()["bfl control"]
    positive, negative, latent = control(prompt, vae)
    base = sampled(ours, prompt, latent=latent)
    changed = patched(ours, weights)
    mine = sampled(changed, positive, negative, latent)
    theirs = sampled(patched(twin, weights), positive, negative, latent)
    return {"off": relative(mine, theirs),
            "our sampler": relative(our_sampler(changed, positive, None, latent), theirs),
            "picture": relative(sampled(changed, prompt, latent=latent), mine),
            "base": relative(sampled(ours, prompt, latent=latent), base)}


# -- text encoders

def core_encoders(pair: Any) -> Any:
    """Core's own CLIP-L and T5 with the sizes and weights of ours."""
    t5, clip = pair.t5xxl["transformer"].spec, pair.clip_l["transformer"].spec
    sizes = {
        "clip_l_model_config": {
            "num_hidden_layers": clip.num_hidden_layers, "hidden_size": clip.hidden_size, "hidden_act": "quick_gelu",
            "num_attention_heads": clip.num_attention_heads, "intermediate_size": clip.intermediate_size,
            "max_position_embeddings": 77, "vocab_size": clip.vocab_size, "eos_token_id": clip.eos_token_id,
            "bos_token_id": clip.bos_token_id, "projection_dim": clip.hidden_size},
        "t5xxl_model_config": {
            "d_ff": t5.d_ff, "d_kv": t5.d_kv, "d_model": t5.d_model, "num_heads": t5.num_heads,
            "num_layers": t5.num_layers, "vocab_size": t5.vocab_size, "dense_act_fn": "gelu_pytorch_tanh",
            "is_gated_act": True, "model_type": "t5", "pad_token_id": 0, "eos_token_id": 1}}
    core = comfy.text_encoders.flux.flux_clip(dtype_t5=torch.float32)(dtype=torch.float32, model_options=sizes)
    words = core.clip_l.transformer.state_dict()["text_model.embeddings.token_embedding.weight"]  # of a fixed count
    ours = pair.clip_l["transformer"].state_dict()
    own = ours["text_model.embeddings.token_embedding.weight"]
    ours["text_model.embeddings.token_embedding.weight"] = torch.cat([own, torch.zeros_like(words[len(own):])])
    told = [core.clip_l.transformer.load_state_dict(ours, strict=False),
            core.t5xxl.transformer.load_state_dict(pair.t5xxl["transformer"].state_dict(), strict=False)]
    assert all(set(missing) <= {"text_projection.weight"} and not more for missing, more in told), told
    core.clip_l.special_tokens = {"start": clip.bos_token_id, "end": clip.eos_token_id, "pad": clip.eos_token_id}
    return core.float()


@check
def last_layer() -> Any:
    """Set CLIP Last Layer on our CLIP, against core's encoders told the same."""
    clip = HOST.load_text_encoders(ENCODERS)
    core, tokens = core_encoders(clip.cond_stage_model), clip.tokenize("a (large:1.3) red circle on the left")
    found, layers = {}, clip.cond_stage_model.t5xxl["transformer"].spec.num_layers
    (plain, _), = clip.encode_from_tokens_scheduled(tokens)
    for layer in (None, -1, -2, -layers - 5):
        logging.getLogger().addHandler(handler := Warnings())
        changed = clip if layer is None else core_nodes.CLIPSetLastLayer().set_last_layer(clip, layer)[0]
        (cond, values), = changed.encode_from_tokens_scheduled(tokens)
        logging.getLogger().removeHandler(handler)
        core.reset_clip_options()
        core.set_clip_options({} if layer is None else {"layer": layer})
        theirs, pooled = core.encode_token_weights(tokens)[:2]
        found[str(layer)] = {"off": max(relative(cond, theirs), relative(values["pooled_output"], pooled)),
                             "changed": relative(cond, plain), "said": handler.texts}
    (after, _), = clip.encode_from_tokens_scheduled(tokens)
    found["afterwards"] = {"off": relative(after, plain)}
    return found


@check
def textual_inversions() -> Any:
    """`embedding:name` in a prompt, with and without such a file in the host's folder."""
    folder = Path(KEPT.name) / "embeddings"
    (folder / "of").mkdir(parents=True)
    save_file({"emb_params": random(2, 768)}, folder / "of" / "mine.safetensors")
    folder_paths.add_model_folder_path("embeddings", str(folder))
    clip, found = HOST.load_text_encoders(ENCODERS), {}
    for text in ("a red circle, embedding:of/mine", "(embedding:of/mine.safetensors:1.2), a circle",
                 "a circle, embedding:nobody-s"):
        logging.getLogger().addHandler(handler := Warnings())
        found[text] = {"refused": message(clip.tokenize, text), "said": handler.texts}
        logging.getLogger().removeHandler(handler)
    return found
