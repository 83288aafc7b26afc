"""Training examples of tiny-flux: cached latents of the training scenes and freshly worded captions."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from ..engine.models.autoencoder import Autoencoder
from .scenes import TRAINING_SCENES, Scene, caption, render

SQUARE = (128, 128)
SIZES = {
    (96, 96): 2.5, (160, 160): 1.0, (192, 192): 1.0, (256, 256): 1.5, (96, 160): 1.0, (160, 96): 1.0, (128, 192): 1.0,
    (192, 128): 1.0, (128, 256): 1.5, (256, 128): 1.5, (96, 256): 1.0, (256, 96): 1.0,
}  # width, height in pixels: how often it is drawn
HARD_SHAPES = {"star": 3.5, "ring": 1.7}
LARGE_UNTOLD, CENTER_UNTOLD = 0.25, 0.5
"""How often captions leave out what goes without saying: a figure without a size is large, one without a place in the
centre. Left out of any scene, they were drawn between two answers: to settle on one by the noise was too hard."""
SCENES_PER_SIZE = 640           # of the sizes other than 128 x 128, which has them all


@dataclass(frozen=True)
class Batch:
    latents: Tensor             # (B, 16, H/8, W/8), scaled
    captions: list[str]
    guidance: Tensor            # (B,)


class SceneLatents:
    """Latents of the training scenes at many sizes, encoded when first asked for and kept in a folder, so that a
    resumed run does not wait for them again. A folder belongs to one autoencoder."""

    def __init__(self, autoencoder: Autoencoder, seed: int, folder: Path) -> None:
        self.autoencoder, self.folder = autoencoder, folder
        self.random = random.Random(seed)
        self._cache: dict[tuple[int, int], tuple[list[Scene], Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def of_size(self, size: tuple[int, int]) -> tuple[list[Scene], Tensor]:
        if size not in self._cache:
            chosen = random.Random(str(size)).sample(TRAINING_SCENES, SCENES_PER_SIZE)
            scenes = TRAINING_SCENES if size == SQUARE else chosen
            file = self.folder / f"latents_{size[0]}x{size[1]}.safetensors"
            if not file.exists():
                save_file({"latents": encode_scenes(self.autoencoder, scenes, size).contiguous()}, file)
            self._cache[size] = (scenes, load_file(file)["latents"])
        return self._cache[size]

    def batch(self, size: tuple[int, int], count: int) -> Batch:
        """`count` random examples. See `guided_caption` for what guidance means to tiny-flux."""
        scenes, latents = self.of_size(size)
        picks = self.random.choices(range(len(scenes)), [hardness(scene) for scene in scenes], k=count)
        guidance = [self._guidance() for _ in range(count)]
        captions = [guided_caption(scenes[i], g, self.random) for i, g in zip(picks, guidance, strict=True)]
        return Batch(latents[picks], captions, torch.tensor(guidance))

    def _guidance(self) -> float:
        return self.random.uniform(1, 6) if self.random.random() < 0.85 else self.random.uniform(6, 12)


def hardness(scene: Scene) -> float:
    """How often a scene is drawn. Small figures cover fewer tokens; after 3,000 steps that drew all shapes alike ten
    misses of eleven were stars."""
    return HARD_SHAPES.get(scene.shape, 1.0) * (1.8 if scene.size == "small" else 1.0)


def figure_weights(latents: Tensor) -> Tensor:
    """1 where latents `(B, 16, h, w)` are background, up to 5 on the figure: `(B, 1, h, w)` with mean 1.

    A weight that depends on the target alone leaves the best answer of a regression where it is; it only says what to
    get right first, and most of a picture is flat background.
    """
    ground = latents.flatten(2).median(dim=-1).values[..., None, None]
    weights = 1 + 4 * ((latents - ground).abs().mean(dim=1, keepdim=True) / 0.5).clamp(max=1)
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True)


@torch.no_grad()
def encode_scenes(autoencoder: Autoencoder, scenes: list[Scene], size: tuple[int, int]) -> Tensor:
    spec = autoencoder.spec
    parts = []
    for start in range(0, len(scenes), 32):
        pixels = torch.stack([torch.from_numpy(render(scene, *size)) for scene in scenes[start:start + 32]])
        raw = autoencoder.encode(pixels.permute(0, 3, 1, 2) * 2 - 1)
        parts.append((raw - spec.shift_factor) * spec.scale_factor)
    return torch.cat(parts)


def guided_caption(scene: Scene, guidance: float, rng: random.Random) -> str:
    """A caption of the scene; below guidance 2, more and more often one of another scene.

    So the network learns what artists know of the real one: low guidance strays from the prompt, 2.5 and more follow
    it. One in twenty is empty, for true CFG.
    """
    if rng.random() < 0.05:
        return ""
    if guidance < 2 and rng.random() < 0.5 * (2 - guidance):
        scene = rng.choice(TRAINING_SCENES)
    if scene.size == "large" and rng.random() < LARGE_UNTOLD:
        scene = replace(scene, size=None)
    elif scene.place == "center" and rng.random() < CENTER_UNTOLD:
        scene = replace(scene, place=None)
    text = caption(scene, rng if rng.random() < 0.7 else None)
    return rng.choice((text, text, text.capitalize(), text + ".", text.capitalize() + "."))


def pad_ids(tokenizer: Tokenizer, texts: list[str], length: int | None, pad: int) -> Tensor:
    """Token ids `(B, L)` padded to `length`, or to the longest text."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    width = max(length or 0, *(len(row) for row in rows))
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])
