"""Flux Fill: the table's rows D1 to D8, and the official recipe written out as oracle.

Official: black-forest-labs/flux, src/flux/sampling.py `prepare_fill`: the picture in -1..1 times 1 - mask, encoded, and
the mask's 8 x 8 blocks as channels, both packed 2 x 2 into tokens of 64 + 256.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import relative
from family import AUTOENCODER, DEV, random_weights
from flux_kit.engine.conditioning import fill
from flux_kit.engine.conditioning.pictures import with_values, zeroed
from flux_kit.engine.conditioning.regions import paste
from flux_kit.engine.errors import BadInput, NotFinite
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.sampling.latents import process_in
from flux_kit.engine.sampling.slots import read_slots
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

SAME = 1e-5
SPEC = replace(DEV, in_channels=384)
HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    made = Autoencoder(AUTOENCODER)
    made.load_state_dict({name: tensor.float() for name, tensor in random_weights(made, 5).items()})
    return made.requires_grad_(False)


def picture(batch: int = 1, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def masks() -> dict[str, Tensor]:
    binary = torch.zeros(1, HEIGHT, WIDTH)
    binary[:, 10:31, 7:50] = 1
    return {"binary": binary, "ramp": torch.linspace(0, 1, WIDTH).expand(1, HEIGHT, WIDTH), "half": binary / 2,
            "noise": picture(seed=3)[..., 0], "full": torch.ones_like(binary)}


MASKS = masks()


def packed(channels: Tensor) -> Tensor:
    """`b c (h ph) (w pw) -> b (h w) (c ph pw)`, 2 x 2."""
    b, c, h, w = channels.shape
    return channels.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def official(image: Tensor, mask: Tensor, autoencoder: Autoencoder) -> Tensor:
    """`img_cond` `(B, L, 320)` of a picture in 0..1 and a mask."""
    pixels = (image.movedim(-1, 1) * 2 - 1).contiguous() * (1 - mask[:, None])
    b, h, w = mask.shape
    blocks = mask.view(b, h // 8, 8, w // 8, 8).permute(0, 2, 4, 1, 3).reshape(b, 64, h // 8, w // 8)
    latents = process_in(autoencoder.encode(pixels)).expand(max(b, len(image)), -1, -1, -1)
    return torch.cat([packed(latents), packed(blocks).expand(len(latents), -1, -1)], dim=-1)


def encode(image: Tensor, autoencoder: Autoencoder) -> Tensor:
    """As hosts do."""
    return autoencoder.encode(image.movedim(-1, 1) * 2 - 1)


def ours(image: Tensor, mask: Tensor, autoencoder: Autoencoder, **options: Any) -> Tensor:
    """What the sampler puts beside the latents for the keys that Fill writes."""
    parts = fill.prepare(image, mask, **options)
    values = fill.values_of(parts, encode(parts.masked, autoencoder), 30.0)
    latents = encode(parts.picture, autoencoder)
    channels = read_slots(values, SPEC, "positive").channels(latents)
    assert channels is not None
    return channels


# ------------------------------------------------------------------------------------------ rows of the table

@pytest.mark.parametrize("name", MASKS)
def test_d1_soft_masks_are_the_official_recipe(autoencoder: Autoencoder, name: str) -> None:
    found, expected = ours(picture(), MASKS[name], autoencoder), official(picture(), MASKS[name], autoencoder)
    assert found.shape == expected.shape == (1, HEIGHT // 16 * (WIDTH // 16), 320)
    assert relative(found[..., :64], expected[..., :64]) <= SAME
    assert torch.equal(found[..., 64:], expected[..., 64:])


def test_d1_binary_is_diffusers_threshold(autoencoder: Autoencoder) -> None:
    found = ours(picture(), MASKS["ramp"], autoencoder, binary=True)
    assert relative(found, official(picture(), (MASKS["ramp"] >= 0.5).float(), autoencoder)) <= SAME
    assert relative(found, ours(picture(), MASKS["ramp"], autoencoder)) > 0.01


def test_d2_an_odd_size_comes_back() -> None:
    for size, made in ((fill.PAD, (80, 112)), (fill.STRETCH, (64, 96))):
        parts = fill.prepare(picture(height=75, width=101), torch.ones(1, 75, 101), size=size)
        latent = fill.latent_of(torch.zeros(1, 16, made[0] // 8, made[1] // 8), parts)
        assert parts.picture.shape == (1, *made, 3) and any("75" in note and "101" in note for note in parts.notes)
        assert fill.true_size(parts.picture, latent).shape == (1, 75, 101, 3)
    with pytest.raises(BadInput, match=r"101 x 75.*multiples of 16.*pad or stretch"):
        fill.prepare(picture(height=75, width=101), torch.ones(1, 75, 101), size=fill.ERROR)
    with pytest.raises(BadInput, match="choose pad"):
        fill.prepare(picture(height=9, width=101), torch.ones(1, 9, 101), size=fill.STRETCH)


@settings(max_examples=40)
@given(st.integers(17, 3000), st.integers(17, 3000), st.sampled_from([fill.PAD, fill.STRETCH]))
def test_d3_no_size_is_left_off_the_grid(width: int, height: int, size: str) -> None:
    wide, high, _ = fill.made_size(width, height, size)
    assert wide % 16 == 0 and high % 16 == 0
    assert (wide - width, high - height) == ((-width % 16, -height % 16) if size == fill.PAD else
                                             (-(width % 16), -(height % 16)))


@settings(max_examples=10)
@given(st.integers(17, 70), st.integers(17, 70), st.integers(1, 2), st.integers(0, 10**6))
def test_d3_what_is_added_is_the_edge_and_is_taken_off(height: int, width: int, batch: int, seed: int) -> None:
    """Where a latent is on a multiple of 8 only, ComfyUI's model adds the opposite edge."""
    image, mask = picture(batch, height, width, seed), picture(1, height, width, seed + 1)[..., 0]
    parts = fill.prepare(image, mask)
    high, wide = parts.picture.shape[1:3]
    rows, columns = torch.arange(high).clamp(max=height - 1), torch.arange(wide).clamp(max=width - 1)
    assert torch.equal(parts.picture, image[:, rows][:, :, columns])
    assert torch.equal(parts.mask[:, 0], mask[:, rows][:, :, columns].expand(batch, -1, -1))
    latent = fill.latent_of(torch.zeros(batch, 16, high // 8, wide // 8), parts)
    assert torch.equal(fill.true_size(parts.picture, latent), image)
    assert torch.equal(paste(image, parts.picture)[0], image), "a decoder that knows no record, then Region Paste"


def test_d4_conditioning_and_latent_have_one_size(autoencoder: Autoencoder) -> None:
    """Otherwise ComfyUI resizes latents; nothing is left for it to do."""
    for height, width in ((48, 64), (75, 101), (40, 72)):
        parts = fill.prepare(picture(height=height, width=width), torch.ones(1, height, width))
        masked, latents = encode(parts.masked, autoencoder), encode(parts.picture, autoencoder)
        assert masked.shape == latents.shape and latents.shape[-1] % 2 == latents.shape[-2] % 2 == 0
        assert parts.mask.shape == (1, 1, 8 * latents.shape[-2], 8 * latents.shape[-1])


def test_d5_a_full_mask_is_the_official_all_masked(autoencoder: Autoencoder) -> None:
    """Not zero latents, which stand in ComfyUI where there is no conditioning."""
    found = ours(picture(), MASKS["full"], autoencoder)
    grey = process_in(autoencoder.encode(torch.zeros(1, 3, HEIGHT, WIDTH)))
    assert relative(found[..., :64], packed(grey)) <= SAME and (found[..., 64:] == 1).all()
    assert relative(found[..., :64], packed(process_in(torch.zeros_like(grey)))) > 1e-3
    assert "nothing of it is kept" in fill.prepare(picture(), MASKS["full"]).notes[0]


def test_d6_a_model_that_ignores_the_picture_is_refused() -> None:
    for known in (None, 384):
        fill.check_width(known)
    for width, words in ((64, "dev, schnell or Kontext"), (128, "Depth or Canny"), (96, "no FLUX.1 model")):
        with pytest.raises(BadInput, match=f"{width} channels.*{words}.*needs FLUX.1 Fill.*384"):
            fill.check_width(width)


def test_d7_batches_fit_or_are_named(autoencoder: Autoencoder) -> None:
    images, cover = picture(3, seed=4), torch.cat([MASKS["binary"], MASKS["ramp"], MASKS["noise"]])
    together = ours(images, cover, autoencoder)
    singles = torch.cat([ours(images[n:n + 1], cover[n:n + 1], autoencoder) for n in range(3)])
    assert relative(together, singles) <= SAME
    many = ours(images[:1], cover, autoencoder)
    assert relative(many, torch.cat([ours(images[:1], cover[n:n + 1], autoencoder) for n in range(3)])) <= SAME
    assert relative(ours(images, cover[:1], autoencoder)[2:], ours(images[2:], cover[:1], autoencoder)) <= SAME
    with pytest.raises(BadInput, match="image 3, mask 2"):
        fill.prepare(images, cover[:2])


def test_d8_no_noise_mask_unless_asked() -> None:
    parts = fill.prepare(picture(), MASKS["ramp"])
    assert set(fill.latent_of(torch.zeros(1, 16, 6, 8), parts)) == {"samples"}
    assert torch.equal(fill.latent_of(torch.zeros(1, 16, 6, 8), parts, noise_mask=True)["noise_mask"],
                       MASKS["ramp"][:, None])


def test_d9_guidance() -> None:
    parts = fill.prepare(picture(), MASKS["full"])
    assert fill.values_of(parts, torch.zeros(1, 16, 6, 8), 30.0)["guidance"] == 30.0
    assert "guidance" not in fill.values_of(parts, torch.zeros(1, 16, 6, 8), 0.0)


def test_masks_are_packed_as_diffusers_packs_them() -> None:
    pipeline = pytest.importorskip("diffusers").FluxFillPipeline
    stub = SimpleNamespace(vae_scale_factor=8, _pack_latents=pipeline._pack_latents,
                           vae=SimpleNamespace(config=SimpleNamespace(shift_factor=0.1159, scaling_factor=0.3611)))
    latents, cover = torch.randn(2, 16, HEIGHT // 8, WIDTH // 8), torch.cat([MASKS["ramp"], MASKS["noise"]])
    mask, masked = pipeline.prepare_mask_latents(stub, cover[:, None], latents, 2, 16, 1, HEIGHT, WIDTH, torch.float32,
                                                 "cpu", None)
    parts = fill.prepare(picture(2), cover)
    found = read_slots(fill.values_of(parts, latents, 30.0), SPEC, "positive").channels(torch.zeros_like(latents))
    assert found is not None and torch.equal(found[..., 64:], mask) and relative(found[..., :64], masked) <= 1e-6


# ------------------------------------------------------------------------------------------ bad input

def test_an_empty_mask_is_refused() -> None:
    for empty in (torch.zeros(1, HEIGHT, WIDTH), torch.zeros(1, 64, 64)):
        with pytest.raises(BadInput, match=r"mask is empty.*alpha channel.*painted red"):
            fill.prepare(picture(), empty)
    with pytest.raises(BadInput, match="empty in item 2"):
        fill.prepare(picture(), torch.cat([MASKS["full"], MASKS["full"] * 0]))


def test_a_mask_that_binary_leaves_nothing_of_is_refused_as_such() -> None:
    with pytest.raises(BadInput, match=r"nowhere reaches one half: .* soft"):
        fill.prepare(picture(), MASKS["full"] * 0.3, binary=True)
    line = torch.zeros(1, 31, 31)
    line[:, :, 15] = 1
    assert fill.prepare(torch.rand(1, 31, 31, 3), line, binary=True).mask.max() == 1
    with pytest.raises(BadInput, match="nowhere reaches one half"):  # stretched to 16 it lies between two pixels
        fill.prepare(torch.rand(1, 31, 31, 3), line, binary=True, size="stretch")


def test_nan_is_named() -> None:
    with pytest.raises(NotFinite, match="image holds NaN"):
        fill.prepare(picture() * float("nan"), MASKS["full"])
    with pytest.raises(NotFinite, match="mask holds NaN"):
        fill.prepare(picture(), MASKS["full"] * float("nan"))


def test_alpha_is_left_out_and_its_polarity_told() -> None:
    alpha = MASKS["binary"][..., None]
    parts = fill.prepare(torch.cat([picture(), alpha], dim=-1), MASKS["binary"])
    assert parts.picture.shape[-1] == 3 and "alpha channel is left out" in parts.notes[0]
    assert "1 where the picture is opaque" in parts.notes[1]
    inverted = fill.prepare(torch.cat([picture(), alpha], dim=-1), 1 - MASKS["binary"])
    assert len(inverted.notes) == 1


def test_sizes_of_masks_and_latents() -> None:
    parts = fill.prepare(picture(), torch.ones(1, HEIGHT * 2, WIDTH * 2))
    assert parts.mask.shape == (1, 1, HEIGHT, WIDTH) and "stretched" in parts.notes[0]
    with pytest.raises(BadInput, match="another aspect"):
        fill.prepare(picture(), torch.ones(1, 64, 64))
    odd = fill.prepare(picture(height=75, width=101), torch.ones(1, 75, 101))
    latent = fill.latent_of(torch.zeros(1, 16, 10, 14), odd)
    other = torch.zeros(1, 160, 224, 3)                                     # the latent was scaled since
    assert fill.true_size(other, latent) is other


def test_conditionings_are_copied() -> None:
    cond, pooled = torch.ones(1, 4, 8), torch.ones(1, 8)
    given = [[cond, {"pooled_output": pooled, "guidance": 3.5}]]
    made = with_values(given, {"guidance": 30.0})
    assert given[0][1]["guidance"] == 3.5 and made[0][1]["guidance"] == 30.0 and made[0][0] is cond
    none = zeroed(made)
    assert not none[0][0].any() and not none[0][1]["pooled_output"].any() and none[0][1]["guidance"] == 30.0
    with pytest.raises(BadInput, match="positive is no conditioning"):
        with_values([], {})
