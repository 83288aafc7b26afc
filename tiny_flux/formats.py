"""What packing the weights does to pictures: tiny-flux-dev in one type after another, scored, beside its fp16 self.

`python -m flux_kit.tiny_flux.score --formats` prints the table of the README.

Only the transformer is packed; text encoders and autoencoder stay as they are, and all is computed in fp32, so that
nothing but the weights differs. Where it can be, the quantiser writes a file and it is loaded as any other. tiny-flux's
rows are 64 to 640 wide and hold no whole blocks of 256: files of K types would hold other types in their place. For
these, for IQ4_XS and for NF4, which the quantiser does not write, each weight goes through the type's own encoder as
one long row and back. That is the error of the type itself, with blocks that span two rows or more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from ..engine.convert import RECIPES, encode, quantize
from ..engine.convert.recipes import stored_type
from ..engine.models.flux import Flux
from ..engine.quant import FORMATS
from ..engine.quant.fourbit import SCALE_BYTES, VALUES
from ..engine.weights import load
from .score import MODELS, Case, Studio, matches

SOURCE = MODELS / "diffusion_models" / "tiny-flux-dev.safetensors"
LONG = 256
BATCH = 25


def plain_fp8(folder: Path, type: str) -> nn.Module:
    """Every matrix cast as it stands, as ComfyUI saves it."""
    path, fp8 = folder / "fp8.safetensors", torch.float8_e4m3fn
    state = load(SOURCE, "transformer", dtype=None).state_dict()
    save_file({name: value.to(fp8) if value.ndim == 2 else value for name, value in state.items()}, path)
    return load(path, "transformer")


def as_file(folder: Path, type: str) -> nn.Module:
    path = folder / ("out.gguf" if RECIPES[type].container == "gguf" else "out.safetensors")
    quantize(SOURCE, path, type, force=True)
    return load(path, "transformer")


def as_long_rows(folder: Path, type: str) -> nn.Module:
    """Each weight that a wide model would have packed, through blocks of 256 and back; mixes as in files."""
    model = load(SOURCE, "transformer")
    for name, parameter in model.named_parameters():
        shape = (parameter.numel() // LONG, LONG)
        kind = stored_type(RECIPES[type], "transformer", 1, name, shape, "F16", True)
        if parameter.ndim == 2 and FORMATS[kind].block > 1:
            parameter.data = FORMATS[kind].dequantize(encode(parameter.data.reshape(shape), kind)).view(parameter.shape)
    return model


def nf4(folder: Path, type: str) -> nn.Module:
    """By its definition: per block the largest magnitude, and the nearest of sixteen values (arXiv 2305.14314)."""
    model, format = load(SOURCE, "transformer"), FORMATS["NF4"]
    values = torch.tensor(VALUES["NF4"])
    for name, parameter in model.named_parameters():
        if stored_type(RECIPES["Q8_0"], "transformer", 1, name, tuple(parameter.shape), "F16", True) == "Q8_0":
            blocks = parameter.data.reshape(-1, format.block)
            scale = blocks.abs().amax(1, keepdim=True)
            codes = (blocks / scale.clamp(min=1e-30))[..., None].sub(values).abs().argmin(-1).to(torch.uint8)
            packed = torch.cat([scale.view(torch.uint8).view(-1, SCALE_BYTES), codes[:, ::2] << 4 | codes[:, 1::2]], 1)
            parameter.data = format.dequantize(packed).view(parameter.shape)
    return model


@dataclass(frozen=True)
class Row:
    """`bits` a weight of most matrices that are packed; `make`: an empty folder and the type's name -> the model."""

    type: str
    bits: float
    make: Callable[[Path, str], nn.Module]
    how: str


def _row(type: str, format: str, make: Callable[[Path, str], nn.Module] = as_file, how: str = "file") -> Row:
    return Row(type, 8 * FORMATS[format].nbytes / FORMATS[format].block if format in FORMATS else 8, make, how)


def _rows() -> tuple[Row, ...]:
    wide = [(name, recipe.base) for name, recipe in RECIPES.items()
            if recipe.base in FORMATS and FORMATS[recipe.base].block == LONG]
    narrow = [(name, recipe.base) for name, recipe in RECIPES.items() if (name, recipe.base) not in wide]
    found = [_row("fp8", "F8_E4M3", plain_fp8), _row("NF4", "NF4", nf4, "blocks"),
             *(_row(name, base) for name, base in narrow if name != "F16"),
             *(_row(name, base, as_long_rows, "blocks") for name, base in wide)]
    return tuple(sorted(found, key=lambda row: -row.bits))


ROWS = _rows()


def pictures_of(studio: Studio, cases: Sequence[Case]) -> NDArray[np.uint8]:
    """One picture a case, by the prompts, with the noise that `score` gives them."""
    parts = [studio.pictures([case.prompt for case in cases[start:start + BATCH]], seed=start)
             for start in range(0, len(cases), BATCH)]
    return np.concatenate(parts)


def psnr(pictures: NDArray[np.uint8], others: NDArray[np.uint8]) -> float:
    """Of the squared error over all pictures at once, in dB."""
    error = np.square(pictures.astype(np.float64) - others).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def share_right(pictures: NDArray[np.uint8], cases: Sequence[Case]) -> float:
    return sum(matches(case.scene, picture) for case, picture in zip(cases, pictures, strict=True)) / len(cases)


def print_table(types: Sequence[str], cases: Sequence[Case]) -> None:
    """A markdown table; `types` empty: all."""
    known = {row.type.lower(): row for row in ROWS}
    unknown = [name for name in types if name.lower() not in known]
    if unknown:
        raise SystemExit(f"no type is called {', '.join(unknown)}; there are {', '.join(row.type for row in ROWS)}")
    rows = [known[name.lower()] for name in types] or ROWS
    studio = Studio("dev")
    wanted = pictures_of(studio, cases)
    print(f"tiny-flux-dev, 128 x 128, {len(cases)} held-out prompts\n\n"
          "| transformer's weights | bits of most weights | right | PSNR to fp16 | by |\n|---|---|---|---|---|\n"
          f"| F16 | 16 | {share_right(wanted, cases):.0%} | | file |", flush=True)
    for row in rows:
        with tempfile.TemporaryDirectory() as folder:
            studio.flux = cast(Flux, row.make(Path(folder), row.type))
            found = pictures_of(studio, cases)
            studio.flux = cast(Flux, None)
        print(f"| {row.type} | {row.bits:.4g} | {share_right(found, cases):.0%} | {psnr(found, wanted):.1f} dB | "
              f"{row.how} |", flush=True)
