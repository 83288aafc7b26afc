"""The table of scores by format: every type is in it, and each row's weights are what the type makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compare import relative
from flux_kit.engine.convert import RECIPES
from flux_kit.engine.quant import Embedding, Linear
from flux_kit.engine.weights import load
from flux_kit.tiny_flux.formats import ROWS, SOURCE, print_table, psnr
from flux_kit.tiny_flux.score import held_out_cases
from torch import Tensor, nn

BANDS = {
    "BF16": (1e-4, 3e-3), "Q8_0": (3e-3, 8e-3), "fp8": (0.02, 0.05), "fp8_scaled": (0.02, 0.03),
    "int8_tensorwise": (4e-3, 0.02), "Q6_K": (0.01, 0.02), "Q5_K_S": (0.025, 0.04), "Q4_K_S": (0.055, 0.08),
    "IQ4_XS": (0.06, 0.085), "NF4": (0.07, 0.1), "Q4_0": (0.07, 0.1), "Q3_K_S": (0.12, 0.17), "Q2_K": (0.22, 0.34)}
PACKED = "single_blocks.0.linear1.weight"


def dense(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear | Embedding)}
    unpacked = {f"{name}.weight": layer.unpacked(slice(None), torch.float32) for name, layer in layers.items()}
    return {**model.state_dict(), **unpacked}


def test_every_type_is_a_row_once() -> None:
    names = [row.type for row in ROWS]
    assert len(names) == len(set(names)) and set(names) == {*RECIPES, "fp8", "NF4"} - {"F16"}
    assert [row.bits for row in ROWS] == sorted((row.bits for row in ROWS), reverse=True)


@pytest.mark.parametrize("type", BANDS)
def test_weights_are_off_by_what_the_type_costs(tmp_path: Path, type: str) -> None:
    original = load(SOURCE, "transformer").state_dict()
    (row,) = (row for row in ROWS if row.type == type)
    found = dense(row.make(tmp_path, type))
    low, high = BANDS[type]
    assert low <= relative(found[PACKED], original[PACKED]) <= high
    ends = ["final_layer.linear.weight", "img_in.bias"]
    if row.how == "blocks" or type.startswith("Q"):
        assert all(relative(found[name], original[name]) < 1e-3 for name in ends)


def test_psnr() -> None:
    one = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(one, one) == float("inf")
    assert psnr(one, one + np.uint8(10)) == pytest.approx(20 * np.log10(25.5))


def test_an_unknown_type_is_told() -> None:
    with pytest.raises(SystemExit, match="Q4_K_M"):
        print_table(["Q9"], held_out_cases(1))
