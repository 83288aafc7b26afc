"""Headers of LoRA files made of others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..adapters.report import TRIGGERS
from ..weights import open_checkpoint
from ..weights.containers import TORCH_DTYPES

HISTORY = "flux_kit.lora"
"""The entry of a header that says what a file was made from."""
DROPPED = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "ss_network_args")
"""Entries that are true of the source alone: PEFT's alpha, which is written beside the layers, and hashes."""


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
