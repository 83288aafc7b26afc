"""LoRAs in the standalone host: rows travel with MODEL and CLIP, and are on the weights only while a model runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...engine.adapters import Applied, Attachment, Row, attach, planned
from ...engine.adapters.costs import side_bytes
from ...engine.sampling import Denoiser
from .. import loras
from ..loras import TEXT_ROLES, Chosen
from .objects import Clip, Model

PATCH = 2
"""Latent pixels to a token, each way."""


def with_loras(model: Model, clip: Clip | None, rows: Sequence[Row], *, mode: str, strict: bool,
               resolve: Callable[[str], Path], device: torch.device, moves: bool
               ) -> tuple[Model, Clip | None, list[str]]:
    """MODEL and CLIP that carry these rows beside those they carry already; what was given stays as it is.

    `moves`: weights come to the device for a run and may stream; they stay as they are and LoRAs come beside them.
    """
    chosen, lines = loras.choose(resolve, rows, strict)
    made = replace(model, loras=(*model.loras, *chosen), lora_mode=mode if mode != "auto" else model.lora_mode)
    parts: list[tuple[str, nn.Module, torch.device]] = [("transformer", model.flux, device)]
    if clip is None:
        lines += loras.unconnected(chosen)
    else:
        clip = replace(clip, loras=(*clip.loras, *chosen))
        parts += [("clip_l", clip.encoders.clip, device), ("t5", clip.encoders.t5, device)]
    for role, module, place in parts:
        acting = [one for one in chosen if one.acts_on(role)]
        lines += loras.told(acting, check(module, role, acting, mode, place, moves, not strict), role)
    names = loras.control_loras(chosen, model.flux.img_in.in_features)
    lines += [f"{name} needs its control picture in the conditioning" for name in names]
    return made, clip, lines


def check(module: nn.Module, role: str, acting: Sequence[Chosen], mode: str, device: torch.device, moves: bool,
          skip_broken: bool) -> list[Applied]:
    """What a run will do with these; raises what a run would raise."""
    return planned(module, [one.entry(role) for one in acting], role=role, mode=by(mode, moves),
                   device=None if moves else device, skip_broken=skip_broken)


def by(mode: str, moves: bool) -> str:
    """Weights that pass through a device's buffers are put back as they were: nothing may be merged into them."""
    return "side" if moves else mode


def nbytes(chosen: Sequence[Chosen], role: str, module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that the side paths of a model that computes in `dtype` take."""
    adapters = [adapter for one in chosen if one.acts_on(role) for adapter in one.lora.of(role)]
    return side_bytes(module, adapters, dtype.itemsize)


@contextmanager
def carrying(module: nn.Module, role: str, chosen: Sequence[Chosen], *, mode: str, moves: bool, dtype: torch.dtype,
             device: torch.device, mu: float | None = None) -> Iterator[Attachment | None]:
    """The rows' LoRAs are on a model inside; afterwards its weights are those it had."""
    acting = [one for one in chosen if one.acts_on(role)]
    if not acting:
        yield None
        return
    made = attach(module, [one.entry(role, mu) for one in acting], role=role, mode=by(mode, moves), dtype=dtype,
                  device=device, skip_broken=True)
    try:
        yield made
    finally:
        made.detach()


@contextmanager
def carrying_text(clip: Clip, *, moves: bool, device: torch.device) -> Iterator[None]:
    """The same for both text encoders."""
    modules: dict[str, nn.Module] = {"clip_l": clip.encoders.clip, "t5": clip.encoders.t5}
    first, second = (carrying(modules[role], role, clip.loras, mode="auto", moves=moves, dtype=clip.dtype,
                              device=device) for role in TEXT_ROLES)
    with first, second:
        yield


def stepped(denoiser: Denoiser, made: Attachment | None, chosen: Sequence[Chosen], latent: Tensor
            ) -> Callable[..., Tensor]:
    """The denoiser with every LoRA at its strength for the step and its place in the picture."""
    acting = [one for one in chosen if one.acts_on("transformer")]
    if made is None or not any(one.row.varies for one in acting):
        return denoiser
    attached, known = made, -1
    height, width = (math.ceil(side / PATCH) for side in latent.shape[-2:])

    def place(text_tokens: int) -> None:
        nonlocal known
        if text_tokens != known:  # of the prompt before
            attached.set_mask(loras.mask_of(acting, height, width, text_tokens))
            known = text_tokens

    if any(one.row.region for one in acting):
        denoiser.on_pass = place
    if not any(one.row.timed for one in acting):
        return denoiser

    def call(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        attached.set_sigma(float(sigma[0]))
        return denoiser(x, sigma, **extra)

    return call


def check_pictures(model: Model, *conditionings: Any) -> None:
    """BadInput for a control LoRA without the picture that it was trained to follow."""
    names = loras.control_loras(model.loras, model.flux.img_in.in_features)
    if names and not all(loras.has_picture(conditioning) for conditioning in conditionings if conditioning is not None):
        raise loras.needs_picture(names)
