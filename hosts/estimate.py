"""What a run with some files will need, told before anything is loaded: from headers, for a picture's size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..engine.adapters.costs import header_bytes
from ..engine.errors import BadModelFile, NotEnoughMemory
from ..engine.memory import (
    Activations,
    PartWeights,
    Plan,
    Stage,
    device_free,
    estimate,
    host_free,
    part_weights,
    plan,
)
from ..engine.memory.activations import LONGEST_TEXT
from ..engine.specs import FLUX_AE, FLUX_DEV, T5_XXL
from ..engine.weights import ROLE_NAMES, detect, open_checkpoint
from ..engine.weights.describe import gib

CARDS = (6, 8, 12, 16, 24)
"""Sizes of graphics cards in GiB."""
CARD_RESERVE = 1.0
"""GiB of a card that the driver, the desktop, kernels' workspaces and fragments take."""
GIB = 2**30
SPECS: Mapping[str, Any] = {"transformer": FLUX_DEV, "t5": T5_XXL, "vae": FLUX_AE}


@dataclass(frozen=True)
class Estimate:
    """Parts by role, the sizes they run with, and the bytes they need to run. `loras`: bytes by file, which are counted
    among the parts they go with."""

    parts: Mapping[str, PartWeights]
    names: Mapping[str, str]
    activations: Activations
    picture: str
    loras: Mapping[str, int] = field(default_factory=dict)

    def plan(self, device_bytes: int | None, host_bytes: int | None, mode: str = "auto") -> Plan:
        return plan(self.parts, self.activations, device_bytes, host_bytes, mode)


def estimate_files(files: Iterable[tuple[str, Path]], *, width: int, height: int, batch: int = 1,
                   text_tokens: int = LONGEST_TEXT, dtype: torch.dtype = torch.bfloat16,
                   loras: Iterable[Path] = ()) -> Estimate:
    """The parts of a run: `files` are (role, the file that holds it); `loras` stand beside the weights, as they do
    wherever these are moved or packed. Only headers are read.

    BadModelFile where a file holds no such part; what a run lacks is left out.
    """
    parts: dict[str, PartWeights] = {}
    names: dict[str, str] = {}
    specs = dict(SPECS)
    for role, path in files:
        with open_checkpoint(path) as checkpoint:
            found = detect(checkpoint)
            part = found.parts.get(role)
            if part is None or part.spec is None:
                raise BadModelFile(path, f"holds no part of this kind, it is {found.family or found.role}",
                                   expected=ROLE_NAMES[role], found=found.role, advice="Choose another file")
            parts[role] = part_weights(checkpoint, part, dtype)
            names[role], specs[role] = path.name, part.spec
    beside: dict[str, int] = {}
    for path in loras:
        with open_checkpoint(path) as checkpoint:
            found_bytes = header_bytes(checkpoint, dtype.itemsize)
        beside[path.name] = beside.get(path.name, 0) + sum(found_bytes.values())
        for role in found_bytes.keys() & parts.keys():
            parts[role] = replace(parts[role], rest=parts[role].rest + found_bytes[role])
    needs = estimate(specs["transformer"], specs["t5"], specs["vae"], width=width, height=height, batch=batch,
                     text_tokens=text_tokens, dtype=dtype)
    several = "" if batch == 1 else f", {batch} at once"
    kind = str(dtype).removeprefix("torch.")
    return Estimate(parts, names, needs, f"{width} x {height}{several}, computed in {kind}", beside)


def told(found: Estimate, device: torch.device, mode: str = "auto") -> str:
    """The estimate in lines: weights, work, this machine, and the usual cards."""
    lines = [f"{ROLE_NAMES[role].split(' ', 1)[1]}: {gib(part.loaded)} of weights ({found.names[role]})"
             for role, part in found.parts.items()]
    if found.loras:
        size = gib(sum(found.loras.values()))
        lines.append(f"{size} of these are LoRAs beside the weights ({', '.join(found.loras)})")
    lines.append(f"picture {found.picture}: {gib(found.activations.encode)} to read the prompt, "
                 f"{gib(found.activations.sample)} to sample, {gib(found.activations.decode)} to decode "
                 f"({gib(found.activations.strips)} in strips)")
    free = device_free(device) if device.type != "cpu" else None
    where = "on the CPU" if free is None else f"{device} with {gib(free)} free"
    lines.append(f"this machine, {where}: {plan_words(found, free, host_free(), mode)}")
    lines += [f"a card of {size} GiB: {plan_words(found, int((size - CARD_RESERVE) * GIB), None, mode)}"
              for size in CARDS]
    return "\n".join(lines)


def plan_words(found: Estimate, device_bytes: int | None, host_bytes: int | None, mode: str = "auto") -> str:
    """One plan in words, or why there is none."""
    try:
        made = found.plan(device_bytes, host_bytes, mode)
    except NotEnoughMemory as error:
        return f"does not fit. {error}"
    if not all(stage.on_device for stage in made.stages):
        most = sum(stage.resident for stage in made.stages) + max(stage.activations for stage in made.stages)
        return f"{gib(most)} of host memory with all files mapped"
    if made.keep:
        return f"all fits at once ({gib(made.peak)})"
    words = [stage_words(stage) for stage in made.stages if stage.streamed or stage.strips]
    return f"{', '.join(words) or 'one part at a time'} ({gib(made.peak)})"


def stage_words(stage: Stage) -> str:
    """What is not simply resident."""
    what, verb = {"encode": ("text encoders", "stream"), "sample": ("transformer", "streams"),
                  "decode": ("decoder", "")}[stage.name]
    if stage.streamed:
        return f"{what} {verb} {stage.streamed_bytes / (stage.resident + stage.streamed_bytes):.0%}"
    return f"{what} in strips"
