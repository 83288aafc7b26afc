"""Pictures beside the noisy latents: as further channels of the image tokens (Fill, Depth, Canny) and as further image
tokens with positions of their own (Kontext).

Reads the keys of a CONDITIONING that ComfyUI's FLUX.1 model reads. The recipe is BFL's (black-forest-labs/flux,
src/flux/sampling.py): a token is 64 numbers of noise, 64 of the picture's latent, and for Fill 256 of the mask, whose
8 x 8 pixels to a latent pixel are channels. Redux, the third kind, is text by the time it comes here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BadInput, NotFinite
from ..specs import FLUX_AE, FluxSpec
from .latents import PATCH, image_ids, image_seq_len, patchify, process_in

log = logging.getLogger(__name__)

Size = tuple[int, int]
"""(height, width) of latents."""

PICTURE, MASK, READY = "concat_latent_image", "concat_mask", "noise_concat"
REFERENCES, METHOD = "reference_latents", "reference_latents_method"
CHANNEL_KEYS, SEQUENCE_KEYS = frozenset({PICTURE, MASK, READY}), frozenset({REFERENCES, METHOD})
METHODS = ("offset", "index", "uxo")
SAME_ASPECT = 0.01
DOWNSCALE = FLUX_AE.downscale


@dataclass(frozen=True)
class Kind:
    """What a model takes beside the latents. `channels`: of a latent pixel; `nodes`: those that give it."""

    name: str
    channels: int
    keys: frozenset[str]
    needs: str
    nodes: str


KINDS: Mapping[int, Kind] = {kind.channels: kind for kind in (
    Kind("control", 16, frozenset({PICTURE}), "its control picture (a depth map or edges)",
         "Flux Structure (FluxKitStructure) or InstructPixToPixConditioning"),
    Kind("fill", 80, frozenset({PICTURE, MASK}), "a picture with a mask",
         "Flux Fill (FluxKitFill) or InpaintModelConditioning"))}


@dataclass(frozen=True)
class Slots:
    """What an entry of a conditioning puts beside the latents; latents in the model's scale.

    `picture` `(B or 1, 16, h, w)`, `mask` `(B or 1, 1, H, W)`, 1 = paint; `ready` `(B or 1, C, h, w)` stands for both;
    `references` `(B or 1, 16, h, w)` each. `role` names the conditioning in messages.
    """

    picture: Tensor | None = None
    mask: Tensor | None = None
    ready: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    method: str = METHODS[0]
    role: str = "positive"

    @property
    def sizes(self) -> list[Size]:
        """Of the references."""
        return [size_of(latents) for latents in self.references]

    def channels(self, x: Tensor) -> Tensor | None:
        """What goes behind the channels of the tokens of latents x `(B, 16, h, w)`: `(B, L, 64 or 320)` on the CPU."""
        size = size_of(x)
        if self.ready is not None:
            if size_of(self.ready) != size:
                raise BadInput(f"the {self.role} conditioning's '{READY}' is made for {pixels(size_of(self.ready))} "
                               f"pixels, the latent to sample is {pixels(size)}; make both of one size")
            parts = [self._each(self.ready, x, READY)]
        elif self.picture is not None:
            parts = [self._each(fitted(self.picture, size, self.role), x, "picture")]
            if self.mask is not None:
                wide = (size[0] * DOWNSCALE, size[1] * DOWNSCALE)
                mask = fitted(self.mask, wide, self.role, of_mask=True)
                parts.append(self._each(F.pixel_unshuffle(mask, DOWNSCALE), x, "mask"))
        else:
            return None
        tell_odd(size, f"the {self.role} conditioning is sampled at")
        return patchify(torch.cat(parts, dim=1))

    def sequence(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Tokens `(B, L, 64)` and positions `(B, L, 3)` of the references, beside latents x; on the CPU."""
        if not self.references:
            return None
        for size in self.sizes:
            tell_odd(size, f"a reference of the {self.role} conditioning is")
        tokens = [patchify(self._each(latents, x, "reference")) for latents in self.references]
        ids = positions(len(x), size_of(x), self.sizes, self.method)[1:]
        return torch.cat(tokens, dim=1), torch.cat(ids, dim=1)

    def _each(self, tensor: Tensor, x: Tensor, what: str) -> Tensor:
        """One for all, or one for each."""
        if len(tensor) not in (1, len(x)):
            raise BadInput(f"the {self.role} conditioning's {what} is a batch of {len(tensor)}, the latent to sample a "
                           f"batch of {len(x)}; give one for all, or one for each")
        return tensor.expand(len(x), *tensor.shape[1:])


NOTHING = Slots()


def read_slots(options: Mapping[str, Any], spec: FluxSpec, role: str) -> Slots:
    """The slots of one entry of a conditioning, for a model whose `img_in` takes `spec.in_channels`.

    Raises BadInput where the model has an input and the entry nothing for it, and for what cannot be this model's;
    NotFinite for NaN and infinity. What the model has no input for is left out and told in a warning.
    """
    extra = spec.in_channels // PATCH**2 - FLUX_AE.z_channels
    kind = KINDS.get(extra)
    if extra and kind is None:
        raise BadInput(f"this model takes {spec.in_channels} channels, which no FLUX.1 model does: 64 is dev or "
                       "schnell, 128 Depth or Canny, 384 Fill")
    given = {key for key in CHANNEL_KEYS if options.get(key) is not None}
    taken = frozenset() if kind is None else given & (kind.keys | {READY})
    if given - taken:
        log.warning("%s conditioning: %s ignored, because this model (%s) has no input for it", role,
                    ", ".join(sorted(given - taken)), spec.variant)
    references, method = read_references(options, role)
    if kind is None:
        return Slots(references=references, method=method, role=role)
    if references:
        raise BadInput(f"the {role} conditioning has reference pictures (Kontext), which a '{kind.name}' model cannot "
                       "take; use FLUX.1 Kontext, or take the references out")
    if READY in taken:
        return Slots(ready=read_latents(options[READY], extra, READY, role), role=role)
    if missing := sorted(kind.keys - taken):
        raise BadInput(f"this is a '{kind.name}' model, which needs {kind.needs}, and the {role} conditioning has no "
                       f"{' and no '.join(map(repr, missing))}. Put {kind.nodes} between prompt and sampler, or load "
                       "FLUX.1 dev or schnell")
    picture = process_in(read_latents(options[PICTURE], FLUX_AE.z_channels, "picture", role))
    return Slots(picture, read_mask_of(options[MASK], role) if MASK in kind.keys else None, role=role)


def read_latents(latents: Any, channels: int, what: str, role: str) -> Tensor:
    """Latents of a conditioning, checked: `(B, channels, h, w)` in fp32."""
    if not isinstance(latents, Tensor) or latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
        found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise BadInput(f"the {role} conditioning's {what} is {found}, expected latents (batch, {channels}, height/8, "
                       "width/8); encode the picture with FLUX.1's autoencoder")
    if not torch.isfinite(latents).all():
        raise NotFinite(f"the {role} conditioning's {what} holds NaN or infinity; look at the picture it was encoded "
                        "from, and at the autoencoder's file")
    return latents.float().cpu()


def read_mask_of(mask: Any, role: str) -> Tensor:
    """A mask `(H, W)`, `(B, H, W)` or `(B, C, H, W)` -> `(B, 1, H, W)` in fp32, the mean over C."""
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4) or 0 in mask.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise BadInput(f"the {role} conditioning's mask is {shape}, expected (batch, 1, height, width)")
    if not torch.isfinite(mask).all():
        raise NotFinite(f"the {role} conditioning's mask holds NaN or infinity; look at the node it comes from")
    found: Tensor = mask.float().cpu()
    return found.mean(1, keepdim=True) if mask.ndim == 4 else found.reshape(-1, 1, *mask.shape[-2:])


def read_references(options: Mapping[str, Any], role: str) -> tuple[tuple[Tensor, ...], str]:
    """Reference pictures of an entry, in the model's scale, and the method that places them."""
    references = options.get(REFERENCES)
    if references is None or (isinstance(references, (list, tuple)) and not references):
        return (), METHODS[0]
    if not isinstance(references, (list, tuple)):
        raise BadInput(f"the {role} conditioning's '{REFERENCES}' is {type(references).__name__}, expected a list of "
                       "latents")
    method = options.get(METHOD) or METHODS[0]
    check_method(method)
    latents = [read_latents(one, FLUX_AE.z_channels, f"reference {i}", role) for i, one in enumerate(references, 1)]
    return tuple(process_in(one) for one in latents), method


def check_method(method: Any) -> None:
    """BadInput unless FLUX.1 can place references by it."""
    if method not in METHODS:
        raise BadInput(f"references by the method '{method}' need a model trained for it, which FLUX.1 is not; choose "
                       f"{', '.join(METHODS)}")


def reference_tokens(options: Mapping[str, Any]) -> int:
    """Image tokens that an entry of a conditioning adds to a picture's own, for estimates; unchecked."""
    references = options.get(REFERENCES)
    if not isinstance(references, (list, tuple)):
        return 0
    return sum(image_seq_len(*one.shape[-2:]) for one in references if isinstance(one, Tensor) and one.ndim >= 2)


def size_of(latents: Tensor) -> Size:
    return latents.shape[-2], latents.shape[-1]


def pixels(size: Size) -> str:
    """A latent's size as people name it."""
    return f"{size[1] * DOWNSCALE} x {size[0] * DOWNSCALE}"


def tell_odd(size: Size, what: str) -> None:
    if size[0] % PATCH or size[1] % PATCH:
        log.warning("%s %s pixels, no multiple of 16: as in ComfyUI, half a token at its right or lower edge shows the "
                    "opposite edge. Sides that are multiples of 16 avoid it", what, pixels(size))


def fitted(picture: Tensor, size: Size, role: str, *, of_mask: bool = False) -> Tensor:
    """`(B, C, h, w)` at another size, as ComfyUI does it: cut to the aspect about the centre, stretched bilinearly.

    Latents resized so are not what the resized picture encodes to, so it is told; and another aspect, of which
    something would be cut away, is a BadInput.
    """
    old = size_of(picture)
    if old == size:
        return picture
    aspect, wanted = old[1] / old[0], size[1] / size[0]
    if abs(aspect / wanted - 1) > SAME_ASPECT:
        found, into = (f"{side[1]} x {side[0]}" if of_mask else pixels(side) for side in (old, size))
        raise BadInput(f"the {role} conditioning's {'mask' if of_mask else 'picture'} is {found} pixels, the latent to "
                       f"sample {into}: another aspect. Take the latent that the conditioning node gives, or resize "
                       "picture and mask to the size to sample first")
    if not of_mask:
        log.warning("the %s conditioning's picture is %s pixels and is stretched to %s after its encoding, as ComfyUI "
                    "does; it is sharper if the picture is resized before", role, pixels(old), pixels(size))
    across = round((old[1] - old[1] * (wanted / aspect)) / 2) if aspect > wanted else 0
    down = round((old[0] - old[0] * (aspect / wanted)) / 2) if aspect < wanted else 0
    cut = picture[..., down:old[0] - down, across:old[1] - across]
    return F.interpolate(cut, size=size, mode="bilinear")


def places(size: Size, references: Sequence[Size], method: str) -> list[tuple[int, int, int]]:
    """(plane, first row, first column) in tokens of each reference beside a picture of latent size `size`.

    "offset": the second plane, right of or below what lies there already, whichever keeps the whole smaller, so that
    several count as one stitched picture; "index": a plane each; "uxo": the picture's plane, each below and right of
    the one before. The first reference by "offset" lies where BFL puts its only one.
    """
    found, height, width = [], 0, 0
    for plane, (h, w) in enumerate(references, start=1):
        if method == "index":
            found.append((plane, 0, 0))
        elif method == "uxo":
            found.append((0, tokens(size[0]) + tokens(height), tokens(size[1]) + tokens(width)))
            height, width = height + h, width + w
        else:
            top, left = (0, width) if h + height > w + width else (height, 0)
            found.append((1, tokens(top), tokens(left)))
            height, width = max(height, h + top), max(width, w + left)
    return found


def tokens(side: int) -> int:
    """Tokens along a side of latents."""
    return -(-side // PATCH)


def positions(batch: int, size: Size, references: Sequence[Size], method: str, *,
              device: torch.device | str = "cpu") -> list[Tensor]:
    """Positions `(batch, L, 3)` fp32 of the tokens of a picture of latent size `size` and of each of its references."""
    found = [image_ids(batch, *size, device=device)]
    for (h, w), place in zip(references, places(size, references, method), strict=True):
        corner = torch.tensor(place, dtype=torch.float32, device=device)
        found.append(image_ids(batch, h, w, device=device) + corner)
    return found
