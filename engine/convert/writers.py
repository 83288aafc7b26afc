"""Model files written tensor by tensor: the header, known beforehand from names, shapes and types, then the data.

The formats are those that `weights.gguf_header` and `weights.header` read; GGUF is written as version 3.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..weights.gguf_header import ARRAY, DEFAULT_ALIGNMENT, MAGIC, SCALARS, SIZES, STRING, TYPES
from ..weights.header import BITS
from .recipes import Value

GGUF_VERSION = 3
JSON_ALIGNMENT = 8
TYPE_NUMBERS = {name: number for number, name in TYPES.items()}
VALUE_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"STRING": STRING}


class Planned(NamedTuple):
    """One tensor of the file to come; `shape` in torch's order."""

    name: str
    shape: tuple[int, ...]
    format: str

    @property
    def nbytes(self) -> int:
        block, nbytes = SIZES[self.format] if self.format in SIZES else (1, BITS[self.format] // 8)
        return math.prod(self.shape) // block * nbytes


@dataclass(frozen=True)
class Array:
    """An array for GGUF's metadata: type of the elements (as `weights` names it), how many, and their bytes."""

    kind: str
    count: int
    data: bytes


@dataclass(frozen=True)
class Layout:
    """What stands before the data, and the multiple to which each tensor's bytes are padded."""

    header: bytes
    alignment: int
    tensors: tuple[Planned, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes + self.padding(tensor.nbytes) for tensor in self.tensors)

    def padding(self, nbytes: int) -> int:
        return -nbytes % self.alignment


def text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def strings(values: Sequence[str]) -> Array:
    return Array("STRING", len(values), b"".join(map(text, values)))


def numbers(kind: str, values: Sequence[float]) -> Array:
    return Array(kind, len(values), struct.pack(f"<{len(values)}{SCALARS[VALUE_NUMBERS[kind]][1][1:]}", *values))


def gguf_layout(tensors: Sequence[Planned], metadata: Mapping[str, Value | Array]) -> Layout:
    """Whole numbers of the metadata become U32, others F32."""
    parts = [MAGIC, struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [text(key), _value(value)]
    at = 0
    for tensor in tensors:
        dims = len(tensor.shape)
        parts += [text(tensor.name), struct.pack("<I", dims), struct.pack(f"<{dims}Q", *reversed(tensor.shape)),
                  struct.pack("<IQ", TYPE_NUMBERS[tensor.format], at)]
        at += -(-tensor.nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    header = b"".join(parts)
    return Layout(header + bytes(-len(header) % DEFAULT_ALIGNMENT), DEFAULT_ALIGNMENT, tuple(tensors))


def _value(value: Value | Array) -> bytes:
    if isinstance(value, Array):
        return struct.pack("<IIQ", ARRAY, VALUE_NUMBERS[value.kind], value.count) + value.data
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    kind = "BOOL" if isinstance(value, bool) else "U32" if isinstance(value, int) else "F32"
    return struct.pack("<I", VALUE_NUMBERS[kind]) + struct.pack(SCALARS[VALUE_NUMBERS[kind]][1], value)


def safetensors_layout(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> Layout:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {"dtype": tensor.format, "shape": list(tensor.shape),
                                "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % JSON_ALIGNMENT)
    return Layout(struct.pack("<Q", len(header)) + header, 1, tuple(tensors))
