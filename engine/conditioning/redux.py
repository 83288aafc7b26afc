"""FLUX.1 Redux: pictures as text tokens behind those of the prompt, with a strength, a level of detail and masks.

Official (black-forest-labs/flux, src/flux/sampling.py `prepare_redux`): the picture is stretched to the square that the
vision encoder sees, and each of its tokens, through Redux's projector, follows the tokens of T5. Strength 1 with all
of the encoder's detail and no masks is that, to the bit. A strength is a bias of log(s) on the scores of Redux's
tokens, as in ComfyUI's StyleModelApply; less detail is an average of tokens, as in AdvancedRefluxControl (kaibioinfo),
but only of those within the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput
from ..specs import FLUX_AE
from .attention import (
    ANY_SIZE,
    FLOOR,
    LARGE,
    Grid,
    Joint,
    grid_of,
    mask_of,
    on_grid,
    open_mask,
    reference_grids,
    stretched,
    with_text,
)
from .pictures import beyond, read_mask, same_aspect

Conditioning = Sequence[Sequence[Any]]
STRETCH, CROP, LETTERBOX = "stretch", "crop", "letterbox"
FITS = (STRETCH, CROP, LETTERBOX)
APPEND, AVERAGE = "append", "average"
SEVERAL = (APPEND, AVERAGE)
MAX_STRENGTH = 2.0
MAX_DETAIL = 64
OFFICIAL_DETAIL = 27  # tokens along a side of what SigLIP so400m patch14 384 sees
KEPT = 0.5
"""Cells stay of which the subject covers half as much as of the cell that it covers most."""
MAX_SQUARE = 64 * 1024 * 1024
PIXELS = FLUX_AE.downscale
GREY = 0.5  # the encoder's zero


@dataclass(frozen=True)
class Settings:
    """What a user sets; `detail` in tokens along a side, at most the encoder's own."""

    strength: float = 1.0
    detail: int = OFFICIAL_DETAIL
    fit: str = STRETCH
    several: str = APPEND

    def check(self) -> None:
        if not math.isfinite(self.strength) or self.strength < 0:
            raise BadInput(f"strength {self.strength} is no number from 0 on; 1 is the official one, 0 switches Redux "
                           "off")
        if self.detail < 1:
            raise BadInput(f"detail {self.detail} is below 1, the fewest tokens along a side; "
                           f"{OFFICIAL_DETAIL} are all")
        for name, value, known in (("fit", self.fit, FITS), ("several", self.several, SEVERAL)):
            if value not in known:
                raise BadInput(f"{name} {value!r} is none of {', '.join(known)}")


def restyled(conditioning: Conditioning, images: Tensor, see: Callable[[Tensor, bool], Tensor],
             project: Callable[[Tensor], Tensor], settings: Settings, *, subject: Tensor | None = None,
             area: Tensor | None = None, latents: Tensor | None = None) -> tuple[Conditioning, str]:
    """A conditioning that carries the pictures IMAGE `(B, H, W, 3)` too, and what was done, line by line.

    `see(images, crop)` gives the encoder's states `(B, L, width)`, `project(states)` text tokens `(B, L, d)`. `subject`
    `(H, W)` or `(B, H, W)`: where in the pictures to look. `area` `(H, W)`: where in the result they may be seen, of
    the grid of `latents` `(B, 16, h, w)`, which are needed with an area and with references (BadInput). Nothing is
    changed, and the conditioning given returned, for strength 0 and for masks that leave nothing. BadInput, NotFinite.
    """
    settings.check()
    if not conditioning:
        raise BadInput("the conditioning is empty; connect an encoded prompt (an empty text is allowed)")
    if settings.strength == 0:
        return conditioning, "strength 0: Redux is off, the conditioning is as it was"
    notes: list[str] = []
    masks = {name: None if mask is None else read_mask(mask, f"{name} mask")
             for name, mask in (("subject", subject), ("area", area))}
    for name, read in masks.items():
        if read is not None and not bool(read[0].any()):
            return conditioning, (f"the {name} mask is empty: Redux is off, the conditioning is as it was. (Load Image "
                                  "gives such a mask for a picture without an alpha channel.)")
        notes += [] if read is None else read[1]
    subject, area = (None if read is None else read[0] for read in masks.values())
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise BadInput(f"a picture must be (batch, height, width, 3), found {found}")
    pictures, weight = fitted(images, subject, settings.fit)
    states = see(pictures, settings.fit == CROP)
    tokens, line = condensed(project(states), weight, settings)
    notes += [*beyond(images[..., :3]), line] + ["the alpha channel is not looked at"] * (images.shape[-1] != 3)
    if latents is not None and latents.ndim != 4:
        raise BadInput(f"a latent must be (batch, channels, height/8, width/8), found {tuple(latents.shape)}")
    grid = None if latents is None else grid_of(latents)
    seen = None if area is None else area_weights(area, latents)
    made = [joined(text, values, tokens, settings.strength, seen, grid) for text, values in conditioning]
    return made, "\n".join([*notes, *told(settings, tokens.shape[1], made, seen)])


def told(settings: Settings, count: int, made: Conditioning, seen: Tensor | None) -> list[str]:
    text, values = made[0]
    mask = values.get("attention_mask")
    lines = [f"{count} tokens behind {text.shape[1] - count} of text"]
    if mask is None:
        return [*lines, "strength 1, seen everywhere: as published, no attention mask"]
    where = "everywhere" if seen is None else f"by {int((seen > 0).sum())} of {seen.numel()} tokens of the picture"
    lines.append(f"strength {settings.strength:g}, seen {where}, by an attention mask, of which backends without masks "
                 "take no notice (Nunchaku); there, lower detail instead")
    size = mask.numel() * mask.itemsize * len(made)
    if size > LARGE:
        lines.append(f"the attention mask takes {size >> 20} MB; strength 1 without an area needs none")
    return lines


# ------------------------------------------------------------------------------------------------ pictures and tokens

def check_aspect(mask: Tensor, size: tuple[int, int], name: str, of: str) -> None:
    if not same_aspect(mask.shape[-2:], size):
        raise BadInput(f"the {name} is {mask.shape[-1]} x {mask.shape[-2]}, {of} {size[1]} x {size[0]}: another "
                       "aspect. Make the mask on a picture of that size")


def fitted(images: Tensor, subject: Tensor | None, fit: str) -> tuple[Tensor, Tensor | None]:
    """The pictures as the encoder shall see them, and `(B or 1, h, w)`, how much of each place of the square it sees
    is to count; None: all of it."""
    height, width = images.shape[1:3]
    if fit == LETTERBOX and max(height, width)**2 > MAX_SQUARE:
        raise BadInput(f"a picture of {width} x {height} with bars is a square of {max(height, width)}, which is too "
                       f"large; choose the fit '{STRETCH}', or a smaller picture")
    if subject is not None:
        check_aspect(subject, (height, width), "subject mask", "the picture")
        if len(subject) not in (1, len(images)):
            raise BadInput(f"{len(subject)} subject masks for {len(images)} pictures; give one for all, or as "
                           "many")
        subject = None if bool((subject == 1).all()) else subject
    if fit == LETTERBOX and height != width:
        whole = torch.ones(1, height, width) if subject is None else subject
        return squared(images.movedim(-1, 1), GREY).movedim(1, -1), squared(whole, 0.0)
    if fit == CROP and subject is not None:
        side = min(subject.shape[-2:])
        top, left = ((length - side) // 2 for length in subject.shape[-2:])
        subject = subject[:, top:top + side, left:left + side]
    return images, subject


def squared(x: Tensor, value: float) -> Tensor:
    """`(..., h, w)` with bars of `value` at both ends of the shorter sides."""
    height, width = x.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(x, (left, side - width - left, top, side - height - top), value=value)


def shares(old: int, new: int) -> Tensor:
    """`(new, old)` fp64: of each of `new` equal parts of a line, its shares in each of `old`; they sum to 1."""
    first, last = (torch.arange(new, dtype=torch.float64)[:, None] + end for end in (0, 1))
    left, right = (torch.arange(old, dtype=torch.float64)[None] + end for end in (0, 1))
    scale = old / new
    overlap = torch.minimum(last * scale, right) - torch.maximum(first * scale, left)
    return overlap.clamp(min=0) / scale


def averaged(mask: Tensor, height: int, width: int) -> Tensor:
    """`(..., h, w)` -> `(..., height, width)` fp64: the mean over each cell, to the fraction of a pixel."""
    return shares(mask.shape[-2], height) @ mask.cpu().double() @ shares(mask.shape[-1], width).T


def condensed(tokens: Tensor, weight: Tensor | None, settings: Settings) -> tuple[Tensor, str]:
    """Projected tokens `(B, L, d)` of B pictures -> the `(1, n, d)` that are taken, and how many they are.

    A cell of the coarser grid is the mean of its tokens by their weights and their shares of it; cells that hardly have
    any are left out. "average": the mean over the pictures as well, by the same weights.
    """
    batch, length, width = tokens.shape
    side = math.isqrt(length)
    if side**2 != length:
        raise BadInput(f"the vision encoder gave {length} tokens, which are no square; FLUX.1 Redux goes with SigLIP "
                       "so400m patch14 384 (sigclip_vision_patch14_384.safetensors)")
    detail = min(settings.detail, side)
    several = batch if settings.several == AVERAGE else 1
    line = f"{batch} picture{'s' * (batch > 1)}, {'averaged, ' * (several > 1)}{detail} x {detail} tokens" + (
        f" of the encoder's {side} x {side}" if detail < side else "")
    if weight is None and detail == side and several == 1:
        return tokens.reshape(1, -1, width), line
    amount = torch.ones(1, side, side, dtype=torch.float64) if weight is None else averaged(weight, side, side)
    amount = amount.expand(batch, -1, -1)
    down = shares(side, detail)
    grid = tokens.cpu().double().reshape(batch, side, side, width)
    total = torch.einsum("ij,bjk,lk->bil", down, amount, down)  # (B, detail, detail)
    values = torch.einsum("ij,bjk,bjkd,lk->bild", down, amount, grid, down)
    groups = batch // several
    total = total.reshape(groups, several, -1).sum(1)
    values = values.reshape(groups, several, detail**2, width).sum(1)
    kept = total >= KEPT * total.amax(1, keepdim=True)
    kept &= total > 0
    means = values / total.clamp(min=torch.finfo(torch.float64).tiny)[..., None]
    taken = means[kept][None].to(tokens)
    return taken, line if weight is None else f"{line}, {int(kept.sum())} of {kept.numel()} within the mask"


# ------------------------------------------------------------------------------------------------------- conditioning

def area_weights(area: Tensor, latents: Tensor | None) -> Tensor | None:
    """How much each token of the picture sees, `(h * w,)`; None: all of them all."""
    if latents is None:
        raise BadInput("an area mask needs the latent that is sampled, whose tokens it chooses; connect it to 'latent'")
    if len(area) != 1:
        raise BadInput(f"{len(area)} area masks; give one for all pictures of the batch")
    check_aspect(area, (PIXELS * latents.shape[-2], PIXELS * latents.shape[-1]), "area mask", "the picture to sample")
    seen = averaged(area[0], *grid_of(latents)).flatten()
    return None if bool((seen > 1 - 1e-6).all()) else seen


def joined(text: Tensor, values: dict[str, Any], tokens: Tensor, strength: float, seen: Tensor | None,
           grid: Grid | None) -> list[Any]:
    """An entry of a conditioning, `(B, t, d)` with its options, with `tokens` `(1, n, d)` behind its text."""
    if tokens.shape[-1] != text.shape[-1]:
        raise BadInput(f"the Redux model makes tokens of width {tokens.shape[-1]}, this conditioning's are "
                       f"{text.shape[-1]} wide; take text encoders and Redux of one family")
    values = dict(values)
    references, count = reference_grids(values), tokens.shape[1]
    mask = mask_of(values, text.shape[1])
    if mask is not None or strength != 1 or seen is not None:
        mask = with_text(with_place(mask, text.shape[1], references, grid), count)
        values.update(biased(mask, count, strength, seen, references).keys(text.device))
    return [torch.cat((text, tokens.to(text).expand(len(text), -1, -1)), dim=1), values]


def with_place(mask: Joint | None, text: int, references: Sequence[Grid], grid: Grid | None) -> Joint:
    """The mask that is there, or an open one, on the grid that is sampled."""
    if grid is None and references and (mask is None or mask.grid == ANY_SIZE):
        raise BadInput("with references (Kontext) a strength other than 1 needs the latent that is sampled; connect it "
                       "to 'latent', or set strength to 1 and choose less detail")
    if mask is None:
        return open_mask(text, grid or ANY_SIZE, references)
    return mask if grid is None else on_grid(mask, grid)


def biased(mask: Joint, count: int, strength: float, seen: Tensor | None, references: Sequence[Grid]) -> Joint:
    """The last `count` tokens of the text are seen by log(strength) by all others; where they have an area, by the
    tokens of the picture and of references as much as that covers them, by the text as by the token that sees least: it
    would carry what it sees to the whole picture."""
    bias = mask.bias  # made by `with_text`, nobody else's
    new = slice(mask.text - count, mask.text)
    amount = torch.ones(math.prod(mask.grid), dtype=torch.float64) if seen is None else seen
    levels = torch.log(amount * strength).clamp(min=FLOOR).to(bias)
    places = [levels, *(stretched(levels, 0, mask.grid, grid) for grid in references)]
    own = bias[:, new, new].clone()
    bias[:, :new.start, new] = levels.amin()
    bias[:, new.stop:, new] = torch.cat(places)[:, None]
    bias[:, new, new] = own
    return Joint(bias, mask.text, mask.grid)
