"""One double and one single block at full width, beside diffusers' and beside bare matrix products.

    python -P benchmarks/blocks.py [--dtype bf16 fp32] [--runs N] [--profile]

One thread, process CPU time, minimum of interleaved runs: what other jobs on the machine disturb least. The limit is
the time of `torch.mm` for the ten shapes of the two blocks, plus the attention's operations at the same rate. Report
ratios; seconds depend on the machine. `forward` is the whole model with one block of each kind.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import FluxTransformer2DModel
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.specs import FLUX_DEV
from torch import Tensor, nn

IMG, TXT, GRID = 1024, 256, 32
SPEC = replace(FLUX_DEV, depth=1, depth_single_blocks=1)
H, MLP = SPEC.hidden_size, int(SPEC.hidden_size * SPEC.mlp_ratio)
LENGTH = IMG + TXT
STREAM = ((H, 3 * H), (H, H), (H, MLP), (MLP, H))                                      # in, out
PRODUCTS = [(tokens, *shape) for tokens in (IMG, TXT) for shape in STREAM]
PRODUCTS += [(LENGTH, H, 3 * H + MLP), (LENGTH, H + MLP, H)]                           # tokens, in, out
PRODUCT_FLOPS = sum(2 * m * k * n for m, k, n in PRODUCTS)
ATTENTION_FLOPS = 2 * 4 * LENGTH * LENGTH * H                                          # two blocks
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def filled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights that keep activations near unit variance; nothing is allocated twice."""
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.5)
        else:
            parameter.uniform_(-1, 1).mul_((3 / parameter.shape[1]) ** 0.5)
    return model


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    ids = torch.zeros(GRID, GRID, 3)
    ids[..., 1], ids[..., 2] = torch.arange(GRID)[:, None], torch.arange(GRID)[None]
    return {
        "img": torch.randn(1, IMG, SPEC.in_channels, dtype=dtype), "img_ids": ids.view(1, IMG, 3),
        "txt": torch.randn(1, TXT, SPEC.context_in_dim, dtype=dtype), "txt_ids": torch.zeros(1, TXT, 3),
        "y": torch.randn(1, SPEC.vec_in_dim, dtype=dtype), "timesteps": torch.tensor([0.7]),
        "guidance": torch.tensor([3.5]),
    }


def our_runs(dtype: torch.dtype, given: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    with torch.device("meta"):
        flux = Flux(SPEC)
    model = filled(flux, dtype)
    img, txt = torch.randn(1, IMG, H, dtype=dtype), torch.randn(1, TXT, H, dtype=dtype)
    x, vec = torch.cat((txt, img), 1), torch.randn(1, H, dtype=dtype)
    pe = flux.pe_embedder(torch.cat((given["txt_ids"], given["img_ids"]), 1))
    return {
        "ours: forward": lambda: model(**given),
        "ours: double": lambda: flux.double_blocks[0](img=img, txt=txt, vec=vec, pe=pe),
        "ours: single": lambda: flux.single_blocks[0](x, vec=vec, pe=pe),
    }


def their_runs(dtype: torch.dtype, given: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    with torch.device("meta"):
        meta = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    model = filled(meta, dtype)
    return {"diffusers: forward": lambda: model(
        hidden_states=given["img"], encoder_hidden_states=given["txt"], pooled_projections=given["y"],
        timestep=given["timesteps"], img_ids=given["img_ids"][0], txt_ids=given["txt_ids"][0],
        guidance=given["guidance"], return_dict=False)}


def bare_runs(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Weights as layers hold them: `(out, in)`, transposed by the product."""
    widest = torch.randn(LENGTH * (H + MLP), dtype=dtype)
    weights = torch.randn(max(k * n for _, k, n in PRODUCTS), dtype=dtype)

    def products() -> None:
        for m, k, n in PRODUCTS:
            torch.mm(widest[:m * k].view(m, k), weights[:k * n].view(n, k).t())

    return {"bare products": products}


def seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


@torch.no_grad()
def measure(name: str, count: int, profile: bool) -> None:
    dtype = DTYPES[name]
    given = inputs(dtype)
    runs = {**our_runs(dtype, given), **their_runs(dtype, given), **bare_runs(dtype)}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(count):
        for label, run in runs.items():
            best[label] = min(best[label], seconds(run))
    limit = best["bare products"] * (1 + ATTENTION_FLOPS / PRODUCT_FLOPS)
    best["ours: double + single"] = best["ours: double"] + best["ours: single"]
    print(f"\n{name}: {PRODUCT_FLOPS / 1e9 / best['bare products']:.0f} GFLOP/s in bare products, "
          f"limit {limit * 1e3:.0f} ms")
    for label, value in best.items():
        print(f"  {label:24} {value * 1e3:7.0f} ms  {value / limit:5.2f} x limit")
    if profile:
        with torch.profiler.profile() as trace:
            runs["ours: double"]()
            runs["ours: single"]()
        print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="also where the time of our blocks goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.dtype:
        measure(name, options.runs, options.profile)


if __name__ == "__main__":
    main()
