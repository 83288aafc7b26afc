"""The equivalents of core's nodes round Redux, against independent arithmetic and the limits that strengths have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import relative
from family import random_weights
from family_fixtures import samples
from flux_kit.engine.errors import BadInput, BadModelFile, FluxKitError, NotFinite
from flux_kit.engine.models.vision import Redux, SiglipVision, to_pixels
from flux_kit.engine.specs import REDUX, SIGLIP
from flux_kit.engine.weights import load
from flux_kit.hosts.standalone.core_vision import with_tokens
from flux_kit.hosts.standalone.host import StandaloneHost
from PIL import Image
from safetensors.torch import save_file

SMALL = replace(SIGLIP, hidden_size=64, num_attention_heads=1, intermediate_size=96, num_hidden_layers=2, image_size=56)
TOKENS = SMALL.num_positions

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def redux_files(models: Path, host: StandaloneHost) -> Path:
    """Beside the family: a vision encoder, a Redux of its width, some that do not fit, and a picture."""
    vision = random_weights(SiglipVision(SMALL), 1)
    clip = {name: tensor for name, tensor in vision.items() if "patch_embedding.bias" not in name}
    files = {
        "clip_vision/siglip": vision, "style_models/redux": random_weights(Redux(replace(
            REDUX, redux_dim=64, txt_in_features=64)), 2),
        "clip_vision/clip_vision_h": {**clip, "vision_model.embeddings.class_embedding": torch.zeros(1280)},
        "style_models/narrow": random_weights(Redux(replace(REDUX, redux_dim=32, txt_in_features=64)), 2),
        "style_models/wide": random_weights(Redux(replace(REDUX, redux_dim=64, txt_in_features=96)), 2),
        "style_models/style_sd15": {"style_embedding": torch.zeros(1, 8, 1024)}}
    for name, state in files.items():
        path = models / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            save_file(state, path)
    noise = np.random.default_rng(3).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(host.folders.roots("input")[0] / "p.png")
    return models


def chain(strength: float = 1.0, kind: str = "multiply", crop: str = "none", vision: str = "siglip",
          style: str = "redux") -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "load": ("FluxKitLoadFlux", {"model": "flux1-dev.safetensors", "clip_l": "clip_l.safetensors",
                                     "t5": "t5xxl_fp16.safetensors", "vae": "ae.safetensors"}),
        "text": ("CLIPTextEncode", {"text": "a red circle", "clip": ["load", 1]}),
        "vision": ("CLIPVisionLoader", {"clip_name": f"{vision}.safetensors"}),
        "redux": ("StyleModelLoader", {"style_model_name": f"{style}.safetensors"}),
        "image": ("LoadImage", {"image": "p.png"}),
        "seen": ("CLIPVisionEncode", {"clip_vision": ["vision", 0], "image": ["image", 0], "crop": crop}),
        "style": ("StyleModelApply", {"conditioning": ["text", 0], "style_model": ["redux", 0],
                                      "clip_vision_output": ["seen", 0], "strength": strength,
                                      "strength_type": kind}),
        "empty": ("EmptySD3LatentImage", {"width": 48, "height": 32, "batch_size": 1}), "k": sampler("style")}


def sampler(positive: str) -> tuple[str, dict[str, Any]]:
    return "KSampler", {"model": ["load", 0], "positive": [positive, 0], "negative": [positive, 0],
                        "latent_image": ["empty", 0], "seed": 7, "steps": 3, "cfg": 1.0, "sampler_name": "euler",
                        "scheduler": "simple", "denoise": 1.0}


def test_the_tokens_are_the_engine_s_behind_the_text(run_prompt: Run, redux_files: Path, host: StandaloneHost) -> None:
    outputs = run_prompt(chain(), "style").outputs
    (text, values), (joined, told) = outputs["text"][0][0][0], outputs["style"][0][0][0]
    vision = load(redux_files / "clip_vision" / "siglip.safetensors", "vision")
    redux = load(redux_files / "style_models" / "redux.safetensors", "redux")
    image = host.load_image("p.png")[0]
    with torch.no_grad():
        tokens = redux(vision(to_pixels(image, SMALL)))
    assert torch.equal(joined, torch.cat((text, tokens), dim=1)) and joined.shape == (1, 256 + TOKENS, 64)
    assert set(told) == set(values) and values is not told


def test_our_loader_and_core_s_give_the_same(run_prompt: Run) -> None:
    ours = chain()
    ours["both"] = ("FluxKitLoadRedux", {"clip_vision": "siglip.safetensors", "style_model": "redux.safetensors"})
    ours["seen2"] = ("CLIPVisionEncode", {"clip_vision": ["both", 0], "image": ["image", 0], "crop": "none"})
    ours["style2"] = ("StyleModelApply", {**ours["style"][1], "style_model": ["both", 1],
                                          "clip_vision_output": ["seen2", 0]})
    outputs = run_prompt(ours, "style style2").outputs
    assert torch.equal(outputs["style"][0][0][0][0], outputs["style2"][0][0][0][0])


def test_pictures_of_a_batch_follow_each_other(run_prompt: Run, host: StandaloneHost) -> None:
    loaded = run_prompt(chain(), "vision").outputs
    clip_vision = loaded["vision"][0][0]
    image = host.load_image("p.png")[0]
    both = host.see(clip_vision, torch.cat((image, image.flip(1))))
    assert both.shape == (2, TOKENS, 64)
    assert torch.allclose(both[1:], host.see(clip_vision, image.flip(1)), atol=1e-6)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_cut_or_stretched(run_prompt: Run) -> None:
    stretched, cut = (run_prompt(chain(crop=crop), "seen").outputs["seen"][0][0].last_hidden_state
                      for crop in ("none", "center"))
    assert not torch.allclose(stretched, cut, atol=1e-3)


def test_multiply_scales_the_tokens_alone(run_prompt: Run) -> None:
    one, half = (run_prompt(chain(strength), "style").outputs["style"][0][0][0] for strength in (1.0, 0.5))
    assert torch.equal(one[0][:, :256], half[0][:, :256]) and "attention_mask" not in half[1]
    assert torch.allclose(half[0][:, 256:], one[0][:, 256:] / 2)


def test_bias_goes_from_nothing_through_one_upward(run_prompt: Run) -> None:
    """At 1 it is no bias, bit for bit; at 0 the picture is not seen, and its tokens change nothing in others."""
    nodes = {**chain(1.0, "attn_bias"), "none": sampler("text"), "plain": chain()["style"], "k1": sampler("plain")}
    result = run_prompt(nodes, "k none k1")
    full, none = samples(result, "k"), samples(result, "none")
    assert torch.equal(full, samples(result, "k1"))
    distance = []
    for strength in (0.0, 1e-3, 0.1, 0.5):
        latent = samples(run_prompt(chain(strength, "attn_bias"), "k"), "k")
        assert torch.isfinite(latent).all()
        distance.append(relative(latent, none))
    assert distance[0] <= 1e-6 and distance == sorted(distance) and distance[-1] < relative(full, none)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("old", ["none", "bool", "bias"])
def test_masks_by_their_meaning(factor: float, old: str) -> None:
    """Entry by entry: text of 5, a picture of 2 x 3 tokens, 4 new ones between them."""
    text, tokens = torch.randn(1, 5, 8), torch.randn(1, 4, 8)
    before: Any = {"none": None, "bool": torch.rand(1, 11, 11) < 0.5, "bias": torch.randn(1, 11, 11).half()}[old]
    values = {} if before is None else {"attention_mask": before, "attention_mask_img_shape": (2, 3)}
    joined, told = with_tokens(text, values, tokens, factor)
    assert joined.shape == (1, 9, 8)
    if before is None and factor == 1:
        assert told == {}
        return
    grid = (1, 1) if before is None else (2, 3)
    assert told["attention_mask_img_shape"] == grid
    mask, length = told["attention_mask"][0], 9 + grid[0] * grid[1]
    assert mask.shape == (length, length) and mask.dtype == torch.float16
    for query in range(length):
        for key in range(length):
            new = [5 <= place < 9 for place in (query, key)]
            if new[1] and not new[0]:
                want = math.log(factor) if factor else -math.inf
            elif any(new) or before is None:
                want = 0.0
            else:
                kept = before[0, query - 4 * (query >= 9), key - 4 * (key >= 9)]
                want = float(kept) if old == "bias" else 0.0 if kept else -math.inf
            assert mask[query, key].item() == pytest.approx(want, rel=1e-3)
    assert "attention_mask" not in values or values["attention_mask"] is before


def test_a_mask_that_does_not_fit_is_refused() -> None:
    values = {"attention_mask": torch.zeros(1, 9, 9), "attention_mask_img_shape": (2, 3)}
    with pytest.raises(BadInput, match="sides of 11"):
        with_tokens(torch.zeros(1, 5, 8), values, torch.zeros(1, 4, 8), 1.0)


@pytest.mark.parametrize(("changes", "error", "words"), [
    ({"vision": "clip_vision_h"}, BadModelFile, "CLIP ViT-H vision encoder.*sigclip_vision_patch14_384"),
    ({"style": "style_sd15"}, BadModelFile, "style adapter.*flux1-redux-dev"),
    ({"style": "narrow"}, BadInput, "width 64.*width 32"), ({"style": "wide"}, BadInput, "width 96.*64 wide"),
    ({"vision": "sigclip"}, BadInput, r"clip_vision: 'sigclip.safetensors'"),
    ({"style": "flux1-redux-dev"}, BadInput, "style_models: 'flux1-redux-dev.safetensors'"),
    ({"kind": "add"}, BadInput, "attn_bias"), ({"strength": 11.0}, BadInput, "0.0 to 10.0"),
    ({"crop": "left"}, BadInput, "center")])
def test_bad_input_is_named(run_prompt: Run, changes: dict[str, Any], error: type[FluxKitError], words: str) -> None:
    with pytest.raises(error, match=words):
        run_prompt(chain(**changes), "k")


def test_bad_pictures_and_broken_models_are_named(run_prompt: Run, host: StandaloneHost) -> None:
    loaded = run_prompt(chain(), "vision redux").outputs
    clip_vision, style_model = loaded["vision"][0][0], loaded["redux"][0][0]
    with pytest.raises(NotFinite, match="the picture given"):
        host.see(clip_vision, torch.full((1, 8, 8, 3), float("nan")))
    with pytest.raises(BadInput, match=r"\(1, 8, 8, 2\)"):
        host.see(clip_vision, torch.zeros(1, 8, 8, 2))
    for model, layer, call in ((clip_vision, clip_vision.vision.vision_model.post_layernorm,
                                lambda: host.see(clip_vision, torch.zeros(1, 8, 8, 3))),
                               (style_model, style_model.redux.redux_up,
                                lambda: host.style_tokens(style_model, torch.zeros(1, 4, 64)))):
        kept = layer.bias
        layer.bias = torch.nn.Parameter(torch.full(kept.shape, float("nan")), requires_grad=False)
        try:
            with pytest.raises(NotFinite, match=model.path.name):
                call()
        finally:
            layer.bias = kept
