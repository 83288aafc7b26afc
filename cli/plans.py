"""The table of `flux-kit doctor --plans`: FLUX.1-dev at every precision on the usual cards. No file is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from ..engine.convert.recipes import RECIPES, stored_type
from ..engine.memory import PartWeights, estimate, part_weights
from ..engine.models.autoencoder import Autoencoder
from ..engine.models.clip import ClipText
from ..engine.models.flux import Flux
from ..engine.models.t5 import T5Encoder
from ..engine.quant import FORMATS
from ..engine.specs import CLIP_L, FLUX_AE, FLUX_DEV, T5_XXL
from ..hosts.estimate import CARD_RESERVE, CARDS, GIB, Estimate, plan_words

PRECISIONS = ("BF16", "fp8_scaled", "Q8_0", "Q6_K", "Q5_K_S", "Q4_K_S", "NF4", "Q2_K")
"""Of the transformer: types that `quantize` writes, and NF4 as published."""
ENCODERS = ("BF16", "fp8_scaled", "Q8_0")
SIDE = 1024


@dataclass(frozen=True)
class Stored:
    """A tensor of a file that need not be there."""

    shape: tuple[int, ...]
    format: str

    @property
    def nbytes(self) -> int:
        if self.format in FORMATS and len(self.shape) == 2:
            return self.shape[0] * FORMATS[self.format].row_bytes(self.shape[1])
        return math.prod(self.shape) * {"F32": 4}.get(self.format, 2)

    @property
    def is_mapped(self) -> bool:
        return self.format != "NF4"


def header(role: str, model: nn.Module, layers: int, precision: str) -> Mapping[str, Stored]:
    """Names, shapes and types of a file of this precision. NF4: the blocks' linear layers, the rest in bf16."""
    linear = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    found = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if precision == "NF4":
            type = "NF4" if name in linear and "_blocks." in name else "BF16"
        else:
            type = stored_type(RECIPES[precision], role, layers, name, shape, "BF16", name in linear)
        found[name] = Stored(shape, type)
    return found


def weights(role: str, model: nn.Module, layers: int, precision: str) -> PartWeights:
    names = header(role, model, layers, precision)
    return part_weights(names, SimpleNamespace(role=role, names={name: name for name in names}), torch.bfloat16)


def rows() -> list[dict[str, str]]:
    """One row for each precision and encoder, a column for each card."""
    with torch.device("meta"):
        flux, t5, clip, vae = Flux(FLUX_DEV), T5Encoder(T5_XXL), ClipText(CLIP_L), Autoencoder(FLUX_AE)
    needs = estimate(FLUX_DEV, T5_XXL, FLUX_AE, width=SIDE, height=SIDE)
    small = {"clip_l": weights("clip_l", clip, CLIP_L.num_hidden_layers, "BF16"),
             "vae": weights("vae", vae, 0, "BF16")}
    encoders = {name: weights("t5", t5, T5_XXL.num_layers, name) for name in ENCODERS}
    table = []
    for precision in PRECISIONS:
        transformer = weights("transformer", flux, FLUX_DEV.depth, precision)
        for name, encoder in encoders.items():
            found = Estimate({"t5": encoder, "transformer": transformer, **small}, {}, needs, "")
            cells = {f"{size} GiB": plan_words(found, int((size - CARD_RESERVE) * GIB), None) for size in CARDS}
            table.append({"transformer": f"{precision} ({transformer.loaded / GIB:.1f})",
                          "T5": f"{name} ({encoder.loaded / GIB:.1f})", **cells})
    return table


def markdown(table: list[dict[str, str]]) -> list[str]:
    """The rows as a table."""
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row[column] for column in columns) + " |" for row in table]
