"""LoRA files of every format: sparse ones from the lists of keys, and small real ones."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import ClipTextSpec, FluxSpec, T5Spec
from torch import Tensor

DATA = Path(__file__).parents[2] / "data"
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "F8_E4M3": 1, "U8": 1, "BOOL": 1, "F64": 8}
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL",
         torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"}
TINY_FLUX = FluxSpec(vec_in_dim=64, context_in_dim=64, hidden_size=128, num_heads=1, depth=2, depth_single_blocks=2)
TINY_CLIP = ClipTextSpec(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=1)
TINY_T5 = T5Spec(vocab_size=252, d_model=64, num_heads=2, d_ff=128, num_layers=2)


def _write(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None, data: bool) -> Path:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if not data:
            file.truncate(8 + len(text) + end)
    return path


@pytest.fixture(scope="session")
def lists() -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """Name of a format -> key -> (shape, stored type)."""
    with zipfile.ZipFile(DATA / "lora_manifests.zip") as archive:
        return {name.removeprefix("lora_").removesuffix(".json"):
                {key: (tuple(shape), dtype) for key, (shape, dtype) in json.loads(archive.read(name)).items()}
                for name in archive.namelist()}


@pytest.fixture()
def sparse(tmp_path: Path) -> Callable[..., Path]:
    """A file of full size whose data is a hole."""
    return lambda tensors, metadata=None, name="lora.safetensors": _write(tmp_path / name, tensors, metadata, False)


@pytest.fixture()
def save(tmp_path: Path) -> Callable[..., Path]:
    """A real file of these tensors."""
    def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None,
              name: str = "lora.safetensors") -> Path:
        path = _write(tmp_path / name, {key: (tuple(value.shape), NAMES[value.dtype])
                                        for key, value in tensors.items()}, metadata, True)
        with path.open("ab") as file:
            for value in tensors.values():
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return path
    return write


@pytest.fixture()
def flux() -> Flux:
    return _random(Flux(TINY_FLUX))


@pytest.fixture()
def clip() -> ClipText:
    return _random(ClipText(TINY_CLIP))


@pytest.fixture()
def t5() -> T5Encoder:
    return _random(T5Encoder(TINY_T5))


def _random(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    return model.double().eval().requires_grad_(False)
