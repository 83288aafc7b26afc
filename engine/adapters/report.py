"""What was found in a LoRA file: the facts that nodes, `inspect` and messages show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_TAGS = 20
HEADER_FACTS = (
    "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "ss_resolution", "ss_output_name", "ss_training_comment", "modelspec.architecture", "modelspec.title",
    "modelspec.author",
    "modelspec.description", "modelspec.usage_hint", "modelspec.license", "modelspec.date",
)
"""Entries of a header worth showing as they are (kohya-ss/sd-scripts, sai_model_spec)."""
TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_word", "trigger_words", "activation_text",
            "instance_prompt")
EXAMPLES = 5


@dataclass(frozen=True)
class Report:
    """`matched`: keys that belong to a layer; `unmatched`: keys nobody knows; `skipped`: keys understood but of no use
    here, with the reason. `ranks`, `alphas`, `scales`: distinct values in order. `targets`: layers by model. `problems`
    are reasons to refuse the file, `notes` worth telling. `nonfinite`: NaN and infinities in the tensors, None until
    they are read."""

    format: str
    base: str | None
    matched: int
    unmatched: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    ranks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    algorithms: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()
    header: Mapping[str, str] = field(default_factory=dict)
    nonfinite: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The part of `inspect --json` that a LoRA adds; numbers for one value, lists for several, null for none."""
        return {
            "format": self.format, "base": self.base, "rank": _one(self.ranks), "alpha": _one(self.alphas),
            "scale": _one(self.scales), "matched": self.matched, "unmatched": len(self.unmatched),
            "unmatched_keys": list(self.unmatched), "skipped": [list(pair) for pair in self.skipped],
            "algorithms": dict(self.algorithms), "targets": dict(self.targets), "triggers": list(self.triggers),
            "header": dict(self.header), "problems": list(self.problems), "notes": list(self.notes),
            "nonfinite": self.nonfinite,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        algorithms = ", ".join(f"{count} {name}" for name, count in self.algorithms.items())
        layers = ", ".join(f"{count} of {role}" for role, count in self.targets.items())
        total = self.matched + len(self.unmatched) + len(self.skipped)
        found = [f"{self.format} LoRA for {self.base or 'an unknown base'}: {algorithms or 'nothing known'}"
                 + (f"; layers: {layers}" if layers else ""),
                 f"rank {_shown(self.ranks)}, alpha {_shown(self.alphas)}, effective scale {_shown(self.scales)}",
                 f"{self.matched} of {total} tensors matched"]
        if self.unmatched:
            found.append(f"{len(self.unmatched)} unknown: {', '.join(self.unmatched[:EXAMPLES])}")
        for reason, keys in by_reason(self.skipped).items():
            found.append(f"{len(keys)} skipped ({reason}): {', '.join(keys[:EXAMPLES])}")
        if self.triggers:
            found.append(f"trigger words: {', '.join(self.triggers)}")
        return [*found, *(f"problem: {text}" for text in self.problems), *self.notes]


def by_reason(skipped: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, reason in skipped:
        found.setdefault(reason, []).append(key)
    return found


def _one(values: Sequence[float]) -> Any:
    return None if not values else values[0] if len(values) == 1 else list(values)


def _shown(values: Sequence[float]) -> str:
    if not values:
        return "none"
    shown = [f"{value:g}" for value in values]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}" if len(shown) > 3 else ", ".join(shown)


def header_facts(metadata: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The facts of a header worth showing, and its trigger words: named ones, else the commonest training tags."""
    facts = {name: metadata[name] for name in HEADER_FACTS if metadata.get(name)}
    named = [metadata[name].strip() for name in TRIGGERS if metadata.get(name, "").strip()]
    return facts, tuple(named) if named else _common_tags(metadata.get("ss_tag_frequency", ""))


def _common_tags(text: str) -> tuple[str, ...]:
    """Tags that stand with every picture of a data set (`{folder: {tag: count}}`): most likely the trigger."""
    try:
        folders = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        if isinstance(tags, dict):
            counts.update({str(tag).strip(): count for tag, count in tags.items() if isinstance(count, int)})
    most = max(counts.values(), default=0)
    return tuple(tag for tag, count in counts.most_common(MAX_TAGS) if count == most and count > 1 and tag)
