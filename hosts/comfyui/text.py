"""A genuine CLIP of ComfyUI round the engine's text encoders."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor, nn

from ...engine.errors import BadInput, NotFinite
from ...engine.models.clip import ClipText
from ...engine.models.t5 import T5Encoder
from ...engine.specs import T5_XXL
from ...engine.text import TextEncoders, Token, encoder_files, find_tokenizer
from ...engine.text.tokenizer import T5_MIN_LENGTH
from ...engine.text.weighting import INVERSION
from ...engine.weights import load
from .. import Conditioning
from ..names import shown
from . import folders
from .layers import COMPUTE_TEXT_IN, adopt, plain_layers
from .packed import Clip as PackedClip
from .packed import HostPacked, packed_layers, scratch, weight_count

log = logging.getLogger(__name__)

Row = list[tuple[Any, ...]]  # (id, weight) or (id, weight, word)


class Tokenizer:
    """Both tokenizers, answering as the host's FluxTokenizer does."""

    def __init__(self, encoders: TextEncoders) -> None:
        self.encoders = encoders

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, *,
                              tokenizer_options: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, list[Row]]:
        """{"l": rows of 77, "t5xxl": one row}. Options of the host: `t5xxl_min_length` and `t5xxl_min_padding`.
        BadInput for a textual inversion whose file the host has."""
        refuse_inversions(text)
        tokens = self.encoders.tokenize(text)
        options = {} if tokenizer_options is None else tokenizer_options
        pad = Token(self.encoders.t5_tokenizer.pad)
        t5 = list(tokens.t5)
        while t5 and t5[-1] == pad:
            t5.pop()
        t5 += [pad] * options.get("t5xxl_min_padding", 0)
        t5 += [pad] * (options.get("t5xxl_min_length", T5_MIN_LENGTH) - len(t5))
        return {"l": [as_row(chunk, return_word_ids) for chunk in tokens.clip], "t5xxl": [as_row(t5, return_word_ids)]}

    def untokenize(self, row: Row) -> list[tuple[Any, str]]:
        """Each CLIP-L token with its text."""
        return [(token, self.encoders.clip_tokenizer.vocabulary.token(token[0])) for token in row]

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def refuse_inversions(text: str) -> None:
    """BadInput for `embedding:name` where the host has that file, since its own encoders would put it in; a name of no
    file is a word of the prompt, and is warned of as such."""
    asked = {name.rstrip(",").replace("\\", "/") for name in INVERSION.findall(text)} if isinstance(text, str) else ()
    found = sorted(asked & folders.inversions()) if asked else []
    if found:
        raise BadInput(f"the prompt asks for the textual inversion '{shown(found[0])}', which these text encoders "
                       "cannot read. Take 'embedding:...' out of the prompt, or load them with DualCLIPLoader")


def as_row(tokens: Sequence[Token], words: bool) -> Row:
    """Tuples as the host passes them on; every token counts as a word of its own."""
    return [(token.id, token.weight, i) if words else (token.id, token.weight) for i, token in enumerate(tokens)]


class EncoderPair(nn.Module):
    """Both encoders under the names that LoRA files for this host are written for."""

    def __init__(self, encoders: TextEncoders) -> None:
        super().__init__()
        with torch.device("meta"):
            clip = ClipText(encoders.clip.spec, plain_layers())
            t5 = T5Encoder(encoders.t5.spec, plain_layers())
        adopt(encoders.clip, clip)
        adopt(encoders.t5, t5)
        self.clip_l = nn.ModuleDict({"transformer": clip})
        self.t5xxl = nn.ModuleDict({"transformer": t5})
        self.dtypes = {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}
        self.encoders = replace(encoders, clip=clip, t5=t5)
        self.load_device: torch.device | None = None
        self.layer: int | None = None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """The host's options: the device to run on, where the host tells it, and the layer to stop at."""
        self.layer = options.get("layer", self.layer)
        self.load_device = options.get("execution_device", self.load_device)

    def reset_clip_options(self) -> None:
        self.layer = None

    def encode_token_weights(self, tokens: dict[str, list[Row]]) -> tuple[Tensor, Tensor]:
        """cond `(1, L, d_model)` and pooled `(1, hidden)`, fp32, where the host keeps such results."""
        encoders = replace(self.encoders, device=self.load_device)
        with stopped_at(self.layer, encoders.t5):
            cond = encoders.encode_t5(as_tokens(tokens["t5xxl"][0]))
        _, pooled = encoders.encode_clip([as_tokens(tokens["l"][0])])
        home = comfy.model_management.intermediate_device()
        return cond.to(home), pooled.to(home)

    def memory_estimation_function(self, tokens: Any, device: torch.device | None = None) -> int:
        """Bytes that newer hosts keep free for a run; activations of 512 tokens are small beside them."""
        return scratch(self, COMPUTE_TEXT_IN)

    def load_sd(self, sd: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Weights are there from the start; what the host hands over later is loaded by its full names."""
        missing, unexpected = self.load_state_dict(sd, strict=False)
        return list(missing), list(unexpected)


@contextlib.contextmanager
def stopped_at(layer: int | None, t5: T5Encoder) -> Iterator[None]:
    """T5 without the blocks behind `layer`, counted as Set CLIP Last Layer does: -1 is the last one.

    As in the host's own encoders the pooled vector of CLIP-L stays, and a layer that is not there means the last.
    """
    blocks = t5.encoder.block
    count = len(blocks) if layer is None or abs(layer) > len(blocks) else layer % len(blocks) + 1
    if count == len(blocks):
        yield
        return
    log.warning("Set CLIP Last Layer: T5 stops after %d of its %d layers; FLUX.1 was trained on all of them", count,
                len(blocks))
    t5.encoder.block = blocks[:count]
    try:
        yield
    finally:
        t5.encoder.block = blocks


def as_tokens(row: Row) -> list[Token]:
    return [Token(int(token[0]), float(token[1])) for token in row]


def make_clip(encoders: TextEncoders, paths: Sequence[str]) -> Any:
    """CLIP of the host. Weights stay in the dtypes they are stored in and are computed in fp32."""
    pair = EncoderPair(encoders)
    target = SimpleNamespace(params={}, clip=lambda **_: pair, tokenizer=lambda **_: Tokenizer(pair.encoders))
    # The dynamic patcher of newer hosts is not for models of ours; older ones have the static one only.
    static = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(comfy.sd.CLIP).parameters else {}
    kind = PackedClip if packed_layers(pair) else comfy.sd.CLIP
    clip = kind(target, parameters=weight_count(pair), **static)
    pair.load_device = clip.patcher.load_device
    clip.patcher.cached_patcher_init = (load_clip_patcher, (list(paths),))
    return clip


def load_clip_patcher(paths: Sequence[str], disable_dynamic: bool = False) -> Any:
    return load_clip([Path(path) for path in paths], ()).patcher


def load_clip(paths: Sequence[Path], beside: Sequence[Path]) -> Any:
    """CLIP from files that together hold CLIP-L and T5; `beside`: more folders to look for tokenizers in."""
    found = encoder_files(paths)
    clip = load(found["clip_l"], "clip_l", dtype=None, packed=HostPacked)
    t5 = load(found["t5"], "t5", dtype=None, packed=HostPacked)
    assert isinstance(clip, ClipText) and isinstance(t5, T5Encoder)
    encoders = TextEncoders(clip, find_tokenizer("clip_l", found["clip_l"], beside),
                            t5, find_tokenizer("t5", found["t5"], beside))
    return make_clip(encoders, [str(path) for path in paths])


def encode(clip: Any, clip_text: str, t5_text: str | None, guidance: float | None, t5_length: int | None
           ) -> Conditioning:
    """CONDITIONING by any CLIP of the host that holds FLUX.1's two encoders, ours or core's."""
    tokens = clip.tokenize(clip_text)
    if not isinstance(tokens, dict) or set(tokens) != {"l", "t5xxl"}:
        kinds = ", ".join(sorted(tokens)) if isinstance(tokens, dict) else type(tokens).__name__
        raise BadInput(f"this CLIP is of another model ({type(clip.cond_stage_model).__name__}: {kinds}), FLUX.1 needs "
                       "CLIP-L and T5 (l, t5xxl); load both with Load Text Encoders, or with type 'flux'")
    if t5_text is not None:
        tokens["t5xxl"] = clip.tokenize(t5_text)["t5xxl"]
    if t5_length is not None:
        tokens["t5xxl"] = [with_length(row, t5_length) for row in tokens["t5xxl"]]
    values = {} if guidance is None else {"guidance": guidance}
    conditioning: Conditioning = clip.encode_from_tokens_scheduled(tokens, add_dict=values)
    for cond, options in conditioning:
        for name, value in (("T5", cond), ("CLIP-L", options["pooled_output"])):
            if not bool(torch.isfinite(value).all()):
                raise NotFinite(f"the {name} text encoder gave NaN or infinity. Its file or a LoRA on it may be "
                                "damaged, or a weight in the prompt too large")
    return conditioning


def with_length(row: Row, length: int) -> Row:
    """A T5 row of exactly `length` tokens that ends with the end token, then padding."""
    eos, pad = T5_XXL.eos_token_id, T5_XXL.pad_token_id
    end = next((i for i, token in enumerate(row) if token[0] == eos), len(row))
    if end > length - 1:
        log.warning("the prompt has %d T5 tokens, %d fit the length %d; the rest is cut off", end, length - 1, length)
    kept = [*row[:min(end, length - 1)], (eos, 1.0)]
    return [*kept, *[(pad, 1.0)] * (length - len(kept))]
