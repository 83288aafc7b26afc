"""Reads `spiece.model`: a SentencePiece unigram model with its text normalisation.

Source: google/sentencepiece, src/sentencepiece_model.proto (field numbers), src/normalizer.cc (order of the steps);
the character map is a Darts-clone double array (s-yata/darts-clone, `DoubleArrayUnit`). Only what an encoder needs is
read; everything is checked against the bounds of the file before use.
"""

from __future__ import annotations

import math
import re
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadModelFile

MAX_PIECES = 1_000_000
META_SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM = 1

Value = int | bytes


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A unigram vocabulary (the id of a piece is its index) and the flags of its normaliser."""

    pieces: tuple[Piece, ...]
    charsmap: CharsMap | None
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    whitespace_as_suffix: bool = False
    byte_fallback: bool = False

    def of_kind(self, kind: int) -> list[str]:
        return [piece.text for piece in self.pieces if piece.kind == kind]

    def normalize(self, text: str) -> str:
        """Map characters, drop extra spaces, add the leading space, write spaces as U+2581."""
        mapped = self._map(text)
        if self.remove_extra_whitespaces:
            kept = re.sub(" {2,}", " ", mapped).strip(" ")
            if mapped and not kept:
                return ""
            mapped = kept
        if not text:
            return ""
        space = META_SPACE if self.escape_whitespaces else " "
        leading = self.add_dummy_prefix and not self.whitespace_as_suffix
        out = (" " + mapped if leading else mapped).replace(" ", space)
        if self.remove_extra_whitespaces:
            out = out.rstrip(space)  # after the escape, as the reference does: a U+2581 typed at the end goes as well
        return out + space if self.add_dummy_prefix and self.whitespace_as_suffix else out

    def _map(self, text: str) -> str:
        """Symbols the model defines itself are kept as written; the rest goes through the character map."""
        if self.charsmap is None:
            return text
        symbols = sorted(self.of_kind(USER_DEFINED), key=len, reverse=True)
        if not symbols:
            return self.charsmap.apply(text)
        parts = re.split("(" + "|".join(map(re.escape, symbols)) + ")", text)
        return "".join(part if i % 2 else self.charsmap.apply(part) for i, part in enumerate(parts))


class CharsMap:
    """Replacement of the longest known byte string at each place (`nmt_nfkc` in T5), a trie over UTF-8 bytes."""

    def __init__(self, data: bytes, path: str | Path) -> None:
        """data: uint32 size of the trie, the trie (uint32 units), NUL-terminated UTF-8 replacements."""
        field = "normalizer_spec.precompiled_charsmap"
        self.data = data
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        # a whole number of 1024-byte blocks keeps every child (node ^ byte) inside the array
        if size == 0 or size % 1024 or 4 + size > len(data):
            raise BadModelFile(path, "damaged character map", field=field,
                               expected=f"a trie in blocks of 1024 bytes within {len(data)} bytes",
                               found=f"{size} bytes")
        self._units = array("I", struct.unpack(f"<{size // 4}I", data[4:4 + size]))
        self._texts = data[4 + size:]
        try:
            self._texts.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadModelFile(path, "damaged character map: replacements that are no UTF-8", field=field) from error
        if not self._texts.endswith(b"\0") or not self._inside():
            raise BadModelFile(path, "damaged character map: it points outside itself", field=field)

    def _inside(self) -> bool:
        """Every node and every replacement that can be reached lies inside the data (on a character boundary)."""
        units, texts = self._units, self._texts
        for i, unit in enumerate(units):
            if unit >> 31:
                continue  # a value, not a node
            node = i ^ _offset(unit)
            if node >= len(units):
                return False
            if unit >> 8 & 1:
                at = units[node] & 0x7FFFFFFF
                if at >= len(texts) or texts[at] & 0xC0 == 0x80:
                    return False
        return True

    def apply(self, text: str) -> str:
        data = text.encode("utf-8")
        out = bytearray()
        at = 0
        while at < len(data):
            end, value = self._longest(data, at)
            if value < 0:
                end = at + 1
                while end < len(data) and data[end] & 0xC0 == 0x80:
                    end += 1
                out += data[at:end]
            else:
                out += self._texts[value:self._texts.index(b"\0", value)]
            at = end
        return out.decode("utf-8")

    def _longest(self, data: bytes, start: int) -> tuple[int, int]:
        """End of the longest known string at `start` and the place of its replacement, or `(start, -1)`."""
        units = self._units
        found = (start, -1)
        node = _offset(units[0])
        for i in range(start, len(data)):
            node ^= data[i]
            unit = units[node]
            if unit & 0x800000FF != data[i]:
                break
            node ^= _offset(unit)
            if unit >> 8 & 1:
                found = (i + 1, units[node] & 0x7FFFFFFF)
        return found


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def read_model(data: bytes, path: str | Path) -> SentencePieceModel:
    """Parse the bytes of a `spiece.model`. `path` is named in errors (BadModelFile)."""
    pieces: list[Piece] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(data, path):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value, len(pieces), path))
            if len(pieces) > MAX_PIECES:
                raise BadModelFile(path, f"more than {MAX_PIECES} pieces", field="pieces")
        elif number == 2 and isinstance(value, bytes):
            trainer.update(_fields(value, path))
        elif number == 3 and isinstance(value, bytes):
            normalizer.update(_fields(value, path))
    _check(pieces, trainer, path)
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        pieces=tuple(pieces),
        charsmap=CharsMap(charsmap, path) if isinstance(charsmap, bytes) and charsmap else None,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        byte_fallback=bool(trainer.get(35, 0)),
    )


def _check(pieces: list[Piece], trainer: dict[int, Value], path: str | Path) -> None:
    if not pieces:
        raise BadModelFile(path, "no SentencePiece model: it holds no pieces")
    model_type = trainer.get(3, UNIGRAM)
    if model_type != UNIGRAM:
        raise BadModelFile(path, "not a SentencePiece model for T5", field="trainer_spec.model_type",
                           expected="1 (unigram)", found=model_type)
    check_pieces(pieces, path)


def check_pieces(pieces: Sequence[Piece], path: str | Path) -> None:
    """BadModelFile unless one piece is the unknown one and no text stands there twice."""
    unknown = sum(piece.kind == UNKNOWN for piece in pieces)
    if unknown != 1:
        raise BadModelFile(path, "damaged SentencePiece model", field="pieces", expected="one unknown piece",
                           found=unknown)
    if len({piece.text for piece in pieces}) != len(pieces):
        raise BadModelFile(path, "damaged SentencePiece model: a piece stands there twice", field="pieces")


def _piece(data: bytes, index: int, path: str | Path) -> Piece:
    fields = dict(_fields(data, path))
    raw, kind = fields.get(1, b""), fields.get(3, NORMAL)
    score = 0.0
    if isinstance(packed := fields.get(2), bytes) and len(packed) == 4:
        score = struct.unpack("<f", packed)[0]
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else ""
    except UnicodeDecodeError as error:
        raise BadModelFile(path, "a piece is no UTF-8 text", field=f"pieces[{index}]") from error
    if not text or not math.isfinite(score) or not isinstance(kind, int) or not NORMAL <= kind <= BYTE:
        raise BadModelFile(path, "damaged piece", field=f"pieces[{index}]", expected="a text, a finite score, type 1-6",
                           found=f"{text!r}, {score}, {kind!r}")
    return Piece(text, score, kind)


def _fields(data: bytes, path: str | Path) -> Iterator[tuple[int, Value]]:
    """Number and value of each protobuf field: varints as int, the rest as the bytes they occupy."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at, path)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at, path)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at, path)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise BadModelFile(path, "no SentencePiece model", field=f"byte {at}", expected="a protobuf field",
                               found=f"wire type {wire}")
        if size > len(data) - at:
            raise BadModelFile(path, "truncated SentencePiece model", field=f"field {number}",
                               expected=f"{size} bytes", found=f"{len(data) - at}")
        yield number, data[at:at + size]
        at += size


def _varint(data: bytes, at: int, path: str | Path) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise BadModelFile(path, "truncated or damaged SentencePiece model", field=f"byte {at}",
                       expected="a protobuf number")
