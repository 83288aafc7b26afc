"""What adapters need of a layer, packed or not: its numbers, products with some of its rows, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TILE_WEIGHTS = 1 << 22
"""Numbers of a packed weight that are unpacked at once."""


def layer_of(model: nn.Module, module: str) -> Any:
    """The layer of this name, None if the model has none (schnell has no `guidance_in`)."""
    found: Any = model
    for word in module.split("."):
        found = getattr(found, word, None) if not word.isdigit() or not hasattr(found, "__len__") else (
            found[int(word)] if int(word) < len(found) else None)
    return found


def is_packed(layer: nn.Module) -> bool:
    """Whether the weight is packed bytes, or of a type that sums must not be stored in, such as plain fp8."""
    return weight_of(layer).dtype not in PLAIN_DTYPES


def weight_of(layer: nn.Module) -> Tensor:
    """The parameter that adapters change; a norm's may be called `scale`."""
    name = weight_name(layer)
    found: Tensor = getattr(layer, name)
    return found


def weight_name(layer: nn.Module) -> str:
    return "weight" if getattr(layer, "weight", None) is not None else "scale"


def size_of(layer: Any) -> tuple[int, ...]:
    """`(out, in)`, `(rows, width)` or `(width,)`, counted in weights."""
    for rows, width in (("out_features", "in_features"), ("num_embeddings", "embedding_dim")):
        if hasattr(layer, rows):
            return int(getattr(layer, rows)), int(getattr(layer, width))
    return tuple(weight_of(layer).shape)


def numbers(layer: nn.Module, rows: slice, dtype: torch.dtype) -> Tensor:
    """These rows of the weight in `dtype`: a copy, on the weight's device."""
    unpacked = getattr(layer, "unpacked", None)
    if unpacked is not None:
        found: Tensor = unpacked(rows, dtype)
        return found
    return weight_of(layer).detach()[rows].to(dtype, copy=True)


def tiles(rows: int, width: int) -> Iterator[slice]:
    """Rows of a weight in the steps in which it is unpacked."""
    step = max(1, TILE_WEIGHTS // width)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def product(layer: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """`x @ weight[rows].T` without the bias, a tile of rows at a time where they have to be unpacked."""
    if not is_packed(layer):
        return F.linear(x, weight_of(layer)[rows].to(x))
    found = [F.linear(x, numbers(layer, slice(rows.start + tile.start, rows.start + tile.stop), x.dtype).to(x.device))
             for tile in tiles(rows.stop - rows.start, size_of(layer)[1])]
    return torch.cat(found, dim=-1)


def bias(layer: Any, like: Tensor) -> Tensor | None:
    """What the layer adds to its products, in `like`'s dtype and on its device."""
    return None if layer.bias is None else layer.bias.to(like)


@dataclass(frozen=True)
class Source:
    """How adapters read a layer: `numbers`, `product` and `bias` as above. A host that stores weights in its own way,
    or changes them at each use, has its own."""

    numbers: Callable[[Any, slice, torch.dtype], Tensor] = numbers
    product: Callable[[Any, Tensor, slice], Tensor] = product
    bias: Callable[[Any, Tensor], Tensor | None] = bias


STORED = Source()
"""As the layers hold them."""


def stream_of(module: str) -> str | None:
    """Which tokens a layer of the transformer sees: `img`, `txt`, `both`, or None for modulations and embedders."""
    if module == "img_in" or module == "final_layer.linear":
        return "img"
    if module == "txt_in":
        return "txt"
    if module.startswith("double_blocks.") and "_mod." not in module:
        return "img" if ".img_" in module else "txt"
    if module.startswith("single_blocks.") and ".modulation." not in module:
        return "both"
    return None
