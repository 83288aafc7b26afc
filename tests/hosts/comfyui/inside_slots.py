"""Checks of inside.py: references, noise_concat and masks by the host's own model class and sampler, on our network and
on core's; and the standalone host's equivalents of core nodes beside the core nodes themselves. Imported by it."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import sys
from typing import Any

import comfy_extras.nodes_canny
import comfy_extras.nodes_flux
import comfy_extras.nodes_images
import comfy_extras.nodes_ip2p
import comfy_extras.nodes_mask
import comfy_extras.nodes_post_processing
import torch
from inside import HOST, MODEL, NAME, TINY, check, conditioning, core_patcher, our_sampler, random, relative, sampled
from inside_variants import VAE, random_file

import nodes as core_nodes

GRID = (6, 8)


def carrying(prompt: Any, **values: Any) -> Any:
    return [[cond, {**known, **values}] for cond, known in prompt]


def longer(prompt: Any, count: int) -> Any:
    """With `count` text tokens more, as Redux adds them."""
    return [[torch.cat((cond, random(1, count, cond.shape[-1])), dim=1), values] for cond, values in prompt]


def bias(prompt: Any, count: int, image: int, value: float) -> torch.Tensor:
    """All others see the last `count` text tokens by `value`."""
    length = prompt[0][0].shape[1]
    mask = torch.zeros(1, length + image, length + image)
    mask[:, :, length - count:length] = value
    mask[:, length - count:length, length - count:length] = 0
    return mask


@check
def references() -> Any:
    """By every method, with other references in the negative prompt."""
    ours, prompt = HOST.load_model(MODEL), conditioning()
    twin, first, second = core_patcher(ours), random(1, 16, 12, 8), random(1, 16, 8, 16)
    plain, found = sampled(twin, prompt), {}
    for method in ("offset", "index", "uxo"):
        one = carrying(prompt, reference_latents=[first, second], reference_latents_method=method)
        other = carrying(prompt, reference_latents=[second])
        for cfg in (1.0, 2.0):
            theirs = sampled(twin, one, other, cfg=cfg)
            found[f"{method}, cfg {cfg:g}"] = {
                "off": relative(sampled(ours, one, other, cfg=cfg), theirs),
                "our sampler": relative(our_sampler(ours, one, other, cfg=cfg), theirs),
                "changed": relative(theirs, plain)}
    return found


@check
def masks_with_references() -> Any:
    """Masks of text and picture alone, on which core's network fails. Oracle: core's, given one that covers all."""
    ours, reference = HOST.load_model(MODEL), random(1, 16, 12, 16)
    twin, prompt, found = core_patcher(ours), longer(conditioning(), 5), {}
    kept = carrying(prompt, reference_latents=[reference])
    plain = sampled(twin, kept)
    tokens = math.prod(GRID)
    for name, value, grid in (("any size", -0.7, (1, 1)), ("own size", -0.7, GRID), ("hidden", -60.0, (1, 1))):
        short = carrying(kept, attention_mask=bias(prompt, 5, math.prod(grid), value), attention_mask_img_shape=grid)
        whole = carrying(kept, attention_mask=bias(prompt, 5, 2 * tokens, value), attention_mask_img_shape=GRID)
        theirs = sampled(twin, whole)
        found[name] = {"off": relative(sampled(ours, short), theirs), "whole": relative(sampled(ours, whole), theirs),
                       "changed": relative(theirs, plain), "core": failure(sampled, twin, short)}
    return found


def failure(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
    return ""


@check
def noise_concat() -> Any:
    """Channels handed over ready made, in the model's scale."""
    found, prompt = {}, conditioning()
    for name, width, channels in (("fill", 384, 80), ("control", 128, 16)):
        ours = HOST.load_model(random_file(f"concat-{name}", in_channels=width))
        given = carrying(prompt, noise_concat=random(1, channels, 12, 16))
        found[name] = {"off": relative(sampled(ours, given), sampled(core_patcher(ours), given))}
    return found


# -- the standalone host's equivalents

HOSTS = sys.modules[NAME + ".hosts"]


def answer(node: Any, inputs: dict[str, Any], **more: Any) -> list[Any]:
    """What a node gives, older or newer; inputs that it lacks in this version are left out."""
    call = getattr(node, "execute", None) or getattr(node(), node.FUNCTION)
    known = inspect.signature(call).parameters
    given = {name: value for name, value in copy.deepcopy(inputs).items() if name in known}
    out = call(**given, **{name: value for name, value in more.items() if name in known})
    return list(getattr(out, "args", None) or getattr(out, "result", None) or out)


def apart(mine: Any, theirs: Any) -> float:
    """The largest difference of two answers of any shape; inf where they are not alike."""
    if isinstance(theirs, torch.Tensor):
        if not isinstance(mine, torch.Tensor) or mine.shape != theirs.shape:
            return math.inf
        return float((mine.float() - theirs.float()).abs().max())
    if isinstance(theirs, dict):
        if mine.keys() != theirs.keys():
            return math.inf
        return max((apart(mine[key], theirs[key]) for key in theirs), default=0.0)
    if isinstance(theirs, (list, tuple)):
        if len(mine) != len(theirs):
            return math.inf
        return max((apart(a, b) for a, b in zip(mine, theirs, strict=True)), default=0.0)
    return 0.0 if mine == theirs else math.inf


def node_cases(prompt: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    picture, odd = random(2, 40, 72, 3).sigmoid(), random(1, 45, 61, 3).sigmoid()
    mask, rgba = random(1, 45, 61).sigmoid(), random(1, 40, 72, 4).sigmoid()
    images, post = comfy_extras.nodes_images, comfy_extras.nodes_post_processing
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for method in ("nearest-exact", "bilinear", "area", "bicubic", "lanczos"):
        found[f"ImageScale, {method}"] = core_nodes.ImageScale, {
            "image": picture, "upscale_method": method, "width": 50, "height": 50, "crop": "center"}
    for width, height in ((0, 31), (33, 0), (0, 0), (100, 30)):
        found[f"ImageScale, {width} x {height}"] = core_nodes.ImageScale, {
            "image": odd, "upscale_method": "bilinear", "width": width, "height": height, "crop": "disabled"}
    found["ImageScaleBy"] = core_nodes.ImageScaleBy, {"image": odd, "upscale_method": "lanczos", "scale_by": 0.37}
    found["ImageInvert"] = core_nodes.ImageInvert, {"image": odd}
    stepped = "resolution_steps" in str(post.ImageScaleToTotalPixels.INPUT_TYPES())  # newer versions
    for steps in (1, 16) if stepped else (1,):
        found[f"ImageScaleToTotalPixels, {steps}"] = post.ImageScaleToTotalPixels, {
            "image": odd, "upscale_method": "lanczos", "megapixels": 0.02, "resolution_steps": steps}
    for image in (picture, picture.movedim(1, 2), picture[:, :, :40]):
        found[f"ImageScaleToMaxDimension, {tuple(image.shape)}"] = getattr(images, "ImageScaleToMaxDimension", None), {
            "image": image, "upscale_method": "area", "largest_size": 33}
    for i, direction in enumerate(("right", "down", "left", "up")):
        for match, colour, other in ((True, "white", odd), (False, "black", odd), (False, "red", rgba)):
            found[f"ImageStitch, {direction}, {match}, {colour}"] = images.ImageStitch, {
                "image1": picture, "direction": direction, "match_image_size": match, "spacing_width": 3 * i,
                "spacing_color": colour, "image2": other}
    found["ImageStitch, one"] = images.ImageStitch, {"image1": picture, "direction": "right", "match_image_size": True,
                                                     "spacing_width": 4, "spacing_color": "white"}
    for sides in ((8, 0, 16, 0), (8, 16, 24, 40), (0, 0, 0, 0), (0, 8, 0, 0)):
        for feathering in (0, 7, 24):
            found[f"ImagePadForOutpaint, {sides}, {feathering}"] = core_nodes.ImagePadForOutpaint, {
                "image": picture, "feathering": feathering,
                **dict(zip(("left", "top", "right", "bottom"), sides, strict=True))}
    masks = comfy_extras.nodes_mask
    found["SolidMask"] = masks.SolidMask, {"value": 0.3, "width": 5, "height": 4}
    found["InvertMask"] = masks.InvertMask, {"mask": mask}
    for expand, tapered in ((3, True), (2, False), (-3, True), (0, True), (-2, False)):
        found[f"GrowMask, {expand}, {tapered}"] = masks.GrowMask, {
            "mask": mask, "expand": expand, "tapered_corners": tapered}
    found["MaskToImage"] = masks.MaskToImage, {"mask": mask}
    found["ImageToMask"] = masks.ImageToMask, {"image": odd, "channel": "green"}
    found["Canny"] = comfy_extras.nodes_canny.Canny, {"image": picture, "low_threshold": 0.1, "high_threshold": 0.3}
    flux = comfy_extras.nodes_flux
    for image in (picture, odd.movedim(1, 2), odd[:, :, :45]):
        found[f"FluxKontextImageScale, {tuple(image.shape)}"] = flux.FluxKontextImageScale, {"image": image}
    for method in ("offset", "index", "uxo/uno"):
        found[f"FluxKontextMultiReferenceLatentMethod, {method}"] = flux.FluxKontextMultiReferenceLatentMethod, {
            "conditioning": prompt, "reference_latents_method": method}
    found["FluxDisableGuidance"] = flux.FluxDisableGuidance, {"conditioning": prompt}
    edit = importlib.import_module("comfy_extras.nodes_edit_model")
    for name, given in (("first", prompt), ("second", carrying(prompt, reference_latents=[random(1, 16, 2, 2)]))):
        found[f"ReferenceLatent, {name}"] = edit.ReferenceLatent, {
            "conditioning": given, "latent": {"samples": random(1, 16, 4, 4)}}
    found["ReferenceLatent, none"] = edit.ReferenceLatent, {"conditioning": prompt}
    both = {"positive": prompt, "negative": carrying(prompt, guidance=1.0)}
    soft = (random(1, 20, 30) * 3).sigmoid()
    for name, image, hole in (("whole", picture, soft), ("cut", odd, mask), ("masks", picture, soft.repeat(2, 1, 1))):
        for keep in (True, False):
            found[f"InpaintModelConditioning, {name}, {keep}"] = core_nodes.InpaintModelConditioning, {
                **both, "pixels": image, "mask": hole, "noise_mask": keep}
        found[f"InstructPixToPixConditioning, {name}"] = comfy_extras.nodes_ip2p.InstructPixToPixConditioning, {
            **both, "pixels": image}
    return found


@check
def equivalents() -> Any:
    """Each case by core's node and by the standalone host's, on the same inputs."""
    standalone = importlib.import_module(NAME + ".hosts.standalone.host")
    folders = importlib.import_module(NAME + ".hosts.standalone.folders")
    prompt, theirs = conditioning(), HOST.load_vae(VAE)
    host = standalone.StandaloneHost(folders.Folders(models=[TINY]), device="cpu", dtype="fp32")
    ours, classes, found = host.load_vae(VAE), {}, {}
    HOSTS.use(host)
    try:
        for module, names in (("core_pictures", "PICTURE_NODES"), ("core_conditioning", "CONDITIONING_NODES")):
            listed = getattr(importlib.import_module(f"{NAME}.hosts.standalone.{module}"), names)
            classes |= {node.GET_SCHEMA().node_id: node for node in listed}
        for name, (core, inputs) in node_cases(prompt).items():
            if core is not None:  # else this version has no such node
                mine = answer(classes[name.split(",")[0]], inputs, vae=ours)
                found[name] = apart(mine, answer(core, inputs, vae=theirs))
    finally:
        HOSTS.use(HOST)
    return {"off": found, "nodes": sorted(classes)}
