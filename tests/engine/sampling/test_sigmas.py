"""Schedules: published values, ComfyUI's tables rebuilt from their formulas, and what every schedule keeps to."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flux_kit.engine.errors import BadInput
from flux_kit.engine.sampling import DEV_TABLE, SCHEDULES, SCHNELL_TABLE, make_sigmas, mu_for_seq_len, table_for
from flux_kit.engine.specs import FLUX_DEV, FLUX_FILL, FLUX_SCHNELL
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution

TABLES = {"dev": DEV_TABLE, "schnell": SCHNELL_TABLE}
VARIANTS = pytest.mark.parametrize("variant", TABLES)


def shifted(t: float, mu: float) -> float:
    return math.exp(mu) / (math.exp(mu) + 1 / t - 1) if t else 0.0


def close(sigmas, expected, atol=2e-7):
    torch.testing.assert_close(sigmas, torch.tensor(expected, dtype=torch.float32), atol=atol, rtol=0)


@pytest.mark.parametrize(("side", "mu"), [(512, 0.63), (768, 0.847), (1024, 1.15), (1536, 2.017), (2048, 3.23)])
def test_shift_by_size(side, mu):
    assert mu_for_seq_len((side // 16) ** 2) == pytest.approx(mu, abs=4e-3)


def test_shift_line_and_its_user_ends():
    assert mu_for_seq_len(256) == pytest.approx(0.5)
    assert mu_for_seq_len(4096) == pytest.approx(1.15)
    assert mu_for_seq_len(256, base_mu=0.2, max_mu=3) == pytest.approx(0.2)
    assert mu_for_seq_len(4096, base_mu=0.2, max_mu=3) == pytest.approx(3)


@pytest.mark.parametrize("steps", [1, 4, 20, 28, 50])
@pytest.mark.parametrize("tokens", [64, 1024, 4096, 9216])
def test_bfl(steps, tokens):
    mu = 0.5 + (tokens - 256) * 0.65 / 3840
    close(make_sigmas("bfl", steps, image_seq_len=tokens), [shifted(1 - i / steps, mu) for i in range(steps + 1)])


def test_bfl_at_one_megapixel_is_the_fixed_shift_and_needs_a_size():
    torch.testing.assert_close(make_sigmas("bfl", 20, image_seq_len=4096), make_sigmas("fixed_shift", 20))
    with pytest.raises(BadInput, match="size of the picture"):
        make_sigmas("bfl", 20)


@pytest.mark.parametrize("name", ["bfl", "fixed_shift", "even", "simple"])
def test_schnell_in_four_steps(name):
    close(make_sigmas(name, 4, table=SCHNELL_TABLE), [1, 0.75, 0.5, 0.25, 0], atol=0)


def test_tables():
    assert DEV_TABLE.sigmas.shape == (10_000,) and SCHNELL_TABLE.sigmas.shape == (1_000,)
    close(DEV_TABLE.sigmas, [shifted((i + 1) / 10_000, 1.15) for i in range(10_000)])
    close(SCHNELL_TABLE.sigmas, [(i + 1) / 1000 for i in range(1000)], atol=6e-8)
    assert table_for(FLUX_DEV) is table_for(FLUX_FILL) is DEV_TABLE and table_for(FLUX_SCHNELL) is SCHNELL_TABLE


@VARIANTS
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 20, 28, 50])
def test_simple_indexes_the_table(variant, steps):
    table = TABLES[variant].sigmas
    expected = [float(table[len(table) - 1 - math.floor(i * len(table) / steps)]) for i in range(steps)]
    close(make_sigmas("simple", steps, table=TABLES[variant]), [*expected, 0.0], atol=0)


def test_simple_differs_from_the_formula_where_the_index_is_floored():
    gap = (make_sigmas("simple", 28) - make_sigmas("fixed_shift", 28)).abs().max()
    assert 2.2e-4 < gap < 2.4e-4
    assert (make_sigmas("simple", 20) - make_sigmas("fixed_shift", 20)).abs().max() < 2e-7


@VARIANTS
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_normal_and_sgm_uniform_shift_twice(variant, steps):
    table = TABLES[variant]
    again = (lambda s: shifted(s, 1.15)) if variant == "dev" else float
    low = float(table.sigmas[0])
    even = [1 - (1 - low) * i / max(steps - 1, 1) for i in range(steps)]
    close(make_sigmas("normal", steps, table=table), [*map(again, even), 0.0], atol=3e-7)
    open_end = [1 - (1 - low) * i / steps for i in range(steps)]
    close(make_sigmas("sgm_uniform", steps, table=table), [*map(again, open_end), 0.0], atol=3e-7)


def test_normal_wastes_its_last_step_on_schnell():
    close(make_sigmas("normal", 4, table=SCHNELL_TABLE), [1, 0.667, 0.334, 0.001, 0], atol=1e-6)


@VARIANTS
@pytest.mark.parametrize("steps", [*range(1, 41), 100, 300])
def test_beta(variant, steps):
    table = TABLES[variant].sigmas
    places = np.rint(beta_distribution.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6) * (len(table) - 1))
    expected = [float(table[int(p)]) for i, p in enumerate(places) if i == 0 or p != places[i - 1]]
    close(make_sigmas("beta", steps, table=TABLES[variant]), [*expected, 0.0], atol=0)


def test_beta_published_values():
    sigmas = make_sigmas("beta", 20)
    close(sigmas[[0, 1, 2, 18, 19, 20]], [1, 0.996, 0.987, 0.1155, 0.039, 0], atol=5e-4)


@given(name=st.sampled_from(sorted(SCHEDULES)), steps=st.integers(1, 120), variant=st.sampled_from(sorted(TABLES)),
       tokens=st.integers(1, 70_000))
def test_every_schedule_falls_from_one_to_exact_zero(name, steps, variant, tokens):
    sigmas = make_sigmas(name, steps, table=TABLES[variant], image_seq_len=tokens)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu"
    assert float(sigmas[0]) == pytest.approx(1, abs=2e-7) and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert len(sigmas) == steps + 1 or (name == "beta" and len(sigmas) <= steps + 1)


@given(name=st.sampled_from(["simple", "sgm_uniform", "fixed_shift", "bfl"]), steps=st.integers(1, 60),
       denoise=st.floats(0.05, 0.999))
def test_denoise_keeps_the_steps_and_takes_the_tail(name, steps, denoise):
    sigmas = make_sigmas(name, steps, image_seq_len=1024, denoise=denoise)
    whole = make_sigmas(name, int(steps / denoise), image_seq_len=1024)
    assert len(sigmas) == steps + 1 and torch.equal(sigmas, whole[len(whole) - steps - 1:])


@given(steps=st.integers(1, 60), strength=st.floats(0.01, 0.999))
def test_strength_drops_the_head_as_diffusers_does(steps, strength):
    whole = make_sigmas("fixed_shift", steps)
    dropped = int(max(steps - min(steps * strength, steps), 0))
    assert torch.equal(make_sigmas("fixed_shift", steps, strength=strength), whole[dropped:])


def test_both_meanings_start_at_the_same_sigma():
    by_denoise, by_strength = (make_sigmas("simple", 20, **{word: 0.5}) for word in ("denoise", "strength"))
    assert float(by_denoise[0]) == pytest.approx(0.7595, abs=1e-3) == pytest.approx(float(by_strength[0]), abs=1e-3)
    assert (len(by_denoise), len(by_strength)) == (21, 11)
    assert len(make_sigmas("simple", 20, denoise=0)) == 0 == len(make_sigmas("simple", 20, strength=0))


@pytest.mark.parametrize(("percent", "sigma"), [(-1, 1), (0, 1), (0.35, shifted(0.65, 1.15)), (1, 0), (2, 0)])
def test_percent_to_sigma(percent, sigma):
    assert DEV_TABLE.percent_to_sigma(percent) == pytest.approx(sigma)
    assert SCHNELL_TABLE.percent_to_sigma(percent) == pytest.approx(min(max(1 - percent, 0), 1))


def test_discarding_the_last_but_one():
    sigmas, longer = make_sigmas("normal", 5, discard_penultimate=True), make_sigmas("normal", 6)
    assert torch.equal(sigmas, torch.cat((longer[:5], longer[6:])))


@pytest.mark.parametrize("bad", [
    {"name": "karras"}, {"steps": 0}, {"steps": 10_001}, {"denoise": -0.1}, {"denoise": 1.1}, {"strength": 2.0},
    {"denoise": 0.5, "strength": 0.5}, {"denoise": float("nan")}, {"steps": 10_000, "denoise": 1e-9}])
def test_what_cannot_be_is_refused(bad):
    with pytest.raises(BadInput):
        make_sigmas(**{"name": "simple", "steps": 4, **bad})


def test_unknown_schedule_lists_the_known():
    with pytest.raises(BadInput, match=r"'karras'.*bfl.*simple.*beta"):
        make_sigmas("karras", 4)


def test_every_schedule_has_a_tooltip():
    assert all(len((function.__doc__ or "").splitlines()[0]) > 30 for function in SCHEDULES.values())
