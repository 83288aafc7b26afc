"""Unpacked weights kept in memory that is to spare, and given back when it is not.

A layer computes the same with its weight kept as without, bit for bit: it takes the same tiles of rows to the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .formats import QuantFormat
from .ops import Linear

SAMPLE_WEIGHTS = 1 << 16


@dataclass(frozen=True)
class _Kept:
    numbers: Tensor
    source: tuple[object, ...]


class UnpackedCache:
    """At most `budget` bytes of weights that `attach`ed layers need not unpack each time they are used.

    A weight is unpacked whole when its layer is first used, on the layer's device. Of layers that do not all fit, those
    are kept whose unpacking moves most memory for each byte kept. Bytes that take the place of a layer's packed ones,
    or are written into them, are seen, unless they are written past autograd (`weight.data.copy_(...)`).
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.dtype: torch.dtype | None = None
        self._chosen: WeakKeyDictionary[Linear, bool] = WeakKeyDictionary()  # all layers, most worth keeping first
        self._kept: WeakKeyDictionary[Linear, _Kept] = WeakKeyDictionary()

    def attach(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Keeps weights of the packed linear layers of `model`, for products in `dtype`; those of another no more."""
        self.detach()
        self.dtype = dtype
        layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
        for layer in sorted(layers, key=lambda layer: -traffic(layer.format)):
            self._chosen[layer] = False
            layer.cache = self
        self._choose()

    def detach(self) -> None:
        """Keeps nothing, and lets go of the layers."""
        for layer in list(self._chosen):
            layer.cache = None
        self._chosen.clear()
        self._kept.clear()

    def shrink(self, to: int) -> None:
        """From now on at most `to` bytes; what is more is given back at once, what is least worth keeping first."""
        self.budget = min(self.budget, to)
        self._choose()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return sum(kept.numbers.nbytes for kept in self._kept.values())

    def weight(self, layer: Linear, dtype: torch.dtype) -> Tensor | None:
        """The weight of `layer` unpacked, `(out_features, in_features)`, or None if it is not kept."""
        if dtype != self.dtype or not self._chosen.get(layer) or layer.weight.is_meta:
            return None
        source = _identity(layer)
        kept = self._kept.get(layer)
        if kept is None or kept.source != source:
            self._kept.pop(layer, None)  # before the new one takes memory
            kept = self._kept[layer] = _Kept(layer.unpack(slice(None), dtype), source)
        return kept.numbers

    def _choose(self) -> None:
        left = self.budget
        for layer in list(self._chosen):
            nbytes = layer.in_features * layer.out_features * (self.dtype or torch.float32).itemsize
            self._chosen[layer] = nbytes <= left
            if nbytes <= left:
                left -= nbytes
            else:
                self._kept.pop(layer, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> UnpackedCache:
        return self  # a copy of a model is not attached, and shares nothing that is kept


def _identity(layer: Linear) -> tuple[object, ...]:
    """Which bytes and scales the layer holds: equal for the same ones, even after others had their place in memory."""
    return tuple((StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset(), tensor.device,
                  -1 if tensor.is_inference() else tensor._version)
                 for tensor in (layer.weight, layer.scale_weight) if tensor is not None)


@lru_cache(maxsize=256)
def traffic(format: QuantFormat) -> float:
    """Bytes read and written for each weight while it is unpacked: what this costs on any device, near enough."""
    blocks = torch.zeros(SAMPLE_WEIGHTS // format.block, format.nbytes, dtype=torch.uint8)
    format.unpack(blocks)  # its tables are made
    moved = _Moved()  # type: ignore[no-untyped-call]
    with moved:
        format.unpack(blocks)
    return moved.nbytes / SAMPLE_WEIGHTS


class _Moved(TorchDispatchMode):
    """Counts the bytes of what goes into operations and comes out of them; views move nothing."""

    nbytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.nbytes += sum(tensor.nbytes for tensor in _tensors((args, out)))
        return out


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, tuple | list) else []
