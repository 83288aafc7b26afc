"""Unpacking a weight of 12288 x 3072 to bf16 on the CPU, and a product with it while it is packed.

    python -P benchmarks/dequantise.py [TYPE...] [--runs N] [--all]

One thread, process CPU time, minimum of interleaved runs: what other jobs on the machine disturb least. Two identical
baselines are timed; what they differ by is noise. Report ratios; milliseconds depend on the machine.

`eager`: the formulas below over the whole tensor at once, as node packs have them, in fp16 and in fp32; the faster of
the two counts. For types without such a formula here it is the package's own function, given the whole tensor.
`gguf-py`: `gguf.quants.dequantize` and the cast to bf16. `ours`: `QuantFormat.dequantize` into a fresh tensor, as the
others, and into one that is there already, as a packed layer does and as the goals mean it: the pages of a fresh one
cost more than the unpacking. `linear`: 512 tokens, against plain bf16 weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from flux_kit.engine.quant import FORMATS, Linear
from gguf import GGMLQuantizationType, quants
from torch import Tensor

ROWS, WIDTH, TOKENS = 12288, 3072, 512
USUAL = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")
GOALS = {"Q8_0": (3, 2), "Q4_0": (3, 2), "Q4_K": (3, 2)}
"""Times faster than eager and than gguf-py; 1.5 times faster than eager are asked of the other types."""
NOT_GGML = ("NF4", "FP4", "INT8", "MXFP8", "NVFP4_16")
LINEAR_GOAL = 2
"""Times the plain product, at most."""


def split(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return torch.split(blocks, [*sizes, blocks.shape[1] - sum(sizes)], dim=1)


def shifts(values: list[int], *shape: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(shape)


def q8_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, x = split(blocks, 2)
    return d.view(torch.float16).to(dtype) * x.view(torch.int8)


def q4_0(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    n = blocks.shape[0]
    d, qs = split(blocks, 2)
    qs = qs.reshape(n, -1, 1, 16) >> shifts([0, 4], 1, 1, 2, 1)
    qs = (qs & 0x0F).reshape(n, -1).to(torch.int8) - 8
    return d.view(torch.float16).to(dtype) * qs


def scale_min(scales: Tensor) -> tuple[Tensor, Tensor]:
    n = scales.shape[0]
    d, m, m_d = torch.split(scales.reshape(n, 3, 4), 1, dim=1)
    sc = torch.cat([d & 0x3F, (m_d & 0x0F) | ((d >> 2) & 0x30)], dim=-1)
    low = torch.cat([m & 0x3F, (m_d >> 4) | ((m >> 2) & 0x30)], dim=-1)
    return sc.reshape(n, 8), low.reshape(n, 8)


def q4_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    n = blocks.shape[0]
    d, dmin, scales, qs = split(blocks, 2, 2, 12)
    sc, m = scale_min(scales)
    d = (d.view(torch.float16).to(dtype) * sc).reshape(n, -1, 1)
    dm = (dmin.view(torch.float16).to(dtype) * m).reshape(n, -1, 1)
    qs = qs.reshape(n, -1, 1, 32) >> shifts([0, 4], 1, 1, 2, 1)
    return (d * (qs & 0x0F).reshape(n, -1, 32) - dm).reshape(n, 256)


def q5_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    n = blocks.shape[0]
    d, dmin, scales, qh, qs = split(blocks, 2, 2, 12, 32)
    sc, m = scale_min(scales)
    d = (d.view(torch.float16).to(dtype) * sc).reshape(n, -1, 1)
    dm = (dmin.view(torch.float16).to(dtype) * m).reshape(n, -1, 1)
    low = (qs.reshape(n, -1, 1, 32) >> shifts([0, 4], 1, 1, 2, 1)) & 0x0F
    high = (qh.reshape(n, -1, 1, 32) >> shifts(list(range(8)), 1, 1, 8, 1)) & 1
    return (d * (low.reshape(n, -1, 32) | (high.reshape(n, -1, 32) << 4)) - dm).reshape(n, 256)


def q6_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    n = blocks.shape[0]
    ql, qh, scales, d = split(blocks, 128, 64, 16)
    d = (d.view(torch.float16).to(dtype) * scales.view(torch.int8)).reshape(n, 16, 1)
    low = ((ql.reshape(n, -1, 1, 64) >> shifts([0, 4], 1, 1, 2, 1)) & 0x0F).reshape(n, -1, 32)
    high = ((qh.reshape(n, -1, 1, 32) >> shifts([0, 2, 4, 6], 1, 1, 4, 1)) & 3).reshape(n, -1, 32)
    q = (low | (high << 4)).to(torch.int8) - 32
    return (d * q.reshape(n, 16, -1)).reshape(n, 256)


EAGER: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "Q8_0": q8_0, "Q4_0": q4_0, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def random_weight(name: str) -> Tensor:
    """Rows of random codes with small scales, `(ROWS, row_bytes)`."""
    format = FORMATS[name]
    blocks = torch.randint(0, 256, (ROWS * WIDTH // format.block, format.nbytes), dtype=torch.uint8)
    for at in format.halves:
        blocks[:, at:at + 2] = (torch.rand(len(blocks), 1) * 1e-4).half().view(torch.uint8)
    return blocks.view(ROWS, -1)


def runs_of(name: str) -> dict[str, Callable[[], object]]:
    format, packed, bf16 = FORMATS[name], random_weight(name), torch.bfloat16
    blocks, out = packed.view(-1, format.nbytes), torch.empty(ROWS, WIDTH, dtype=bf16)
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: format.dequantize(packed, bf16), "ours, into": lambda: format.dequantize(packed, bf16, out=out)}
    eager = EAGER.get(name)
    if eager is None:
        runs |= dict.fromkeys(("eager", "eager again"), lambda: format.unpack(blocks).to(bf16))
    else:
        runs |= dict.fromkeys(("eager", "eager again"), lambda: eager(blocks, torch.float32).to(bf16))
        runs["eager fp16"] = lambda: eager(blocks, torch.float16).to(bf16)
        exact = format.dequantize(packed[:64])
        assert torch.equal(eager(blocks[:64 * WIDTH // format.block], torch.float32).view(64, WIDTH), exact)
    if not name.startswith("F8"):
        bytes_, kind = packed.numpy(), GGMLQuantizationType[name]
        runs["gguf-py"] = lambda: torch.from_numpy(quants.dequantize(bytes_, kind)).to(bf16)
    layer = Linear(WIDTH, ROWS, False, format=format)
    layer.weight.data = packed
    x, weight = torch.randn(TOKENS, WIDTH, dtype=bf16), format.dequantize(packed, bf16)
    runs |= dict.fromkeys(("plain linear", "plain again"), lambda: F.linear(x, weight))
    runs["packed linear"] = lambda: layer(x)
    return runs


def seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


@torch.no_grad()
def measure(name: str, count: int) -> str:
    """One line of the table."""
    runs = runs_of(name)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(count):
        for label, run in runs.items():
            best[label] = min(best[label], seconds(run))
    ms = {label: 1e3 * value for label, value in best.items()}
    eager = min(ms["eager"], ms["eager again"], ms.get("eager fp16", float("inf")))
    gguf = ms.get("gguf-py", float("nan"))
    spread = max(max(pair) / min(pair) for pair in (
        (ms["eager"], ms["eager again"]), (ms["plain linear"], ms["plain again"])))
    plain = min(ms["plain linear"], ms["plain again"])
    goal, than_gguf = GOALS.get(name, (1.5, 0))
    good = eager / ms["ours, into"] >= goal and not gguf / ms["ours, into"] < than_gguf
    good = good and (name not in ("Q8_0", "Q4_K") or ms["packed linear"] / plain <= LINEAR_GOAL)
    return (f"{name:8}{ms['ours']:7.0f}{ms['ours, into']:7.0f}{eager:7.0f}{gguf:9.0f}"
            f"{eager / ms['ours']:8.1f}{eager / ms['ours, into']:8.1f}{gguf / ms['ours']:9.1f}"
            f"{gguf / ms['ours, into']:8.1f}{plain:8.0f}{ms['packed linear']:8.0f}{ms['packed linear'] / plain:7.2f}"
            f"{spread:8.2f}  {'' if good else 'missed'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"by default {', '.join(USUAL)}")
    parser.add_argument("--all", action="store_true", help="every type that has blocks, and fp8")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = [name for name in FORMATS if name not in ("F32", "F16", "BF16", "Q8_K") and not name.startswith(NOT_GGML)]
    print(f"{'':8}{'ours':>7}{'into':>7}{'eager':>7}{'gguf-py':>9} | eager/ours, into | gguf/ours, into | "
          "linear: plain, packed, ratio | spread")
    for name in options.types or (every if options.all else USUAL):
        print(measure(name, options.runs), flush=True)


if __name__ == "__main__":
    main()
