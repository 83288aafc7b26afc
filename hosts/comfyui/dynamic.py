"""Packed weights for the dynamic VRAM of newer hosts: a tensor layout of ours, and the patcher that drives it.

There the host streams `QuantizedTensor`s by the layout registered for them. Only imported where the host has them.
This has never run on hardware: its parts are proved on the CPU with the host's own functions and a stand-in for its
allocator, and it stays off unless the user asks for it (`objects.wants_dynamic`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.quant_ops
import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor, nn

from ...engine.errors import BadInput
from ...engine.quant import FORMATS
from .layers import Linear
from .packed import PackedPatcher, packed_layers

LAYOUT = "FluxKitPackedLayout"
LayoutParams: Any = comfy.quant_ops.ck.tensor.BaseLayoutParams  # the host itself does not pass this name on


class PackedLayout(QuantizedLayout):  # type: ignore[misc]
    """Packed rows `(rows, row_bytes)` uint8 of a format of `engine.quant`, with a scale or None."""

    @dataclass(frozen=True)
    class Params(LayoutParams):  # type: ignore[misc]
        format: str = ""

        def _tensor_fields(self) -> list[str]:
            return [] if self.scale is None else ["scale"]

    @classmethod
    def quantize(cls, tensor: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        raise BadInput("packed weights are not packed anew: something tried to write a LoRA into them. Load LoRAs with "
                       "Load LoRA, or use a bf16 or fp16 file of this model")

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        return FORMATS[params.format].dequantize(qdata, params.orig_dtype, scale=params.scale)

    @classmethod
    def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, ...]:
        scale = qtensor.params.scale
        return (qtensor._qdata,) if scale is None else (qtensor._qdata, scale)

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        return {"": qdata} if params.scale is None else {"": qdata, "_scale": params.scale}


class DynamicLinear(Linear):
    """The host's linear layer, whose `weight` is a packed `QuantizedTensor`, until the host puts numbers there."""

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        return numbers(weight)

    def set_weight(self, weight: Tensor, inplace_update: bool = False, seed: int | None = None,
                   return_weight: bool = False, **kwargs: Any) -> Tensor:
        """Small layers that the host loads whole keep the numbers it worked out; the bytes are in its backup."""
        if not return_weight:
            self.weight = nn.Parameter(weight, requires_grad=False)
        return weight


def numbers(weight: Tensor) -> Tensor:
    if isinstance(weight, QuantizedTensor):
        unpacked: Tensor = weight.dequantize()
        return unpacked
    return weight


def quantized(layer: Any, dtype: torch.dtype) -> Any:
    """A packed layer's weight as the host's tensor, which says it is of `dtype`; nothing looks at its scales later."""
    layer.check(layer.weight)
    scale = None if layer.scale_weight is None else layer.scale_weight.data
    params = PackedLayout.Params(scale=scale, orig_dtype=dtype, orig_shape=layer.shape, format=layer.format.name)
    return QuantizedTensor(layer.weight.data, LAYOUT, params)


def make_dynamic(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts the host's layers with packed tensors in place of our packed layers; `dtype`: of what they compute."""
    register_layout_class(LAYOUT, PackedLayout)
    for name, layer in packed_layers(model).items():
        with torch.device("meta"):
            made = DynamicLinear(layer.in_features, layer.out_features, layer.bias is not None)
        made.weight = nn.Parameter(quantized(layer, dtype), requires_grad=False)
        made.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)


class DynamicPatcher(comfy.model_patcher.ModelPatcherDynamic):  # type: ignore[misc]
    """The host's dynamic patcher. It would put a LoRA into the bytes it keeps on the device, and pack them anew; here
    it is put on the numbers each time they are used."""

    def layers(self) -> dict[str, DynamicLinear]:
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, DynamicLinear)}

    def load(self, *args: Any, **kwargs: Any) -> Any:
        done = super().load(*args, **kwargs)
        for layer in self.layers().values():
            patch = getattr(layer, "weight_lowvram_function", None)
            if patch is not None:
                layer.weight_lowvram_function = None
                layer.weight_function.insert(0, patch)
        return done

    def clone(self, disable_dynamic: bool = False, **kwargs: Any) -> Any:
        """A static copy holds a model of our own packed layers, made anew, and needs our patcher for them."""
        copy = super().clone(disable_dynamic=disable_dynamic, **kwargs)
        if type(copy) is comfy.model_patcher.ModelPatcher:
            copy.__class__ = PackedPatcher
        return copy

    def model_state_dict_for_saving(self, model: nn.Module | None = None, prefix: str = "") -> dict[str, Tensor]:
        """With numbers, LoRAs in them, in place of packed tensors."""
        state = dict(super().model_state_dict_for_saving(model, prefix))
        for name in self.layers():
            if name.startswith(prefix):
                weight = numbers(self.patch_weight_to_device(f"{name}.weight", self.load_device, return_weight=True))
                state[f"{name.removeprefix(prefix)}.weight"] = weight.to("cpu", self.model.get_dtype())
        return {key: value for key, value in state.items() if not key.endswith(".weight_scale")}
