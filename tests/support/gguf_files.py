"""GGUF files written by gguf-py, with blocks quantised by it or, where it cannot, random ones with small scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from flux_kit.engine.quant import FORMATS
from gguf import GGMLQuantizationType as Type
from gguf import quants
from torch import Tensor

GGML = [name for name in FORMATS if name in Type.__members__ and name != "Q8_K"]
"""Types that gguf-py can unpack."""
QUANTISED = [name for name in GGML if name not in ("F32", "F16", "BF16")]


def random_blocks(name: str, rows: int, width: int, seed: int = 0, low: float = 1e-4, high: float = 2e-3) -> np.ndarray:
    """Rows of random bytes as blocks of `name`, but for the scales: between `low` and `high` in size, of both signs."""
    rng = np.random.default_rng(seed)
    format = FORMATS[name]
    blocks = rng.integers(0, 256, (rows * width // format.block, format.nbytes), dtype=np.uint8)
    scales = rng.uniform(low, high, (len(blocks), 2)) * rng.choice([-1, 1], (len(blocks), 2))
    for at, scale in zip(format.halves, scales.T, strict=False):
        blocks[:, at:at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    if name == "IQ1_M":  # its scale's sixteen bits are the upper four of four words
        words = blocks[:, 48:].copy().view(np.uint16)
        bits = scales[:, 0].astype(np.float16).view(np.uint16)
        for i in range(4):
            words[:, i] = (words[:, i] & 0x0FFF) | (((bits >> (4 * i)) & 15) << 12)
        blocks[:, 48:] = words.view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] = rng.integers(112, 120, len(blocks))
    if name == "NVFP4":
        blocks[:, :4] = rng.integers(1, 0x20, (len(blocks), 4))
    return blocks.reshape(rows, -1)


def weight_blocks(name: str, rows: int, width: int, seed: int = 0, std: float = 0.04) -> np.ndarray:
    """Random blocks whose weights deviate by about `std`."""
    found = float(unpack(random_blocks(name, 4, 1024, seed), name).std())
    return random_blocks(name, rows, width, seed, 1e-4 * std / found, 2e-3 * std / found)


def quantise(weight: Tensor, name: str, seed: int = 0) -> np.ndarray:
    """`weight` in the type `name`, packed rows; random ones of its shape where gguf-py has no quantiser."""
    try:
        packed: np.ndarray = quants.quantize(weight.float().numpy(), Type[name])
    except NotImplementedError:
        packed = weight_blocks(name, *weight.shape, seed=seed)
    return packed


def unpack(packed: np.ndarray, name: str) -> Tensor:
    """gguf-py's numbers, fp32."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ascontiguousarray(quants.dequantize(packed, Type[name]).astype(np.float32)))


def write_gguf(path: Path, tensors: Mapping[str, Tensor | tuple[np.ndarray, str]], arch: str | None = "flux",
               lists: Mapping[str, list] | None = None) -> Path:
    """Tensors as they are, or packed rows with the name of their type."""
    writer = gguf.GGUFWriter(path, arch or "nothing")
    if arch is None:
        writer.kv_data[0].clear()
    for key, values in (lists or {}).items():
        writer.add_array(key, values)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=Type[tensor[1]])
        elif tensor.dtype == torch.bfloat16:
            writer.add_tensor(name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=Type.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
