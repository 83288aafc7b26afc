"""`flux-kit lora convert|merge|resize`: LoRA files made of LoRA files."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..engine.adapters import Options, read_lora
from ..engine.convert.lora_files import DTYPES, Summand, check_lora_target, write_lora
from ..engine.errors import BadInput
from ..engine.weights import detect, load, open_checkpoint
from . import report

ROLES = ("transformer", "clip_l", "t5")


def main(options: argparse.Namespace) -> int:
    """Write the file and tell what became of it."""
    started = time.monotonic()
    check_lora_target(options.destination, options.force)
    how = Options(ignore_alpha=options.ignore_alpha, split_fix=options.split_fix, skip_broken=options.skip_broken)
    sources = options.loras if options.action == "merge" else [(options.source, 1.0)]
    summands = [Summand(read_lora(path, how), strength) for path, strength in sources]
    bar = tqdm(desc=options.action, unit="layer", leave=False, disable=None, file=sys.stderr)

    def progress(done: int, total: int, name: str) -> None:
        bar.total = total
        bar.set_postfix_str(name, refresh=False)
        bar.update(done - bar.n)

    try:
        made = write_lora(options.destination, summands, to=options.to, rank=options.rank,
                          dtype=DTYPES.get(options.dtype), bases=bases(options.base), force=options.force,
                          progress=progress)
    finally:
        bar.close()
    told = {"ok": True, **made.as_json(), "seconds": round(time.monotonic() - started, 3)}
    report.result(told, made.lines(), as_json=options.json)
    for note in made.notes:
        report.note(f"flux-kit: {note}")
    return 0


def bases(paths: Sequence[Path]) -> dict[str, nn.Module]:
    """The models in these files, by role; their weights stay on the disk, as stored."""
    found: dict[str, nn.Module] = {}
    for path in paths:
        with open_checkpoint(path) as checkpoint:
            detection = detect(checkpoint)
            roles = [role for role in ROLES if role in detection.parts]
            if not roles:
                raise BadInput(f"{path.name}: this is {detection.family}; a base is a FLUX.1 transformer, CLIP-L or T5",
                               file=path)
            for role in roles:
                if role in found:
                    raise BadInput(f"{path.name}: a {role} was given already; give one base of each kind", file=path)
                found[role] = load(checkpoint, role, dtype=None)
    return found
