"""Tokenizers as llama.cpp keeps them in a GGUF file: arrays of pieces, scores and kinds under `tokenizer.ggml.`.

Sources: docs/gguf.md of ggml-org/ggml (keys); convert_hf_to_gguf.py of ggml-org/llama.cpp, T5 (what is written). The
kinds are SentencePiece's. The vocabulary is filled up to the rows of the embedding with unused `[PAD<id>]`, so the
sentinels of T5, which its spiece.model does not have either, have no names there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import BadModelFile
from ..weights import Checkpoint
from .sentencepiece import BYTE, CONTROL, MAX_PIECES, NORMAL, UNUSED, CharsMap, Piece, SentencePieceModel, check_pieces

PREFIX = "tokenizer.ggml."
MODELS: Mapping[str, str] = {"t5": "Unigram", "gpt2": "BPE"}
"""`tokenizer.ggml.model` -> the kind of vocabulary; others belong to no text encoder of FLUX.1."""
INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
MAX_ARRAY_BYTES = 64 << 20
SPECIAL = {"eos_token_id": "</s>", "unknown_token_id": "<unk>", "padding_token_id": "<pad>"}
"""Numbers that must name these pieces, where they stand in the file."""
_PAD = re.compile(r"\[PAD\d+\]")
_SENTINEL = re.compile(r"<extra_id_\d+>")


def ggml_kind(checkpoint: Checkpoint) -> str | None:
    """What the file's own vocabulary is: "Unigram", "BPE", another writer's word for it, None where there is none."""
    model = checkpoint.metadata.get(PREFIX + "model")
    if model is None:
        return "unknown" if PREFIX + "tokens" in checkpoint.arrays else None
    return MODELS.get(model, model)


def read_unigram(checkpoint: Checkpoint) -> SentencePieceModel:
    """T5's vocabulary, `tokenizer.ggml.model` "t5"; BadModelFile names what is missing or damaged."""
    path = checkpoint.path
    words = read_words(checkpoint, "tokens")
    scores = _numbers(checkpoint, "scores", ("F32",), len(words))
    kinds = _numbers(checkpoint, "token_type", INTEGERS, len(words))
    pieces = []
    for i, (text, score, kind) in enumerate(zip(words, scores, kinds, strict=True)):
        if not math.isfinite(score) or not NORMAL <= kind <= BYTE:
            raise BadModelFile(path, "damaged tokenizer", field=f"{PREFIX}tokens[{i}]",
                               expected="a finite score, type 1-6", found=f"{text!r}, {score}, {kind}")
        # named sentinels are special tokens, however the writer of the file saw them
        pieces.append(Piece(text, score, CONTROL if _SENTINEL.fullmatch(text) else int(kind)))
    for key, word in SPECIAL.items():
        index = checkpoint.metadata.get(PREFIX + key)
        if index is not None and (not index.isdecimal() or int(index) >= len(words) or words[int(index)] != word):
            raise BadModelFile(path, "damaged tokenizer", field=PREFIX + key, expected=f"the number of {word!r}",
                               found=index)
    while pieces and pieces[-1].kind == UNUSED and _PAD.fullmatch(pieces[-1].text):
        pieces.pop()
    check_pieces(pieces, path)
    return SentencePieceModel(tuple(pieces), _charsmap(checkpoint),
                              add_dummy_prefix=_flag(checkpoint, "add_space_prefix"),
                              remove_extra_whitespaces=_flag(checkpoint, "remove_extra_whitespaces"),
                              byte_fallback=any(piece.kind == BYTE for piece in pieces))


def read_words(checkpoint: Checkpoint, key: str) -> list[str]:
    """An array of texts, such as `tokens` and `merges`."""
    words = _array(checkpoint, key, ("STRING",))
    assert isinstance(words, list)
    broken = next((i for i, word in enumerate(words) if not word or "\ufffd" in word), None)
    if broken is not None:
        raise BadModelFile(checkpoint.path, "damaged tokenizer", field=f"{PREFIX}{key}[{broken}]",
                           expected="a text in UTF-8", found=repr(words[broken]))
    return words


def _array(checkpoint: Checkpoint, key: str, kinds: tuple[str, ...]) -> list[str] | Tensor:
    key = PREFIX + key
    expected = f"an array of {' or '.join(kinds)}, at most {MAX_ARRAY_BYTES} bytes"
    array = checkpoint.arrays.get(key)
    if array is None:
        raise BadModelFile(checkpoint.path, "damaged tokenizer", field=key, expected=expected,
                           found="a single value" if key in checkpoint.metadata else "nothing")
    stored = array.stored
    if stored.kind not in kinds or stored.length > MAX_PIECES or stored.nbytes > MAX_ARRAY_BYTES:
        raise BadModelFile(checkpoint.path, "damaged tokenizer", field=key, expected=expected,
                           found=f"{stored.length} of {stored.kind}, {stored.nbytes} bytes")
    return array.read()


def _numbers(checkpoint: Checkpoint, key: str, kinds: tuple[str, ...], count: int) -> list[float]:
    found = _array(checkpoint, key, kinds)
    if len(found) != count:
        raise BadModelFile(checkpoint.path, "damaged tokenizer", field=PREFIX + key,
                           expected=f"{count} numbers, one per token", found=len(found))
    assert isinstance(found, Tensor)
    numbers: list[float] = found.tolist()
    return numbers


def _charsmap(checkpoint: Checkpoint) -> CharsMap | None:
    key = "precompiled_charsmap"
    if PREFIX + key not in checkpoint.arrays and PREFIX + key not in checkpoint.metadata:
        return None
    found = _array(checkpoint, key, ("U8", "I8"))
    assert isinstance(found, Tensor)
    return CharsMap(found.numpy().tobytes(), checkpoint.path) if len(found) else None


def _flag(checkpoint: Checkpoint, key: str) -> bool:
    """T5 has both, so that is what holds where the file does not say."""
    found = checkpoint.metadata.get(PREFIX + key, "true")
    if found not in ("true", "false"):
        raise BadModelFile(checkpoint.path, "damaged tokenizer", field=PREFIX + key, expected="true or false",
                           found=repr(found))
    return found == "true"
