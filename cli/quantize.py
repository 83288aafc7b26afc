"""`flux-kit quantize`: a model file into a smaller one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ..engine.adapters import read_lora
from ..engine.convert import RECIPES, SUFFIXES, Report, lines_of, quantize
from ..engine.convert.lora_files import Summand
from ..hosts.standalone.host import choose_device
from . import report
from .parser import UsageError


def main(options: argparse.Namespace) -> int:
    """Write the file and tell what became of it."""
    started = time.monotonic()
    recipe = next((row for name, row in RECIPES.items() if name.lower() == options.type.lower()), None)
    if recipe is None:
        raise UsageError(f"--type {options.type}: there is no such type; there are {', '.join(RECIPES)}")
    suffixes = SUFFIXES[recipe.container]
    if not options.destination.name.lower().endswith(suffixes):
        raise UsageError(f"{options.destination}: a file of type {recipe.name} ends in {' or '.join(suffixes)}")
    loras = [Summand(read_lora(path), strength) for path, strength in options.lora]
    bar = tqdm(desc=recipe.name, unit="w", unit_scale=True, leave=False, disable=None, file=sys.stderr)

    def progress(done: int, total: int, name: str) -> None:
        bar.total = total
        bar.set_postfix_str(name, refresh=False)
        bar.update(done - bar.n)

    try:
        made = quantize(options.source, options.destination, recipe.name, role=options.part, force=options.force,
                        device=_device(options.device), loras=loras, progress=progress)
    finally:
        bar.close()
    told = describe(made, options.destination, time.monotonic() - started)
    report.result(told, lines_of(made, options.destination), as_json=options.json)
    for note in told["notes"]:
        report.note(f"flux-kit: {note}")
    return 0


def _device(name: str) -> torch.device:
    """`auto` is CUDA or the CPU: other devices lack types that are needed."""
    device = choose_device(name)
    return device if name != "auto" or device.type == "cuda" else torch.device("cpu")


def describe(made: Report, path: Path, seconds: float) -> dict[str, Any]:
    """The report as one JSON object."""
    return {
        "ok": True, "path": str(path), "role": made.role, "type": made.type, "bytes_before": made.bytes_before,
        "bytes_after": made.bytes_after, "types": made.types, "relative_error": made.relative_error,
        "layers": [{"name": row.name, "types": list(row.types), "parameters": row.weights, "bytes": row.nbytes,
                    "relative_error": row.relative_error} for row in made.classes],
        "worst": [{"name": row.name, "type": row.type, "relative_error": row.deviation.relative}
                  for row in made.worst],
        "loras": [lora.as_json() for lora in made.loras], "notes": list(made.notes), "seconds": round(seconds, 3)}
