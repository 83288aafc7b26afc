"""Tokenizers in a GGUF file: what the source holds goes along; a T5 tokenizer is also written as llama.cpp has it."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadModelFile
from ..weights import Checkpoint
from .recipes import Value
from .writers import Array, numbers, strings

PREFIX = "tokenizer."
JSON_KEY = "tokenizer.json"
"""Where files of ours keep a whole tokenizer of Hugging Face."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
"""Kinds of tokens (llama.h, `llama_token_type`)."""
UNUSED_SCORE = -10000.0
SPECIAL = {"eos_token_id": "</s>", "unknown_token_id": "<unk>", "padding_token_id": "<pad>"}

Metadata = dict[str, Value | Array]


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
    return int(value) if key.endswith(("_id", "_count")) and value.isdecimal() else value


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
    words = [piece for piece, _ in pieces]
    found: Metadata = {
        "tokenizer.ggml.model": "t5", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": strings(words),
        "tokenizer.ggml.scores": numbers("F32", [score for _, score in pieces]),
        "tokenizer.ggml.token_type": numbers("I32", kinds),
        "tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    found |= {f"tokenizer.ggml.{key}": words.index(word) for key, word in SPECIAL.items() if word in words}
    charsmap = _charsmap(tree.get("normalizer"))
    if charsmap:
        found["tokenizer.ggml.precompiled_charsmap"] = Array("U8", len(charsmap), charsmap)
    return found


def _charsmap(normalizer: Any) -> bytes:
    """SentencePiece's table of characters, if the normalizer or a step of it has one."""
    if not isinstance(normalizer, Mapping):
        return b""
    encoded = normalizer.get("precompiled_charsmap")
    if isinstance(encoded, str):
        return base64.b64decode(encoded)
    return next(filter(None, map(_charsmap, normalizer.get("normalizers") or ())), b"")
