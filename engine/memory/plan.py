"""The plan of a run: for each stage what stands on the device, what streams, whether the decoder works in strips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import BadInput, NotEnoughMemory
from .activations import Activations
from .weights import PartWeights

MODES = ("auto", "full", "stream", "cpu")
STAGES: Mapping[str, tuple[str, ...]] = {"encode": ("t5", "clip_l"), "sample": ("transformer",), "decode": ("vae",)}
SLOTS = 2
"""Buffers for streamed blocks: one runs while the next is copied."""
HOST_SPARE = 2 << 30
"""Host memory that pinning leaves to others."""


@dataclass(frozen=True)
class Stage:
    """`streamed`: which of `blocks` blocks come just in time, through buffers of `slots` bytes; all else, `resident`
    bytes, stands on the device. `pinned`: whether page-locked copies of the streamed weights fit into host memory, else
    they go through small page-locked buffers. `on_device`: False where the stage runs on the CPU.
    """

    name: str
    resident: int
    activations: int
    blocks: int = 0
    streamed: tuple[int, ...] = ()
    streamed_bytes: int = 0
    slots: int = 0
    pinned: bool = False
    strips: bool = False
    on_device: bool = True

    @property
    def peak(self) -> int:
        """Bytes of the device that the stage takes."""
        return self.resident + self.slots + self.activations if self.on_device else 0


@dataclass(frozen=True)
class Plan:
    """`keep`: all parts stay on the device from stage to stage; else each stage begins with the others gone."""

    stages: tuple[Stage, ...]
    keep: bool
    made: int

    @property
    def peak(self) -> int:
        """Bytes of the device that the run takes."""
        if self.keep:
            return sum(stage.resident for stage in self.stages) + max(stage.activations for stage in self.stages)
        return max(stage.peak for stage in self.stages)


def plan(parts: Mapping[str, PartWeights], activations: Activations, device_free: int | None, host_free: int | None,
         mode: str = "auto") -> Plan:
    """The plan for parts by role, given what is free in bytes. `device_free` None: the models run on the CPU.

    `auto` keeps all that fits and streams no more than it must; `full` never streams; `stream` streams every block.
    NotEnoughMemory, with what is missing, where not even streaming fits; BadInput for an unknown mode.
    """
    if mode not in MODES:
        raise BadInput(f"memory {mode!r} is not one of {', '.join(MODES)}")
    made = sum(part.made for part in parts.values())
    need = {"encode": activations.encode, "sample": activations.sample, "decode": activations.decode}
    present = {stage: joined([parts[role] for role in roles if role in parts]) for stage, roles in STAGES.items()
               if any(role in parts for role in roles)}
    if host_free is not None and made > host_free:
        raise NotEnoughMemory("loading", made - host_free, "host memory", "Use files in BFL's layout and of the "
                              "precision that is computed in, or packed ones (GGUF, fp8), which are not copied; or "
                              "close other programs")
    if device_free is None or mode == "cpu":
        stages = tuple(Stage(name, part.total, need[name] + part.scratch, len(part.blocks), on_device=False)
                       for name, part in present.items())
        return Plan(stages, True, made)
    whole = sum(part.total for part in present.values()) + max(need[name] + part.scratch
                                                               for name, part in present.items())
    if mode != "stream" and whole <= device_free:
        stages = tuple(Stage(name, part.total, need[name] + part.scratch, len(part.blocks))
                       for name, part in present.items())
        return Plan(stages, True, made)
    stages = tuple(plan_stage(name, part, need[name], device_free, host_free, mode,
                              strips=activations.strips if name == "decode" else None)
                   for name, part in present.items())
    return Plan(stages, False, made)


def joined(parts: Sequence[PartWeights]) -> PartWeights:
    """Parts that run in one stage, as one."""
    first = parts[0]
    for part in parts[1:]:
        first = replace(first, rest=first.rest + part.rest, blocks=first.blocks + part.blocks,
                        made=first.made + part.made, scratch=max(first.scratch, part.scratch),
                        home=first.home + part.home)
    return first


def plan_stage(name: str, part: PartWeights, activations: int, device_free: int, host_free: int | None,
               mode: str = "auto", strips: int | None = None) -> Stage:
    """One stage on a device that holds nothing else. `strips`: bytes of activations if the stage works in strips.

    The result's activations hold the scratch of packed layers, too.
    """
    activations += part.scratch
    whole = Stage(name, part.total, activations, len(part.blocks))
    narrow = whole if strips is None else replace(whole, activations=strips + part.scratch, strips=True)
    tries = [] if mode == "stream" and part.blocks else [whole, narrow]
    if mode != "full":
        least = len(part.blocks) if mode == "stream" else 1
        tries += [replace(_streaming(part, name, count, host_free), activations=activations)
                  for count in range(max(least, 1), len(part.blocks) + 1)]
    for stage in tries:
        if stage.peak <= device_free:
            return stage
    closest = min(tries, key=lambda stage: stage.peak)
    advice = ("Choose --memory auto, which streams" if mode == "full" and part.blocks else
              "Choose a smaller picture or batch" if closest.activations > closest.resident + closest.slots else
              "Choose a smaller file (GGUF, fp8), a smaller picture") + ", or --memory cpu"
    raise NotEnoughMemory(name, closest.peak - device_free, "device memory", advice)


def _streaming(part: PartWeights, name: str, count: int, host_free: int | None) -> Stage:
    """`count` blocks stream, evenly spread, so that those between give each copy its time."""
    blocks = len(part.blocks)
    chosen = tuple(sorted({(2 * i + 1) * blocks // (2 * count) for i in range(count)}))
    moved = sum(part.blocks[i] for i in chosen)
    slots = SLOTS * max(part.blocks[i] for i in chosen)
    pinned = host_free is None or moved + HOST_SPARE <= host_free - part.made
    return Stage(name, part.total - moved, 0, blocks, chosen, moved, slots, pinned)
