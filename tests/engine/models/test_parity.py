"""Every network against diffusers' or transformers' class with the same random weights, fp32.

Small shapes in all variants, and the published widths once. Full width needs about 3 GB: weights are shared with the
oracle, and the depth of 19 + 38 blocks repeats one block of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from compare import relative
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import CLIP_L, FLUX_AE, FLUX_DEV, T5_XXL, AutoencoderSpec, ClipTextSpec, FluxSpec, T5Spec
from oracles import (
    State,
    autoencoder_oracle,
    clip_oracle,
    flux_oracle,
    loaded,
    on_meta,
    random_state,
    t5_oracle,
    tied,
)
from torch import Tensor

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------ transformer

def flux_inputs(spec: FluxSpec, batch: int, grid: tuple[int, int], text: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows, columns = grid
    img_ids = torch.zeros(rows, columns, 3)
    img_ids[..., 1] = torch.arange(rows)[:, None]
    img_ids[..., 2] = torch.arange(columns)[None]
    return {
        "img": torch.randn(batch, rows * columns, spec.in_channels, generator=generator),
        "img_ids": img_ids.view(1, -1, 3).expand(batch, -1, -1),
        "txt": torch.randn(batch, text, spec.context_in_dim, generator=generator),
        "txt_ids": torch.zeros(batch, text, 3),
        "timesteps": torch.linspace(0.83, 0.21, batch),
        "y": torch.randn(batch, spec.vec_in_dim, generator=generator),
        "guidance": torch.linspace(3.5, 1.2, batch),
    }


def flux_error(spec: FluxSpec, state: State, inputs: dict[str, Tensor]) -> float:
    ours = loaded(on_meta(Flux, spec), state)(**inputs)
    theirs = flux_oracle(spec, state)(
        hidden_states=inputs["img"], encoder_hidden_states=inputs["txt"], pooled_projections=inputs["y"],
        timestep=inputs["timesteps"], img_ids=inputs["img_ids"][0], txt_ids=inputs["txt_ids"][0],
        guidance=inputs["guidance"] if spec.guidance_embed else None, return_dict=False)[0]
    return relative(ours, theirs)


SMALL_FLUX = FluxSpec(hidden_size=128, num_heads=1, context_in_dim=64, vec_in_dim=48, depth=2, depth_single_blocks=3)


@pytest.mark.parametrize(("change", "batch", "grid", "text"), [
    pytest.param({}, 1, (8, 8), 16, id="one-head"),
    pytest.param({"hidden_size": 256, "num_heads": 2}, 3, (5, 7), 13, id="two-heads-batch-3-odd-counts"),
    pytest.param({"hidden_size": 384, "num_heads": 3}, 1, (3, 3), 1, id="three-heads-one-text-token"),
    pytest.param({"depth": 1, "depth_single_blocks": 1}, 1, (40, 160), 31, id="wide-grid"),
    pytest.param({"guidance_embed": False}, 2, (4, 6), 9, id="schnell"),
    pytest.param({"in_channels": 384}, 1, (4, 4), 8, id="fill"),
    pytest.param({"in_channels": 128}, 1, (4, 4), 8, id="control"),
    pytest.param({"depth": 0, "depth_single_blocks": 2}, 1, (4, 4), 8, id="single-blocks-alone"),
    pytest.param({"hidden_size": 64, "num_heads": 2, "axes_dim": (8, 12, 12)}, 1, (4, 4), 8, id="other-axes"),
])
def test_small_transformer(change: dict[str, object], batch: int, grid: tuple[int, int], text: int) -> None:
    spec = replace(SMALL_FLUX, **change)  # type: ignore[arg-type]
    state = random_state(on_meta(Flux, spec))
    assert flux_error(spec, state, flux_inputs(spec, batch, grid, text)) <= TOLERANCE


def test_text_ids_count() -> None:
    """Positions of text tokens reach the rope (Flux leaves them 0; others number them)."""
    state = random_state(on_meta(Flux, SMALL_FLUX))
    inputs = flux_inputs(SMALL_FLUX, 1, (4, 4), 8)
    plain = loaded(on_meta(Flux, SMALL_FLUX), state)(**inputs)
    inputs["txt_ids"][..., 0] = torch.arange(8)
    assert relative(loaded(on_meta(Flux, SMALL_FLUX), state)(**inputs), plain) > 1e-3
    assert flux_error(SMALL_FLUX, state, inputs) <= TOLERANCE


@pytest.fixture(scope="class")  # 2 GB, given back before the next model comes
def full_width() -> Iterator[State]:
    yield random_state(on_meta(Flux, replace(FLUX_DEV, depth=1, depth_single_blocks=1)))


class TestFullWidthTransformer:
    def test_one_block_of_each_kind(self, full_width: State) -> None:
        spec = replace(FLUX_DEV, depth=1, depth_single_blocks=1)
        assert flux_error(spec, full_width, flux_inputs(spec, 1, (16, 16), 64)) <= TOLERANCE

    def test_published_depth(self, full_width: State) -> None:
        state = tied(tied(full_width, "double_blocks", 19), "single_blocks", 38)
        assert flux_error(FLUX_DEV, state, flux_inputs(FLUX_DEV, 1, (8, 8), 32)) <= TOLERANCE


# ------------------------------------------------------------------------------------------------------ autoencoder

def autoencoder_errors(spec: AutoencoderSpec, batch: int, height: int, width: int) -> tuple[float, float]:
    state = random_state(on_meta(Autoencoder, spec))
    ours, theirs = loaded(on_meta(Autoencoder, spec), state), autoencoder_oracle(spec, state)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    side = spec.downscale
    latents = torch.randn(batch, spec.z_channels, height // side, width // side, generator=generator)
    return (relative(ours.encode(pixels), theirs.encode(pixels).latent_dist.mean),
            relative(ours.decode(latents), theirs.decode(latents).sample))


@pytest.mark.parametrize(("spec", "batch", "height", "width"), [
    pytest.param(AutoencoderSpec(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1), 3, 40, 24, id="batch-3-oblong"),
    pytest.param(AutoencoderSpec(ch=32, ch_mult=(1, 2, 3, 3), num_res_blocks=2), 1, 8, 56, id="one-row-of-latents"),
    pytest.param(FLUX_AE, 1, 128, 128, id="full-width"),
])
def test_autoencoder(spec: AutoencoderSpec, batch: int, height: int, width: int) -> None:
    encode, decode = autoencoder_errors(spec, batch, height, width)
    assert encode <= TOLERANCE
    assert decode <= TOLERANCE


# ---------------------------------------------------------------------------------------------------- text encoders

def t5_state(spec: T5Spec) -> State:
    """T5 does not divide scores by sqrt(d_kv): its q is trained smaller instead, and so it is here."""
    state = random_state(on_meta(T5Encoder, spec))
    return {key: value / 8 if key.endswith(".q.weight") else value for key, value in state.items()}


@pytest.mark.parametrize(("spec", "batch", "length"), [
    pytest.param(T5Spec(vocab_size=97, d_model=64, num_heads=1, d_ff=96, num_layers=3), 1, 16, id="one-head"),
    pytest.param(T5Spec(vocab_size=97, d_model=96, num_heads=3, d_ff=64, num_layers=2), 3, 301, id="long-batch-3"),
    pytest.param(T5Spec(vocab_size=97, d_model=64, num_heads=2, d_kv=24, d_ff=96, num_layers=2), 2, 1, id="one-token"),
    pytest.param(replace(T5_XXL, num_layers=2), 1, 160, id="full-width"),
])
def test_t5(spec: T5Spec, batch: int, length: int) -> None:
    state = t5_state(spec)
    ours, theirs = loaded(on_meta(T5Encoder, spec), state), t5_oracle(spec, state)
    ids = torch.randint(0, spec.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))
    everything = torch.ones_like(ids)  # FLUX.1 masks nothing; transformers does the same when told so
    assert relative(ours(ids), theirs(ids, attention_mask=everything)[0]) <= TOLERANCE


def test_t5_mask() -> None:
    spec = T5Spec(vocab_size=97, d_model=64, num_heads=2, d_ff=96, num_layers=2)
    state = t5_state(spec)
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(12)[None] < torch.tensor([[5], [12]])
    ours = loaded(on_meta(T5Encoder, spec), state)(ids, mask)
    theirs = t5_oracle(spec, state)(ids, attention_mask=mask.long())[0]
    assert relative(ours[mask], theirs[mask]) <= TOLERANCE


@pytest.mark.parametrize(("spec", "batch", "length"), [
    pytest.param(ClipTextSpec(hidden_size=64, num_attention_heads=1, intermediate_size=96, num_hidden_layers=2),
                 3, 77, id="one-head-batch-3"),
    pytest.param(ClipTextSpec(hidden_size=192, num_attention_heads=3, intermediate_size=96, num_hidden_layers=2),
                 2, 7, id="three-heads-short"),
    pytest.param(CLIP_L, 1, 77, id="full-width"),
])
def test_clip(spec: ClipTextSpec, batch: int, length: int) -> None:
    state = random_state(on_meta(ClipText, spec))
    ours, theirs = loaded(on_meta(ClipText, spec), state), clip_oracle(spec, state)
    ids = torch.randint(0, 49000, (batch, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 49406
    for row in range(batch):  # the text ends earlier in every row, padded with the end-of-text token as CLIP-L does
        ids[row, length - 1 - 2 * row:] = 49407
    states, pooled = ours(ids)
    answer = theirs(ids)
    assert relative(states, answer.last_hidden_state) <= TOLERANCE
    assert relative(pooled, answer.pooler_output) <= TOLERANCE
