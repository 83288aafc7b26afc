"""`flux-kit inspect`: what model files are, from their headers."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..engine.errors import FluxKitError
from ..engine.weights import Checkpoint, Detection, build, detect, match, open_checkpoint
from ..engine.weights.load import MODELS as LOADED
from ..engine.weights.load import refuse
from . import report

MAX_METADATA = 10_000  # characters of a metadata value in JSON; a tokenizer or a training log can be megabytes
SHOWN_METADATA = 100   # and on a terminal


def main(options: argparse.Namespace) -> int:
    """Describe every file; 1 if any of them is refused, else 0."""
    found = [describe(path) for path in options.files]
    refused = [file for file in found if file["problems"]]
    report.result({"files": found}, [line for file in found for line in lines_of(file)], as_json=options.json)
    for file in refused:
        name, problem = Path(file["path"]).name, file["problems"][0]
        report.note(f"flux-kit: {problem}" if name in problem else f"flux-kit: {name}: {problem}")
    return 1 if refused else 0


def describe(path: Path) -> dict[str, Any]:
    """The JSON object of one file. A file that cannot be opened has role "unknown" and its reason in `problems`."""
    try:
        with open_checkpoint(path) as checkpoint:
            found = detect(checkpoint)
            missing, problems = _misfits(checkpoint, found)
            precision: dict[str, int] = {}
            for info in checkpoint.values():
                precision[info.format] = precision.get(info.format, 0) + 1
            return {
                "path": str(path), "role": found.role, "variant": found.variant, "layout": found.layout,
                "precision": precision, "parameters": sum(math.prod(info.shape) for info in checkpoint.values()),
                "bytes": sum(info.nbytes for info in checkpoint.values()),
                "parts": [_part(part) for part in found.parts.values()],
                "missing": missing,
                "metadata": {key: _shortened(value, MAX_METADATA) for key, value in checkpoint.metadata.items()},
                "family": found.family, "ignored": list(found.ignored), "notes": list(found.notes),
                "problems": problems}
    except (FluxKitError, OSError) as error:
        reason = report.from_os_error(error) if isinstance(error, OSError) and not isinstance(error, FluxKitError) \
            else error
        return {"path": str(path), "role": "unknown", "variant": None, "layout": None, "precision": {}, "parameters": 0,
                "bytes": 0, "parts": [], "missing": [], "metadata": {}, "family": "", "ignored": [], "notes": [],
                "problems": [str(reason)]}


def _misfits(checkpoint: Checkpoint, found: Detection) -> tuple[list[str], list[str]]:
    """Names that are missing, and why the file would be refused: each part is compared with the model it fills."""
    missing: list[str] = []
    problems = list(found.problems)
    for part in found.parts.values():
        if part.role not in LOADED or part.spec is None or part.problems or part.foreign:
            continue
        matched = match(checkpoint, part, build(part))
        missing += matched.missing
        try:
            refuse(checkpoint, part, matched)
        except FluxKitError as error:
            problems.append(str(error))
    if found.role == "unknown" and not problems:
        problems.append(f"{checkpoint.path.name}: not a FLUX.1 file: {found.family}")
    return missing, problems


def _part(part: Any) -> dict[str, Any]:
    return {"role": part.role, "variant": part.variant, "layout": part.layout, "prefix": part.prefix,
            "tensors": len(part.names)}


def _shortened(value: str, limit: int) -> str:
    return value if len(value) <= limit else f"{value[:limit]}… ({len(value)} characters)"


def lines_of(file: dict[str, Any]) -> list[str]:
    """The same for people."""
    about = [file["family"] or file["role"], file["variant"], file["layout"] and f"{file['layout']} layout"]
    lines = [f"{file['path']}: {', '.join(word for word in about if word)}"]
    if file["precision"]:
        types = ", ".join(f"{count} x {name}" for name, count in sorted(file["precision"].items()))
        lines.append(f"  {_count(file['parameters'])} parameters, {_size(file['bytes'])}, {types}")
    if len(file["parts"]) > 1:
        lines += [f"  {part['role']}: {part['tensors']} tensors under '{part['prefix']}'" for part in file["parts"]]
    for label, key in (("ignored", "ignored"), ("missing", "missing")):
        if file[key]:
            more = f" and {len(file[key]) - 5} more" if len(file[key]) > 5 else ""
            lines.append(f"  {label}: {', '.join(file[key][:5])}{more}")
    lines += [f"  metadata {key}: {_shortened(value, SHOWN_METADATA)}" for key, value in file["metadata"].items()]
    lines += [f"  note: {note}" for note in file["notes"]]
    lines += [f"  problem: {problem}" for problem in file["problems"]]
    return [report.one_line(line) if not line.startswith("  ") else "  " + report.one_line(line) for line in lines]


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"
