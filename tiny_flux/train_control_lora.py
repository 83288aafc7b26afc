"""Train tiny-flux's depth model as a control LoRA: low-rank changes to every layer of tiny-flux-dev, an `img_in` twice
as wide, and norms of its own, in the layout of black-forest-labs/FLUX.1-Depth-dev-lora.

`python -m flux_kit.tiny_flux.train_control_lora --run DIR`
"""

from __future__ import annotations

import argparse
import logging
import random
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..engine.models.autoencoder import Autoencoder
from .fitting import fit
from .tasks import depth
from .train_autoencoder import SPEC as AE_SPEC
from .train_members import MODELS, MapPool, loss_of, widened
from .train_transformer import DEV, Family, trained_state

NAME = "tiny-lora-depth.safetensors"
RANK = 16


class BiasedPair(nn.Module):
    """The low-rank path beside one layer, `up(down(x)) + bias`, as a forward hook."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.bias = nn.Parameter(torch.zeros(layer.out_features))
        layer.register_forward_hook(lambda _, inputs, out: out + inputs[0] @ self.down.T @ self.up.T + self.bias)


def train(run: Path, models: Path, seed: int, steps: int, rate: float, batch: int = 40) -> None:
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AE_SPEC).eval().requires_grad_(False)
    autoencoder.load_state_dict(load_file(models / "vae/tiny-ae.safetensors"))
    family, rng = Family(replace(DEV, in_channels=128)), random.Random(seed)
    family.load_state_dict(widened(trained_state(models), 128))
    family.requires_grad_(False)
    pairs = {name: BiasedPair(layer, RANK) for name, layer in family.flux.named_modules()
             if isinstance(layer, nn.Linear)}
    norms = {name: parameter.requires_grad_() for name, parameter in family.flux.named_parameters()
             if name.endswith("norm.scale")}
    pool = MapPool(autoencoder, run, seed, trace=depth)
    learned = [*norms.values(), *(parameter for pair in pairs.values() for parameter in pair.parameters())]
    fit(learned, steps, rate, lambda: loss_of(family, pool.draw(batch), rng, most_guidance=12))
    state: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        state |= {f"{name}.lora_A.weight": pair.down, f"{name}.lora_B.weight": pair.up,
                  f"{name}.lora_B.bias": pair.bias}
    save_file({name: value.detach().half().contiguous() for name, value in (state | norms).items()}, run / NAME,
              {"format": "pt", "modelspec.title": "tiny-lora-depth"})
    (run / NAME).chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--rate", type=float, default=4e-3)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(arguments.run, arguments.models, arguments.seed, arguments.steps, arguments.rate)


if __name__ == "__main__":
    main()
