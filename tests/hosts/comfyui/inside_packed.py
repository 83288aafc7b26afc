"""Checks of inside.py on packed files, which test_packed.py writes into the folder FLUX_KIT_PACKED names; nothing
without it. Oracle: the same weights as gguf-py or torch read them, in fp32, in plain layers. Imported by inside.py."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_extras.nodes_model_merging import CLIPSave, ModelMergeSimple, ModelSave
from inside import (
    CHECKOUT,
    ENCODERS,
    HOST,
    NAME,
    Warnings,
    check,
    conditioning,
    core_patcher,
    freed,
    held,
    in_part_and_whole,
    loaded,
    loaded_anew,
    loras,
    low_rank,
    mapped,
    our_sampler,
    pass_inputs,
    patched,
    random,
    relative,
    sampled,
)
from inside_accidents import message
from safetensors.torch import load_file, save_file

FOLDER = Path(os.environ.get("FLUX_KIT_PACKED", "/nowhere"))
FILES = sorted(FOLDER.glob("flux-*"))
OUT = FOLDER / CHECKOUT.name
D = 128


def packed_layers(model: Any) -> dict[str, Any]:
    return dict(sys.modules[NAME + ".hosts.comfyui.packed"].packed_layers(model))


def dense_of(path: Path) -> Path:
    return FOLDER / "dense" / f"{path.stem}.safetensors"


def bytes_of(patcher: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in patcher.model.state_dict().items() if value.dtype == torch.uint8}


def all_loras(control: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Plain pairs, pairs of row slices, and kinds that need the weight itself; the one that widens the input too."""
    found = {name: weights for name, weights in loras().items() if control or name != "bfl control"}
    name = "lora_unet_single_blocks_0_linear1"
    found["dora"] = {**low_rank({name: (7 * D, D)}, "lora_down", "lora_up", alpha=True),
                     f"{name}.dora_scale": 1 + random(7 * D, 1, size=0.1).abs()}
    name = "lora_unet_double_blocks_0_img_mlp_0"
    found["loha"] = {f"{name}.{part}": random(*shape, size=0.2) for part, shape in {
        "hada_w1_a": (4 * D, 4), "hada_w1_b": (4, D), "hada_w2_a": (4 * D, 4), "hada_w2_b": (4, D)}.items()}
    found["diff"] = {"diffusion_model.double_blocks.1.img_attn.proj.diff": random(D, D, size=0.05),
                     "diffusion_model.double_blocks.1.img_attn.proj.diff_b": random(D, size=0.05)}
    return found


@check
def packed_models() -> Any:
    """Each file against its weights in plain layers; latents are left for the standalone host to compare with."""
    prompt, found = conditioning() if FILES else None, {}
    if FILES:
        save_file({"cond": prompt[0][0], "pooled": prompt[0][1]["pooled_output"]}, OUT / "prompt.safetensors")
    for path in FILES:
        patcher = HOST.load_model(path)
        layers = packed_layers(patcher.model)
        twin = core_patcher(HOST.load_model(dense_of(path)))
        mine = our_sampler(patcher, prompt)
        save_file({"samples": mine}, OUT / f"{path.name}.latents")
        weights = {name: (layer.weight, layer.shape[0] * layer.shape[1]) for name, layer in layers.items()}
        found[path.name] = {
            "kinds": sorted({layer.format.name for layer in layers.values()}), "layers": len(layers),
            "uint8": all(weight.dtype == torch.uint8 for weight, _ in weights.values()),
            "cast": all(layer.comfy_cast_weights for layer in layers.values()),
            "bytes per weight": sum(w.nbytes for w, _ in weights.values()) / sum(n for _, n in weights.values()),
            "told": patcher.model_size() - held(patcher), "dtype": [str(patcher.model.get_dtype()),
                                                           str(patcher.model.manual_cast_dtype)],
            "scratch": patcher.model.memory_required([1, 16, 12, 16]) - twin.model.memory_required([1, 16, 12, 16]),
            "largest": max(n for _, n in weights.values()) * 4,
            "mapped": mapped(patcher),
            "off": relative(mine, our_sampler(twin, prompt)),
            "ksampler": relative(sampled(patcher, prompt), sampled(twin, prompt)), **in_half(path, prompt, mine)}
    return found


def in_half(path: Path, prompt: Any, whole: torch.Tensor) -> dict[str, Any]:
    """The same where the host computes in bf16, with a LoRA too, against fp32."""
    weights = all_loras()["kohya"]
    with_lora = our_sampler(patched(HOST.load_model(path), weights), prompt)
    with mock.patch.object(comfy.model_management.args, "bf16_unet", True):
        half = HOST.load_model(path)
    return {"half dtype": str(half.model.get_dtype()), "half": relative(our_sampler(half, prompt), whole),
            "half with lora": relative(our_sampler(patched(half, weights), prompt), with_lora)}


@check
def packed_loras() -> Any:
    """Against core's Flux of plain weights with the same LoRA, and what is left of it afterwards."""
    found, prompt = {}, conditioning() if FILES else None
    for path in FILES:
        ours, theirs = HOST.load_model(path), core_patcher(HOST.load_model(dense_of(path)))
        base, before = sampled(ours, prompt), bytes_of(ours)
        for name, weights in all_loras(control=True).items():
            logging.getLogger().addHandler(handler := Warnings())
            changed = patched(ours, weights)
            mine = sampled(changed, prompt)
            logging.getLogger().removeHandler(handler)
            found[f"{path.name} {name}"] = {
                "off": relative(mine, sampled(patched(theirs, weights), prompt)), "changed": relative(mine, base),
                "base": relative(sampled(ours, prompt), base), "again": relative(sampled(changed, prompt), mine),
                "said": handler.texts}
        first, second = all_loras()["kohya"], all_loras()["diffusers"]
        two, both = patched(patched(ours, first), second), patched(patched(theirs, first), second)
        found[f"{path.name} two"] = {
            "off": relative(sampled(two, prompt), sampled(both, prompt)), "said": [],
            "changed": relative(sampled(two, prompt), sampled(patched(ours, first), prompt)),
            "base": relative(sampled(ours, prompt), base), "again": 0}
        after = bytes_of(ours)
        found[f"{path.name} bytes"] = {"same": all(torch.equal(before[key], after[key]) for key in before),
                                       "count": len(before)}
    return found


@check
def packed_partial_load() -> Any:
    """A third loaded, then all, then all but half taken back, against each other bit for bit."""
    if not FILES:
        return {}
    inputs = pass_inputs()
    found: dict[str, Any] = {}
    for path in FILES:
        ours = HOST.load_model(path)
        for name, weights in {"no lora": None, **all_loras()}.items():
            patcher = ours.clone() if weights is None else patched(ours, weights)
            with loaded(patcher, 1 / 3) as some:
                part = patcher.model.apply_model(**inputs)
            with loaded(patcher) as everything:
                whole = patcher.model.apply_model(**inputs)
                taken = patcher.partially_unload(patcher.offload_device, patcher.model_size() // 2)
                back = patcher.model.apply_model(**inputs)
            found[f"{path.name} {name}"] = {
                "streamed": bool(torch.equal(part, whole)), "taken back": bool(torch.equal(back, whole)),
                "share": some / everything, "freed": taken / everything, "after": patcher.loaded_size(),
                "left": sum(len(layer.beside) + len(layer.entries) + len(layer.weight_function)
                            for layer in packed_layers(ours.model).values())}
    return found


@check
def packed_wrappers_and_hooks() -> Any:
    if not FILES:
        return {}
    path, prompt, found = FILES[0], conditioning(), {}
    ours, theirs = HOST.load_model(path), core_patcher(HOST.load_model(dense_of(path)))
    base, before = sampled(ours, prompt), bytes_of(ours)

    def wrapped(patcher: Any) -> Any:
        copy = patcher.clone()
        copy.add_weight_wrapper("diffusion_model.single_blocks.0.linear1.weight", lambda weight: weight * 1.1)
        copy.add_weight_wrapper("diffusion_model.single_blocks.0.linear1.bias", lambda bias: bias + 0.1)
        return copy

    def hooked(patcher: Any, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        hooks = comfy.hooks.create_hook_lora(dict(weights), 0.7, 0.0)
        return sampled(patcher, comfy.hooks.set_hooks_for_conditioning(prompt, hooks=hooks))

    cases = {"wrapper": lambda patcher: sampled(wrapped(patcher), prompt)}
    for name, weights in all_loras().items():
        cases[f"hook {name}"] = lambda patcher, weights=weights: hooked(patcher, weights)
    cases["hook on lora"] = lambda patcher: hooked(patched(patcher, all_of["kohya"]), all_of["diffusers"])
    all_of, other = all_loras(), HOST.load_model(dense_of(FILES[1])).model.state_dict()
    model_as_lora = {key: value for key, value in other.items() if key.startswith("diffusion_model.")}

    def as_lora(patcher: Any) -> torch.Tensor:
        hooks = comfy.hooks.create_hook_model_as_lora(model_as_lora, None, 0.5, 0.0)
        return sampled(patcher, comfy.hooks.set_hooks_for_conditioning(prompt, hooks=hooks))

    cases["hook model"] = as_lora
    for name, run in cases.items():
        mine = run(ours)
        comfy.model_management.unload_all_models()
        theirs_out = run(theirs)
        comfy.model_management.unload_all_models()
        found[name] = {"off": relative(mine, theirs_out), "changed": relative(mine, base),
                       "base": relative(sampled(ours, prompt), base)}
    after = bytes_of(ours)
    found["bytes"] = {"same": all(torch.equal(before[key], after[key]) for key in before)}
    return found


@check
def packed_merge_and_save() -> Any:
    if not FILES:
        return {}
    found, prompt = {}, conditioning()
    folder_paths.set_output_directory(str(OUT))
    for path in FILES[:2]:
        ours, plain = HOST.load_model(path), HOST.load_model(dense_of(path))
        other = HOST.load_model(FILES[-1])
        other_plain = HOST.load_model(dense_of(FILES[-1]))
        expected = sampled(ModelMergeSimple().merge(plain, other_plain, 0.4)[0], prompt)
        pairs = {"both": (ours, other), "into": (ours, other_plain), "from": (plain, other)}
        case = {f"merge {name}": relative(sampled(ModelMergeSimple().merge(a, b, 0.4)[0], prompt), expected)
                for name, (a, b) in pairs.items()}
        comfy.model_management.unload_all_models()
        weights = all_loras()["kohya"] | all_loras()["diff"]
        for name, patcher in {"saved": ours, "saved with lora": patched(ours, weights)}.items():
            ModelSave().save(patcher, f"{path.stem}-{name}")
            saved, = OUT.glob(f"{path.stem}-{name}_*")
            again = HOST.load_model(saved)
            case[name] = relative(sampled(again, prompt), sampled(patcher, prompt))
            case[f"{name}, layers"] = len(packed_layers(again.model))
        found[path.name] = case
    ours = HOST.load_model(FILES[0])
    key = next(iter(packed_layers(ours.model)))
    dense = HOST.load_model(dense_of(FILES[0])).model.state_dict()[f"{key}.weight"]
    found["asked for one"] = {"off": relative(ours.model_state_dict("diffusion_model.")[f"{key}.weight"], dense)}
    foreign = comfy.model_patcher.ModelPatcher(ours.model, ours.load_device, ours.offload_device)
    weights = all_loras()["kohya"]
    found["foreign patcher"] = {"refused": message(lambda: sampled(patched(foreign, weights), prompt))}
    weights = low_rank({"double_blocks.0.img_attn.proj": (2 * D, D)}, "lora_A", "lora_B", "diffusion_model.")
    weights["diffusion_model.double_blocks.0.img_attn.proj.reshape_weight"] = torch.tensor([2 * D, D])
    found["another size"] = {"refused": message(lambda: sampled(patched(ours, weights), prompt))}
    as_lora = comfy.hooks.create_hook_model_as_lora(ours.model.state_dict(), None, 1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(prompt, hooks=as_lora)
    found["packed as a lora"] = {"refused": message(lambda: sampled(ours, hooked))}
    comfy.model_management.unload_all_models()
    found["after refusals"] = {"off": relative(sampled(ours, prompt), sampled(HOST.load_model(FILES[0]), prompt))}
    return found


@check
def packed_text() -> Any:
    files = [FOLDER / "clip_l.gguf", FOLDER / "t5.gguf"]
    if not FILES:
        return {}
    clip, plain = HOST.load_text_encoders(files), HOST.load_text_encoders([dense_of(file) for file in files])
    found: dict[str, Any] = {"layers": {name: sorted({layer.format.name for layer in packed_layers(part).values()})
                                        for name, part in (("clip_l", clip.cond_stage_model.clip_l),
                                                           ("t5xxl", clip.cond_stage_model.t5xxl))}}
    found["embeddings"] = sum(isinstance(layer, torch.nn.Module) and hasattr(layer, "num_embeddings")
                              for layer in packed_layers(clip.cond_stage_model).values())

    def told(of: Any) -> tuple[torch.Tensor, torch.Tensor]:
        (cond, values), = HOST.encode_prompt(of, "a (red:1.2) circle")
        return cond, values["pooled_output"]

    def off(a: Any, b: Any) -> list[float]:
        return [relative(x, y) for x, y in zip(told(a), told(b), strict=True)]

    state = plain.cond_stage_model.state_dict()
    weights = {}
    for name, key in {"lora_te1_text_model_encoder_layers_0_self_attn_q_proj":
                      "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
                      "lora_te2_encoder_block_0_layer_0_SelfAttention_q":
                      "t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"}.items():
        weights |= low_rank({name: tuple(state[key].shape)}, "lora_down", "lora_up", alpha=True)
    weights["text_encoders.t5xxl.transformer.shared.diff"] = random(
        *state["t5xxl.transformer.shared.weight"].shape, size=0.05)

    def changed(of: Any) -> Any:
        return comfy.sd.load_lora_for_models(None, of, dict(weights), 0.0, 1.0)[1]

    base, lora = told(clip), changed(clip)
    found["off"], found["off with lora"] = off(clip, plain), off(lora, changed(plain))
    found["changed"] = [relative(a, b) for a, b in zip(told(lora), base, strict=True)]
    found["base"] = [relative(a, b) for a, b in zip(told(clip), base, strict=True)]
    comfy.model_management.unload_all_models()
    found["kinds"] = [type(lora.patcher).__name__, type(lora.clone()).__name__, type(clip.patcher).__name__]
    plain_outs, lora_outs = (in_part_and_whole(patcher, lambda: clip.cond_stage_model.encode_token_weights(
        clip.tokenize("a red circle"))[0])[0] for patcher in (clip.patcher, lora.patcher))
    found["streamed"] = [bool(torch.equal(*plain_outs)), bool(torch.equal(*lora_outs)),
                         not torch.equal(plain_outs[1], lora_outs[1])]
    folder_paths.set_output_directory(str(OUT))
    CLIPSave().save(lora, "text")
    saved = [next(OUT.glob(f"text_{part}_*")).rename(OUT / f"{role}.safetensors")
             for part, role in (("clip_l", "clip_l"), ("t5xxl", "t5"))]
    found["saved"] = off(HOST.load_text_encoders(saved), lora)
    found["dtypes"] = sorted({str(tensor.dtype) for file in saved for tensor in load_file(file).values()})
    found["mixed"] = off(HOST.load_text_encoders([ENCODERS[0], files[1]]),
                         HOST.load_text_encoders([ENCODERS[0], dense_of(files[1])]))
    return found


@check
def packed_lifetime() -> Any:
    """Nothing is left of a model nobody holds; the host can load it anew."""
    if not FILES:
        return {}
    patcher = HOST.load_model(FILES[0])
    again = loaded_anew(patcher)
    patcher = patched(patcher, all_loras()["kohya"])
    comfy.model_management.load_models_gpu([patcher])
    found = {"again": [again["same"], again["kind"], type(patcher).__name__],
             "loaded": patcher.loaded_size() >= patcher.model_size()}
    gone = {"freed": weakref.ref(patcher.model)}
    patcher = None
    return {**found, **freed(gone)}
