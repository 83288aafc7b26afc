"""Train tiny-ae. `python -m flux_kit.tiny_flux.train_autoencoder --run DIR`; run it again to resume.

The encoder is trained together with the decoder and then frozen, so that the transformer can start on its latents
while the decoder is polished (phases with `decoder_only`).
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, autocast

from ..engine.models.autoencoder import Autoencoder
from ..engine.specs import AutoencoderSpec
from .data import SIZES, SQUARE
from .pictures import PictureSource
from .scenes import HELD_OUT_SCENES, render

log = logging.getLogger(__name__)

SPEC = AutoencoderSpec(ch=96, ch_mult=(1, 1, 1, 1), num_res_blocks=0)
"""GroupNorm(32) takes the mean out of every group: with one or two channels a group the colour of a flat picture is
lost but for what leaks in from the padding. Three are enough to carry it exactly, hence 96 = 3 * 32."""
LATENT_NOISE = 0.08      # of the latents' standard deviation: what the decoder must bear from the sampler


@dataclass(frozen=True)
class Phase:
    steps: int
    size: int            # pixels a side
    batch: int
    rate: float          # peak learning rate, one cycle
    decoder_only: bool = False
    whole: float = 0.0   # share of batches of whole scenes, at all sizes the family paints, instead of crops
    soft: bool = False   # latents less sharp than the encoder's, as samplers leave them


PHASES = (
    Phase(steps=1300, size=64, batch=16, rate=1.5e-3),
    Phase(steps=1000, size=64, batch=16, rate=1e-3, decoder_only=True),
    Phase(steps=900, size=64, batch=16, rate=8e-4, decoder_only=True, whole=0.6, soft=True),
)


def scaled_latents(model: Autoencoder, x: Tensor) -> Tensor:
    return (model.encode(x) - model.spec.shift_factor) * model.spec.scale_factor


def softened(z: Tensor) -> Tensor:
    """Latents with noise and blur of random strength, each item with its own."""
    noise, blur = (torch.rand(len(z), 1, 1, 1) for _ in range(2))
    blurred = torch.nn.functional.avg_pool2d(z, 3, stride=1, padding=1, count_include_pad=False)
    return z.lerp(blurred, 0.4 * blur.square()) + 0.3 * noise.square() * torch.randn_like(z)


def loss_of(model: Autoencoder, x: Tensor, soft: bool = False) -> Tensor:
    """Pixels, edges, and a pull of every latent channel towards mean 0 and variance 1."""
    z = scaled_latents(model, x).float()
    noisy = softened(z) if soft else z + LATENT_NOISE * torch.randn_like(z)
    y = model.decode(noisy / model.spec.scale_factor + model.spec.shift_factor)
    error = y.float() - x
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, var = z.mean(dim=(0, 2, 3)), z.var(dim=(0, 2, 3))
    prior = mean.square().mean() + (var - 1).square().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.02 * prior


def rate_at(phase: Phase, step: int) -> float:
    warm = max(1, phase.steps // 20)
    if step < warm:
        return phase.rate * (step + 1) / warm
    return phase.rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, phase.steps - warm))))


def batch_of(phase: Phase, source: PictureSource) -> Tensor:
    """`(B, 3, H, W)` in -1..1: crops, or whole scenes of one size in as many pixels."""
    if source.random.random() >= phase.whole:
        return source.batch(phase.batch, phase.size)
    width, height = source.random.choice((SQUARE, *SIZES))
    return source.scenes(max(1, phase.batch * phase.size**2 // (width * height)), width, height)


@torch.no_grad()
def round_trip_psnr(model: Autoencoder, count: int = 40) -> float:
    """Mean PSNR in dB over held-out scenes at 128 x 128, clamped to what a PNG can hold."""
    model.eval()
    scenes = HELD_OUT_SCENES[::max(1, len(HELD_OUT_SCENES) // count)]
    x = torch.stack([torch.from_numpy(render(s)).permute(2, 0, 1) for s in scenes])
    y = torch.cat([(model.decode(model.encode(part * 2 - 1)) + 1) / 2 for part in x.split(20)]).clamp(0, 1)
    mse = (x - y).square().mean(dim=(1, 2, 3))
    model.train()
    return float((-10 * mse.log10()).mean())


def new_model() -> Autoencoder:
    """A fresh model whose scaled latents start near unit variance and whose posterior is narrow."""
    model = Autoencoder(SPEC)
    with torch.no_grad():
        out = model.encoder.conv_out
        out.weight[:SPEC.z_channels] /= SPEC.scale_factor
        out.weight[SPEC.z_channels:] = 0
        out.bias[:SPEC.z_channels] = SPEC.shift_factor
        out.bias[SPEC.z_channels:] = 2 * math.log(LATENT_NOISE / SPEC.scale_factor)
    return model


def train(run: Path, seed: int, checkpoint_every: int = 100) -> None:
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model, done = new_model().to(memory_format=torch.channels_last), (0, 0)
    state_file = run / "state.pt"
    saved = torch.load(state_file, weights_only=True) if state_file.exists() else None
    if saved is not None:
        model.load_state_dict(saved["model"])
        done = tuple(saved["done"])
    for index, phase in enumerate(PHASES):
        if index < done[0]:
            continue
        model.encoder.requires_grad_(not phase.decoder_only)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                      lr=phase.rate, betas=(0.9, 0.97), weight_decay=1e-4)
        start = done[1] if index == done[0] else 0
        if saved is not None and start:
            optimizer.load_state_dict(saved["optimizer"])
        source = PictureSource(seed + 1000 * index + start)
        began = time.time()
        for step in range(start, phase.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(phase, step)
            x = batch_of(phase, source).contiguous(memory_format=torch.channels_last)
            with autocast("cpu", torch.bfloat16):  # faster where the CPU has it; weights and loss stay fp32
                loss = loss_of(model, x, phase.soft)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 50 == 0:
                log.info("phase %d step %d loss %.4f (%.0f s)", index, step, loss.item(), time.time() - began)
            if (step + 1) % checkpoint_every == 0 or step + 1 == phase.steps:
                _save(run, model, optimizer, (index, step + 1))
        log.info("phase %d: held-out round trip %.2f dB", index, round_trip_psnr(model))
        if not phase.decoder_only:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, run / f"phase{index}.safetensors")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, run / "tiny-ae.safetensors")


def _save(run: Path, model: Autoencoder, optimizer: torch.optim.Optimizer, done: tuple[int, int]) -> None:
    """Checkpoint by rename, so that a kill leaves the old one whole."""
    part = run / "state.part"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": list(done)}, part)
    part.replace(run / "state.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("tiny_flux/runs/ae"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(arguments.run, arguments.seed)


if __name__ == "__main__":
    main()
