"""Independent readers of both containers, slow and strict: whole files in memory, from the formats' rules alone.

safetensors: the library itself, and what the specification asks beyond it. GGUF: the rules of llama.cpp's gguf.cpp.
Each gives name -> (shape in torch's order, stored type, bytes), or raises `Refused` with the reason.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import gguf
import safetensors

Read = dict[str, tuple[tuple[int, ...], str, bytes]]


class Refused(Exception):
    """The file is not well-formed."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise Refused("a key stands twice")
    for key, value in pairs:
        for text in (key, value):
            if isinstance(text, str) and any(0xD800 <= ord(char) < 0xE000 for char in text):
                raise Refused("half a surrogate pair")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise Refused(name)


def read_safetensors(data: bytes) -> Read:
    try:
        found = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise Refused(str(error)) from error
    length = int.from_bytes(data[:8], "little")
    text = data[8:8 + length]
    if not text.startswith(b"{"):  # the library lets spaces pass
        raise Refused("header start")
    try:
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(str(error)) from error
    header.pop("__metadata__", None)
    for entry in header.values():
        if any(isinstance(value, (dict, list)) for key, value in entry.items() if key not in ("shape", "data_offsets")):
            raise Refused("nested field")
        if math.prod(max(size, 1) for size in entry["shape"]) >= 2**63:  # no tensor can have such sizes
            raise Refused("sizes beyond 63 bits")
    if set(header) != set(found):
        raise Refused("names")
    return {name: (tuple(info["shape"]), info["dtype"], bytes(info["data"])) for name, info in found.items()}


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "b", 10: "Q", 11: "q", 12: "d"}
BLOCKS = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
BLOCKS[9] = ("Q8_1", 32, 36)  # ggml's block: two halves and 32 codes; gguf-py counts 40 bytes


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise Refused("ends too soon")
        self.at += size
        return self.data[self.at - size:self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> bytes:
        return self.take(self.number("Q"))

    def name(self) -> str:
        try:
            return self.text().decode()
        except UnicodeDecodeError as error:
            raise Refused("no UTF-8") from error


def read_gguf(data: bytes) -> Read:
    file = _Bytes(data)
    if file.take(4) != b"GGUF" or file.number("I") not in (2, 3):
        raise Refused("magic or version")
    tensors, entries = file.number("Q"), file.number("Q")
    if tensors > len(data) or entries > len(data):
        raise Refused("counts")
    alignment = _read_entries(file, entries)
    rows: list[tuple[str, tuple[int, ...], int, int]] = []
    at = 0
    for _ in range(tensors):
        name = file.name()
        dims = file.number("I")
        if dims > 4:
            raise Refused("more than four sizes")
        shape = tuple(file.number("Q") for _ in range(dims))
        kind, offset = file.number("I"), file.number("Q")
        if any(size >= 2**63 for size in shape) or math.prod(max(size, 1) for size in shape) >= 2**63:
            raise Refused("sizes")
        if kind not in BLOCKS or (shape[0] if shape else 1) % BLOCKS[kind][1]:
            raise Refused("type")
        if name in (row[0] for row in rows):
            raise Refused("a name twice")
        if offset != at:
            raise Refused("offset")
        size = math.prod(shape) // BLOCKS[kind][1] * BLOCKS[kind][2]
        rows.append((name, shape[::-1], kind, size))
        at += size + -size % alignment
    found: Read = {}
    at = file.at + -file.at % alignment
    for name, shape, kind, size in rows:
        if size and at + size > len(data):
            raise Refused("data is short")
        found[name] = shape, BLOCKS[kind][0], data[at:at + size]
        at += size + -size % alignment
    return found


def _read_entries(file: _Bytes, count: int) -> int:
    """Reads the metadata; the alignment."""
    keys, alignment = set(), 32
    for _ in range(count):
        key, kind = file.name(), file.number("I")
        if key in keys:
            raise Refused("a key twice")
        keys.add(key)
        if key == "general.alignment" and kind != 4:
            raise Refused("alignment")
        value = _read_value(file, kind)
        if key == "general.alignment":
            alignment = value
            if alignment not in {1 << i for i in range(32)}:
                raise Refused("alignment")
    return alignment


def _read_value(file: _Bytes, kind: int) -> Any:
    if kind in _SCALARS:
        return file.number(_SCALARS[kind])
    if kind == 8:
        return file.text()
    if kind != 9:
        raise Refused("kind of a value")
    of, count = file.number("I"), file.number("Q")
    if of in _SCALARS:
        return file.take(count * struct.calcsize(_SCALARS[of]))
    if of != 8:
        raise Refused("kind of an array")
    for _ in range(count):
        file.text()
    return None
