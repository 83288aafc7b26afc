"""A random small Flux and prompts for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.specs import FluxSpec

SMALL = {"hidden_size": 128, "num_heads": 1, "depth": 1, "depth_single_blocks": 1, "context_in_dim": 64,
         "vec_in_dim": 64}


def build(**changes: Any) -> Flux:
    torch.manual_seed(0)
    flux = Flux(FluxSpec(**{**SMALL, **changes})).eval().requires_grad_(False)
    # The last layer starts small in a fresh network; a velocity of size 1 makes mistakes visible.
    flux.final_layer.linear.weight.mul_(5)
    return flux


def prompt(seed: int, length: int = 20, batch: int = 1, **options: Any) -> list[list[Any]]:
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(batch, length, 64, generator=generator)
    return [[cond, {"pooled_output": torch.randn(batch, 64, generator=generator), **options}]]


@pytest.fixture(scope="session")
def flux() -> Flux:
    return build()


@pytest.fixture(scope="session")
def make_flux():
    return build


@pytest.fixture(scope="session")
def make_prompt():
    return prompt
