"""PEFT's alpha, which diffusers writes into the header of a file and not beside the layers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..weights.header import show
from .algorithms import Mismatch

KEY = "lora_adapter_metadata"
ROLES = {"transformer": "transformer.", "clip_l": "text_encoder.", "t5": "text_encoder_2."}
"""Model -> prefix of its entries (huggingface/diffusers, loaders/lora_base.py)."""
_NAME = re.compile(r"(\^?)([\w.-]+)\$?")


@dataclass(frozen=True)
class PeftHeader:
    """`entries`: `transformer.lora_alpha`, `.r`, `.alpha_pattern`, `.use_rslora` and the like."""

    entries: Mapping[str, Any]

    @staticmethod
    def read(metadata: Mapping[str, str]) -> PeftHeader:
        """Of a header without the entry, or with a broken one: nothing."""
        try:
            found = json.loads(metadata.get(KEY, "{}"))
        except (ValueError, RecursionError):
            found = {}
        return PeftHeader(found if isinstance(found, dict) else {})

    def _entry(self, role: str, name: str) -> Any:
        bare = self.entries.get(name) if role == "transformer" else None
        return self.entries.get(ROLES[role] + name, bare)

    def alpha(self, role: str, stem: str) -> float | None:
        """Of the layer spelled `stem` in the file; None if the header does not say. Mismatch for a layer that a regular
        expression may mean: PEFT searches with them, and one from a file could search for ever."""
        layer = stem.removeprefix(ROLES[role])
        pattern = self._entry(role, "alpha_pattern")
        for text, value in pattern.items() if isinstance(pattern, dict) else ():
            found = _NAME.fullmatch(text)
            if found is None:
                raise Mismatch(f"the header's alpha_pattern {show(text)} is a regular expression, expected a layer's "
                               "name")
            if layer == found[2] or (not found[1] and layer.endswith(f".{found[2]}")):
                return _number(value)
        return _number(self._entry(role, "lora_alpha"))

    def divisor(self, role: str, rank: int) -> float:
        """What alpha is divided by: the rank, or its root with rsLoRA (arXiv 2312.03732)."""
        return math.sqrt(rank) if self._entry(role, "use_rslora") is True else float(rank)


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None
