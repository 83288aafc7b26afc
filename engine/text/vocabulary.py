"""Vocabularies from their files: tokenizer.json, vocab.json + merges.txt, spiece.model, GGUF.

A `Vocabulary` turns text into ids with no special tokens round it; the rules of CLIP and T5 are in `tokenizer.py`.
To add a format: one function here that returns a `Vocabulary`, one line in `find.py`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from ..errors import BadModelFile
from ..weights import Checkpoint
from .ggml_vocab import ggml_kind, read_unigram, read_words
from .sentencepiece import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, CharsMap, Piece, SentencePieceModel, read_model

MAX_FILE_BYTES = 64 << 20
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
T5_SENTINELS = 100
"""T5 has `<extra_id_0>` ... `<extra_id_99>` after the pieces, last first (google-research/text-to-text-transfer)."""


class _Guard:
    """Turns what the tokenizers library raises on bad data into BadModelFile.

    It raises the bare `Exception` for malformed files and a `PanicException` (a BaseException) for worse; anything
    else, a KeyboardInterrupt above all, passes through.
    """

    def __init__(self, source: str | Path, problem: str) -> None:
        self.source, self.problem = source, problem

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None or error is None:
            return
        panic = kind.__name__ == "PanicException"
        if panic or kind is Exception or issubclass(kind, (ValueError, TypeError, OverflowError, KeyError)):
            raise BadModelFile(self.source, self.problem, found=str(error)[:200]) from error


def _as_is(text: str) -> str:
    return text


@dataclass(frozen=True)
class Vocabulary:
    """Text to ids, without special tokens; `normalize` runs before the library's own steps."""

    backend: Tokenizer = field(repr=False)
    kind: str                                   # "BPE" (CLIP) or "Unigram" (T5)
    source: str                                 # the file, for messages
    normalize: Callable[[str], str] = field(default=_as_is, repr=False)
    pieces: SentencePieceModel | None = field(default=None, repr=False)
    """What it was made from, where that is no tokenizer.json."""

    @property
    def size(self) -> int:
        """The largest id + 1."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def ids(self, text: str) -> list[int]:
        """The ids of `text` (valid Unicode); special tokens written out in the text count as such."""
        with _Guard(self.source, "the tokenizer fails on a prompt; its file is damaged"):
            ids: list[int] = self.backend.encode(self.normalize(text), add_special_tokens=False).ids
        return ids

    def token(self, index: int) -> str:
        return self.backend.id_to_token(index) or f"<{index}>"

    def id_of(self, token: str) -> int:
        found: int | None = self.backend.token_to_id(token)
        if found is None:
            raise BadModelFile(self.source, "the tokenizer lacks a special token", expected=repr(token),
                               advice="It is not the tokenizer of this encoder")
        return found


def read_bytes(path: Path) -> bytes:
    """A tokenizer file whole, bounded in size."""
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise BadModelFile(path, "too large for a tokenizer file", expected=f"at most {MAX_FILE_BYTES} bytes",
                           found=size)
    return path.read_bytes()


def read_json(data: bytes | str, source: str | Path) -> Any:
    """Parsed JSON; BadModelFile names `source` where it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadModelFile(source, "no valid JSON", found=str(error)[:200]) from error


def json_kind(tree: Any) -> str:
    """What kind of model a parsed tokenizer.json holds: "BPE", "Unigram" ..., or "unknown"."""
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        return "unknown"
    if "type" not in model:  # files of old versions of the library
        return "BPE" if "merges" in model else "unknown"
    return str(model["type"])


def from_tokenizer_json(tree: Any, source: str | Path) -> Vocabulary:
    """The tokenizers library's own file, parsed. Truncation, padding and BPE dropout in it are switched off."""
    kind = json_kind(tree)
    if kind not in ("BPE", "Unigram"):
        raise BadModelFile(source, "not a tokenizer of CLIP or T5", field="model.type", expected="BPE or Unigram",
                           found=kind)
    for charsmap in _charsmaps(tree.get("normalizer")):
        _check_charsmap(charsmap, source)
    tree = {**tree, "truncation": None, "padding": None, "model": {**tree["model"], "dropout": None}}
    if kind == "Unigram":
        del tree["model"]["dropout"]
    with _Guard(source, "damaged tokenizer.json"):
        backend = Tokenizer.from_str(json.dumps(tree))
    return _checked(Vocabulary(backend, kind, str(source)))


def _charsmaps(normalizer: Any) -> Iterator[Any]:
    if isinstance(normalizer, dict):
        if "precompiled_charsmap" in normalizer:
            yield normalizer["precompiled_charsmap"]
        parts = normalizer.get("normalizers")
        for part in parts if isinstance(parts, list) else ():
            yield from _charsmaps(part)


def _check_charsmap(encoded: Any, source: str | Path) -> None:
    if not encoded:
        return
    try:
        data = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise BadModelFile(source, "damaged character map: no base64", field="normalizer") from error
    CharsMap(data, source)


def _checked(vocabulary: Vocabulary) -> Vocabulary:
    if vocabulary.backend.get_vocab_size(with_added_tokens=False) == 0:
        raise BadModelFile(vocabulary.source, "an empty vocabulary")
    return vocabulary


def from_vocab_and_merges(vocab: bytes, merges: bytes, source: str | Path) -> Vocabulary:
    """CLIP's pair of files (openai/CLIP, simple_tokenizer.py; the word pattern and steps of its fast tokenizer)."""
    table = read_json(vocab, source)
    if not isinstance(table, dict) or not all(type(i) is int and 0 <= i < 1 << 24 for i in table.values()):
        raise BadModelFile(source, "no vocabulary", expected="a JSON object of token -> id")
    if len(set(table.values())) != len(table):
        raise BadModelFile(source, "damaged vocabulary: an id stands there twice")
    for token in (CLIP_BOS, CLIP_EOS):
        if token not in table:
            raise BadModelFile(source, "not CLIP's vocabulary: it lacks a special token", expected=repr(token))
    with _Guard(source, "vocab.json and merges.txt do not belong together"):
        backend = Tokenizer(models.BPE(vocab=table, merges=_merges(merges, source), unk_token=CLIP_EOS,
                                       continuing_subword_prefix="", end_of_word_suffix="</w>"))
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        backend.add_special_tokens([AddedToken(CLIP_BOS, normalized=True, special=True),
                                    AddedToken(CLIP_EOS, normalized=False, special=True)])
    return _checked(Vocabulary(backend, "BPE", str(source)))


def from_ggml(checkpoint: Checkpoint, source: str, rows: int | None = None) -> Vocabulary:
    """The arrays of a GGUF file's metadata: T5's pieces, or CLIP's tokens and merges."""
    if ggml_kind(checkpoint) == "Unigram":
        return from_pieces(read_unigram(checkpoint), source, rows)
    tokens = read_words(checkpoint, "tokens")
    table = {token: i for i, token in enumerate(tokens)}
    if len(table) != len(tokens):
        raise BadModelFile(source, "damaged vocabulary: a token stands there twice")
    merges = "\n".join(read_words(checkpoint, "merges"))
    return from_vocab_and_merges(json.dumps(table).encode(), merges.encode(), source)


def _merges(data: bytes, source: str | Path) -> list[tuple[str, str]]:
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BadModelFile(source, "merges.txt is no UTF-8 text") from error
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if not line or line.startswith("#version"):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise BadModelFile(source, "damaged merges.txt", field=f"line {number}", expected="two tokens",
                               found=repr(line[:80]))
        pairs.append((left, right))
    return pairs


def from_spiece(data: bytes, source: str | Path, rows: int | None = None) -> Vocabulary:
    """T5's SentencePiece model. rows: rows of the encoder's embedding; the sentinels are added where they fit in."""
    return from_pieces(read_model(data, source), source, rows)


def from_pieces(model: SentencePieceModel, source: str | Path, rows: int | None = None) -> Vocabulary:
    """The same from a model already read, whose file has or has not the sentinels as special tokens."""
    with _Guard(source, "damaged SentencePiece model"):
        unknown = next(i for i, piece in enumerate(model.pieces) if piece.kind == UNKNOWN)
        backend = Tokenizer(models.Unigram(_scores(model), unk_id=unknown, byte_fallback=model.byte_fallback))
        special = [piece.text for piece in model.pieces if piece.kind in (CONTROL, UNKNOWN)]
        room = rows is None or len(model.pieces) + T5_SENTINELS <= rows
        if room and not any(text.startswith("<extra_id_") for text in special):
            special += [f"<extra_id_{i}>" for i in reversed(range(T5_SENTINELS))]
        backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return _checked(Vocabulary(backend, "Unigram", str(source), _around(special, model.normalize), model))


def _around(special: list[str], normalize: Callable[[str], str]) -> Callable[[str], str]:
    """Normalise the text between special tokens written out in it, each stretch as a text of its own."""
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
    return lambda text: "".join(part if i % 2 else normalize(part) for i, part in enumerate(pattern.split(text)))


def _scores(model: SentencePieceModel) -> list[tuple[str, float]]:
    """The lattice scores of the reference (unigram_model.cc): symbols of the user always win, unused pieces never."""
    best = max((piece.score for piece in model.pieces if piece.kind == 1), default=0.0)

    def entry(index: int, piece: Piece) -> tuple[str, float]:
        if piece.kind == USER_DEFINED:
            return piece.text, len(piece.text) * best - 0.1
        if piece.kind == UNUSED:  # keeps its id under a text no prompt holds: it begins with a noncharacter
            return f"\U0010ffff{index}", piece.score
        return piece.text, piece.score

    return [entry(i, piece) for i, piece in enumerate(model.pieces)]
