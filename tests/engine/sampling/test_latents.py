"""Tokens, positions, scale, noise and previews of latents."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flux_kit.engine.errors import BadInput
from flux_kit.engine.sampling import latents as L
from hypothesis import given
from hypothesis import strategies as st

sides = st.integers(1, 9)


@given(batch=st.integers(1, 3), channels=st.sampled_from([1, 4, 16]), height=sides, width=sides)
def test_patchify_is_pixel_unshuffle_of_the_wrapped_latent(batch, channels, height, width):
    x = torch.arange(batch * channels * height * width, dtype=torch.float32).reshape(batch, channels, height, width)
    padded = F.pad(x, (0, width % 2, 0, height % 2), mode="circular")
    expected = F.pixel_unshuffle(padded, 2).flatten(2).transpose(1, 2)
    tokens = L.patchify(x)
    assert torch.equal(tokens, expected)
    assert tokens.shape[1] == L.image_seq_len(height, width) == L.image_ids(1, height, width).shape[1]
    assert torch.equal(L.unpatchify(tokens, height, width), x)


def test_positions_are_row_and_column():
    ids = L.image_ids(2, 5, 8)
    assert ids.shape == (2, 12, 3) and ids.dtype == torch.float32
    assert ids[1].tolist() == [[0, row, column] for row in range(3) for column in range(4)]
    assert torch.equal(L.text_ids(2, 7), torch.zeros(2, 7, 3))


def test_scale_and_shift_are_the_published_ones():
    raw = torch.tensor([[[[0.1159, 1.1159]]]])
    torch.testing.assert_close(L.process_in(raw), torch.tensor([[[[0.0, 0.3611]]]]))
    torch.testing.assert_close(L.process_out(L.process_in(raw)), raw)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1])
def test_noise_is_what_torch_draws_after_manual_seed(seed):
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    expected = torch.randn(2, 16, 5, 6)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(L.make_noise((2, 16, 5, 6), seed), expected)
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(after, state)


@given(places=st.lists(st.integers(0, 6), min_size=1, max_size=4))
def test_batch_index_picks_from_single_draws(places):
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(1, 16, 3, 4, generator=generator) for _ in range(7)]
    assert torch.equal(L.make_noise((len(places), 16, 3, 4), 5, places), torch.cat([draws[p] for p in places]))


@pytest.mark.parametrize(("seed", "index"), [(-1, None), (2**64, None), (0, [0]), (0, [0, -1]), (0, [0, 10**9])])
def test_impossible_noise_is_refused(seed, index):
    with pytest.raises(BadInput):
        L.make_noise((2, 16, 4, 4), seed, index)


def test_empty_latent_and_the_sizes_it_refuses():
    assert L.empty_latent(256, 128, 3).shape == (3, 16, 16, 32)
    assert L.empty_latent(1000, 1000, multiple=8).shape == (1, 16, 125, 125)
    with pytest.raises(BadInput, match="992 or 1008"):
        L.empty_latent(1000, 512)
    with pytest.raises(BadInput, match=r"height 0 .* 16"):
        L.empty_latent(16, 0)
    with pytest.raises(BadInput, match="batch"):
        L.empty_latent(16, 16, 0)


def test_only_an_empty_latent_changes_its_channels():
    assert torch.equal(L.fit_channels(torch.zeros(2, 4, 8, 6)), torch.zeros(2, 16, 8, 6))
    full = torch.ones(1, 16, 8, 8)
    assert L.fit_channels(full) is full
    with pytest.raises(BadInput, match="4 channels"):
        L.fit_channels(torch.ones(1, 4, 8, 8))
    with pytest.raises(BadInput, match="shape"):
        L.fit_channels(torch.zeros(16, 8, 8))


def test_preview_factors_recover_a_linear_decoder():
    generator = torch.Generator().manual_seed(0)
    weights, offset = torch.randn(16, 3, generator=generator) * 0.1, torch.tensor([0.1, -0.2, 0.0])
    latents = torch.randn(2, 16, 12, 9, generator=generator)
    colours = torch.einsum("bchw,cr->brhw", latents, weights) + offset.view(3, 1, 1)
    pictures = colours.repeat_interleave(8, -1).repeat_interleave(8, -2)
    found, bias = L.fit_preview_factors(latents, pictures)
    torch.testing.assert_close(found, weights, atol=2e-3, rtol=0)
    torch.testing.assert_close(bias, offset, atol=2e-3, rtol=0)
    shown = L.latent_preview(latents, (found, bias))
    assert shown.shape == (12, 9, 3) and shown.dtype == torch.uint8
    expected = ((colours[0].movedim(0, -1) + 1) / 2).clamp(0, 1) * 255
    assert (shown.float() - expected).abs().max() < 2


def test_preview_without_factors_shows_edges_and_survives_nan_and_flat_latents():
    latents = torch.randn(1, 16, 1, 1, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 4, 6)
    latents[..., 3:] *= -1
    picture = L.latent_preview(latents)
    assert (picture[:, :3] == picture[0, 0]).all() and (picture[:, 3:] == picture[0, 3]).all()
    assert (picture[0, 0] != picture[0, 3]).all()
    assert L.latent_preview(torch.full((1, 16, 2, 2), float("nan"))).shape == (2, 2, 3)
    assert (L.latent_preview(torch.zeros(1, 16, 2, 2)) == 0).all()
