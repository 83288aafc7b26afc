"""A small random Flux called by formula: positions and masks written out from BFL's recipe, for tests of what stands
beside the prompt and the latents."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.specs import FluxSpec
from torch import Tensor

TEXT, VECTOR = 24, 32
SPEC = FluxSpec(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, context_in_dim=TEXT, vec_in_dim=VECTOR)
SHIFT, SCALE = 0.1159, 0.3611


def small_flux(seed: int = 0) -> Flux:
    torch.manual_seed(seed)
    flux = Flux(SPEC).eval().requires_grad_(False)
    flux.final_layer.linear.weight.mul_(20)  # velocities of size 1
    return flux


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(length: int = 6, seed: int = 1, **values: Any) -> list[list[Any]]:
    return [[random(1, length, TEXT, seed=seed), {"pooled_output": random(1, VECTOR, seed=seed + 1), **values}]]


def tokens_of(latents: Tensor) -> Tensor:
    """2 x 2 patches, channels slowest."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def ids_of(latents: Tensor, plane: int = 0, row: int = 0, column: int = 0) -> Tensor:
    return torch.tensor([[[plane, row + i, column + j] for i in range(latents.shape[-2] // 2)
                          for j in range(latents.shape[-1] // 2)]]).float()


def velocity(flux: Flux, x: Tensor, entry: list[Any], sigma: float = 0.6, references: list[tuple[Tensor, Tensor]] = (),
             mask: Tensor | None = None) -> Tensor:
    """Velocity `(B, 16, h, w)`. `references`: raw latents with their positions `(1, L, 3)`; `mask` `(L, L)`."""
    text, values = entry
    batch = len(x)
    img = [tokens_of(x), *(tokens_of((latents - SHIFT) * SCALE).expand(batch, -1, -1) for latents, _ in references)]
    ids = [ids_of(x), *(ids for _, ids in references)]
    out = flux(torch.cat(img, 1), torch.cat(ids, 1).expand(batch, -1, -1), text.expand(batch, -1, -1),
               torch.zeros(batch, text.shape[1], 3), torch.full((batch,), sigma),
               values["pooled_output"].expand(batch, -1), torch.full((batch,), values.get("guidance", 3.5)),
               attn_mask=None if mask is None else mask.float()[None, None])
    own = out[:, :img[0].shape[1]].transpose(1, 2).unflatten(2, (x.shape[-2] // 2, -1))
    return F.pixel_shuffle(own, 2)
