"""Writing LoRA files: their headers, and the files themselves, which are complete when they appear."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadInput, FluxKitError
from ..weights import open_checkpoint
from ..weights.containers import SAFETENSORS_SUFFIXES, TORCH_DTYPES
from .report import TRIGGERS

HISTORY = "flux_kit.lora"
"""The entry of a header that says what a file was made from."""
DROPPED = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "ss_network_args")
"""Entries that are true of the source alone: PEFT's alpha, which is written beside the layers, and hashes."""


def check_target(target: Path, force: bool) -> None:
    if not target.name.lower().endswith(SAFETENSORS_SUFFIXES):
        raise BadInput(f"{target}: a LoRA file must end in {' or '.join(SAFETENSORS_SUFFIXES)}", file=target)
    if target.is_dir():
        raise BadInput(f"{target}: this is a folder; name a file in it", file=target)
    if not target.parent.is_dir():
        raise BadInput(f"{target}: there is no folder {target.parent}; make it, or name another", file=target)
    if target.exists() and not force:
        raise BadInput(f"{target}: there is such a file already; remove it, name another, or allow to overwrite it "
                       "(overwrite, --force)", file=target)


def header(sources: Sequence[tuple[Path, float]], layout: str, ranks: Sequence[int]) -> dict[str, str]:
    """What the headers of `sources`, files and strengths, agree on, all trigger words, and what the file was made
    from."""
    headers = []
    for path, _ in sources:
        with open_checkpoint(path) as checkpoint:
            headers.append(dict(checkpoint.metadata))
    kept = {key: value for key, value in headers[0].items() if key not in DROPPED
            and all(other.get(key) == value for other in headers)}
    for key in TRIGGERS:
        words = list(dict.fromkeys(header[key].strip() for header in headers if header.get(key, "").strip()))
        if words:
            kept[key] = ", ".join(words)
    facts = {"ss_network_module": "networks.lora_flux", "ss_network_alpha": "Dynamic",
             "ss_network_dim": str(ranks[0]) if len(ranks) == 1 else "Dynamic"}
    kept |= {key: value for key, value in facts.items() if key in kept}
    before = _history(kept.get(HISTORY, "")) if len(sources) == 1 else []
    made = {"from": [[path.name, strength] for path, strength in sources], "layout": layout, "ranks": list(ranks)}
    return {**kept, HISTORY: json.dumps([*before, made])}


def _history(text: str) -> list[object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def name_of(dtype: torch.dtype) -> str:
    return next(name for name, word in TORCH_DTYPES.items() if getattr(torch, word, None) == dtype)


def save(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], force: bool) -> None:
    """A safetensors file, wide types first so that each tensor lies aligned; it takes its name when it is complete."""
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in order:
        entries[name] = {"dtype": name_of(tensor.dtype), "shape": list(tensor.shape),
                         "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    if shutil.disk_usage(target.parent).free < at + len(header):
        raise FluxKitError(f"{target}: {at / 1e9:.2f} GB are needed on this disk, which has less; make room, or name a "
                           "file on another disk", file=target)
    partial = target.with_name(f".flux-kit-{secrets.token_hex(6)}.part")
    try:
        with partial.open("xb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for _, tensor in order:
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        check_target(target, force)  # it may have come into being meanwhile
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
