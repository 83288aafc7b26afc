"""Train tiny-flux's later members from tiny-flux-dev: Fill, Canny and Kontext. The text encoders rest.

`python -m flux_kit.tiny_flux.train_members fill --run DIR`; run it again to resume.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast

from ..engine.models.autoencoder import Autoencoder
from ..engine.models.layers import timestep_embedding
from ..engine.sampling import image_seq_len, make_sigmas, table_for
from ..engine.sampling.latents import patchify, text_ids, unpatchify
from ..engine.sampling.slots import positions, size_of
from .data import SQUARE, figure_weights, hardness
from .scenes import Scene, caption, render
from .score import matches, to_uint8
from .tasks import SCENES, Size, depth, edges, edit_task, fill_task, hole, join_task, misleading
from .train_autoencoder import SPEC as AE_SPEC
from .train_transformer import DEV, Family, Schedule, draw_times, init_transformer, train, trained_state

log = logging.getLogger(__name__)

MODELS = Path(__file__).parent / "models"
WIDER = ((192, 128), (128, 192))
FILLS = {SQUARE: 5000, **dict.fromkeys(WIDER, 900)}  # pictures with a hole
LENGTHS = (32, 32, 32, 48, 64, 256)
PER_GEOMETRY = 10           # maps of each of the 50 shapes, sizes and places


@dataclass(frozen=True)
class Examples:
    """`channels` go beside the noise as further channels `(B, C, h, w)`; `references` before the target as tokens."""

    latents: Tensor             # (B, 16, h, w), scaled
    captions: list[str]
    channels: Tensor | None = None
    references: tuple[Tensor, ...] = ()

    def taken(self, picks: Sequence[int]) -> Examples:
        at = list(picks)
        return Examples(self.latents[at], [self.captions[i] for i in at],
                        None if self.channels is None else self.channels[at],
                        tuple(reference[at] for reference in self.references))


@torch.no_grad()
@autocast("cpu", enabled=False)  # pools are made inside a training step
def encoded(autoencoder: Autoencoder, pictures: Sequence[NDArray[np.float32]]) -> Tensor:
    """Scaled latents of pictures `(H, W, 3)` in -1..1."""
    parts = [autoencoder.encode(torch.from_numpy(np.stack(pictures[i:i + 32])).permute(0, 3, 1, 2))
             for i in range(0, len(pictures), 32)]
    return (torch.cat(parts) - AE_SPEC.shift_factor) * AE_SPEC.scale_factor


def fill_channels(masked: Tensor, masks: Tensor) -> Tensor:
    """`(B, 16 + 64, h, w)`: the masked picture's latents and each 8 x 8 block of the mask `(B, H, W)`."""
    return torch.cat((masked, F.pixel_unshuffle(masks[:, None], 8)), dim=1)


class Pool:
    """Pictures encoded once and kept in a file; examples are drawn from them."""

    def __init__(self, autoencoder: Autoencoder, folder: Path, seed: int) -> None:
        self.autoencoder, self.folder, self.random = autoencoder, folder, random.Random(seed)
        self._loaded: dict[str, dict[str, Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        file = self.folder / f"pool_{name}.safetensors"
        if not file.exists():
            log.info("encoding %s", name)
            save_file({key: value.contiguous() for key, value in make().items()}, file)
        if name not in self._loaded:
            self._loaded[name] = load_file(file)
        return self._loaded[name]

    def scenes(self, count: int, rng: random.Random) -> list[Scene]:
        scenes = SCENES[False]
        return rng.choices(scenes, [hardness(scene) for scene in scenes], k=count)


class FillPool(Pool):
    def draw(self, count: int) -> Examples:
        size = SQUARE if self.random.random() < 0.75 else self.random.choice(WIDER)
        scenes = self.scenes(FILLS[size], random.Random(str(size)))
        pool = self.kept(f"{size[0]}x{size[1]}", partial(self._make, scenes, size))
        picks = [self.random.randrange(len(scenes)) for _ in range(count)]
        channels = fill_channels(pool["masked"][picks], pool["mask"][picks].float() / 255)
        return Examples(pool["latents"][picks], [told(scenes[i], self.random) for i in picks], channels)

    def _make(self, scenes: list[Scene], size: Size) -> dict[str, Tensor]:
        rng = random.Random(1)
        pictures = [render(scene, *size) * 2 - 1 for scene in scenes]
        masks = [(hole(rng, scene, size) * 255).round() for scene in scenes]
        masked = [picture * (1 - mask[..., None] / 255) for picture, mask in zip(pictures, masks, strict=True)]
        return {"latents": encoded(self.autoencoder, pictures), "masked": encoded(self.autoencoder, masked),
                "mask": torch.from_numpy(np.stack(masks)).byte()}


class MapPool(Pool):
    """Targets of any colours, and a map of the same geometry."""

    def __init__(self, autoencoder: Autoencoder, folder: Path, seed: int,
                 trace: Callable[[Scene, Size, random.Random], NDArray[np.float32]]) -> None:
        super().__init__(autoencoder, folder, seed)
        self.trace = trace
        every = {geometry(scene): scene for scene in SCENES[False]}
        self.geometries = {key: PER_GEOMETRY * i for i, key in enumerate(every)}
        self.maps = self.kept("maps", lambda: {"maps": self._maps(list(every.values()))})["maps"]
        self.targets = scene_latents(self)

    def draw(self, count: int) -> Examples:
        scenes = SCENES[False]
        picks = self.random.choices(range(len(scenes)), [hardness(scene) for scene in scenes], k=count)
        maps = [self.geometries[geometry(scenes[i])] + self.random.randrange(PER_GEOMETRY) for i in picks]
        texts = [told(scenes[i], self.random) if self.random.random() < 0.35 else misleading(scenes[i], self.random)
                 for i in picks]
        return Examples(self.targets[picks], texts, self.maps[maps])

    def _maps(self, scenes: list[Scene]) -> Tensor:
        rng = random.Random(1)
        drawn = [self.trace(scene, SQUARE, rng) for scene in scenes for _ in range(PER_GEOMETRY)]
        return encoded(self.autoencoder, [np.repeat(each[..., None] * 2 - 1, 3, axis=2) for each in drawn])


class EditPool(Pool):
    def __init__(self, autoencoder: Autoencoder, folder: Path, seed: int) -> None:
        super().__init__(autoencoder, folder, seed)
        self.latents = scene_latents(self)
        self.index = {scene: i for i, scene in enumerate(SCENES[False])}

    def draw(self, count: int) -> Examples:
        """One reference in most batches; else two, or none: an edit model still paints from text alone."""
        pick = self.random.random()
        if pick < 0.1:
            scenes = self.scenes(count, self.random)
            return Examples(self._of(scenes), [told(scene, self.random) for scene in scenes])
        tasks = [(join_task if pick < 0.25 else edit_task)(self.random, False) for _ in range(count)]
        references = tuple(self._of(column) for column in zip(*(task.references for task in tasks), strict=True))
        return Examples(self._of([task.after for task in tasks]), [task.prompt for task in tasks], None, references)

    def _of(self, scenes: Sequence[Scene]) -> Tensor:
        return self.latents[[self.index[scene] for scene in scenes]]


def scene_latents(pool: Pool) -> Tensor:
    return pool.kept("scenes", lambda: {"latents": encoded(
        pool.autoencoder, [render(scene) * 2 - 1 for scene in SCENES[False]])})["latents"]


def geometry(scene: Scene) -> tuple[str | None, str, str | None]:
    return scene.size, scene.shape, scene.place


def told(scene: Scene, rng: random.Random) -> str:
    """A caption; now and then none, or one without what goes without saying."""
    if rng.random() < 0.05:
        return ""
    if scene.size == "large" and rng.random() < 0.2:
        scene = replace(scene, size=None)
    elif scene.place == "center" and rng.random() < 0.4:
        scene = replace(scene, place=None)
    text = caption(scene, rng if rng.random() < 0.7 else None)
    return rng.choice((text, text, text.capitalize(), text + "."))


# -- the model with all its inputs

def velocity(family: Family, x: Tensor, t: Tensor, txt: Tensor, pooled: Tensor, guidance: Tensor,
             examples: Examples) -> Tensor:
    """`(B, 16, h, w)` in and out."""
    batch, _, height, width = x.shape
    target = patchify(x if examples.channels is None else torch.cat((x, examples.channels), dim=1))
    count, sizes = target.shape[1], [size_of(reference) for reference in examples.references]
    tokens = torch.cat((target, *map(patchify, examples.references)), dim=1)
    ids = torch.cat(positions(batch, (height, width), sizes, "offset"), dim=1)
    out = family.flux(tokens, ids, txt, text_ids(batch, txt.shape[1]), t, pooled, guidance)
    return unpatchify(out[:, :count], height, width)


def loss_of(family: Family, examples: Examples, rng: random.Random, most_guidance: float = 50) -> Tensor:
    noise = torch.randn_like(examples.latents)
    txt, pooled = family.encode(examples.captions, rng.choice(LENGTHS))
    if rng.random() < 0.2:  # T5 is enough
        pooled = family.encode([""], 8)[1].expand_as(pooled)
    t = draw_times(len(noise), family.flux.spec)
    shaped = t[:, None, None, None]
    guidance = torch.empty(len(noise)).uniform_(math.log(1.5), math.log(most_guidance)).exp()
    out = velocity(family, shaped * noise + (1 - shaped) * examples.latents, t, txt, pooled, guidance, examples)
    return (figure_weights(examples.latents) * (out.float() - (noise - examples.latents)).square()).mean()


# -- a quick look while training; `members.py` is the judge of what is shipped

@torch.no_grad()
def pictures(family: Family, autoencoder: Autoencoder, examples: Examples, guidance: float, steps: int = 16
             ) -> NDArray[np.uint8]:
    count, _, height, width = examples.latents.shape
    txt, pooled = family.encode(examples.captions, 64)
    x = torch.randn(examples.latents.shape, generator=torch.Generator().manual_seed(7))
    sigmas = make_sigmas("bfl", steps, table=table_for(DEV), image_seq_len=image_seq_len(height, width))
    for sigma, after in pairwise(sigmas):
        v = velocity(family, x, sigma.expand(count), txt, pooled, torch.full((count,), guidance), examples)
        x = x + (after - sigma) * v
    return to_uint8(autoencoder.decode(x / AE_SPEC.scale_factor + AE_SPEC.shift_factor))


def held_out_fill(autoencoder: Autoencoder, count: int) -> tuple[Examples, list[Scene]]:
    rng = random.Random(5)
    tasks = [fill_task(rng, True) for _ in range(count)]
    masks = np.stack([task.mask for task in tasks])
    masked = [(render(task.before) * 2 - 1) * (1 - task.mask[..., None]) for task in tasks]
    channels = fill_channels(encoded(autoencoder, masked), torch.from_numpy(masks))
    return Examples(torch.zeros(count, 16, 16, 16), [task.prompt for task in tasks], channels), [
        task.after for task in tasks]


def held_out_maps(trace: Callable[[Scene, Size], NDArray[np.float32]], autoencoder: Autoencoder, count: int
                  ) -> tuple[Examples, list[Scene]]:
    rng = random.Random(5)
    scenes = rng.sample(SCENES[True], count)
    maps = encoded(autoencoder, [np.repeat(trace(scene, SQUARE)[..., None] * 2 - 1, 3, axis=2) for scene in scenes])
    return Examples(torch.zeros(count, 16, 16, 16), [misleading(scene, rng) for scene in scenes], maps), scenes


def held_out_edits(autoencoder: Autoencoder, count: int) -> tuple[Examples, list[Scene]]:
    rng = random.Random(5)
    tasks = [edit_task(rng, True) for _ in range(count)]
    references = encoded(autoencoder, [render(task.references[0]) * 2 - 1 for task in tasks])
    return Examples(torch.zeros(count, 16, 16, 16), [task.prompt for task in tasks], None, (references,)), [
        task.after for task in tasks]


@dataclass(frozen=True, kw_only=True)
class Member(Schedule):
    in_channels: int
    pool: Callable[[Autoencoder, Path, int], FillPool | MapPool | EditPool]
    held_out: Callable[[Autoencoder, int], tuple[Examples, list[Scene]]]
    guidance: float


MEMBERS = {
    "fill": Member(in_channels=384, pool=FillPool, held_out=held_out_fill, guidance=30.0, steps=2200, batch=40,
                   rate=1.2e-3),
    "canny": Member(in_channels=128, pool=partial(MapPool, trace=edges), held_out=partial(held_out_maps, edges),
                    guidance=30.0, steps=1800, batch=40, rate=1.2e-3),
    "depth": Member(in_channels=128, pool=partial(MapPool, trace=depth), held_out=partial(held_out_maps, depth),
                    guidance=10.0, steps=1800, batch=40, rate=1.2e-3),
    "kontext": Member(in_channels=64, pool=EditPool, held_out=held_out_edits, guidance=2.5, steps=11500, batch=40,
                      rate=1.2e-3),
}


def widened(state: dict[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """A state whose new input channels count for nothing yet."""
    weight = state["flux.img_in.weight"]
    extra = weight.new_zeros(len(weight), in_channels - weight.shape[1])
    return {**state, "flux.img_in.weight": torch.cat((weight, extra), dim=1)}


@torch.no_grad()
def rest_guidance(family: Family) -> None:
    """Any guidance counts as the usual one. tiny-flux-dev knows 1 to 12; at Fill's 30 its first loss was 700."""
    embedder = family.flux.guidance_in
    assert embedder is not None
    usual = embedder(timestep_embedding(torch.linspace(2.5, 5, 11), family.flux.spec.frequency_dim)).mean(0)
    embedder.out_layer.weight.zero_()
    embedder.out_layer.bias.copy_(usual)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("member", choices=MEMBERS)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=MODELS, help="where tiny-flux-dev and its parts lie")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    member = MEMBERS[arguments.member]
    autoencoder = Autoencoder(AE_SPEC).eval().requires_grad_(False)
    autoencoder.load_state_dict(load_file(arguments.models / "vae/tiny-ae.safetensors"))
    family = Family(replace(DEV, in_channels=member.in_channels))
    init_transformer(family.flux)
    family.load_state_dict(widened(trained_state(arguments.models), member.in_channels))
    rest_guidance(family)
    pool = member.pool(autoencoder, arguments.run, arguments.seed)
    examples, scenes = member.held_out(autoencoder, 60)

    def check() -> float:
        shown = pictures(family, autoencoder, examples, member.guidance)
        return sum(matches(scene, picture) for scene, picture in zip(scenes, shown, strict=True)) / len(scenes)

    train(family, member, arguments.run, arguments.seed,
          lambda _, rng: loss_of(family, pool.draw(member.batch), rng), check, arguments.compile)


if __name__ == "__main__":
    main()
