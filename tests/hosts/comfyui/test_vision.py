"""CLIP_VISION and STYLE_MODEL in ComfyUI: what inside_vision.py found, and Redux pictures against the standalone
host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import Failed, Server
from compare import relative
from family import random_weights
from flux_kit.cli import session
from flux_kit.engine.models.vision import Redux, SiglipVision
from flux_kit.engine.specs import REDUX, SIGLIP
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from PIL import Image
from prompts import Prompt, core, node
from safetensors.torch import save_file
from torch import Tensor

SAME = 1e-5
SMALL = replace(SIGLIP, hidden_size=128, num_attention_heads=2, intermediate_size=200, num_hidden_layers=2,
                image_size=56)


def of(inside: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = inside[name]
    assert "error" not in found, found["error"]
    return found


# ---------------------------------------------------------------------------------------- in one process with the host

def test_states_are_those_of_core_s_class(inside: dict[str, Any]) -> None:
    found = of(inside, "vision")
    by_port = found.pop("by the port")
    assert len(found) == 12 and {name: off for name, off in by_port.items() if not off <= SAME} == {}
    for name, case in found.items():
        assert case.pop("fields"), f"{name}: the output has other fields than core's"
        width = [729, 1152] if name.startswith("full width") else [16, 128]
        assert case.pop("shape") == [2 if "batch" in name else 1, *width]
        assert {field: off for field, off in case.items() if not off <= SAME} == {}, name


def test_the_engine_resizes_as_core_does(inside: dict[str, Any]) -> None:
    found = of(inside, "pixels")
    assert len(found) == 14 and {name: off for name, off in found.items() if not off <= 1e-6} == {}


def test_style_models_take_the_states_of_either(inside: dict[str, Any]) -> None:
    found = of(inside, "style")
    assert found["shape"] == [1, 749, 4096]
    for case in (found["one model"], found["by the port"]):
        assert len(case) == 2 and {name: off for name, off in case.items() if not off <= SAME} == {}


def test_strengths_are_core_s_masks_and_all(inside: dict[str, Any]) -> None:
    found = of(inside, "strengths")
    assert len(found) == 16 and sum(case["mask"] for case in found.values()) == 11
    assert {name: case for name, case in found.items() if not max(case["once"], case["twice"]) <= 1e-6} == {}


def test_the_engine_resizes_masks_as_core_does(inside: dict[str, Any]) -> None:
    found = of(inside, "masks")
    assert len(found) == 4 and {name: off for name, off in found.items() if not off <= SAME} == {}


@pytest.mark.parametrize("name", ["vision", "style"])
def test_memory_is_the_host_s_to_manage(inside: dict[str, Any], name: str) -> None:
    case = of(inside, "vision_memory")[name]
    assert case["off"] <= 1e-6 and case["share"] < 0.5
    assert case["told"] == case["held"] and case["mapped"] == 0
    assert case["again"] and case["apart"] and case["freed"]


@pytest.mark.parametrize(("name", "parts"), [
    ("nan", ("NotFinite", "NaN")), ("two channels", ("BadInput", "(1, 60, 60, 2)")),
    ("a mask", ("BadInput", "(1, 60, 60)")), ("a strip", ("BadInput", "60000 x 1", "'none'")),
    ("width", ("BadInput", "128", "96", "sigclip")), ("width, core's style model", ("BadInput", "128", "96")),
    ("no redux", ("BadInput", "Identity", "flux1-redux-dev")), ("nan, core's vision encoder", ("NotFinite",)),
    ("another vision encoder", ("BadModelFile", "clip_vision_l", "CLIP ViT-L", "sigclip")),
    ("exchanged", ("BadModelFile", "small.safetensors", "Redux", "SigLIP"))])
def test_what_does_not_fit_is_refused(inside: dict[str, Any], name: str, parts: tuple[str, ...]) -> None:
    told = of(inside, "vision_refusals")[name]
    assert all(part in told for part in parts), told


# ------------------------------------------------------------------------------------------------ in a running server

@pytest.fixture(scope="session")
def redux_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision encoder, a Redux of tiny-flux's width, and a picture."""
    folder = tmp_path_factory.mktemp("redux")
    draw = np.random.default_rng(3)
    for kind, name, state in (
            ("clip_vision", "siglip.safetensors", random_weights(SiglipVision(SMALL), 1)),
            ("style_models", "redux.safetensors", random_weights(Redux(replace(
                REDUX, redux_dim=128, txt_in_features=64)), 2))):
        (folder / kind).mkdir(exist_ok=True)
        save_file(state, folder / kind / name)
    (folder / "input").mkdir()
    Image.fromarray(draw.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(folder / "input" / "redux.png")
    return folder


@pytest.fixture(scope="session")
def with_redux(server: Server, redux_files: Path) -> Server:
    for kind, into in (("clip_vision", "models/clip_vision"), ("style_models", "models/style_models"),
                       ("input", "input")):
        (server.base / into).mkdir(parents=True, exist_ok=True)
        for file in (redux_files / kind).iterdir():
            (server.base / into / file.name).write_bytes(file.read_bytes())
    return server


@pytest.fixture(scope="session")
def alone(redux_files: Path) -> Callable[[Prompt], Tensor]:
    """The latent of the same prompt in the standalone host."""
    host = StandaloneHost(Folders(models=[session.TINY_MODELS, redux_files], input=[redux_files / "input"],
                                  output=redux_files / "output"), device="cpu", dtype="fp32")

    def run(prompt: Prompt) -> Tensor:
        session.hosts.use(host)
        own = {name: entry for name, entry in prompt.items() if name != "latent"}  # SaveLatent is ComfyUI's
        latent: Tensor = Executor(session.node_classes()).run(own, {}).outputs["sampler"][0][0]["samples"]
        return latent

    return run


def redux(strength: float = 1.0, kind: str = "multiply", crop: str = "none", positive: str = "style"
          ) -> Prompt:
    start = core()
    start["sampler"]["inputs"]["positive"] = [positive, 0]
    return {**start, "picture": node("LoadImage", image="redux.png"),
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
    prompt["models"]["inputs"]["clip_vision"] = "sigclip_vision_patch14_384.safetensors"
    with pytest.raises(Failed, match=r"clip_vision: .*sigclip_vision_patch14_384\.safetensors"):
        with_redux.latents(prompt)
