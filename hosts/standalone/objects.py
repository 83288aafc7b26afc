"""What flows between nodes in the standalone host under the names MODEL, CLIP, VAE, CLIP_VISION, STYLE_MODEL,
GUIDER and NOISE.

Frozen: a node that changes one makes another (`dataclasses.replace`), so results that are cached stay true.
CONDITIONING, LATENT, IMAGE, MASK and SIGMAS are ComfyUI's plain data; SAMPLER is a name of the engine's SOLVERS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.errors import BadInput
from ...engine.models.autoencoder import Autoencoder
from ...engine.models.flux import Flux
from ...engine.models.vision import Redux, SiglipVision
from ...engine.sampling import FlowTable, differential, image_seq_len, ksampler_sigmas, make_noise
from ...engine.sampling.sample import MaskAt
from ...engine.specs import FLUX_AE
from ...engine.text import TextEncoders
from ..loras import Chosen
from .images import MAX_FRAMES, MAX_PIXELS


@dataclass(frozen=True)
class Model:
    """MODEL: the transformer with the table of sigmas its schedules read, and LoRAs that are put on while it runs.
    `path` is for messages; `lora_mode` as in `attach`; `differential`: the strength of Differential Diffusion, by which
    noise masks act, None without it."""

    flux: Flux
    table: FlowTable
    path: Path
    loras: tuple[Chosen, ...] = ()
    lora_mode: str = "auto"
    differential: float | None = None

    def mask_at(self, sigmas: Tensor) -> MaskAt | None:
        """How a noise mask changes along a run over these sigmas."""
        return None if self.differential is None else differential(sigmas, self.table, self.differential)


@dataclass(frozen=True)
class Clip:
    """CLIP: both text encoders with their tokenizers, and LoRAs that are put on while they run. `on_cpu`: they run
    there, whatever the host's device."""

    encoders: TextEncoders
    path: Path
    dtype: torch.dtype = torch.float32
    on_cpu: bool = False
    loras: tuple[Chosen, ...] = ()


@dataclass(frozen=True)
class Vae:
    """VAE: the autoencoder."""

    autoencoder: Autoencoder
    path: Path


@dataclass(frozen=True)
class ClipVision:
    """CLIP_VISION: the vision encoder."""

    vision: SiglipVision
    path: Path


@dataclass(frozen=True)
class ClipVisionOutput:
    """CLIP_VISION_OUTPUT: what the encoder saw, fp32 on the CPU."""

    last_hidden_state: Tensor       # (B, L, width)


@dataclass(frozen=True)
class StyleModel:
    """STYLE_MODEL: the Redux projector."""

    redux: Redux
    path: Path


@dataclass(frozen=True)
class Noise:
    """NOISE: of a seed 0 .. 2**64-1, or none (zeros: the latent still holds its noise)."""

    seed: int | None

    def draw(self, latent: dict[str, Any], channels: int = FLUX_AE.z_channels) -> Tensor | None:
        """fp32 on the CPU, `(B, channels, h, w)` for this latent; None without a seed."""
        if self.seed is None:
            return None
        samples = checked_samples(latent)
        shape = (samples.shape[0], channels, *samples.shape[2:])
        return make_noise(shape, self.seed, latent.get("batch_index"))


@dataclass(frozen=True)
class Guider:
    """GUIDER: a model with its prompts. `cfg_window` in sigmas, low and high."""

    model: Model
    positive: Any
    negative: Any = None
    cfg: float = 1.0
    cfg_window: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Sampled:
    """The latent at the last sigma, and the model's last estimate of the clean latent."""

    latent: dict[str, Any]
    denoised: dict[str, Any]


def checked_samples(latent: dict[str, Any]) -> Tensor:
    """`samples` of a LATENT. BadInput if it holds none of shape (B, C, h, w)."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, Tensor) or samples.ndim != 4 or 0 in samples.shape:
        found = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise BadInput(f"a latent must hold samples of shape (batch, channels, height/8, width/8), found {found}")
    return samples


def check_latent_size(width: int, height: int, batch: int) -> None:
    """BadInput for a latent `(batch, C, height, width)` that can be no picture, or one beyond the bounds on pictures:
    a workflow of a stranger must not be able to fill the memory."""
    sides = f"{width * FLUX_AE.downscale} x {height * FLUX_AE.downscale}"
    if min(width, height, batch) < 1:
        raise BadInput(f"{batch} pictures of {sides} cannot be made")
    if width * height * FLUX_AE.downscale**2 > MAX_PIXELS or batch > MAX_FRAMES:
        raise BadInput(f"{batch} pictures of {sides}: at most {MAX_FRAMES} of {MAX_PIXELS // 2**20} megapixels each "
                       "are made at once")


def tokens_of(latent: dict[str, Any]) -> int:
    """Image tokens the transformer sees for one item of this latent."""
    return image_seq_len(*checked_samples(latent).shape[-2:])


def schedule_sigmas(model: Model, schedule: str, steps: int, *, solver: str = "euler", denoise: float = 1.0,
                    strength: float = 1.0, latent: dict[str, Any] | None = None) -> Tensor:
    """Sigmas of a whole sampler node, for a solver and a picture size. See `engine.sampling.make_sigmas`."""
    size = None if latent is None else tokens_of(latent)
    return ksampler_sigmas(schedule, steps, solver=solver, table=model.table, image_seq_len=size, denoise=denoise,
                           strength=strength)


def resized(samples: Tensor, width: int, height: int, method: str, crop: bool) -> Tensor:
    """Latents `(B, C, h, w)` -> `(B, C, height, width)`. `crop` keeps the aspect by cutting the longer side evenly."""
    check_latent_size(width, height, len(samples))
    if crop:
        h, w = samples.shape[-2:]
        x, y = max(0, round((w - h * width / height) / 2)), max(0, round((h - w * height / width) / 2))
        samples = samples[..., y:h - y, x:w - x]
    return torch.nn.functional.interpolate(samples, size=(height, width), mode=method)
