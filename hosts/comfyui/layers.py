"""ComfyUI's layers and kernels in the shape of the engine's `ops` (`engine.models.ops.Ops`).

Layers bring their weights to the device of what they compute, apply what the host hangs on them (LoRA, wrappers) and
are found by its memory management: all of that goes by attributes of `comfy.ops` classes.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine.adapters import layers as stored
from ...engine.errors import BadInput
from ...engine.models.attention import attention as plain_attention
from ...engine.models.ops import Ops
from ...engine.quant import Embedding as EnginePackedEmbedding
from ...engine.quant import Linear as EnginePackedLinear
from ...engine.quant.ops import SCALE
from .packed import is_hung, packed_layers

NORM_EPS = 1e-6  # of hosts whose own norm for q and k does not tell; BFL's
UNPACKED = ("img_in",)  # its width tells the host and control LoRAs how many channels go in
COMPUTE_TEXT_IN = torch.float32  # as newer hosts do; the weights stay as they are stored


class Linear(comfy.ops.manual_cast.Linear):  # type: ignore[misc]
    """Has its weights from the start: hosts that leave them out until a checkpoint comes look for this override."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        nn.Module._load_from_state_dict(self, *arguments)


class Embedding(comfy.ops.manual_cast.Embedding):  # type: ignore[misc]
    """Rows in the dtype that text encoders compute in, which all layers behind it then follow."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        nn.Module._load_from_state_dict(self, *arguments)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = super().forward(ids, out_dtype=COMPUTE_TEXT_IN)
        return rows.to(COMPUTE_TEXT_IN)


class WeightNorm(comfy.ops.manual_cast.RMSNorm):  # type: ignore[misc]
    """RMSNorm with a parameter `weight`."""

    def __init__(self, dim: int, eps: float | None, name: str = "weight") -> None:
        if name != "weight":
            raise ValueError(f"the parameter of this norm is 'weight', not {name!r}")
        super().__init__(dim, eps=eps)


class ScaleNorm(nn.Module):
    """RMSNorm with a parameter `scale`, not offloaded on its own: hosts of this spelling move only `weight`s."""

    def __init__(self, dim: int, eps: float | None) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        scale = comfy.model_management.cast_to(self.scale, dtype=x.dtype, device=x.device)
        return F.rms_norm(x, scale.shape, scale, self.eps)


@dataclass
class Layers:
    """An `ops` namespace."""

    RMSNorm: Any
    attention: Any
    Linear: Any = Linear
    Embedding: Any = Embedding
    Conv2d: Any = comfy.ops.manual_cast.Conv2d
    LayerNorm: Any = comfy.ops.manual_cast.LayerNorm
    GroupNorm: Any = comfy.ops.manual_cast.GroupNorm


@cache
def flux_layers() -> Ops:
    """For the transformer: the host's attention with its RoPE inside, and norms of q and k as its own Flux has them,
    whose parameter name LoRA files for this host are written for and whose epsilon shows in the last bits."""
    probe = comfy.ldm.flux.layers.QKNorm(8, dtype=torch.float32, device="meta",
                                         operations=comfy.ops.manual_cast).query_norm
    (name, _), = probe.named_parameters()
    host_eps = getattr(probe, "eps", NORM_EPS)
    kind = WeightNorm if name == "weight" else ScaleNorm

    def norm(dim: int, eps: float) -> nn.Module:
        return kind(dim, host_eps)

    return Layers(RMSNorm=norm, attention=host_attention)


@cache
def plain_layers() -> Ops:
    """For text encoders and autoencoder: the host's layers with torch's own attention. Faster kernels that users
    choose for the transformer refuse masks, wide heads, or lose digits that matter here."""
    return Layers(RMSNorm=WeightNorm, attention=plain_attention)


def host_attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor | None = None, mask: Tensor | None = None,
                   options: dict[str, Any] | None = None) -> Tensor:
    """`engine.models.attention.attention` by the host's kernel, with patches that other nodes put before and after."""
    options = {} if options is None else options
    patches = options.get("patches", {})
    for patch in patches.get("attn1_patch", ()):
        out = patch(q, k, v, pe=pe, attn_mask=mask, extra_options=options.copy())
        q, k, v, pe, mask = (out.get(name, value) for name, value in (
            ("q", q), ("k", k), ("v", v), ("pe", pe), ("attn_mask", mask)))
    attended: Tensor = comfy.ldm.flux.math.attention(q, k, v, pe=pe, mask=mask, transformer_options=options)
    for patch in patches.get("attn1_output_patch", ()):
        attended = patch(attended, options.copy())
    return attended


class InUse:
    """The weights of layers as the host uses them: scaled, and with what it puts on them at each use. So what is worked
    out from them is the same for a layer that is loaded, whose weight the host has changed, and for one that is not."""

    def __init__(self) -> None:
        self._kept: tuple[Any, torch.dtype, Tensor] | None = None
        self.source = stored.Source(self.numbers, self.product, self.bias)

    def forget(self) -> None:
        self._kept = None

    def numbers(self, layer: Any, rows: slice, dtype: torch.dtype) -> Tensor:
        """`engine.adapters.layers.numbers`; the layer that is read by tiles is kept as a whole until the next one."""
        if is_stored(layer):
            return stored.numbers(layer, rows, dtype)
        if self._kept is None or self._kept[:2] != (layer, dtype):
            self._kept = layer, dtype, in_use(layer, dtype, layer.weight.device)
        return self._kept[2][rows]

    def product(self, layer: Any, x: Tensor, rows: slice) -> Tensor:
        if is_stored(layer):
            return stored.product(layer, x, rows)
        return F.linear(x, in_use(layer, x.dtype, x.device)[rows])

    def bias(self, layer: Any, like: Tensor) -> Tensor | None:
        functions = getattr(layer, "bias_function", ())
        found = stored.bias(layer, like)
        if found is None or not functions:
            return found
        found = found.clone()
        for function in functions:
            found = function(found)
        return found


def is_stored(layer: Any) -> bool:
    """Whether the host uses the weight as it is."""
    weight = stored.weight_of(layer)
    plain = weight.dtype in stored.PLAIN_DTYPES and type(weight.data) is Tensor
    return (plain or is_hung(layer)) and not (getattr(layer, "weight_function", ()) or getattr(layer, "entries", ()))


def in_use(layer: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A linear layer's whole weight as the host uses it."""
    if is_hung(layer):
        numbers: Tensor = layer.dense(dtype, layer.weight.to(device), layer.entries)
        return numbers
    weight, _ = comfy.ops.cast_bias_weight(layer, dtype=dtype, device=device, bias_dtype=dtype)
    convert = getattr(layer, "convert_weight", None)
    numbers = weight if convert is None else convert(weight)
    if numbers.numel() != layer.out_features * layer.in_features:
        raise BadInput(f"this model's weights are packed by another pack ({type(layer).__name__}), and a LoRA of this "
                       "kind (DoRA, OFT, IA3 or GLoRA) has to read them to act beside them. Load the model with Load "
                       "Flux, or apply the LoRA in mode 'auto' without range, schedule and region")
    return numbers.to(dtype)


def adopt(source: nn.Module, target: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Moves the weights of an engine model into the same model built of the host's layers, on the meta device so far.

    Names may differ where the host calls a parameter otherwise; order and shapes may not. `dtype` None keeps each.
    Layers of packed weights that are the host's take the place of plain ones as they are; others are unpacked.
    Tensors that are views of a mapped file are copied: the host moves weights about and writes to them, which faults
    on mapped memory on some systems.
    """
    kept = {name: layer for name, layer in packed_layers(source).items() if name not in UNPACKED}
    for name, layer in kept.items():
        layer.name = name
        parent, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(parent), leaf, layer)
    weights, names = with_numbers(source, kept), list(target.state_dict())
    shapes = [tensor.shape for tensor in target.state_dict().values()]
    if [tensor.shape for tensor in weights.values()] != shapes:
        raise ValueError(f"{type(source).__name__} and {type(target).__name__} do not hold the same weights")
    exact = {f"{name}.{kind}" for name in kept for kind in ("weight", SCALE)}
    ready = {}
    for name, (ours, tensor) in zip(names, weights.items(), strict=True):
        value = tensor if dtype is None or ours in exact else tensor.to(dtype)
        ready[name] = value if value.untyped_storage().resizable() else value.clone()
    target.load_state_dict(ready, strict=True, assign=True)
    target.requires_grad_(False)
    target.eval()


def with_numbers(source: nn.Module, kept: Container[str]) -> dict[str, Tensor]:
    """The state dict with packed layers unpacked, to fp32, but for those kept."""
    weights = dict(source.state_dict())
    for name, layer in source.named_modules():
        if isinstance(layer, EnginePackedLinear | EnginePackedEmbedding) and name not in kept:
            weights[f"{name}.weight"] = layer.unpacked(slice(None), torch.float32)
            weights.pop(f"{name}.{SCALE}", None)
    return weights
