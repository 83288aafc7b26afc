"""FluxKitRedux, FluxKitKontext and FluxKitAutoShift in workflows of the standalone host, on random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import relative
from family import random_weights
from family_fixtures import samples
from flux_kit.engine.errors import BadInput
from flux_kit.engine.models.vision import Redux, SiglipVision
from flux_kit.engine.sampling import make_sigmas
from flux_kit.engine.specs import SIGLIP, ReduxSpec
from flux_kit.hosts.standalone.host import StandaloneHost
from PIL import Image
from prompts import LOAD, sampler
from safetensors.torch import save_file

SMALL = replace(SIGLIP, hidden_size=128, num_attention_heads=2, intermediate_size=96, num_hidden_layers=1,
                image_size=56)  # 4 x 4 tokens
PICTURES = {"wide.png": (48, 80), "square.png": (64, 64), "holed.png": (48, 80, 1)}
REDUX: dict[str, Any] = {"conditioning": ["pos", 0], "style_model": ["redux", 1], "clip_vision": ["redux", 0],
                         "images": ["square", 0], "strength": 1.0, "detail": 27, "fit": "stretch", "several": "append"}
KONTEXT: dict[str, Any] = {"positive": ["pos", 0], "vae": ["load", 2], "size": "keep-16", "layout": "chain",
                           "aspect": "from image", "width": 1024, "height": 1024, "guidance": 2.5, "batch_size": 1}


@pytest.fixture(scope="module")
def redux_files(models: Path) -> None:
    for folder, name, model in (("clip_vision", "siglip.safetensors", SiglipVision(SMALL)),
                                ("style_models", "redux.safetensors", Redux(ReduxSpec(redux_dim=128,
                                                                                      txt_in_features=64)))):
        (models / folder).mkdir(exist_ok=True)
        save_file(random_weights(model, 6), models / folder / name)


@pytest.fixture
def run(run_prompt: Any, host: StandaloneHost, redux_files: None) -> Any:
    draw = np.random.default_rng(1)
    for name, (height, width, *alpha) in PICTURES.items():
        picture = draw.integers(0, 255, (height, width, 3 + len(alpha)), dtype=np.uint8)
        picture[:, :32, 3:], picture[:, 32:, 3:] = 0, 255  # a hole at the left
        Image.fromarray(picture).save(host.folders.roots("input")[0] / name)
    fixed = {**LOAD, "redux": ("FluxKitLoadRedux", {"clip_vision": "siglip.safetensors",
                                                    "style_model": "redux.safetensors"}),
             **{name.split(".")[0]: ("LoadImage", {"image": name}) for name in PICTURES}}
    return lambda nodes, keep: run_prompt({**fixed, **nodes}, keep)


def redux(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "FluxKitRedux", {**REDUX, **changes}


def kontext(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "FluxKitKontext", {**KONTEXT, "image_1": ["wide", 0], **changes}


def test_redux_at_1_is_core_s_two_nodes(run: Any) -> None:
    core = {"seen": ("CLIPVisionEncode", {"clip_vision": ["redux", 0], "image": ["wide", 0], "crop": "none"}),
            "style": ("StyleModelApply", {"conditioning": ["pos", 0], "style_model": ["redux", 1],
                                          "clip_vision_output": ["seen", 0], "strength": 1.0,
                                          "strength_type": "multiply"})}
    result = run({**core, "ours": redux(images=["wide", 0])}, "style ours")
    ours, theirs = (result.outputs[name][0][0][0] for name in ("ours", "style"))
    assert torch.equal(ours[0], theirs[0]) and ours[1].keys() == theirs[1].keys()
    assert "4 x 4 tokens" in result.outputs["ours"][1][0]


@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_a_strength_is_core_s_attention_bias(run: Any, strength: float) -> None:
    core = {"seen": ("CLIPVisionEncode", {"clip_vision": ["redux", 0], "image": ["square", 0], "crop": "none"}),
            "style": ("StyleModelApply", {"conditioning": ["pos", 0], "style_model": ["redux", 1],
                                          "clip_vision_output": ["seen", 0], "strength": strength,
                                          "strength_type": "attn_bias"})}
    result = run({**core, "ours": redux(strength=strength), "fixed": redux(strength=strength, latent=["empty", 0]),
                  "a": sampler(positive=["style", 0]), "b": sampler(positive=["ours", 0]),
                  "c": sampler(positive=["fixed", 0]), "off": sampler()}, "style ours a b c off")
    ours, theirs = (result.outputs[name][0][0][0][1] for name in ("ours", "style"))
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert ours["attention_mask_img_shape"] == theirs["attention_mask_img_shape"] == (1, 1)
    assert torch.equal(samples(result, "a"), samples(result, "b"))
    assert relative(samples(result, "c"), samples(result, "a")) < 1e-5
    assert relative(samples(result, "off"), samples(result, "a")) > 1e-3


def test_redux_masks_and_several_pictures_run(run: Any) -> None:
    area = ("SolidMask", {"value": 0.5, "width": 48, "height": 32})
    result = run({"area": area, "style": redux(area=["area", 0], latent=["empty", 0], detail=2, fit="letterbox",
                                               images=["wide", 0]),
                  "more": redux(conditioning=["style", 0], strength=0.4, latent=["empty", 0], several="average"),
                  "k": sampler(positive=["more", 0])}, "k style")
    assert torch.isfinite(samples(result, "k")).all()
    assert "by 6 of 6 tokens" in result.outputs["style"][1][0]


def test_an_edit_at_the_size_of_a_small_model(run: Any) -> None:
    result = run({"edit": kontext(image_2=["square", 0]), "k": sampler(positive=["edit", 0], latent=["edit", 2]),
                  "plain": sampler(latent=["edit", 2])}, "k plain")
    positive, negative, latent, width, height, report = (output[0] for output in result.outputs["edit"])
    assert (width, height) == (80, 48) and latent["samples"].shape == (1, 16, 6, 10)
    assert [one.shape[-2:] for one in positive[0][1]["reference_latents"]] == [(6, 10), (8, 8)]
    assert not negative[0][0].any() and "the result is 80 x 48" in report
    assert relative(samples(result, "k"), samples(result, "plain")) > 1e-3


def test_references_are_what_core_s_nodes_make_of_them(run: Any) -> None:
    core = {"encoded": ("VAEEncode", {"pixels": ["wide", 0], "vae": ["load", 2]}),
            "encoded2": ("VAEEncode", {"pixels": ["square", 0], "vae": ["load", 2]}),
            "first": ("ReferenceLatent", {"conditioning": ["pos", 0], "latent": ["encoded", 0]}),
            "second": ("ReferenceLatent", {"conditioning": ["first", 0], "latent": ["encoded2", 0]})}
    result = run({**core, "edit": kontext(image_2=["square", 0], guidance=0.0)}, "edit second")
    ours, theirs = (result.outputs[name][0][0][0][1] for name in ("edit", "second"))
    assert all(torch.equal(a, b) for a, b in zip(ours["reference_latents"], theirs["reference_latents"], strict=True))
    assert ours["guidance"] == theirs["guidance"] == 3.5


def test_a_masked_edit_leaves_the_rest(run: Any) -> None:
    edit = kontext(image_1=["holed", 0], edit_mask=["holed", 1])
    result = run({"edit": edit, "k": sampler(positive=["edit", 0], latent=["edit", 2])}, "k")
    before, after = result.outputs["edit"][2][0]["samples"], samples(result, "k")
    assert torch.allclose(before[..., 4:], after[..., 4:], atol=1e-4)
    assert not torch.allclose(before[..., :4], after[..., :4], atol=1e-1)


def test_redux_and_kontext_together_in_either_order(run: Any) -> None:
    result = run({"edit": kontext(), "style": redux(conditioning=["edit", 0], strength=0.5, latent=["edit", 2]),
                  "style1": redux(strength=0.5), "edit1": kontext(positive=["style1", 0]),
                  "a": sampler(positive=["style", 0], latent=["edit", 2]),
                  "b": sampler(positive=["edit1", 0], latent=["edit", 2])}, "a b")
    assert relative(samples(result, "a"), samples(result, "b")) < 1e-5


def test_the_model_is_checked_when_it_is_there(run: Any, host: StandaloneHost, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run({"edit": kontext(model=["load", 0])}, "edit").outputs["edit"][5][0]
    assert "cannot be told apart" in report
    schnell = {"fast": ("FluxKitLoadTransformer", {"model": "flux1-schnell.safetensors"})}
    assert "schnell" in run({**schnell, "edit": kontext(model=["fast", 0])}, "edit").outputs["edit"][5][0]
    monkeypatch.setattr(host, "img_in_width", lambda model: 384)
    with pytest.raises(BadInput, match="Fill"):
        run({"edit": kontext(model=["load", 0], guidance=2.6)}, "edit")


@pytest.mark.parametrize(("size", "tokens"), [((1024, 1024), 4096), ((512, 512), 1024), ((2048, 1024), 8192)])
def test_auto_shift_is_the_schedule_of_black_forest_labs(run: Any, size: tuple[int, int], tokens: int) -> None:
    empty = ("FluxKitEmptyLatent", {**LOAD["empty"][1], "width": size[0], "height": size[1]})
    sigmas = {"model": ["shift", 0], "scheduler": "simple", "steps": 20, "denoise": 1.0}
    result = run({"big": empty, "shift": shift(latent=["big", 0]), "s": ("BasicScheduler", sigmas),
                  "before": ("BasicScheduler", {**sigmas, "model": ["load", 0]})}, "s before shift")
    found, expected = result.outputs["s"][0][0], make_sigmas("bfl", 20, image_seq_len=tokens)
    assert torch.equal(found, expected) if tokens == 4096 else (found - expected).abs().max() < 1e-4
    assert torch.equal(result.outputs["before"][0][0], make_sigmas("simple", 20)), "the model itself has changed"


def shift(**changes: Any) -> tuple[str, dict[str, Any]]:
    return "FluxKitAutoShift", {"model": ["load", 0], "latent": ["empty", 0], "base_shift": 0.5, "max_shift": 1.15,
                                **changes}


def test_auto_shift_twice_is_once_and_schnell_stays(run: Any) -> None:
    result = run({"fast": ("FluxKitLoadTransformer", {"model": "flux1-schnell.safetensors"}),
                  "one": shift(), "two": shift(model=["one", 0]), "none": shift(model=["fast", 0])},
                 "two none fast one load")
    one, two, none, fast, load = (result.outputs[name][0][0] for name in ("one", "two", "none", "fast", "load"))
    assert one.table == two.table != load.table and none is fast
    assert one.table.mu == pytest.approx(0.5 + (6 - 256) * 0.65 / 3840, abs=1e-12)


def test_auto_shift_does_what_our_sampler_does_by_itself(run: Any) -> None:
    settings = {"seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
                "positive": ["pos", 0], "negative": ["pos", 0], "latent_image": ["empty", 0]}
    result = run({"shift": shift(), "core": ("KSampler", {**settings, "model": ["shift", 0]}),
                  "ours": sampler(schedule="bfl", steps=2),
                  "plain": ("KSampler", {**settings, "model": ["load", 0]})},
                 "core ours plain")
    assert relative(samples(result, "core"), samples(result, "ours")) < 1e-3
    assert relative(samples(result, "plain"), samples(result, "ours")) > 1e-2


@pytest.mark.parametrize(("node", "told"), [
    (redux(detail=0), "1 to 64"), (redux(strength=2.5), "0.0 to 2.0"), (redux(fit="squeeze"), "letterbox"),
    (kontext(size="crop"), "keep-16"), (kontext(aspect="7:5"), "21:9"), (kontext(guidance=-1.0), "0.0 to 100"),
    (shift(max_shift=101.0), "0.0 to 100")])
def test_bad_widgets_are_refused_before_the_run(run: Any, node: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        run({"bad": node}, "bad")


def test_a_vision_encoder_of_another_width_is_named(run: Any, models: Path) -> None:
    save_file(random_weights(Redux(ReduxSpec(redux_dim=96, txt_in_features=64)), 6), models / "style_models" / "n.sft")
    narrow = ("FluxKitLoadRedux", {"clip_vision": "siglip.safetensors", "style_model": "n.sft"})
    with pytest.raises(BadInput, match=r"width 128, .* width 96; .*sigclip_vision_patch14_384"):
        run({"narrow": narrow, "style": redux(style_model=["narrow", 1])}, "style")
