"""Putting a stack of LoRAs on a model, and taking it off again without a trace.

Layer by layer: a resident 16 or 32 bit weight gets the changes merged into a copy; a packed or offloaded one keeps its
bytes and gets a side path (`sidepath`). What only a changed weight can do becomes, on a packed layer, an unpacked copy
of that layer. All of it is worked out against the base's own weights, so order does not matter; only of two LoRAs that
replace the same numbers the later one counts, as in ComfyUI. Every adapter is checked before the model is touched, and
an attach that fails undoes what it did.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..specs import FLUX_DEV, FLUX_FILL
from . import layers
from .adapter import Adapter
from .algorithms import Rows
from .reading import CONTROL_LAYER, Lora, misfit
from .sidepath import NAME, Mask, Part, SidePath
from .terms import Dense, Switched, SwitchedBias

MODES = ("auto", "side", "merge")
SIDE, MERGED, COPY = "side path", "merged", "merged copy"
MARK = "flux_kit_attachment"


@dataclass(frozen=True)
class Entry:
    """One LoRA of a stack.

    `factor`: our name of a layer -> factor of its strength (block weights). `schedule`: sigma -> factor. `masked`: its
    strength will differ between tokens (`Attachment.set_mask`). The last two keep the LoRA out of the weights.
    """

    lora: Lora
    strength: float = 1.0
    factor: Callable[[str], float] | None = None
    schedule: Callable[[float], float] | None = None
    masked: bool = False

    @property
    def varies(self) -> bool:
        return self.schedule is not None or self.masked


@dataclass
class Applied:
    """What became of one entry: layers by the way they were changed, and what was skipped, with the reason."""

    name: str
    layers: Counter[str] = field(default_factory=Counter)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"file": self.name, "layers": dict(self.layers), "skipped": [list(pair) for pair in self.skipped],
                "notes": list(self.notes)}


Job = tuple[int, Adapter]
"""The number of an entry and one of its adapters for the layer in question."""


@torch.inference_mode(False)
@torch.no_grad()
def attach(model: nn.Module, stack: Sequence[Entry], *, role: str = "transformer", mode: str = "auto",
           dtype: torch.dtype | None = None, device: torch.device | str | None = None,
           skip_broken: bool = False, source: layers.Source = layers.STORED) -> Attachment:
    """Applies the adapters for `role` of every entry to an engine model, or to one with the same names of layers.

    `mode`: `auto` as said above, `side` and `merge` everywhere they can be. `dtype`: of the side path; None takes each
    layer's own, fp32 for a packed one without 16-bit bias. `device`: where the model computes; weights elsewhere are
    offloaded. `source`: how side paths read the weights that they depend on. Raises `BadInput`, before anything is
    changed, if the model carries LoRAs already, if a LoRA does not fit (`skip_broken`: leaves those layers out), or if
    one has layers for this model and none of them is there.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if MARK in vars(model):
        raise BadInput("this model carries LoRAs already: detach them, or put all LoRAs into one stack")
    made = Attachment(model, tuple(stack), source)
    jobs = fitting(model, stack, role, made.applied, skip_broken)
    with ExitStack() as failed:
        failed.callback(made.detach)
        for module, todo in jobs.items():
            made.add(module, todo, mode, dtype, None if device is None else torch.device(device))
        made.update()
        failed.pop_all()
    vars(model)[MARK] = made
    return made


def planned(model: nn.Module, stack: Sequence[Entry], *, role: str = "transformer", mode: str = "auto",
            device: torch.device | str | None = None, skip_broken: bool = False) -> list[Applied]:
    """What `attach` would do with each entry, and every check that it makes, with the model left alone. An algorithm
    that only a changed weight can do is counted as the others of its layer."""
    made = Attachment(model, tuple(stack))
    for module, todo in fitting(model, stack, role, made.applied, skip_broken).items():
        layer = layers.layer_of(model, module)
        how = made.way(layer, todo, mode, None if device is None else torch.device(device))
        for entry in {entry for entry, _ in todo}:
            made.applied[entry].layers[how] += 1
    return made.applied


def fitting(model: nn.Module, stack: Sequence[Entry], role: str, applied: Sequence[Applied], skip_broken: bool
          ) -> dict[str, list[Job]]:
    """Adapters by layer, once each is known to fit. A strength of 0 counts: it may be raised later."""
    jobs: dict[str, list[Job]] = {}
    for i, entry in enumerate(stack):
        adapters, broken = entry.lora.of(role), []
        kept = 0
        clash = control_clash(model, adapters)
        if clash is not None and not skip_broken:
            raise BadInput(f"{entry.lora.path.name} {clash}", file=entry.lora.path)
        if clash is not None:
            applied[i].skipped += [(adapter.destination.module, clash) for adapter in adapters]
            continue
        for adapter in adapters:
            module = adapter.destination.module
            layer = layers.layer_of(model, module)
            if layer is None:
                applied[i].skipped.append((module, "not in this model"))
                continue
            problem = misfit(adapter.destination, adapter.size, layers.size_of(layer), adapter.on_bias)
            if problem is None and adapter.on_bias and hasattr(layer, "out_features") and layer.bias is None:
                applied[i].skipped.append((module, "this layer has no bias here"))
                continue
            if problem is not None or not _fits_wide(adapter, layer):
                broken.append(problem or f"{module}: only a low-rank adapter can widen it")
                applied[i].skipped.append((module, broken[-1]))
                continue
            jobs.setdefault(module, []).append((i, adapter))
            kept += 1
        if (broken and not skip_broken) or (adapters and not kept):
            missing = broken or [f"none of its {len(adapters)} adapters has a layer in this model"]
            raise BadInput(f"{entry.lora.path.name} does not fit this model: {'; '.join(missing[:5])}"
                           f"{'; ...' if len(missing) > 5 else ''}. Choose a LoRA made for it", file=entry.lora.path)
    for module, todo in jobs.items():
        for k, (i, adapter) in enumerate(todo):
            later = next((j for j, other in todo[k + 1:] if adapter.outdone(other)), None)
            if later is not None:
                applied[i].skipped.append((module, f"{applied[later].name}, later in the stack, replaces it too"))
    return jobs


def control_clash(model: nn.Module, adapters: Sequence[Adapter]) -> str | None:
    """Why a control LoRA cannot go on a model whose `img_in` takes other channels than latents and a map; else None."""
    own = max((adapter.size[1] or 0 for adapter in adapters
               if adapter.destination.module == CONTROL_LAYER and not adapter.on_bias), default=0)
    layer = layers.layer_of(model, CONTROL_LAYER) if own else None
    if layer is None or not FLUX_DEV.in_channels < own < layer.in_features:
        return None
    kind = "FLUX.1 Fill" if layer.in_features == FLUX_FILL.in_channels else "this model"
    return (f"is a control LoRA (FLUX.1 Depth or Canny, {own} channels), and {kind} takes {layer.in_features}: they "
            "cannot be joined. Put the LoRA on FLUX.1 dev, or take it out")


def _fits_wide(adapter: Adapter, layer: Any) -> bool:
    """An adapter wider than its layer can only come as a side path of low rank."""
    width = adapter.size[1]
    if width is None or adapter.on_bias or adapter.destination.module != CONTROL_LAYER or width <= layer.in_features:
        return True
    return adapter.algorithm == "LoRA" and "magnitude" not in adapter.factors


class Attachment:
    """LoRAs on a model. `applied`: what became of each entry of the stack."""

    def __init__(self, model: nn.Module, stack: tuple[Entry, ...], source: layers.Source = layers.STORED) -> None:
        self.model, self.stack, self.source = model, stack, source
        self.applied = [Applied(entry.lora.path.name) for entry in stack]
        self.strengths = [entry.strength for entry in stack]
        self.sigma: float | None = None
        self._sides: list[tuple[str, SidePath]] = []
        self._merged: list[Merged] = []
        self._undo: list[Callable[[], None]] = []

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """One per entry. On side paths a few numbers change; merged weights are made anew from the base."""
        if len(strengths) != len(self.stack):
            raise BadInput(f"{len(strengths)} strengths for {len(self.stack)} LoRAs: give one for each")
        self.strengths = [float(strength) for strength in strengths]
        self.update()

    def set_sigma(self, sigma: float) -> None:
        """Moves scheduled entries to a step of the run; nothing happens if there are none."""
        self.sigma = sigma
        if any(entry.schedule is not None for entry in self.stack):
            self.update()

    @torch.inference_mode(False)
    def set_mask(self, mask: Mask | None) -> None:
        """Shares of the strengths by token, for all entries; None for the same everywhere. Weights that were merged do
        not know tokens: entries to be masked must say so when attached."""
        if mask is not None and any(not entry.masked for entry in self.stack) and self._merged:
            mask_free = [i for i, entry in enumerate(self.stack) if not entry.masked]
            if any(bool((part[:, mask_free] != 1).any()) for part in (mask.image, mask.text, mask.rest, mask.other)):
                raise BadInput("a mask was given to a LoRA that is merged into the weights: attach it as masked")
        for _, side in self._sides:
            side.set_mask(None if mask is None else mask.of(side.entries, side.strength))

    def strength(self, entry: int, module: str) -> float:
        """What entry and layer come to at this step."""
        found = self.stack[entry]
        value = self.strengths[entry]
        value *= 1.0 if found.factor is None else found.factor(module)
        return value if found.schedule is None or self.sigma is None else value * found.schedule(self.sigma)

    @torch.inference_mode(False)
    def detach(self) -> None:
        """Restores the model: every weight is the very tensor it was, or, off the CPU, its bytes. Doing it twice does
        no harm."""
        while self._undo:
            self._undo.pop()()
        self._sides, self._merged = [], []
        if vars(self.model).get(MARK) is self:
            del vars(self.model)[MARK]

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self) -> None:
        """Puts the strengths of this step where they act."""
        told: dict[tuple[torch.device, torch.dtype], list[tuple[SidePath, list[float]]]] = {}
        for module, side in self._sides:
            values = [self.strength(entry, module) for entry in side.entries]
            if values != side.told:
                side.told = values
                told.setdefault((side.strength.device, side.strength.dtype), []).append((side, values))
        for (device, dtype), sides in told.items():
            # one copy to the device for all layers
            flat = torch.tensor([value for _, values in sides for value in values], dtype=dtype).to(device)
            for (side, _), values in zip(sides, flat.split([len(values) for _, values in sides]), strict=True):
                side.set(values)
        for merged in self._merged:
            merged.update([self.strength(entry, merged.module) for entry, _ in merged.jobs])

    def add(self, module: str, jobs: list[Job], mode: str, dtype: torch.dtype | None,
            device: torch.device | None) -> None:
        """Prepares one layer and changes it, in the order that leaves it whole if memory runs out."""
        layer = layers.layer_of(self.model, module)
        how = self.way(layer, jobs, mode, device)
        if how != SIDE:
            return self._merge(module, layer, jobs, how, dtype)
        weight = layers.weight_of(layer)
        must = mode == "side" or self._only_side(layer, jobs, device)
        parts = self._parts(layer, jobs, dtype or _side_dtype(layer), device or weight.device, must)
        if parts is None:
            return self._merge(module, layer, jobs, COPY if layers.is_packed(layer) else MERGED, dtype)
        self._side(module, layer, parts, dtype or _side_dtype(layer), device or weight.device)
        for entry in {entry for entry, _ in jobs}:
            self.applied[entry].layers[SIDE] += 1
        return None

    def way(self, layer: Any, jobs: list[Job], mode: str, device: torch.device | None) -> str:
        """How a layer is to be changed."""
        merged = COPY if layers.is_packed(layer) else MERGED
        if not hasattr(layer, "out_features"):
            return merged
        if mode == "side" or self._only_side(layer, jobs, device):
            return SIDE
        return SIDE if merged == COPY and mode != "merge" else merged

    def _only_side(self, layer: Any, jobs: list[Job], device: torch.device | None) -> bool:
        """Whether the layer's weight has to stay as it is: it is elsewhere, strengths vary, or inputs are more."""
        away = device is not None and layers.weight_of(layer).device != device
        wide = any((adapter.size[1] or 0) > layer.in_features for _, adapter in jobs if not adapter.on_bias)
        return away or wide or any(self.stack[entry].varies for entry, _ in jobs)

    def _parts(self, layer: Any, jobs: list[Job], dtype: torch.dtype, device: torch.device, must: bool
               ) -> list[Part] | None:
        """The side path's parts; None if one of them is better off in a changed weight, unless it must not be one."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        size = layers.size_of(layer)
        parts = []
        for i, (entry, adapter) in enumerate(jobs):
            if any(adapter.outdone(other) for _, other in jobs[i + 1:]):
                continue
            rows = adapter.destination.rows(size)
            weight = _lazily(layer, rows, exact, self.source)
            terms = adapter.terms(weight, size[1], exact, layers.weight_of(layer).device)
            if terms is None and adapter.on_bias:
                terms = [SwitchedBias(adapter.change(layer.bias.detach()[rows].to(exact)))]
            if terms is None and not must:
                return None
            if terms is None:
                kind = Switched if adapter.row.at is not None else Dense
                terms = [kind(adapter.change(weight(slice(None))))]
            parts.append(Part(entry, rows, [term.to(device) for term in terms]))
        return parts

    def _side(self, module: str, layer: Any, parts: list[Part], dtype: torch.dtype, device: torch.device) -> None:
        side = SidePath(parts, layer.out_features, dtype, device, self.source)
        side.stream = layers.stream_of(module)
        side.varies = any(self.stack[part.entry].schedule is not None for part in parts)
        hooks = [layer.register_forward_hook(side)]
        setattr(layer, NAME, side)
        self._undo.append(lambda: _off(layer, hooks))
        if side.width > layer.in_features:
            hooks.append(layer.register_forward_pre_hook(side.narrowed))
            self._widen(side.width, {part.entry for part in parts})
        self._sides.append((module, side))

    def _widen(self, channels: int, entries: set[int]) -> None:
        """The model now takes a control picture beside the latents, and says so."""
        spec: Any = getattr(self.model, "spec", None)
        if dataclasses.is_dataclass(spec):
            self.model.spec = dataclasses.replace(spec, in_channels=channels)  # type: ignore[assignment, type-var]
            self._undo.append(lambda: setattr(self.model, "spec", spec))
        for entry in entries:
            self.applied[entry].notes.append(f"img_in now takes {channels} channels: connect the control picture")

    def _merge(self, module: str, layer: Any, jobs: list[Job], how: str, dtype: torch.dtype | None = None) -> None:
        if how == COPY:
            layer = self._copied(module, layer, dtype)
        for on_bias in (False, True):
            own = [job for job in jobs if job[1].on_bias == on_bias]
            name = layers.weight_name(layer) if not on_bias else "bias"
            if own and getattr(layer, name, None) is not None:
                merged = Merged(module, layer, name, own)
                self._merged.append(merged)
                self._undo.append(merged.restore)
        for entry in {entry for entry, _ in jobs}:
            self.applied[entry].layers[how] += 1

    def _copied(self, module: str, layer: Any, dtype: torch.dtype | None) -> Any:
        """A plain layer with the packed one's numbers, in its place."""
        size = layers.size_of(layer)
        linear = hasattr(layer, "out_features")
        made, sizes = (nn.Linear, (size[1], size[0])) if linear else (nn.Embedding, (size[0], size[1]))
        plain: Any = made(*sizes, device="meta")
        kind = dtype or (_side_dtype(layer) if linear else layer.dtype)
        plain.weight = nn.Parameter(layers.numbers(layer, slice(0, size[0]), kind), requires_grad=False)
        if linear:
            plain.bias = layer.bias
        plain.train(layer.training)
        parent, _, leaf = module.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, leaf, plain)
        self._undo.append(lambda: setattr(owner, leaf, layer))
        return plain


def _lazily(layer: Any, rows: slice, dtype: torch.dtype, source: layers.Source) -> Rows:
    """Of the `rows` of a layer, those asked for."""
    of = range(*rows.indices(layers.size_of(layer)[0]))

    def read(tile: slice) -> Tensor:
        chosen = of[tile]
        return source.numbers(layer, slice(chosen.start, chosen.stop), dtype)

    return read


def _side_dtype(layer: Any) -> torch.dtype:
    """The dtype that the layer computes in, as far as its tensors tell."""
    for tensor in (layers.weight_of(layer), getattr(layer, "bias", None)):
        if tensor is not None and tensor.dtype in layers.PLAIN_DTYPES:
            return tensor.dtype
    return torch.float32


def _off(layer: nn.Module, hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    if hasattr(layer, NAME):
        delattr(layer, NAME)


class Merged:
    """One parameter with changes merged into it: another parameter, in its place. Its own is kept: on the CPU as it is,
    where it may be a view of the file and cost nothing; from another device as a copy on the CPU."""

    def __init__(self, module: str, layer: nn.Module, name: str, jobs: list[Job]) -> None:
        self.module, self.layer, self.name, self.jobs = module, layer, name, jobs
        parameter: nn.Parameter = getattr(layer, name)
        self.size, self.device = layers.size_of(layer), parameter.device
        self.own = parameter if self.device.type == "cpu" else nn.Parameter(parameter.detach().cpu(), False)
        self.strengths: list[float] | None = None

    def update(self, strengths: list[float]) -> None:
        """Makes the weight anew from its own numbers, in fp32, rounded once."""
        if strengths == self.strengths:
            return
        self.strengths = strengths
        if not any(strengths):
            return self.restore()
        base = self.own.detach().to(self.device)
        exact = base.double() if base.dtype == torch.float64 else base.float()
        total = exact.clone()
        for i, (strength, (_, adapter)) in enumerate(zip(strengths, self.jobs, strict=True)):
            later = zip(strengths[i + 1:], self.jobs[i + 1:], strict=True)
            if strength and not any(on and adapter.outdone(other) for on, (_, other) in later):
                rows = adapter.destination.rows(self.size)
                total[rows] += adapter.change(exact[rows], strength)
        setattr(self.layer, self.name, nn.Parameter(total.to(base.dtype), requires_grad=False))
        return None

    def restore(self) -> None:
        setattr(self.layer, self.name, self.own if self.device.type == "cpu"
                else nn.Parameter(self.own.detach().to(self.device), requires_grad=False))
