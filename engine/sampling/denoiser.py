"""The denoiser: a flow transformer with prompts, as a function from (noisy latents, sigma) to clean latents.

Takes ComfyUI's CONDITIONING, a list of `[cond (B, L, d), {"pooled_output": (B, d), "guidance": float, ...}]`, and does
with it what ComfyUI's own sampling does. Knows nothing of schedules' names, solvers or noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..conditioning.attention import Grid, grid_of
from ..errors import BadInput, NotFinite
from ..models.modulation import Inputs as Modulating
from ..models.modulation import ModulationTable, note
from ..specs import DEFAULT_GUIDANCE, FluxSpec
from .latents import image_ids, patchify, text_ids, unpatchify
from .masks import AttentionMask, read_mask
from .sigmas import FlowTable, table_for
from .slots import CHANNEL_KEYS, NOTHING, SEQUENCE_KEYS, Slots, read_slots, reference_tokens

log = logging.getLogger(__name__)

Conditioning = Sequence[Sequence[Any]]


class Inputs(NamedTuple):
    """What does not change from step to step: the transformer's inputs, and what stands beside the latents in img."""

    img_ids: Tensor
    txt: Tensor
    txt_ids: Tensor
    y: Tensor
    guidance: Tensor | None
    attn_mask: Tensor | None
    channels: Tensor | None     # (B, L, C), behind the channels of the latents' tokens
    sequence: Tensor | None     # (B, L_ref, 64), behind the latents' tokens


UNDERSTOOD = {"pooled_output", "guidance", "strength", "start_percent", "end_percent", "attention_mask",
              "attention_mask_img_shape"} | CHANNEL_KEYS | SEQUENCE_KEYS
HARMLESS = {  # what text encoders and core nodes leave behind and no FLUX.1 model reads
    "width", "height", "crop_w", "crop_h", "target_width", "target_height", "aesthetic_score", "prompt_type", "uuid",
    "cross_attn", "model_conds", "clip_start_percent", "clip_end_percent", "add_dict", "unpooled_output",
}
OTHER_MODELS = {"concat_image"}  # read by models of other families only; ComfyUI drops it too


@dataclass(frozen=True)
class Prompt:
    """One entry of a conditioning, checked: active while sigma_end <= sigma <= sigma_start."""

    txt: Tensor                 # (B or 1, L, context_in_dim)
    y: Tensor                   # (B or 1, vec_in_dim)
    guidance: float | None = DEFAULT_GUIDANCE
    strength: float = 1.0
    sigma_start: float = 1.0
    sigma_end: float = 0.0
    mask: AttentionMask | None = None
    slots: Slots = NOTHING

    @property
    def always(self) -> bool:
        return self.sigma_start >= 1 and self.sigma_end <= 0


def read_conditioning(conditioning: Conditioning, spec: FluxSpec, table: FlowTable, role: str = "positive"
                      ) -> list[Prompt]:
    """Check a conditioning against the model. `role` names it in errors.

    Raises BadInput for shapes that are not this model's, entries this engine does not act on, and an empty list;
    NotFinite for NaN or infinity.
    """
    if not conditioning:
        raise BadInput(f"the {role} conditioning is empty; connect an encoded prompt (an empty text is allowed)")
    return [_read_entry(cond, options, spec, table, role) for cond, options in conditioning]


def _read_entry(cond: Tensor, options: Mapping[str, Any], spec: FluxSpec, table: FlowTable, role: str) -> Prompt:
    unknown = sorted(key for key, value in options.items()
                     if value is not None and key not in UNDERSTOOD | HARMLESS | OTHER_MODELS)
    if unknown:
        raise BadInput(f"the {role} conditioning carries {', '.join(map(repr, unknown))}, which this sampler does not "
                       "act on; remove the node that added it")
    dropped = sorted(OTHER_MODELS & {key for key, value in options.items() if value is not None})
    if dropped:
        log.warning("%s conditioning: %s ignored, because this model (%s) has no input for it",
                    role, ", ".join(dropped), spec.variant)
    pooled = options.get("pooled_output")
    if pooled is None:
        raise BadInput(f"the {role} conditioning has no pooled CLIP-L vector ('pooled_output'); encode the prompt with "
                       "both CLIP-L and T5, or with type 'flux'")
    for name, tensor, dims, width, encoder in (("text", cond, 3, spec.context_in_dim, "T5"),
                                               ("pooled", pooled, 2, spec.vec_in_dim, "CLIP-L")):
        if tensor.ndim != dims or tensor.shape[-1] != width or 0 in tensor.shape:
            raise BadInput(f"the {role} conditioning's {name} part has shape {tuple(tensor.shape)}, this model needs a "
                           f"last side of {width} ({encoder}); encode the prompt with FLUX.1's text encoders")
        if not torch.isfinite(tensor).all():
            raise NotFinite(f"the {role} conditioning's {name} part holds NaN or infinity; check the {encoder} file, "
                            "and run the text encoders in bf16 or fp32 if they run in fp16")
    return Prompt(txt=cond, y=pooled, guidance=_guidance(options, spec, role), strength=_strength(options, role),
                  sigma_start=_as_fp32(table.percent_to_sigma(options.get("start_percent", 0.0))),
                  sigma_end=_as_fp32(table.percent_to_sigma(options.get("end_percent", 1.0))),
                  mask=read_mask(options, cond.shape[1], role, reference_tokens(options)),
                  slots=read_slots(options, spec, role))


def _as_fp32(value: float) -> float:
    """Rounded as sigmas are, so that a step exactly on a border counts as inside."""
    return float(torch.tensor(value, dtype=torch.float32))


def _guidance(options: Mapping[str, Any], spec: FluxSpec, role: str) -> float | None:
    """None leaves the embedding out: an explicit None in the conditioning, or a model without it."""
    guidance = options.get("guidance", DEFAULT_GUIDANCE)
    if guidance is None or not spec.guidance_embed:
        return None
    if not math.isfinite(guidance):
        raise BadInput(f"guidance {guidance} in the {role} conditioning is not a finite number; usual values are 1..10")
    return float(guidance)


def _strength(options: Mapping[str, Any], role: str) -> float:
    strength = float(options.get("strength", 1.0))
    if not math.isfinite(strength) or strength <= 0:
        raise BadInput(f"strength {strength} in the {role} conditioning must be above 0")
    return strength


def repeat_to_batch(tensor: Tensor, batch: int) -> Tensor:
    """Bring the first axis to `batch`: cut when longer, repeated in order (0, 1, 0, 1, ...) when shorter."""
    if tensor.shape[0] < batch:
        repeats = math.ceil(batch / tensor.shape[0])
        tensor = tensor.repeat(repeats, *[1] * (tensor.ndim - 1))
    return tensor[:batch]


class Denoiser:
    """`denoiser(x, sigma)`: x `(B, 16, h, w)` fp32 and sigma `(B,)` -> the model's estimate of the clean latents.

    denoised = x - sigma * velocity, in fp32 whatever the compute dtype. With `cfg` other than 1 the negative prompt
    runs too, on its own with its own token count, and denoised = u + (c - u) * cfg wherever `cfg_window[0]` <= sigma
    <= `cfg_window[1]` (sigmas, 0..1); outside the window the positive alone counts. Several entries of one
    conditioning are averaged by their strengths. `dtype` is the compute dtype, by default that of the model's
    weights; sigma reaches the model in fp32, guidance as the model rounds it. Pictures that a conditioning carries
    (`slots`) stand beside x for the model; what it says of them is left out.
    """

    def __init__(self, flux: nn.Module, positive: Conditioning, negative: Conditioning | None = None, cfg: float = 1.0,
                 cfg_window: tuple[float, float] = (0.0, 1.0), *, dtype: torch.dtype | None = None,
                 table: FlowTable | None = None) -> None:
        spec: FluxSpec = flux.spec  # type: ignore[assignment]
        if not math.isfinite(cfg):
            raise BadInput(f"cfg {cfg} is not a finite number; 1 switches the negative prompt off")
        if not 0 <= cfg_window[0] <= cfg_window[1]:
            raise BadInput(f"cfg window {cfg_window} must be two rising sigmas, 0..1")
        table = table or table_for(spec)
        self.flux, self.spec = flux, spec
        self.cfg, self.cfg_window = cfg, (_as_fp32(cfg_window[0]), _as_fp32(cfg_window[1]))
        self.positive = read_conditioning(positive, spec, table)
        self.negative: list[Prompt] = []
        if not math.isclose(cfg, 1.0):
            if negative is None:
                raise BadInput(f"cfg {cfg} needs a negative prompt; connect one (an empty text is allowed), "
                               "or set cfg to 1")
            self.negative = read_conditioning(negative, spec, table, "negative")
        weights = next(flux.parameters())
        self.device = weights.device
        self.dtype = dtype or weights.dtype
        if not self.dtype.is_floating_point:
            raise BadInput(f"a model with packed weights ({self.dtype}) does not tell its compute dtype; name one")
        self.on_pass: Callable[[int], None] | None = None
        """Called before each pass through the transformer with its number of text tokens."""
        self._kept: dict[tuple[object, ...], Inputs] = {}
        self._timed = self.cfg_window[0] > 0 or self.cfg_window[1] < 1 or not all(
            prompt.always for prompt in (*self.positive, *self.negative))

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        # Reading sigma back makes a device wait for the host, so only prompts and windows that need it pay for it.
        level = float(sigma[0]) if self._timed else 0.5
        denoised = self._mean(self.positive, x, sigma, level, "positive")
        if self.negative and self.cfg_window[0] <= level <= self.cfg_window[1]:
            unguided = self._mean(self.negative, x, sigma, level, "negative")
            denoised = unguided + (denoised - unguided) * self.cfg
        return denoised

    def prepare(self, x: Tensor, sigmas: Tensor) -> None:
        """Fills the transformer's table of modulations, if it has one, for a run on latents like x over these sigmas.

        Not needed, since a step fills in what it misses; but so each modulating layer comes to the device once.
        """
        table: ModulationTable | None = getattr(self.flux, "modulations", None)
        if table is None:
            return
        found: list[Modulating] = []
        for level in sigmas[:-1].tolist():
            sigma = torch.full((x.shape[0],), level, dtype=torch.float32)
            guided = bool(self.negative) and self.cfg_window[0] <= level <= self.cfg_window[1]
            for prompt in (*self.positive, *(self.negative if guided else ())):
                if prompt.sigma_end <= level <= prompt.sigma_start:
                    given = self._inputs(prompt, x)
                    found.append((note(sigma.to(x.device), sigma), given.y, given.guidance))
        table.prepare(found, self.dtype)

    def _mean(self, prompts: list[Prompt], x: Tensor, sigma: Tensor, level: float, role: str) -> Tensor:
        active = [prompt for prompt in prompts if prompt.sigma_end <= level <= prompt.sigma_start]
        if not active:
            raise BadInput(f"no part of the {role} conditioning is active at sigma {level:.4f}; "
                           "widen its start and end")
        if len(active) == 1:
            return self._denoise(active[0], x, sigma)
        total = sum(prompt.strength for prompt in active)
        parts = [self._denoise(prompt, x, sigma) * (prompt.strength / total) for prompt in active]
        return torch.stack(parts).sum(0)

    def _denoise(self, prompt: Prompt, x: Tensor, sigma: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        given = self._inputs(prompt, x)
        img = patchify(x).to(self.dtype)
        tokens = img.shape[1]
        if given.channels is not None:
            img = torch.cat((img, given.channels), dim=2)
        if given.sequence is not None:
            img = torch.cat((img, given.sequence), dim=1)
        if self.on_pass is not None:
            self.on_pass(given.txt.shape[1])
        velocity: Tensor = self.flux(img, given.img_ids, given.txt, given.txt_ids, sigma.float(), given.y,
                                     given.guidance, attn_mask=given.attn_mask)[:, :tokens]
        return x - unpatchify(velocity, height, width).to(x.dtype) * sigma.to(x.dtype).view(-1, 1, 1, 1)

    def _inputs(self, prompt: Prompt, x: Tensor) -> Inputs:
        """What stays the same over all steps, kept on the device: copying it there each step would stall it."""
        batch, _, height, width = x.shape
        key = (id(prompt), batch, height, width, x.device)
        if key not in self._kept:
            txt = repeat_to_batch(prompt.txt, batch).to(x.device, self.dtype)
            y = repeat_to_batch(prompt.y, batch)
            guidance = None if prompt.guidance is None else torch.full((batch,), prompt.guidance)
            img_ids = image_ids(batch, height, width)
            channels, sequence = prompt.slots.channels(x), None
            if (references := prompt.slots.sequence(x)) is not None:
                sequence = references[0].to(x.device, self.dtype)
                img_ids = torch.cat((img_ids, references[1]), dim=1)
            self._kept[key] = Inputs(
                img_ids.to(x.device), txt, text_ids(batch, txt.shape[1], device=x.device),
                note(y.to(x.device, self.dtype), y),
                None if guidance is None else note(guidance.to(x.device), guidance),
                self._mask(prompt, batch, grid_of(x), x.device),
                None if channels is None else channels.to(x.device, self.dtype), sequence)
        return self._kept[key]

    def _mask(self, prompt: Prompt, batch: int, grid: Grid, device: torch.device) -> Tensor | None:
        if prompt.mask is None:
            return None
        bias = prompt.mask.fitted(grid, [grid_of(latents) for latents in prompt.slots.references])
        return (bias if len(bias) == 1 else repeat_to_batch(bias, batch)).to(device, self.dtype)
