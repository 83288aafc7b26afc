"""CLIP_VISION and STYLE_MODEL in ComfyUI: what inside_vision.py found, and Redux pictures against the standalone
host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comfy_inside import Inside
from comfy_server import Failed, Server
from compare import relative
from prompts import Prompt, core, node
from torch import Tensor

SAME = 1e-5
# ---------------------------------------------------------------------------------------- in one process with the host

def test_states_are_those_of_core_s_class(inside: Inside) -> None:
    found = inside("vision")
    by_port = found.pop("by the port")
    assert len(found) == 12 and {name: off for name, off in by_port.items() if not off <= SAME} == {}
    for name, case in found.items():
        assert case.pop("fields"), f"{name}: the output has other fields than core's"
        width = [729, 1152] if name.startswith("full width") else [16, 128]
        assert case.pop("shape") == [2 if "batch" in name else 1, *width]
        assert {field: off for field, off in case.items() if not off <= SAME} == {}, name


def test_the_engine_resizes_as_core_does(inside: Inside) -> None:
    found = inside("pixels")
    assert len(found) == 14 and {name: off for name, off in found.items() if not off <= 1e-6} == {}


def test_style_models_take_the_states_of_either(inside: Inside) -> None:
    found = inside("style")
    assert found["shape"] == [1, 749, 4096]
    for case in (found["one model"], found["by the port"]):
        assert len(case) == 2 and {name: off for name, off in case.items() if not off <= SAME} == {}


def test_strengths_are_core_s_masks_and_all(inside: Inside) -> None:
    found = inside("strengths")
    assert len(found) == 16 and sum(case["mask"] for case in found.values()) == 11
    assert {name: case for name, case in found.items() if not max(case["once"], case["twice"]) <= 1e-6} == {}


def test_the_engine_resizes_masks_as_core_does(inside: Inside) -> None:
    found = inside("masks")
    assert len(found) == 4 and {name: off for name, off in found.items() if not off <= SAME} == {}


@pytest.mark.parametrize("name", ["vision", "style"])
def test_memory_is_the_host_s_to_manage(inside: Inside, name: str) -> None:
    case = inside("vision_memory")[name]
    assert case["off"] <= 1e-6 and case["share"] < 0.5
    assert case["told"] == case["held"] and case["mapped"] == 0
    assert case["same"] and case["apart"] and case["freed"]


@pytest.mark.parametrize(("name", "parts"), [
    ("nan", ("NotFinite", "NaN")), ("two channels", ("BadInput", "(1, 60, 60, 2)")),
    ("a mask", ("BadInput", "(1, 60, 60)")), ("a strip", ("BadInput", "60000 x 1", "'none'")),
    ("width", ("BadInput", "128", "96", "sigclip")), ("width, core's style model", ("BadInput", "128", "96")),
    ("no redux", ("BadInput", "Identity", "flux1-redux-dev")), ("nan, core's vision encoder", ("NotFinite",)),
    ("another vision encoder", ("BadModelFile", "clip_vision_l", "CLIP ViT-L", "sigclip")),
    ("exchanged", ("BadModelFile", "small.safetensors", "Redux", "SigLIP"))])
def test_what_does_not_fit_is_refused(inside: Inside, name: str, parts: tuple[str, ...]) -> None:
    told = inside("vision_refusals")[name]
    assert all(part in told for part in parts), told


# ------------------------------------------------------------------------------------------------ in a running server

def redux(strength: float = 1.0, kind: str = "multiply", crop: str = "none", positive: str = "style"
          ) -> Prompt:
    start = core()
    start["sampler"]["inputs"]["positive"] = [positive, 0]
    return {**start, "picture": node("LoadImage", image="small.png"),
            "models": node("FluxKitLoadRedux", clip_vision="siglip.safetensors", style_model="redux.safetensors"),
            "seen": node("CLIPVisionEncode", clip_vision=["models", 0], image=["picture", 0], crop=crop),
            "style": node("StyleModelApply", conditioning=["text", 0], style_model=["models", 1],
                          clip_vision_output=["seen", 0], strength=strength, strength_type=kind)}


def twice() -> Prompt:
    second = node("StyleModelApply", conditioning=["style", 0], style_model=["models", 1],
                  clip_vision_output=["seen", 0], strength=0.5, strength_type="attn_bias")
    return {**redux(2.0, "attn_bias", positive="more"), "more": second}


CASES = {"official": redux(), "cut out": redux(crop="center"), "multiplied": redux(0.5),
         "biased": redux(0.3, "attn_bias"), "biased more, then again": twice()}


@pytest.mark.parametrize("name", CASES)
def test_redux_gives_the_same_latent_in_both_hosts(with_redux: Server, alone: Callable[[Prompt], Tensor],
                                                   name: str) -> None:
    found = with_redux.latents(CASES[name])["latent"]
    assert torch.isfinite(found).all()
    assert relative(alone(CASES[name]), found) <= SAME
    others = [case for case in CASES if case != name] if name == "official" else ["official"]
    assert all(relative(alone(CASES[other]), found) > 1e-4 for other in others), "the setting changes nothing"
    assert relative(alone(core()), found) > 1e-3, "Redux changes nothing"


def test_a_missing_file_is_refused_before_the_run(with_redux: Server) -> None:
    prompt = redux()
    prompt["models"]["inputs"]["clip_vision"] = "sigclip_elsewhere.safetensors"
    with pytest.raises(Failed, match=r"clip_vision: .*sigclip_elsewhere\.safetensors"):
        with_redux.latents(prompt)
