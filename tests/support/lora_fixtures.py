"""LoRA files of every format: sparse ones from the lists of keys, and small real ones."""

from __future__ import annotations

import json
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
from safetensors.torch import save_file
from sparse_files import safetensors_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
TINY_FLUX = FluxSpec(vec_in_dim=64, context_in_dim=64, hidden_size=128, num_heads=1, depth=2, depth_single_blocks=2)
TINY_CLIP = ClipTextSpec(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=1)
TINY_T5 = T5Spec(vocab_size=252, d_model=64, num_heads=2, d_ff=128, num_layers=2)


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
    return lambda tensors, metadata=None, name="lora.safetensors": safetensors_file(tmp_path / name, tensors, metadata)


@pytest.fixture()
def save(tmp_path: Path) -> Callable[..., Path]:
    """A real file of these tensors."""
    def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None,
              name: str = "lora.safetensors") -> Path:
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / name, metadata)
        return tmp_path / name
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
