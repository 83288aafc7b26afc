"""The SigLIP vision tower and Redux's projector against transformers' and diffusers' classes, and pictures on their way
in."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import relative
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from flux_kit.engine.errors import BadInput, NotFinite
from flux_kit.engine.models.vision import Redux, SiglipVision, to_pixels
from flux_kit.engine.specs import REDUX, SIGLIP, ReduxSpec, SiglipSpec
from flux_kit.engine.weights import load
from oracles import State, loaded, manifest, on_meta, random_state
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

TOLERANCE = 1e-5
SMALL = SiglipSpec(hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=60,
                   patch_size=14)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def state_of(spec: SiglipSpec) -> State:
    """Embeddings small enough that the epsilon of the norms shows: 1e-5 in its place is 1e-4 off."""
    return {name: value / 300 if "_embedding." in name else value / 20 if ".out_proj." in name or ".fc2." in name
            else value for name, value in random_state(on_meta(SiglipVision, spec)).items()}


def oracle(spec: SiglipSpec, state: State) -> SiglipVisionModel:
    """Its names have no `vision_model.` since transformers 5."""
    known = {field.name for field in fields(spec)} - {"image_mean", "image_std"}
    config = SiglipVisionConfig(**{name: getattr(spec, name) for name in known}, attn_implementation="eager")
    model = SiglipVisionModel(config)  # not on meta: it keeps a table of positions that no file holds
    short = {key.removeprefix("vision_model."): value for key, value in state.items()}
    return loaded(model, state if set(state) <= set(model.state_dict()) else short)


def noise(spec: SiglipSpec, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, 3, spec.image_size, spec.image_size, generator=generator) * 2 - 1


@pytest.mark.parametrize(("spec", "batch"), [
    pytest.param(SMALL, 3, id="batch-3-patches-that-leave-a-rest"),
    pytest.param(replace(SMALL, hidden_size=144, image_size=32, patch_size=8), 1, id="heads-of-72"),
    pytest.param(replace(SMALL, num_hidden_layers=1, num_attention_heads=1, image_size=14), 1, id="one-patch"),
    pytest.param(replace(SIGLIP, num_hidden_layers=2), 1, id="full-width"),
])
def test_parity(spec: SiglipSpec, batch: int) -> None:
    state, pixels = state_of(spec), noise(spec, batch)
    ours, theirs = loaded(on_meta(SiglipVision, spec), state), oracle(spec, state)
    states, answer = ours(pixels), theirs(pixel_values=pixels, output_hidden_states=True)
    assert states.shape == (batch, spec.num_positions, spec.hidden_size)
    assert relative(states, answer.last_hidden_state) <= TOLERANCE
    assert relative(ours.pooled(states), answer.pooler_output) <= TOLERANCE
    layers = list(ours.layer_states(pixels))
    assert len(layers) == spec.num_hidden_layers + 1 == len(answer.hidden_states)
    assert relative(layers[-2], answer.hidden_states[-2]) <= TOLERANCE


def test_the_epsilon_shows() -> None:
    state, pixels = state_of(SMALL), noise(SMALL, 1)
    ours, other = (loaded(on_meta(SiglipVision, spec), state) for spec in (SMALL, replace(SMALL, layer_norm_eps=1e-5)))
    assert relative(other(pixels), ours(pixels)) > 5 * TOLERANCE


def test_published_names_and_shapes() -> None:
    for kind, spec, name in ((SiglipVision, SIGLIP, "siglip_so400m_vision_hf"), (Redux, REDUX, "redux")):
        found = {key: list(tensor.shape) for key, tensor in on_meta(kind, spec).state_dict().items()}
        assert found == {key: shape for key, (shape, _) in manifest(name).items()}


def test_without_its_head_the_states_are_the_same() -> None:
    state, pixels = state_of(SMALL), noise(SMALL, 1)
    bare = {name: value for name, value in state.items() if ".head." not in name}
    ours = loaded(on_meta(SiglipVision, SMALL), state)
    headless = loaded(on_meta(SiglipVision, replace(SMALL, vision_use_head=False)), bare)
    assert torch.equal(headless(pixels), ours(pixels))
    with pytest.raises(ValueError, match="without its pooling head"):
        headless.pooled(ours(pixels))


def test_files_of_transformers_and_diffusers_load(tmp_path: Path) -> None:
    spec = replace(SMALL, image_size=56)
    vision = oracle(spec, state_of(spec))
    vision.save_pretrained(tmp_path / "image_encoder")
    ours, pixels = load(tmp_path / "image_encoder", "vision"), noise(spec, 1)
    assert ours.spec == spec
    assert relative(ours(pixels), vision(pixel_values=pixels).last_hidden_state) <= TOLERANCE
    ReduxImageEncoder(redux_dim=24, txt_in_features=10).save_pretrained(tmp_path / "image_embedder")
    assert load(tmp_path / "image_embedder", "redux").spec == ReduxSpec(redux_dim=24, txt_in_features=10)


@pytest.mark.parametrize("spec", [ReduxSpec(redux_dim=24, txt_in_features=10), REDUX], ids=["small", "full-width"])
def test_redux_parity(spec: ReduxSpec) -> None:
    state = random_state(on_meta(Redux, spec))
    states = torch.randn(2, 9, spec.redux_dim, generator=torch.Generator().manual_seed(1))
    with torch.device("meta"):
        theirs: Any = ReduxImageEncoder(redux_dim=spec.redux_dim, txt_in_features=spec.txt_in_features)
    theirs = loaded(theirs, state)
    assert relative(loaded(on_meta(Redux, spec), state)(states), theirs(states).image_embeds) <= TOLERANCE


def test_redux_names_both_widths() -> None:
    with pytest.raises(BadInput, match=r"width 1024.*width 1152.*sigclip_vision_patch14_384"):
        on_meta(Redux, REDUX)(torch.zeros(1, 729, 1024, device="meta"))


# ---------------------------------------------------------------------------------------------------- pictures

def photo(height: int, width: int, batch: int = 1) -> np.ndarray:
    """Smooth colours and edges, 8 bits a channel."""
    rows, columns = np.mgrid[:height, :width]
    channels = [128 + 100 * np.sin(rows / 9 + i) * np.cos(columns / (7 + i)) + 25 * ((rows // 16 + columns // 16) % 2)
                for i in range(3 * batch)]
    pictures = np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8).reshape(height, width, batch, 3)
    return pictures.transpose(2, 0, 1, 3)


def image(*sides: int) -> Tensor:
    return torch.from_numpy(photo(*sides).astype(np.float32) / 255)


@pytest.mark.parametrize("sides", [(384, 384), (300, 500), (640, 384), (1000, 700), (64, 48)])
def test_stretched_pictures_are_diffusers_but_for_rounding(sides: tuple[int, int]) -> None:
    """The official recipe stretches 8-bit pictures by PIL, which rounds after each axis."""
    try:
        module = importlib.import_module("transformers.models.siglip.image_processing_pil_siglip")
        processor = module.SiglipImageProcessorPil(size={"height": 384, "width": 384})
    except ImportError:
        from transformers import SiglipImageProcessor
        processor = SiglipImageProcessor(size={"height": 384, "width": 384})
    theirs = processor(Image.fromarray(photo(*sides)[0]), return_tensors="pt").pixel_values
    ours = to_pixels(image(*sides), SIGLIP)
    assert ours.shape == theirs.shape == (1, 3, 384, 384)
    difference = (ours - theirs).abs()
    assert difference.max() <= 4 / 127.5 + 1e-6 and difference.mean() <= 2e-3
    if sides == (384, 384):
        assert difference.max() < 1e-6


def test_a_crop_is_the_middle_and_keeps_the_aspect() -> None:
    spec = replace(SIGLIP, image_size=96)
    wide = image(96, 160)
    assert torch.allclose(to_pixels(wide, spec, crop=True), to_pixels(wide[:, :, 32:128], spec), atol=1e-6)
    tall = image(161, 96)
    assert torch.allclose(to_pixels(tall, spec, crop=True), to_pixels(tall[:, 32:128], spec), atol=1e-6)
    assert not torch.allclose(to_pixels(wide, spec), to_pixels(wide, spec, crop=True), atol=0.1)


def test_pixels_are_of_eight_bits_between_minus_one_and_one() -> None:
    bright = torch.rand(2, 40, 50, 4, generator=torch.Generator().manual_seed(0)) * 3 - 1
    pixels = to_pixels(bright, replace(SIGLIP, image_size=32))
    assert pixels.shape == (2, 3, 32, 32) and (pixels.min(), pixels.max()) == (-1, 1)
    levels = (pixels + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert torch.equal(pixels, to_pixels(bright[..., :3], replace(SIGLIP, image_size=32)))


@pytest.mark.parametrize(("bad", "told"), [
    (torch.zeros(1, 8, 8, 1), r"\(1, 8, 8, 1\)"), (torch.zeros(8, 8, 3), r"\(8, 8, 3\)"),
    (torch.zeros(0, 8, 8, 3), r"\(0, 8, 8, 3\)"), (None, "NoneType"), (torch.zeros(1, 3, 8, 8)[..., :2], "found")])
def test_what_is_no_picture_is_refused(bad: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        to_pixels(bad, SIGLIP)


def test_nan_pictures_and_endless_strips_are_refused() -> None:
    with pytest.raises(NotFinite, match="NaN"):
        to_pixels(torch.full((1, 8, 8, 3), float("nan")), SIGLIP)
    strip = torch.zeros(1, 2, 4000, 3)
    with pytest.raises(BadInput, match="768000 x 384"):
        to_pixels(strip, SIGLIP, crop=True)
    assert to_pixels(strip, SIGLIP).shape == (1, 3, 384, 384)
