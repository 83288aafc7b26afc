"""`flux-kit inspect`: what model files are, from their headers."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from ..engine.adapters.describing import describe, lines_of
from ..engine.memory import estimate_weights
from . import report

ESTIMATE = partial(estimate_weights, dtype=torch.bfloat16)
"""What is not packed counts as bf16, which most machines compute in."""


def main(options: argparse.Namespace) -> int:
    """Describe every file; 1 if any of them is refused, else 0."""
    found = [describe(path, ESTIMATE) for path in options.files]
    refused = [file for file in found if file["problems"]]
    report.result({"files": found}, [line for file in found for line in lines_of(file)], as_json=options.json)
    for file in refused:
        name, problem = Path(file["path"]).name, file["problems"][0]
        report.note(f"flux-kit: {problem}" if name in problem else f"flux-kit: {name}: {problem}")
    return 1 if refused else 0
