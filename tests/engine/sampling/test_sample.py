"""The loop, against the same arithmetic written out plainly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from flux_kit.engine.errors import BadInput, Interrupted, NotFinite
from flux_kit.engine.sampling import (
    DEV_TABLE,
    SOLVERS,
    Denoiser,
    cut_sigmas,
    empty_latent,
    ksampler_sigmas,
    make_noise,
    make_sigmas,
    sample,
)

SCALE, SHIFT = 0.3611, 0.1159


def field(x, sigma):
    s = sigma.view(-1, 1, 1, 1)
    return torch.tanh(x * (1.3 - 0.5 * s)) * 0.8 + 0.1 * torch.sin(3 * x) + 0.05


def picture(seed=0, batch=2, height=6, width=4):
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def plain_euler(x, sigmas, model=field):
    for s, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x + (x - model(x, torch.full((len(x),), s))) / s * (following - s)
    return x


def test_text_to_image_from_an_empty_latent():
    sigmas = make_sigmas("simple", 6)
    out = sample(field, empty_latent(64, 96, 2), sigmas, seed=3)
    expected = plain_euler(make_noise((2, 16, 12, 8), 3), sigmas) / SCALE + SHIFT
    torch.testing.assert_close(out, expected)


def test_an_empty_latent_is_not_shifted_even_half_way():
    """process_in of zeros would not be zero: the start of a partial run shows whether it was applied."""
    sigmas = make_sigmas("simple", 4, denoise=0.5)
    seen = []
    sample(field, torch.zeros(1, 16, 4, 4), sigmas, seed=1, callback=lambda i, n, denoised, x: seen.append(x))
    torch.testing.assert_close(seen[0], float(sigmas[0]) * make_noise((1, 16, 4, 4), 1))


def test_image_to_image():
    sigmas, latent = make_sigmas("simple", 5, denoise=0.6), picture()
    out = sample(field, latent, sigmas, seed=4)
    s = float(sigmas[0])
    start = s * make_noise(latent.shape, 4) + (1 - s) * (latent - SHIFT) * SCALE
    torch.testing.assert_close(out, plain_euler(start, sigmas) / SCALE + SHIFT)


@pytest.mark.parametrize("shape", [(12, 8), (1, 3, 2), (2, 1, 6, 4)])
def test_mask_keeps_the_source_under_the_same_noise(shape):
    sigmas, latent = make_sigmas("simple", 5), picture()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    out = sample(field, latent, sigmas, seed=4, noise_mask=mask)
    fitted = F.interpolate(mask.reshape(-1, 1, *shape[-2:]), size=(6, 4), mode="bilinear").expand(2, 16, 6, 4)
    source, noise = (latent - SHIFT) * SCALE, make_noise(latent.shape, 4)

    def masked(x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        inner = field(x * fitted + (s * noise + (1 - s) * source) * (1 - fitted), sigma)
        return inner * fitted + source * (1 - fitted)

    torch.testing.assert_close(out, plain_euler(noise, sigmas, masked) / SCALE + SHIFT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_hard_mask_changes_only_what_it_covers(solver):
    latent, mask = picture(height=4), torch.zeros(4, 4)
    mask[:, 2:] = 1
    out = sample(field, latent, make_sigmas("simple", 6), noise_mask=mask, solver=solver)
    torch.testing.assert_close(out[..., :2], latent[..., :2], atol=0.02, rtol=0)
    assert (out[..., 2:] - latent[..., 2:]).abs().mean() > 0.2


def test_leftover_noise_is_taken_up_by_the_next_run():
    whole = sample(field, empty_latent(32, 32), make_sigmas("simple", 8), seed=5)
    head = ksampler_sigmas("simple", 8, end_at_step=3, leftover_noise=True)
    first = sample(field, empty_latent(32, 32), head, seed=5)
    second = sample(field, first, ksampler_sigmas("simple", 8, start_at_step=3), add_noise=False, seed=9)
    torch.testing.assert_close(second, whole, rtol=1e-4, atol=1e-4)


def test_cutting_a_schedule():
    sigmas = make_sigmas("simple", 6)
    assert torch.equal(cut_sigmas(sigmas, start_at_step=2), sigmas[2:])
    assert torch.equal(cut_sigmas(sigmas, end_at_step=10_000), sigmas)
    assert cut_sigmas(sigmas, end_at_step=2).tolist() == [*sigmas[:2].tolist(), 0.0]
    assert torch.equal(cut_sigmas(sigmas, start_at_step=1, end_at_step=4, leftover_noise=True), sigmas[1:5])
    assert float(sigmas[2]) > 0
    for nothing in (cut_sigmas(sigmas, start_at_step=6), cut_sigmas(sigmas, start_at_step=99),
                    cut_sigmas(sigmas, start_at_step=3, end_at_step=3), make_sigmas("simple", 6, denoise=0.0)):
        latent = picture()
        assert torch.equal(sample(field, latent, nothing), latent)


@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_ksampler_drops_a_sigma_for_uni_pc(denoise):
    longer = make_sigmas("normal", int(6 / denoise) + 1)
    expected = torch.cat((longer[:-2], longer[-1:]))[-7:]
    assert torch.equal(ksampler_sigmas("normal", 6, solver="uni_pc", denoise=denoise), expected)
    assert torch.equal(ksampler_sigmas("normal", 6, denoise=denoise), make_sigmas("normal", 6, denoise=denoise))


def test_noise_given_none_or_by_batch_index():
    latent, sigmas = picture(batch=3), make_sigmas("simple", 3, denoise=0.5)
    noise = make_noise(latent.shape, 8)
    assert torch.equal(sample(field, latent, sigmas, noise=noise), sample(field, latent, sigmas, seed=8))
    seen = []
    sample(field, latent, sigmas, add_noise=False, callback=lambda i, n, denoised, x: seen.append(x))
    torch.testing.assert_close(seen[0], (1 - float(sigmas[0])) * (latent - SHIFT) * SCALE)
    again = sample(field, latent[1:2], sigmas, seed=8, batch_index=[1])
    whole = sample(field, latent, sigmas, seed=8, batch_index=[0, 1, 2])
    torch.testing.assert_close(again, whole[1:2])


@pytest.mark.parametrize("solver", SOLVERS)
def test_progress_is_told_once_a_step(solver):
    seen = []
    sample(field, picture(), make_sigmas("simple", 4, denoise=0.7), solver=solver,
           callback=lambda step, total, denoised, x: seen.append((step, total, denoised.shape, x.shape)))
    assert seen == [(step, 4, (2, 16, 6, 4), (2, 16, 6, 4)) for step in range(4)]


def test_interrupt_between_steps():
    steps = []

    def stop(step, total, denoised, x):
        steps.append(step)
        if step == 2:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        sample(field, picture(), make_sigmas("simple", 8), callback=stop)
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_stops_the_run_and_names_the_step(solver, poison):
    sigmas = make_sigmas("simple", 8)

    def breaks(x, sigma):
        out = field(x, sigma)
        if float(sigma[0]) <= float(sigmas[3]):
            out[0, 0, 0, 0] = poison
        return out

    with pytest.raises(NotFinite, match=rf"step 4 of 8 \(sigma {float(sigmas[3]):.4f}\)"):
        sample(breaks, picture(), sigmas, solver=solver)


def test_nan_that_comes_in_is_told_apart():
    bad = picture()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite, match="latent given"):
        sample(field, bad, make_sigmas("simple", 2))
    with pytest.raises(NotFinite, match="mask"):
        sample(field, picture(), make_sigmas("simple", 2), noise_mask=bad[0, 0])
    with pytest.raises(NotFinite, match="noise given"):
        sample(field, picture(), make_sigmas("simple", 2), noise=bad)


def test_latents_of_other_widths():
    out = sample(field, torch.zeros(2, 4, 6, 4), make_sigmas("simple", 2), seed=1)
    torch.testing.assert_close(out, sample(field, torch.zeros(2, 16, 6, 4), make_sigmas("simple", 2), seed=1))
    with pytest.raises(BadInput, match="4 channels"):
        sample(field, torch.ones(2, 4, 6, 4), make_sigmas("simple", 2))


@pytest.mark.parametrize(("sigmas", "says"), [
    (torch.tensor([1.0, float("nan"), 0.0]), "finite"), (torch.ones(2, 2), "one row"),
    (torch.tensor([14.6, 1.0, 0.0]), "outside"), (torch.tensor([1.0, 0.0, 0.5]), "before their end"),
    (torch.tensor([0.5, 1.0]), "end at 1"), (torch.tensor([0.5, -0.1]), "outside")])
def test_sigmas_that_cannot_be(sigmas, says):
    with pytest.raises(BadInput, match=says):
        sample(field, picture(), sigmas)


def test_other_bad_input():
    with pytest.raises(BadInput, match=r"'euler_b'.*euler.*ab3"):
        sample(field, picture(), make_sigmas("simple", 2), solver="euler_b")
    with pytest.raises(BadInput, match="noise of shape"):
        sample(field, picture(), make_sigmas("simple", 2), noise=torch.zeros(1, 16, 6, 4))
    with pytest.raises(BadInput, match="mask of shape"):
        sample(field, picture(), make_sigmas("simple", 2), noise_mask=torch.ones(4))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_real_transformer_with_every_solver(solver, flux, make_prompt):
    denoiser = Denoiser(flux, make_prompt(1), make_prompt(2, length=9), cfg=1.5)
    sigmas = ksampler_sigmas("bfl", 3, solver=solver, table=DEV_TABLE, image_seq_len=12)
    latent = empty_latent(56, 64, 2, multiple=8)
    out = sample(denoiser, latent, sigmas, seed=2**64 - 1, solver=solver)
    assert out.shape == latent.shape and out.dtype == torch.float32 and torch.isfinite(out).all()
    assert torch.equal(out, sample(denoiser, latent, sigmas, seed=2**64 - 1, solver=solver))
    assert not torch.allclose(out, sample(denoiser, latent, sigmas, seed=0, solver=solver), atol=0.1)
