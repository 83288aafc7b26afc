"""Solvers of the flow's differential equation dx/dsigma = (x - denoised) / sigma, with k-diffusion's signature.

    sample_x(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None) -> x

`model(x, sigma (B,), **extra_args)` gives the denoised latents; x is `(B, ...)` of any floating dtype on any device;
`sigmas` `(n+1,)`, not changed. `callback` gets {"x", "i", "sigma", "sigma_hat", "denoised"} after step i's first
evaluation. `disable` silences progress bars elsewhere and is accepted for the signature. Coefficients are Python
floats, read off `sigmas` once, so a device is never waited for inside the loop. A step of no length is passed over.

The equation has the same form as the one k-diffusion's samplers solve, hence its deterministic solvers hold
unchanged; noise that is put back needs the flow's own variances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.modulation import note

Callback = Callable[[dict[str, Any]], None]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]


class Solver(Protocol):
    __doc__: str | None

    def __call__(self, model: Callable[..., Tensor], x: Tensor, sigmas: Tensor,
                 extra_args: dict[str, Any] | None = None, callback: Callback | None = None,
                 disable: bool | None = None, noise_sampler: NoiseSampler | None = None) -> Tensor: ...


SOLVERS: dict[str, Solver] = {}
"""Name -> function. The first line of its docstring is the tooltip."""


def solver(name: str) -> Callable[[Solver], Solver]:
    def register(function: Solver) -> Solver:
        SOLVERS[name] = torch.no_grad()(function)
        return SOLVERS[name]
    return register


class Point:
    """A model evaluation on the way: latents, noise level, denoised latents."""

    def __init__(self, x: Tensor, sigma: float, denoised: Tensor) -> None:
        self.x, self.sigma, self.denoised = x, sigma, denoised

    @cached_property
    def velocity(self) -> Tensor:
        """dx/dsigma."""
        return (self.x - self.denoised) / self.sigma


def _steps(sigmas: Tensor) -> Iterator[tuple[int, float, float]]:
    """(index, from, to) of every step that has a length."""
    levels = [float(level) for level in sigmas.tolist()]
    for i, (sigma, following) in enumerate(pairwise(levels)):
        if sigma != following:
            yield i, sigma, following


def _evaluate(model: Callable[..., Tensor], x: Tensor, sigma: float, extra_args: dict[str, Any] | None) -> Point:
    level = torch.full((x.shape[0],), sigma, dtype=torch.promote_types(x.dtype, torch.float32))
    return Point(x, sigma, model(x, note(level.to(x.device), level), **(extra_args or {})))


def _report(callback: Callback | None, i: int, sigmas: Tensor, point: Point) -> None:
    if callback is not None:
        callback({"x": point.x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": point.denoised})


Rule = Callable[[Sequence[Point], float], Tensor]
"""(evaluations so far, newest last; the sigma to go to) -> x there."""


def _multistep(rule: Rule, keep: int, model: Callable[..., Tensor], x: Tensor, sigmas: Tensor,
               extra_args: dict[str, Any] | None, callback: Callback | None) -> Tensor:
    """One evaluation per step; `rule` sees the last `keep` of them."""
    history: list[Point] = []
    for i, sigma, following in _steps(sigmas):
        point = _evaluate(model, x, sigma, extra_args)
        _report(callback, i, sigmas, point)
        history = [*history, point][-keep:]
        x = rule(history, following)
    return x


def _advance(history: Sequence[Point], weights: Sequence[float]) -> Tensor:
    """x + sum of weights * velocities, newest first."""
    x = history[-1].x
    for point, weight in zip(reversed(history), weights, strict=False):
        x = x + point.velocity * weight
    return x


def _weights(nodes: Sequence[float], start: float, end: float, clock: Callable[[float], float] = lambda s: s,
             panels: int = 1) -> list[float]:
    """Integrals over sigma from start to end of the Lagrange polynomials through `nodes`.

    The polynomials are in clock(sigma). By Simpson's rule, which is exact for up to four nodes when the clock is
    sigma itself; other clocks need `panels`.
    """
    times = [clock(node) for node in nodes]
    width = (end - start) / panels
    totals = [0.0] * len(nodes)
    for k in range(2 * panels + 1):
        factor = (1 if k in (0, 2 * panels) else 4 if k % 2 else 2) * width / 6
        t = clock(start + k * width / 2)
        for j, own in enumerate(times):
            others = [other for i, other in enumerate(times) if i != j]
            totals[j] += factor * math.prod((t - other) / (own - other) for other in others)
    return totals


def _euler(history: Sequence[Point], following: float) -> Tensor:
    return _advance(history, (following - history[-1].sigma,))


@solver("euler")
def sample_euler(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                 callback: Callback | None = None, disable: bool | None = None,
                 noise_sampler: NoiseSampler | None = None) -> Tensor:
    """The plain choice, and what FLUX.1 and schnell are usually run with: order 1, one evaluation a step."""
    return _multistep(_euler, 1, model, x, sigmas, extra_args, callback)


@solver("heun")
def sample_heun(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                callback: Callback | None = None, disable: bool | None = None,
                noise_sampler: NoiseSampler | None = None) -> Tensor:
    """Order 2 by two evaluations a step (Karras et al. 2022, algorithm 2): twice the time of the others."""
    for i, sigma, following in _steps(sigmas):
        point = _evaluate(model, x, sigma, extra_args)
        _report(callback, i, sigmas, point)
        x = _euler([point], following)
        if following > 0:
            ahead = _evaluate(model, x, following, extra_args)
            x = point.x + (point.velocity + ahead.velocity) * ((following - sigma) / 2)
    return x


@solver("dpmpp_2m")
def sample_dpmpp_2m(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                    callback: Callback | None = None, disable: bool | None = None,
                    noise_sampler: NoiseSampler | None = None) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095: order 2 in log sigma, order 1 on the last step, one evaluation a step."""
    return _multistep(_dpmpp_2m, 2, model, x, sigmas, extra_args, callback)


def _dpmpp_2m(history: Sequence[Point], following: float) -> Tensor:
    now = history[-1]
    denoised = now.denoised
    if len(history) > 1 and following > 0:
        ratio = math.log(now.sigma / following) / math.log(history[-2].sigma / now.sigma)
        denoised = denoised + (denoised - history[-2].denoised) * (ratio / 2)
    keep = following / now.sigma
    return keep * now.x + (1 - keep) * denoised


@solver("uni_pc")
def sample_uni_pc(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                  callback: Callback | None = None, disable: bool | None = None,
                  noise_sampler: NoiseSampler | None = None) -> Tensor:
    """UniPC (arXiv 2302.04867, B1): predictor and corrector of order 3 in log sigma, one evaluation a step."""
    return _uni_pc(model, x, sigmas, extra_args, callback)


@solver("ab2")
def sample_ab2(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
               callback: Callback | None = None, disable: bool | None = None,
               noise_sampler: NoiseSampler | None = None) -> Tensor:
    """Adams-Bashforth on uneven steps: order 2 to the very end, one evaluation a step; good from 6 steps."""
    return _multistep(_adams_bashforth, 2, model, x, sigmas, extra_args, callback)


@solver("ab3")
def sample_ab3(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
               callback: Callback | None = None, disable: bool | None = None,
               noise_sampler: NoiseSampler | None = None) -> Tensor:
    """Adams-Bashforth on uneven steps: order 3 to the very end, one evaluation a step; needs 12 steps or more."""
    return _multistep(_ab3, 3, model, x, sigmas, extra_args, callback)


def _ab3(history: Sequence[Point], following: float) -> Tensor:
    """As the first step had one velocity only, it was Euler's and would hold the whole run to order 2. With the second
    velocity it is made good by the trapezoid rule, at no evaluation (slopes: 1.99 without, 3.0 with)."""
    x = _adams_bashforth(history, following)
    if len(history) == 2:
        start, now = history
        x = x + (now.velocity - start.velocity) * ((now.sigma - start.sigma) / 2)
    return x


def _adams_bashforth(history: Sequence[Point], following: float) -> Tensor:
    nodes = [point.sigma for point in reversed(history)]
    return _advance(history, _weights(nodes, nodes[0], following))


@solver("deis")
def sample_deis(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                callback: Callback | None = None, disable: bool | None = None,
                noise_sampler: NoiseSampler | None = None) -> Tensor:
    """tAB-DEIS (arXiv 2204.13902): order 3 in diffusion time, order 1 on the last step, one evaluation a step."""
    return _multistep(_deis, 3, model, x, sigmas, extra_args, callback)


def _deis(history: Sequence[Point], following: float) -> Tensor:
    if following <= 0 or len(history) == 1:
        return _euler(history, following)
    nodes = [point.sigma for point in reversed(history)]
    return _advance(history, _weights(nodes, nodes[0], following, clock=_vp_time, panels=16))


VP_EPSILON, VP_SIGMA_MIN, VP_SIGMA_MAX = 1e-3, 0.002, 80.0  # the variance-preserving process k-diffusion's DEIS assumes


def _vp_time(sigma: float) -> float:
    """Time of that process at noise level sigma: log(1 + sigma^2) = beta_d t^2 / 2 + beta_min t."""
    low, high = math.log1p(VP_SIGMA_MIN**2), math.log1p(VP_SIGMA_MAX**2)
    beta_d = 2 * (low / VP_EPSILON - high) / (VP_EPSILON - 1)
    beta_min = high - beta_d / 2
    return (math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(sigma**2)) - beta_min) / beta_d


@solver("ipndm")
def sample_ipndm(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None = None,
                 callback: Callback | None = None, disable: bool | None = None,
                 noise_sampler: NoiseSampler | None = None) -> Tensor:
    """Adams-Bashforth with the weights of even steps (arXiv 2202.09778): order 2, order 1 on the last step."""
    return _multistep(_ipndm, 4, model, x, sigmas, extra_args, callback)


EVEN_STEP_WEIGHTS = (  # of the newest velocity first; by number of velocities known
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def _ipndm(history: Sequence[Point], following: float) -> Tensor:
    if following <= 0:
        return _euler(history, following)
    length = following - history[-1].sigma
    return _advance(history, [weight * length for weight in EVEN_STEP_WEIGHTS[len(history) - 1]])


@solver("res_multistep")
def sample_res_multistep(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor,
                         extra_args: dict[str, Any] | None = None, callback: Callback | None = None,
                         disable: bool | None = None, noise_sampler: NoiseSampler | None = None) -> Tensor:
    """Exponential integrator RES (arXiv 2308.02157): order 2 in log sigma, order 1 on the last step."""
    return _multistep(_res_multistep, 2, model, x, sigmas, extra_args, callback)


def _res_multistep(history: Sequence[Point], following: float) -> Tensor:
    now = history[-1]
    if len(history) == 1 or following <= 0:
        return _euler(history, following)
    h = math.log(now.sigma / following)
    c2 = -math.log(history[-2].sigma / now.sigma) / h
    newest, before = h * (_phi(1, -h) - _phi(2, -h) / c2), h * _phi(2, -h) / c2
    return math.exp(-h) * now.x + newest * now.denoised + before * history[-2].denoised


@solver("euler_ancestral")
def sample_euler_ancestral(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor,
                           extra_args: dict[str, Any] | None = None, callback: Callback | None = None,
                           disable: bool | None = None, noise_sampler: NoiseSampler | None = None, eta: float = 1.0,
                           s_noise: float = 1.0) -> Tensor:
    """Euler that puts fresh noise back after each step, by the flow's variances; never settles as steps grow."""
    draw = noise_sampler or seeded_noise(x, (extra_args or {}).get("seed"))
    levels = {float(level): sigmas[i] for i, level in enumerate(sigmas.tolist())}

    def rule(history: Sequence[Point], following: float) -> Tensor:
        now = history[-1]
        if following <= 0 or eta == 0:
            return _euler(history, following)
        # Go below the wanted level, then scale the clean part back up and fill the variance with noise.
        down = following * (1 + (following / now.sigma - 1) * eta)
        scale = (1 - following) / (1 - down)
        renoise = math.sqrt(max(following**2 - (down * scale) ** 2, 0))
        return _euler(history, down) * scale + draw(levels[now.sigma], levels[following]) * (s_noise * renoise)

    return _multistep(rule, 1, model, x, sigmas, extra_args, callback)


def seeded_noise(x: Tensor, seed: int | None) -> NoiseSampler:
    """Fresh noise like x, drawn in fp32 on the CPU so that a seed means the same picture on every device.

    Seeded one higher than the run, or the first draw would repeat the noise the run started from (newer ComfyUI does
    so on the CPU; 0.3.64 repeats it). Without a seed: torch's global generator.
    """
    generator = None if seed is None else torch.Generator(device="cpu").manual_seed((seed + 1) % 2**64)

    def draw(sigma: Tensor, following: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device, x.dtype)

    return draw


UNI_PC_LAST_SIGMA = 0.001
DISCARD_PENULTIMATE = frozenset({"uni_pc"})
"""Solvers that work in log sigma and so stop short of 0: KSampler gives their last step more room."""


def _uni_pc(model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None,
            callback: Callback | None) -> Tensor:
    """Predict each level from the last three evaluations, evaluate there, correct; the last level is only predicted.

    log sigma has no 0: a schedule that ends there is run to 0.001, and what noise that leaves is divided away as at
    the end of any cut schedule, x / (1 - 0.001), which is what ComfyUI's own comes to. Below three steps the order
    is lower.
    """
    steps = list(_steps(sigmas))
    ends_at_zero = bool(steps) and steps[-1][2] == 0
    highest = max(1, min(3, len(steps) - 1))
    history: list[Point] = []
    target = 0.0
    for k, (i, sigma, following) in enumerate(steps):
        if k == 0:
            history = [_evaluate(model, x, sigma, extra_args)]
            _report(callback, i, sigmas, history[-1])
        now = history[-1]
        target = following or min(UNI_PC_LAST_SIGMA, sigma / 2)
        order = min(k + 1, highest, len(steps) - k)
        h = math.log(sigma / target)
        ahead_x = _uni_pc_step(now, history[-order:-1], None, h, order)
        if k == len(steps) - 1:
            x = ahead_x
            break
        ahead = _evaluate(model, ahead_x, target, extra_args)
        x = _uni_pc_step(now, history[-order:-1], ahead, h, order)
        history = [*history, Point(x, target, ahead.denoised)][-highest:]
        _report(callback, steps[k + 1][0], sigmas, history[-1])
    return x / (1 - target) if ends_at_zero else x


def _uni_pc_step(now: Point, before: Sequence[Point], ahead: Point | None, h: float, order: int) -> Tensor:
    """One exponential step of length h in -log sigma; with `ahead`, corrected by the evaluation at its end."""
    ratio = math.exp(-h)
    x = ratio * now.x + (1 - ratio) * now.denoised
    ratios = [math.log(now.sigma / point.sigma) / h for point in reversed(before)]  # negative: they lie behind
    differences = [(point.denoised - now.denoised) / r for point, r in zip(reversed(before), ratios, strict=True)]
    if ahead is not None:
        ratios, differences = [*ratios, 1.0], [*differences, ahead.denoised - now.denoised]
    if not differences:
        return x
    if len(differences) == 1 and (ahead is None or order == 1):
        rhos = [0.5]  # the paper's choice for a single difference
    else:
        rows = torch.tensor([[r**p for r in ratios] for p in range(len(ratios))], dtype=torch.float64)
        moments = [math.factorial(k) * _phi(k + 1, -h) for k in range(1, len(ratios) + 1)]
        rhos = torch.linalg.solve(rows, torch.tensor(moments, dtype=torch.float64)).tolist()
    for rho, difference in zip(rhos, differences, strict=True):
        x = x + difference * (h * rho)  # B(h) = -h in the sign of data prediction
    return x


def _phi(k: int, h: float) -> float:
    """phi_k(h) = sum of h^j / (j + k)!; by the series where the closed recursion would cancel."""
    if abs(h) < 1:
        return sum(h**j / math.factorial(j + k) for j in range(18))
    return math.expm1(h) / h if k == 1 else (_phi(k - 1, h) - 1 / math.factorial(k - 1)) / h
