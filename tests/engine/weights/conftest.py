"""Model files for tests: sparse ones of full size from the published lists of tensors, and small real ones."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sparse_files import Tensors, safetensors_file, safetensors_header

DATA = Path(__file__).parents[2] / "data"


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


def _sharded(folder: Path, base: str, tensors: Tensors, shards: int) -> Path:
    """The same as shards with an index, as diffusers and transformers write them; returns the index."""
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"{base}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        safetensors_file(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
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
    return safetensors_header


@pytest.fixture(scope="session")
def sparse() -> Callable[..., Path]:
    return safetensors_file


@pytest.fixture(scope="session")
def sharded() -> Callable[..., Path]:
    return _sharded
