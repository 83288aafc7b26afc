"""What trainers write before and after the name of a layer: one row each, and the short interpreter of the rows.

A key is prefix + name in a vocabulary + suffix. The table of all prefixes and names is built once; keys are looked up
and never taken apart at underscores, which cannot be told from dots. To add a spelling: one row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from . import vocabulary as names
from .vocabulary import Destination, Vocabulary

DOTTED, FLAT = ".", "_"


@dataclass(frozen=True)
class Dialect:
    """`joiner`: what stands between the words of a name; `endings`: what some writers add to it."""

    name: str
    vocabulary: Callable[[], Vocabulary]
    prefixes: tuple[str, ...]
    joiner: str = DOTTED
    endings: tuple[str, ...] = ("",)


DIALECTS: tuple[Dialect, ...] = (
    Dialect("kohya", names.bfl, ("lora_unet_", "oft_unet_"), FLAT),
    Dialect("PEFT", names.diffusers, ("transformer.",)),
    Dialect("PEFT without prefix", names.diffusers, ("",)),
    Dialect("PEFT of a wrapped model", names.diffusers, (
        "transformer.base_model.model.", "base_model.model.", "base_model.model.transformer.", "diffusion_model.",
        "unet.", "model.")),
    Dialect("kohya with diffusers names", names.diffusers, ("lora_unet_",), FLAT, ("", "_")),
    Dialect("OneTrainer", names.diffusers, ("lora_transformer_",), FLAT, ("", "_")),
    Dialect("OneTrainer", names.bfl, ("lora_transformer_",), FLAT),
    Dialect("LyCORIS", names.diffusers, ("lycoris_", "lycoris_transformer_"), FLAT, ("", "_")),
    Dialect("LyCORIS", names.bfl, ("lycoris_",), FLAT),
    Dialect("ComfyUI", names.bfl, ("diffusion_model.", "model.diffusion_model.", "unet.", "model.")),
    Dialect("BFL", names.bfl, ("", "transformer.")),
    Dialect("fal", names.bfl, (
        "base_model.model.", "base_model.model.transformer.", "base_model.model.diffusion_model.",
        "transformer.base_model.model.", "diffusion_model.base_model.model.")),
    Dialect("musubi", names.bfl_half_flat, ("diffusion_model.", "", "transformer.")),
    Dialect("OneTrainer OMI", names.numbered_parts, ("transformer.", "diffusion_model.", "")),
    Dialect("OneTrainer OMI", names.numbered_parts, ("lora_transformer_", "lora_unet_"), FLAT),
    Dialect("XLabs", names.xlabs, ("", "diffusion_model.", "transformer.", "model.diffusion_model.")),
    Dialect("text encoder, flat", names.clip_l, ("lora_te1_", "lora_te_", "lora_clip_l_", "lycoris_te1_"), FLAT),
    Dialect("text encoder", names.clip_l, (
        "text_encoder.", "text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "lora_te1.", "te1.",
        "clip_l.transformer.", "clip_l.", "text_encoder.base_model.model.")),
    Dialect("text encoder, flat", names.t5, ("lora_te2_", "lora_te3_", "lora_t5xxl_", "lycoris_te2_"), FLAT),
    Dialect("text encoder", names.t5, (
        "text_encoder_2.", "text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "lora_te2.", "lora_te3.",
        "te2.", "te3.", "t5xxl.transformer.", "t5xxl.", "text_encoder_2.base_model.model.")),
)


@dataclass(frozen=True, slots=True)
class Suffix:
    """End of a key and what the tensor is for (`algorithms`).

    `beside`: only where a key with this other suffix is there too; `norms`: only on norms.
    """

    text: str
    role: str
    beside: str | None = None
    norms: bool = False


def _suffixes(role: str, *texts: str) -> tuple[Suffix, ...]:
    return tuple(Suffix(text, role) for text in texts)


ADAPTER_NAMES = ("", ".default", ".default_0")
"""PEFT puts the name of the adapter inside the key."""
_SAME = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "hada_w1_a", "hada_w1_b",
         "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "rescale", "on_input", "reshape_weight")
SUFFIXES: tuple[Suffix, ...] = (
    *_suffixes("down", ".lora_down.weight", ".lora_linear_layer.down.weight", ".lora.down.weight", "_lora.down.weight",
               ".down.weight", ".lora_A", ".lora_down", *(f".lora_A{name}.weight" for name in ADAPTER_NAMES)),
    *_suffixes("up", ".lora_up.weight", ".lora_linear_layer.up.weight", ".lora.up.weight", "_lora.up.weight",
               ".up.weight", ".lora_B", ".lora_up", *(f".lora_B{name}.weight" for name in ADAPTER_NAMES)),
    *_suffixes("mid", ".lora_mid.weight"),
    *_suffixes("diff_b", ".diff_b", ".b_norm", ".bias.diff"),
    *_suffixes("up_b", ".lora_up.bias", *(f".lora_B{name}.bias" for name in ADAPTER_NAMES)),
    *_suffixes("alpha", ".alpha", ".lora_alpha", ".lora.alpha", ".network_alpha"),
    *_suffixes("magnitude", ".dora_scale", *(f".lora_magnitude_vector{name}{end}" for name in ADAPTER_NAMES
                                             for end in ("", ".weight"))),
    *(Suffix(f".{role}", role) for role in _SAME),
    *(Suffix(f".{role}.weight", f"glora_{role}") for role in ("a1", "a2", "b1", "b2")),
    *_suffixes("oft", ".oft_blocks", ".oft_diag"),
    *(Suffix(f".oft_blocks.{part}", f"oft_{part}") for part in range(4)),
    *_suffixes("oft_packed", *(f".oft_R{name}.weight" for name in ADAPTER_NAMES)),
    *_suffixes("oft_scaled", *(f".oft_R{name}.scaled_oft" for name in ADAPTER_NAMES)),
    *_suffixes("diff", ".diff", ".w_norm", ".weight.diff", ".scale.diff"),
    *_suffixes("set", ".set_weight", ".weight.set_weight", ".scale.set_weight"),
    *_suffixes("set_b", ".bias.set_weight"),
    Suffix(".scale", "set", norms=True),
    Suffix(".weight", "set", norms=True),
    Suffix(".weight", "ia3", beside=".on_input"),
)
_BY_LENGTH = sorted(SUFFIXES, key=lambda suffix: -len(suffix.text))

SKIPPED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"^bundle_emb\.(.+)\.(?:clip_l|t5|clip_g)(?:_out)?$"),
     "textual inversion of a token, kept inside the LoRA; save it as an embedding to use it"),
    (re.compile(r"(?:^|[._])text_projection(?:[._]|$)"), "FLUX.1 takes CLIP-L's state without its projection"),
    (re.compile(r"(?:^|\.)(?:logit_scale|position_ids)$"), "no weight of FLUX.1"),
)
"""Keys that are understood and go nowhere, with the reason."""


@dataclass(frozen=True, slots=True)
class Place:
    """A key that was found: the layer's `stem` in the file, the dialect it is written in, what the tensor is for."""

    destination: Destination
    dialect: str
    stem: str
    role: str


def spelled(dialect: Dialect, prefix: str, name: str, ending: str) -> str:
    return prefix + (name if dialect.joiner == DOTTED else name.replace(DOTTED, dialect.joiner)) + ending


@lru_cache(maxsize=1)
def stems() -> Mapping[str, tuple[Destination, str]]:
    """Every known spelling of every layer, with the name of its dialect; where two dialects agree, of the first."""
    found: dict[str, tuple[Destination, str]] = {}
    for dialect in DIALECTS:
        for name, destination in dialect.vocabulary().items():
            for prefix in dialect.prefixes:
                for ending in dialect.endings:
                    found.setdefault(spelled(dialect, prefix, name, ending), (destination, dialect.name))
    return found


def candidates(key: str, keys: Collection[str]) -> Iterable[Place]:
    """Every way to read the key; the tests prove that there is never more than one."""
    table = stems()
    for suffix in _BY_LENGTH:
        stem = key[:-len(suffix.text)]
        found = table.get(stem) if key.endswith(suffix.text) else None
        if found is None or (suffix.beside is not None and stem + suffix.beside not in keys):
            continue
        if suffix.norms and not found[0].module.endswith("_norm"):
            continue
        yield Place(found[0], found[1], stem, suffix.role)


def place(key: str, keys: Collection[str]) -> Place | None:
    """Where the tensor `key` belongs, None if no row knows it. `keys`: all keys of the file."""
    return next(iter(candidates(key, keys)), None)


def skipped(key: str) -> str | None:
    """Why a key that is understood goes nowhere."""
    return next((reason for pattern, reason in SKIPPED if pattern.search(key)), None)
