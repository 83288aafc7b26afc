"""FLUX.1 Kontext: pictures to edit, as further image tokens with positions of their own.

Official (black-forest-labs/flux, src/flux/sampling.py `prepare_kontext`): one picture, stretched by LANCZOS to that of
17 sizes whose aspect is nearest, encoded; the result has its size. Several pictures are either one each, placed by the
sampler as if they were stitched (ComfyUI's method "offset"), or stitched before they are encoded.
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
from .attention import grid_of, mask_of, on_grid, reference_grids, with_references
from .pictures import read_mask, read_picture, same_aspect, with_values, zeroed
from .resample import fitting, resize

Conditioning = Sequence[Sequence[Any]]
Latent = dict[str, Any]
Size = tuple[int, int]  # (width, height)

_WIDE = ((1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672))
SIZES: tuple[Size, ...] = (*((height, width) for width, height in reversed(_WIDE)), (1024, 1024), *_WIDE)
"""What Kontext was trained on."""
AREA = 1024 * 1024
GRID = 16

STRETCH, PAD, KEEP = "preferred-stretch", "preferred-pad", "keep-16"
FITS = (STRETCH, PAD, KEEP)
CHAIN, RIGHT, DOWN, INDEX = "chain", "stitch-right", "stitch-down", "index"
METHODS = {CHAIN: "offset", RIGHT: "offset", DOWN: "offset", INDEX: "index"}
LAYOUTS = tuple(METHODS)
GUIDANCE = 2.5
KONTEXT_WIDTH = 4 * FLUX_AE.z_channels
GREY = 0.5
TOLD_STRETCH = 0.03
MANY_TOKENS = 3  # times the result's own


@dataclass(frozen=True)
class Settings:
    """What a user sets. `target`: the size of the result; an aspect of it as (w, h), small numbers, with
    `target_is_aspect`; None: the first picture's. `guidance` 0: as the conditionings have it."""

    size: str = STRETCH
    layout: str = CHAIN
    target: Size | None = None
    target_is_aspect: bool = False
    guidance: float = GUIDANCE
    batch: int = 1

    def check(self) -> None:
        for name, value, known in (("size", self.size, FITS), ("layout", self.layout, LAYOUTS)):
            if value not in known:
                raise BadInput(f"{name} {value!r} is none of {', '.join(known)}")
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise BadInput(f"guidance {self.guidance} is no number from 0 on; {GUIDANCE} is the official one")
        if self.batch < 1:
            raise BadInput(f"a batch of {self.batch} pictures cannot be made")


@dataclass(frozen=True)
class Placed:
    """A picture in its new size, and where in that it lies: (top, left, height, width)."""

    image: Tensor  # (B, H, W, 3)
    box: tuple[int, int, int, int]
    note: str = ""

    @property
    def size(self) -> Size:
        return self.image.shape[2], self.image.shape[1]


@dataclass(frozen=True)
class Edit:
    """What a sampler takes, with the result's size in pixels and what was done, line by line."""

    positive: Conditioning
    negative: Conditioning
    latent: Latent
    size: Size
    report: str


def edited(positive: Conditioning, images: Sequence[Tensor | None], encode: Callable[[Tensor], Tensor],
           empty: Callable[[int, int, int], Latent], settings: Settings, *, negative: Conditioning | None = None,
           edit_mask: Tensor | None = None) -> Edit:
    """Conditionings that carry the pictures, IMAGE `(B, H, W, 3)` each, and a LATENT to sample.

    `encode(image)` gives raw latents `(B, 16, h, w)`, `empty(width, height, batch)` a LATENT of zeros. `edit_mask`
    `(H, W)` or `(B, H, W)`, 1 = change: the LATENT is the first picture, of which the rest stays. Without pictures the
    conditionings get the guidance alone. The negative one gets the same as the positive; zeros stand for one that is
    not there, as with Flux Fill. BadInput, NotFinite.
    """
    settings.check()
    given = [(f"image_{number}", image) for number, image in enumerate(images, 1) if image is not None]
    lines: list[str] = []
    placed = arranged([(name, checked(image, name, lines)) for name, image in given], settings)
    lines += [picture.note for picture in placed if picture.note]
    size = target_size(settings, placed[0].size if placed else None)
    batch = batch_of([len(picture.image) for picture in placed], settings.batch)
    if edit_mask is not None:
        mask, batch = region(edit_mask, [image for _, image in given], placed, size, batch, lines)
    pictures = [picture.image for picture in placed]
    if len(pictures) > 1 and settings.layout in (RIGHT, DOWN):
        pictures = [stitched(pictures, settings.layout == DOWN)]
    latents = [encode(picture) for picture in pictures]
    if edit_mask is None:
        latent = empty(*size, batch)
    else:
        first = encode(placed[0].image) if len(placed) > len(pictures) else latents[0]
        latent = {"samples": first.expand(batch, -1, -1, -1).clone(), "noise_mask": mask}
    grid = grid_of(latent["samples"])
    values: dict[str, Any] = {"guidance": settings.guidance} if settings.guidance else {}
    prompt = with_values(positive, values)
    other = zeroed(prompt) if negative is None else with_values(negative, values, "negative")
    made = [[carrying(text, entry, latents, METHODS[settings.layout], grid) for text, entry in one]
            for one in (prompt, other)]
    return Edit(made[0], made[1], latent, size, "\n".join([*lines, *told(size, batch, latents, positive, settings)]))


def told(size: Size, batch: int, latents: list[Tensor], positive: Conditioning, settings: Settings) -> list[str]:
    """The result, and references that cost much."""
    lines = [f"the result is {size[0]} x {size[1]}" + (f", {batch} of them" if batch > 1 else "")]
    own = size[0] * size[1] // GRID**2
    before = max((sum(map(math.prod, reference_grids(values))) for _, values in positive), default=0)
    tokens = sum(math.prod(grid_of(latent)) for latent in latents) + before
    if not latents:
        lines.append("no picture is connected: text to image")
    if before:
        lines.append(f"behind references of {before} tokens that the conditioning had")
    if tokens > MANY_TOKENS * own:
        lines.append(f"the references are {tokens} tokens, the result {own}: a step takes memory and time for "
                     f"{tokens + own}. Fewer or smaller pictures ('{KEEP}' keeps small ones small) need less")
    if settings.layout == INDEX and len(latents) > 1:
        lines.append("'index' needs a model trained for it; FLUX.1 Kontext has seen one picture")
    return lines


# ----------------------------------------------------------------------------------------------------------- pictures

def checked(image: Tensor, name: str, lines: list[str]) -> Tensor:
    """The picture's colours, clamped to 0..1."""
    colours, notes = read_picture(image, name)
    lines += notes
    return colours.clamp(0, 1)


def snapped(width: int, height: int) -> Size:
    """The official size of the nearest aspect; of two as near the narrower."""
    return min((abs(width / height - w / h), w, h) for w, h in SIZES)[1:]


def on_16(width: float, height: float) -> Size:
    """The nearest multiples of 16."""
    return max(GRID, round(width / GRID) * GRID), max(GRID, round(height / GRID) * GRID)


def with_aspect(width: float, height: float, area: int = AREA) -> Size:
    """The size of an aspect and an area as BFL has it, sides rounded down to multiples of 16."""
    ratio = width / height
    sides = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return max(GRID, sides[0] // GRID * GRID), max(GRID, sides[1] // GRID * GRID)


def arranged(images: list[tuple[str, Tensor]], settings: Settings) -> list[Placed]:
    """The pictures in the sizes that they are encoded in. To be stitched: the first as it would be alone, the others
    of its height or width, in their own aspects."""
    placed: list[Placed] = []
    for name, image in images:
        height, width = image.shape[1:3]
        if placed and settings.layout in (RIGHT, DOWN):
            first = placed[0].size
            size = (on_16(width * first[1] / height, 0)[0], first[1]) if settings.layout == RIGHT else (
                first[0], on_16(0, height * first[0] / width)[1])
        else:
            size = on_16(width, height) if settings.size == KEEP else snapped(width, height)
        pad = settings.size == PAD and not (placed and settings.layout in (RIGHT, DOWN))
        placed.append((padded if pad else stretched)(name, image, size))
    return placed


def stretched(name: str, image: Tensor, size: Size) -> Placed:
    height, width = image.shape[1:3]
    box = (0, 0, size[1], size[0])
    if (width, height) == size:
        return Placed(image, box)
    return Placed(resize(image, size[1], size[0]), box, f"{name}: {resized((width, height), size)}")


def resized(old: Size, new: Size) -> str:
    """What happened to a picture, with its distortion where one could see it."""
    note = f"{old[0]} x {old[1]} becomes {new[0]} x {new[1]}"
    factor = new[0] / new[1] * old[1] / old[0]
    if abs(factor - 1) <= TOLD_STRETCH:
        return note
    pixels = round(abs(new[0] - new[1] * old[0] / old[1]))
    return (f"{note}, stretched: {abs(factor - 1):.1%} or {pixels} px {'wider' if factor > 1 else 'narrower'} than its "
            f"aspect would have it ('{PAD}' keeps it)")


def padded(name: str, image: Tensor, size: Size) -> Placed:
    old = image.shape[1], image.shape[2]
    height, width = fitting(old, (size[1], size[0]))
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    bottom, right = size[1] - height - top, size[0] - width - left
    whole = F.pad(resize(image, height, width), (0, 0, left, right, top, bottom), value=GREY)
    ends = ((left, "left"), (right, "right"), (top, "above"), (bottom, "below"))
    bars = [f"{px} px {side}" for px, side in ends if px]
    note = f"{name}: {old[1]} x {old[0]} becomes {width} x {height}" if (height, width) != old else f"{name}:"
    if bars:
        note += f" with grey bars to {size[0]} x {size[1]}: {', '.join(bars)}; cut them off the result"
    return Placed(whole, (top, left, height, width), "" if note.endswith(":") else note)


def stitched(pictures: Sequence[Tensor], down: bool) -> Tensor:
    """Side by side or one below the other; a batch of one is repeated."""
    batch = max(map(len, pictures))
    return torch.cat([picture.expand(batch, -1, -1, -1) for picture in pictures], dim=1 if down else 2)


# ------------------------------------------------------------------------------------------------------------- result

def target_size(settings: Settings, first: Size | None) -> Size:
    """The result's size in pixels."""
    if settings.target is None:
        return first or (1024, 1024)
    if settings.target_is_aspect:
        kept = first is not None and settings.size == KEEP
        return with_aspect(*settings.target, area=first[0] * first[1] if kept and first else AREA)
    for name, side in zip(("width", "height"), settings.target, strict=True):
        if side < GRID or side % GRID:
            raise BadInput(f"{name} {side} is no multiple of {GRID}; the nearest is {on_16(side, side)[0]}")
    return settings.target


def batch_of(found: Sequence[int], wanted: int) -> int:
    """Pictures of the result. BadInput where batches are neither 1 nor all the same."""
    sizes = {size for size in (*found, wanted) if size > 1}
    if len(sizes) > 1:
        raise BadInput(f"batches of {', '.join(map(str, found))} pictures and a batch_size of {wanted} do not go "
                       "together; each has to be 1 or the same number")
    return max(sizes, default=1)


def region(mask: Tensor, images: list[Tensor], placed: list[Placed], size: Size, batch: int, lines: list[str]
           ) -> tuple[Tensor, int]:
    """The edit mask as a LATENT has it, `(B, 1, H, W)` of the result's pixels, and the batch."""
    if not placed:
        raise BadInput("an edit_mask needs the picture that it is for; connect image_1")
    if size != placed[0].size:
        raise BadInput(f"with an edit_mask the result is the first picture, {placed[0].size[0]} x {placed[0].size[1]}; "
                       "set aspect to that of the picture")
    mask, notes = read_mask(mask, "edit_mask")
    lines += notes
    if not bool(mask.any()):
        raise BadInput("edit_mask is empty, so nothing would change. Usual cause: a mask of another channel, or Load "
                       "Image's mask of a picture without an alpha channel; leave it out to edit the whole picture")
    height, width = images[0].shape[1:3]
    if not same_aspect(mask.shape[-2:], (height, width)):
        raise BadInput(f"edit_mask is {mask.shape[-1]} x {mask.shape[-2]}, the first picture {width} x {height}: "
                       "another aspect. Make the mask on that picture")
    if bool((mask == 1).all()):
        lines.append("edit_mask covers the whole picture")
    batch = batch_of([batch, len(mask)], 1)
    top, left, rows, columns = placed[0].box
    inner = resize(mask[..., None], rows, columns, "bilinear").clamp(0, 1)[..., 0]
    fitted = F.pad(inner, (left, size[0] - columns - left, top, size[1] - rows - top))
    return fitted.expand(batch, -1, -1)[:, None].clone(), batch


def carrying(text: Tensor, values: dict[str, Any], latents: list[Tensor], method: str, grid: tuple[int, int]
             ) -> list[Any]:
    """An entry of a conditioning with references; an attention mask that it has is widened for them."""
    if latents:
        mask = mask_of(values, text.shape[1])
        values["reference_latents"] = [*(values.get("reference_latents") or ()), *latents]
        values["reference_latents_method"] = method
        if mask is not None:
            grids = [grid_of(latent) for latent in latents]
            values.update(with_references(on_grid(mask, grid), grids).keys(text.device))
    return [text, values]


def check_model(width: int | None) -> None:
    """BadInput for a model that takes no references; `width` of its `img_in`, None where it does not tell."""
    if width is not None and width != KONTEXT_WIDTH:
        kind = {384: "Fill", 128: "a Depth or Canny model, or carries such a LoRA"}.get(width, "another model")
        raise BadInput(f"this MODEL is {kind} (its img_in takes {width} channels), Kontext takes {KONTEXT_WIDTH}; load "
                       "FLUX.1 Kontext")
