"""Model files for tests: sparse ones of full size from the published lists of tensors, and small real ones."""

from __future__ import annotations

import gzip
import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "data"
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "F8_E4M3": 1, "U8": 1}
Tensors = Mapping[str, tuple[tuple[int, ...], str]]


def _manifest(name: str) -> dict[str, Any]:
    """A published list of tensors, name -> (shape, dtype), or a map of names as it stands."""
    if name.startswith("lora_"):
        with zipfile.ZipFile(DATA / "lora_manifests.zip") as archive:
            found = json.loads(archive.read(f"{name}.json"))
    else:
        found = json.loads(gzip.decompress((DATA / "manifests" / f"{name}.json.gz").read_bytes()))
    if name.startswith("map_"):
        return found
    return {tensor: (tuple(shape), dtype) for tensor, (shape, dtype) in found.items()}


def _header(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """Length and header of a safetensors file, and the bytes of data it promises."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def _sparse(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A file of full size whose data is a hole: zeros that take no disk."""
    header, data_bytes = _header(tensors, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + data_bytes)
    return path


def _sharded(folder: Path, base: str, tensors: Tensors, shards: int) -> Path:
    """The same as shards with an index, as diffusers and transformers write them; returns the index."""
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"{base}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        _sparse(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = folder / f"{base}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}), encoding="utf-8")
    return index


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], dict[str, Any]]:
    return _manifest


@pytest.fixture(scope="session")
def lora_names() -> list[str]:
    with zipfile.ZipFile(DATA / "lora_manifests.zip") as archive:
        return sorted(name.removesuffix(".json") for name in archive.namelist())


@pytest.fixture(scope="session")
def header_bytes() -> Callable[..., tuple[bytes, int]]:
    return _header


@pytest.fixture(scope="session")
def sparse() -> Callable[..., Path]:
    return _sparse


@pytest.fixture(scope="session")
def sharded() -> Callable[..., Path]:
    return _sharded
