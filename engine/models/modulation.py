"""The modulations of FLUX.1 as a table.

More than a quarter of the transformer's weights see nothing but time, guidance and pooled text: `time_in`, `vector_in`,
`guidance_in`, the `lin` of each `Modulation` and `adaLN_modulation` of the last layer. Their outputs are a few numbers
per step, the same for every token. `ModulationTable` computes them once for each input, one layer at a time, and hands
them to the blocks; the weights need not be on the device meanwhile. They stay parameters of the model: what calls a
layer or a block without the table's rows computes from them.

Exact means bit for bit: an entry is what the layers give for one batch of inputs as a whole. Rows computed in a batch
of another size differ in the last bits (another kernel), so entries are told apart by the content of the whole batch,
its dtype and its device, and are never put together from single rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .layers import (
    ROWS,
    BlockRows,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    Modulation,
    Options,
    SingleStreamBlock,
)

if TYPE_CHECKING:
    from .flux import Flux

Inputs = tuple[Tensor, Tensor, Tensor | None]
"""timesteps `(B,)` fp32, y `(B, vec_in_dim)`, guidance `(B,)` or None: what `Flux.vec` takes."""
Key = tuple[Any, ...]
SHARE = 1 / 16
"""The table takes at most this share of the bytes of the weights it replaces: of FLUX.1-dev in bf16 that is 400 MB, 190
entries of one picture."""
PROBES = 64
EMBEDDERS = ("time_in", "guidance_in", "vector_in")

_NOTED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def note(tensor: Tensor, source: Tensor) -> Tensor:
    """`tensor`, remembered as a copy of `source`, which lies on the CPU: the device need not be asked for it later."""
    if tensor.device.type != "cpu" and source.device.type == "cpu":
        _NOTED[tensor] = content(source.to(tensor.dtype), wait=False)
    return tensor


def content(tensor: Tensor, wait: bool) -> Key | None:
    """dtype, shape and bytes of a tensor; None if that would make a device wait and `wait` is off."""
    if tensor.device.type != "cpu":
        noted: Key | None = _NOTED.get(tensor)
        if noted is not None or not wait:
            return noted
        tensor = tensor.cpu()
    plain = tensor.detach().contiguous()
    return plain.dtype, tuple(plain.shape), plain.view(torch.uint8).numpy().tobytes()


def modulation_modules(flux: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and layers of a `Flux` whose weights a table replaces, in the order of their use."""
    found = [(f"{name}.{layer}", getattr(getattr(flux, name), layer)) for name in EMBEDDERS
             if isinstance(getattr(flux, name), MLPEmbedder) for layer in ("in_layer", "out_layer")]
    for group in ("double_blocks", "single_blocks"):
        for i, block in enumerate(getattr(flux, group)):
            found += [(f"{group}.{i}.{name}", layer) for name, layer in _block_layers(block)]
    return found + [(f"final_layer.{name}", layer) for name, layer in _block_layers(flux.final_layer)]


def _block_layers(block: Any) -> list[tuple[str, Any]]:
    """The modulating layers of one of the engine's blocks, in the order of its rows; none of another pack's."""
    block = getattr(block, "_orig_mod", block)  # torch.compile's wrapper
    if isinstance(block, LastLayer):
        parts = block.adaLN_modulation
        plain = type(parts) is nn.Sequential and len(parts) == 2 and type(parts[0]) is nn.SiLU and _is_plain(parts)
        return [("adaLN_modulation.1", parts[1])] if plain else []
    names = (("img_mod", "txt_mod") if isinstance(block, DoubleStreamBlock)
             else ("modulation",) if isinstance(block, SingleStreamBlock) else ())
    found = [(name, getattr(block, name)) for name in names]
    if not all(type(part) is Modulation and _is_plain(part) for _, part in found):
        return []
    return [(f"{name}.lin", part.lin) for name, part in found]


def _is_plain(module: nn.Module) -> bool:
    """Whether a call of this module runs the forward of its class and nothing else."""
    return not module._forward_hooks and _is_called_so(module)


def _is_called_so(module: nn.Module) -> bool:
    return not (module._forward_pre_hooks or "forward" in vars(module))


State = tuple[object, ...]


def state_of(layer: nn.Module) -> State | None:
    """What tells the present effect of all that hangs on a layer from any other; None if that is not known.

    A forward hook is known if it has a method `steady`, which gives an object of its own for each effect that it has
    had, or None while its effect is not the same for every call (a side path of LoRAs is such a hook).
    """
    states = []
    for hook in layer._forward_hooks.values():
        steady = getattr(hook, "steady", None)
        state = None if steady is None else steady()
        if state is None:
            return None
        states.append(state)
    return tuple(states) if _is_called_so(layer) else None


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]


def _places_of(layer: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return layer._parameters, layer._buffers


@contextmanager
def lent(layers: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """These layers with copies of their weights on `device`; afterwards with the very parameters that they had."""
    held = [(place, name, tensor) for layer in layers for place in _places_of(layer)
            for name, tensor in place.items() if tensor is not None and tensor.device != device]
    try:
        for place, name, tensor in held:
            place[name] = tensor.detach().to(device, non_blocking=True)
        yield
    finally:
        for place, name, tensor in held:
            place[name] = tensor


@lru_cache(maxsize=64)
def _places(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Indices of `PROBES` places spread over every row and column of this shape."""
    return tuple(torch.linspace(0, side - 1, PROBES).round().long() for side in shape)


class _Seen:
    """A weight as it was when the table was filled from it. A write in place that neither torch's count of versions
    nor the table's owner tells of (`weight.data += ...`) is noticed by a probe, where that makes no device wait."""

    def __init__(self, tensor: Tensor) -> None:
        self.of, self.state = weakref.ref(tensor), self._state(tensor)

    @staticmethod
    def _state(tensor: Tensor) -> tuple[object, ...]:
        probe = b""
        if tensor.device.type == "cpu" and tensor.ndim and tensor.numel():
            probe = tensor.detach()[_places(tuple(tensor.shape))].view(torch.uint8).numpy().tobytes()
        version = None if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), probe

    def still(self, tensor: Tensor) -> bool:
        return self.of() is tensor and self.state == self._state(tensor)


class Entry:
    """Outputs of the modulating layers for one batch of inputs, by the identity of the layer."""

    def __init__(self, vec: Tensor, rows: dict[int, Tensor]) -> None:
        self.vec = vec              # (B, hidden)
        self.rows = rows            # (B, out_features)
        self._writes = 0 if vec.is_inference() else vec._version

    @property
    def nbytes(self) -> int:
        return self.vec.nbytes + sum(row.nbytes for row in self.rows.values())

    def handed_out(self) -> Entry:
        """For one pass through the model, with a `vec` of its own that counts writes, in inference mode too."""
        with torch.inference_mode(False), torch.no_grad():
            return Entry(self.vec.clone(), self.rows)

    def of(self, block: nn.Module) -> BlockRows | None:
        """What a block is told: nothing if there is nothing for it, or if something wrote into the vec."""
        parts = tuple((layer.weight, self.rows.get(id(layer))) for _, layer in _block_layers(block))
        known = self.vec._version == self._writes and any(row is not None for _, row in parts)
        return (self.vec, parts) if known else None


def informed(block: Any, entry: Entry | None) -> Any:
    """`block`, or a call of it that puts its rows among the options that it is called with."""
    if entry is None or entry.of(block) is None:
        return block

    def call(*tokens: Tensor, transformer_options: Options = None, **rest: Any) -> Any:
        rows = entry.of(block)
        if rows is None:
            return block(*tokens, transformer_options=transformer_options, **rest)
        options = {} if transformer_options is None else transformer_options
        options[ROWS] = rows
        try:
            return block(*tokens, transformer_options=options, **rest)
        finally:
            options.pop(ROWS, None)

    return call


class ModulationTable:
    """Attached to a `Flux` by being made for it (`flux.modulations`); `detach` takes it off again.

    Every `forward_orig` asks it, by `at`. It answers without gradients, compilation of the whole model and autocast,
    and only from layers that were there when it was made and are called as their class is: one that another module
    took the place of, or on which something hangs whose effect may change from call to call (`state_of`), computes in
    its block as without a table. Any change of a weight, or of what hangs on a layer, empties it. `share` bounds its
    bytes by those of the weights it replaces; what does not fit is computed each time.

    A layer whose weights are not on the device of the inputs is `lent` to it for the time of its work. `computed` and
    `found` count entries.
    """

    def __init__(self, flux: Flux, *, share: float = SHARE) -> None:
        self._flux, self._share = weakref.ref(flux), share
        self._own = {id(layer): weakref.ref(layer) for _, layer in modulation_modules(flux)}
        self._entries: dict[Key, Entry] = {}
        self._seen: list[tuple[weakref.ref[nn.Module], list[_Seen]]] = []
        self._states: list[State | None] = []
        self._owner: object = None
        self.computed = self.found = 0
        flux.modulations = self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the model starts without a table

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def detach(self) -> None:
        """Takes the table off its model."""
        self.clear()
        flux = self._flux()
        if flux is not None and flux.modulations is self:
            flux.modulations = None

    def clear(self) -> None:
        """Forgets every entry."""
        self._entries, self._seen, self._states = {}, [], []

    @torch.no_grad()
    def prepare(self, inputs: Iterable[Inputs], dtype: torch.dtype) -> None:
        """Computes the entries of a run before its first step, each layer brought to the device once.

        `inputs` as `Flux.forward` will be given them, on the device that computes; `dtype`: that of its tokens.
        """
        flux = self._flux()
        if flux is None:
            return
        layers = self._layers(flux)
        self._refresh(layers)
        wanted = {key: each for each in inputs if (key := self._key(layers, each, dtype)) is not None}
        for key in wanted.keys() & self._entries.keys():
            self._entries[key] = self._entries.pop(key)
        self._fill(flux, layers, {key: each for key, each in wanted.items() if key not in self._entries}, dtype)

    def at(self, flux: Flux, inputs: Inputs, dtype: torch.dtype) -> Entry | None:
        """The entry of these inputs, computed if it is not there; None if the blocks are to compute themselves."""
        if self._flux() is not flux:
            return None
        layers = self._layers(flux)
        key = self._key(layers, inputs, dtype)
        if key is None:
            return None
        self._refresh(layers)
        if key in self._entries:
            self.found += 1
            self._entries[key] = self._entries.pop(key)  # the last one to be given up
            return self._entries[key].handed_out()
        todo = {key: inputs}
        for each in _along(inputs, self.ahead()):
            other = self._key(layers, each, dtype)
            if other is not None and other not in self._entries:
                todo.setdefault(other, each)
        return self._fill(flux, layers, todo, dtype)[key].handed_out()

    def state(self, layer: nn.Module) -> State | None:
        """`state_of`; for a host: with what it hangs on layers in other ways."""
        return state_of(layer)

    def owner(self) -> object:
        """For a host: anything that changes when it may have changed weights; None if the table is not to answer."""
        return ()

    def ahead(self) -> Sequence[float]:
        """For a host: the timesteps of the run it is in, if it knows them. After a miss at one of them the later ones
        are computed too, while the layers are on the device."""
        return ()

    def lend(self, layers: Sequence[nn.Module], device: torch.device) -> AbstractContextManager[None]:
        """For a host: how weights come to the device that computes, `lent` unless it does that by itself."""
        return lent(layers, device)

    def evaluate(self, layer: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The layer's outputs, each exactly as a call of the layer alone gives it."""
        with self.lend([layer], inputs[0].device):
            return [layer(x) for x in inputs]

    def _layers(self, flux: Flux) -> list[Any]:
        """Layers that the table stands for just now; none if it is not to answer, as where `vec` itself is not what the
        weights say."""
        embedders = [part for part in (getattr(flux, name) for name in EMBEDDERS) if part is not None]
        if (torch.is_grad_enabled() or torch.compiler.is_compiling() or self.owner() is None or "vec" in vars(flux)
                or not all(type(part) is MLPEmbedder and _is_plain(part) and self._ready(part.in_layer)
                           and self._ready(part.out_layer) for part in embedders)):
            return []
        return [layer for _, layer in modulation_modules(flux) if self._ready(layer)]

    def _refresh(self, layers: Sequence[nn.Module]) -> None:
        """Empties the table if these layers or their weights are not those that it was filled from."""
        owner, states = self.owner(), [self.state(layer) for layer in layers]
        if owner != self._owner or states != self._states or not self._still(layers):
            self.clear()
            self._owner, self._states = owner, states
            self._seen = [(weakref.ref(layer), [_Seen(tensor) for tensor in _tensors(layer)]) for layer in layers]

    def _ready(self, layer: nn.Module) -> bool:
        own = self._own.get(id(layer))
        return own is not None and own() is layer and self.state(layer) is not None

    def _still(self, layers: Sequence[nn.Module]) -> bool:
        if len(layers) != len(self._seen):
            return False
        for layer, (seen, weights) in zip(layers, self._seen, strict=True):
            tensors = _tensors(layer)
            if seen() is not layer or len(tensors) != len(weights):
                return False
            if not all(weight.still(tensor) for weight, tensor in zip(weights, tensors, strict=True)):
                return False
        return True

    @staticmethod
    def _key(layers: Sequence[nn.Module], inputs: Inputs, dtype: torch.dtype) -> Key | None:
        """A device is made to wait for the content of its tensors only where weights would have to be carried to it."""
        device = inputs[0].device
        if not layers or torch.is_autocast_enabled(device.type):
            return None
        away = device.type != "cpu" and any(tensor.device != device for layer in layers for tensor in _tensors(layer))
        parts = [None if tensor is None else content(tensor, away) for tensor in inputs]
        if any(part is None and tensor is not None for part, tensor in zip(parts, inputs, strict=True)):
            return None
        return (*parts, dtype, device, torch.is_inference_mode_enabled())

    def _fill(self, flux: Flux, layers: Sequence[Any], todo: dict[Key, Inputs], dtype: torch.dtype
              ) -> dict[Key, Entry]:
        """Computes entries, layer by layer: the first in any case, the others as far as there is room for them."""
        if not todo:
            return {}
        embedders = layers[:2 * sum(getattr(flux, name) is not None for name in EMBEDDERS)]
        rest = layers[len(embedders):]
        timesteps = next(iter(todo.values()))[0]
        size = len(timesteps) * dtype.itemsize * sum(layer.bias.numel() for layer in (embedders[-1], *rest))
        limit = int(self._share * sum(tensor.nbytes for layer in layers for tensor in _tensors(layer)))
        todo = dict(list(todo.items())[:max(limit // size, 1)])
        with self.lend(embedders, timesteps.device):
            entries = {key: Entry(flux.vec(*each, dtype), {}) for key, each in todo.items()}
        inputs = [F.silu(entry.vec) for entry in entries.values()]
        for layer in rest:
            for entry, row in zip(entries.values(), self.evaluate(layer, inputs), strict=True):
                entry.rows[id(layer)] = row
        self.computed += len(entries)
        if size <= limit:
            self._entries.update(entries)
            while self.nbytes > limit:
                del self._entries[next(iter(self._entries))]
        return entries


def _along(inputs: Inputs, levels: Sequence[float]) -> list[Inputs]:
    """The same inputs at each later one of these timesteps; none if their own is not among them."""
    timesteps, y, guidance = inputs
    now, run = timesteps.tolist(), torch.tensor(levels, dtype=timesteps.dtype).tolist()
    if len(set(now)) != 1 or now[0] not in run:
        return []
    made = (torch.full(timesteps.shape, level, dtype=timesteps.dtype) for level in run if 0 < level < now[0])
    return [(note(host.to(timesteps.device), host), y, guidance) for host in made]
