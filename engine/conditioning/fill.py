"""Fill: a picture with a mask beside the latents, to BFL's recipe (black-forest-labs/flux, src/flux/sampling.py
`prepare_fill`): the picture times (1 - mask) in -1..1, so that holes are mid grey, and the mask itself, soft, whose
8 x 8 pixels become 64 channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import BadInput
from .pictures import Notes, extended, fit_mask, one_batch, read_mask, read_picture, round_up, stretched

GRID = 16
"""Pixels of a token. On another grid the model's host fills half a token with the opposite edge."""
WIDTH = 384
PICTURE = "flux_kit_picture"
"""Key of a LATENT: (true size, size it was made at, how it came to that), sizes (width, height) in pixels."""
PAD, STRETCH, ERROR = SIZES = ("pad", "stretch", "error")
OTHER_WIDTHS = {64: "FLUX.1 dev, schnell or Kontext", 128: "FLUX.1 Depth or Canny"}
HALF = 0.5


@dataclass(frozen=True)
class Fill:
    """What Fill is given. `masked` `(B, H, W, 3)` is encoded for the channels, `picture` of the same shape for the
    latent; `mask` `(B, 1, H, W)`, 1 = paint. H and W are multiples of 16. `record` goes into the LATENT."""

    masked: Tensor
    picture: Tensor
    mask: Tensor
    record: dict[str, Any]
    notes: Notes


def prepare(image: Tensor, mask: Tensor, *, binary: bool = False, size: str = PAD) -> Fill:
    """Picture `(B, H, W, 3)` and mask `(B, H, W)`, one for all or one for each, brought to multiples of 16.

    `binary`: the mask is 1 from one half on, as diffusers does; else soft, as BFL does. `size`: "pad" repeats the last
    row and column of both, "stretch" resizes down, "error" raises. BadInput for an empty mask.
    """
    picture, notes = read_picture(image)
    cover, told = read_mask(mask)
    _check_covered(cover)
    cover, more = fit_mask(cover, picture.shape[1:3])
    notes += [*told, *more, *_polarity(image, cover)]
    cover = _halved(cover) if binary else cover
    picture, cover = one_batch(image=picture, mask=cover)
    height, width = picture.shape[1:3]
    wide, high, how = made_size(width, height, size)
    record: dict[str, Any] = {}
    if (wide, high) != (width, height):
        record[PICTURE] = ((width, height), (wide, high), how)
        notes.append(f"{width} x {height} is {TOLD[how]} {wide} x {high}: FLUX.1 works on multiples of {GRID}. Flux "
                     f"Decode and Region Paste bring it back to {width} x {height}")
        if how == PAD:  # of the mask too: a strip that is kept beside a hole would show what the hole hides
            picture, cover = extended(picture, high, wide), extended(cover, high, wide)
        else:
            picture = stretched(picture, high, wide)
            cover = stretched(cover[..., None], high, wide, "bilinear")[..., 0]
            cover = _halved(cover) if binary else cover
    if bool((cover == 1).all()):
        notes.append("the mask covers the whole picture: nothing of it is kept. If that is not meant, invert the mask")
    masked = HALF + (picture - HALF) * (1 - cover[..., None])
    return Fill(_planar(masked), _planar(picture), cover[:, None], record, notes)


def _planar(image: Tensor) -> Tensor:
    """The same values, stored plane by plane, as encoders take them. The order of their sums depends on it, and the
    norms of an even picture, such as one that is masked all over, make that last bit 1e-2."""
    return image.movedim(-1, 1).contiguous().movedim(1, -1)


def made_size(width: int, height: int, size: str) -> tuple[int, int, str]:
    """(width, height) on the grid, and how a picture comes to it. BadInput."""
    if size not in SIZES:
        raise BadInput(f"size '{size}' is not one of {', '.join(SIZES)}")
    if width % GRID == 0 and height % GRID == 0:
        return width, height, size
    if size == ERROR:
        raise BadInput(f"the picture is {width} x {height}, FLUX.1 needs multiples of {GRID}. Choose pad or stretch, "
                       "or resize it before")
    if size == PAD:
        return round_up(width, GRID), round_up(height, GRID), size
    if min(width, height) < GRID:
        raise BadInput(f"the picture is {width} x {height}, too small to be stretched to multiples of {GRID}; choose "
                       "pad")
    return width // GRID * GRID, height // GRID * GRID, size


TOLD = {PAD: "extended by its edge to", STRETCH: "stretched to"}


OTHER_CHANNEL = ("Was it painted into another channel (Load Image gives the alpha channel; masks painted red need "
                 "Convert Image to Mask), or inverted?")


def _check_covered(mask: Tensor, problem: str = "is empty", advice: str = OTHER_CHANNEL) -> None:
    empty = [str(number) for number, item in enumerate(mask, start=1) if not item.any()]
    if empty:
        where = "" if len(empty) == len(mask) else f" in item {', '.join(empty)}"
        raise BadInput(f"the mask {problem}{where}: there is nothing to paint. {advice}")


def _halved(mask: Tensor) -> Tensor:
    made = (mask >= HALF).float()
    _check_covered(made, "nowhere reaches one half", "Take it soft, or make it whiter")
    return made


def _polarity(image: Tensor, mask: Tensor) -> Notes:
    """A hint where the mask is the picture's own alpha: there 1 is what is opaque, not what is to change."""
    if image.shape[-1] != 4 or mask.shape != image.shape[:3]:
        return []
    alike = bool(((image[..., 3].float() - mask).abs() < 1 / 255).all()) and bool(mask.min() < mask.max())
    return ["the mask is the picture's alpha channel, which is 1 where the picture is opaque: its visible part will be "
            "painted over. Invert the mask to paint the transparent part"] if alike else []


def check_width(width: int | None) -> None:
    """BadInput unless a model of this `img_in` width is Fill; None, not known, passes."""
    if width not in (None, WIDTH):
        kind = OTHER_WIDTHS.get(width or 0, "no FLUX.1 model known here")
        raise BadInput(f"this model takes {width} channels: it is {kind}, which ignores picture and mask. Flux Fill "
                       f"needs FLUX.1 Fill, which takes {WIDTH}; load flux1-fill-dev, or inpaint with Flux Encode and "
                       "its mask")


def true_size(image: Tensor, latent: Any) -> Tensor:
    """A decoded IMAGE at the size of the picture that its LATENT was made of, where that was brought to the grid."""
    record = latent.get(PICTURE) if isinstance(latent, dict) else None
    if record is None:
        return image
    (width, height), (wide, high), how = record
    if tuple(image.shape[1:3]) != (high, wide):                 # the latent was scaled or cut since
        return image
    return image[:, :height, :width] if how == PAD else stretched(image, height, width)


def values_of(parts: Fill, masked: Tensor, guidance: float) -> dict[str, Any]:
    """Keys of the conditioning; `masked`: the encoded picture `(B, 16, h, w)`, raw. Guidance 0: none is set."""
    return {"concat_latent_image": masked, "concat_mask": parts.mask, **({"guidance": guidance} if guidance else {})}


def latent_of(samples: Tensor, parts: Fill, *, noise_mask: bool = False) -> dict[str, Any]:
    """LATENT of the encoded picture. With `noise_mask` the sampler also puts the picture back outside the mask at every
    step, which BFL does not."""
    return {"samples": samples, **parts.record, **({"noise_mask": parts.mask} if noise_mask else {})}


