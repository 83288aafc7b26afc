"""Model files of full size that take no disk: data is a hole, but for the few bytes that a header does not hold."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bad_files import gguf_entry, gguf_tensor, gguf_text
from strict_readers import BLOCKS

BITS = {"F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "U8": 8, "I8": 8, "I32": 32, "I64": 64,
        "F64": 64, "BOOL": 8}
TYPES = {name: (number, block, size) for number, (name, block, size) in BLOCKS.items()}
ALIGNMENT = 32
Tensors = Mapping[str, tuple[tuple[int, ...], str]]


def safetensors_header(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """Length and header of a safetensors file, and the bytes of data it promises."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, at


def safetensors_file(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None,
                     data: Mapping[str, bytes] | None = None) -> Path:
    """Name -> (shape, dtype); `data` are the bytes of those tensors that must hold something."""
    header, nbytes = safetensors_header(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        at = len(header)
        for name, (shape, dtype) in tensors.items():
            size = math.prod(shape) * BITS[dtype] // 8
            if data is not None and name in data:
                assert len(data[name]) == size, name
                file.seek(at)
                file.write(data[name])
            at += size
        file.truncate(len(header) + nbytes)
    return path


def gguf_file(path: Path, tensors: Tensors, arch: str | None = "flux") -> Path:
    """Name -> (shape in torch's order, ggml type)."""
    entries = [] if arch is None else [gguf_entry("general.architecture", 8, gguf_text(arch))]
    rows, at = [], 0
    for name, (shape, kind) in tensors.items():
        number, block, size = TYPES[kind]
        assert shape[-1] % block == 0, name
        rows.append(gguf_tensor(name, shape[::-1], number, at))
        nbytes = math.prod(shape) // block * size
        at += nbytes + -nbytes % ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(entries)) + b"".join(entries + rows)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + -len(header) % ALIGNMENT + at)
    return path
