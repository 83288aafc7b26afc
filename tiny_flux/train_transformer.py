"""Train tiny-flux-dev with its text encoders, or tiny-flux-schnell from it.

`python -m flux_kit.tiny_flux.train_transformer dev --run DIR --autoencoder FILE`; run it again to resume.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, autocast, nn

from ..engine.models.autoencoder import Autoencoder
from ..engine.models.clip import ClipText
from ..engine.models.flux import Flux
from ..engine.models.t5 import T5Encoder
from ..engine.sampling import image_seq_len, make_sigmas, table_for
from ..engine.sampling.latents import image_ids, patchify, text_ids, unpatchify
from ..engine.specs import ClipTextSpec, FluxSpec, T5Spec
from .data import SIZES, SQUARE, SceneLatents, figure_weights, pad_ids
from .scenes import HELD_OUT_SCENES, caption
from .score import matches, to_uint8
from .train_autoencoder import SPEC as AE_SPEC
from .vocabulary import clip_tokenizer, t5_tokenizer

log = logging.getLogger(__name__)

DEV = FluxSpec(hidden_size=128, num_heads=1, depth=2, depth_single_blocks=4, context_in_dim=64, vec_in_dim=64)
SCHNELL = replace(DEV, guidance_embed=False)
TEXT_LENGTHS = ((32, 0.62), (48, 0.16), (64, 0.10), (128, 0.07), (256, 0.04), (512, 0.01))
AHEAD = (16, 32, 32, 64, 256)   # tokens of an empty prompt that Redux's follow
EMA = 0.999
CHECKED_SIZES = (SQUARE, (96, 96), (256, 128))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    steps: int
    batch: int              # at 128 x 128; fewer where pictures are larger
    rate: float
    text_until: float = 0.0  # share of the run after which the text encoders rest, so that all members can share them


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    spec: FluxSpec
    sizes_from: float       # share of the run after which other sizes join
    size_share: float = 0.4
    clip_drop: float = 0.0  # share of examples whose CLIP vector is that of the empty text, so that T5 is enough
    behind: float = 0.0     # share of batches told after an empty prompt, as Redux's tokens are


RECIPES = {
    "dev": Recipe(spec=DEV, steps=5700, batch=64, rate=2e-3, sizes_from=0.7, text_until=0.7),
    "dev-polish": Recipe(spec=DEV, steps=12000, batch=64, rate=1.5e-3, sizes_from=0.0, text_until=0.65, size_share=0.5),
    "dev-sizes": Recipe(spec=DEV, steps=6400, batch=64, rate=1.2e-3, sizes_from=0.0, text_until=0.0, size_share=0.6),
    "dev-t5": Recipe(spec=DEV, steps=3000, batch=64, rate=8e-4, sizes_from=0.0, text_until=0.0, size_share=0.4,
                     clip_drop=0.4, behind=0.25),
    "schnell": Recipe(spec=SCHNELL, steps=1800, batch=64, rate=1e-3, sizes_from=0.0, text_until=0.0, size_share=0.35),
}
SCHNELL_TIMES = (1.0, 0.75, 0.5, 0.25)


class Family(nn.Module):
    """The transformer and its text encoders, trained as one."""

    def __init__(self, spec: FluxSpec) -> None:
        super().__init__()
        self.t5_tokenizer, self.clip_tokenizer = t5_tokenizer(), clip_tokenizer()
        pieces = self.clip_tokenizer.get_vocab_size()
        self.flux = Flux(spec)
        self.t5 = T5Encoder(T5Spec(vocab_size=self.t5_tokenizer.get_vocab_size(), d_model=64, d_kv=64, num_heads=2,
                                   d_ff=128, num_layers=2))
        self.clip = ClipText(ClipTextSpec(vocab_size=pieces, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                          num_attention_heads=1, bos_token_id=pieces - 2, eos_token_id=pieces - 1))
        nn.init.normal_(self.t5.shared.weight, std=0.5)
        nn.init.normal_(self.clip.text_model.embeddings.token_embedding.weight, std=0.3)
        nn.init.normal_(self.clip.text_model.embeddings.position_embedding.weight, std=0.1)

    def rest_text(self, average: dict[str, Tensor]) -> None:
        """Freeze the text encoders at their running average: what is shipped is what training goes on with."""
        state = {name: average[name] for name in average if name.startswith(("t5.", "clip."))}
        self.load_state_dict(state, strict=False)
        self.t5.requires_grad_(False)
        self.clip.requires_grad_(False)

    def encode(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """T5 states `(B, L, 64)` and pooled CLIP `(B, 64)`."""
        t5_ids = pad_ids(self.t5_tokenizer, texts, length, self.t5.spec.pad_token_id)
        clip_ids = pad_ids(self.clip_tokenizer, texts, None, self.clip.spec.eos_token_id)
        return self.t5(t5_ids), self.clip(clip_ids)[1]

    def velocity(self, latents: Tensor, t: Tensor, txt: Tensor, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """`(B, 16, H/8, W/8)` in and out."""
        batch, _, height, width = latents.shape
        out = self.flux(patchify(latents), image_ids(batch, height, width), txt, text_ids(batch, txt.shape[1]), t,
                        pooled, guidance)
        return unpatchify(out, height, width)


def init_transformer(flux: Flux) -> None:
    """Residual branches start closed (adaLN-zero: arXiv 2212.09748), all else at width scale."""
    for name, parameter in flux.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            nn.init.xavier_uniform_(parameter)
    for name, module in flux.named_modules():
        if name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1")) or name == "final_layer.linear":
            nn.init.zeros_(module.weight)


def draw_times(count: int, spec: FluxSpec) -> Tensor:
    """dev: mostly near pure noise, where the layout is decided and the prompt is all there is to go by (with
    logit-normal times, 5 % of them above 0.9, layouts came out wrong after 1,700 steps); schnell: mostly its four."""
    pick, u = torch.rand(count), torch.rand(count)
    t = torch.where(pick < 0.1, 1.0, torch.where(pick < 0.4, 0.85 + 0.15 * u,
                                                 torch.where(pick < 0.8, 0.5 + 0.35 * u, 0.5 * u)))
    if spec.guidance_embed:
        return t
    four = torch.tensor(SCHNELL_TIMES)[torch.randint(0, 4, (count,))]
    return torch.where(torch.rand(count) < 0.8, four, t)


def make_optimizers(family: Family, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (kellerjordan.github.io/posts/muon) for the matrices inside blocks, AdamW for the rest: after 400 steps the
    error at pure noise was 0.12 against 0.18 with AdamW alone."""
    inner = {name: p for name, p in family.named_parameters()
             if p.ndim == 2 and ("block" in name or "layers." in name) and "relative" not in name}
    rest = [p for name, p in family.named_parameters() if name not in inner]
    return [torch.optim.Muon(inner.values(), lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=0.75 * rate, betas=(0.9, 0.95), weight_decay=0.0)]


def step_loss(family: Family, data: SceneLatents, recipe: Recipe, progress: float, rng: random.Random) -> Tensor:
    other = progress >= recipe.sizes_from and rng.random() < recipe.size_share
    size = rng.choices(list(SIZES), list(SIZES.values()))[0] if other else SQUARE
    length = rng.choices([n for n, _ in TEXT_LENGTHS], [p for _, p in TEXT_LENGTHS])[0]
    tokens = size[0] * size[1] // 256 + length
    batch = data.batch(size, max(8, min(recipe.batch, recipe.batch * 128 // tokens)))
    txt, pooled = family.encode(batch.captions, length)
    if recipe.clip_drop or recipe.behind:
        behind = rng.random() < recipe.behind
        ahead, empty = family.encode([""], rng.choice(AHEAD))
        pooled = torch.where(torch.rand(len(pooled), 1) < (1.0 if behind else recipe.clip_drop), empty, pooled)
        txt = torch.cat((ahead.expand(len(txt), -1, -1), txt), dim=1) if behind else txt
    noise = torch.randn_like(batch.latents)
    t = draw_times(len(noise), recipe.spec)
    shaped = t[:, None, None, None]
    guidance = batch.guidance if recipe.spec.guidance_embed else None
    velocity = family.velocity(shaped * noise + (1 - shaped) * batch.latents, t, txt, pooled, guidance)
    return (figure_weights(batch.latents) * (velocity.float() - (noise - batch.latents)).square()).mean()


@torch.no_grad()
def held_out_score(family: Family, autoencoder: Autoencoder, count: int, steps: int, length: int = 64,
                   size: tuple[int, int] = SQUARE) -> float:
    """Share of held-out prompts whose picture shows all attributes: a quick check while training."""
    rng = random.Random(1)
    scenes = rng.sample(HELD_OUT_SCENES, count)
    txt, pooled = family.encode([caption(scene, rng) for scene in scenes], length)
    height, width = size[1] // 8, size[0] // 8
    x = torch.randn((count, 16, height, width), generator=torch.Generator().manual_seed(7))
    sigmas = make_sigmas("bfl", steps, table=table_for(family.flux.spec), image_seq_len=image_seq_len(height, width))
    for sigma, after in pairwise(sigmas):
        x = x + (after - sigma) * family.velocity(x, sigma.expand(count), txt, pooled, torch.full((count,), 3.5))
    spec = autoencoder.spec
    pictures = to_uint8(autoencoder.decode(x / spec.scale_factor + spec.shift_factor))
    return sum(matches(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)) / count


def train(family: Family, recipe: Schedule, run: Path, seed: int, loss_of: Callable[[float, random.Random], Tensor],
          check: Callable[[], object], compiled: bool = False) -> None:
    """Train `family`, or go on where `run` stopped. `loss_of`: from the share of the run done; `check`: what to log of
    the running average, which is in the family while it is called."""
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    average = {name: value.detach().clone() for name, value in family.state_dict().items()}
    optimizers = make_optimizers(family, recipe.rate)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # sizes and text lengths; past it blocks run uncompiled
        for block in (*family.flux.double_blocks, *family.flux.single_blocks):
            block.compile(dynamic=True)
    begin, state_file = 0, run / "state.pt"
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        family.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        average, begin = saved["average"], saved["step"]
    rng, began = random.Random(seed + begin), time.time()
    running = 0.0
    for step in range(begin, recipe.steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * _warm_hold_fall(step / recipe.steps)
        if step >= recipe.text_until * recipe.steps and family.t5.shared.weight.requires_grad:
            family.rest_text(average)
        with autocast("cpu", torch.bfloat16):  # half the time of fp32 on CPUs that have it; weights stay fp32
            loss = loss_of(step / recipe.steps, rng)
        family.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(family.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(EMA, (step + 1) / (step + 20))
        with torch.no_grad():
            for name, value in family.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        running += loss.item()
        if (step + 1) % 100 == 0:
            log.info("step %d loss %.4f (%.0f s)", step + 1, running / 100, time.time() - began)
            running = 0.0
        if (step + 1) % 500 == 0 or step + 1 == recipe.steps:
            _save(run, family, optimizers, average, step + 1)
        if (step + 1) % 1000 == 0 or step + 1 == recipe.steps:
            kept = {k: v.clone() for k, v in family.state_dict().items()}
            family.load_state_dict(average)
            log.info("step %d held-out scores %s", step + 1, check())
            family.load_state_dict(kept)


def _warm_hold_fall(progress: float) -> float:
    """Share of the peak rate: up over a fiftieth of the run, level, down over its last 35 %. While it is level a run
    can still be made longer or shorter (arXiv 2405.18392)."""
    return min(1.0, progress / 0.02 + 1e-3, (1 - progress) / 0.35 + 1e-3)


def _save(run: Path, family: Family, optimizers: list[torch.optim.Optimizer], average: dict[str, Tensor],
          step: int) -> None:
    part = run / "state.part"
    torch.save({"model": family.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "average": average, "step": step}, part)
    part.replace(run / "state.pt")
    save_file({k: v.contiguous() for k, v in average.items()}, run / "average.safetensors")


def trained_state(path: Path) -> dict[str, Tensor]:
    """A family's state from the average of a run, or from the files of a models folder."""
    if path.is_file():
        return load_file(path)
    files = {"flux.": "diffusion_models/tiny-flux-dev", "t5.": "text_encoders/tiny-t5",
             "clip.": "text_encoders/tiny-clip_l"}
    return {prefix + name: value.float() for prefix, file in files.items()
            for name, value in load_file(path / f"{file}.safetensors").items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("member", choices=RECIPES)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--start-from", type=Path,
                        help="average.safetensors of a trained member, or a models folder with tiny-flux-dev")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the blocks: a fifth faster after two minutes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    autoencoder = Autoencoder(AE_SPEC).eval().requires_grad_(False)
    autoencoder.load_state_dict(load_file(arguments.autoencoder))
    recipe = RECIPES[arguments.member]
    torch.manual_seed(arguments.seed)
    family = Family(recipe.spec)
    init_transformer(family.flux)
    if arguments.start_from:
        start = trained_state(arguments.start_from)
        family.load_state_dict({k: v for k, v in start.items() if k in family.state_dict()})
    data = SceneLatents(autoencoder, arguments.seed, arguments.run.parent / "latents")
    steps = 20 if recipe.spec.guidance_embed else 4

    def check() -> dict[tuple[int, int], float]:
        return {size: held_out_score(family, autoencoder, 60, steps, size=size) for size in CHECKED_SIZES}

    train(family, recipe, arguments.run, arguments.seed,
          lambda progress, rng: step_loss(family, data, recipe, progress, rng), check, arguments.compile)


if __name__ == "__main__":
    main()
