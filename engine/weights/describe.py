"""What a model file is, in plain data: the JSON object of `flux-kit inspect`, and the same as lines for people."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FluxKitError
from .containers import GGUF_SUFFIX, Checkpoint, open_checkpoint
from .detect import Detection, Part, detect
from .gguf_header import DEFAULT_ALIGNMENT, padded
from .header import size_text
from .load import MODELS, build, match, refuse

MAX_METADATA = 10_000  # characters of a metadata value; a tokenizer or a training log can be megabytes
MAX_KEY = 200
SHOWN_METADATA = 100   # and for people
EXAMPLES = 5
WHOLE = {"transformer": "transformer", "clip_l": "CLIP-L", "t5": "T5", "vae": "autoencoder (VAE)"}
"""What makes pictures, and what to call it."""

Estimate = Callable[[Checkpoint, Mapping[str, Part]], Mapping[str, int]]
"""Bytes of each part once loaded, by role."""


def describe(path: str | os.PathLike[str], estimate: Estimate | None = None) -> dict[str, Any]:
    """The description of one file, folder or index. One that cannot be opened has its reason in `problems`.

    Keys: `path`, `role`, `variant`, `layout`, `precision` {stored type: tensors}, `parameters`, `bytes` (of tensors),
    `parts` [{role, variant, layout, prefix, tensors, parameters, bytes, precision}], `absent` (roles that a picture
    needs and a file with a transformer lacks), `missing` (names of tensors), `metadata`, `memory` {role: bytes once
    loaded}, `family` (in words), `ignored`, `notes`, `problems` (why it would be refused).
    """
    try:
        with open_checkpoint(path) as checkpoint:
            return _described(checkpoint, str(path), estimate)
    except FluxKitError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or path}: {error.strerror or error}"
    return {"path": str(path), "role": "unknown", "variant": None, "layout": None, "precision": {}, "parameters": 0,
            "bytes": 0, "parts": [], "absent": [], "missing": [], "metadata": {}, "memory": {}, "family": "",
            "ignored": [], "notes": [], "problems": [problem]}


def _described(checkpoint: Checkpoint, path: str, estimate: Estimate | None) -> dict[str, Any]:
    found = detect(checkpoint)
    missing, problems = _misfits(checkpoint, found)
    known = {role: part for role, part in found.parts.items() if part.spec is not None and not part.foreign}
    return {
        "path": path, "role": found.role, "variant": found.variant, "layout": found.layout,
        **_amounts(checkpoint, checkpoint),
        "parts": [_part(checkpoint, part) for part in found.parts.values()],
        "absent": _absent(found), "missing": missing,
        "metadata": {_shortened(key, MAX_KEY): _shortened(value, MAX_METADATA)
                     for key, value in checkpoint.metadata.items()},
        "memory": {} if estimate is None else dict(estimate(checkpoint, known)),
        "family": found.family, "ignored": list(found.ignored),
        "notes": [*found.notes, *_trailing(checkpoint)], "problems": problems}


def _amounts(checkpoint: Checkpoint, names: Mapping[str, object] | list[str]) -> dict[str, Any]:
    infos = [checkpoint[name] for name in names]
    precision: dict[str, int] = {}
    for info in infos:
        precision[info.format] = precision.get(info.format, 0) + 1
    return {"precision": precision, "parameters": sum(math.prod(info.shape) for info in infos),
            "bytes": sum(info.nbytes for info in infos)}


def _part(checkpoint: Checkpoint, part: Part) -> dict[str, Any]:
    return {"role": part.role, "variant": part.variant, "layout": part.layout, "prefix": part.prefix,
            "tensors": len(part.names), **_amounts(checkpoint, list(part.names.values()))}


def _misfits(checkpoint: Checkpoint, found: Detection) -> tuple[list[str], list[str]]:
    """Names that are missing, and why the file would be refused: each part is compared with the model it fills."""
    missing: list[str] = []
    problems = list(found.problems)
    for part in found.parts.values():
        if part.role not in MODELS or part.spec is None or part.problems or part.foreign:
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


def _absent(found: Detection) -> list[str]:
    """What has to come from other files, where this one holds a transformer, or several parts."""
    inside = [role for role, part in found.parts.items() if not part.foreign]
    if "transformer" not in inside and sum(role in WHOLE for role in inside) < 2:
        return []
    return [role for role in WHOLE if role not in inside]


def _trailing(checkpoint: Checkpoint) -> list[str]:
    """Bytes behind the data of a GGUF file: llama.cpp takes such files, and so do we, but not in silence."""
    if not checkpoint or checkpoint.path.suffix.lower() != GGUF_SUFFIX:
        return []
    end = max(info.offset + info.nbytes for info in checkpoint.values())
    alignment = int(checkpoint.metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    surplus = checkpoint.files[0].identity[2] - padded(end, alignment)
    return [f"{size_text(surplus)} after the last tensor are not used"] if surplus > 0 else []


def _shortened(value: str, limit: int) -> str:
    return value if len(value) <= limit else f"{value[:limit]}… ({len(value)} characters)"


def lines_of(file: Mapping[str, Any]) -> list[str]:
    """What `describe` gave, for people: a line that names the file, and details below it. Safe to print."""
    about = [file["family"] or file["role"], file["variant"], file["layout"] and f"{file['layout']} layout"]
    lines = [f"{file['path']}: {', '.join(word for word in about if word)}"]
    if file["precision"]:
        lines.append(_amount_line(file))
    if len(file["parts"]) > 1:
        lines += [f"{part['role']}: {part['tensors']} tensors under '{part['prefix']}', {_amount_line(part)}"
                  for part in file["parts"]]
    if file["absent"]:
        lines.append(f"not inside: {', '.join(WHOLE[role] for role in file['absent'])}; load "
                     f"{'it' if len(file['absent']) == 1 else 'them'} from other files")
    if file["memory"]:
        each = ", ".join(f"{role} {gib(size)}" for role, size in file["memory"].items())
        lines.append(f"memory for weights: {each}" + (
            f", together {gib(sum(file['memory'].values()))}" if len(file["memory"]) > 1 else ""))
    for key in ("ignored", "missing"):
        if file[key]:
            more = f" and {len(file[key]) - EXAMPLES} more" if len(file[key]) > EXAMPLES else ""
            lines.append(f"{key}: {', '.join(file[key][:EXAMPLES])}{more}")
    lines += [f"metadata {key}: {_shortened(value, SHOWN_METADATA)}" for key, value in file["metadata"].items()]
    lines += [f"note: {note}" for note in file["notes"]]
    lines += [f"problem: {problem}" for problem in file["problems"]]
    return [_printable(lines[0]), *("  " + _printable(line) for line in lines[1:])]


def _amount_line(amounts: Mapping[str, Any]) -> str:
    types = ", ".join(f"{count} x {name}" for name, count in sorted(amounts["precision"].items()))
    return f"{_count(amounts['parameters'])} parameters, {gib(amounts['bytes'])}, {types}"


def _printable(text: str) -> str:
    """On one line, without control characters, which names in hostile files may hold."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.2f} million"


def gib(number: int) -> str:
    """`"11.08 GiB"`, or MiB below one."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.2f} MiB"
