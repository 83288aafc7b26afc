"""How well tiny-flux's later members do what they are for, on held-out scenes, judged by pixels.

`python -m flux_kit.tiny_flux.members` prints the table of the README.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from ..engine.adapters import Entry, attach, read_lora
from ..engine.conditioning import fill, redux
from ..engine.models.vision import Redux, SiglipVision, to_pixels
from ..engine.weights import load
from .data import SQUARE
from .scenes import PALETTE, Scene, render
from .score import MODELS, Studio, matches, read_picture
from .tasks import SCENES, EditTask, Size, depth, edges, edit_task, fill_task, join_task, misleading

BATCH = 25
BACKGROUND = 10                     # levels by which an edit may move the background
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
Judged = Iterator[bool]


def batches(count: int) -> Iterator[tuple[int, int]]:
    """(first, how many), so that memory does not grow with the count."""
    return ((start, min(BATCH, count - start)) for start in range(0, count, BATCH))


def fills(count: int, models: Path = MODELS) -> Judged:
    """Whether, once pasted, the picture shows the figure of the prompt and nothing of the one that stood there."""
    studio, rng = Studio("fill", models), random.Random(11)
    for start, size in batches(count):
        tasks = [fill_task(rng, True) for _ in range(size)]
        before = np.stack([render(task.before) for task in tasks])
        masks = np.stack([task.mask for task in tasks])
        parts = fill.prepare(torch.from_numpy(before), torch.from_numpy(masks))
        shown = studio.pictures([task.prompt for task in tasks], seed=start, guidance=30, slots={
            "concat_latent_image": studio.encoded(parts.masked.numpy()), "concat_mask": parts.mask})
        pasted = np.where(masks[..., None] > 0, shown, (before * 255).round().astype(np.uint8))
        yield from (matches(task.after, picture) for task, picture in zip(tasks, pasted, strict=True))


def maps(studio: Studio, trace: Callable[[Scene, Size], NDArray[np.float32]], guidance: float, count: int) -> Judged:
    """Whether shape, size and place are the map's, although the prompt tells others, and the colours the prompt's."""
    rng = random.Random(12)
    for start, size in batches(count):
        scenes = [rng.choice(SCENES[True]) for _ in range(size)]
        traced = np.stack([np.repeat(trace(scene, SQUARE)[..., None], 3, axis=2) for scene in scenes])
        shown = studio.pictures([misleading(scene, rng) for scene in scenes], seed=start, guidance=guidance,
                                slots={"concat_latent_image": studio.encoded(traced)})
        yield from (matches(scene, picture) for scene, picture in zip(scenes, shown, strict=True))


def depths(count: int, models: Path = MODELS) -> Judged:
    studio = Studio("dev", models)
    attach(studio.flux, [Entry(read_lora(models / "loras/tiny-lora-depth.safetensors"), 1.0)], mode="side")
    return maps(studio, depth, 10, count)


def edits(count: int, task_of: Callable[[random.Random, bool], EditTask], models: Path = MODELS) -> Judged:
    """Whether what was asked changed, and nothing else; the background stays within 10 levels."""
    studio, rng = Studio("kontext", models), random.Random(13)
    for start, size in batches(count):
        tasks = [task_of(rng, True) for _ in range(size)]
        references = [studio.encoded(np.stack([render(scene) for scene in column]))
                      for column in zip(*(task.references for task in tasks), strict=True)]
        shown = studio.pictures([task.prompt for task in tasks], seed=start, guidance=2.5,
                                slots={"reference_latents": references})
        yield from (matches(task.after, picture) and background_off(picture, task.after) <= BACKGROUND
                    for task, picture in zip(tasks, shown, strict=True))


def background_off(picture: NDArray[np.uint8], scene: Scene) -> float:
    """Levels between the median of the border and the scene's background."""
    border = np.concatenate([picture[:4].reshape(-1, 3), picture[-4:].reshape(-1, 3), picture[:, :4].reshape(-1, 3),
                             picture[:, -4:].reshape(-1, 3)])
    return float(np.abs(np.median(border, axis=0) - PALETTE[scene.ground]).max())


class Restyler:
    """tiny-flux-dev that looks at a picture instead of reading a prompt."""

    def __init__(self, models: Path = MODELS) -> None:
        eye, projector = load(models / "clip_vision/tiny-siglip.safetensors", "vision"), load(
            models / "style_models/tiny-redux.safetensors", "redux")
        assert isinstance(eye, SiglipVision) and isinstance(projector, Redux)
        self.eye, self.projector, self.studio = eye, projector, Studio("dev", models)

    @torch.no_grad()
    def pictures(self, references: Sequence[NDArray[np.float32]], strength: float, seed: int) -> NDArray[np.uint8]:
        made = []
        for reference in references:
            text = self.studio.conditioning([""], 2.5)
            (one,), _ = redux.restyled([text], torch.from_numpy(reference)[None], self._see, self.projector,
                                       redux.Settings(strength=strength))
            made.append(one)
        columns = {key: torch.cat([values[key] for _, values in made])
                   for key in ("pooled_output", "attention_mask") if key in made[0][1]}
        joined = [torch.cat([cond for cond, _ in made]), {**made[0][1], **columns}]
        return self.studio.painted([joined], len(references), seed)

    def _see(self, images: torch.Tensor, crop: bool) -> torch.Tensor:
        out: torch.Tensor = self.eye(to_pixels(images, self.eye.spec, crop))
        return out


@dataclass(frozen=True)
class Likeness:
    right: float                        # share of pictures at strength 1 with the reference's colour and shape
    correlation: float                  # Spearman's, of the mean likeness with the strength
    by_strength: tuple[float, ...]      # mean absolute difference from the reference, in levels


def likeness(count: int, models: Path = MODELS) -> Likeness:
    restyler, rng, right = Restyler(models), random.Random(14), 0
    off = np.zeros(len(STRENGTHS))
    for start, size in batches(count):
        scenes = [rng.choice(SCENES[True]) for _ in range(size)]
        references = [render(scene) for scene in scenes]
        for i, strength in enumerate(STRENGTHS):
            shown = restyler.pictures(references, strength, start)
            off[i] += np.abs(shown.astype(float) - np.stack(references) * 255).mean() * size / count
        right += sum(carries(scene, picture) for scene, picture in zip(scenes, shown, strict=True))
    return Likeness(right / count, float(spearmanr(STRENGTHS, -off).statistic), tuple(off))


def carries(scene: Scene, picture: NDArray[np.uint8]) -> bool:
    seen = read_picture(picture).scene
    return seen is not None and (seen.color, seen.shape) == (scene.color, scene.shape)


def share(judged: Judged) -> str:
    results = list(judged)
    return f"{sum(results) / len(results):.1%} of {len(results)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--models", type=Path, default=MODELS)
    options = parser.parse_args()
    count, models = options.cases, options.models
    rows: dict[str, Callable[[], str]] = {
        "fill: the prompt's figure inside the mask": lambda: share(fills(count, models)),
        "canny: the map's figure in the prompt's colours": lambda: share(
            maps(Studio("canny", models), edges, 30, count)),
        "depth LoRA: the same with a depth map": lambda: share(depths(count, models)),
        "kontext: what was asked and nothing else": lambda: share(edits(count, edit_task, models)),
        "kontext: figure of one picture, background of another": lambda: share(edits(count, join_task, models)),
        "redux: the reference's colour and shape": lambda: redux_row(likeness(count, models)),
    }
    print("| member, task | right |\n|---|---|")
    for name, judge in rows.items():
        print(f"| {name} | {judge()} |", flush=True)


def redux_row(found: Likeness) -> str:
    off = ", ".join(f"{levels:.0f} at {at:g}" for levels, at in zip(found.by_strength, STRENGTHS, strict=True))
    return (f"{found.right:.1%}; rank correlation of likeness with strength {found.correlation:.2f} "
            f"(levels off, mean: {off})")


if __name__ == "__main__":
    main()
