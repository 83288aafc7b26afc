"""What a model file is, where it may be a LoRA: `weights.describe` with a LoRA's own facts beside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..weights import describe as describe_file
from ..weights import lines_of as lines_of_file
from ..weights import open_checkpoint
from ..weights.describe import Estimate
from .reading import inspect_lora
from .report import Report

ADDED = ("format", "base", "rank", "alpha", "scale", "matched", "unmatched", "unmatched_keys", "skipped", "algorithms",
         "targets", "triggers")


def describe(path: str | os.PathLike[str], estimate: Estimate | None = None) -> dict[str, Any]:
    """`weights.describe`, and for a LoRA also `ADDED`: `rank`, `alpha`, `scale` a number, a list of several, or None;
    `matched` and `unmatched` counts of keys, resolved against FLUX.1-dev, CLIP-L and T5; `skipped` [[key, reason]]."""
    found = describe_file(path, estimate)
    if found["role"] != "lora":
        return found
    with open_checkpoint(path) as checkpoint:
        report = inspect_lora(checkpoint)
    told = report.as_json()
    problems = list(dict.fromkeys([*found["problems"], *told["problems"]]))
    return {**found, **{key: told[key] for key in ADDED}, "problems": problems,
            "notes": [*found["notes"], *told["notes"]], "family": family(report)}


def family(report: Report) -> str:
    """In words, for the first line."""
    return f"a LoRA for {report.base}" if report.base and not report.problems else "a LoRA"


def lines_of(file: Mapping[str, Any]) -> list[str]:
    """`weights.lines_of` with a LoRA's facts below its first line."""
    lines = lines_of_file(file)
    if "format" not in file:
        return lines
    facts = [f"format {file['format']}, rank {shown(file['rank'])}, alpha {shown(file['alpha'])}, effective scale "
             f"{shown(file['scale'])}",
             f"{file['matched']} tensors matched, {file['unmatched']} unknown, {len(file['skipped'])} skipped"]
    facts += [", ".join(f"{count} {name}" for name, count in file["algorithms"].items())] if file["algorithms"] else []
    facts += [f"skipped {key}: {reason}" for key, reason in file["skipped"][:5]]
    facts += [f"unknown {key}" for key in file["unmatched_keys"][:5]]
    facts += [f"trigger words: {', '.join(file['triggers'])}"] if file["triggers"] else []
    return [lines[0], *(f"  {plain(fact)}" for fact in facts), *lines[1:]]


def shown(value: Any) -> str:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return "none" if not values else f"{values[0]:g} to {values[-1]:g}" if len(values) > 1 else f"{values[0]:g}"


def plain(text: str) -> str:
    """Without control characters, which names in hostile files may hold."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
