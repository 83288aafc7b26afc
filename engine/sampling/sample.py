"""The loop: from a latent, a seed and sigmas to the finished latent. Step for step what ComfyUI's sampling does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, NotFinite
from ..specs import FLUX_AE, AutoencoderSpec
from .denoiser import repeat_to_batch
from .latents import fit_channels, make_noise, process_in, process_out
from .sigmas import DEV_TABLE, FlowTable, make_sigmas
from .solvers import DISCARD_PENULTIMATE, SOLVERS, seeded_noise

Model = Callable[[Tensor, Tensor], Tensor]
MaskAt = Callable[[Tensor, Tensor], Tensor]
"""(sigma `(B,)`, noise mask `(B, C, h, w)`) -> the mask at this step."""
StepCallback = Callable[[int, int, Tensor, Tensor], None]
"""(step from 0, number of steps, denoised, x), both `(B, 16, h, w)` model latents. Raise Interrupted to stop."""


def ksampler_sigmas(schedule: str, steps: int, *, solver: str = "euler", table: FlowTable = DEV_TABLE,
                    image_seq_len: int | None = None, denoise: float = 1.0, strength: float = 1.0,
                    start_at_step: int = 0, end_at_step: int | None = None, leftover_noise: bool = False) -> Tensor:
    """The sigmas ComfyUI's KSampler and KSamplerAdvanced run: `make_sigmas` and a cut.

    Ending early goes straight to 0, unless `leftover_noise` keeps the noise for another run to take away. Starting at
    or after the end leaves nothing to do: empty, and `sample` hands its latent back. For solvers that stop short of
    0 (`DISCARD_PENULTIMATE`) one more step is built and its last but one sigma dropped; not with diffusers' `strength`,
    which counts steps of the schedule as it is.
    """
    sigmas = make_sigmas(schedule, steps, table=table, image_seq_len=image_seq_len, denoise=denoise, strength=strength,
                         discard_penultimate=strength == 1 and solver in DISCARD_PENULTIMATE)
    return cut_sigmas(sigmas, start_at_step=start_at_step, end_at_step=end_at_step, leftover_noise=leftover_noise)


def cut_sigmas(sigmas: Tensor, *, start_at_step: int = 0, end_at_step: int | None = None,
               leftover_noise: bool = False) -> Tensor:
    """The part of a schedule between two steps, with the meaning described at `ksampler_sigmas`."""
    if end_at_step is not None and end_at_step < len(sigmas) - 1:
        sigmas = sigmas[:end_at_step + 1].clone()
        if not leftover_noise:
            sigmas[-1] = 0
    if start_at_step and start_at_step >= len(sigmas) - 1:
        return sigmas[:0]
    return sigmas[start_at_step:]


def cfg_window_in_sigmas(window: tuple[float, float], sigmas: Tensor) -> tuple[float, float] | None:
    """Shares of the steps, from `window[0]` up to but without `window[1]`, as sigmas (low, high); None if no step lies
    inside. BadInput unless 0 <= start <= end <= 1."""
    start, end = window
    if not 0 <= start <= end <= 1:
        raise BadInput(f"cfg from {start} to {end} of the steps: both must lie in 0..1, the end not before the start")
    if (start, end) == (0, 1):
        return 0.0, 1.0
    levels = sigmas[:-1].tolist()
    inside = [sigma for i, sigma in enumerate(levels) if start <= i / len(levels) < end]
    return (inside[-1], inside[0]) if inside else None


def sample(denoiser: Model, latents: Tensor, sigmas: Tensor, *, seed: int = 0, noise: Tensor | None = None,
           add_noise: bool = True, batch_index: Sequence[int] | None = None, solver: str = "euler",
           noise_mask: Tensor | None = None, mask_at: MaskAt | None = None, callback: StepCallback | None = None,
           spec: AutoencoderSpec = FLUX_AE, device: torch.device | str | None = None) -> Tensor:
    """Run `solver` over `sigmas` from `latents` `(B, 16, h, w)` (raw; all zero = no picture) to raw latents, fp32.

    The run starts from sigma * noise + (1 - sigma) * latents; `noise` is `make_noise(shape, seed, batch_index)` unless
    given, and zero without `add_noise` (a latent that still holds its noise). `noise_mask` `(h, w)`, `(B, h, w)` or
    `(B, 1, h, w)` of any size: 1 = repaint, 0 = keep, between = blend at every step, unless `mask_at` says what it is
    at a step. `device` is where the denoiser runs, by default what it says itself; the result lies where `latents` lay.

    Raises BadInput for latents, masks or sigmas that cannot be; NotFinite, naming step and sigma, as soon as the
    latents are; and whatever `callback` raises.
    """
    if solver not in SOLVERS:
        raise BadInput(f"unknown solver '{solver}'; choose one of {', '.join(SOLVERS)}")
    home = latents.device
    latents = fit_channels(latents, spec.z_channels).float()
    check_sigmas(sigmas)
    _require_finite(latents, "the latent given to the sampler")
    if len(sigmas) < 2:
        return latents
    device = getattr(denoiser, "device", home) if device is None else device
    noise = _noise(latents, noise, seed, batch_index, add_noise).to(device)
    source = latents.to(device)
    if torch.count_nonzero(source):  # an empty latent is not a grey picture: it stays zero
        source = process_in(source, spec)
    first, last = float(sigmas[0]), float(sigmas[-1])
    model: Callable[..., Tensor] = denoiser
    if noise_mask is not None:
        model = inpainting(denoiser, fit_mask(noise_mask, source).to(device), source, noise, mask_at)
    x = first * noise + (1 - first) * source
    prepare = getattr(denoiser, "prepare", None)
    if prepare is not None:
        prepare(x, sigmas)
    x = SOLVERS[solver](model, x, sigmas, callback=_step(callback, sigmas), noise_sampler=seeded_noise(x, seed))
    x = x / (1 - last)
    _require_finite(x, f"the latent after the last step (sigma {last:.4f})")
    return process_out(x.float(), spec).to(home)


def check_sigmas(sigmas: Tensor) -> None:
    """Raises BadInput unless sigmas are a row of finite numbers in 0..1, zero at most at the end, not ending at 1."""
    if sigmas.ndim != 1 or not torch.isfinite(sigmas).all():
        raise BadInput(f"sigmas must be one row of finite numbers, got shape {tuple(sigmas.shape)}")
    if len(sigmas) and (sigmas.min() < 0 or sigmas.max() > 1 + 1e-6):
        raise BadInput(f"sigmas {float(sigmas.min()):.4f}..{float(sigmas.max()):.4f} lie outside 0..1; "
                       "use a schedule made for FLUX.1")
    if (sigmas[:-1] == 0).any():
        raise BadInput("sigmas hold a 0 before their end, from where nothing can be denoised; cut the schedule there")
    if len(sigmas) > 1 and sigmas[-1] >= 1:
        raise BadInput("sigmas end at 1, which is pure noise; end the schedule at a smaller sigma")


def _noise(latents: Tensor, noise: Tensor | None, seed: int, batch_index: Sequence[int] | None, add_noise: bool
           ) -> Tensor:
    if not add_noise:
        return torch.zeros_like(latents)
    if noise is None:
        return make_noise(latents.shape, seed, batch_index)
    if noise.shape != latents.shape:
        raise BadInput(f"noise of shape {tuple(noise.shape)} does not fit a latent of shape {tuple(latents.shape)}")
    _require_finite(noise, "the noise given to the sampler")
    return noise.float()


def fit_mask(mask: Tensor, latents: Tensor) -> Tensor:
    """A mask of any size -> `(B, C, h, w)` like the latents, resized bilinearly, repeated over channels and batch."""
    if mask.ndim < 2:
        raise BadInput(f"a noise mask of shape {tuple(mask.shape)} was given, expected (height, width) or a batch "
                       "of it")
    _require_finite(mask, "the noise mask")
    mask = mask.float().reshape(-1, 1, *mask.shape[-2:])
    mask = F.interpolate(mask, size=latents.shape[-2:], mode="bilinear")
    return repeat_to_batch(mask, latents.shape[0]).expand(latents.shape)


def inpainting(model: Model, mask: Tensor, source: Tensor, noise: Tensor, mask_at: MaskAt | None = None
               ) -> Callable[..., Tensor]:
    """`model` that repaints where the mask is 1; elsewhere it sees the source under the same noise and answers it.

    mask, source and noise `(B, C, h, w)`. Soft masks blend at every call, so their softness grows with the steps.
    """
    def call(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        paint = mask if mask_at is None else mask_at(sigma, mask)
        keep = 1 - paint
        x = x * paint + (level * noise + (1 - level) * source) * keep
        return model(x, sigma, **extra) * paint + source * keep

    return call


def differential(sigmas: Tensor, table: FlowTable, strength: float = 1.0) -> MaskAt:
    """Differential Diffusion (Levin and Fried 2023), as ComfyUI does it: a place is painted from the step on at which
    the share of the run that is left falls to its mask. `strength` between 0 and 1 mixes this with the mask as it is;
    0 means 1, as there."""
    first, last = sigmas[0], torch.maximum(table.sigmas[0], sigmas[-1].cpu())

    def mask_at(sigma: Tensor, mask: Tensor) -> Tensor:
        left = (sigma[0] - last.to(sigma)) / (first.to(sigma) - last.to(sigma))
        hard = (mask >= left).to(mask.dtype)
        return strength * hard + (1 - strength) * mask if 0 < strength < 1 else hard

    return mask_at


def _step(callback: StepCallback | None, sigmas: Tensor) -> Callable[[dict[str, Any]], None]:
    total = len(sigmas) - 1

    def report(info: dict[str, Any]) -> None:
        step, denoised = int(info["i"]), info["denoised"]
        if not torch.isfinite(denoised).all():  # holds x and the model's output, so one look covers both
            raise NotFinite(
                f"step {step + 1} of {total} (sigma {float(sigmas[step]):.4f}) gave NaN or infinity, nothing was "
                "saved; usual causes: weights or a LoRA with NaN, fp16 overflow (run in bf16 or fp32), a very large "
                "cfg or LoRA strength")
        if callback is not None:
            callback(step, total, denoised, info["x"])

    return report


def _require_finite(tensor: Tensor, what: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NotFinite(f"{what} holds NaN or infinity; nothing was saved. Look at the node it comes from")
