"""FluxKitFill, Region Crop and Paste, Mask Refine and Outpaint Canvas in the standalone host, on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family import write_flux
from flux_kit.engine.errors import BadInput
from flux_kit.hosts.standalone.host import StandaloneHost
from torch import Tensor

FILL = "flux1-fill-dev.safetensors"
REFINE: dict[str, Any] = {"grow": 8, "feather": 0, "threshold": 0.5, "fill_holes": True, "invert": False,
                          "snap": "none"}
CROP: dict[str, Any] = {"context": 1.5, "min_context": 8, "megapixels": 0.0, "multiple": "16", "if_empty": "error"}
OPTIONS: dict[str, Any] = {"guidance": 30.0, "mask_mode": "official-soft", "noise_mask": "off", "size": "pad"}


@pytest.fixture(scope="module", autouse=True)
def fill_file(models: Path) -> None:
    write_flux(models / "diffusion_models" / FILL, 8, in_channels=384)


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def block(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, height // 3:height // 2, width // 3:width // 2] = 1
    return mask


def filled(nodes: dict[str, Any], host: StandaloneHost, image: Tensor, mask: Tensor, **options: Any) -> Any:
    """(decoded picture, latent of the sampler, report)"""
    model = host.load_model(host.resolve_file("diffusion_models", FILL))
    vae = host.load_vae(host.resolve_file("vae", "ae.safetensors"))
    clip = host.load_text_encoders([host.resolve_file("text_encoders", name)
                                    for name in ("clip_l.safetensors", "t5xxl_fp16.safetensors")])
    positive, _, latent, report = nodes["FluxKitFill"](
        positive=host.encode_prompt(clip, "a red circle"), vae=vae, image=image, mask=mask, model=model,
        **{**OPTIONS, **options})
    done = host.sample(model, positive, None, latent, seed=1, steps=2)
    return nodes["FluxKitDecode"](latent=done, vae=vae)[0], done, report


@pytest.mark.parametrize("size", ["pad", "stretch"])
def test_an_odd_picture_comes_back_at_its_very_size(nodes: dict[str, Any], host: StandaloneHost, vae: Any,
                                                    size: str) -> None:
    image, mask = picture(75, 101), block(75, 101)
    decoded, latent, report = filled(nodes, host, image, mask, size=size)
    assert decoded.shape == image.shape and "101 x 75" in report
    for edited in (decoded, host.decode(vae, latent)):                      # core's VAE Decode gives the whole canvas
        pasted, _ = nodes["FluxKitRegionPaste"](image=image, edited=edited, blend=mask, colour_match=0.0,
                                                use_blend=True)
        assert pasted.shape == image.shape and torch.equal(pasted[mask == 0], image[mask == 0])
        assert not torch.equal(pasted[mask == 1], image[mask == 1])
        if size == "pad":
            assert torch.equal(pasted[mask == 1], decoded[mask == 1])


def test_crop_fill_paste_leaves_unmasked_pixels_bit_identical(nodes: dict[str, Any], host: StandaloneHost) -> None:
    image = picture(150, 190)
    mask, _ = nodes["FluxKitMaskRefine"](mask=block(150, 190), **{**REFINE, "feather": 5})
    crop, inner, region, blend, width, height, _ = nodes["FluxKitRegionCrop"](image=image, mask=mask, **CROP)
    assert crop.shape == (1, height, width, 3) and crop.shape[1] < 150 and inner.max() == 1
    decoded, _, report = filled(nodes, host, crop, inner)
    pasted, _ = nodes["FluxKitRegionPaste"](image=image, edited=decoded, region=region, blend=blend, colour_match=0.5,
                                            use_blend=True)
    assert torch.equal(pasted[mask == 0], image[mask == 0]) and not torch.equal(pasted, image) and report == ""


def test_a_model_that_is_not_fill_is_refused(nodes: dict[str, Any], host: StandaloneHost) -> None:
    dev = host.load_model(host.resolve_file("diffusion_models", "flux1-dev.safetensors"))
    assert host.img_in_width(dev) == 64
    with pytest.raises(BadInput, match=r"64 channels.*FLUX.1 Fill"):
        nodes["FluxKitFill"](positive=[], vae=None, image=picture(32, 32), mask=block(32, 32), model=dev, **OPTIONS)


def test_without_a_negative_prompt_there_is_one_of_zeros(nodes: dict[str, Any], vae: Any) -> None:
    prompt = [[torch.ones(1, 4, 64), {"pooled_output": torch.ones(1, 64), "guidance": 3.5}]]
    image, mask = picture(32, 48), block(32, 48)
    positive, negative, latent, _ = nodes["FluxKitFill"](positive=prompt, vae=vae, image=image, mask=mask, **OPTIONS)
    assert not negative[0][0].any() and not negative[0][1]["pooled_output"].any()
    for key in ("concat_latent_image", "concat_mask", "guidance"):
        assert negative[0][1][key] is positive[0][1][key]
    assert positive[0][1]["guidance"] == 30 and "noise_mask" not in latent
    given, other, latent, _ = nodes["FluxKitFill"](
        positive=prompt, negative=prompt, vae=vae, image=image, mask=mask,
        **{**OPTIONS, "guidance": 0.0, "noise_mask": "soft", "mask_mode": "binary"})
    assert given[0][1]["guidance"] == 3.5 and torch.equal(other[0][0], prompt[0][0])
    assert torch.equal(latent["noise_mask"], mask[:, None])


def test_outpainting_grows_the_canvas(nodes: dict[str, Any], host: StandaloneHost) -> None:
    image = picture(48, 64)
    pads = {"left": 0, "top": 0, "right": 0, "bottom": 0}
    canvas, mask, report = nodes["FluxKitOutpaintCanvas"](image=image, aspect="1:1", **pads, overlap=4, fill="mirror",
                                                          multiple="16")
    assert canvas.shape == (1, 64, 64, 3) and torch.equal(canvas[:, 8:56], image) and "becomes 64 x 64" in report
    assert mask.sum() == 64 * (64 - 48 + 8)
    decoded, _, _ = filled(nodes, host, canvas, mask)
    pasted, _ = nodes["FluxKitRegionPaste"](image=canvas, edited=decoded, blend=mask, colour_match=0.0, use_blend=True)
    assert torch.equal(pasted[:, 12:52], image[:, 4:44])
