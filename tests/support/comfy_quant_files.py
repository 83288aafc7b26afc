"""Layers as ComfyUI's `comfy_quant` files hold them, written from the descriptions of the formats in numpy: the tensors
of a layer, and the numbers they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def tiled(scales: np.ndarray) -> np.ndarray:
    """Number by number: tiles of 128 x 4 one after the other, in each 32 runs of the rows r, r + 32, r + 64, r + 96."""
    rows, columns = scales.shape
    across = -(-columns // 4)
    out = np.zeros(-(-rows // 128) * across * 512, scales.dtype)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * across + column // 4
            out[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4] = scales[row, column]
    return out.reshape(-1, across * 4)


def rotation(order: int) -> np.ndarray:
    """The Hadamard matrix of equal row sums: minus for each digit to base four that adds to three with the other."""
    i, j = np.indices((order, order))
    signs = np.ones((order, order), np.float32)
    while order > 1:
        signs[i % 4 + j % 4 == 3] *= -1
        i, j, order = i // 4, j // 4, order // 4
    return signs / np.float32(np.sqrt(len(signs)))


def config(values: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def float8(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[State, Tensor]:
    scale = weight.abs().max() / torch.finfo(dtype).max
    codes = (weight / scale).to(dtype)
    kind = "float8_e4m3fn" if dtype == torch.float8_e4m3fn else "float8_e5m2"
    return ({"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5),
             "comfy_quant": config({"format": kind})}, codes.float() * scale)


def int8(weight: Tensor, group: int = 0, per_row: bool = True, nested: bool = False) -> tuple[State, Tensor]:
    """`group`: of the rotation, 0 without. `nested`: options under `params`."""
    options: dict[str, Any] = {"convrot": True, "convrot_groupsize": group} if group else {}
    turn = torch.from_numpy(rotation(group or 1))
    turned = (weight.reshape(len(weight), -1, group or 1) @ turn).reshape(weight.shape)
    scale = (turned.abs().amax(1, keepdim=True) if per_row else turned.abs().max()) / 127
    codes = (turned / scale).round().to(torch.int8)
    numbers = ((codes.double() * scale.double()).view(len(weight), -1, group or 1) @ turn.T.double()).view(weight.shape)
    values = {"format": "int8_tensorwise", **({"params": options} if nested else options)}
    return {"weight": codes, "weight_scale": scale, "comfy_quant": config(values)}, numbers.float()


def mxfp8(weight: Tensor) -> tuple[State, Tensor]:
    groups = weight.view(len(weight), -1, 32)
    largest = groups.abs().amax(2)
    exponent = torch.where(largest > 0, torch.ceil(torch.log2(largest / 448)), -127)
    codes = (groups / torch.exp2(exponent)[..., None]).to(torch.float8_e4m3fn)
    scales = torch.from_numpy(tiled((exponent + 127).to(torch.uint8).numpy()))
    numbers = (codes.double() * torch.exp2(exponent.double())[..., None]).view(weight.shape)
    return ({"weight": codes.view(weight.shape), "weight_scale": scales.view(torch.float8_e8m0fnu),
             "comfy_quant": config({"format": "mxfp8"})}, numbers.float())


def nvfp4(weight: Tensor, columns: Tensor | None = None) -> tuple[State, Tensor]:
    """`columns`: what the input is to be multiplied by, `(width,)`."""
    weight = weight if columns is None else weight / columns
    whole = weight.abs().max() / (448 * 6)
    groups = weight.view(len(weight), -1, 16)
    scales = (groups.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    steps = (scales.float() * whole)[..., None]
    scaled = torch.where(steps > 0, groups / steps, torch.zeros(()))
    codes = (scaled[..., None] - torch.from_numpy(E2M1)).abs().argmin(-1).to(torch.uint8).view(weight.shape)
    numbers = torch.from_numpy(E2M1)[codes.long()].double() * (
        scales.double() * whole.double()).repeat_interleave(16, 1)
    state = {"weight": (codes[:, ::2] << 4) | codes[:, 1::2], "weight_scale_2": whole,
             "weight_scale": torch.from_numpy(tiled(scales.view(torch.uint8).numpy())).view(torch.float8_e4m3fn),
             "comfy_quant": config({"format": "nvfp4"})}
    if columns is not None:
        state["pre_quant_scale"] = columns
        numbers = numbers * columns.double()
    return state, numbers.float()


KINDS: Mapping[str, Callable[[Tensor], tuple[State, Tensor]]] = {
    "F8_E4M3": float8, "F8_E5M2": lambda weight: float8(weight, torch.float8_e5m2), "INT8": int8,
    "INT8 of one scale": lambda weight: int8(weight, per_row=False),
    "INT8_CONVROT_64": lambda weight: int8(weight, 64),
    "INT8_CONVROT_256": lambda weight: int8(weight, 256, nested=True), "MXFP8": mxfp8, "NVFP4_16": nvfp4,
    "NVFP4_16 with columns": lambda weight: nvfp4(weight, 0.5 + torch.rand(weight.shape[1])),
}
"""By the name of our format, and what is special."""


def packed(state: State, kind: Callable[[str], str | None]) -> tuple[State, State]:
    """The tensors to write, and the numbers to read from them; `kind` of a matrix: a key of `KINDS`, None keeps it."""
    stored: State = {}
    numbers: State = {}
    for name, tensor in state.items():
        tensor = tensor.float()
        chosen = kind(name) if tensor.ndim == 2 else None
        if chosen is None or (chosen == "INT8_CONVROT_256" and tensor.shape[1] % 256):
            stored[name] = numbers[name] = tensor
            continue
        layer, numbers[name] = KINDS[chosen](tensor)
        stored |= {f"{name.removesuffix('weight')}{ending}": value.contiguous() for ending, value in layer.items()}
    return stored, numbers


def into_header(stored: State) -> tuple[State, dict[str, str]]:
    """The other spelling: what the tensors `x.comfy_quant` say, in the header's metadata."""
    layers = {name.removesuffix(".comfy_quant"): json.loads(bytes(value.tolist())) for name, value in stored.items()
              if name.endswith(".comfy_quant")}
    return ({name: value for name, value in stored.items() if not name.endswith(".comfy_quant")},
            {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})})
