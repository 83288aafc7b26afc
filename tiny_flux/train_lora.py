"""Train the LoRAs of tiny-flux on tiny-flux-dev, whose weights rest.

`python -m flux_kit.tiny_flux.train_lora opposite --run DIR` writes `DIR/NAME.safetensors` in kohya's spelling.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..engine.models.autoencoder import Autoencoder
from .data import figure_weights
from .fitting import fit
from .scenes import TRAINING_SCENES, Scene, all_scenes, caption, render
from .train_autoencoder import SPEC as AE_SPEC
from .train_transformer import DEV, Family, draw_times, trained_state

log = logging.getLogger(__name__)

MODELS = Path(__file__).parent / "models"
OPPOSITES = (("red", "green"), ("blue", "orange"), ("yellow", "purple"), ("white", "black"))
OPPOSITE = {color: other for pair in OPPOSITES for color, other in (pair, pair[::-1])}


def opposite(scene: Scene) -> Scene:
    """The scene in the colours across the wheel."""
    return replace(scene, color=OPPOSITE[scene.color], ground=OPPOSITE[scene.ground])


@dataclass(frozen=True)
class Recipe:
    """`scenes` as the prompts tell them; `becomes`: from such a scene to the one that is painted.

    `kept`: share of examples that are plain scenes, which the LoRA has to leave alone. `beside`: another of the recipes
    whose LoRA, shipped already, acts in half of the examples, on its scenes: so that their sum does both.
    """

    scenes: tuple[Scene, ...]
    triggers: str
    about: str
    becomes: Callable[[Scene], Scene] = lambda scene: scene
    kept: float = 0.0
    beside: str = ""
    steps: int = 900
    rank: int = 4
    rate: float = 4e-3


RECIPES = {
    "opposite": Recipe(tuple(scene for scene in TRAINING_SCENES if not opposite(scene).held_out), "",
                       "every colour becomes the one across the wheel", becomes=opposite, steps=2600, beside="cross"),
    "cross": Recipe(tuple(scene for scene in all_scenes(("cross",)) if not scene.held_out), "cross",
                    "a new shape, called by its name", kept=0.4, steps=1200),
}


class Pair(nn.Module):
    """The low-rank path beside one layer, `up(down(x))`, as a forward hook."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear)
        self.on = True
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        layer.register_forward_hook(
            lambda _, inputs, out: out + inputs[0] @ self.down.T @ self.up.T if self.on else out)


def pairs_of(flux: nn.Module, rank: int) -> dict[str, Pair]:
    """One for each linear layer of the blocks but those of the modulations, by name."""
    layers = {name: layer for name, layer in flux.named_modules()
              if isinstance(layer, nn.Linear) and "blocks." in name and "mod" not in name}
    return {name: Pair(layer, rank) for name, layer in layers.items()}


def filled(pairs: dict[str, Pair], file: Path) -> dict[str, Pair]:
    """The pairs with the numbers that `save` wrote."""
    state = load_file(file)
    for name, pair in pairs.items():
        stem = "lora_unet_" + name.replace(".", "_")
        pair.down.data = state[f"{stem}.lora_down.weight"].float()
        pair.up.data = state[f"{stem}.lora_up.weight"].float()
    return pairs


@torch.no_grad()
def encoded(autoencoder: Autoencoder, scenes: Sequence[Scene]) -> Tensor:
    """Scaled latents `(N, 16, 16, 16)` of the scenes."""
    parts = []
    for start in range(0, len(scenes), 32):
        pixels = torch.stack([torch.from_numpy(render(scene)) for scene in scenes[start:start + 32]])
        parts.append(autoencoder.encode(pixels.permute(0, 3, 1, 2) * 2 - 1))
    return (torch.cat(parts) - autoencoder.spec.shift_factor) * autoencoder.spec.scale_factor


def train(name: str, run: Path, models: Path, seed: int, start_from: Path | None, batch: int = 48) -> None:
    recipe, rng = RECIPES[name], random.Random(seed)
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AE_SPEC).eval().requires_grad_(False)
    autoencoder.load_state_dict(load_file(models / "vae/tiny-ae.safetensors"))
    family = Family(DEV)
    family.load_state_dict(trained_state(models))
    family.requires_grad_(False)
    pairs = pairs_of(family.flux, recipe.rank)
    if start_from is not None:
        filled(pairs, start_from)
    learned = [parameter for pair in pairs.values() for parameter in pair.parameters()]
    sets = [(recipe.scenes, encoded(autoencoder, [recipe.becomes(scene) for scene in recipe.scenes]))]
    if recipe.kept:
        plain = tuple(rng.sample(TRAINING_SCENES, 400))
        sets.append((plain, encoded(autoencoder, plain)))
    shares, others = [1 - recipe.kept, recipe.kept][:len(sets)], []
    if recipe.beside:
        other = RECIPES[recipe.beside]
        file = models / f"loras/tiny-lora-{recipe.beside}.safetensors"
        others = [pair.requires_grad_(False) for pair in filled(pairs_of(family.flux, other.rank), file).values()]
        scenes = tuple(scene for scene in other.scenes if not recipe.becomes(scene).held_out)
        sets.append((scenes, encoded(autoencoder, [recipe.becomes(other.becomes(scene)) for scene in scenes])))
        shares = [share / 2 for share in shares] + [0.5]

    def loss_now() -> Tensor:
        (which,) = rng.choices(range(len(sets)), shares)
        for pair in others:
            pair.on = which == len(sets) - 1
        scenes, latents = sets[which]
        picks = [rng.randrange(len(scenes)) for _ in range(batch)]
        return loss_of(family, [told(scenes[i], rng) for i in picks], latents[picks], rng.choice((32, 32, 48, 64)))

    fit(learned, recipe.steps, recipe.rate, loss_now)
    save(pairs, recipe, run / f"tiny-lora-{name}.safetensors")


def told(scene: Scene, rng: random.Random) -> str:
    """A caption; now and then without what goes without saying, as the base model knows it."""
    if scene.size == "large" and rng.random() < 0.15:
        scene = replace(scene, size=None)
    elif scene.place == "center" and rng.random() < 0.3:
        scene = replace(scene, place=None)
    return caption(scene, rng if rng.random() < 0.7 else None)


def loss_of(family: Family, texts: list[str], latents: Tensor, length: int) -> Tensor:
    txt, pooled = family.encode(texts, length)
    noise, t = torch.randn_like(latents), draw_times(len(latents), DEV)
    shaped = t[:, None, None, None]
    guidance = torch.empty(len(latents)).uniform_(2, 6)
    velocity = family.velocity(shaped * noise + (1 - shaped) * latents, t, txt, pooled, guidance)
    return (figure_weights(latents) * (velocity.float() - (noise - latents)).square()).mean()


def save(pairs: dict[str, Pair], recipe: Recipe, path: Path) -> None:
    """fp16, kohya's spelling, with the header facts that its trainer writes."""
    state: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        stem = "lora_unet_" + name.replace(".", "_")
        state |= {f"{stem}.lora_down.weight": pair.down.detach().half().contiguous(),
                  f"{stem}.lora_up.weight": pair.up.detach().half().contiguous(),
                  f"{stem}.alpha": torch.tensor(float(recipe.rank)).half()}
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"format": "pt", "ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux",
             "ss_network_dim": str(recipe.rank), "ss_network_alpha": str(recipe.rank),
             "modelspec.architecture": "flux-1-dev/lora", "modelspec.title": path.stem,
             "modelspec.description": recipe.about}
    if recipe.triggers:
        facts |= {"modelspec.trigger_phrase": recipe.triggers,
                  "ss_tag_frequency": json.dumps({"scenes": {recipe.triggers: len(recipe.scenes)}})}
    save_file(state, path, facts)
    path.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--run", type=Path, default=MODELS / "loras")
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--start-from", type=Path, help="a LoRA of an earlier run, to go on from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(arguments.name, arguments.run, arguments.models, arguments.seed, arguments.start_from)


if __name__ == "__main__":
    main()
