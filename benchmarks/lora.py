"""One double and one single block at full width with LoRAs on every layer, on bf16 and on Q4_K weights.

    python -P benchmarks/lora.py [--base bf16 Q4_K] [--tokens 512 1280] [--runs N] [--rank R] [--alone]

One thread, process CPU time, minimum of interleaved runs: what other jobs on the machine disturb least. Two identical
baselines are timed; what they differ by is noise. Report ratios; milliseconds depend on the machine.

`side path`: as LoRAs are applied to packed weights, one concatenated product for all of them. `merge each forward`:
what loaders do that keep a list of patches with each layer: its weight is made anew in every step, in fp32, and used
once. It is timed in the first rounds only. `side path alone` (with `--alone` nothing else) is the time inside the side
paths while the blocks run, bases in turn: the difference of two whole blocks drowns it. Weights merged once cost
nothing per step and stand in no row.

Where there is CUDA, or with `--device`, it goes on with whole steps of FLUX.1-dev at full size there (fewer blocks with
`--depth`), at 1024 x 1024 with 0, 1, 4 and 8 LoRAs, by the clock on the wall.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from flux_kit.engine.adapters import Entry, Lora, attach, read_lora
from flux_kit.engine.adapters.sidepath import SidePath
from flux_kit.engine.convert import encode
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.ops import PLAIN
from flux_kit.engine.quant import FORMATS, Linear
from flux_kit.engine.sampling.latents import image_ids, text_ids
from flux_kit.engine.specs import FLUX_DEV, FluxSpec
from safetensors.torch import save_file
from torch import Tensor, nn

SPEC = replace(FLUX_DEV, depth=1, depth_single_blocks=1)
H = SPEC.hidden_size
TEXT = {512: 256, 1280: 256}
DTYPE = torch.bfloat16
MANY = 8
MERGE_ROUNDS = 3
STEP_SIDE, STEP_TEXT, STEP_COUNTS, STEP_RUNS = 1024, 512, (0, 1, 4, MANY), 5
GOALS = {"side path, 1": 1.05, "side path, 8": 1.25}
PACKED_TILE = 1 << 20


def filled(spec: FluxSpec = SPEC, device: str = "cpu") -> Flux:
    """Weights that keep activations near unit variance."""
    with torch.device("meta"):
        model = Flux(spec)
    model = model.to(DTYPE).to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.5)
        else:
            parameter.uniform_(-1, 1).mul_((3 / parameter.shape[1]) ** 0.5)
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and "_blocks." in name}


def replaced(model: Flux, make: Callable[[str, nn.Module], nn.Module], kind: type[nn.Module] = nn.Linear) -> Flux:
    """The same model with other layers in its blocks; all that is not replaced is shared."""
    with torch.device("meta"):
        other = Flux(model.spec).eval()
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(owner), leaf, parameter)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, kind) and "_blocks." in name:
            owner, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(owner), leaf, make(name, layer))
    return other.requires_grad_(False)


def packed(type: str) -> Callable[[str, nn.Module], nn.Module]:
    """Layers of packed weights: one tile, repeated, of deviation `1 / sqrt(in)`."""
    format = FORMATS[type]
    tile = encode(torch.randn(PACKED_TILE // H, H, generator=torch.Generator().manual_seed(0)) / H ** 0.5, type)

    def make(_: str, layer: nn.Module) -> nn.Module:
        assert isinstance(layer, nn.Linear)
        made = Linear(layer.in_features, layer.out_features, format=format)
        size = made.weight.numel()
        flat = tile.to(layer.weight.device).flatten().repeat(-(-size // tile.numel()))[:size]
        made.weight = nn.Parameter(flat.view(made.weight.shape), requires_grad=False)
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        return made

    return make


def shared(_: str, layer: nn.Module) -> nn.Module:
    """A layer of its own with the same tensors, so that what is attached to it is attached to no other."""
    if isinstance(layer, nn.Linear):
        with torch.device("meta"):
            made: nn.Module = PLAIN.Linear(layer.in_features, layer.out_features)
    else:
        assert isinstance(layer, Linear)
        made = Linear(layer.in_features, layer.out_features, format=layer.format, device="meta")
    for name, parameter in layer.named_parameters(recurse=False):
        setattr(made, name, parameter)
    return made


class MergeEachForward(nn.Module):
    """A layer whose weight is put together in every forward: unpacked, patched in fp32, rounded, used, dropped."""

    def __init__(self, layer: nn.Module, patches: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layer, self.patches = layer, patches

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        weight: Tensor = (layer.unpacked(slice(None), x.dtype) if isinstance(layer, Linear)
                          else layer.weight)  # type: ignore[assignment]
        total = weight.float()
        for down, up in self.patches:
            total += up.float() @ down.float()
        return F.linear(x, total.to(x.dtype), layer.bias.to(x.dtype))  # type: ignore[union-attr, operator]


def loras(model: Flux, folder: Path, rank: int) -> list[Lora]:
    """LoRA files for every layer of the two blocks."""
    made = []
    for number in range(MANY):
        torch.manual_seed(number)
        tensors: dict[str, Tensor] = {}
        for name, layer in linears(model).items():
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"] = (torch.randn(rank, layer.in_features) / H ** 0.5).to(DTYPE)
            tensors[f"{stem}.lora_up.weight"] = (torch.randn(layer.out_features, rank) * 0.01).to(DTYPE)
        save_file(tensors, folder / f"{number}.safetensors")
        made.append(read_lora(folder / f"{number}.safetensors"))
    return made


def patched(found: Lora, kind: type[nn.Module], model: Flux) -> Flux:
    of = {adapter.destination.module: adapter.factors for adapter in found.adapters}
    return replaced(model, lambda name, layer: MergeEachForward(layer, [(of[name]["down"], of[name]["up"])]), kind)


def runs(base: str, model: Flux, found: Sequence[Lora], tokens: int) -> dict[str, Callable[[], object]]:
    kind = nn.Linear if base == "bf16" else Linear
    models = {"no LoRA": model, "no LoRA again": model}
    for count in (1, MANY):
        models[f"side path, {count}"] = replaced(model, shared, kind)
        attach(models[f"side path, {count}"], [Entry(lora) for lora in found[:count]], mode="side", dtype=DTYPE)
    models["merge each forward, 1"] = patched(found[0], kind, model)
    text = TEXT[tokens]
    img, txt = torch.randn(1, tokens - text, H, dtype=DTYPE), torch.randn(1, text, H, dtype=DTYPE)
    joined, vec = torch.cat((txt, img), 1), torch.randn(1, H, dtype=DTYPE)
    pe = model.pe_embedder(torch.zeros(1, tokens, 3))

    def block(one: Flux) -> Callable[[], object]:
        return lambda: (one.double_blocks[0](img=img, txt=txt, vec=vec, pe=pe),
                        one.single_blocks[0](joined, vec=vec, pe=pe))
    return {name: block(one) for name, one in models.items()}


def seconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def measured(table: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
    best = dict.fromkeys(table, float("inf"))
    for turn in range(count):
        for name, run in table.items():
            if turn < MERGE_ROUNDS or not name.startswith("merge"):
                best[name] = min(best[name], seconds(run))
    return best


@contextmanager
def clocked() -> Iterator[list[float]]:
    """CPU seconds inside each call of a side path."""
    spent: list[float] = []
    forward = SidePath.forward

    def timed(self: SidePath, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        began = time.process_time()
        try:
            return forward(self, layer, args, out)
        finally:
            spent.append(time.process_time() - began)

    SidePath.forward = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        SidePath.forward = forward  # type: ignore[method-assign]


def alone(tables: Mapping[str, Mapping[str, Callable[[], object]]], count: int) -> None:
    """Prints what the side paths of each base take by themselves. Each call's minimum over the runs counts; the two
    halves of the runs tell the noise."""
    calls: dict[tuple[str, str], list[list[float]]] = {}
    with clocked() as spent:
        for _ in range(2 * count):
            for base, table in tables.items():
                for name in GOALS:
                    spent.clear()
                    table[name]()
                    calls.setdefault((base, name), []).append(list(spent))
    for name in GOALS:
        whole = {base: best_of(calls[base, name]) for base in tables}
        halves = [[best_of(calls[base, name][half::2]) for half in (0, 1)] for base in tables]
        noise = max(abs(first - second) / min(first, second) for first, second in halves)
        apart = max(whole.values()) / min(whole.values()) - 1
        told = ", ".join(f"{seconds * 1e3:.1f} ms on {base}" for base, seconds in whole.items())
        print(f"  {name} alone: {told}; {apart:.1%} apart, halves of the runs differ by {noise:.1%}", flush=True)


def best_of(runs: Sequence[Sequence[float]]) -> float:
    return sum(min(times) for times in zip(*runs, strict=True))


def show(base: str, tokens: int, best: Mapping[str, float]) -> dict[str, float]:
    """Prints one table; what each row takes more than none, in seconds."""
    plain = min(best["no LoRA"], best["no LoRA again"])
    noise = abs(best["no LoRA"] - best["no LoRA again"]) / plain
    print(f"\n{base}, {tokens} tokens; two identical baselines differ by {noise:.2%}", flush=True)
    for name, value in best.items():
        goal = GOALS.get(name)
        verdict = "" if goal is None else f"  goal {goal:.2f} x: {'met' if value / plain <= goal else 'MISSED'}"
        print(f"  {name:24} {value * 1e3:8.0f} ms  {value / plain:6.3f} x  +{(value - plain) * 1e3:6.0f} ms{verdict}",
              flush=True)
    return {name: value - plain for name, value in best.items()}


def steps(device: str, depth: tuple[int, int], bases: Sequence[str], rank: int, side: int) -> None:
    """Prints the time of whole steps by number of LoRAs, as side paths on every layer of every block."""
    spec = replace(FLUX_DEV, depth=depth[0], depth_single_blocks=depth[1])
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    print(f"\n{name}: FLUX.1-dev of {depth[0]} and {depth[1]} blocks, {side} x {side}, {STEP_TEXT} text tokens, "
          f"{DTYPE}, rank {rank}, s/step\n\n| base | {' | '.join(f'{count} LoRAs' for count in STEP_COUNTS)} |\n"
          f"|---|{'---|' * len(STEP_COUNTS)}")
    plain = filled(spec, device)
    with tempfile.TemporaryDirectory() as folder:
        found = loras(plain, Path(folder), rank)
        given = step_inputs(spec, device, side)
        for base in bases:
            model = plain if base == "bf16" else replaced(plain, packed(base))
            cells = []
            for count in STEP_COUNTS:
                attached = attach(model, [Entry(lora) for lora in found[:count]], mode="side", dtype=DTYPE,
                                  device=device)
                cells.append(min(clock(lambda: model(**given), device)  # noqa: B023 - used at once
                                 for _ in range(STEP_RUNS)))
                attached.detach()
            print(f"| {base} | {' | '.join(f'{cell:.3f} ({cell / cells[0]:.3f} x)' for cell in cells)} |", flush=True)


def step_inputs(spec: FluxSpec, device: str, side: int) -> dict[str, Tensor]:
    image = (side // 16) ** 2
    made = {"img": torch.randn(1, image, spec.in_channels), "txt": torch.randn(1, STEP_TEXT, spec.context_in_dim),
            "y": torch.randn(1, spec.vec_in_dim)}
    whole = {"img_ids": image_ids(1, side // 8, side // 8), "txt_ids": text_ids(1, STEP_TEXT),
             "timesteps": torch.tensor([0.7]), "guidance": torch.tensor([3.5])}
    return {**{key: value.to(device) for key, value in whole.items()},
            **{key: value.to(device, DTYPE) for key, value in made.items()}}


def clock(run: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", choices=["bf16", "Q4_K", "Q8_0"], default=["bf16", "Q4_K"])
    parser.add_argument("--tokens", nargs="+", type=int, choices=list(TEXT), default=list(TEXT))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alone", action="store_true", help="only the time inside the side paths")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else None, help="for whole steps")
    parser.add_argument("--depth", nargs=2, type=int, metavar=("DOUBLE", "SINGLE"),
                        default=(FLUX_DEV.depth, FLUX_DEV.depth_single_blocks))
    parser.add_argument("--side", type=int, default=STEP_SIDE, help="of the pictures of whole steps")
    parser.add_argument("--steps", action="store_true", help="only whole steps")
    options = parser.parse_args()
    if not options.steps:
        blocks(options)
    if options.device is not None:
        steps(options.device, tuple(options.depth), options.base, options.rank, options.side)


def blocks(options: argparse.Namespace) -> None:
    """The blocks by themselves, on one thread."""
    torch.set_num_threads(1)
    plain = filled()
    models = {base: plain if base == "bf16" else replaced(plain, packed(base)) for base in options.base}
    with tempfile.TemporaryDirectory() as folder:
        found = loras(plain, Path(folder), options.rank)
        for tokens in options.tokens:
            tables = {base: runs(base, model, found, tokens) for base, model in models.items()}
            if not options.alone:
                compare({base: show(base, tokens, measured(table, options.runs)) for base, table in tables.items()})
            print(f"\n{tokens} tokens, rank {options.rank}", flush=True)
            alone(tables, options.runs)


def compare(more: Mapping[str, Mapping[str, float]]) -> None:
    for name in GOALS if len(more) > 1 else ():
        added = ", ".join(f"{times[name] * 1e3:.0f} ms on {base}" for base, times in more.items())
        print(f"  added by {name}: {added}", flush=True)


if __name__ == "__main__":
    main()
