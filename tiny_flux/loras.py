"""What tiny-flux's LoRAs do to pictures, at several strengths and on packed weights.

`python -m flux_kit.tiny_flux.loras` prints the table of docs/log.md.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..engine.adapters import Entry, attach, read_lora
from ..engine.models.flux import Flux
from .formats import ROWS, pictures_of
from .scenes import HELD_OUT_SCENES, PALETTE, all_scenes, caption
from .score import COLORS, MODELS, NAMES, Case, Studio, held_out_cases, matches
from .train_lora import OPPOSITE

LORAS = MODELS / "loras"
OPPOSITE_COLORS: NDArray[np.int16] = np.array([PALETTE[OPPOSITE[name]] for name in NAMES], dtype=np.int16)
BASES = ("fp16", "fp8", "Q4_K_S")
STRENGTHS = (0.0, 0.5, 1.0)


def plain_cases(count: int, seed: int = 0) -> list[Case]:
    """Held-out prompts of all sizes: in their own order the small figures, which are harder, come first."""
    return random.Random(seed).sample(held_out_cases(len(HELD_OUT_SCENES)), count)


def cross_cases(count: int, seed: int = 0) -> list[Case]:
    """Prompts for crosses of colours, sizes and places that training never saw together."""
    rng = random.Random(seed)
    scenes = [scene for scene in all_scenes(("cross",)) if scene.held_out]
    rng.shuffle(scenes)
    return [Case(scene, caption(scene, rng if i % 2 else None))
            for i, scene in enumerate(scenes[i % len(scenes)] for i in range(count))]


@dataclass(frozen=True)
class Effect:
    """What one LoRA is for: its cases, and the share of pictures that show it, judged by pixels."""

    file: str
    cases: Callable[[int], list[Case]]
    colors: NDArray[np.int16]


EFFECTS = {
    "opposite": Effect("tiny-lora-opposite.safetensors", plain_cases, OPPOSITE_COLORS),
    "cross": Effect("tiny-lora-cross.safetensors", cross_cases, COLORS),
    "both": Effect("tiny-lora-opposite-cross.safetensors", cross_cases, OPPOSITE_COLORS),
}


def share(studio: Studio, effect: Effect, cases: Sequence[Case], strength: float, path: Path | None = None
          ) -> tuple[float, float]:
    """Shares of pictures that show what is asked: as the LoRA paints it, and as the base model does."""
    attached = attach(studio.flux, [Entry(read_lora(path or LORAS / effect.file), strength)], mode="side")
    try:
        pictures = pictures_of(studio, cases)
    finally:
        attached.detach()
    shown = [sum(matches(case.scene, picture, colors) for case, picture in zip(cases, pictures, strict=True))
             for colors in (effect.colors, COLORS)]
    return shown[0] / len(cases), shown[1] / len(cases)


def base(name: str, folder: Path) -> Flux:
    """tiny-flux-dev in a type, as `formats` makes it; "fp16" is the file as it is."""
    if name == "fp16":
        return Studio("dev").flux
    row = next(row for row in ROWS if row.type == name)
    return cast(Flux, row.make(folder, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    options = parser.parse_args()
    studio = Studio("dev")
    print(f"{options.cases} held-out prompts; in brackets: right in the base model's colours\n\n| LoRA | base | "
          + " | ".join(f"strength {s:g}" for s in STRENGTHS) + " |\n|---|---|" + "---|" * len(STRENGTHS))
    for name, effect in EFFECTS.items():
        cases = effect.cases(options.cases)
        for kind in BASES:
            with tempfile.TemporaryDirectory() as folder:
                studio.flux = base(kind, Path(folder))
                found = [share(studio, effect, cases, strength) for strength in STRENGTHS]
                studio.flux = cast(Flux, None)
            cells = [f"{a:.0%} ({b:.0%})" if effect.colors is not COLORS else f"{a:.0%}" for a, b in found]
            print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
