"""`flux-kit quantize`: a model file into a smaller one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ..engine.convert import RECIPES, SUFFIXES, Report, quantize
from ..engine.errors import BadModelFile, MissingFile
from ..engine.text import find_tokenizer
from ..engine.text.vocabulary import Vocabulary
from ..engine.weights import detect, open_checkpoint
from ..hosts.standalone.host import choose_device
from . import report
from .parser import UsageError

ENCODERS = ("t5", "clip_l")
SHOWN_WORST = 5


def main(options: argparse.Namespace) -> int:
    """Write the file and tell what became of it."""
    started = time.monotonic()
    recipe = next((row for name, row in RECIPES.items() if name.lower() == options.type.lower()), None)
    if recipe is None:
        raise UsageError(f"--type {options.type}: there is no such type; there are {', '.join(RECIPES)}")
    suffixes = SUFFIXES[recipe.container]
    if not options.destination.name.lower().endswith(suffixes):
        raise UsageError(f"{options.destination}: a file of type {recipe.name} ends in {' or '.join(suffixes)}")
    bar = tqdm(desc=recipe.name, unit="w", unit_scale=True, leave=False, disable=None, file=sys.stderr)

    def progress(done: int, total: int, name: str) -> None:
        bar.total = total
        bar.set_postfix_str(name, refresh=False)
        bar.update(done - bar.n)

    notes: list[str] = []
    try:
        tokenizer = find_words(options.source, options.part, notes)
        made = quantize(options.source, options.destination, recipe.name, role=options.part, force=options.force,
                        tokenizer=tokenizer, device=_device(options.device), progress=progress)
    finally:
        bar.close()
    told = describe(made, options.destination, [*made.notes, *notes], time.monotonic() - started)
    report.result(told, lines_of(made, options.destination), as_json=options.json)
    for note in told["notes"]:
        report.note(f"flux-kit: {note}")
    return 0


def _device(name: str) -> torch.device:
    """`auto` is CUDA or the CPU: other devices lack types that are needed."""
    device = choose_device(name)
    return device if name != "auto" or device.type == "cuda" else torch.device("cpu")


def find_words(source: Path, part: str | None, notes: list[str]) -> str | None:
    """The tokenizer.json of a text encoder, in the file or where `generate` would look for it; None without."""
    with open_checkpoint(source) as checkpoint:
        found = detect(checkpoint)
        role = part or found.role
        if role not in ENCODERS or role not in found.parts:
            return None
        try:
            vocabulary = find_tokenizer(role, checkpoint).vocabulary
        except (MissingFile, BadModelFile) as error:
            notes.append(f"no tokenizer goes along: {error}")
            return None
    if vocabulary.normalize is not Vocabulary.normalize:  # built from a spiece.model: its rules are not in the JSON
        notes.append(f"no tokenizer goes along: {vocabulary.source} is not a tokenizer.json")
        return None
    text: str = vocabulary.backend.to_str()
    return text


def describe(made: Report, path: Path, notes: list[str], seconds: float) -> dict[str, Any]:
    """The report as one JSON object."""
    return {
        "ok": True, "path": str(path), "role": made.role, "type": made.type, "bytes_before": made.bytes_before,
        "bytes_after": made.bytes_after, "types": made.types, "relative_error": made.relative_error,
        "layers": [{"name": row.name, "types": list(row.types), "parameters": row.weights, "bytes": row.nbytes,
                    "relative_error": row.relative_error} for row in made.classes],
        "worst": [{"name": row.name, "type": row.type, "relative_error": row.deviation.relative}
                  for row in made.worst],
        "notes": notes, "seconds": round(seconds, 3)}


def lines_of(made: Report, path: Path) -> list[str]:
    """The report for people."""
    types = ", ".join(f"{count} {type}" for type, count in made.types.items())
    lines = [f"{path}: {made.role} as {made.type}, {made.bytes_before / 1e6:.1f} -> {made.bytes_after / 1e6:.1f} MB "
             f"({100 * made.bytes_after / max(made.bytes_before, 1):.0f} %); tensors: {types}",
             f"  relative error {made.relative_error:.3%}; by kind of layer:"]
    lines += [f"  {row.relative_error:8.3%}  {row.name}  {'/'.join(row.types)}"
              for row in sorted(made.classes, key=lambda row: -row.relative_error) if row.relative_error > 0]
    if made.worst:
        lines.append("  farthest from the original:")
        lines += [f"  {row.deviation.relative:8.3%}  {row.name}  {row.type}" for row in made.worst[:SHOWN_WORST]]
    return lines
