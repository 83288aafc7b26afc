"""The denoiser: what it hands to the transformer, and what it makes of prompts, guidance and cfg."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from flux_kit.engine.errors import BadInput, NotFinite
from flux_kit.engine.sampling import DEV_TABLE, Denoiser, FlowTable

X = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(11))
SIGMA = torch.tensor([0.6, 0.6])


class Calls:
    """Arguments of every forward pass of a model while in use."""

    def __init__(self, flux):
        self.seen = []
        self.handle = flux.register_forward_pre_hook(lambda module, args: self.seen.append(args))

    def __enter__(self):
        return self.seen

    def __exit__(self, *_):
        self.handle.remove()


def velocity(flux, x, sigma, cond, guidance):
    """The plain call, tokens made by torch's own unshuffle."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, width % 2, 0, height % 2), mode="circular")
    rows, columns = padded.shape[-2] // 2, padded.shape[-1] // 2
    ids = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float(),
                                     indexing="ij"), dim=-1).reshape(1, -1, 3).expand(len(x), -1, -1)
    txt = cond[0][0].expand(len(x), -1, -1)
    out = flux(F.pixel_unshuffle(padded, 2).flatten(2).transpose(1, 2), ids, txt, torch.zeros(*txt.shape[:2], 3), sigma,
               cond[0][1]["pooled_output"].expand(len(x), -1), torch.full((len(x),), guidance))
    return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (rows, columns)), 2)[..., :height, :width]


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 8), (6, 7), (5, 7), (1, 1)])
def test_denoised_is_x_minus_sigma_velocity(flux, make_prompt, height, width):
    x = torch.randn(2, 16, height, width)
    positive = make_prompt(1, guidance=2.5)
    expected = x - 0.6 * velocity(flux, x, SIGMA, positive, 2.5)
    torch.testing.assert_close(Denoiser(flux, positive)(x, SIGMA), expected, rtol=1e-5, atol=1e-5)


def test_missing_guidance_means_three_and_a_half_in_the_negative_too(flux, make_prompt):
    def run(**given):
        return Denoiser(flux, make_prompt(1, guidance=2.0), make_prompt(2, **given), cfg=3.0)(X, SIGMA)

    assert torch.equal(run(), run(guidance=3.5))
    assert not torch.allclose(run(), run(guidance=2.0), atol=1e-3)
    assert torch.equal(Denoiser(flux, make_prompt(1))(X, SIGMA), Denoiser(flux, make_prompt(1, guidance=3.5))(X, SIGMA))


def test_cfg_on_denoised_with_each_prompt_at_its_own_length(flux, make_prompt):
    positive, negative = make_prompt(1, length=20), make_prompt(2, length=7)
    c, u = Denoiser(flux, positive)(X, SIGMA), Denoiser(flux, negative)(X, SIGMA)
    with Calls(flux) as seen:
        guided = Denoiser(flux, positive, negative, cfg=2.5)(X, SIGMA)
    torch.testing.assert_close(guided, u + (c - u) * 2.5)
    assert [call[2].shape[1] for call in seen] == [20, 7]


def test_cfg_one_skips_the_negative_and_a_window_limits_it(flux, make_prompt):
    positive, negative = make_prompt(1), make_prompt(2)
    with Calls(flux) as seen:
        Denoiser(flux, positive, negative, cfg=1.0)(X, SIGMA)
        assert len(seen) == 1
        windowed = Denoiser(flux, positive, negative, cfg=3.0, cfg_window=(0.3, 0.6))
        alone = Denoiser(flux, positive)
        del seen[:]
        for level, calls in ((0.61, 1), (0.6, 2), (0.3, 2), (0.29, 1)):
            out = windowed(X, torch.full((2,), level))
            assert len(seen) == calls
            assert torch.equal(out, alone(X, torch.full((2,), level))) == (calls == 1)
            del seen[:]


def test_conditioning_of_another_batch_is_repeated_in_order_or_cut(flux, make_prompt):
    two = make_prompt(4, batch=2)
    x = torch.randn(3, 16, 4, 4)
    out = Denoiser(flux, two)(x, torch.full((3,), 0.5))
    for item in range(3):
        one = [[two[0][0][item % 2][None], {"pooled_output": two[0][1]["pooled_output"][item % 2][None]}]]
        torch.testing.assert_close(out[item:item + 1], Denoiser(flux, one)(x[item:item + 1], torch.tensor([0.5])),
                                   rtol=1e-4, atol=1e-5)
    one = Denoiser(flux, two)(x[:1], torch.tensor([0.5]))
    torch.testing.assert_close(one, out[:1], rtol=1e-4, atol=1e-5)


def test_compute_dtype_is_cast_inside_and_latents_stay_fp32(make_flux, make_prompt):
    flux = make_flux().to(torch.bfloat16)
    denoiser = Denoiser(flux, make_prompt(1, guidance=30.0))
    assert denoiser.dtype is torch.bfloat16 and denoiser.device == torch.device("cpu")
    with Calls(flux) as seen:
        out = denoiser(X, SIGMA)
    img, img_ids, txt, _, timesteps, y, guidance = seen[0]
    assert (img.dtype, txt.dtype, y.dtype) == (torch.bfloat16,) * 3
    assert (timesteps.dtype, guidance.dtype, img_ids.dtype, out.dtype) == (torch.float32,) * 4
    assert torch.equal(timesteps, SIGMA) and guidance.tolist() == [30.0, 30.0]
    exact = Denoiser(make_flux(), make_prompt(1, guidance=30.0))(X, SIGMA)
    assert (out - exact).norm() / exact.norm() < 0.05


def test_schnell_gets_no_guidance(make_flux, make_prompt):
    flux = make_flux(guidance_embed=False)
    with Calls(flux) as seen:
        outs = [Denoiser(flux, make_prompt(1, guidance=g))(X, SIGMA) for g in (2.0, 9.0, None)]
    assert all(call[6] is None for call in seen)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_guidance_none_leaves_the_embedding_out(flux, make_prompt):
    """An explicit None, as FluxDisableGuidance writes it, is not the missing entry that means 3.5."""
    cond = make_prompt(1)
    without = [[cond[0][0], {**cond[0][1], "guidance": None}]]
    expected = Denoiser(flux, cond)(X, SIGMA)
    embedder, flux.guidance_in = flux.guidance_in, None
    try:
        bare = Denoiser(flux, cond)(X, SIGMA)
    finally:
        flux.guidance_in = embedder
    assert torch.equal(Denoiser(flux, without)(X, SIGMA), bare)
    assert not torch.equal(bare, expected)


def test_ranges_are_fractions_of_schedule_time(flux, make_prompt):
    border = DEV_TABLE.percent_to_sigma(0.4)
    parts = [*make_prompt(1, end_percent=0.4), *make_prompt(2, start_percent=0.4)]
    denoiser = Denoiser(flux, parts)
    for level, alone in ((border + 0.01, 1), (border - 0.01, 2)):
        sigma = torch.full((2,), level)
        assert torch.equal(denoiser(X, sigma), Denoiser(flux, make_prompt(alone))(X, sigma))
    with pytest.raises(BadInput, match="no part of the positive"):
        Denoiser(flux, make_prompt(1, end_percent=0.4))(X, torch.full((2,), 0.1))
    unshifted = Denoiser(flux, parts, table=FlowTable(mu=None, entries=1000))
    assert torch.equal(unshifted(X, SIGMA), unshifted._denoise(unshifted.positive[0], X, SIGMA) / 2
                       + unshifted._denoise(unshifted.positive[1], X, SIGMA) / 2)


def test_several_prompts_are_averaged_by_strength(flux, make_prompt):
    a, b = (Denoiser(flux, make_prompt(seed))(X, SIGMA) for seed in (1, 2))
    both = Denoiser(flux, [*make_prompt(1, strength=3.0), *make_prompt(2)])(X, SIGMA)
    torch.testing.assert_close(both, (3 * a + b) / 4)


@pytest.mark.parametrize("key", ["control", "area", "mask", "gligen", "hooks", "something_new"])
def test_entries_not_acted_on_are_named(flux, make_prompt, key):
    with pytest.raises(BadInput, match=f"negative conditioning carries '{key}'"):
        Denoiser(flux, make_prompt(1), make_prompt(1, **{key: object()}), cfg=2.0)
    Denoiser(flux, make_prompt(1, **{key: None}))


def test_harmless_entries_pass_and_dropped_ones_are_logged(flux, make_prompt, caplog):
    with caplog.at_level(logging.WARNING):
        Denoiser(flux, make_prompt(1, width=512, height=512, prompt_type="positive"))
        assert not caplog.records
        Denoiser(flux, make_prompt(1, concat_latent_image=X, concat_mask=X))
    assert "concat_latent_image, concat_mask ignored" in caplog.text


def wide(cond):
    return [[torch.randn(1, 4, 768), cond[0][1]]]


def nan(cond):
    return [[cond[0][0] * float("nan"), cond[0][1]]]


@pytest.mark.parametrize(("change", "error", "says"), [
    (wide, BadInput, r"text part has shape \(1, 4, 768\).* 64 \(T5\)"),
    (lambda c: [[c[0][0], {}]], BadInput, "no pooled"),
    (lambda c: [[c[0][0], {"pooled_output": torch.randn(1, 1280)}]], BadInput, "CLIP-L"),
    (lambda c: [[c[0][0][:, :0], c[0][1]]], BadInput, "shape"),
    (nan, NotFinite, "text part holds NaN"),
    (lambda c: [], BadInput, "is empty"),
    (lambda c: [[c[0][0], {**c[0][1], "guidance": float("inf")}]], BadInput, "guidance inf"),
    (lambda c: [[c[0][0], {**c[0][1], "strength": 0.0}]], BadInput, "strength 0.0"),
])
def test_bad_conditioning(flux, make_prompt, change, error, says):
    with pytest.raises(error, match=says):
        Denoiser(flux, change(make_prompt(1)))


def test_bad_cfg(flux, make_prompt):
    for bad, says in (({"cfg": 2.0}, "needs a negative"), ({"cfg": float("nan")}, "finite"),
                      ({"cfg_window": (0.6, 0.3)}, "rising")):
        with pytest.raises(BadInput, match=says):
            Denoiser(flux, make_prompt(1), **bad)
