"""Which models stand on the device: brought for a stage, sent away for the next, streamed where they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...engine.errors import FluxKitError, NotEnoughMemory
from ...engine.memory import Device, PinnedCopies, Placed, Stage, host_free, joined, plan_stage, watched, weights_of
from ...engine.quant import UnpackedCache
from ...engine.weights.describe import gib
from ..fingerprint import Watch

log = logging.getLogger(__name__)

UNLIMITED = 1 << 62
REPEATED = ("transformer",)
"""Roles whose weights are used many times in a stage; unpacking once is of no use to the others."""
HOST_ADVICE = "Choose a smaller picture, batch or file, or close other programs"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


@dataclass(frozen=True)
class Resident:
    """A model that runs: its role and compute dtype, and the files it came from."""

    module: nn.Module
    role: str
    dtype: torch.dtype
    watch: Watch


class Residence:
    """Moves models to `device` for as long as they run, by the plan of `engine.memory`.

    `tell` hears in a line what a stage does with the device, whenever that is another than before.
    """

    def __init__(self, device: Device, mode: str, tell: Callable[[str], None] = log.info) -> None:
        self.device, self.mode, self._tell = device, mode, tell
        self.moves = mode != "cpu" and (device.own_memory or mode == "stream")
        self._placed: list[Placed] = []  # the one used last stands last
        self._copies: WeakKeyDictionary[nn.Module, PinnedCopies] = WeakKeyDictionary()
        self._told: dict[str, str] = {}

    def leave(self) -> None:
        """Every model is off the device."""
        while self._placed:
            self._placed.pop().leave()
        self.device.settle()

    @contextmanager
    def running(self, stage: str, models: Sequence[Resident], activations: int, strips: int | None = None, *,
                on_cpu: bool = False) -> Iterator[bool]:
        """The models' weights are on the device inside; yields whether to work in strips.

        `activations`, `strips`: bytes the stage needs beside weights, whole and in strips if it knows how. `on_cpu`:
        the models run where they are, whatever the device.
        FileChanged where a file of theirs is not what it was, before or after; NotEnoughMemory, with all models moved
        off the device, where it is short of memory.
        """
        for model in models:
            model.watch.check()
        try:
            with ExitStack() as stack:
                if self.moves and not on_cpu:
                    in_strips = self._bring(stage, models, activations, strips)
                else:
                    # of other packages' models only rough figures are known, no reason to refuse them
                    in_strips = bool(models) and self._fit_into_host(stage, activations, strips)
                    for model in models:
                        stack.enter_context(watched(model.module, model.role, model.watch.check))
                for model in models:
                    stack.enter_context(self._unpacked(model, activations))
                yield in_strips
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, FluxKitError) or not is_out_of_memory(error):
                raise
            self.leave()
            raise self._ran_out(stage) from error
        for model in models:
            model.watch.check()

    @contextmanager
    def _unpacked(self, model: Resident, activations: int) -> Iterator[None]:
        """Inside, packed weights of a model that runs step after step stay unpacked in half of the memory that is to
        spare, which is given back at the end. The result is the same, bit for bit."""
        spare = 0 if model.role not in REPEATED or self.mode == "stream" else self._to_spare(model, activations)
        if not spare:
            yield
            return
        cache = UnpackedCache(spare)
        cache.attach(model.module, model.dtype)
        try:
            yield
        finally:
            cache.detach()

    def _to_spare(self, model: Resident, activations: int) -> int:
        if any(placed.streamed for placed in self._placed if placed.module is model.module):
            return 0
        free = self.device.free() if self._placed else host_free()
        return 0 if free is None else max(0, free - activations) // 2

    def _ran_out(self, stage: str) -> NotEnoughMemory:
        if not self.moves:
            return NotEnoughMemory(stage, None, "host memory", HOST_ADVICE)
        less = "" if self.mode == "stream" else "Choose --memory stream, "
        choose = "Choose" if not less else "or"
        return NotEnoughMemory(stage, None, "device memory", f"{less}{choose} a smaller picture, batch or file, or "
                                                             "--memory cpu")

    def _fit_into_host(self, stage: str, activations: int, strips: int | None) -> bool:
        """Whether to work in strips, rather than swap. NotEnoughMemory where swapping is not enough: a system that runs
        out of memory ends the program without a word."""
        free, limit = host_free(), host_free(swap=True)
        short = free is not None and activations > free
        least = strips if short and strips is not None else activations
        if limit is not None and least > limit:
            raise NotEnoughMemory(stage, least - limit, "host memory", HOST_ADVICE)
        return short and strips is not None

    def _bring(self, stage: str, models: Sequence[Resident], activations: int, strips: int | None) -> bool:
        for placed in [placed for placed in self._placed if placed.module is None]:
            self._send_away(placed)
        modules = {id(model.module) for model in models}
        mine = [placed for placed in self._placed if id(placed.module) in modules]
        weights = joined([weights_of(model.module, model.role, model.dtype) for model in models])
        there = len(mine) == len(models) and not any(placed.streamed for placed in mine)
        missing = (0 if there else weights.total) + activations + weights.scratch
        if self.mode != "stream" and not (mine and not there):
            while missing > self._free() and len(self._placed) > len(mine):
                self._send_away(next(placed for placed in self._placed if placed not in mine))
            if missing <= self._free():
                if not there:
                    self._place(models, ())
                self._say(Stage(stage, weights.total, activations + weights.scratch, len(weights.blocks)))
                return False
        self.leave()
        host = host_free()
        plan = plan_stage(stage, weights, activations, self._free(), host, self.mode, strips)
        self._say(plan)
        self._place(models, plan.streamed, plan.pinned)
        return plan.strips

    def _free(self) -> int:
        free = self.device.free()
        return UNLIMITED if free is None else free

    def _send_away(self, placed: Placed) -> None:
        self._placed.remove(placed)
        placed.leave()
        self.device.settle()

    def _place(self, models: Sequence[Resident], streamed: Sequence[int], pin: bool = False) -> None:
        """`streamed` counts through the blocks of all models, one after the other."""
        first = 0
        for model in models:
            count = len(weights_of(model.module, model.role, model.dtype).blocks)
            own = [i - first for i in streamed if first <= i < first + count]
            first += count
            pin_it = pin and own and self.device.torch_device.type == "cuda"
            copies = self._copies.setdefault(model.module, PinnedCopies()) if pin_it else None
            self._placed.append(Placed(model.module, model.role, self.device, own, check=model.watch.check,
                                       copies=copies))

    def _say(self, plan: Stage) -> None:
        text = describe_stage(plan)
        if self._told.get(plan.name) != text:
            self._told[plan.name] = text
            self._tell(text)


def describe_stage(stage: Stage) -> str:
    """A stage in one line."""
    if not stage.on_device:
        return f"{stage.name}: on the CPU"
    parts = [f"{gib(stage.resident)} of weights on the device"]
    if stage.streamed:
        parts.append(f"{len(stage.streamed)} of {stage.blocks} blocks stream ({gib(stage.streamed_bytes)} "
                     f"a pass, {'page-locked' if stage.pinned else 'from the mapped file'})")
    parts.append(f"{gib(stage.activations)} to work in" + (", in strips" if stage.strips else ""))
    return f"{stage.name}: " + ", ".join(parts)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no room; drivers and allocators say it in words only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in OUT_OF_MEMORY)
