"""Flux Kit's sampler by ComfyUI's own loop: its guider, noise, masks, previews and interrupts, our solvers in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ...engine.errors import BadInput, NotFinite
from ...engine.sampling import (
    SOLVERS,
    FlowTable,
    cfg_window_in_sigmas,
    fit_channels,
    image_seq_len,
    ksampler_sigmas,
)
from ...engine.sampling.solvers import seeded_noise
from .. import Conditioning, Latent

SIZE_KEYS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of empty latents in newer hosts


def config_of(model: Any) -> tuple[bool, dict[str, Any]]:
    """Whether MODEL is a FLUX.1 transformer, whoever loaded it, and the host's description of it."""
    inner = getattr(model, "model", None)
    config: dict[str, Any] = getattr(getattr(inner, "model_config", None), "unet_config", {})
    return isinstance(inner, comfy.model_base.Flux) and config.get("image_model") == "flux", config


def require_flux(model: Any) -> None:
    """BadInput unless MODEL is a FLUX.1 transformer, whoever loaded it."""
    is_flux, config = config_of(model)
    if not is_flux:
        name = type(getattr(model, "model", None)).__name__
        raise BadInput(f"this MODEL is {name} ({config.get('image_model', 'not a transformer')}), this node needs "
                       "FLUX.1; load one with Load Flux, or use a sampler node of that model")


def embeds_guidance(model: Any) -> bool | None:
    """`hosts.Host.embeds_guidance`."""
    is_flux, config = config_of(model)
    return bool(config.get("guidance_embed")) if is_flux else None


def table_of(model: Any) -> FlowTable:
    """The table of sigmas of a MODEL, with the shift that nodes may have put on it."""
    settings = model.get_model_object("model_sampling")
    entries = len(settings.sigmas)
    if isinstance(settings, comfy.model_sampling.ModelSamplingFlux):
        return FlowTable(mu=float(settings.shift), entries=entries)
    if isinstance(settings, comfy.model_sampling.ModelSamplingDiscreteFlow):
        shift = float(settings.shift)
        return FlowTable(mu=None if shift == 1 else math.log(shift), entries=entries)
    raise BadInput(f"this MODEL samples by {type(settings).__name__}, which is no flow; remove the node that set it")


def with_shift(model: Any, mu: float) -> Any:
    """A clone of MODEL whose time shift is `mu`."""
    class Shifted(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):  # type: ignore[misc]
        pass

    settings = Shifted(model.model.model_config)
    settings.set_parameters(shift=mu, timesteps=len(model.get_model_object("model_sampling").sigmas))
    clone = model.clone()
    clone.add_object_patch("model_sampling", settings)
    return clone


class Guider(comfy.samplers.CFGGuider):  # type: ignore[misc]
    """Classifier-free guidance while low <= sigma <= high; elsewhere the positive prompt alone, at half the cost."""

    cfg: float

    def __init__(self, model: Any, positive: Conditioning, negative: Conditioning | None, cfg: float,
                 window: tuple[float, float] | None) -> None:
        super().__init__(model)
        guided = negative is not None and window is not None and not math.isclose(cfg, 1.0)
        self.set_cfg(cfg if guided else 1.0)
        self.inner_set_conds({"positive": positive, "negative": negative} if guided else {"positive": positive})
        self.window = window if guided else None

    def predict_noise(self, x: Tensor, timestep: Tensor, *arguments: Any, **options: Any) -> Tensor:
        out: Tensor
        if self.window is None or self.window == (0.0, 1.0):
            out = super().predict_noise(x, timestep, *arguments, **options)
            return out
        inside = self.window[0] <= float(timestep[0]) <= self.window[1]
        cfg, self.cfg = self.cfg, self.cfg if inside else 1.0
        try:
            out = super().predict_noise(x, timestep, *arguments, **options)
        finally:
            self.cfg = cfg
        return out


def solver_of(name: str, seed: int) -> Any:
    """SAMPLER of one of the engine's solvers, whose own noise, if it draws any, follows the seed."""
    if name not in SOLVERS:
        raise BadInput(f"unknown solver '{name}'; choose one of {', '.join(SOLVERS)}")

    def run(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None,
            disable: Any = None) -> Tensor:
        return SOLVERS[name](model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable,
                             noise_sampler=seeded_noise(x, seed))

    return comfy.samplers.KSAMPLER(run)


def samples_of(model: Any, latent: Latent) -> Tensor:
    """`samples` of a LATENT in fp32, an empty one made to fit the model. BadInput if they cannot be this model's."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, Tensor) or samples.ndim != 4 or 0 in samples.shape:
        found = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise BadInput(f"a latent must hold samples of shape (batch, channels, height/8, width/8), found {found}")
    sizes = {key: latent[key] for key in SIZE_KEYS if key in latent}
    fitted: Tensor = comfy.sample.fix_empty_latent_channels(model, samples, **sizes)
    return fit_channels(fitted).float()


def sample(model: Any, positive: Conditioning, negative: Conditioning | None, latent: Latent, *, seed: int, steps: int,
           cfg: float, solver: str, schedule: str, denoise: float, strength: float, shift: float | None,
           cfg_window: tuple[float, float]) -> Latent:
    """`hosts.Host.sample`."""
    require_flux(model)
    if shift is not None:
        model = with_shift(model, shift)
    samples = samples_of(model, latent)
    if not math.isfinite(cfg):
        raise BadInput(f"cfg {cfg} is not a finite number; 1 switches the negative prompt off")
    if negative is None and not math.isclose(cfg, 1.0):
        raise BadInput(f"cfg {cfg} needs a negative prompt; connect one (an empty text is allowed), or set cfg to 1")
    if not bool(torch.isfinite(samples).all()):
        raise NotFinite("the latent given to the sampler holds NaN or infinity. Look at the node it comes from")
    table, size = table_of(model), image_seq_len(*samples.shape[-2:])
    sigmas = ksampler_sigmas(schedule, steps, solver=solver, table=table, image_seq_len=size, denoise=denoise,
                             strength=strength)
    guider = Guider(model, positive, negative, cfg, cfg_window_in_sigmas(cfg_window, sigmas))
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    done = guider.sample(noise, samples, solver_of(solver, seed), sigmas, denoise_mask=latent.get("noise_mask"),
                         callback=reporter(model, sigmas), disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed)
    kept = {key: value for key, value in latent.items() if key not in SIZE_KEYS}
    return {**kept, "samples": done.to(comfy.model_management.intermediate_device()).float()}


def reporter(model: Any, sigmas: Tensor) -> Callable[[int, Tensor, Tensor, int], None]:
    """The host's previews and progress, after a look for NaN and for the user's wish to stop."""
    preview = latent_preview.prepare_callback(model, max(len(sigmas) - 1, 0))

    def report(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        if not bool(torch.isfinite(denoised).all()):
            raise NotFinite(f"step {step + 1} of {total} (sigma {float(sigmas[step]):.4f}) gave NaN or infinity, "
                            "nothing was saved; usual causes: weights or a LoRA with NaN, fp16 overflow (run in bf16 "
                            "or fp32), a very large cfg or LoRA strength")
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview(step, denoised, x, total)

    return report
