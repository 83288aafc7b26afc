"""Prompts to what the FLUX.1 transformer takes: T5 states and CLIP-L's pooled vector, by ComfyUI's rules."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from ..errors import BadModelFile, NotFinite
from ..models.clip import ClipText
from ..models.t5 import T5Encoder
from .tokenizer import ClipTokenizer, T5Tokenizer, Token


@dataclass(frozen=True)
class Tokens:
    """Ids and weights of a prompt: CLIP-L in chunks, T5 in one row."""

    clip: list[list[Token]]
    t5: list[Token]


@dataclass(frozen=True)
class TextEncoders:
    """CLIP-L and T5 with their tokenizers; refuses tokenizers that do not fit the encoders (BadModelFile).

    `device`: where they run, for hosts that keep weights elsewhere and bring them along layer by layer; None: where
    their weights are.
    """

    clip: ClipText
    clip_tokenizer: ClipTokenizer
    t5: T5Encoder
    t5_tokenizer: T5Tokenizer
    device: torch.device | None = None

    def __post_init__(self) -> None:
        self.clip_tokenizer.check_fits(self.clip.spec.vocab_size)
        self.t5_tokenizer.check_fits(self.t5.spec.vocab_size)
        _check_specials(self.clip_tokenizer, {"start": (self.clip_tokenizer.bos, self.clip.spec.bos_token_id),
                                              "end": (self.clip_tokenizer.eos, self.clip.spec.eos_token_id)})
        _check_specials(self.t5_tokenizer, {"pad": (self.t5_tokenizer.pad, self.t5.spec.pad_token_id),
                                            "end": (self.t5_tokenizer.eos, self.t5.spec.eos_token_id)})

    def tokenize(self, clip_text: str, t5_text: str | None = None, *, t5_length: int | None = None) -> Tokens:
        """The tokens `encode` uses; `t5_text` None means the same prompt for both."""
        return Tokens(self.clip_tokenizer.tokenize(clip_text, self.clip.spec.max_position_embeddings),
                      self.t5_tokenizer.tokenize(clip_text if t5_text is None else t5_text, t5_length))

    def encode(self, clip_text: str, t5_text: str | None = None, *,
               t5_length: int | None = None) -> tuple[Tensor, Tensor]:
        """cond `(1, L, d_model)` from T5 and pooled `(1, hidden)` from CLIP-L, both fp32 on the encoders' devices.

        t5_length: None pads to 256 and never cuts; an int (128, 256, 512) is exact. FLUX.1 takes only the pooled vector
        of CLIP-L, and that from the first chunk: later chunks and weights in the CLIP prompt have no effect, in ComfyUI
        too. Raises BadInput for prompts that cannot be read, NotFinite where an encoder yields NaN or infinity.
        """
        return self.encode_tokens(self.tokenize(clip_text, t5_text, t5_length=t5_length))

    def encode_tokens(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """`encode` of what `tokenize` gave. NotFinite."""
        cond = self.encode_t5(tokens.t5)
        _, pooled = self.encode_clip(tokens.clip[:1])
        for name, value in (("T5", cond), ("CLIP-L", pooled)):
            if not bool(torch.isfinite(value).all()):
                raise NotFinite(f"the {name} text encoder gave NaN or infinity. Its file may be damaged, its weights "
                                "too large for fp16 (use bf16 or fp32), or a weight in the prompt too large")
        return cond, pooled

    @torch.no_grad()
    def encode_t5(self, tokens: list[Token]) -> Tensor:
        """`(1, L, d_model)` fp32; weights move each state away from, or towards, that of the empty prompt."""
        rows = [tokens]
        if _weighted(tokens):
            rows.append([Token(self.t5_tokenizer.eos)] + [Token(self.t5_tokenizer.pad)] * (len(tokens) - 1))
        states = self.t5(_ids(rows, self.t5, self.device)).float()
        return _weigh(states[:1], states[-1:], rows[:1])

    @torch.no_grad()
    def encode_clip(self, chunks: list[list[Token]]) -> tuple[Tensor, Tensor]:
        """Weighted states of all chunks in a row `(1, chunks * 77, hidden)` and the first chunk's pooled, both fp32."""
        rows = list(chunks)
        if any(map(_weighted, chunks)):
            rows.append(self.clip_tokenizer.tokenize("", len(chunks[0]))[0])
        states, pooled = self.clip(_ids(rows, self.clip, self.device))
        states = _weigh(states[:len(chunks)].float(), states[-1:].float(), chunks)
        return states.flatten(0, 1)[None], pooled[:1].float()


def _check_specials(tokenizer: ClipTokenizer | T5Tokenizer, pairs: dict[str, tuple[int, int]]) -> None:
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise BadModelFile(tokenizer.vocabulary.source, f"this tokenizer does not belong to the {tokenizer.role} "
                               "encoder", field=f"id of the {name} token", expected=expected, found=found)


def _ids(rows: list[list[Token]], encoder: nn.Module, device: torch.device | None) -> Tensor:
    """`(B, L)` int64 where the encoder runs."""
    if device is None:
        device = next(chain(encoder.parameters(), encoder.buffers())).device
    return torch.tensor([[token.id for token in row] for row in rows], dtype=torch.long, device=device)


def _weighted(tokens: list[Token]) -> bool:
    return any(token.weight != 1.0 for token in tokens)


def _weigh(states: Tensor, empty: Tensor, rows: list[list[Token]]) -> Tensor:
    """states `(B, L, D)`, empty `(1, L, D)`: `empty + weight * (state - empty)` where the weight is not 1."""
    if not any(map(_weighted, rows)):
        return states
    weights = torch.tensor([[token.weight for token in row] for row in rows], dtype=states.dtype,
                           device=states.device)[..., None]
    return torch.where(weights == 1.0, states, (states - empty) * weights + empty)
