"""How much a LoRA changes a model: the length of its changes beside the length of the weights they go to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import layers
from .adapter import Adapter
from .reading import Lora, misfit


@dataclass(frozen=True)
class Share:
    """`total`: length of all changes over that of the weights of all layers changed, at strength 1. `by_layer`: the
    same for each layer, by our name."""

    total: float
    by_layer: dict[str, float] = field(default_factory=dict)


def norm_share(model: nn.Module, lora: Lora, role: str = "transformer", source: layers.Source = layers.STORED
               ) -> Share:
    """Reads every weight that the LoRA changes once, one layer at a time, by `source`; biases are left out."""
    changes: dict[str, float] = {}
    weights: dict[str, float] = {}
    for adapter in lora.of(role):
        module = adapter.destination.module
        layer = layers.layer_of(model, module)
        if layer is None or adapter.on_bias:
            continue
        size = layers.size_of(layer)
        wide = len(size) > 1 and (adapter.size[1] or 0) > size[1]
        if wide or misfit(adapter.destination, adapter.size, size, False) is not None:
            continue
        if module not in weights:
            weights[module] = _square(source.numbers(layer, slice(0, size[0]), torch.float32))
        # parts of a fused layer lie side by side; changes of the same rows are counted as if they did
        changes[module] = changes.get(module, 0.0) + _change(adapter, layer, size, source)
    by_layer = {module: math.sqrt(change / weights[module]) if weights[module] else math.inf
                for module, change in changes.items()}
    whole = sum(weights.values())
    return Share(math.sqrt(sum(changes.values()) / whole) if whole else 0.0, by_layer)


def _change(adapter: Adapter, layer: nn.Module, size: tuple[int, ...], source: layers.Source) -> float:
    """The square of the length of an adapter's change; of a product of thin matrices without forming it."""
    if adapter.algorithm == "LoRA" and not {"magnitude", "mid"} & set(adapter.factors):
        found = adapter.numbers(torch.float64, "cpu")
        inner = (found["up"].T @ found["up"]) * (found["down"] @ found["down"].T)
        return float(inner.sum()) * adapter.scale ** 2
    return _square(adapter.change(source.numbers(layer, adapter.destination.rows(size), torch.float32)))


def _square(values: Tensor) -> float:
    """Of the length; summed up in fp64 on the CPU, which not every device has."""
    rows = torch.linalg.vector_norm(values.flatten(1) if values.ndim > 1 else values[:, None], dim=1)
    return float(torch.linalg.vector_norm(rows.cpu(), dtype=torch.float64)) ** 2
