"""Flux Structure and control LoRAs in ComfyUI: the tensors of the standalone host, and the same latents however the
LoRA came on and however much of the model is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from alone import tiny_host
from comfy_inside import Inside
from compare import relative
from flux_kit.cli import session
from flux_kit.engine.conditioning import structure
from safetensors.torch import load_file

SAME = 1e-5
PACKED = 1e-4  # of weights that one way takes in tiles and another whole
PIXELS = 1e-4


def test_the_tensors_are_those_of_the_standalone_host(inside: Inside, tmp_path: Path) -> None:
    found = inside("structure_node")
    here = load_file(found["path"])
    host = tiny_host(tmp_path)
    vae = host.load_vae(session.TINY_MODELS / "vae" / "tiny-ae.safetensors")
    image = torch.rand(1, 60, 100, 3, generator=torch.Generator().manual_seed(12))
    latents = host.encode(vae, structure.prepare(image, "depth", 112, 96).image)["samples"]
    assert relative(here["map"], latents) <= PIXELS and here["latent"].shape == latents.shape
    assert found["guidance"] == [10, 10] and not found["noise_concat"] and "resized" in found["report"]


def test_both_samplers_follow_the_map(inside: Inside) -> None:
    found = inside("structure_node")
    assert found["off"] <= SAME and found["our sampler"] <= SAME and found["changed"] > 1e-3


def test_d28_a_control_lora_however_much_is_loaded(inside: Inside) -> None:
    found = inside("control_however_loaded")
    assert found.pop("base")[0] > 1e-3, "the LoRA changed nothing"
    alone = found.pop("core alone")
    assert isinstance(alone, list) or "mat1 and mat2" in alone, "the host has another fault than the one worked round"
    off = {case: values[0] for case, values in found.items()}
    assert {case: value for case, value in off.items() if value > (PACKED if case.startswith("gguf") else SAME)} == {}
    assert {case for case, values in found.items() if values[1]} == {
        f"core's, core's loader, {share}" for share in ("all", "a third")}


def test_d29_what_cannot_be_is_named(inside: Inside) -> None:
    found = inside("control_refused")
    for case in ("ours on fill", "core's on fill", "node on fill"):
        assert found[case].startswith("BadInput") and "384" in found[case] and "FLUX.1 dev" in found[case], case
    assert "64 channels" in found["node on dev"] and "is a control LoRA" in found["no map"]


def test_a_depth_model_of_the_host_s_folder(inside: Inside) -> None:
    found = inside("depth_folder")
    assert found["listed"] and found["shape"] == [1, 60, 100, 3] and found["range"] == [0.0, 1.0]
