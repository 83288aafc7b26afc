"""FluxKitRedux, FluxKitKontext and FluxKitAutoShift in ComfyUI: our sampler and core's, against the standalone host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_inside import Inside
from comfy_server import Failed, Server
from compare import relative
from prompts import Prompt, core, core_loader, flux_kit, node
from torch import Tensor

SAME = 1e-5


# ---------------------------------------------------------------------------------------- in one process with the host

def test_auto_shift_is_black_forest_labs_schedule(inside: Inside) -> None:
    found = inside("auto_shift")
    for loaded, cases in found["far from BFL"].items():
        assert cases.pop("4096") == 0.0, loaded
        assert len(cases) == 3 and max(cases.values()) < 1e-4, loaded
    assert max(found["far from ModelSamplingFlux"].values()) == 0.0
    assert found["given model is as it was"] and found["twice is once"] and found["schnell stays"]
    assert found["another family stays"] and "no FLUX.1" in found["told"]


def test_core_s_network_takes_redux_with_references(inside: Inside) -> None:
    """Core's own nodes crash there; a mask for the size in hand that covers the references passes."""
    found = inside("redux_with_references")
    assert len(found["off"]) == 6 and {name: off for name, off in found["off"].items() if not off <= SAME} == {}
    assert found["nearly off"] <= SAME and found["redux shows"] > 1e-4 and "Error" in found["core's nodes"]


# ------------------------------------------------------------------------------------------------ in a running server

def prompt_of(by: str, positive: str, latent: str = "size", shifted: bool = False, **nodes: Any) -> Prompt:
    """Our sampler ("ours") or core's ("core") on nodes that stand between the prompt and it."""
    slot = [latent, 0 if latent == "size" else 2]
    start = flux_kit(steps=3) if by == "ours" else core(steps=3)
    start["sampler"]["inputs"].update({"positive": [positive, 0], "latent" if by == "ours" else "latent_image": slot})
    if shifted:
        start["sampler"]["inputs"]["model"] = ["shift", 0]
    return {**start, **{name: node(kind, **inputs) for name, (kind, inputs) in nodes.items()}}


PICTURES = {"wide": ("LoadImage", {"image": "wide.png"}), "small": ("LoadImage", {"image": "small.png"}),
            "redux": ("FluxKitLoadRedux", {"clip_vision": "siglip.safetensors", "style_model": "redux.safetensors"})}


def redux(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "FluxKitRedux", {"conditioning": ["text", 0], "style_model": ["redux", 1], "clip_vision": ["redux", 0],
                            "images": ["small", 0], "strength": 1.0, "detail": 27, "fit": "stretch",
                            "several": "append", **changes}


def kontext(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "FluxKitKontext", {"positive": ["text", 0], "vae": ["load", 2], "image_1": ["wide", 0], "size": "keep-16",
                              "layout": "chain", "aspect": "from image", "width": 1024, "height": 1024,
                              "guidance": 2.5, "batch_size": 1, **changes}


AREA = ("SolidMask", {"value": 0.5, "width": 128, "height": 112})
CASES: dict[str, dict[str, Any]] = {
    "redux": {"positive": "style", "style": redux(detail=3, fit="letterbox")},
    "redux, weaker": {"positive": "style", "style": redux(strength=0.3)},
    "redux, an area": {"positive": "style", "area": AREA, "style": redux(area=["area", 0], latent=["size", 0])},
    "kontext": {"positive": "edit", "latent": "edit", "edit": kontext(image_2=["small", 0])},
    "kontext, stitched": {"positive": "edit", "latent": "edit", "edit": kontext(image_2=["small", 0],
                                                                                layout="stitch-right")},
    "kontext, index": {"positive": "edit", "latent": "edit", "edit": kontext(layout="index")},
    "both": {"positive": "edit", "latent": "edit", "style": redux(strength=0.3),
             "edit": kontext(positive=["style", 0])},
    "both, the other way": {"positive": "style", "latent": "edit", "edit": kontext(), "style": redux(
        conditioning=["edit", 0], strength=0.3, latent=["edit", 2])},
    "shifted": {"positive": "text", "shifted": True, "shift": ("FluxKitAutoShift", {
        "model": ["load", 0], "latent": ["size", 0], "base_shift": 0.5, "max_shift": 1.15})},
}


@pytest.mark.parametrize("by", ["ours", "core"])
@pytest.mark.parametrize("name", CASES)
def test_both_hosts_give_the_same_latent(with_redux: Server, alone: Callable[[Prompt], Tensor], name: str,
                                         by: str) -> None:
    prompt = prompt_of(by, **{**PICTURES, **CASES[name]})
    found = with_redux.latents(prompt)["latent"]
    assert torch.isfinite(found).all() and relative(alone(prompt), found) <= SAME
    assert relative(alone(prompt_of(by, "text")), found) > 1e-3, "it changes nothing"


@pytest.mark.parametrize("name", ["redux, weaker", "kontext", "both", "shifted"])
def test_core_s_own_model_takes_them_too(with_redux: Server, core_can_load: bool, alone: Callable[[Prompt], Tensor],
                                         name: str) -> None:
    if not core_can_load:
        pytest.skip("this ComfyUI's loader takes the published sizes only")
    prompt = prompt_of("core", **{**PICTURES, **CASES[name]})
    found = with_redux.latents(core_loader(prompt))["latent"]
    assert relative(alone(prompt), found) <= 1e-3


@pytest.mark.parametrize(("nodes", "told"), [
    ({"style": redux(area=["area", 0]), "area": AREA}, "'latent'"),
    ({"edit": kontext(edit_mask=["wide", 1])}, "edit_mask is empty")])
def test_bad_input_is_told_by_the_node(with_redux: Server, nodes: dict[str, Any], told: str) -> None:
    with pytest.raises(Failed, match=told):
        with_redux.run(prompt_of("ours", "style" if "style" in nodes else "edit", **PICTURES, **nodes))
