"""Layers of packed weights inside ComfyUI, and what a patcher has to do differently with them.

The bytes are the parameter `weight`, so the host counts, moves and pins what is really there. Nothing is ever written
into them: what LoRA loaders and hooks hang on a weight stays beside it (`hanging`). What cannot be a side path is put
on the unpacked weight each time it is used, by the host's own function, a tile of rows at a time where it can be.

The state of what hangs where belongs to the layers, because clones of a patcher share them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...engine.adapters.sidepath import SidePath
from ...engine.errors import BadInput
from ...engine.quant import Embedding as EngineEmbedding
from ...engine.quant import Linear as EngineLinear
from ...engine.quant.formats import WIDE_TILE, rows_of
from ...engine.quant.ops import SCALE
from .hanging import Entry, beside, cost, tiled

EMBEDDINGS_IN = torch.float32  # what text encoders compute in
SAVED_TEXT = torch.bfloat16
UNPACK_BYTES = 12
"""Bytes that a weight takes while it is unpacked, beside the result."""
OFFLOADABLE = "offloadable" in inspect.signature(comfy.ops.cast_bias_weight).parameters
every_op = getattr(comfy.ops, "run_every_op", None) or (lambda: None)


class _Hung:
    """What hangs on a packed weight, and its numbers with and without that. Mixed into the engine's layers."""

    format: Any
    weight: nn.Parameter
    scale_weight: nn.Parameter | None
    if TYPE_CHECKING:
        def check(self, packed: Tensor, whole: bool = True) -> None: ...

    def _start(self, rows: int, width: int) -> None:
        self.comfy_cast_weights = True
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []
        self.name, self.shape = "", (rows, width)
        self.release()

    def release(self) -> None:
        """Nothing hangs on the weight."""
        self.key, self.token, self.hooked = "", None, False
        self.entries: list[Entry] = []
        self.whole = False
        self.beside: tuple[SidePath, ...] = ()

    def hang(self, key: str, entries: list[Entry], device: torch.device | None, dtype: torch.dtype) -> None:
        """Hangs these entries on the weight, in place of those before; `dtype`: that of the products."""
        made = beside(self, entries, device, dtype) if entries and isinstance(self, EngineLinear) else None
        self.key, self.entries = key, entries
        self.beside = () if made is None else (made,)
        self.whole = bool(entries) and made is None

    def dense(self, dtype: torch.dtype, weight: Tensor | None = None, entries: list[Entry] | None = None) -> Tensor:
        """The weight unpacked, `(rows, width)` in `dtype`, with `entries` put on it in fp32. `weight`: the bytes."""
        weight = self.weight if weight is None else weight
        self.check(weight)
        scale = None if self.scale_weight is None else self.scale_weight.to(weight.device)
        if not entries:
            unpacked: Tensor = self.format.dequantize(weight, dtype, scale=scale)
            return unpacked
        cuts = tiled(entries, *self.shape)
        if cuts is not None:
            made = torch.empty(self.shape, dtype=dtype, device=weight.device)
            for tile, own in cuts:
                some = None if scale is None else rows_of(scale, tile)
                made[tile] = comfy.lora.calculate_weight(
                    own, self.format.dequantize(weight[tile], torch.float32, scale=some), self.key)
            return made
        numbers = self.format.dequantize(weight, torch.float32, scale=scale)
        compared = [entry[1][1][0] for entry in entries if _compares(entry)]
        if any(other.shape != numbers.shape or not other.is_floating_point() for other in compared):
            raise BadInput(f"'{self.name}' cannot be compared with the packed weights of another model. Give the model "
                           "that acts as a LoRA as a bf16 or fp16 file")
        original = {self.key: [(numbers.clone(), None)]} if compared else None
        changed: Tensor = comfy.lora.calculate_weight(entries, numbers, self.key, original_weights=original)
        if changed.shape != numbers.shape:
            raise BadInput(f"a LoRA wants to change the size of '{self.name}' from {tuple(numbers.shape)} to "
                           f"{tuple(changed.shape)}; packed weights ({self.format.name}) keep theirs. Use a bf16, fp16 "
                           "or fp8 file of this model")
        return changed.to(dtype)

    def used(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight as a product takes it where it cannot stay in tiles: `dense` with what hangs on it, then the
        functions that other nodes put on weights."""
        numbers = self.dense(dtype, weight, self.entries if self.whole else None)
        for function in self.weight_function:
            if isinstance(function, comfy.model_patcher.LowVramPatch):
                raise self._refusal()
            numbers = function(numbers)
        return numbers

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The host's name for stored -> numbers; it hands the bytes over as whatever dtype it computes in."""
        return self.dense(weight.dtype if weight.is_floating_point() else torch.float32, weight.to(torch.uint8))

    def set_weight(self, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's name for numbers -> stored, which packed weights refuse."""
        raise self._refusal()

    def _refusal(self) -> BadInput:
        return BadInput(f"something tried to write into '{self.name}', whose weights are packed ({self.format.name}) "
                        "and stay as they are. Load LoRAs with Load LoRA, or use a bf16 or fp16 file of this model")


def _compares(entry: Entry) -> bool:
    value = entry[1]
    return isinstance(value, tuple) and len(value) == 2 and value[0] == "model_as_lora"


@contextmanager
def fetched(layer: Any, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The layer's bytes and bias on `device`, by the host's streams and buffers; what it would put on the weight as if
    it were numbers waits outside."""
    held, layer.weight_function = layer.weight_function, []
    more = {"offloadable": True} if OFFLOADABLE else {}
    try:
        weight, bias, *stream = comfy.ops.cast_bias_weight(layer, dtype=torch.uint8, device=device, bias_dtype=dtype,
                                                           **more)
    finally:
        layer.weight_function = held
    try:
        yield weight, bias
    finally:
        if stream:
            comfy.ops.uncast_bias_weight(layer, weight, bias, *stream)


class Linear(_Hung, EngineLinear):
    """The engine's packed linear layer, brought to the device of what it computes."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        EngineLinear.__init__(self, in_features, out_features, bias, **options)
        self._start(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        every_op()
        if self.weight.device == x.device and not (self.whole or self.weight_function or self.bias_function):
            out = EngineLinear.forward(self, x)
        else:
            with fetched(self, x.device, x.dtype) as (weight, bias):
                out = F.linear(x, self.used(weight, x.dtype), bias)
        return self.with_side(x, out)

    def with_side(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output with what hangs beside it."""
        for side in self.beside:
            if side.strength.device != x.device:
                side.to(x.device)
            out = side(self, (x,), out)
        return out


class Embedding(_Hung, EngineEmbedding):
    """The engine's packed embedding; rows are gathered before they travel and are unpacked."""

    bias: None = None

    def __init__(self, num_embeddings: int, embedding_dim: int, **options: Any) -> None:
        EngineEmbedding.__init__(self, num_embeddings, embedding_dim, **{**options, "dtype": EMBEDDINGS_IN})
        self._start(num_embeddings, embedding_dim)

    def forward(self, ids: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        every_op()
        dtype = self.dtype if out_dtype is None else out_dtype
        if self.whole or self.weight_function:
            with fetched(self, ids.device, dtype) as (weight, _):
                return F.embedding(ids, self.used(weight, dtype))
        rows = ids.reshape(-1).to(self.weight.device)
        return self.unpacked(rows, dtype).view(*ids.shape, self.embedding_dim).to(ids.device)


class HostPacked:
    """The engine's `PackedOps` by this host."""

    Linear = Linear
    Embedding = Embedding


def is_hung(layer: nn.Module) -> bool:
    """Whether the layer holds packed weights of ours."""
    return isinstance(layer, _Hung)


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of this module that hold packed weights, by name."""
    return {name: layer for name, layer in model.named_modules() if is_hung(layer)}


def weight_count(model: nn.Module) -> int:
    """Weights, packed or not."""
    packed = {f"{name}.weight": layer for name, layer in packed_layers(model).items()}
    return sum(packed[name].shape[0] * packed[name].shape[1] if name in packed else parameter.numel()
               for name, parameter in model.named_parameters())


def scratch(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes to use the largest packed layer: its weights in `dtype`, and what it takes to unpack a tile of them."""
    counts = [layer.shape[0] * layer.shape[1] for layer in packed_layers(model).values()]
    return max((count * dtype.itemsize + min(count, WIDE_TILE) * UNPACK_BYTES for count in counts), default=0)


class Flux(comfy.model_base.Flux):  # type: ignore[misc]
    """The host's FLUX.1 with packed layers inside."""

    def memory_required(self, *args: Any, **kwargs: Any) -> float:
        need: float = super().memory_required(*args, **kwargs)
        return need + scratch(self.diffusion_model, self.manual_cast_dtype or self.get_dtype())

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        state: dict[str, Tensor] = super().state_dict_for_saving(*args, **kwargs)
        return unpacked_state(state, self.diffusion_model, "model.diffusion_model.", self.get_dtype())


def unpacked_state(state: Mapping[str, Tensor], model: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict with numbers, LoRAs in them, in place of packed bytes, which other programs could not read."""
    state = dict(state)
    for name, layer in packed_layers(model).items():
        state.pop(f"{prefix}{name}.{SCALE}", None)
        key = f"{prefix}{name}.weight"
        if state[key].dtype == torch.uint8:
            state[key] = layer.dense(dtype, entries=layer.entries)
    return state


class Clip(comfy.sd.CLIP):  # type: ignore[misc]
    """The host's CLIP with packed layers inside; saving it unpacks them, to bf16."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.patcher.__class__ = PackedPatcher  # the host may have noted this very object as loaded

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        copy = super().clone(*args, **kwargs)
        copy.__class__ = type(self)
        return copy

    def get_sd(self) -> dict[str, Tensor]:
        return unpacked_state(super().get_sd(), self.cond_stage_model, "", SAVED_TEXT)


class Numbers(dict[str, Tensor]):
    """A state dict whose packed weights are unpacked when they are asked for."""

    def __init__(self, state: Mapping[str, Tensor], patcher: PackedPatcher) -> None:
        super().__init__(state)
        self.patcher = patcher

    def __getitem__(self, key: str) -> Tensor:
        layer = self.patcher.layer_of(key)
        return super().__getitem__(key) if layer is None else layer.dense(self.patcher.products_in(),
                                                                          entries=layer.entries)


class PackedPatcher(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """The host's static patcher, which would bake patches into weights; here they hang beside packed ones, in the same
    way whether a layer is loaded or streamed."""

    def layers(self) -> dict[str, Any]:
        return packed_layers(self.model)

    def layer_of(self, key: str) -> Any:
        """The packed layer whose weight goes by this key, else None."""
        path, _, kind = key.rpartition(".")
        if kind not in ("weight", SCALE):
            return None
        layer = comfy.utils.get_attr(self.model, path)
        return layer if isinstance(layer, _Hung) and kind == "weight" else None

    def products_in(self) -> torch.dtype:
        """The dtype that layers compute in."""
        dtype = getattr(self.model, "manual_cast_dtype", None) or self.model_dtype() or EMBEDDINGS_IN
        return dtype if isinstance(dtype, torch.dtype) else EMBEDDINGS_IN

    def _hang(self, hooks: Mapping[str, list[Entry]] | None = None, only_hooked: bool = False) -> None:
        """What this patcher and these hooks have for packed weights, on the layers."""
        device, dtype = self.load_device, self.products_in()
        for name, layer in self.layers().items():
            key = f"{name}.weight"
            extra = (hooks or {}).get(key, [])
            token = None if extra else (self.patches_uuid, device, dtype)
            if (only_hooked and not layer.hooked) or (token is not None and token == layer.token):
                continue
            layer.hang(key, [*self.patches.get(key, []), *extra], device, dtype)
            layer.token, layer.hooked = token, bool(extra)

    def reserve(self) -> int:
        """Bytes for what patches and hooks hang on packed weights: side paths, and the room to put others on."""
        stands, works = 0, 0
        places = [self.patches, *getattr(self, "hook_patches", {}).values()]  # asked for while the host still makes it
        itemsize = self.products_in().itemsize
        for name, layer in self.layers().items() if any(places) else ():
            entries = [entry for place in places for entry in place.get(f"{name}.weight", ())]
            if entries:
                rows, width = layer.shape
                more, while_used = cost(entries, rows, width, itemsize)
                stands, works = stands + more, max(works, while_used)
        return stands + works

    def model_size(self) -> int:
        """The weights, and the reserve: so the host frees room for it, and loads fewer weights where there is none."""
        return int(super().model_size()) + self.reserve()

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        copy = super().clone(*args, **kwargs)
        if copy.model is self.model:
            copy.size = self.size  # newer hosts hand on what `model_size` gives, and the reserve is each patcher's own
        return copy

    def load(self, device_to: Any = None, lowvram_model_memory: int = 0, force_patch_weights: bool = False,
             full_load: bool = False, **kwargs: Any) -> Any:
        """Loads as the host does, then hangs patches on; hooks that are always on come with it."""
        reserve = self.reserve()
        done = super().load(device_to, max(lowvram_model_memory - reserve, 0), force_patch_weights, full_load, **kwargs)
        self._unstring()
        if not any(layer.hooked for layer in self.layers().values()):
            self._hang()
        told = self.model.model_loaded_weight_memory
        self.model.model_loaded_weight_memory = min(told + reserve, self.model_size())
        return done

    def _unstring(self) -> None:
        """Takes off what the host puts on streamed weights as if they were numbers; it hangs beside them already."""
        for layer in self.layers().values():
            layer.weight_function = [function for function in layer.weight_function
                                     if not isinstance(function, comfy.model_patcher.LowVramPatch)]

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        freed = super().partially_unload(*args, **kwargs)
        self._unstring()
        return freed

    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        done = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            for layer in self.layers().values():
                layer.release()
        return done

    def patch_weight_to_device(self, key: str, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer_of(key)
        if layer is not None:
            if kwargs.get("return_weight"):
                return layer.dense(self.products_in(), entries=self.patches.get(key))
            return layer.weight
        if key.endswith(f".{SCALE}"):  # merging nodes patch every parameter; the weight's patch is of its numbers
            return comfy.utils.get_attr(self.model, key)
        return super().patch_weight_to_device(key, *args, **kwargs)

    # -- hooks
    def patch_hooks(self, hooks: Any) -> None:
        super().patch_hooks(hooks)
        self._hang(None if hooks is None else self.get_combined_hook_patches(hooks))

    def patch_hook_weight_to_device(self, *args: Any, **kwargs: Any) -> None:
        key = kwargs["key"] if "key" in kwargs else args[2]
        if self.layer_of(key) is None:
            super().patch_hook_weight_to_device(*args, **kwargs)

    def unpatch_hooks(self, *args: Any, **kwargs: Any) -> None:
        super().unpatch_hooks(*args, **kwargs)
        self._hang(only_hooked=True)

    # -- saving
    def model_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return Numbers(super().model_state_dict(*args, **kwargs), self)

    def model_state_dict_for_saving(self, model: nn.Module | None = None, prefix: str = "") -> dict[str, Tensor]:
        """Asked for by newer hosts, which wrap each parameter that is not loaded; bytes cannot be wrapped so."""
        part = self.model if model is None else model
        dtype = SAVED_TEXT if self.is_clip else self.model.get_dtype()
        layers = packed_layers(part)
        streamed = [name for name, layer in layers.items() if not getattr(layer, "comfy_patched_weights", False)]
        for name in streamed:
            layers[name].comfy_patched_weights = True
        try:
            state = dict(super().model_state_dict_for_saving(model, prefix))
        finally:
            for name in streamed:
                layers[name].comfy_patched_weights = False
        for name in streamed:
            key = f"{prefix}{name}.bias"
            if key in self.patches:
                state[f"{name}.bias"] = super().patch_weight_to_device(key, self.load_device, return_weight=True)
        for name, layer in layers.items():
            state.pop(f"{name}.{SCALE}", None)
            state[f"{name}.weight"] = layer.dense(dtype, entries=self.patches.get(f"{prefix}{name}.weight"))
        return state
