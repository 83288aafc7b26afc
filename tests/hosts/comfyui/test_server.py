"""Flux Kit in a running ComfyUI, driven by HTTP."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_server import Failed, Server
from compare import relative
from flux_kit.hosts.standalone.png import read_text
from PIL import Image
from prompts import Prompt, core, core_loader, encoded, flux_kit, node
from torch import Tensor

SAME = 1e-5
EXAMPLES = Path(__file__).parents[3] / "example_workflows"
Standalone = Callable[[Prompt], dict[str, Tensor]]


def options(info: dict[str, Any], kind: str, name: str) -> list[str]:
    """Choices of a combo, in the older and the newer form of /object_info."""
    spec = info[kind]["input"]["required"][name]
    return list(spec[0]) if isinstance(spec[0], list) else list(spec[1]["options"])


@pytest.fixture(scope="session")
def info(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.call("/object_info")
    return found


def test_all_nodes_are_there_and_loading_says_nothing(server: Server, info: dict[str, Any], standalone: Any) -> None:
    from flux_kit.nodes import NODES
    ours = {cls.GET_SCHEMA().node_id: cls.GET_SCHEMA() for cls in NODES}
    assert {name for name in info if name.startswith("FluxKit")} == set(ours)
    for name, schema in ours.items():
        entry = info[name]
        assert entry["category"] == schema.category and entry["category"].startswith("Flux Kit/")
        shown = [*entry["input"].get("required", {}), *entry["input"].get("optional", {})]
        assert set(shown) == {spec.id for spec in schema.inputs}
        assert entry["output"] == [output.io_type for output in schema.outputs]
    lines = server.said_at_start.splitlines()
    ours_said = [line for line in lines if re.search("flux.kit", line, re.I)]
    loud = [line for line in ours_said if re.search("warn|error|fail|cannot", line, re.I)]
    assert loud == [] and not any("Traceback" in line for line in lines)


def test_tiny_flux_is_in_core_s_lists_and_gguf_in_ours_alone(server: Server) -> None:
    (server.base / "models" / "diffusion_models").mkdir(parents=True, exist_ok=True)
    (server.base / "models" / "diffusion_models" / "later.gguf").write_bytes(b"GGUF")
    info = server.call("/object_info")
    core_models, ours = options(info, "UNETLoader", "unet_name"), options(info, "FluxKitLoadTransformer", "model")
    assert "tiny-flux-dev.safetensors" in core_models and "tiny-flux-dev.safetensors" in ours
    assert "later.gguf" in ours and "later.gguf" not in core_models
    assert "tiny-ae.safetensors" in options(info, "VAELoader", "vae_name")
    assert {"tiny-t5.safetensors", "tiny-clip_l.safetensors"} <= set(options(info, "DualCLIPLoader", "clip_name1"))


CASES: dict[str, dict[str, Any]] = {
    "euler": {},
    "our schedule": {"schedule": "bfl", "steps": 6},
    "two orders": {"solver": "dpmpp_2m", "schedule": "beta", "steps": 6},
    "own noise": {"solver": "euler_ancestral", "steps": 5},
    "negative": {"cfg": 2.5, "negative": ["negative", 0]},
    "negative for some steps": {"cfg": 2.5, "negative": ["negative", 0], "cfg_start": 0.3, "cfg_end": 0.8, "steps": 5},
    "last seed": {"seed": 2**64 - 1},
}


@pytest.mark.parametrize("name", CASES)
def test_our_workflow_gives_the_latents_of_flux_kit_run(server: Server, standalone: Standalone, name: str) -> None:
    prompt = {**flux_kit(**CASES[name]), "negative": encoded("a green square")}
    here, there = server.latents(prompt)["latent"], standalone(prompt)["latent"]
    assert relative(here, there) <= SAME


def test_from_a_picture_as_in_flux_kit_run(server: Server, standalone: Standalone) -> None:
    prompt = flux_kit(denoise=0.6)
    prompt["first"] = {**prompt["sampler"], "inputs": {**prompt["sampler"]["inputs"], "denoise": 1.0, "seed": 3}}
    prompt["picture"] = node("FluxKitDecode", latent=["first", 0], vae=["load", 2])
    prompt["encoded"] = node("FluxKitEncode", image=["picture", 0], vae=["load", 2])
    prompt["sampler"]["inputs"]["latent"] = ["encoded", 0]
    here, there = server.latents(prompt)["latent"], standalone(prompt)["latent"]
    assert relative(here, there) <= SAME


def test_core_s_nodes_on_our_objects_make_the_same_picture(server: Server) -> None:
    ours, theirs = server.run(flux_kit()), server.run(core())
    first, second = (np.array(Image.open(server.path_of(told["save"]["images"][0])), dtype=np.int16)
                     for told in (ours, theirs))
    assert first.shape == (112, 128, 3)
    assert first.std() > 10, "a flat picture proves nothing"
    assert np.abs(first - second).max() <= 1


@pytest.mark.parametrize(("solver", "schedule"), [("euler", "simple"), ("heun", "normal"), ("dpmpp_2m", "beta"),
                                                  ("euler", "sgm_uniform")])
def test_our_sampler_and_core_s_agree(server: Server, solver: str, schedule: str) -> None:
    ours = server.latents(flux_kit(solver=solver, schedule=schedule))["latent"]
    theirs = server.latents(core(sampler_name=solver, scheduler=schedule))["latent"]
    assert relative(ours, theirs) <= SAME


@pytest.mark.parametrize("make", [core, flux_kit])
def test_core_s_loader_and_ours_agree(server: Server, core_can_load: bool, make: Callable[..., Prompt]) -> None:
    if not core_can_load:
        pytest.skip("core's loader does not infer sizes in this version")
    assert relative(server.latents(make())["latent"], server.latents(core_loader(make()))["latent"]) <= SAME


def test_saved_pictures_carry_the_workflow(server: Server) -> None:
    prompt = flux_kit()
    path = server.path_of(server.run(prompt)["save"]["images"][0])
    assert json.loads(read_text(path, ["prompt"])["prompt"])["sampler"]["inputs"]["seed"] == 21
    assert re.fullmatch(r"flux_\d{5}_\.png", path.name) and path.parent.name == "pictures"


def test_names_of_other_machines(server: Server) -> None:
    """Slashes, case or subfolder differ: taken. Unknown: refused before the run, with the folder to put it in."""
    prompt = flux_kit()
    prompt["load"]["inputs"] |= {"model": "FLUX\\Tiny-Flux-dev.safetensors", "vae": "ae/TINY-AE.safetensors"}
    assert relative(server.latents(prompt)["latent"], server.latents(flux_kit())["latent"]) == 0
    prompt["load"]["inputs"]["model"] = "flux1-krea.safetensors"
    with pytest.raises(Failed, match=r"flux1-krea.safetensors' is in none of the folders.*diffusion_models") as failed:
        server.run(prompt)
    assert failed.value.kind == "refused"


BAD: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "cfg without negative": ({"sampler": flux_kit(cfg=3.0)["sampler"]}, "cfg 3.0 needs a negative prompt"),
    "text encoder as model": ({"load": node("FluxKitLoadFlux", model="tiny-flux-dev.safetensors",
                                            clip_l="tiny-clip_l.safetensors", t5="tiny-clip_l.safetensors",
                                            vae="tiny-ae.safetensors")},
                              "this is a CLIP-L text encoder; expected a T5 text encoder"),
    "leaves the output folder": ({"save": node("FluxKitSave", images=["decode", 0], filename_prefix="../../x")},
                                 "leaves its folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_and_the_next_prompt_runs(server: Server, name: str) -> None:
    changes, message = BAD[name]
    before = server.latents(flux_kit())["latent"]
    with pytest.raises(Failed, match=message):
        server.run({**flux_kit(seed=5), **changes})
    server.forget()
    assert torch.equal(server.latents(flux_kit())["latent"], before)


def test_interrupted_and_run_again(server: Server) -> None:
    before = server.latents(flux_kit())["latent"]
    prompt_id = server.submit(flux_kit(steps=5000, seed=1))
    time.sleep(2)
    server.call("/interrupt", {})
    with pytest.raises(Failed, match="interrupted"):
        server.result(prompt_id)
    server.forget()
    assert torch.equal(server.latents(flux_kit())["latent"], before)
