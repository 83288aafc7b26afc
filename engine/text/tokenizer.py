"""The tokenizers of FLUX.1's two text encoders: weighted prompts to rows of token ids, by ComfyUI's rules.

Each weighted segment of a prompt is tokenised alone. CLIP cuts the result into chunks of 77 that begin with
`<|startoftext|>` and end with `<|endoftext|>`; T5 has one row that ends with `</s>`, padded to 256 and never cut
unless an exact length is asked for.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

from ..errors import BadInput, BadModelFile
from .vocabulary import CLIP_BOS, CLIP_EOS, Vocabulary
from .weighting import parse_weights

CLIP_LENGTH = 77
LONG_SEGMENT = 8
"""A segment of fewer tokens is kept in one chunk; a longer one may be cut."""
T5_MIN_LENGTH = 256
T5_LENGTHS = (128, 256, 512)
"""The exact lengths that nodes and commands offer; `T5Tokenizer.tokenize` takes any from 1 to T5_MAX_EXACT."""
T5_MAX_EXACT = 4096

logger = logging.getLogger(__name__)


class Token(NamedTuple):
    id: int
    weight: float = 1.0


class PromptTokenizer:
    """A vocabulary of the right kind with its special tokens."""

    role: str
    kind: str

    def __init__(self, vocabulary: Vocabulary) -> None:
        if vocabulary.kind != self.kind:
            raise BadModelFile(vocabulary.source, f"not the tokenizer of {self.role}", expected=self.kind,
                               found=vocabulary.kind)
        self.vocabulary = vocabulary

    @property
    def size(self) -> int:
        """The largest id + 1."""
        return self.vocabulary.size

    def ids(self, text: str) -> list[int]:
        """The ids of the text as it stands: no weights, no special tokens added."""
        return self.vocabulary.ids(text)

    def segments(self, prompt: str) -> list[list[Token]]:
        """One list of tokens per weighted segment; BadInput for what `parse_weights` refuses."""
        return [[Token(i, weight) for i in self.ids(text)] for text, weight in parse_weights(prompt)]

    def check_fits(self, rows: int) -> None:
        """BadModelFile unless the ids fit an embedding of `rows` rows, and fill at least half of it."""
        if self.size > rows or 2 * self.size < rows:
            raise BadModelFile(
                self.vocabulary.source, f"this tokenizer does not belong to the {self.role} encoder",
                expected=f"a vocabulary for an embedding of {rows} rows", found=f"{self.size} ids",
                advice="Take it away, or put the tokenizer that came with the encoder in its place")


class ClipTokenizer(PromptTokenizer):
    role = "clip_l"
    kind = "BPE"

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.bos, self.eos = vocabulary.id_of(CLIP_BOS), vocabulary.id_of(CLIP_EOS)

    def tokenize(self, prompt: str, length: int = CLIP_LENGTH) -> list[list[Token]]:
        """Chunks of exactly `length` tokens, at least one; padding is the end token, specials weigh 1."""
        chunks: list[list[Token]] = [[]]
        room = length - 2
        if room < 1:
            raise BadInput(f"CLIP needs room for at least 3 tokens, found {length}")
        for segment in self.segments(prompt):
            keep_whole = len(segment) < LONG_SEGMENT <= room
            while len(segment) > room - len(chunks[-1]):
                cut = 0 if keep_whole else room - len(chunks[-1])
                chunks[-1] += segment[:cut]
                segment = segment[cut:]
                chunks.append([])
            chunks[-1] += segment
        return [self._framed(chunk, length) for chunk in chunks]

    def _framed(self, chunk: list[Token], length: int) -> list[Token]:
        return [Token(self.bos), *chunk] + [Token(self.eos)] * (length - 1 - len(chunk))


class T5Tokenizer(PromptTokenizer):
    role = "t5"
    kind = "Unigram"

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self.eos, self.pad = vocabulary.id_of("</s>"), vocabulary.id_of("<pad>")

    def tokenize(self, prompt: str, length: int | None = None) -> list[Token]:
        """One row. length None: at least 256, never cut; else exactly `length`, cut before `</s>` with a warning."""
        if length is not None and (type(length) is not int or not 1 <= length <= T5_MAX_EXACT):
            raise BadInput(f"T5 length must be one of {', '.join(map(str, T5_LENGTHS))}, "
                           f"or None for at least {T5_MIN_LENGTH} without cutting; found {length!r}")
        tokens = [token for segment in self.segments(prompt) for token in segment]
        if length is not None and len(tokens) > length - 1:
            self._report_cut(tokens, length)
            tokens = tokens[:length - 1]
        row = [*tokens, Token(self.eos)]
        return row + [Token(self.pad)] * ((length or T5_MIN_LENGTH) - len(row))

    def _report_cut(self, tokens: list[Token], length: int) -> None:
        lost = "".join(self.vocabulary.token(token.id) for token in tokens[length - 1:]).replace("\u2581", " ").strip()
        shown = lost if len(lost) <= 300 else f"{lost[:300]}..."
        logger.warning("the prompt has %d T5 tokens, %d fit the length %d; cut off: %r",
                       len(tokens), length - 1, length, shown)


TOKENIZERS: dict[str, type[ClipTokenizer] | type[T5Tokenizer]] = {"clip_l": ClipTokenizer, "t5": T5Tokenizer}
