"""Checks of inside.py on LoRAs by our nodes' port, with the files that test_lora.py writes into the folder
FLUX_KIT_LORAS names; nothing without it. Oracle: core's own loader of LoRAs on the same model. Imported by inside.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.text_encoders.sd3_clip
import comfy.utils
import folder_paths
import torch
from inside import (
    ENCODERS,
    ENGINE,
    ERRORS,
    HOST,
    MODEL,
    SHARES,
    check,
    conditioning,
    core_patcher,
    in_part_and_whole,
    loading,
    pass_inputs,
    relative,
    sampled,
)

FOLDER = Path(os.environ.get("FLUX_KIT_LORAS", "/nowhere"))
FILES = sorted(path.stem for path in (FOLDER / "loras").glob("*.safetensors"))
CORE_READS = ("kohya", "peft", "lokr")
if FILES:
    folder_paths.add_model_folder_path("loras", str(FOLDER / "loras"))
    STACK = sys.modules[ENGINE + ".adapters.stack"]


def rows(name: str, strength: float = 0.7, **more: Any) -> list[Any]:
    return [STACK.Row(f"{name}.safetensors", strength, strength, **more)]


def ours(model: Any, name: str, strength: float = 0.7, mode: str = "auto", **more: Any) -> Any:
    return HOST.with_loras(model, None, rows(name, strength, **more), mode=mode)[0]


def cores(model: Any, name: str, strength: float = 0.7) -> Any:
    weights = comfy.utils.load_torch_file(str(FOLDER / "loras" / f"{name}.safetensors"), safe_load=True)
    return comfy.sd.load_lora_for_models(model, None, weights, strength, 0.0)[0]


def models() -> dict[str, Any]:
    found = {"ours": HOST.load_model(MODEL), "packed": HOST.load_model(FOLDER / "flux-k.gguf")}
    found["core's"] = core_patcher(found["ours"])
    with mock.patch.object(comfy.model_management.args, "bf16_unet", True):
        found["ours in bf16"] = HOST.load_model(MODEL)
    return found


@check
def lora_apply() -> Any:
    """Our way against core's loader, by kind of model and file; the side path; and the base afterwards."""
    found: dict[str, Any] = {}
    prompt = conditioning() if FILES else None
    for kind, model in models().items() if FILES else ():
        base = sampled(model, prompt)
        for name in CORE_READS:
            mine = sampled(ours(model, name), prompt)
            beside = sampled(ours(model, name, mode="side"), prompt)
            found[f"{name} on {kind}"] = {
                "off": relative(mine, sampled(cores(model, name), prompt)), "beside": relative(beside, mine),
                "changed": relative(mine, base), "base": torch.equal(sampled(model, prompt), base)}
    return found


@check
def lora_dialects() -> Any:
    """Files that core does not read: by the host's patches and by the side path."""
    found: dict[str, Any] = {}
    model, prompt = (HOST.load_model(MODEL), conditioning()) if FILES else (None, None)
    base = sampled(model, prompt) if FILES else None
    for name in FILES:
        if name.startswith("bad") or name in (*CORE_READS, "control", "text"):
            continue
        inside, beside = (sampled(ours(model, name, mode=mode), prompt) for mode in ("auto", "side"))
        found[name] = {"off": relative(inside, beside), "changed": relative(inside, base),
                       "base": torch.equal(sampled(model, prompt), base)}
    return found


@check
def lora_partial_load() -> Any:
    """A third of the weights loaded, against all of them."""
    if not FILES:
        return {}
    inputs, found = pass_inputs(), {}
    for kind, model in models().items():
        for name in ("kohya", "lokr"):
            made = ours(model, name)
            outs, share = in_part_and_whole(made, lambda model=made.model: model.apply_model(**inputs))
            found[f"{name} on {kind}"] = {"off": relative(*outs), "share": share}
    return found


@check
def lora_steps_and_places() -> Any:
    """Ranges, schedules and regions on every kind of model, and stacks with other loaders."""
    found: dict[str, Any] = {}
    prompt = conditioning() if FILES else None
    for kind, model in models().items() if FILES else ():
        base, whole = sampled(model, prompt), sampled(ours(model, "kohya"), prompt)
        made = {name: sampled(HOST.with_loras(model, None, given)[0], prompt) for name, given in {
            "always": STACK.with_schedule(rows("kohya"), 0, 1, ((0.0, 1.0), (1.0, 1.0))),
            "never": rows("kohya", start=1.0), "first half": rows("kohya", end=0.5),
            "everywhere": STACK.with_region(rows("kohya"), torch.ones(8, 8), 0, 0.0, 1.0),
            "nowhere": STACK.with_region(rows("kohya"), torch.zeros(8, 8), 0, 0.0, 0.0),
            "left": STACK.with_region(rows("kohya"), (torch.arange(8) < 4).float().expand(8, 8), 0, 0.0, 0.0)}.items()}
        stacks = {"core's below": ours(cores(model, "peft"), "kohya"),
                  "core's above": cores(ours(model, "kohya"), "peft"),
                  "ours twice": ours(ours(model, "kohya"), "peft"),
                  "steps twice": ours(ours(model, "kohya", end=0.999), "peft", mode="side")}
        sums = {name: sampled(stack, prompt) for name, stack in stacks.items()}
        found[kind] = {
            **{name: [relative(out, base), relative(out, whole)] for name, out in made.items()},
            "stacks": {name: relative(out, sums["core's below"]) for name, out in sums.items()},
            "base": torch.equal(sampled(model, prompt), base), "hooks": hooks_left(model),
            "more": len(model.patches) + len(model.wrappers)}
    return found


@check
def lora_order() -> Any:
    """Two rows that replace a norm, at strengths that others have too; and a shift of the times behind Apply LoRAs."""
    if not FILES:
        return {}
    model, prompt = HOST.load_model(MODEL), conditioning()
    first, earlier, later = rows("kohya", 1.0), rows("norm a", 0.5), rows("norm b", 1.0)
    stacks = {"both": [*first, *earlier, *later], "earlier": [*first, *earlier], "later": [*first, *later]}
    outs = {name: sampled(HOST.with_loras(model, None, stack)[0], prompt) for name, stack in stacks.items()}
    before, after = (sampled(made, prompt, steps=8) for made in (
        ours(HOST.with_shift(model, 3.0), "kohya", end=0.5), HOST.with_shift(ours(model, "kohya", end=0.5), 3.0)))
    return {"later": relative(outs["both"], outs["later"]), "earlier": relative(outs["both"], outs["earlier"]),
            "shift": relative(after, before),
            "ranged": relative(before, sampled(HOST.with_shift(model, 3.0), prompt, steps=8))}


@check
def lora_reads_weights() -> Any:
    """LoRAs that depend on the weight, beside it, where another LoRA changes it: loaded, streamed, and by the host."""
    found: dict[str, Any] = {}
    prompt = conditioning() if FILES else None
    for kind, model in models().items() if FILES else ():
        under = sampled(ours(model, "under"), prompt)
        for name in ("dora", "oft2"):
            beside, fixed = (HOST.with_loras(model, None, [*rows("under"), *rows(name, 1.0, **more)])[0]
                             for more in ({"end": 0.999}, {}))
            expected, whole = (sampled(made, prompt) for made in (fixed, beside))
            with loading(SHARES["nothing"]):
                streamed = sampled(beside, prompt)
            found[f"{name} on {kind}"] = {"loaded": relative(whole, expected), "streamed": relative(streamed, expected),
                                          "changed": relative(expected, under)}
    return found


def scaled_fp8(layer: Any) -> Any:
    """Core's layer of 8-bit weights with a scale, in the place of a plain one."""
    own = layer.weight.detach().float()
    options = {"bias": layer.bias is not None, "device": "cpu"}
    if hasattr(comfy.ops, "scaled_fp8_ops"):
        scale = own.abs().max() / 448
        made = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=False, scale_input=False).Linear(
            layer.in_features, layer.out_features, dtype=torch.float8_e4m3fn, **options)
        made.scale_weight = torch.nn.Parameter(scale, requires_grad=False)
        weight = (own / scale).to(torch.float8_e4m3fn)
    else:
        made = comfy.ops.mixed_precision_ops({}, compute_dtype=torch.float32).Linear(
            layer.in_features, layer.out_features, dtype=torch.float32, **options)
        made.quant_format, made.layout_type = "float8_e4m3fn", "TensorCoreFP8E4M3Layout"
        weight = comfy.ops.QuantizedTensor.from_float(own, made.layout_type, scale="recalculate")
    made.weight, made.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
    return made


@check
def lora_reads_scaled_weights() -> Any:
    if not FILES:
        return {}
    plain, prompt = HOST.load_model(MODEL), conditioning()
    model = core_patcher(plain)
    flux = model.model.diffusion_model
    flux.single_blocks[1].linear1 = scaled_fp8(flux.single_blocks[1].linear1)
    out = {name: sampled(ours(model, "dora", 1.0, **more), prompt) for name, more in
           {"merged": {}, "beside": {"mode": "side"}}.items()}
    shares = [HOST.lora_share(one, FOLDER / "loras" / "dora.safetensors").total for one in (plain, model)]
    return {"off": relative(out["beside"], out["merged"]), "changed": relative(out["beside"], sampled(model, prompt)),
            "shares": shares}


def hooks_left(model: Any) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks)
               for layer in model.model.diffusion_model.modules())


@check
def lora_text() -> Any:
    """Both text encoders, against core's loader."""
    if not FILES:
        return {}
    clip, model = HOST.load_text_encoders(ENCODERS), HOST.load_model(MODEL)
    weights = comfy.utils.load_torch_file(str(FOLDER / "loras" / "text.safetensors"), safe_load=True)
    theirs = comfy.sd.load_lora_for_models(model, clip, weights, 0.7, 0.7)[1]
    _, mine, report = HOST.with_loras(model, clip, rows("text"))
    told = HOST.with_loras(model, None, rows("text"))[2]
    encoded = {name: HOST.encode_prompt(text, "a red circle")[0] for name, text in (
        ("base", clip), ("ours", mine), ("core's", theirs), ("after", clip))}
    parts = {name: (cond, values["pooled_output"]) for name, (cond, values) in encoded.items()}
    return {"off": [relative(a, b) for a, b in zip(parts["ours"], parts["core's"], strict=True)],
            "changed": [relative(a, b) for a, b in zip(parts["ours"], parts["base"], strict=True)],
            "base": all(torch.equal(a, b) for a, b in zip(parts["after"], parts["base"], strict=True)),
            "report": report, "without clip": told}


@check
def lora_refused() -> Any:
    """What bad files are told, and that the model is as it was."""
    found: dict[str, Any] = {}
    model, prompt = (HOST.load_model(MODEL), conditioning()) if FILES else (None, None)
    for name in FILES:
        if name.startswith("bad"):
            try:
                HOST.with_loras(model, None, [*rows("kohya"), *rows(name)])
                said = ""
            except ERRORS.FluxKitError as error:
                said = str(error)
            warned = HOST.with_loras(model, None, rows(name), strict=False)[2]
            found[name] = {"said": said, "warned": warned, "patches": len(model.patches), "base": len(model.wrappers)}
    if FILES:
        try:
            HOST.with_loras(model, None, [*rows("kohya"), *rows("kohia")])
            found["missing"] = ""
        except ERRORS.MissingFile as error:
            found["missing"] = str(error)
        twice, _, told = HOST.with_loras(model, None, [*rows("kohya", 0.3), *rows("kohya", 0.4)])
        found["twice"] = {"off": relative(sampled(twice, prompt), sampled(ours(model, "kohya"), prompt)), "told": told,
                          "patches": len(model.patches)}
        found["reports"] = {kind: HOST.with_loras(model, None, rows("kohya"))[2] for kind, model in models().items()}
        other = mock.Mock(cond_stage_model=comfy.text_encoders.sd3_clip.SD3ClipModel(False, False, False))
        try:
            HOST.with_loras(model, other, rows("text"))
            found["other clip"] = ""
        except ERRORS.FluxKitError as error:
            found["other clip"] = str(error)
        picture = {"concat_latent_image": torch.randn(1, 16, 12, 16, generator=torch.Generator().manual_seed(2))}
        control = ours(model, "control", 1.0)
        try:
            sampled(control, prompt)
            found["no picture"] = ""
        except ERRORS.FluxKitError as error:
            found["no picture"] = str(error)
        with_picture = [[cond, {**values, **picture}] for cond, values in prompt]
        found["control"] = {
            "off": relative(sampled(control, with_picture), sampled(cores(model, "control", 1.0), with_picture)),
            "base": relative(sampled(control, with_picture), sampled(model, prompt))}
    return found
