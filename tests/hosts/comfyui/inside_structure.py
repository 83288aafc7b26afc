"""Checks of inside.py: what FluxKitStructure writes, and control LoRAs on our models and on core's, dense and packed,
with all weights loaded, a third of them, and none. Imported by it, in its process."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import folder_paths
import torch
from inside import (
    ENGINE,
    ERRORS,
    HOST,
    MODEL,
    SHARES,
    check,
    conditioning,
    core_patcher,
    loading,
    loras,
    our_sampler,
    patched,
    relative,
    sampled,
)
from inside_fill import NODES
from inside_variants import KEPT, VAE, control, of, random_file
from safetensors.torch import save_file

OPTIONS = {"kind": "depth", "guidance": 0.0, "width": 112, "height": 96, "fit": "stretch"}


def the_map() -> torch.Tensor:
    """The same in every process."""
    return torch.rand(1, 60, 100, 3, generator=torch.Generator().manual_seed(12))


def structured(prompt: Any, vae: Any, model: Any = None) -> tuple[Any, ...]:
    return of(NODES["FluxKitStructure"].execute(prompt, vae, the_map(), model=model, **OPTIONS))


def one_step(model: Any, positive: Any, latent: Any) -> torch.Tensor:
    return sampled(model, positive, latent=latent, steps=1)


@check
def structure_node() -> Any:
    """A model of 128 channels: by core's sampler on our model and on core's, by ours; the tensors go into a file."""
    vae, prompt = HOST.load_vae(VAE), conditioning()
    model = HOST.load_model(random_file("structure-control", in_channels=128))
    positive, negative, latent, report = structured(prompt, vae, model)
    path = Path(tempfile.mkdtemp()) / "structure.safetensors"
    save_file({"map": positive[0][1]["concat_latent_image"].contiguous(), "latent": latent["samples"]}, path)
    theirs = sampled(core_patcher(model), positive, negative, latent)
    other = of(NODES["FluxKitStructure"].execute(prompt, vae, 1 - the_map(), model=model, **OPTIONS))[0]
    return {"path": str(path), "report": report, "guidance": [part[0][1]["guidance"] for part in (positive, negative)],
            "noise_concat": "noise_concat" in positive[0][1],
            "off": relative(sampled(model, positive, negative, latent), theirs),
            "our sampler": relative(our_sampler(model, positive, None, latent), theirs),
            "changed": relative(our_sampler(model, other, None, latent), theirs)}


def models() -> dict[str, Any]:
    path = Path(KEPT.name) / "structure-dev.gguf"
    if not path.exists():
        importlib.import_module(ENGINE + ".convert").quantize(MODEL, path, "Q8_0")
    found = {"ours": HOST.load_model(MODEL), "gguf": HOST.load_model(path)}
    return {**found, "core's": core_patcher(found["ours"])}


def rows(strength: float) -> list[Any]:
    folder = Path(KEPT.name) / "control-loras"
    if not folder.exists():
        folder.mkdir()
        save_file(loras()["bfl control"], folder / "structure-control.safetensors")
        folder_paths.add_model_folder_path("loras", str(folder))
    return [sys.modules[ENGINE + ".adapters.stack"].Row("structure-control.safetensors", strength, strength)]


@check
def control_however_loaded() -> Any:
    """Every way to put a control LoRA on, every share of weights loaded, our node and core's, against
    the same model with all of it loaded by core's loader."""
    vae, prompt, found = HOST.load_vae(VAE), conditioning(), {}
    given = HOST.with_loras(HOST.load_model(MODEL), None, rows(1.0))[0]
    file = HOST.resolve_file("loras", rows(1.0)[0].file)
    weights = importlib.import_module("comfy.utils").load_torch_file(str(file), safe_load=True)
    for kind, model in models().items():
        ways = {"core's loader": patched(model, weights), "ours": HOST.with_loras(model, None, rows(1.0))[0],
                "beside": HOST.with_loras(model, None, rows(1.0), mode="side")[0]}
        expected = None
        for way, made in ways.items():
            positive, _, latent, _ = structured(prompt, vae, made)
            told = "noise_concat" in positive[0][1]
            for share, part in SHARES.items():
                if kind == "core's" and way != "beside" and share == "nothing":
                    continue  # older hosts leave out patches of norms that they did not load
                with loading(part):
                    out = one_step(made, positive, latent)
                    if share == "nothing" and way == "core's loader":  # loaded already, and asked for once more
                        out = one_step(made, positive, latent)
                expected = out if expected is None else expected
                found[f"{kind}, {way}, {share}"] = [relative(out, expected), told]
        plain, _, latent = control(prompt, vae)  # core's node, which says nothing of noise_concat
        whole = one_step(ways["core's loader"], plain, latent)
        for way in ("beside",) if kind == "core's" else ways:
            with loading(SHARES["nothing"]):
                found[f"{kind}, {way}, core's node"] = [relative(one_step(ways[way], plain, latent), whole), False]
        if kind == "core's":
            with loading(SHARES["a third"]):
                try:
                    one_step(ways["core's loader"], plain, latent)
                    found["core alone"] = [0.0, False]
                except RuntimeError as error:
                    found["core alone"] = str(error)
    found["base"] = [relative(one_step(HOST.load_model(MODEL), prompt, latent), one_step(given, plain, latent)), False]
    return found


@check
def control_refused() -> Any:
    """What a control LoRA is told on Fill, by our loader and by core's, and without a map."""
    vae, prompt, said = HOST.load_vae(VAE), conditioning(), {}
    fill = HOST.load_model(random_file("structure-fill", in_channels=384))
    dev = HOST.load_model(MODEL)
    weights = loras()["bfl control"]
    latent = {"samples": torch.zeros(1, 16, 12, 14)}
    for name, call in {
            "ours on fill": lambda: HOST.with_loras(fill, None, rows(1.0)),
            "core's on fill": lambda: sampled(patched(fill, weights), prompt, latent=latent),
            "node on dev": lambda: structured(prompt, vae, dev), "node on fill": lambda: structured(prompt, vae, fill),
            "no map": lambda: our_sampler(HOST.with_loras(dev, None, rows(1.0))[0], prompt, None, latent)}.items():
        try:
            call()
            said[name] = ""
        except (ERRORS.FluxKitError, ValueError) as error:  # noqa: PERF203 - each case on its own
            said[name] = f"{type(error).__name__}: {error}"
    return said


@check
def depth_folder() -> Any:
    """A tiny random Depth Anything in the host's models/depth, by the node."""
    transformers = importlib.import_module("transformers")
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
            out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False,
            apply_layernorm=True),
        reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, head_hidden_size=8,
        patch_size=14)
    folder = Path(folder_paths.get_folder_paths("depth")[0]) / "flux-kit-test-depth"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.manual_seed(0)
        with torch.inference_mode(False):
            transformers.DepthAnythingForDepthEstimation(config).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps({
            "size": {"height": 518, "width": 518}, "ensure_multiple_of": 14, "keep_aspect_ratio": True,
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "resample": 3}))
        listed = HOST.list_files("depth")
        image, report = of(NODES["FluxKitStructureMap"].execute(
            the_map(), "depth", 50.0, 200.0, "flux-kit-test-depth", "min-max", False, 140, 0, 0))
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return {"listed": "flux-kit-test-depth" in listed, "shape": list(image.shape), "report": report,
            "range": [float(image.min()), float(image.max())]}
