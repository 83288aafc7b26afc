"""Train a tiny SigLIP and its Redux projector on tiny-flux-dev, whose weights rest.

`python -m flux_kit.tiny_flux.train_redux --run DIR`. First the tokens learn to be what T5 says of the picture's
caption, which is quick and shows the way; then the transformer itself judges them, with an empty prompt beside.
"""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..engine.models.autoencoder import Autoencoder
from ..engine.models.vision import Redux, SiglipVision
from ..engine.sampling.latents import image_ids, patchify, text_ids, unpatchify
from ..engine.specs import ReduxSpec, SiglipSpec
from .data import figure_weights, hardness
from .fitting import fit
from .scenes import caption, render
from .tasks import SCENES
from .train_autoencoder import SPEC as AE_SPEC
from .train_members import MODELS, encoded
from .train_transformer import AHEAD, DEV, Family, draw_times, trained_state

log = logging.getLogger(__name__)

SIGLIP = SiglipSpec(image_size=84, patch_size=14, hidden_size=144, intermediate_size=288, num_hidden_layers=3,
                    num_attention_heads=2, vision_use_head=False)
REDUX = ReduxSpec(redux_dim=SIGLIP.hidden_size, txt_in_features=DEV.context_in_dim)
SIDE = SIGLIP.image_size // SIGLIP.patch_size


class Eye(nn.Module):
    """Pictures `(B, 3, 84, 84)` in -1..1 -> tokens `(B, 36, 64)`."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip, self.redux = SiglipVision(SIGLIP), Redux(REDUX)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif "position" in name:
                nn.init.normal_(parameter, std=0.1)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.redux(self.siglip(pixels))
        return out


def pooled_grid(tokens: Tensor, side: int) -> Tensor:
    """The grid of tokens made coarser, as the strength of detail in Redux nodes does."""
    grid = tokens.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2)


def seen(pixels: Tensor, rng: random.Random) -> Tensor:
    """Pictures as they come from elsewhere: a little brighter or darker, shifted by a pixel, with some noise."""
    pixels = pixels * rng.uniform(0.94, 1.0) + torch.randn(len(pixels), 3, 1, 1) * 0.015
    pixels = torch.roll(pixels, (rng.randint(-1, 1), rng.randint(-1, 1)), (2, 3))
    return (pixels + torch.randn_like(pixels) * rng.uniform(0, 0.03)).clamp(-1, 1)


def train(run: Path, models: Path, seed: int, steps: tuple[int, int], batch: int = 40) -> None:
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    rng, scenes = random.Random(seed), SCENES[False]
    autoencoder = Autoencoder(AE_SPEC).eval().requires_grad_(False)
    autoencoder.load_state_dict(load_file(models / "vae/tiny-ae.safetensors"))
    family = Family(DEV)
    family.load_state_dict(trained_state(models))
    family.requires_grad_(False)
    pictures = [render(scene) * 2 - 1 for scene in scenes]
    latents = encoded(autoencoder, pictures)
    pixels = torch.cat([F.interpolate(torch.from_numpy(picture).permute(2, 0, 1)[None], (84, 84), mode="bicubic",
                                      antialias=True) for picture in pictures]).clamp(-1, 1)
    states = torch.cat([family.encode([caption(scene) for scene in scenes[i:i + 64]], SIDE * SIDE)[0]
                        for i in range(0, len(scenes), 64)])
    weights, eye = [hardness(scene) for scene in scenes], Eye()

    def loss_now(judged: bool) -> Tensor:
        picks = rng.choices(range(len(scenes)), weights, k=batch)
        tokens = eye(seen(pixels[picks], rng))
        told = (tokens.float() - states[picks]).square().mean()
        return painted(family, tokens, latents[picks], rng) + 0.05 * told if judged else told

    if (run / "told.safetensors").exists():
        eye.load_state_dict(load_file(run / "told.safetensors"))
    else:
        fit(eye.parameters(), steps[0], 2e-3, lambda: loss_now(False), decay=0.01)
        save_file(eye.state_dict(), run / "told.safetensors")
    fit(eye.parameters(), steps[1], 1e-3, lambda: loss_now(True), decay=0.01)
    save_file(eye.state_dict(), run / "eye.safetensors")


def painted(family: Family, tokens: Tensor, latents: Tensor, rng: random.Random) -> Tensor:
    """How far the transformer is from the picture, told by the tokens after an empty prompt."""
    if rng.random() < 0.15:
        tokens = pooled_grid(tokens, rng.choice((3, 4, 5)))
    txt, pooled = family.encode([""], rng.choice(AHEAD))
    count = len(latents)
    txt = torch.cat((txt.expand(count, -1, -1), tokens), dim=1)
    noise, t = torch.randn_like(latents), draw_times(count, DEV)
    shaped = t[:, None, None, None]
    x, guidance = shaped * noise + (1 - shaped) * latents, torch.empty(count).uniform_(2, 6)
    height, width = latents.shape[-2:]
    out = family.flux(patchify(x), image_ids(count, height, width), txt, text_ids(count, txt.shape[1]), t,
                      pooled.expand(count, -1), guidance)
    velocity = unpatchify(out, height, width).float()
    return (figure_weights(latents) * (velocity - (noise - latents)).square()).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(4000, 2200))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(arguments.run, arguments.models, arguments.seed, tuple(arguments.steps))


if __name__ == "__main__":
    main()
