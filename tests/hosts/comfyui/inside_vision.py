"""Checks of inside.py: CLIP_VISION and STYLE_MODEL against the host's own, by the host's own nodes. Imported by it."""

from __future__ import annotations

import importlib
import json
import math
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.clip_vision
import comfy.ldm.flux.redux
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from inside import ENGINE, HOST, check, freed, held, in_part_and_whole, loaded_anew, mapped, random, relative
from inside import NAME as PACKAGE
from inside_accidents import message
from safetensors.torch import save_file

import nodes as core_nodes

VISION = importlib.import_module(ENGINE + ".models.vision")
SPECS = importlib.import_module(ENGINE + ".specs")
PREPROCESS = comfy.clip_vision.clip_preprocess
FULL = replace(SPECS.SIGLIP, num_hidden_layers=2)
SMALL = replace(SPECS.SIGLIP, hidden_size=128, num_attention_heads=2, intermediate_size=200, num_hidden_layers=3,
                image_size=56)
SMALL_REDUX = SPECS.ReduxSpec(redux_dim=128, txt_in_features=64)
FOLDER = TemporaryDirectory()  # gone with the process


def weights_of(kind: Any, spec: Any) -> dict[str, torch.Tensor]:
    """fp16, of sizes that keep the variance near 1."""
    with torch.device("meta"):
        model = kind(spec)
    state = {}
    for name, tensor in model.state_dict().items():
        norm = tensor.ndim == 1 and "norm" in name and name.endswith("weight")
        size = 0.1 if tensor.ndim == 1 else 1 / math.sqrt(tensor[0].numel()) if "position" not in name else 0.5
        state[name] = (random(*tensor.shape, size=size) + (1.0 if norm else 0.0)).half()
    return state


def file_of(kind: Any, spec: Any, name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    path, state = Path(FOLDER.name, name), weights_of(kind, spec)
    save_file(state, path)
    return path, state


def core_vision(spec: Any, state: dict[str, torch.Tensor]) -> Any:
    config = {**asdict(spec), "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh",
              "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    path = Path(FOLDER.name, "config.json")
    path.write_text(json.dumps(config))
    made = comfy.clip_vision.ClipVisionModel(str(path))
    missing, unexpected = made.load_sd(dict(state))
    assert not missing and all(".head." in name for name in unexpected)
    return made


def core_style(spec: Any, state: dict[str, torch.Tensor]) -> Any:
    network = comfy.ldm.flux.redux.ReduxImageEncoder(redux_dim=spec.redux_dim, txt_in_features=spec.txt_in_features)
    network.load_state_dict(state)
    return comfy.sd.StyleModel(network)


def picture(*sides: int) -> torch.Tensor:
    """Noise of several sizes of grain, some of it outside 0..1."""
    fine = torch.rand(sides[0], sides[3], *sides[1:3])
    coarse = torch.nn.functional.interpolate(torch.rand(sides[0], sides[3], 5, 7), size=sides[1:3], mode="bilinear")
    return (fine * 0.4 + coarse * 0.8 - 0.1).movedim(1, -1)


PICTURES = {"wide": (1, 90, 130, 3), "tall, batch": (2, 301, 200, 3), "its own size": (1, 384, 384, 3),
            "with alpha": (1, 64, 80, 4), "the small one's size": (1, 56, 56, 3)}
FIELDS = ("last_hidden_state", "penultimate_hidden_states", "all_hidden_states", "image_embeds")


def seen(clip_vision: Any, image: torch.Tensor, crop: str) -> Any:
    return core_nodes.CLIPVisionEncode().encode(clip_vision, image.clone(), crop)[0]


def compared(mine: Any, theirs: Any) -> dict[str, Any]:
    return {**{field: relative(mine[field], theirs[field]) for field in FIELDS},
            "shape": list(mine.last_hidden_state.shape), "fields": sorted(vars(mine)) == sorted(vars(theirs))}


@check
def vision() -> Any:
    """Small: all pictures and crops. Full width: one of each."""
    path, state = file_of(VISION.SiglipVision, SMALL, "small.safetensors")
    mine, theirs = HOST.load_clip_vision(path), core_vision(SMALL, state)
    found: dict[str, Any] = {}
    for name, sides in PICTURES.items():
        image = picture(*sides)
        for crop in ("center", "none"):
            found[f"{name}, {crop}"] = compared(seen(mine, image, crop), seen(theirs, image, crop))
    path, state = file_of(VISION.SiglipVision, FULL, "full.safetensors")
    mine, theirs = HOST.load_clip_vision(path), core_vision(FULL, state)
    for crop in ("center", "none"):
        image = picture(1, 300, 420, 3)
        found[f"full width, {crop}"] = compared(seen(mine, image, crop), seen(theirs, image, crop))
    states = HOST.see(mine, image, crop=False)
    found["by the port"] = {"ours": relative(states, seen(theirs, image, "none").last_hidden_state),
                            "core's": relative(HOST.see(theirs, image, crop=False), states)}
    return found


@check
def pixels() -> Any:
    """What the engine makes of pictures, for the standalone host, against the host's function: largest difference."""
    found = {}
    for name, sides in {**PICTURES, "large": (1, 1000, 700, 3), "strip": (1, 3, 500, 3)}.items():
        for crop in (True, False):
            image = picture(*sides)
            theirs = PREPROCESS(image.clone(), size=384, mean=[0.5] * 3, std=[0.5] * 3, crop=crop)
            mine = VISION.to_pixels(image, SPECS.SIGLIP, crop)
            found[f"{name}, {crop}"] = float((mine - theirs).abs().max())
    return found


def applied(style: Any, output: Any, strength: float, kind: str, conditioning: Any) -> Any:
    return core_nodes.StyleModelApply().apply_stylemodel(conditioning, style, output, strength, kind)[0]


def far(mine: Any, theirs: Any) -> float:
    """How far two conditionings of one entry are from each other, their masks included."""
    (text, values), (other, told) = mine[0], theirs[0]
    masks = values.get("attention_mask"), told.get("attention_mask")
    assert set(values) == set(told) and (masks == (None, None) or torch.equal(*masks))
    return relative(text, other)


@check
def style() -> Any:
    """Ours and core's vision encoders and style models in all pairs, at the published widths of both models."""
    path, state = file_of(VISION.Redux, SPECS.REDUX, "redux.safetensors")
    styles = {"ours": HOST.load_style_model(path), "core": comfy.sd.load_style_model(str(path))}
    path, state = file_of(VISION.SiglipVision, FULL, "full.safetensors")
    outputs = {name: seen(clip_vision, picture(1, 120, 100, 3), "none") for name, clip_vision in
               (("ours", HOST.load_clip_vision(path)), ("core", core_vision(FULL, state)))}
    text = [[random(1, 20, 4096), {"pooled_output": random(1, 768)}]]
    made = {(v, s): applied(styles[s], outputs[v], 1.0, "multiply", text) for v in outputs for s in styles}
    states = outputs["ours"].last_hidden_state
    return {"shape": list(made["ours", "ours"][0][0].shape),
            "one model": {v: far(made[v, "ours"], made[v, "core"]) for v in outputs},
            "by the port": {s: relative(HOST.style_tokens(styles[s], states), made["ours", "core"][0][0][:, 20:])
                            for s in styles}}


@check
def strengths() -> Any:
    """Every kind and some strengths, one after the other and on top of a mask, at small widths: core's node against
    what the standalone host does in its place."""
    _, state = file_of(VISION.Redux, SMALL_REDUX, "small_redux.safetensors")
    theirs, mine = core_style(SMALL_REDUX, state), VISION.Redux(SMALL_REDUX)
    mine.load_state_dict(state)
    tokens = importlib.import_module(PACKAGE + ".hosts.standalone.core_vision").with_tokens

    def alone(strength: float, kind: str, conditioning: Any) -> Any:
        seen = mine(output.last_hidden_state).flatten(0, 1)[None]
        bias = kind == "attn_bias"
        return [tokens(*entry, seen if bias else seen * strength, strength if bias else 1.0) for entry in conditioning]

    output = comfy.clip_vision.Output()
    output["last_hidden_state"] = random(2, 16, 128)
    text = [[random(1, 20, 64), {"pooled_output": random(1, 64), "guidance": 3.5}]]
    masked = [[text[0][0], {**text[0][1], "attention_mask": torch.rand(1, 26, 26) < 0.5,
                            "attention_mask_img_shape": (2, 3)}]]
    found = {}
    for kind in ("multiply", "attn_bias"):
        for strength in (0.0, 0.3, 1.0, 2.5):
            for name, start in (("plain", text), ("masked", masked)):
                pair = alone(strength, kind, start), applied(theirs, output, strength, kind, start)
                again = alone(0.5, "attn_bias", pair[0]), applied(theirs, output, 0.5, "attn_bias", pair[1])
                found[f"{kind} {strength} {name}"] = {"once": far(*pair), "twice": far(*again),
                                                      "mask": "attention_mask" in pair[1][0][1]}
    return found


@check
def masks() -> Any:
    """Attention masks resized by the engine, for the standalone host, and by the host: largest difference."""
    masks = importlib.import_module(ENGINE + ".sampling.masks")
    found = {}
    for old, new in (((1, 1), (5, 7)), ((2, 3), (6, 4)), ((8, 8), (3, 5)), ((4, 6), (4, 6))):
        bias = random(2, 9 + math.prod(old), 9 + math.prod(old))
        theirs = comfy.utils.upscale_dit_mask(bias, old, new)
        found[f"{old} to {new}"] = float((masks.AttentionMask(bias, old).fitted(new)[:, 0] - theirs).abs().max())
    return found


@check
def vision_memory() -> Any:
    """A third of the weights loaded against all; what is told of the weights; loaded anew; given up."""
    made = {"vision": HOST.load_clip_vision(file_of(VISION.SiglipVision, SMALL, "small.safetensors")[0]),
            "style": HOST.load_style_model(file_of(VISION.Redux, SMALL_REDUX, "small_redux.safetensors")[0])}
    inputs = {"vision": random(1, 3, 56, 56), "style": random(1, 16, 128)}
    found, gone = {}, {}
    for name, thing in made.items():
        patcher = thing.patcher
        outs, share = in_part_and_whole(patcher, lambda name=name, model=patcher.model: model(inputs[name]))
        found[name] = {"off": relative(*(out if name == "style" else out[0] for out in outs)), "share": share,
                       "told": patcher.model_size(), "held": held(patcher), "mapped": mapped(patcher),
                       **loaded_anew(patcher)}
        comfy.model_management.load_models_gpu([patcher])
        gone[name] = weakref.ref(patcher.model)
        patcher = thing = outs = None
    made.clear()
    return {name: {**found[name], "freed": one} for name, one in freed(gone).items()}


@check
def vision_refusals() -> Any:
    """Bad pictures and models that do not fit."""
    path, state = file_of(VISION.SiglipVision, SMALL, "small.safetensors")
    clip_vision = HOST.load_clip_vision(path)
    redux = HOST.load_style_model(file_of(VISION.Redux, replace(SMALL_REDUX, redux_dim=96), "narrow.safetensors")[0])
    other = Path(FOLDER.name, "clip_vision_l.safetensors")
    tower = {name: tensor for name, tensor in state.items() if "patch_embedding.bias" not in name}
    save_file({**tower, "vision_model.embeddings.class_embedding": torch.zeros(1024)}, other)
    text = [[random(1, 20, 64), {}]]
    image = picture(1, 60, 60, 3)
    nan, broken = image.clone(), core_vision(SMALL, {name: tensor * math.inf for name, tensor in state.items()})
    nan[0, 3, 3, 1] = math.nan
    output = seen(clip_vision, image, "none")
    return {"nan": message(seen, clip_vision, nan, "none"),
            "two channels": message(seen, clip_vision, image[..., :2], "none"),
            "a mask": message(seen, clip_vision, image[..., 0], "none"),
            "a strip": message(seen, clip_vision, torch.zeros(1, 1, 60000, 3), "center"),
            "width": message(applied, redux, output, 1.0, "multiply", text),
            "width, core's style model": message(HOST.style_tokens, core_style(
                replace(SMALL_REDUX, redux_dim=96), weights_of(VISION.Redux, replace(SMALL_REDUX, redux_dim=96))),
                output.last_hidden_state),
            "no redux": message(HOST.style_tokens, comfy.sd.StyleModel(torch.nn.Identity()), output.last_hidden_state),
            "nan, core's vision encoder": message(HOST.see, broken, image),
            "another vision encoder": message(HOST.load_clip_vision, other),
            "exchanged": message(HOST.load_style_model, path)}
