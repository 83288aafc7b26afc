"""Solvers against flows whose answer is known, and against the published formulas written out step by step."""

from __future__ import annotations

import math

import pytest
import torch
from flux_kit.engine.sampling.sigmas import shift_sigmas
from flux_kit.engine.sampling.solvers import DISCARD_PENULTIMATE, SOLVERS, sample_euler_ancestral, seeded_noise
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

DETERMINISTIC = [name for name in SOLVERS if name != "euler_ancestral"]
MEAN = 0.3


def gaussian(sd):
    """Exact denoiser of data ~ N(MEAN, sd^2), and the exact flow from noise at sigma 1 to sigma."""
    def variance(s):
        return (1 - s) ** 2 * sd**2 + s**2

    def denoise(x, sigma, **extra):
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        return MEAN + (1 - s) * sd**2 / variance(s) * (x - (1 - s) * MEAN)

    def solution(x, sigma):
        return (1 - sigma) * MEAN + math.sqrt(variance(sigma)) * x

    return denoise, solution


def mixture(seed, d=16, count=4):
    """Exact denoiser of an uneven mixture of Gaussians in d dimensions."""
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, d, generator=g, dtype=torch.float64)
    sd = torch.exp(torch.randn(count, d, generator=g, dtype=torch.float64) * 0.7 - 1.2)

    def denoise(x, sigma, **extra):
        s = sigma.view(-1, 1, 1)
        variance = (1 - s) ** 2 * sd**2 + s**2
        apart = x[:, None] - (1 - s) * mean
        share = (-0.5 * (apart**2 / variance + variance.log())).sum(-1).softmax(-1)[..., None]
        return (share * (mean + (1 - s) * sd**2 / variance * apart)).sum(1)

    return denoise


def field(x, sigma, **extra):
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return (torch.tanh(x * (1.3 - 0.5 * s)) * 0.8 + 0.1 * torch.sin(3 * x) + 0.05).to(x.dtype)


# --- order of convergence -----------------------------------------------------------------------------------------

ORDERS = [  # solver, sd of the data, steps, order: sigma 1 -> 0.05 in even steps
    ("euler", 1.0, 80, 1), ("heun", 0.5, 80, 2), ("dpmpp_2m", 1.0, 80, 2), ("res_multistep", 1.0, 80, 2),
    ("uni_pc", 1.0, 80, 2), ("ab2", 1.0, 80, 2), ("ab2", 0.5, 80, 2), ("ab3", 1.0, 80, 3), ("ab3", 0.5, 80, 3),
    ("ipndm", 0.5, 160, 2), ("deis", 1.0, 160, 2),
]


@pytest.mark.parametrize(("name", "sd", "steps", "order"), ORDERS)
def test_order_on_a_gaussian(name, sd, steps, order):
    denoise, solution = gaussian(sd)
    x = torch.tensor([[1.0], [-0.7], [0.2]], dtype=torch.float64)

    def error(n):
        sigmas = torch.linspace(1, 0.05, n + 1, dtype=torch.float64)
        return (SOLVERS[name](denoise, x, sigmas) - solution(x, 0.05)).abs().max().item()

    assert math.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.15)


def test_every_deterministic_solver_has_its_order_tested():
    assert {row[0] for row in ORDERS} == set(DETERMINISTIC)


@pytest.mark.parametrize(("name", "sd", "order"), [("ab2", 1.0, 2), ("ab3", 0.5, 3)])
def test_adams_bashforth_keeps_its_order_on_uneven_steps_down_to_zero(name, sd, order):
    denoise, solution = gaussian(sd)
    x = torch.tensor([[1.0], [-0.7]], dtype=torch.float64)

    def error(n):
        sigmas = shift_sigmas(torch.linspace(1, 0, n + 1, dtype=torch.float64), 1.15)
        return (SOLVERS[name](denoise, x, sigmas) - solution(x, 0.0)).abs().max().item()

    assert math.log2(error(100) / error(200)) == pytest.approx(order, abs=0.15)


@pytest.fixture(scope="module")
def mixture_errors():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    totals = dict.fromkeys(DETERMINISTIC, 0.0)
    for seed in range(4):
        denoise = mixture(seed)
        fine = shift_sigmas(torch.linspace(1, 0, 501, dtype=torch.float64), 1.15)
        truth = SOLVERS["ab3"](denoise, x, fine)
        sigmas = shift_sigmas(torch.linspace(1, 0, 21, dtype=torch.float64), 1.15)
        for name in DETERMINISTIC:
            totals[name] += math.log((SOLVERS[name](denoise, x, sigmas) - truth).norm().item())
    return {name: math.exp(total / 4) for name, total in totals.items()}


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name not in ("euler", "heun")])
def test_multistep_beats_euler_in_twenty_evaluations_of_a_mixture(name, mixture_errors):
    assert mixture_errors[name] < 0.75 * mixture_errors["euler"]


def test_full_order_to_the_end_pays(mixture_errors):
    assert mixture_errors["ab3"] < mixture_errors["ab2"] < 0.8 * mixture_errors["dpmpp_2m"]


# --- formulas written out -----------------------------------------------------------------------------------------

def velocities(sigmas, x, advance):
    """Run `advance(k, x, seen)`, seen = [(sigma, velocity, denoised)], over all steps."""
    seen = []
    for k, s in enumerate(sigmas[:-1].tolist()):
        denoised = field(x, torch.full((len(x),), s, dtype=x.dtype))
        seen.append((s, (x - denoised) / s, denoised))
        x = advance(k, x, seen)
    return x


def lagrange(nodes, j, clock=lambda s: s):
    def value(s):
        t, own = clock(s), clock(nodes[j])
        return math.prod((t - clock(n)) / (own - clock(n)) for i, n in enumerate(nodes) if i != j)
    return value


def polynomial_rule(sigmas, order, clock=lambda s: s, last=None):
    def advance(k, x, seen):
        use = seen[-(1 if last == 1 and sigmas[k + 1] == 0 else order):]
        nodes = [s for s, _, _ in use]
        weights = [quad(lagrange(nodes, j, clock), nodes[-1], float(sigmas[k + 1]), epsrel=1e-11)[0]
                   for j in range(len(nodes))]
        return x + sum(w * v for w, (_, v, _) in zip(weights, use, strict=True))
    return advance


def vp_time(sigma):
    low, high = math.log(1 + 0.002**2), math.log(1 + 80.0**2)
    slope = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    offset = high - 0.5 * slope
    return (math.sqrt(offset**2 + 2 * slope * math.log(1 + sigma**2)) - offset) / slope


def start():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, shift_sigmas(torch.linspace(1, 0, 8, dtype=torch.float64), 0.8)


def test_ab2_is_the_integral_of_the_line_through_two_velocities():
    x, sigmas = start()
    torch.testing.assert_close(SOLVERS["ab2"](field, x, sigmas), velocities(sigmas, x, polynomial_rule(sigmas, 2)))


def test_ab3_is_the_integral_of_the_parabola_with_a_corrected_first_step():
    x, sigmas = start()
    rule = polynomial_rule(sigmas, 3)

    def advance(k, at, seen):
        if k == 1:  # x at the second level becomes what the trapezoid rule gives
            (s0, v0, _), (s1, v1, _) = seen
            at = x + (v0 + v1) / 2 * (s1 - s0)
        return rule(k, at, seen)

    torch.testing.assert_close(SOLVERS["ab3"](field, x, sigmas), velocities(sigmas, x, advance))


def test_deis_integrates_polynomials_in_diffusion_time():
    x, sigmas = start()
    expected = velocities(sigmas, x, polynomial_rule(sigmas, 3, vp_time, last=1))
    torch.testing.assert_close(SOLVERS["deis"](field, x, sigmas), expected, rtol=1e-6, atol=1e-7)


def test_ipndm_has_the_classical_weights():
    x, sigmas = start()
    weights = {1: [1], 2: [1.5, -0.5], 3: [23 / 12, -4 / 3, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -3 / 8]}

    def advance(k, at, seen):
        step = float(sigmas[k + 1]) - seen[-1][0]
        use = weights[1 if sigmas[k + 1] == 0 else min(k + 1, 4)]
        return at + step * sum(w * v for w, (_, v, _) in zip(use, reversed(seen), strict=False))

    torch.testing.assert_close(SOLVERS["ipndm"](field, x, sigmas), velocities(sigmas, x, advance))


def exponential(name):
    """Second-order exponential integrators in t = -log sigma: weights by integrating e^(t - t') over the model's
    polynomial (RES), or with its slope taken at the midpoint (DPM-Solver++ 2M)."""
    def advance_for(sigmas):
        def advance(k, at, seen):
            s, _, now = seen[-1]
            following = float(sigmas[k + 1])
            if following == 0:
                return now
            h = math.log(s / following)
            if k == 0:
                return math.exp(-h) * at + (1 - math.exp(-h)) * now
            before, back = seen[-2][2], math.log(seen[-2][0] / s)
            if name == "dpmpp_2m":
                return math.exp(-h) * at + (1 - math.exp(-h)) * (now + (now - before) * (0.5 * h / back))
            flat = quad(lambda t: math.exp(t - h), 0, h)[0]
            slope = quad(lambda t: math.exp(t - h) * t, 0, h)[0]
            return math.exp(-h) * at + flat * now + slope * (now - before) / back
        return advance
    return advance_for


@pytest.mark.parametrize("name", ["dpmpp_2m", "res_multistep"])
def test_exponential_integrators(name):
    x, sigmas = start()
    torch.testing.assert_close(SOLVERS[name](field, x, sigmas), velocities(sigmas, x, exponential(name)(sigmas)))


def test_heun():
    x, sigmas = start()
    expected = x
    for s, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        def slope(at, level):
            return (at - field(at, torch.full((2,), level, dtype=at.dtype))) / level
        first = slope(expected, s)
        ahead = expected + (following - s) * first
        expected = expected + (following - s) * (first + slope(ahead, following)) / 2 if following else ahead
    torch.testing.assert_close(SOLVERS["heun"](field, x, sigmas), expected)


def test_uni_pc_with_two_steps_is_euler_with_its_corrector():
    x, _ = start()
    sigmas = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    denoised = field(x, torch.ones(2, dtype=x.dtype))
    predicted = 0.5 * x + 0.5 * denoised
    ahead = field(predicted, torch.full((2,), 0.5, dtype=x.dtype))
    corrected = predicted + math.log(2) * 0.5 * (ahead - denoised)
    keep = 0.001 / 0.5
    expected = (keep * corrected + (1 - keep) * ahead) / (1 - 0.001)
    torch.testing.assert_close(SOLVERS["uni_pc"](field, x, sigmas), expected)
    assert float(sigmas[-1]) == 0  # the caller's sigmas are left alone


def test_ancestral_noise_has_the_variance_of_the_flow():
    """With the exact denoiser of a Gaussian the samples must be that Gaussian, however much noise went round."""
    denoise, _ = gaussian(0.5)
    x = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0))
    sigmas = shift_sigmas(torch.linspace(1, 0, 401), 1.15)
    out = SOLVERS["euler_ancestral"](denoise, x, sigmas, extra_args={"seed": 1})
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.015)
    assert float(out.std()) == pytest.approx(0.5, abs=0.015)
    assert float(torch.corrcoef(torch.stack((x[:, 0], out[:, 0])))[0, 1]) < 0.1


def test_ancestral_without_eta_is_euler_and_is_seeded():
    x, sigmas = start()
    torch.testing.assert_close(sample_euler_ancestral(field, x, sigmas, eta=0.0), SOLVERS["euler"](field, x, sigmas))
    runs = [SOLVERS["euler_ancestral"](field, x, sigmas, extra_args={"seed": seed}) for seed in (5, 5, 6)]
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    for seed, drawn_with in ((2**64 - 1, 0), (2**63, 2**63 + 1), (7, 8)):
        first = seeded_noise(x.float(), seed)(sigmas[0], sigmas[1])
        assert torch.equal(first, torch.randn(x.shape, generator=torch.Generator().manual_seed(drawn_with)))


# --- what every solver keeps to -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_step_to_zero_is_the_denoised(name, dtype):
    x = torch.randn(2, 3, 4, dtype=dtype)
    out = SOLVERS[name](field, x, torch.tensor([1.0, 0.0]))
    assert out.dtype == dtype
    expected = field(x, torch.ones(2, dtype=dtype))
    torch.testing.assert_close(out, expected, atol=3e-2 if dtype is torch.bfloat16 else 4e-3, rtol=1e-2)


@pytest.mark.parametrize("name", SOLVERS)
@given(levels=st.lists(st.floats(0.01, 1), min_size=0, max_size=12), ends=st.booleans())
def test_any_falling_sigmas_give_finite_latents_and_one_report_a_step(name, levels, ends):
    row = [*sorted({round(level, 3) for level in levels}, reverse=True), *([0.0] if ends else [])]
    x = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0))
    seen = []
    sigmas = torch.tensor(row)
    out = SOLVERS[name](field, x, sigmas, extra_args={}, callback=seen.append, disable=True)
    assert torch.isfinite(out).all() and out.shape == x.shape
    assert [info["i"] for info in seen] == list(range(max(len(row) - 1, 0)))
    assert all(info["sigma"] == sigmas[info["i"]] and info["denoised"].shape == x.shape for info in seen)
    if len(row) < 2:
        assert torch.equal(out, x)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_repeated_sigma_changes_nothing(name):
    x, sigmas = start()
    twice = torch.cat((sigmas[:3], sigmas[2:5], sigmas[4:]))
    args = {"extra_args": {"seed": 3}} if name == "euler_ancestral" else {}
    torch.testing.assert_close(SOLVERS[name](field, x, twice, **args), SOLVERS[name](field, x, sigmas, **args))


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_and_batch_and_inputs_untouched(name):
    calls = []

    def counted(x, sigma, tag):
        calls.append((sigma.shape, sigma.dtype, tag))
        return field(x, sigma)

    x = torch.randn(3, 2, 4, 4)
    sigmas = torch.linspace(1, 0, 7)
    noise = torch.Generator().manual_seed(0)
    fresh = torch.randn(6, *x.shape, generator=noise)

    def sampler(rows):
        left = iter(fresh)
        return lambda sigma, following: next(left)[rows]

    before = x.clone(), sigmas.clone()
    whole = SOLVERS[name](counted, x, sigmas, {"tag": 1}, noise_sampler=sampler(slice(None)))
    assert torch.equal(x, before[0]) and torch.equal(sigmas, before[1])
    assert len(calls) == (11 if name == "heun" else 6)
    assert set(calls) == {((3,), torch.float32, 1)}
    alone = SOLVERS[name](counted, x[1:2], sigmas, {"tag": 1}, noise_sampler=sampler(slice(1, 2)))
    torch.testing.assert_close(whole[1:2], alone)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_loop_never_reads_the_latents_back(name):
    """Tensors on the meta device have no values, so any read of one (a device wait, elsewhere) would raise."""
    out = SOLVERS[name](field, torch.empty(2, 4, 4, device="meta"), torch.linspace(1, 0, 6))
    assert out.device.type == "meta" and out.dtype == torch.float32


@pytest.mark.parametrize("name", ["euler", "heun", "ab2", "ab3", "dpmpp_2m", "res_multistep", "ipndm", "deis"])
def test_going_up_and_down_again_comes_back(name):
    """Rising sigmas (turning a picture back into its noise) are legal too."""
    denoise, _ = gaussian(0.5)
    x = torch.tensor([[0.4], [0.1]], dtype=torch.float64)
    down = torch.linspace(0.9, 0.1, 161, dtype=torch.float64)
    noised = SOLVERS[name](denoise, x, down.flip(0))
    torch.testing.assert_close(SOLVERS[name](denoise, noised, down), x, atol=6e-3, rtol=0)


def test_every_solver_has_a_tooltip_and_the_exceptions_are_real():
    assert all(len((function.__doc__ or "").splitlines()[0]) > 40 for function in SOLVERS.values())
    assert set(SOLVERS) >= DISCARD_PENULTIMATE
