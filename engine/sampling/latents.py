"""Latents: their shape as tokens, their positions, their scale, and the noise they start from.

`latents` are `(B, 16, H/8, W/8)` and always unpacked; only the transformer sees tokens. "Raw" latents are what the
autoencoder encodes to and decodes from; "model" latents are shifted and scaled. Knows nothing of schedules or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput
from ..specs import FLUX_AE, AutoencoderSpec

PATCH = 2
MAX_SEED = 2**64 - 1
MAX_BATCH_INDEX = 65_535   # noise is drawn item by item up to the index, so a huge index would never end


def patchify(latents: Tensor) -> Tensor:
    """Latents `(B, C, h, w)` -> tokens `(B, ceil(h/2) * ceil(w/2), C * 4)`, channels slowest inside a token.

    An odd side is filled up by wrapping round to the first row or column, as ComfyUI does.
    """
    if latents.shape[-2] % PATCH:
        latents = torch.cat((latents, latents[..., :1, :]), dim=-2)
    if latents.shape[-1] % PATCH:
        latents = torch.cat((latents, latents[..., :, :1]), dim=-1)
    b, c, h, w = latents.shape
    tiles = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpatchify(img: Tensor, height: int, width: int) -> Tensor:
    """Tokens `(B, L, C * 4)` -> latents `(B, C, height, width)`, sides in latent pixels; undoes `patchify`."""
    rows, columns = math.ceil(height / PATCH), math.ceil(width / PATCH)
    b, _, d = img.shape
    tiles = img.reshape(b, rows, columns, d // PATCH**2, PATCH, PATCH)
    latents = tiles.permute(0, 3, 1, 4, 2, 5).reshape(b, d // PATCH**2, rows * PATCH, columns * PATCH)
    return latents[..., :height, :width]


def image_seq_len(height: int, width: int) -> int:
    """Tokens of a latent of these sides (in latent pixels)."""
    return math.ceil(height / PATCH) * math.ceil(width / PATCH)


def image_ids(batch: int, height: int, width: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Positions `(B, L, 3)` fp32 of the tokens of a latent `height` x `width`: (0, row, column)."""
    rows, columns = math.ceil(height / PATCH), math.ceil(width / PATCH)
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None, :]
    return ids.reshape(1, rows * columns, 3).repeat(batch, 1, 1)


def text_ids(batch: int, length: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Positions `(B, length, 3)` fp32 of text tokens: all zero."""
    return torch.zeros(batch, length, 3, device=device)


def process_in(latents: Tensor, spec: AutoencoderSpec = FLUX_AE) -> Tensor:
    """Raw latents -> model latents."""
    return (latents - spec.shift_factor) * spec.scale_factor


def process_out(latents: Tensor, spec: AutoencoderSpec = FLUX_AE) -> Tensor:
    """Model latents -> raw latents."""
    return latents / spec.scale_factor + spec.shift_factor


def make_noise(shape: Sequence[int], seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise of `shape` `(B, C, h, w)`, fp32 on the CPU: ComfyUI's numbers for this seed.

    Drawn on the CPU in fp32 whatever the device and dtype of the run, so a seed means the same picture everywhere.
    `batch_index` names, per item, its place in the batch it was taken from: one draw per place, in order, places not
    named are drawn and dropped, and equal places get equal noise. Raises BadInput for a seed outside 0..2^64-1 and
    for indices that are negative, above 65535, or not one per item.
    """
    if not 0 <= seed <= MAX_SEED:
        raise BadInput(f"seed {seed} is outside 0..{MAX_SEED}; give a whole number in that range")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    size = tuple(shape)
    if batch_index is None:
        return torch.randn(size, generator=generator, dtype=torch.float32)
    places = [int(place) for place in batch_index]
    if len(places) != size[0]:
        raise BadInput(f"batch_index names {len(places)} items, the latent has {size[0]}; give one index per item")
    if min(places) < 0 or max(places) > MAX_BATCH_INDEX:
        raise BadInput(f"batch_index {min(places)}..{max(places)} is outside 0..{MAX_BATCH_INDEX}")
    draws: dict[int, Tensor] = {}
    wanted = set(places)
    for place in range(max(places) + 1):
        draw = torch.randn((1, *size[1:]), generator=generator, dtype=torch.float32)
        if place in wanted:
            draws[place] = draw
    return torch.cat([draws[place] for place in places])


def empty_latent(width: int, height: int, batch: int = 1, *, multiple: int = 16,
                 spec: AutoencoderSpec = FLUX_AE) -> Tensor:
    """All-zero latents `(batch, 16, height/8, width/8)` fp32 for a picture of `width` x `height` pixels.

    Raises BadInput, naming the nearest sizes, when a side is not a positive multiple of `multiple` pixels
    (16 = whole tokens; 8 is what the autoencoder needs).
    """
    for name, side in (("width", width), ("height", height)):
        if side < multiple or side % multiple:
            below = max(side // multiple, 1) * multiple
            near = f"{below}" if side < multiple else f"{below} or {below + multiple}"
            raise BadInput(f"{name} {side} is not a multiple of {multiple}; the nearest is {near}")
    if batch < 1:
        raise BadInput(f"batch size {batch} is below 1")
    return torch.zeros(batch, spec.z_channels, height // spec.downscale, width // spec.downscale)


def fit_channels(latents: Tensor, channels: int = FLUX_AE.z_channels) -> Tensor:
    """Give latents the model's channel count, which only an empty (all-zero) one may lack.

    ComfyUI's rule: an empty latent made by any node is taken for its size alone. Raises BadInput for a latent that
    is not `(B, C, h, w)` or holds a picture of another autoencoder.
    """
    if latents.ndim != 4:
        raise BadInput(f"a latent of shape {tuple(latents.shape)} was given, expected (batch, {channels}, height/8, "
                       "width/8)")
    if latents.shape[1] == channels:
        return latents
    if torch.count_nonzero(latents) == 0:
        return latents.new_zeros(latents.shape[0], channels, *latents.shape[2:])
    raise BadInput(f"this latent has {latents.shape[1]} channels, FLUX.1 needs {channels}: it was encoded by another "
                   "model's VAE; encode the picture with FLUX.1's")


def fit_preview_factors(latents: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map from model latents to colour that fits given pictures best: `(16, 3)` and offset `(3,)`, fp32.

    latents `(B, 16, h, w)` and what they decode to, `(B, 3, h * k, w * k)` in -1..1, are compared latent pixel by
    latent pixel, by least squares. So the factors come from the autoencoder in use: one decoded picture is enough
    to preview the next.
    """
    small = F.adaptive_avg_pool2d(pictures.float().cpu(), (latents.shape[-2], latents.shape[-1]))  # (B, 3, h, w)
    points = latents.float().cpu().movedim(1, -1).flatten(0, -2)  # (B*h*w, 16)
    colours = small.movedim(1, -1).flatten(0, -2)  # (B*h*w, 3)
    # A little ridge: a flat picture leaves the map undetermined, and the smallest answer is then the calmest.
    design = torch.cat((points, torch.ones(len(points), 1)), dim=1)
    gram = design.T @ design + 1e-4 * len(points) * torch.eye(design.shape[1])
    solution = torch.linalg.solve(gram, design.T @ colours)
    return solution[:-1], solution[-1]


def latent_preview(latents: Tensor, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """A small picture of the first of `latents` `(B, 16, h, w)` (model latents): `(h, w, 3)` uint8 on the CPU.

    With `factors` (see `fit_preview_factors`) in true colours. Without, in false colours that show shapes only: three
    fixed sums of the channels with signs that are orthogonal, stretched to the picture's own range.
    """
    first = latents[0].float().cpu()
    if factors is not None:
        weights, offset = factors
        rgb = torch.einsum("chw,cr->hwr", first, weights.float().cpu()) + offset.float().cpu()
        rgb = (rgb + 1) / 2
    else:
        channel = torch.arange(first.shape[0])
        signs = torch.stack([1 - 2 * ((channel >> bit) & 1) for bit in range(3)], dim=1).float()  # (C, 3)
        rgb = torch.einsum("chw,cr->hwr", first, signs)
        low, high = rgb.amin((0, 1)), rgb.amax((0, 1))
        rgb = (rgb - low) / (high - low).clamp(min=1e-6)
    return (rgb.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
