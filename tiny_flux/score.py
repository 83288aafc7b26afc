"""What a picture shows, judged by its pixels alone, and the score of tiny-flux over many prompts.

`python -m flux_kit.tiny_flux.score` prints the table of the README, with `--formats` the one of what packing costs.

The judge knows the palette and the geometry of the grammar, and neither the prompt nor any rendered target: each pixel
goes to the nearest palette colour, the background is the most frequent colour of the border, the figure the most
frequent other flat one; what lies nearer to the figure's colour than to the background's is the figure's mask, and
shape, size and place are measured on its one connected part.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import label  # type: ignore[import-untyped]
from torch import Tensor

from ..engine.models.autoencoder import Autoencoder
from ..engine.models.clip import ClipText
from ..engine.models.flux import Flux
from ..engine.models.t5 import T5Encoder
from ..engine.sampling import Denoiser, image_seq_len, make_sigmas, sample, table_for
from ..engine.sampling.denoiser import Conditioning
from ..engine.text import TextEncoders, find_tokenizer
from ..engine.weights import load
from .scenes import (
    CROSS_ARM,
    HELD_OUT_SCENES,
    MORE_SHAPES,
    PALETTE,
    PLACES,
    RING_HOLE,
    SHAPES,
    SPANS,
    STAR_INNER,
    Scene,
    caption,
    render,
    shape_mask,
)

FLAT_TOLERANCE = 20          # levels: how far a flat colour may be from its palette entry
SPAN_TOLERANCE = 0.105       # of the shorter side; a star's fading tips take up to 0.06
NAMES = tuple(PALETTE)
COLORS = np.array([PALETTE[name] for name in NAMES], dtype=np.int16)


@dataclass(frozen=True)
class Reading:
    """What the judge saw; `problem` says why nothing could be told."""

    scene: Scene | None
    problem: str = ""


def read_picture(picture: NDArray[np.uint8], colors: NDArray[np.int16] = COLORS) -> Reading:
    """Judge a picture `(H, W, 3)` uint8. `colors`: the levels of the palette's names, in their order."""
    height, width = picture.shape[:2]
    levels = picture.astype(np.int16)
    distance = np.stack([np.abs(levels - color).max(axis=-1) for color in colors])  # (colours, H, W)
    nearest = distance.argmin(axis=0)
    ring = max(2, min(width, height) // 32)
    border = np.concatenate([nearest[:ring].ravel(), nearest[-ring:].ravel(),
                             nearest[:, :ring].ravel(), nearest[:, -ring:].ravel()])
    ground = int(np.bincount(border, minlength=len(NAMES)).argmax())
    # the figure's colour is looked for where colours are flat: on an edge of red and yellow lies orange
    flat = distance.min(axis=0) <= 2 * FLAT_TOLERANCE
    counts = np.bincount(nearest[flat], minlength=len(NAMES))
    counts[ground] = 0
    figure = int(counts.argmax())
    if counts[figure] < 0.004 * width * height:
        return Reading(None, "no figure")
    for name, index in (("background", ground), ("figure", figure)):
        where = flat & (nearest == index)
        if not where.any():
            return Reading(None, f"{name} is nowhere flat")
        seen = np.median(levels[where], axis=0)
        if np.abs(seen - colors[index]).max() > FLAT_TOLERANCE:
            return Reading(None, f"{name} colour {seen.astype(int).tolist()} is not {NAMES[index]}")
    axis = (colors[figure] - colors[ground]).astype(np.float64)
    along = (levels - colors[ground]) @ axis / (axis @ axis)  # 0 at the background's colour, 1 at the figure's
    aside = np.abs(levels - colors[ground] - along[..., None] * axis).max(axis=-1)
    mask = along > 0.5
    if (aside > 2 * FLAT_TOLERANCE).sum() > 0.1 * mask.sum():
        return Reading(None, "a third colour")
    parts, count = label(mask)
    sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1]
    if count > 1 and sizes[1] > 0.1 * sizes[0]:
        return Reading(None, "more than one figure")
    return _read_mask(parts == np.bincount(parts.ravel())[1:].argmax() + 1, NAMES[figure], NAMES[ground])


def _read_mask(mask: NDArray[np.bool_], color: str, ground: str) -> Reading:
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    span = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    side = min(width, height)
    size = min(SPANS, key=lambda name: abs(span / side - SPANS[name]))
    if abs(span / side - SPANS[size]) > SPAN_TOLERANCE:
        return Reading(None, f"span {span / side:.2f} of the shorter side is neither small nor large")
    middle = ((columns[0] + columns[-1] + 1) / 2 / width, (rows[0] + rows[-1] + 1) / 2 / height)
    place = min(PLACES, key=lambda name: _far(PLACES[name], middle))
    if _far(PLACES[place], middle) > 0.09:
        return Reading(None, f"figure at {middle[0]:.2f}, {middle[1]:.2f} is in no named place")
    likeness = {shape: _likeness(mask, shape) for shape in (*SHAPES, *MORE_SHAPES)}
    shape = max(likeness, key=lambda name: likeness[name])
    if likeness[shape] < 0.68:
        return Reading(None, f"no known shape (best {shape}, overlap {likeness[shape]:.2f})")
    return Reading(Scene(size, color, shape, place, ground))


def _far(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1]))


AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "ring": np.pi * (1 - RING_HOLE**2),
         "star": 5 * STAR_INNER * np.sin(np.pi / 5),
         "cross": 8 * CROSS_ARM - 4 * CROSS_ARM**2}      # of span 2


def _likeness(mask: NDArray[np.bool_], shape: str) -> float:
    """Intersection over union with an ideal shape of the same area and centre of gravity.

    Not of the same box: one stray pixel or a faded tip moves a box, and hardly an area.
    """
    radius = float(np.sqrt(mask.sum() / AREAS[shape]))
    rows, columns = np.nonzero(mask)
    middle_x, middle_y = columns.mean() + 0.5, rows.mean() + 0.5
    if shape == "triangle":  # its centre of gravity lies a third of its half height below its middle
        middle_y -= radius / 3
    x, y = np.arange(mask.shape[1]) + 0.5 - middle_x, np.arange(mask.shape[0]) + 0.5 - middle_y
    ideal = shape_mask(shape, x[None, :] / radius, y[:, None] / radius)
    return float((mask & ideal).sum() / max(1, (mask | ideal).sum()))


def matches(asked: Scene, picture: NDArray[np.uint8], colors: NDArray[np.int16] = COLORS) -> bool:
    """True when the picture shows all that was asked; attributes that are None may be anything."""
    seen = read_picture(picture, colors).scene
    return seen is not None and all(
        want is None or want == got for want, got in zip(
            (asked.size, asked.color, asked.shape, asked.place, asked.ground),
            (seen.size, seen.color, seen.shape, seen.place, seen.ground), strict=True))


MODELS = Path(__file__).parent / "models"
STEPS = {"schnell": 4}       # of other members 20


@dataclass(frozen=True)
class Case:
    scene: Scene                # attributes that are None were not asked for
    prompt: str


def held_out_cases(count: int, seed: int = 0) -> list[Case]:
    """Prompts for scenes never trained on: half in the canonical wording, half in any; one in ten leaves out size or
    place."""
    rng = random.Random(seed)
    cases = []
    for i in range(count):
        scene = HELD_OUT_SCENES[i % len(HELD_OUT_SCENES)]
        if i % 10 == 9:
            scene = replace(scene, size=None) if i % 20 == 9 else replace(scene, place=None)
        cases.append(Case(scene, caption(scene, rng if i % 2 else None)))
    return cases


class Studio:
    """tiny-flux through the engine's own path: load, encode, sample, decode. `member`: "dev", "schnell", "fill" ..."""

    def __init__(self, member: str = "dev", models: Path = MODELS) -> None:
        t5_file, clip_file = (models / f"text_encoders/tiny-{name}.safetensors" for name in ("t5", "clip_l"))
        file, = (models / "diffusion_models").glob(f"tiny-flux-{member}.*")
        flux, autoencoder = load(file, "transformer"), load(models / "vae/tiny-ae.safetensors", "vae")
        clip, t5 = load(clip_file, "clip_l"), load(t5_file, "t5")
        assert isinstance(flux, Flux) and isinstance(autoencoder, Autoencoder)
        assert isinstance(clip, ClipText) and isinstance(t5, T5Encoder)
        self.flux, self.autoencoder, self.steps = flux, autoencoder, STEPS.get(member, 20)
        self.text = TextEncoders(clip, find_tokenizer("clip_l", clip_file), t5, find_tokenizer("t5", t5_file))

    @torch.no_grad()
    def pictures(self, prompts: Sequence[str], *, seed: int = 0, size: tuple[int, int] = (128, 128),
                 guidance: float = 3.5, t5_length: int | None = None, slots: Mapping[str, Any] | None = None
                 ) -> NDArray[np.uint8]:
        """One picture a prompt, `(N, H, W, 3)`; euler on BFL's schedule. `slots`: further keys of the conditioning."""
        cond, options = self.conditioning(prompts, guidance, t5_length)
        return self.painted([[cond, {**options, **(slots or {})}]], len(prompts), seed, size)

    @torch.no_grad()
    def conditioning(self, prompts: Sequence[str], guidance: float, t5_length: int | None = None
                     ) -> tuple[Tensor, dict[str, Any]]:
        encoded = [self.text.encode(prompt, t5_length=t5_length) for prompt in prompts]
        cond, pooled = (torch.cat(column) for column in zip(*encoded, strict=True))
        return cond, {"pooled_output": pooled, "guidance": guidance}

    @torch.no_grad()
    def painted(self, conditioning: Conditioning, count: int, seed: int = 0, size: tuple[int, int] = (128, 128)
                ) -> NDArray[np.uint8]:
        height, width = size[1] // 8, size[0] // 8
        denoiser = Denoiser(self.flux, conditioning, dtype=torch.float32)
        sigmas = make_sigmas("bfl", self.steps, table=table_for(self.flux.spec),
                             image_seq_len=image_seq_len(height, width))
        latents = sample(denoiser, torch.zeros(count, 16, height, width), sigmas, seed=seed)
        return to_uint8(self.autoencoder.decode(latents))

    @torch.no_grad()
    def encoded(self, pictures: NDArray[np.float32]) -> Tensor:
        """Raw latents `(N, 16, H/8, W/8)` of pictures `(N, H, W, 3)` in 0..1, as a VAE node gives them."""
        return self.autoencoder.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1)


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """`(B, 3, H, W)` in -1..1 -> `(B, H, W, 3)` uint8."""
    levels: NDArray[np.uint8] = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return levels


def score(studio: Studio, cases: Sequence[Case], *, guidance: float = 3.5, t5_length: int | None = None,
          size: tuple[int, int] = (128, 128), batch: int = 25) -> float:
    """Share of cases whose picture shows every attribute asked for."""
    right = 0
    for start in range(0, len(cases), batch):
        part = cases[start:start + batch]
        pictures = studio.pictures([case.prompt for case in part], seed=start, guidance=guidance, size=size,
                                   t5_length=t5_length)
        right += sum(matches(case.scene, picture) for case, picture in zip(part, pictures, strict=True))
    return right / len(cases)


@torch.no_grad()
def round_trip_psnr(autoencoder: Autoencoder, scenes: Sequence[Scene] = HELD_OUT_SCENES) -> float:
    """Mean PSNR in dB of encode + decode over scenes at 128 x 128, in 8 bits."""
    values = []
    for start in range(0, len(scenes), 20):
        x = torch.stack([torch.from_numpy(render(scene)) for scene in scenes[start:start + 20]]).permute(0, 3, 1, 2)
        y = torch.from_numpy(to_uint8(autoencoder.decode(autoencoder.encode(x * 2 - 1)))).permute(0, 3, 1, 2) / 255
        values += (-10 * (x - y).square().mean(dim=(1, 2, 3)).log10()).tolist()
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, help="prompts (default: 500; 100 with --formats)")
    parser.add_argument("--quick", action="store_true", help="only the default guidance, length and size")
    parser.add_argument("--formats", nargs="*", metavar="TYPE",
                        help="dev with its weights packed in these types (default: all), as a table")
    arguments = parser.parse_args()
    if arguments.formats is not None:
        from .formats import print_table
        print_table(arguments.formats, held_out_cases(arguments.cases or 100))
        return
    cases = held_out_cases(arguments.cases or 500)
    dev, schnell = Studio("dev"), Studio("schnell")
    few = cases[:max(1, len(cases) // 5)]
    print(f"autoencoder, round trip of held-out scenes: {round_trip_psnr(dev.autoencoder):.1f} dB")
    for guidance in (3.5,) if arguments.quick else (2.5, 3.5, 5.0):
        print(f"dev, guidance {guidance}: {score(dev, cases, guidance=guidance):.1%} of {len(cases)}", flush=True)
    print(f"schnell, 4 steps: {score(schnell, cases):.1%} of {len(cases)}", flush=True)
    if not arguments.quick:
        print(f"dev, T5 length 512: {score(dev, few, t5_length=512):.1%} of {len(few)}", flush=True)
        for size in ((96, 96), (192, 128), (128, 192), (256, 128), (128, 256), (256, 256)):
            print(f"dev, {size[0]} x {size[1]}: {score(dev, few, size=size):.1%} of {len(few)}", flush=True)


if __name__ == "__main__":
    main()
