"""Weights on the device while a model runs: whole, or some blocks through two buffers just before they run.

A model's parameters are replaced by views of the device's memory and put back afterwards: the tensors it was loaded
with, memory-mapped where they were, are never written. Models know nothing of it; hooks on the blocks do the work.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..models.layers import ROWS
from .machine import Device
from .weights import blocks_of, matrices, modulations_of, nbytes

ALIGNMENT = 256
"""Of each tensor in a buffer: what kernels expect of torch's own allocations."""
SLAB = 1 << 30
"""Page-locked memory is taken in pieces of this size: torch rounds others up to a power of two."""


@dataclass(frozen=True)
class Weight:
    """One parameter: where it belongs, and the tensor it was loaded with."""

    owner: nn.Module
    name: str
    home: nn.Parameter

    def put(self, tensor: Tensor | None) -> None:
        """`tensor` in the parameter's place; None: what was there."""
        self.owner._parameters[self.name] = (self.home if tensor is None
                                             else nn.Parameter(tensor, requires_grad=False))


class Unit:
    """Weights that come and go together, side by side in one buffer."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.weights = tuple(weights)
        self.offsets: list[int] = []
        self.nbytes = 0
        for weight in self.weights:
            self.offsets.append(self.nbytes)
            self.nbytes += -(-nbytes(weight.home) // ALIGNMENT) * ALIGNMENT

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The weights' places in a buffer, in their shapes and dtypes."""
        return [buffer[offset:offset + nbytes(weight.home)].view(weight.home.dtype).view(weight.home.shape)
                for offset, weight in zip(self.offsets, self.weights, strict=True)]


class Lane(Protocol):
    """The way of weights to the device's buffers, numbered 0, 1, ..."""

    def copy(self, slot: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Begins to copy, as soon as what used the slot before is done."""

    def wait(self, slot: int) -> None:
        """What is launched from now on sees the copies into the slot."""

    def done(self, slot: int) -> None:
        """What was launched so far is the last to use the slot."""

    def drain(self) -> None:
        """What is launched from now on finds no copy under way: the buffers may be used for other things."""


class PlainLane:
    """Copies at once: for devices without a queue of their own."""

    def copy(self, slot: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def wait(self, slot: int) -> None:
        """Nothing to wait for."""

    def done(self, slot: int) -> None:
        """Nothing runs on."""

    def drain(self) -> None:
        """Nothing is under way."""


class CudaLane:
    """Copies on a stream of its own while kernels run on the current one.

    Sources that are not page-locked go through a page-locked buffer of the slot: the copy from there runs by itself.
    `cuda`: torch.cuda, or what behaves like it.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, pin: Callable[[int], Tensor] | None = None
                 ) -> None:
        self._device, self._cuda = device, cuda
        self._stream = cuda.Stream(device)
        self._copied: dict[int, Any] = {}
        self._used: dict[int, Any] = {}
        self._staging: dict[int, Tensor] = {}
        self._pin = pin or pinned

    def copy(self, slot: int, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        sources = self._staged(slot, sources)
        with self._cuda.stream(self._stream):
            if slot in self._used:
                self._stream.wait_event(self._used[slot])
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            event = self._copied[slot] = self._cuda.Event()
            event.record(self._stream)

    def _staged(self, slot: int, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        if all(source.is_pinned() for source in sources):
            return sources
        need = sum(-(-nbytes(source) // ALIGNMENT) * ALIGNMENT for source in sources)
        if slot in self._copied:
            self._copied[slot].synchronize()  # the buffer is still being read
        if slot not in self._staging or self._staging[slot].numel() < need:
            self._staging[slot] = self._pin(need)
        staged, at = [], 0
        for source in sources:
            place = self._staging[slot][at:at + nbytes(source)].view(source.dtype).view(source.shape)
            staged.append(place.copy_(source))
            at += -(-nbytes(source) // ALIGNMENT) * ALIGNMENT
        return staged

    def wait(self, slot: int) -> None:
        self._cuda.current_stream(self._device).wait_event(self._copied[slot])

    def done(self, slot: int) -> None:
        event = self._used[slot] = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))

    def drain(self) -> None:
        for slot in self._copied:
            self.wait(slot)


def lane_to(device: torch.device) -> Lane:
    return CudaLane(device) if device.type == "cuda" else PlainLane()


def pinned(size: int) -> Tensor:
    """uint8 `(size,)` in page-locked host memory."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class PinnedCopies:
    """Page-locked copies of weights, in slabs."""

    def __init__(self, pin: Callable[[int], Tensor] = pinned, slab: int = SLAB) -> None:
        self._pin, self._size = pin, slab
        self._slabs: list[Tensor] = []
        self._at = slab
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """The copy of a tensor, made when it is first asked for."""
        found = self._copies.get(id(tensor))
        if found is None:
            need = -(-nbytes(tensor) // ALIGNMENT) * ALIGNMENT
            if self._at + need > self._size:
                self._slabs.append(self._pin(max(self._size, need)))
                self._at = 0
            place = self._slabs[-1][self._at:self._at + nbytes(tensor)].view(tensor.dtype).view(tensor.shape)
            self._at += need
            found = self._copies[id(tensor)] = (tensor, place.copy_(tensor))
        return found[1]


class Placed:
    """A module on a device: all but the `streamed` blocks resident, these passed through buffers as they run.

    Weights that a table of modulations stands for stay at home: a block that runs without the table's rows borrows its.
    `check` is called before weights are read: it raises where their file is no longer what it was. `leave` undoes all.
    """

    def __init__(self, module: nn.Module, role: str, device: Device, streamed: Sequence[int] = (), *,
                 check: Callable[[], None] = lambda: None, copies: PinnedCopies | None = None) -> None:
        self._module = weakref.ref(module)  # what is placed and used no more must be able to go
        self.role, self.streamed = role, tuple(streamed)
        self._device, self._check, self._copies = device, check, copies
        self._handles: list[Any] = []
        self._buffers: list[Tensor] = []
        self._resident: list[Unit] = []
        self._order: list[Unit] = []
        self._slots: list[Tensor] = []
        self._lane: Lane | None = None
        self._held: dict[int, int] = {}  # slot -> place in the order of what it holds
        arrived = False
        try:
            self._arrive(module)
            arrived = True
        finally:
            if not arrived:
                self.leave()

    @property
    def module(self) -> nn.Module | None:
        """None once nobody else holds it."""
        return self._module()

    def _arrive(self, module: nn.Module) -> None:
        blocks = blocks_of(module, self.role)
        home = [Unit(Weight(*each) for each in found) for found in modulations_of(module, self.role)]
        at_home = {id(weight.home) for unit in home for weight in unit.weights}
        moved = [[found for found in matrices(block) if id(found[2]) not in at_home] for block in blocks]
        chosen = [blocks[i] for i in self.streamed]
        self._order = [Unit(Weight(*found) for found in moved[i]) for i in self.streamed]
        passing = {id(weight.home) for unit in self._order for weight in unit.weights}
        apart = {id(tensor) for block in blocks for _, _, tensor in matrices(block)}
        rest = Unit(Weight(owner, name, tensor) for owner, name, tensor in _parameters(module)
                    if id(tensor) not in apart)
        for unit in (rest, *(Unit(Weight(*found) for found in each) for each in moved)):
            if not unit.weights or id(unit.weights[0].home) in passing:
                continue
            self._check()
            buffer = self._take(unit.nbytes)
            self._resident.append(unit)  # before its weights move, so that all go home if one cannot
            for weight, view in zip(unit.weights, unit.views(buffer), strict=True):
                view.copy_(weight.home)
                weight.put(view)
        if self._order:
            self._lane = lane_to(self._device.torch_device)
            self._slots = [self._take(max(unit.nbytes for unit in self._order)) for _ in range(min(2, len(chosen)))]
            for slot in range(len(self._slots)):
                self._lane.done(slot)  # what had this memory before may still run
            for place, block in enumerate(chosen):
                self._handles.append(block.register_forward_pre_hook(self._before(place)))
                self._handles.append(block.register_forward_hook(self._after(place), always_call=True))
        for block, unit in zip(blocks, home, strict=False):
            self._lend(block, unit)

    def _lend(self, block: nn.Module, unit: Unit) -> None:
        """Whenever the block would compute its modulations itself, their weights are on the device meanwhile."""
        lent: list[Tensor] = []
        before_it: list[nn.Parameter | None] = []  # another than the home where something was merged into it

        def before(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
            if not unit.weights or _told(options):
                return
            self._check()
            lent.append(self._device.take(unit.nbytes))
            for weight, view in zip(unit.weights, unit.views(lent[-1]), strict=True):
                now = weight.owner._parameters[weight.name]
                before_it.append(now)
                weight.put(view.copy_(weight.home) if now is weight.home or now is None
                           else now.detach().to(self._device.torch_device))

        def after(*_: Any) -> None:
            if lent:
                for weight, had in zip(unit.weights, before_it, strict=True):
                    weight.owner._parameters[weight.name] = had
                before_it.clear()
                self._device.give_back(lent.pop())

        self._handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(block.register_forward_hook(after, always_call=True))

    def _take(self, size: int) -> Tensor:
        buffer = self._device.take(size)
        self._buffers.append(buffer)
        return buffer

    def _bring(self, place: int) -> None:
        slot = place % len(self._slots)
        if self._held.get(slot) == place:
            return
        self._check()
        unit = self._order[place]
        sources = [weight.home if self._copies is None else self._copies.of(weight.home) for weight in unit.weights]
        self._held.pop(slot, None)
        assert self._lane is not None
        self._lane.copy(slot, sources, unit.views(self._slots[slot]))
        self._held[slot] = place

    def _before(self, place: int) -> Callable[..., None]:
        """The block's weights are there when it runs, and those of the next are on their way."""
        def hook(*_: Any) -> None:
            self._bring(place)
            slot = place % len(self._slots)
            assert self._lane is not None
            self._lane.wait(slot)
            unit = self._order[place]
            for weight, view in zip(unit.weights, unit.views(self._slots[slot]), strict=True):
                weight.put(view)
            following = (place + 1) % len(self._order)
            if following % len(self._slots) != slot:
                self._bring(following)
        return hook

    def _after(self, place: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            for weight in self._order[place].weights:
                weight.put(None)
            if self._lane is not None:
                self._lane.done(place % len(self._slots))
        return hook

    def leave(self) -> None:
        """The weights are where they were, and the device's memory is given back."""
        for handle in self._handles:
            handle.remove()
        for unit in (*self._resident, *self._order):
            for weight in unit.weights:
                weight.put(None)
        self._handles, self._resident, self._order = [], [], []
        if self._lane is not None:
            self._lane.drain()
        self._slots, self._held, self._lane = [], {}, None
        for buffer in self._buffers:
            self._device.give_back(buffer)
        self._buffers = []


def _told(options: dict[str, Any]) -> bool:
    """Whether a block is called with all the rows that its modulations would compute."""
    rows = (options.get("transformer_options") or {}).get(ROWS)
    return rows is not None and rows[0] is options.get("vec") and all(row is not None for _, row in rows[1])


def _parameters(module: nn.Module) -> Iterable[tuple[nn.Module, str, nn.Parameter]]:
    for owner in module.modules():
        for name, tensor in owner.named_parameters(recurse=False):
            yield owner, name, tensor


def watched(module: nn.Module, role: str, check: Callable[[], None]) -> AbstractContextManager[None]:
    """While it lasts, `check` is called before each block runs: where weights are read in place."""
    blocks = blocks_of(module, role)
    if not blocks:
        return nullcontext()
    return _Watched(blocks, check)


class _Watched(AbstractContextManager[None]):
    def __init__(self, blocks: Sequence[nn.Module], check: Callable[[], None]) -> None:
        self._blocks, self._check = blocks, check

    def __enter__(self) -> None:
        self._handles = [block.register_forward_pre_hook(lambda *_: self._check()) for block in self._blocks]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
