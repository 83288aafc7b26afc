"""The table of modulations (`engine.models.modulation`) in a host that patches and moves weights by itself.

The host drives the sampling, so an entry is computed when it is first asked for, and with it those of the later sigmas
of the same run. Layers that the host hangs something on compute in their blocks; while hooks change weights during a
run, all do. What the table replaces is loaded last and given back first: where a model does not fit, it is these
weights that stay off the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.model_patcher import LowVramPatch
from torch import Tensor, nn

from ...engine.models.flux import Flux
from ...engine.models.modulation import ModulationTable, State, modulation_modules
from .control import WideLoaded
from .packed import OFFLOADABLE, HostPacked, PackedPatcher, fetched


class HostTable(ModulationTable):
    """For a transformer that is the `diffusion_model` of `model`, the host's BaseModel."""

    sigmas: Tensor | None = None    # of the run that the host is in

    def __init__(self, flux: Flux, model: Any, **options: Any) -> None:
        super().__init__(flux, **options)
        self._model = weakref.ref(model)

    def owner(self) -> object:
        """Which patches the host has put into the weights; None while hooks are on or the model is another's."""
        model = self._model()
        if model is None or model.diffusion_model is not self._flux():
            return None
        patcher = getattr(model, "current_patcher", None)
        hooks = getattr(patcher, "current_hooks", None)
        return None if hooks is not None else (getattr(model, "current_weight_patches_uuid", None),)

    def state(self, layer: nn.Module) -> State | None:
        """What the host itself hangs on a layer stays the same as long as its `owner` does."""
        functions = [*getattr(layer, "weight_function", ()), *getattr(layer, "bias_function", ())]
        if getattr(layer, "hooked", False) or not all(type(each) is LowVramPatch for each in functions):
            return None
        own = super().state(layer)
        return None if own is None else (*own, len(functions), getattr(layer, "token", None))

    def ahead(self) -> Sequence[float]:
        return () if self.sigmas is None else self.sigmas.tolist()

    def lend(self, layers: Sequence[nn.Module], device: torch.device) -> AbstractContextManager[None]:
        """The host's layers bring their weights themselves."""
        return nullcontext()

    def evaluate(self, layer: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        """As the layer computes, its weights brought over once. Where they lie on the device, by the layer itself."""
        if layer.weight.device == inputs[0].device:
            return [layer(x) for x in inputs]
        return carried(layer, inputs)


def carried(layer: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What a layer gives whose weights the host brings to the inputs, which it does once for all of them."""
    device, dtype = inputs[0].device, inputs[0].dtype
    if isinstance(layer, HostPacked.Linear):
        with fetched(layer, device, dtype) as (packed, bias):
            numbers = layer.used(packed, dtype)
            return [_hooked(layer, x, layer.with_side(x, F.linear(x, numbers, bias))) for x in inputs]
    more = {"offloadable": True} if OFFLOADABLE else {}
    weight, bias, *stream = comfy.ops.cast_bias_weight(layer, inputs[0], **more)
    try:
        return [_hooked(layer, x, F.linear(x, weight, bias)) for x in inputs]
    finally:
        if stream:
            comfy.ops.uncast_bias_weight(layer, weight, bias, *stream)


def _hooked(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    """The output as the hooks of the layer leave it, which are side paths (`state_of`)."""
    for hook in layer._forward_hooks.values():
        out = hook(layer, (x,), out)
    return out


class Last(int):
    """A number that sorts below all others, and by size among its kind."""

    def __lt__(self, other: int) -> bool:
        return not isinstance(other, Last) or int(self) < int(other)

    def __gt__(self, other: int) -> bool:
        return isinstance(other, Last) and int(self) > int(other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Last) and int(self) == int(other)

    __hash__ = int.__hash__


class ModulationsLast:
    """For a patcher: what a table replaces is loaded last and unloaded first."""

    model: Any

    def _load_list(self, *args: Any, **kwargs: Any) -> Any:
        """The host loads from the largest down and unloads from the smallest up, by the first field of each row."""
        rows = super()._load_list(*args, **kwargs)  # type: ignore[misc]
        flux = getattr(self.model, "diffusion_model", None)
        if not isinstance(flux, Flux) or flux.modulations is None:
            return rows
        replaced = {id(layer) for _, layer in modulation_modules(flux)}
        return [(Last(row[0]), *row[1:]) if any(id(field) in replaced for field in row) else row for row in rows]


class Patcher(WideLoaded, ModulationsLast, comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """The host's static patcher, for a transformer with a table."""


class TablePackedPatcher(WideLoaded, ModulationsLast, PackedPatcher):
    """`PackedPatcher`, for a transformer with a table."""
