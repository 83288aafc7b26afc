"""Rows of LoRAs in both hosts: their files read once and checked, what becomes of them, and how it is told."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..engine.adapters import Applied, Entry, Lora, Mask, Options, Row, Share, block_weights, read_lora
from ..engine.adapters.describing import describe, lines_of
from ..engine.errors import BadInput, BadModelFile, FluxKitError
from .fingerprint import fingerprint
from .lora_rows import trigger_words

ROLES = {"transformer": "model", "clip_l": "CLIP-L", "t5": "T5"}
TEXT_ROLES = ("clip_l", "t5")
PICTURE_KEYS = ("concat_latent_image", "noise_concat")  # of a conditioning that holds a control picture
KEPT_BYTES = 2 << 30
"""Files parsed before are kept up to this size in all, the one used last longest."""
EXAMPLES = 5


class Files:
    """LoRA files as they are on disk now, their tensors in memory: nothing stays open."""

    def __init__(self, limit: int = KEPT_BYTES) -> None:
        self.limit = limit
        self._kept: OrderedDict[object, Lora] = OrderedDict()
        self.reads = 0

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, path: Path, options: Options) -> Lora:
        """As `read_lora`, from memory while the file stays as it was."""
        key = (tuple(fingerprint(path)), options)
        if key not in self._kept:
            lora = read_lora(path, options)
            self.reads += 1
            owned = tuple(replace(adapter, factors={role: tensor.clone() for role, tensor in adapter.factors.items()})
                          for adapter in lora.adapters)
            self._kept[key] = replace(lora, adapters=owned)
        self._kept.move_to_end(key)
        found = self._kept[key]
        while len(self._kept) > 1 and sum(map(nbytes, self._kept.values())) > self.limit:
            self._kept.popitem(last=False)
        return found


FILES = Files()


def nbytes(lora: Lora) -> int:
    return sum(tensor.nbytes for adapter in lora.adapters for tensor in adapter.factors.values())


@dataclass(frozen=True)
class Chosen:
    """A row with its file."""

    row: Row
    lora: Lora

    def strength(self, role: str) -> float:
        return self.row.model if role == "transformer" else self.row.clip

    def acts_on(self, role: str) -> bool:
        return self.strength(role) != 0 and bool(self.lora.of(role))

    def entry(self, role: str, mu: float | None = None) -> Entry:
        """For `attach`. `mu`: the model's time shift. Ranges, schedules, block weights and regions are the model's."""
        row = self.row
        if role != "transformer":
            return Entry(self.lora, row.clip)
        factor = block_weights(row.blocks) if row.blocks.strip() else None
        schedule = (lambda sigma: row.factor(share_of(sigma, mu))) if row.timed else None
        return Entry(self.lora, row.model, factor, schedule, masked=row.region is not None)


def share_of(sigma: float, mu: float | None) -> float:
    """The share of a run 0..1 that is over at a sigma, by the times that the model's shift was made for."""
    if mu is None or sigma <= 0:
        return 1 - max(sigma, 0.0)
    return 1 - 1 / (1 + math.exp(mu) * (1 / sigma - 1))


def choose(resolve: Callable[[str], Path], rows: Iterable[Row], strict: bool, files: Files = FILES
           ) -> tuple[list[Chosen], list[str]]:
    """Files of the rows that act, and the report on them. `strict`: raises on the first that cannot be applied as it
    is; otherwise such a row is left out, or its broken layers are, and the report says so."""
    chosen: list[Chosen] = []
    lines: list[str] = []
    for row in rows:
        if not row.reads:
            continue
        try:
            lora = files.read(resolve(row.file), Options(skip_broken=not strict))
            if strict and lora.report.unmatched:
                raise _unknown(lora)
        except FluxKitError as error:
            if strict:
                raise
            lines.append(f"{row.file}: NOT APPLIED: {error}")
            continue
        chosen.append(Chosen(row, lora))
        lines += [_title(row), *(f"  {line}" for line in lora.report.lines())]
    twice = [path for path, count in Counter(one.lora.path for one in chosen).items() if count > 1]
    return chosen, [*lines, *(f"{path.name} stands more than once: its strengths add" for path in twice)]


def _unknown(lora: Lora) -> BadModelFile:
    unknown = lora.report.unmatched
    return BadModelFile(lora.path, f"{len(unknown)} of its tensors belong to no layer known here, such "
                                   f"as {', '.join(unknown[:EXAMPLES])}", expected="FLUX.1's layers",
                        advice="Choose 'warn' to apply the others, or another version of the file")


def _title(row: Row) -> str:
    more = [f"block weights '{row.blocks}'"] if row.blocks.strip() else []
    more += [f"from {row.start:g} to {row.end:g} of the run"] if (row.start, row.end) != (0, 1) else []
    more += ["scheduled"] if row.schedule else []
    more += ["in a region"] if row.region is not None else []
    return f"{row.file}: {', '.join([f'model {row.model:g}', f'clip {row.clip:g}', *more])}"


def told(chosen: Sequence[Chosen], applied: Sequence[Applied], role: str) -> list[str]:
    """What becomes of the layers of one model, LoRA by LoRA."""
    lines = []
    for one, done in zip(chosen, applied, strict=True):
        ways = ", ".join(f"{count} by {way}" if way == "side path" else f"{count} {way}"
                         for way, count in done.layers.items())
        lines.append(f"{one.lora.path.name} on {ROLES[role]}: {ways or 'no layers'}")
        reasons = Counter(reason for _, reason in done.skipped)
        lines += [f"  {count} layers left out: {reason}" for reason, count in reasons.items()]
        lines += [f"  {note}" for note in done.notes]
    return lines


def unconnected(chosen: Sequence[Chosen]) -> list[str]:
    """For a row with text encoder layers and no CLIP to put them on."""
    return [f"{one.lora.path.name}: its {count} text encoder layers have no effect: no CLIP is connected"
            for one in chosen if one.row.clip and (count := sum(len(one.lora.of(role)) for role in TEXT_ROLES))]


def mask_of(chosen: Sequence[Chosen], height: int, width: int, text_tokens: int | None) -> Mask | None:
    """Shares by token for a picture of `height` x `width` tokens; None if no row has a region."""
    regions = [one.row.region for one in chosen]
    if not any(regions):
        return None
    whole = torch.ones(height * width)
    image = torch.stack([whole if region is None else region.shares(height, width) for region in regions], dim=1)
    text, rest = (torch.tensor([[1.0 if region is None else getattr(region, name) for region in regions]])
                  for name in ("text", "background"))
    return Mask(image, text, rest, text, text_tokens)


def control_loras(chosen: Sequence[Chosen], in_features: int) -> list[str]:
    """Names of LoRAs that take more channels than the model's `img_in`: they need a control picture."""
    return [one.lora.path.name for one in chosen if one.row.model and any(
        adapter.destination.module == "img_in" and not adapter.on_bias and (adapter.size[1] or 0) > in_features
        for adapter in one.lora.of("transformer"))]


def input_width(chosen: Sequence[Chosen], in_features: int) -> int:
    """Channels that a model's `img_in` takes once these are on it: control LoRAs widen it."""
    return max([in_features, *(adapter.size[1] or 0 for one in chosen if one.acts_on("transformer")
                               for adapter in one.lora.of("transformer")
                               if adapter.destination.module == "img_in" and not adapter.on_bias)])


@dataclass(frozen=True)
class Inspected:
    """Of one file: a report for people, its trigger words, and all that is known as JSON."""

    report: str
    words: str
    metadata: str


def inspected(path: Path, share: Share | None = None) -> Inspected:
    """What a LoRA file holds, whether it can be applied or not. `share`: how much it changes a model."""
    told = describe(path)
    words = ", ".join(trigger_words(path))
    lines = lines_of({**told, "path": path.name, "metadata": {}})
    if told["role"] == "lora" and not told["problems"]:
        try:
            read_lora(path)
        except FluxKitError as error:
            told["problems"] = [error.message]
            lines.append(f"  problem: {error.message}")
    if share is not None:
        told["share"] = {"total": share.total, "layers": share.by_layer}
        most = sorted(share.by_layer.items(), key=lambda item: -item[1])[:EXAMPLES]
        lines.append(f"  changes the model's weights by {100 * share.total:.2f} % of their length; most: "
                     + ", ".join(f"{name} {100 * value:.1f} %" for name, value in most))
    return Inspected("\n".join(lines), words, json.dumps(told, indent=1, default=str))


def needs_picture(names: Sequence[str]) -> BadInput:
    return BadInput(f"{', '.join(names)} is a control LoRA (FLUX.1 Depth or Canny), and the conditioning has no "
                    "control picture. Connect its depth map or edges to the conditioning, or take this LoRA out")


def has_picture(conditioning: Iterable[Sequence[object]]) -> bool:
    return all(isinstance(entry[1], dict) and any(isinstance(entry[1].get(key), Tensor) for key in PICTURE_KEYS)
               for entry in conditioning)
