"""ComfyUI's quantised layers in a safetensors file: a weight and its side tensors become one packed tensor.

Which layer is stored how is JSON: in the tensor `x.comfy_quant`, `{"format": ...}`, or for all layers in the header's
metadata, `_quantization_metadata`: `{"layers": {"x": {"format": ...}}}`. Beside `x.weight` stand `x.weight_scale` and,
by format, more. Block scales are tiled as NVIDIA's matrix units read them: 128 rows by 4 columns, padded with zeros,
and in a tile first the rows 0, 32, 64, 96, four columns of each, then the rows 1, 33 ...
Sources: ComfyUI, QUANTIZATION.md and comfy/ops.py; cuBLAS documentation, "1D block scaling factors layout".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import BadModelFile
from ..quant.comfy import ROTATED, rotated_name
from ..quant.formats import FORMATS, QuantFormat
from .header import show, show_shape

if TYPE_CHECKING:
    from .containers import TensorInfo

CONFIG = ".comfy_quant"
METADATA = "_quantization_metadata"
FOREIGN = "comfy_quant "
"""What stands before the name of a format that is not read here, in place of a stored type."""
MAX_CONFIG_BYTES = 1 << 16
MAX_METADATA_CHARACTERS = 1 << 22
MAX_FORMAT_CHARACTERS = 40
NUMBERS = ("F32", "F16", "BF16")
TILE_ROWS, TILE_COLUMNS, QUARTER = 128, 4, 32


@dataclass(frozen=True)
class _Layer:
    """One quantised layer of the file at `path`, what its JSON says, and the file's tensors."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    path: Path

    def option(self, name: str, default: object) -> Any:
        """Writers put options beside the format, or under `params`."""
        params = self.config.get("params")
        return self.config.get(name, params.get(name, default) if isinstance(params, dict) else default)

    def weight(self, stored: str) -> TensorInfo:
        """The codes, a matrix."""
        name = f"{self.name}.weight"
        info = self.tensors[name]
        if info.format != stored or len(info.shape) != 2 or not info.nbytes:
            raise self.damaged(name, f"a matrix of {stored} for {self.config['format']}",
                               f"{show_shape(info.shape)} of {info.format}")
        return info

    def side(self, ending: str, formats: tuple[str, ...], count: int) -> TensorInfo:
        """A side tensor of `count` elements."""
        name = f"{self.name}.{ending}"
        info = self.tensors.get(name)
        if info is None:
            raise self.damaged(name, f"this tensor, for {self.config['format']}", "nothing")
        if info.format not in formats or math.prod(info.shape) != count:
            raise self.damaged(name, f"{count} of {' or '.join(formats)}", f"{show_shape(info.shape)} of {info.format}")
        return info

    def damaged(self, name: str, expected: str, found: object) -> BadModelFile:
        return _damaged(self.path, show(name), expected, found)


Folded = dict[str, "TensorInfo | None"]
"""Side tensors by ending that are to be put in place of the file's, or, for None, taken away."""


def folded(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], path: Path) -> dict[str, TensorInfo]:
    """The tensors, quantised ones with logical shape and format, their scale in fp32 beside them as `x.weight_scale`:
    `()`, `(rows, 1)` or `(1, width)`.

    Codes with block scales are put together when they are read. Formats that are not read here keep shape and bytes
    and get a type that begins with `FOREIGN`. Reads the JSON; raises `BadModelFile` for what is damaged or missing.
    """
    found = dict(tensors)
    for name, config in _configs(tensors, metadata, path).items():
        layer = _Layer(name, config, tensors, path)
        weight = f"{name}.weight"
        read = READERS.get(config["format"])
        if read is None:
            found[weight] = replace(tensors[weight], format=FOREIGN + config["format"][:MAX_FORMAT_CHARACTERS])
            continue
        found[weight], sides = read(layer)
        for ending, side in sides.items():
            found.pop(f"{name}.{ending}", None)
            if side is not None:
                found[f"{name}.{ending}"] = side
    return {name: info for name, info in found.items() if not name.endswith(CONFIG)}


def foreign(infos: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """Name and format of the first tensor in a format of `comfy_quant` that is not read here."""
    return next(((name, info.format.removeprefix(FOREIGN)) for name, info in infos.items()
                 if info.format.startswith(FOREIGN)), None)


def _configs(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str],
             path: Path) -> dict[str, Mapping[str, Any]]:
    """What the JSON says of each layer; the header's word counts before that of a tensor, as in ComfyUI."""
    configs: dict[str, Mapping[str, Any]] = {}
    for name, info in tensors.items():
        if name.endswith(CONFIG):
            layer = name.removesuffix(CONFIG)
            if f"{layer}.weight" not in tensors:
                raise _damaged(path, show(f"{layer}.weight"), f"this tensor, for {show(name)}", "nothing")
            configs[layer] = _config(_text(info, path, name), path, show(name))
    text = metadata.get(METADATA)
    if text is None:
        return configs
    if len(text) > MAX_METADATA_CHARACTERS:
        raise _damaged(path, METADATA, f"at most {MAX_METADATA_CHARACTERS} characters", len(text))
    layers = _json(text, path, METADATA).get("layers")
    if not isinstance(layers, dict):
        raise _damaged(path, f"layers in {METADATA}", "a JSON object", type(layers).__name__)
    # layers that were taken out of a file since it was quantised are still named there
    return configs | {name: _checked(config, path, f"{show(name)} in {METADATA}") for name, config in layers.items()
                      if f"{name}.weight" in tensors}


def _text(info: TensorInfo, path: Path, name: str) -> str:
    if info.format != "U8" or info.nbytes > MAX_CONFIG_BYTES:
        raise _damaged(path, show(name), f"at most {MAX_CONFIG_BYTES} of U8", f"{info.nbytes} bytes of {info.format}")
    try:
        return info.read().numpy().tobytes().decode("utf-8")
    except ValueError as error:
        raise _damaged(path, show(name), "JSON", error) from error


def _json(text: str, path: Path, field: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, field, "JSON", error) from error
    if not isinstance(value, dict):
        raise _damaged(path, field, "a JSON object", type(value).__name__)
    return value


def _config(text: str, path: Path, field: str) -> Mapping[str, Any]:
    return _checked(_json(text, path, field), path, field)


def _checked(config: object, path: Path, field: str) -> Mapping[str, Any]:
    if not isinstance(config, dict) or not isinstance(config.get("format"), str):
        raise _damaged(path, field, 'a JSON object with a "format"', config)
    return config


def _float8(stored: str, layer: _Layer) -> tuple[TensorInfo, Folded]:
    """Its scale, if any, stands beside it as older files have it."""
    return layer.weight(stored), {}


def _int8(layer: _Layer) -> tuple[TensorInfo, Folded]:
    codes = layer.weight("I8")
    rows, width = codes.shape
    one = math.prod(layer.tensors[f"{layer.name}.weight_scale"].shape) == 1 if (
        f"{layer.name}.weight_scale" in layer.tensors) else False
    scale = layer.side("weight_scale", NUMBERS, 1 if one else rows)
    name = "INT8"
    if layer.option("convrot", False):
        group = layer.option("convrot_groupsize", ROTATED[0])
        if group not in ROTATED or width % group:
            raise layer.damaged(f"{layer.name}{CONFIG}", "convrot_groupsize a power of 4 up to "
                                                         f"{max(ROTATED)} that divides {width}", group)
        name = rotated_name(int(group))
    return replace(codes, format=name), {"weight_scale": replace(scale, shape=() if one else (rows, 1))}


def _mxfp8(layer: _Layer) -> tuple[TensorInfo, Folded]:
    codes = layer.weight("F8_E4M3")
    return _blocks(layer, codes, codes.shape[1], FORMATS["MXFP8"], ("F8_E8M0", "U8")), {"weight_scale": None}


def _nvfp4(layer: _Layer) -> tuple[TensorInfo, Folded]:
    codes = layer.weight("U8")
    width = 2 * codes.shape[1]
    packed = _blocks(layer, codes, width, FORMATS["NVFP4_16"], ("F8_E4M3", "U8"))
    whole = layer.side("weight_scale_2", NUMBERS, 1)
    sides: Folded = {"weight_scale": replace(whole, shape=()), "weight_scale_2": None}
    if f"{layer.name}.pre_quant_scale" in layer.tensors:
        # the input is multiplied by it: so are the columns of the weight
        columns = layer.side("pre_quant_scale", NUMBERS, width)
        sides |= {"pre_quant_scale": None, "weight_scale": replace(
            whole, shape=(1, width), format="F32", nbytes=4 * width, build=partial(_product, whole, columns))}
    return packed, sides


READERS: Mapping[str, Callable[[_Layer], tuple[TensorInfo, Folded]]] = {
    "float8_e4m3fn": partial(_float8, "F8_E4M3"), "float8_e5m2": partial(_float8, "F8_E5M2"),
    "int8_tensorwise": _int8, "mxfp8": _mxfp8, "nvfp4": _nvfp4,
}
"""Format -> the weight as one tensor, and its side tensors."""


def _product(whole: TensorInfo, columns: TensorInfo) -> Tensor:
    numbers = whole.read().float().reshape(()) * columns.read().float().reshape(-1)
    return numbers.contiguous().view(torch.uint8)


def _blocks(layer: _Layer, codes: TensorInfo, width: int, format: QuantFormat, kinds: tuple[str, ...]) -> TensorInfo:
    """The codes `(rows, width)` and their tiled scales, one byte each, as blocks of `format`."""
    rows = codes.shape[0]
    if width % format.block:
        raise layer.damaged(f"{layer.name}.weight", f"a width that is a multiple of {format.block}", width)
    columns = width // format.block
    scales = layer.side("weight_scale", kinds, _padded(rows, TILE_ROWS) * _padded(columns, TILE_COLUMNS))
    return replace(codes, shape=(rows, width), format=format.name, nbytes=rows * columns * format.nbytes,
                   build=partial(_interleaved, codes, scales, rows, columns, format))


def _interleaved(codes: TensorInfo, scales: TensorInfo, rows: int, columns: int, format: QuantFormat) -> Tensor:
    blocks = torch.empty(rows * columns, format.nbytes, dtype=torch.uint8)
    blocks[:, 0] = untiled(scales.raw(), rows, columns).reshape(-1)
    blocks[:, 1:] = codes.raw().view(rows * columns, format.nbytes - 1)
    return blocks.view(-1)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def untiled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Block scales in tiles, flat -> `(rows, columns)`."""
    tiles = scales.view(-(-rows // TILE_ROWS), -1, QUARTER, TILE_ROWS // QUARTER, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(_padded(rows, TILE_ROWS), -1)[:rows, :columns]


def _damaged(path: Path, field: str, expected: str, found: object) -> BadModelFile:
    return BadModelFile(path, "damaged weights of comfy_quant", field=field, expected=expected,
                        found=str(found)[:200], advice="Download it again")
