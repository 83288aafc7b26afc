"""The tokenizer of a text encoder goes along, so that the new file is of use alone.

It is the one that `load` would find: in the source, beside it, where hosts keep theirs. GGUF gets a tokenizer.json as
its text, and T5's pieces as llama.cpp writes them; safetensors the text, or a SentencePiece model as a tensor.
Sources: convert_hf_to_gguf.py of ggml-org/llama.cpp (T5); sentencepiece_model.proto of google/sentencepiece.
"""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadModelFile, MissingFile
from ..text import find_tokenizer
from ..text.sentencepiece import UNIGRAM, SentencePieceModel
from ..weights import Checkpoint
from .recipes import Value
from .writers import Array, numbers, strings

ENCODERS = ("t5", "clip_l")

PREFIX, GGML = "tokenizer.", "tokenizer.ggml."
JSON_KEY = "tokenizer.json"
"""Where files of ours keep a whole tokenizer of Hugging Face."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Kinds of tokens (llama.h, `llama_token_type`)."""
UNUSED_SCORE = -10000.0
SPECIAL = {"eos_token_id": "</s>", "unknown_token_id": "<unk>", "padding_token_id": "<pad>"}

LARGEST = 2**32 - 1
"""Of the whole numbers that are written."""

SPIECE_TENSOR = "spiece_model"

Metadata = dict[str, Value | Array]


@dataclass(frozen=True)
class Words:
    """What goes along: the text of a tokenizer.json, or SentencePiece's pieces; `note` where there is neither."""

    text: str | None = None
    pieces: SentencePieceModel | None = None
    note: str = ""


def find(checkpoint: Checkpoint, role: str, folders: Sequence[str | os.PathLike[str]]) -> Words:
    """The tokenizer of the encoder, from the places where loading it looks, `folders` among them."""
    if role not in ENCODERS:
        return Words()
    try:
        vocabulary = find_tokenizer(role, checkpoint, folders).vocabulary
    except (MissingFile, BadModelFile) as error:
        return Words(note=f"no tokenizer goes along, and the new file needs one beside it: {error}")
    if vocabulary.pieces is not None:
        return Words(pieces=vocabulary.pieces)
    return Words(vocabulary.backend.to_str())


def for_gguf(checkpoint: Checkpoint, role: str, words: Words, rows: int) -> Metadata:
    """The entries under `tokenizer.` for an encoder whose embedding has `rows`."""
    if role not in ENCODERS:
        return {}
    found = from_source(checkpoint, role)
    if words.text is not None:
        return {**found, **from_json(words.text, rows, checkpoint.path)}
    return found if words.pieces is None or f"{GGML}tokens" in found else {**found, **from_pieces(words.pieces, rows)}


def from_source(checkpoint: Checkpoint, role: str) -> Metadata:
    """All entries of the source under `tokenizer.`, also when they were written for a part of an all-in-one file."""
    found: Metadata = {}
    for key, value in sorted(checkpoint.metadata.items(), key=lambda item: item[0].startswith(role)):
        bare = key.removeprefix(f"{role}.")
        if bare.startswith(PREFIX):
            found[bare] = _typed(bare, value)
    for key, array in checkpoint.arrays.items():
        if key.startswith(PREFIX):
            raw = array.file.view(array.stored.offset, array.stored.nbytes).numpy().tobytes()
            found[key] = Array(array.stored.kind, array.stored.length, raw)
    return found


def _typed(key: str, value: str) -> Value:
    """Metadata is read as text: flags and numbers become themselves again."""
    if value in ("true", "false"):
        return value == "true"
    number = key.endswith(("_id", "_count")) and value.isdecimal() and len(value) <= len(str(LARGEST))
    return int(value) if number and int(value) <= LARGEST else value


def from_json(text: str, rows: int, path: Path) -> Metadata:
    """The text of a tokenizer.json, and, if it is of the Unigram kind (T5), its tokens for an embedding of `rows`."""
    try:
        return {JSON_KEY: text, **_unigram(json.loads(text), rows)}
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, struct.error) as error:
        raise BadModelFile(path, "its tokenizer cannot be read", field=JSON_KEY, found=str(error)[:200],
                           advice="Take it out of the metadata, or put a good one there") from error


def _unigram(tree: Any, rows: int) -> Metadata:
    model = tree["model"]
    if model.get("type") != "Unigram":
        return {}
    pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
    if len(pieces) > rows:
        raise ValueError(f"{len(pieces)} tokens for an embedding of {rows} rows")
    kinds = [NORMAL] * len(pieces) + [UNUSED] * (rows - len(pieces))
    pieces += [(f"[PAD{i}]", UNUSED_SCORE) for i in range(len(pieces), rows)]
    for row in tree.get("added_tokens") or ():
        index = int(row["id"])
        pieces[index] = (str(row["content"]), pieces[index][1])
        kinds[index] = CONTROL if row.get("special") else USER_DEFINED
    if model.get("unk_id") is not None:
        kinds[int(model["unk_id"])] = UNKNOWN
    return _arrays(pieces, kinds, _charsmap(tree.get("normalizer")))


def from_pieces(model: SentencePieceModel, rows: int) -> Metadata:
    """The pieces of a spiece.model, filled up to `rows`; T5's sentinels are not in it and have no names here either."""
    pieces = [(piece.text, piece.score) for piece in model.pieces]
    kinds = [piece.kind for piece in model.pieces] + [UNUSED] * (rows - len(pieces))
    pieces += [(f"[PAD{i}]", UNUSED_SCORE) for i in range(len(pieces), rows)]
    return _arrays(pieces, kinds, b"" if model.charsmap is None else model.charsmap.data,
                   model.add_dummy_prefix, model.remove_extra_whitespaces)


def _arrays(pieces: list[tuple[str, float]], kinds: list[int], charsmap: bytes, prefix: bool = True,
            spaces: bool = True) -> Metadata:
    """`prefix`: whether a text gets a leading space; `spaces`: whether extra ones are taken out."""
    words = [piece for piece, _ in pieces]
    found: Metadata = {
        f"{GGML}model": "t5", f"{GGML}pre": "default", f"{GGML}tokens": strings(words),
        f"{GGML}scores": numbers("F32", [score for _, score in pieces]), f"{GGML}token_type": numbers("I32", kinds),
        f"{GGML}add_space_prefix": prefix, f"{GGML}remove_extra_whitespaces": spaces,
        f"{GGML}add_bos_token": False, f"{GGML}add_eos_token": True}
    found |= {GGML + key: words.index(word) for key, word in SPECIAL.items() if word in words}
    if charsmap:
        found[f"{GGML}precompiled_charsmap"] = Array("U8", len(charsmap), charsmap)
    return found


def _charsmap(normalizer: Any) -> bytes:
    """SentencePiece's table of characters, if the normalizer or a step of it has one."""
    if not isinstance(normalizer, Mapping):
        return b""
    encoded = normalizer.get("precompiled_charsmap")
    if isinstance(encoded, str):
        return base64.b64decode(encoded)
    return next(filter(None, map(_charsmap, normalizer.get("normalizers") or ())), b"")


def spiece(model: SentencePieceModel) -> bytes:
    """The bytes of a spiece.model, by the numbers of its fields."""
    pieces = (_message(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score) + _whole(3, piece.kind)
              for piece in model.pieces)
    trainer = _whole(3, UNIGRAM) + _whole(24, model.whitespace_as_suffix) + _whole(35, model.byte_fallback)
    charsmap = b"" if model.charsmap is None else _message(2, model.charsmap.data)
    flags = (model.add_dummy_prefix, model.remove_extra_whitespaces, model.escape_whitespaces)
    normalizer = charsmap + b"".join(_whole(number, flag) for number, flag in enumerate(flags, 3))
    return b"".join(_message(1, piece) for piece in pieces) + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _whole(number: int, value: int) -> bytes:
    """A field that is a number or a flag."""
    return _varint(number << 3) + _varint(int(value))


def _message(number: int, data: bytes) -> bytes:
    """A field of bytes."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data
