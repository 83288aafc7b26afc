"""Depth and edge maps as what FLUX.1 Depth and Canny read: brought to size in pixels, then encoded, and joined to the
latents as channels. Source: black-forest-labs/flux, src/flux/sampling.py `prepare_control`, src/flux/cli_control.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput
from ..specs import FLUX_AE, FLUX_CONTROL, FLUX_DEV, FLUX_FILL, AutoencoderSpec
from .pictures import Entries, Notes, read_picture, with_values, zeroed
from .resample import covering, fitting, resize

GRID = 16
"""Pixels to a token, each way."""
FITS = ("stretch", "crop", "pad")
SEEN_STRETCH = 0.03
NEARLY_BLACK, NEARLY_ALL = 0.02, 0.98


@dataclass(frozen=True)
class Kind:
    """What a map shows. `guidance`: BFL's preset, None if there is none."""

    name: str
    guidance: float | None
    look: str


KINDS: dict[str, Kind] = {kind.name: kind for kind in (
    Kind("depth", 10.0, "near is white, far is black"),
    Kind("canny", 30.0, "edges are white on black"),
    Kind("custom", None, "as the model was trained"))}


@dataclass(frozen=True)
class Prepared:
    """`image` `(B, height, width, 3)`, sides multiples of 16, ready for the autoencoder; `notes`: what was done."""

    image: Tensor
    notes: Notes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.image.shape[2], self.image.shape[1]


def prepare(image: Tensor, kind: str = "custom", width: int = 0, height: int = 0, fit: str = "stretch") -> Prepared:
    """A map at the size of the picture to be made.

    image `(B, H, W, 3 or 4)` in 0..1, an alpha channel is dropped. `width`, `height`: 0 = the map's own, or by its
    aspect from the other; brought to the nearest multiple of 16. `fit`, where the aspects differ: "stretch" (BFL's way,
    with LANCZOS), "crop" the middle, "pad" with black. BadInput, NotFinite.
    """
    if kind not in KINDS or fit not in FITS:
        raise BadInput(f"kind '{kind}' or fit '{fit}' is unknown: kinds are {', '.join(KINDS)}; fits {', '.join(FITS)}")
    given, notes = read_picture(image, "map")
    old = (given.shape[1], given.shape[2])
    new = _target(old, width, height)
    notes += _size_notes(old, new, (height, width), fit)
    if fit == "stretch" or old[0] * new[1] == old[1] * new[0]:
        made = resize(given, *new)
    elif fit == "crop":
        size = covering(old, new)
        top, left = ((a - b) // 2 for a, b in zip(size, new, strict=True))
        made = resize(given, *size)[:, top:top + new[0], left:left + new[1]]
    else:
        size = fitting(old, new)
        top, left = ((b - a) // 2 for a, b in zip(size, new, strict=True))
        made = F.pad(resize(given, *size), (0, 0, left, new[1] - size[1] - left, top, new[0] - size[0] - top))
    return Prepared(made, [*notes, *hints(made, kind)])


def _target(old: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    if width < 0 or height < 0:
        raise BadInput(f"a map of {width} x {height} pixels cannot be; 0 takes the map's own size")
    sides = [height or (old[0] * width / old[1] if width else old[0]),
             width or (old[1] * height / old[0] if height else old[1])]
    high, wide = (max(GRID, int(side / GRID + 0.5) * GRID) for side in sides)
    return high, wide


def _size_notes(old: tuple[int, int], new: tuple[int, int], asked: tuple[int, int], fit: str) -> Notes:
    """`old`, `new` and `asked` are (height, width)."""
    notes = []
    if old != new:
        way = {"stretch": "resized", "crop": "resized and cropped", "pad": "resized and padded with black"}[fit]
        notes.append(f"the map was {way} from {old[1]} x {old[0]} to {new[1]} x {new[0]} pixels")
    if any(want and want != got for want, got in zip(asked, new, strict=True)):
        notes.append(f"{asked[1]} x {asked[0]} became {new[1]} x {new[0]}: sides are multiples of {GRID}")
    change = abs(new[1] * old[0] / (new[0] * old[1]) - 1)
    if fit == "stretch" and change > SEEN_STRETCH:
        notes.append(f"its aspect changed by {100 * change:.0f} %; choose crop or pad to keep it")
    return notes


def hints(image: Tensor, kind: str) -> Notes:
    """What looks wrong with a map `(B, H, W, 3)` of a kind; guesses, so they stop nothing."""
    grey = image.mean(-1)
    found = []
    if float(grey.max()) < 0.1 or float(grey.mean()) < 2e-4:
        found.append("the map is nearly black: there is little to follow")
    if kind == "custom" or found:
        return found
    if float((image.amax(-1) - image.amin(-1)).mean()) > 0.02:
        found.append(f"the map is coloured: is it the picture, and not its {kind} map? (Structure Map makes one)")
    ends = float(((grey < NEARLY_BLACK) | (grey > NEARLY_ALL)).float().mean())
    if kind == "canny":
        if float(grey.mean()) > 0.5:
            found.append("the map is mostly white: edges are white on black, so it may be inverted")
        elif ends < 0.5:
            found.append("the map is mostly grey: it may be a depth map, and the model one for edges")
        return found
    if ends > 0.999 and float(grey.std()) > 0:
        found.append("the map is black and white only: it may hold edges, and the model be one for depth")
    third = max(1, grey.shape[1] // 3)
    if float(grey[:, :third].mean() - grey[:, -third:].mean()) > 0.2:
        found.append("the map is brighter above than below: near is white, so it may be inverted")
    return found


def check_model(width: int | None) -> None:
    """BadInput if a model whose `img_in` takes `width` channels cannot follow a map; None: it is not known."""
    if width is None or width == FLUX_CONTROL.in_channels:
        return
    if width == FLUX_DEV.in_channels:
        raise BadInput("this model has no input for a map (img_in takes 64 channels): load FLUX.1 Depth or Canny, or "
                       "put the Depth or Canny LoRA on it and connect the model behind the LoRA")
    if width == FLUX_FILL.in_channels:
        raise BadInput("this is a Fill model (img_in takes 384 channels), whose own input is a picture with a mask. It "
                       "cannot follow a map, nor carry a Depth or Canny LoRA: those need FLUX.1 dev. Use Flux Fill "
                       "for this model, or load FLUX.1 Depth or Canny")
    raise BadInput(f"this model's img_in takes {width} channels; Depth and Canny models take 128")


def guided(kind: str, guidance: float) -> float | None:
    """The guidance to set: the given, or BFL's preset for 0; None leaves the conditioning's."""
    return guidance if guidance > 0 else KINDS[kind].guidance


def with_map(conditioning: Entries, latents: Tensor, guidance: float | None, what: str = "positive", *,
             beside_noise: bool = False, spec: AutoencoderSpec = FLUX_AE) -> list[list[Any]]:
    """The conditioning with the encoded map, raw latents `(B, 16, h, w)`, by the key that core reads for it.

    `beside_noise`: also as channels ready for the model, `noise_concat`, which core joins without asking how wide the
    model is; for hosts that would not see a control LoRA's wider input. The mask of an earlier Fill is taken out.
    """
    values: dict[str, Any] = {"concat_latent_image": latents}
    if guidance is not None:
        values["guidance"] = guidance
    if beside_noise:
        values["noise_concat"] = spec.scale_factor * (latents - spec.shift_factor)
    made = with_values(conditioning, values, what)
    for _, found in made:
        found.pop("concat_mask", None)
        if not beside_noise:
            found.pop("noise_concat", None)
    return made


def both(positive: Entries, negative: Entries | None, latents: Tensor, guidance: float | None, *,
         beside_noise: bool = False) -> tuple[list[list[Any]], list[list[Any]]]:
    """`with_map` on both prompts; without a negative, on zeros in the positive's shape."""
    made = with_map(positive, latents, guidance, beside_noise=beside_noise)
    return made, with_map(zeroed(positive) if negative is None else negative, latents, guidance, "negative",
                          beside_noise=beside_noise)


def report(prepared: Prepared, kind: str, guidance: float | None) -> Notes:
    """What was made, for the user."""
    width, height = prepared.size
    told = "guidance as in the prompt" if guidance is None else f"guidance {guidance:g}"
    return [f"{kind} map, {width} x {height} pixels, {told}", *prepared.notes]


