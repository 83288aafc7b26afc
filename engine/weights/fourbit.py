"""NF4 and FP4 of bitsandbytes in a safetensors file: a weight and its side tensors become one packed tensor.

`x.weight` holds the codes, flat, whatever its shape; `x.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) is JSON with
shape and block; `x.weight.absmax` the scales in fp32, or, nested, bytes that stand for `nested_quant_map[byte] *
nested_absmax + nested_offset`, with a number of `nested_absmax` for each `nested_blocksize` of them.
Source: bitsandbytes-foundation/bitsandbytes, functional.py (`QuantState.as_dict`, `dequantize_4bit`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadModelFile
from ..quant.formats import FORMATS, QuantFormat
from ..quant.fourbit import BLOCKS, SCALE_BYTES, VALUES, format_name
from .header import MAX_ELEMENTS, show

if TYPE_CHECKING:
    from .containers import TensorInfo

STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)$", re.DOTALL)
SIDES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MAX_STATE_BYTES = 1 << 16
MAX_DIMS = 8
MAX_OFFSET = 1e30
MAP_TOLERANCE = 4e-3
"""Between a value of the file's own table, perhaps rounded to bf16, and the published one."""


@dataclass(frozen=True)
class _Weight:
    """One quantised weight: its codes, its scales, and, for scales that are bytes themselves, what these mean."""

    codes: TensorInfo
    absmax: TensorInfo
    shape: tuple[int, ...]
    format: QuantFormat
    nested: tuple[TensorInfo, TensorInfo, int, float] | None
    """Scales of the scales, their table of 256, how many share one, and what is added."""

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.format.block)

    def packed(self) -> Tensor:
        """All blocks of the format, one after the other, uint8; the last filled up with zeros."""
        blocks = torch.zeros(self.blocks, self.format.nbytes, dtype=torch.uint8)
        blocks[:, :SCALE_BYTES] = self.scales().view(torch.uint8).view(-1, SCALE_BYTES)
        codes = self.codes.raw()[:-(-math.prod(self.shape) // 2)]
        size = self.format.nbytes - SCALE_BYTES
        whole, rest = divmod(len(codes), size)
        blocks[:whole, SCALE_BYTES:] = codes[:whole * size].view(whole, size)
        if rest:
            blocks[whole, SCALE_BYTES:SCALE_BYTES + rest] = codes[whole * size:]
        return blocks.view(-1)

    def scales(self) -> Tensor:
        """One for each block, fp32 `(blocks,)`."""
        absmax = self.absmax.read().reshape(-1)
        if self.nested is None:
            return absmax.float().contiguous()
        scales, table, size, offset = self.nested
        of_scales = scales.read().reshape(-1).float().repeat_interleave(size)[:len(absmax)]
        return table.read().reshape(-1).float()[absmax.long()] * of_scales + offset

    def numbers(self) -> Tensor:
        """The weight unpacked, as the bytes of fp32 numbers."""
        values = self.format.dequantize(self.packed())[:math.prod(self.shape)]
        return values.contiguous().view(torch.uint8)


def folded(tensors: Mapping[str, TensorInfo], path: Path) -> dict[str, TensorInfo]:
    """The tensors, those in NF4 and FP4 with logical shape and format, and without their side tensors.

    Their packed rows are put together when they are read. A row that is no whole number of blocks is given as fp32.
    Reads the states, a few hundred bytes each; raises `BadModelFile` for what is damaged or missing.
    """
    found = dict(tensors)
    for name in tensors:
        match = STATE.fullmatch(name)
        if match is None:
            continue
        weight = _weight(tensors, path, match[1], match[2].upper(), name)
        for side in (name, *(f"{match[1]}.{side}" for side in SIDES)):
            found.pop(side, None)
        width = weight.shape[-1]
        rows = len(weight.shape) > 1 and width % weight.format.block == 0
        found[match[1]] = replace(
            weight.codes, shape=weight.shape, format=weight.format.name if rows else "F32",
            nbytes=weight.blocks * weight.format.nbytes if rows else 4 * math.prod(weight.shape),
            build=weight.packed if rows else weight.numbers)
    return found


def _weight(tensors: Mapping[str, TensorInfo], path: Path, name: str, kind: str, state_name: str) -> _Weight:
    state = _state(tensors[state_name], path, state_name)
    sizes, block = state.get("shape"), state.get("blocksize")
    if not isinstance(sizes, list) or not 1 <= len(sizes) <= MAX_DIMS or not all(_is_count(n) for n in sizes):
        raise _damaged(path, f"shape in {show(state_name)}", "a list of positive numbers", sizes)
    if math.prod(sizes) > MAX_ELEMENTS:
        raise _damaged(path, f"shape in {show(state_name)}", "fewer elements", sizes)
    if block not in BLOCKS or type(block) is not int:
        raise _damaged(path, f"blocksize in {show(state_name)}", f"one of {', '.join(map(str, sorted(BLOCKS)))}", block)
    if state.get("quant_type") != kind.lower():
        raise _damaged(path, f"quant_type in {show(state_name)}", kind.lower(), state.get("quant_type"))
    count = math.prod(sizes)
    codes = _side(tensors, path, name, None, -(-count // 2))
    blocks = -(-count // block)
    absmax = _side(tensors, path, f"{name}.absmax", ("U8",) if "nested_blocksize" in state else ("F32",), blocks)
    _check_map(tensors, path, f"{name}.quant_map", kind)
    return _Weight(codes, absmax, tuple(sizes), FORMATS[format_name(kind, block)],
                   _nested(tensors, path, name, state, state_name, blocks))


def _nested(tensors: Mapping[str, TensorInfo], path: Path, name: str, state: Mapping[str, Any], state_name: str,
            blocks: int) -> tuple[TensorInfo, TensorInfo, int, float] | None:
    if "nested_blocksize" not in state:
        return None
    size, offset = state["nested_blocksize"], state.get("nested_offset")
    if not _is_count(size) or size > MAX_ELEMENTS:
        raise _damaged(path, f"nested_blocksize in {show(state_name)}", "a positive number", size)
    if not isinstance(offset, (int, float)) or not abs(offset) < MAX_OFFSET:
        raise _damaged(path, f"nested_offset in {show(state_name)}", "a finite number", offset)
    scales = _side(tensors, path, f"{name}.nested_absmax", ("F32",), -(-blocks // size))
    # a block may be named larger than what there is
    return scales, _side(tensors, path, f"{name}.nested_quant_map", ("F32",), 256), min(size, blocks), float(offset)


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _side(tensors: Mapping[str, TensorInfo], path: Path, name: str, formats: tuple[str, ...] | None,
          count: int) -> TensorInfo:
    """The tensor `name` of `count` elements, or, where formats is None, of so many bytes."""
    info = tensors.get(name)
    if info is None:
        raise _damaged(path, show(name), "this tensor", "nothing")
    have = info.nbytes if formats is None else math.prod(info.shape)
    # codes may be stored in words of more than a byte, the last not full
    spare = 8 if formats is None and info.format != "U8" else 0
    if (formats is not None and info.format not in formats) or not count <= have <= count + spare:
        raise _damaged(path, show(name), f"{count} of {' or '.join(formats or ('U8',))}", f"{have} of {info.format}")
    return info


def _check_map(tensors: Mapping[str, TensorInfo], path: Path, name: str, kind: str) -> None:
    """The values of the codes are published; a file whose own table is another one holds something else."""
    if name not in tensors:
        return
    found = _side(tensors, path, name, ("F32", "BF16", "F16"), 16).read().reshape(-1).float()
    wanted = torch.tensor(VALUES[kind])
    if not bool(((found - wanted).abs() <= MAP_TOLERANCE).all()):
        raise _damaged(path, show(name), f"the 16 values of {kind}", ", ".join(f"{x:.4g}" for x in found.tolist()))


def _state(info: TensorInfo, path: Path, name: str) -> Mapping[str, Any]:
    if info.format != "U8" or info.nbytes > MAX_STATE_BYTES:
        raise _damaged(path, show(name), f"at most {MAX_STATE_BYTES} of U8", f"{info.nbytes} bytes of {info.format}")
    try:
        state = json.loads(info.read().numpy().tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, show(name), "JSON", str(error)[:200]) from error
    if not isinstance(state, dict):
        raise _damaged(path, show(name), "a JSON object", type(state).__name__)
    return state


def _damaged(path: Path, field: str, expected: str, found: object) -> BadModelFile:
    return BadModelFile(path, "damaged weights in NF4 or FP4 of bitsandbytes", field=field, expected=expected,
                        found=str(found)[:200], advice="Download it again")
