"""LoRAs put into the weights of a file that is being written, tensor by tensor, before they are quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..adapters.adapter import Adapter, swapped
from ..adapters.reading import misfit
from ..adapters.vocabulary import Size
from ..errors import BadInput
from .lora_files import Summand

TILE_WEIGHTS = 1 << 22
"""Numbers of a low-rank change that are worked out at once."""
WEIGHTS = ("weight", "scale")
"""What a layer's weight may be called; a norm's is its scale."""


@dataclass
class Baked:
    """What became of one LoRA: the layers it changed, and those it has but the model has not, with the reason."""

    file: str
    strength: float
    layers: set[str] = field(default_factory=set)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"file": self.file, "strength": self.strength, "layers": len(self.layers),
                "skipped": [list(pair) for pair in self.skipped]}

    def line(self) -> str:
        left = f"; {len(self.skipped)} layers were not: {_examples(self.skipped)}" if self.skipped else ""
        return f"{self.file} at {self.strength:g} was put into {len(self.layers)} layers{left}"


def _examples(skipped: Sequence[tuple[str, str]]) -> str:
    shown = [f"{module} ({reason})" for module, reason in skipped[:3]]
    return ", ".join(shown) + (", ..." if len(skipped) > len(shown) else "")


class Baking:
    """The LoRAs for one model. `report`: one row each."""

    def __init__(self, summands: Sequence[Summand], role: str, shapes: Mapping[str, Size]) -> None:
        """`role`: the model; `shapes`: its tensors by our names. Raises `BadInput` for a LoRA that has no layer in it,
        or that does not fit."""
        self.report = tuple(Baked(one.lora.path.name, one.strength) for one in summands)
        self._jobs: dict[str, list[tuple[Adapter, float, Baked]]] = {}
        for one, told in zip(summands, self.report, strict=True):
            adapters = one.lora.of(role)
            for adapter in adapters:
                self._place(adapter, one.at(adapter.destination), shapes, told)
            if not told.layers:
                raise BadInput(f"{told.file}: nothing of it fits what is written: {_reason(one, role, told)}. Leave it "
                               "out, or choose a LoRA made for this model", file=one.lora.path)

    def _place(self, adapter: Adapter, strength: float, shapes: Mapping[str, Size], told: Baked) -> None:
        module = adapter.destination.module
        whole = next((found for ending in WEIGHTS if (found := f"{module}.{ending}") in shapes), None)
        name = f"{module}.bias" if adapter.on_bias else whole
        if whole is None or name not in shapes:
            told.skipped.append((module, "not in this model"))
            return
        size = shapes[whole]
        problem = misfit(adapter.destination, adapter.size, size, adapter.on_bias)
        wide = not adapter.on_bias and len(size) > 1 and (adapter.size[1] or 0) > size[1]
        if problem is not None or wide:
            told.skipped.append((module, problem or f"for {adapter.size[1]} channels, the model has {size[1]}"))
            return
        if strength and name is not None:
            kept = []
            for job in self._jobs.get(name, []):
                if job[0].outdone(adapter):
                    job[2].skipped.append((module, f"{told.file}, later in the stack, replaces it too"))
                else:
                    kept.append(job)
            self._jobs[name] = [*kept, (adapter, strength, told)]
        told.layers.add(module)

    def changes(self, name: str) -> bool:
        return name in self._jobs

    def changed(self, name: str, weight: Tensor) -> Tensor:
        """The tensor `name`, fp32, of the model's shape, with the changes in it: a new one."""
        jobs = self._jobs[name]
        total = weight.clone()
        size = tuple(weight.shape)
        for adapter, strength, _ in jobs:
            rows = adapter.destination.rows(size)
            if adapter.algorithm == "LoRA" and "magnitude" not in adapter.factors and weight.ndim == 2:
                _add_low_rank(total[rows], adapter, strength)
            else:
                total[rows] += adapter.change(weight[rows], strength)
        return total


def _reason(one: Summand, role: str, told: Baked) -> str:
    if told.skipped:
        return _examples(told.skipped)
    return f"it has layers of {', '.join(one.lora.report.targets) or 'nothing'}, and this is {role}"


def _add_low_rank(total: Tensor, adapter: Adapter, strength: float) -> None:
    """Adds the change a tile of rows at a time; columns beyond the adapter's stay as they are."""
    factors = adapter.numbers(total.dtype, total.device)
    up, down = factors["up"], factors["down"]
    up = up @ factors["mid"] if "mid" in factors else up
    up = swapped(up) if adapter.destination.swapped else up
    step = max(1, TILE_WEIGHTS // down.shape[1])
    for first in range(0, len(up), step):
        total[first:first + step, :down.shape[1]].addmm_(up[first:first + step], down, alpha=adapter.scale * strength)
