"""Packed files as sources: what they hold is what goes on, each against numbers worked out without the reader."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from comfy_quant_files import KINDS, into_header, packed
from compare import relative
from family import random_weights
from flux_kit.engine.convert import quantize
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.specs import FluxSpec
from flux_kit.engine.weights import open_checkpoint, to_diffusers
from gguf_files import quantise, unpack, write_gguf
from safetensors.torch import save_file
from torch import Tensor

SPEC = FluxSpec(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=256, vec_in_dim=256)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return {name: value.float() for name, value in random_weights(Flux(SPEC), 5).items()}


def read(path: Path) -> State:
    """All numbers, by gguf-py."""
    return {tensor.name: torch.from_numpy(
        gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    ).view(*map(int, reversed(tensor.shape))) for tensor in gguf.GGUFReader(path).tensors}


def check(source: Path, wanted: State, tmp_path: Path, type: str = "Q8_0", most: float = 0.0062) -> None:
    quantize(source, tmp_path / "made.gguf", type)
    found = read(tmp_path / "made.gguf")
    assert set(found) == set(wanted)
    for name, values in found.items():
        assert relative(values, wanted[name]) <= most, name


@pytest.mark.parametrize("in_header", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_comfy_quant(state: State, tmp_path: Path, kind: str, in_header: bool) -> None:
    stored, wanted = packed(state, lambda name: kind if "_blocks." in name else None)
    stored, metadata = into_header(stored) if in_header else (stored, {})
    save_file(stored, tmp_path / "in.safetensors", metadata or None)
    check(tmp_path / "in.safetensors", wanted, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_in_diffusers_layout(state: State, tmp_path: Path, dtype: torch.dtype, scaled: bool) -> None:
    """q, k and v are tensors of their own there, with scales of their own."""
    stored: State = {}
    numbers: State = {}
    for name, value in to_diffusers(state, SPEC).items():
        if value.ndim < 2:
            stored[name] = numbers[name] = value
            continue
        scale = value.abs().max() / 400 if scaled else torch.ones(())
        stored[name] = (value / scale).to(dtype)
        numbers[name] = stored[name].float() * scale
        if scaled:
            stored[name.replace(".weight", ".scale_weight")] = scale.reshape(())
    save_file(stored, tmp_path / "in.safetensors")
    save_file(numbers, tmp_path / "plain.safetensors")
    quantize(tmp_path / "plain.safetensors", tmp_path / "plain.gguf", "F16")
    check(tmp_path / "in.safetensors", read(tmp_path / "plain.gguf"), tmp_path)


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "IQ2_XXS", "Q5_1"])
def test_gguf(state: State, tmp_path: Path, type: str) -> None:
    """Blocks that gguf-py quantised or, where it cannot, random ones."""
    blocks = {name: quantise(value, type) for name, value in state.items() if "_blocks." in name and value.ndim == 2}
    wanted = {name: unpack(blocks[name], type) if name in blocks else value for name, value in state.items()}
    write_gguf(tmp_path / "in.gguf", {name: (blocks[name], type) if name in blocks else value
                                      for name, value in state.items()})
    check(tmp_path / "in.gguf", wanted, tmp_path)


@pytest.mark.parametrize("type", ["fp8_scaled", "int8_tensorwise"])
def test_our_own_safetensors_are_sources_too(state: State, tmp_path: Path, type: str) -> None:
    save_file(state, tmp_path / "whole.safetensors")
    first = quantize(tmp_path / "whole.safetensors", tmp_path / "in.safetensors", type)
    assert 0.003 < first.relative_error < 0.03
    quantize(tmp_path / "in.safetensors", tmp_path / "made.gguf", "Q8_0")
    for name, values in read(tmp_path / "made.gguf").items():
        assert relative(values, state[name]) < 0.03, name


PEAK = """
import sys, threading
from pathlib import Path
from flux_kit.engine.convert import quantize
def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "RssAnon" in line)
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], own())
quantize(sys.argv[1], sys.argv[2], "Q8_0")
before = own()
threading.Thread(target=watch, daemon=True).start()
quantize(sys.argv[1], sys.argv[3], sys.argv[4], force=True)
done.set()
print((peak[0] - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's own memory")
@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_memory_is_that_of_a_few_tensors(tmp_path: Path, type: str) -> None:
    """A model of 24 like blocks: less than a third of what it takes whole in fp32."""
    spec = FluxSpec(hidden_size=512, num_heads=4, depth=1, depth_single_blocks=24, context_in_dim=64, vec_in_dim=64)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Flux(spec).state_dict().items()}
    save_file({name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()},
              tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as checkpoint:
        whole = 2 * sum(info.nbytes for info in checkpoint.values())
    done = subprocess.run([sys.executable, "-P", "-c", PEAK, *(str(tmp_path / name) for name in (
        "in.safetensors", "warm.gguf", "out.gguf")), type], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert 0 < int(done.stdout) < whole / 3
