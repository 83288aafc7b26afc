"""Core's nodes for Fill, Depth, Canny and Kontext in the standalone host: pictures they make, what they refuse, and
what a run makes of them. Their numbers are compared with core's own in tests/hosts/comfyui."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family import DEV, random_weights
from family_fixtures import samples
from flux_kit.engine.errors import BadInput, FluxKitError
from flux_kit.engine.memory import activations
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.sampling import DEV_TABLE, differential, make_sigmas
from flux_kit.hosts.standalone.core_conditioning import CONDITIONING_NODES, KONTEXT_SIZES
from flux_kit.hosts.standalone.core_pictures import PICTURE_NODES
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.scaling import scaled
from safetensors.torch import save_file

Run = Callable[..., Any]
NODES = {node.GET_SCHEMA().node_id: node for node in (*PICTURE_NODES, *CONDITIONING_NODES)}
PICTURE = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(2))


def done(kind: str, **inputs: Any) -> Any:
    """What a node gives, called alone."""
    return NODES[kind].execute(**inputs).args


# -- pictures

def test_scaling_cuts_evenly_and_truncates_where_core_does() -> None:
    ramp = torch.arange(64).div(63).expand(1, 48, 3, 64).movedim(-1, 2)
    cut = scaled(ramp, 16, 48, "nearest-exact", "center")
    assert torch.equal(cut, ramp[:, :, 24:40])
    bright = torch.full((1, 4, 4, 3), 0.999)
    assert torch.equal(scaled(bright, 4, 4, "lanczos"), torch.full((1, 4, 4, 3), 254 / 255))
    assert scaled(torch.rand(2, 5, 6, 1), 7, 8, "lanczos").shape == (2, 8, 7, 1)


def test_kontext_sizes_are_the_published_ones() -> None:
    assert len(set(KONTEXT_SIZES)) == 17 and sorted(KONTEXT_SIZES) == KONTEXT_SIZES
    assert {(height, width) for width, height in KONTEXT_SIZES} == set(KONTEXT_SIZES)
    assert all(side % 16 == 0 for size in KONTEXT_SIZES for side in size)
    assert done("FluxKontextImageScale", image=PICTURE[:, :24, :48])[0].shape == (1, 720, 1456, 3)


def test_the_outpaint_mask_fades_inside_the_picture() -> None:
    canvas, mask = done("ImagePadForOutpaint", image=PICTURE, left=8, top=0, right=0, bottom=0, feathering=10)
    assert canvas.shape == (1, 48, 72, 3) and torch.equal(canvas[:, :, 8:], PICTURE)
    assert (canvas[:, :, :8] == 0.5).all() and (mask[:, :, :8] == 1).all()
    row = [((10 - x) / 10) ** 2 if x < 10 else 0.0 for x in range(64)]
    torch.testing.assert_close(mask[0, :, 8:], torch.tensor(row).expand(48, 64))


@pytest.mark.parametrize(("kind", "inputs", "words"), [
    ("ImageScale", {"image": PICTURE, "upscale_method": "area", "width": 16000, "height": 16000, "crop": "disabled"},
     "1 pictures of 16000 x 16000"),
    ("ImagePadForOutpaint", {"image": PICTURE, "left": 9000, "top": 9000, "right": 0, "bottom": 0, "feathering": 0},
     "9064 x 9048"),
    ("ImageStitch", {"image1": PICTURE, "image2": PICTURE[:, :1].expand(-1, -1, -1, -1), "direction": "up",
                     "match_image_size": True, "spacing_width": 1024, "spacing_color": "red"}, ""),
    ("SolidMask", {"value": 1.0, "width": 16384, "height": 16384}, "16384 x 16384"),
    ("ImageScaleToMaxDimension", {"image": PICTURE, "upscale_method": "area", "largest_size": 0}, "0 x 0"),
    ("ImageToMask", {"image": PICTURE, "channel": "alpha"}, "3 channels and no alpha"),
    ("Canny", {"image": PICTURE, "low_threshold": 0.5, "high_threshold": 0.2}, "0.5 is above high_threshold 0.2")])
def test_what_cannot_be_is_refused(kind: str, inputs: dict[str, Any], words: str) -> None:
    if not words:
        assert done(kind, **inputs)[0].shape == (1, 48 + 1024 + 1, 64, 3)
        return
    with pytest.raises(BadInput, match=words):
        done(kind, **inputs)


# -- soft masks along a run

def test_a_place_is_painted_once_the_run_has_come_down_to_its_mask() -> None:
    sigmas = make_sigmas("simple", 10)
    mask = torch.linspace(0, 1, 11).reshape(1, 1, 1, 11)
    hard, half = differential(sigmas, DEV_TABLE), differential(sigmas, DEV_TABLE, 0.25)
    low = float(DEV_TABLE.sigmas[0])
    for sigma in sigmas[:-1].tolist():
        left = (sigma - low) / (1 - low)
        expected = torch.tensor([float(value >= left) for value in mask.flatten().tolist()]).reshape(mask.shape)
        assert torch.equal(hard(torch.full((2,), sigma), mask), expected)
        torch.testing.assert_close(half(torch.full((2,), sigma), mask), 0.25 * expected + 0.75 * mask)
    assert torch.equal(differential(sigmas, DEV_TABLE, 0.0)(sigmas[3:4], mask), hard(sigmas[3:4], mask))


# -- runs

def prompt(host: StandaloneHost, models: Path, channels: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Nodes up to a picture and a mask, and a sampler "k" on a model whose `img_in` is so wide."""
    name = f"random-{channels}.safetensors"
    if not (models / "diffusion_models" / name).exists():
        save_file(random_weights(Flux(replace(DEV, in_channels=channels)), channels),
                  models / "diffusion_models" / name)
    return {
        "load": ("FluxKitLoadFlux", {"model": "flux1-dev.safetensors", "clip_l": "clip_l.safetensors",
                                     "t5": "t5xxl_fp16.safetensors", "vae": "ae.safetensors"}),
        "model": ("UNETLoader", {"unet_name": name, "weight_dtype": "default"}),
        "text": ("CLIPTextEncode", {"text": "a red circle", "clip": ["load", 1]}),
        "mask": ("SolidMask", {"value": 0.4, "width": 64, "height": 48}),
        "picture": ("MaskToImage", {"mask": ["mask", 0]}),
        "k": ("KSampler", {"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 0],
                           "latent_image": ["latent", 0], "seed": 7, "steps": 3, "cfg": 1.0, "sampler_name": "euler",
                           "scheduler": "simple", "denoise": 1.0}),
        "latent": ("EmptySD3LatentImage", {"width": 64, "height": 48, "batch_size": 1})}


@pytest.mark.parametrize(("channels", "words"), [
    (384, "'fill' model, which needs a picture with a mask.*FluxKitFill"),
    (128, "'control' model, which needs its control picture.*FluxKitStructure")])
def test_a_model_without_its_picture_names_the_node_to_add(host: StandaloneHost, models: Path, run_prompt: Run,
                                                           channels: int, words: str) -> None:
    with pytest.raises(FluxKitError, match=f"node k.*{words}"):
        run_prompt(prompt(host, models, channels), "k")


def test_pictures_and_masks_of_other_counts(host: StandaloneHost, models: Path, run_prompt: Run) -> None:
    """A mask each for one picture makes as many; two and three do not go together."""
    inpaint = NODES["InpaintModelConditioning"]
    vae = host.load_vae(models / "vae" / "ae.safetensors")
    given: dict[str, Any] = {"positive": [], "negative": [], "vae": vae, "noise_mask": True}
    latent = inpaint.execute(**given, pixels=PICTURE, mask=torch.rand(3, 48, 64)).args[2]
    assert latent["samples"].shape == (3, 16, 6, 8) and latent["noise_mask"].shape == (3, 1, 48, 64)
    with pytest.raises(BadInput, match="2 pictures and 3 masks"):
        inpaint.execute(**given, pixels=PICTURE.expand(2, -1, -1, -1), mask=torch.rand(3, 48, 64))


def test_references_count_for_memory(host: StandaloneHost, models: Path, run_prompt: Run,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    original = activations.sample_bytes

    def counted(*arguments: Any) -> int:
        told.append(arguments[4])
        return original(*arguments)

    monkeypatch.setattr(activations, "sample_bytes", counted)
    nodes = prompt(host, models, 64)
    plain = samples(run_prompt(nodes, "k"), "k")
    nodes |= {"big": ("EmptySD3LatentImage", {"width": 96, "height": 64, "batch_size": 1}),
              "reference": ("ReferenceLatent", {"conditioning": ["text", 0], "latent": ["big", 0]})}
    nodes["k"][1]["positive"] = ["reference", 0]
    changed = samples(run_prompt(nodes, "k"), "k")
    assert told[1] - told[0] == 6 * 4 and changed.shape == plain.shape
    assert not torch.allclose(changed, plain, atol=1e-3)
