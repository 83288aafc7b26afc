"""Schedules: the noise levels a run passes through, `(n+1,)` fp32 from 1 down to exact 0.

Path: x = sigma * noise + (1 - sigma) * clean. BFL (black-forest-labs/flux, src/flux/sampling.py) takes evenly spaced
times and shifts them by the number of image tokens; ComfyUI reads its schedules off a table of sigmas with one fixed
shift. Both are here with their exact values. All of it is CPU work of microseconds; a run moves the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import BadInput
from ..specs import FluxSpec

MAX_STEPS = 10_000
MAX_TOTAL_STEPS = 1_000_000         # of a schedule of which a small `denoise` runs only the tail
BASE_SEQ_LEN, BASE_MU = 256, 0.5     # BFL's line: mu at 256 image tokens
MAX_SEQ_LEN, MAX_MU = 4096, 1.15     # and at 4096; continued past both ends


def shift_sigmas(t: Tensor, mu: float) -> Tensor:
    """Evenly spaced times in 0..1 -> sigmas, e^mu / (e^mu + 1/t - 1), in t's dtype; 0 stays exact 0.

    Written as tensor operators in this order because ComfyUI's and BFL's fp32 values come out bit-equal so.
    """
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


def mu_for_seq_len(image_seq_len: float, *, base_mu: float = BASE_MU, max_mu: float = MAX_MU) -> float:
    """BFL's shift for this many image tokens (reference pictures not counted): linear, 256 -> 0.5, 4096 -> 1.15."""
    slope = (max_mu - base_mu) / (MAX_SEQ_LEN - BASE_SEQ_LEN)
    return image_seq_len * slope + (base_mu - slope * BASE_SEQ_LEN)


@dataclass(frozen=True)
class FlowTable:
    """What ComfyUI calls model sampling: a shift, and the fp32 table of sigmas its schedules index into.

    `mu` None means no shift (schnell).
    """

    mu: float | None
    entries: int

    @cached_property
    def sigmas(self) -> Tensor:
        """`(entries,)` fp32, rising to 1."""
        return self.sigma(torch.arange(1, self.entries + 1, 1) / self.entries)

    def sigma(self, t: Tensor) -> Tensor:
        """Times in 0..1 -> sigmas."""
        return t if self.mu is None else shift_sigmas(t, self.mu)

    def percent_to_sigma(self, percent: float) -> float:
        """The sigma at which this fraction of schedule time (0 = start) has passed; not a fraction of the steps."""
        if percent <= 0:
            return 1.0
        if percent >= 1:
            return 0.0
        t = 1 - percent
        return t if self.mu is None else math.exp(self.mu) / (math.exp(self.mu) + (1 / t - 1))


DEV_TABLE = FlowTable(mu=MAX_MU, entries=10_000)
SCHNELL_TABLE = FlowTable(mu=None, entries=1_000)


def table_for(spec: FluxSpec) -> FlowTable:
    """The table ComfyUI uses for this model: models without a guidance embedding (schnell) are not shifted."""
    return DEV_TABLE if spec.guidance_embed else SCHNELL_TABLE


Schedule = Callable[[int, FlowTable, int | None], Tensor]
SCHEDULES: dict[str, Schedule] = {}
"""Name -> function (steps, table, image_seq_len) -> sigmas. The first line of its docstring is the tooltip."""


def schedule(name: str) -> Callable[[Schedule], Schedule]:
    def register(function: Schedule) -> Schedule:
        SCHEDULES[name] = function
        return function
    return register


@schedule("bfl")
def bfl(steps: int, table: FlowTable, image_seq_len: int | None) -> Tensor:
    """Shifted by the size of the picture, as Black Forest Labs does; schnell is not shifted."""
    if table.mu is None:
        return even(steps, table, image_seq_len)
    if image_seq_len is None:
        raise BadInput("the schedule 'bfl' depends on the size of the picture, which is not known here; "
                       "choose 'simple' or give the number of image tokens")
    return shift_sigmas(torch.linspace(1, 0, steps + 1), mu_for_seq_len(image_seq_len))


@schedule("fixed_shift")
def fixed_shift(steps: int, table: FlowTable, image_seq_len: int | None) -> Tensor:
    """The model's own shift (1.15 for dev) at every size, from the formula; `simple` is its rounding to a table."""
    return table.sigma(torch.linspace(1, 0, steps + 1))


@schedule("even")
def even(steps: int, table: FlowTable, image_seq_len: int | None) -> Tensor:
    """Even steps without a shift: what schnell was distilled for."""
    return torch.linspace(1, 0, steps + 1)


@schedule("simple")
def simple(steps: int, table: FlowTable, image_seq_len: int | None) -> Tensor:
    """ComfyUI's default for FLUX.1: evenly spaced entries of the model's table of sigmas."""
    stride = len(table.sigmas) / steps
    index = [-(1 + int(i * stride)) for i in range(steps)]
    return _append_zero(table.sigmas[index])


@schedule("sgm_uniform")
def sgm_uniform(steps: int, table: FlowTable, image_seq_len: int | None) -> Tensor:
    """ComfyUI's evenly spaced sigmas, shifted a second time; the smallest sigma is left out."""
    t = torch.linspace(float(table.sigmas[-1]), float(table.sigmas[0]), steps + 1)[:-1]
    return _append_zero(table.sigma(t))


@schedule("beta")
def beta(steps: int, table: FlowTable, image_seq_len: int | None) -> Tensor:
    """Crowds the steps at both ends (beta distribution, arXiv 2407.12173); very many may come out as fewer."""
    from scipy.special import betaincinv  # type: ignore[import-untyped]  # here, because only this schedule needs it and loading it takes a while
    top = len(table.sigmas) - 1
    index: list[int] = []
    for i in range(steps):
        entry = round(float(betaincinv(0.6, 0.6, 1 - i * (1 / steps))) * top)
        if not index or entry != index[-1]:
            index.append(entry)
    return _append_zero(table.sigmas[index])


@schedule("normal")
def normal(steps: int, table: FlowTable, image_seq_len: int | None) -> Tensor:
    """ComfyUI's `normal`: like sgm_uniform down to a last sigma close to 0, on which one step is spent."""
    low, high = float(table.sigmas[0]), float(table.sigmas[-1])
    reaches_zero = math.isclose(float(table.sigma(table.sigmas[0])), 0, abs_tol=1e-5)
    sigmas = table.sigma(torch.linspace(high, low, steps + 1 if reaches_zero else steps))
    return sigmas if reaches_zero else _append_zero(sigmas)


def _append_zero(sigmas: Tensor) -> Tensor:
    return torch.cat((sigmas, sigmas.new_zeros(1)))


def make_sigmas(name: str, steps: int, *, table: FlowTable = DEV_TABLE, image_seq_len: int | None = None,
                denoise: float = 1.0, strength: float = 1.0, discard_penultimate: bool = False) -> Tensor:
    """Sigmas `(n+1,)` fp32 on the CPU, falling, last exact 0.

    Two ways to start from a picture instead of from noise, both 0..1 and never both:
    `denoise` (ComfyUI): the schedule of int(steps / denoise) steps, of which the last `steps` run, so the number of
    steps stays. `strength` (diffusers): the schedule of `steps` steps without its head, so about steps * strength run.
    With 0 of either nothing is left to do and the result is empty. `discard_penultimate` builds one step more and
    drops its last but one sigma, which ComfyUI's KSampler does for solvers that stop short of 0. Raises BadInput for
    an unknown name and for values out of range.
    """
    if name not in SCHEDULES:
        raise BadInput(f"unknown schedule '{name}'; choose one of {', '.join(SCHEDULES)}")
    if not 1 <= steps <= MAX_STEPS:
        raise BadInput(f"{steps} steps were asked for; choose 1..{MAX_STEPS}")
    for label, value in (("denoise", denoise), ("strength", strength)):
        if not 0 <= value <= 1:
            raise BadInput(f"{label} {value} is outside 0..1")
    if denoise < 1 and strength < 1:
        raise BadInput(f"denoise {denoise} and strength {strength} are two words for one thing; leave one of them at 1")
    if denoise == 0 or strength == 0:
        return torch.empty(0)
    extra = 1 if discard_penultimate else 0
    sigmas = SCHEDULES[name](_total_steps(steps, denoise) + extra, table, image_seq_len)
    if discard_penultimate:
        sigmas = torch.cat((sigmas[:-2], sigmas[-1:]))
    return sigmas[-(steps + 1):] if denoise < 1 else sigmas[int(steps - min(steps * strength, steps)):]


def _total_steps(steps: int, denoise: float) -> int:
    total = int(steps / denoise)
    if total > MAX_TOTAL_STEPS:
        raise BadInput(f"denoise {denoise} with {steps} steps means a schedule of {total} steps; use a larger denoise")
    return total
