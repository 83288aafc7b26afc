"""FLUX.1-dev at its full size, of random packed weights: written, loaded, run for one step, and checked.

    python -P benchmarks/full_size.py [--folder DIR] [--type Q4_K_S] [--dtype fp32] [--depth N --single N --t5-layers N]

Writes a transformer of 12 B parameters and a T5-XXL as GGUF into a folder of its own (9.5 GB in all), which is removed
in the end, also when it is interrupted. A child process loads T5, encodes, lets go of it, loads the transformer and
runs one step at 512 x 512 on the CPU. Of its memory it tells what belongs to it alone (anonymous) and the pages of the
mapped files, which the system may take back, by /proc/self/status where there is one. A second child runs the same
step with plain layers, block by block, from weights that gguf-py unpacks: the two answers must agree.

Blocks are random bytes but for their fp16 scales, which give each matrix a deviation of 1 / sqrt(inputs): streams of
unit size stay so. With smaller depths the same is tried out in seconds.

Where there is CUDA it goes on with s/step and VRAM at 1024 x 1024 for several types, resident and streamed, through the
standalone host.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from flux_kit.engine.convert.codecs import side_tensors
from flux_kit.engine.convert.recipes import GGUF, RECIPES, description, stored_type, written_name
from flux_kit.engine.convert.writers import Layout, Planned, gguf_layout, safetensors_layout
from flux_kit.engine.errors import FluxKitError
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.quant import FORMATS
from flux_kit.engine.specs import FLUX_DEV, T5_XXL, FluxSpec, T5Spec
from flux_kit.engine.weights import load
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLACK = 2.5e9
"""Peak resident memory may be this much above the size of the file."""
TOLERANCE = 1e-3
CHUNK_BLOCKS = 1 << 16
POOL = 1 << 22
GPU_TYPES = ("BF16", "fp8_scaled", "Q8_0", "Q4_K_S")
GPU_SIDE, GPU_TOKENS, GPU_STEPS = 1024, 512, 5
SAMPLE_S = 0.02
STATUS = {"VmRSS:": "whole", "RssAnon:": "anonymous", "RssFile:": "files"}


# -- files
class RandomNumbers:
    """Bytes of tensors; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(np.random.SFC64(seed))
        self.pool = torch.from_numpy(self.rng.standard_normal(POOL, dtype=np.float32))
        self.deviations: dict[str, float] = {}

    def normal(self, count: int) -> Iterator[Tensor]:
        """`count` numbers of unit deviation, out of a pool that is cut at another place each time."""
        while count:
            first = int(self.rng.integers(0, POOL // 2))
            taken = self.pool[first:first + min(count, POOL // 2)]
            count -= len(taken)
            yield taken

    def blocks(self, type: str, count: int, scale: float) -> np.ndarray:
        format = FORMATS[type]
        blocks = np.frombuffer(self.rng.bytes(count * format.nbytes), np.uint8).reshape(count, -1).copy()
        for at in format.halves:
            size = self.rng.uniform(0.5, 1, count) * self.rng.choice((-1, 1), count) * scale
            blocks[:, at:at + 2] = size.astype(np.float16)[:, None].view(np.uint8)
        return blocks

    def packed(self, type: str, count: int, deviation: float) -> Iterator[bytes]:
        """`count` blocks whose weights deviate by about `deviation`."""
        if type not in self.deviations:
            sample = torch.from_numpy(self.blocks(type, 1024, 1.0))
            self.deviations[type] = float(FORMATS[type].dequantize(sample).std())
        scale = deviation / self.deviations[type]
        for first in range(0, count, CHUNK_BLOCKS):
            yield self.blocks(type, min(CHUNK_BLOCKS, count - first), scale).tobytes()


def data_of(tensor: Planned, numbers: RandomNumbers) -> Iterator[bytes]:
    """Norms are ones, biases small, the embedding of unit size, matrices by the width of their input."""
    count = math.prod(tensor.shape)
    is_norm = len(tensor.shape) == 1 and tensor.name.endswith(("norm.weight", ".scale", "_norm.weight"))
    is_table = tensor.name.endswith(("token_embd.weight", "attn_rel_b.weight"))
    deviation = 0.02 if len(tensor.shape) < 2 else 1.0 if is_table else tensor.shape[1] ** -0.5
    if tensor.name.endswith(".scale_weight"):
        yield np.float32(0.02).tobytes()
    elif is_norm:
        yield torch.ones(count, dtype=plain(tensor.format)).view(torch.uint8).numpy().tobytes()
    elif tensor.format in ("F32", "F16", "BF16", "F8_E4M3"):
        size = 1.0 if tensor.format == "F8_E4M3" else deviation
        for part in numbers.normal(count):
            yield (part * size).to(plain(tensor.format)).view(torch.uint8).numpy().tobytes()
    else:
        yield from numbers.packed(tensor.format, count // FORMATS[tensor.format].block, deviation)


def plain(format: str) -> torch.dtype:
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}[format]


def layout_of(role: str, spec: FluxSpec | T5Spec, type: str) -> Layout:
    """The file that the quantiser would make of such a model: same names, types and metadata."""
    recipe = RECIPES[type]
    with torch.device("meta"):
        model: nn.Module = Flux(spec) if isinstance(spec, FluxSpec) else T5Encoder(spec)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = spec.depth if isinstance(spec, FluxSpec) else spec.num_layers
    tensors: list[Planned] = []
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        kind = stored_type(recipe, role, layers, name, shape, "BF16", name in linear)
        written = written_name(recipe, role, name)
        tensors += [Planned(written, shape, kind), *side_tensors(written, shape, kind)]
    if recipe.container == GGUF:
        return gguf_layout(tensors, description(recipe, role, spec))
    return safetensors_layout([Planned("scaled_fp8", (0,), "F8_E4M3"), *tensors], {})


def write(path: Path, layout: Layout, seed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < layout.nbytes * 1.02:
        raise SystemExit(f"{path.parent}: {layout.nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; "
                         "name another folder with --folder")
    numbers = RandomNumbers(seed)
    with path.open("wb") as file:
        file.write(layout.header)
        for tensor in layout.tensors:
            _write_tensor(file, tensor, layout, numbers)


def _write_tensor(file: BinaryIO, tensor: Planned, layout: Layout, numbers: RandomNumbers) -> None:
    written = sum(file.write(data) for data in data_of(tensor, numbers)) if tensor.nbytes else 0
    assert written == tensor.nbytes, (tensor, written)
    file.write(bytes(layout.padding(written)))


# -- memory
class Memory:
    """The largest resident memory while it runs, in bytes: whole, anonymous and of mapped files."""

    def __init__(self) -> None:
        self.peak = dict.fromkeys(STATUS.values(), 0)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self.look()

    def _watch(self) -> None:
        while not self.stopped.wait(SAMPLE_S):
            self.look()

    def look(self) -> None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            self.peak["whole"] = max_resident()
            return
        for words in map(str.split, lines):
            if words and words[0] in STATUS:
                key = STATUS[words[0]]
                self.peak[key] = max(self.peak[key], int(words[1]) * 1024)


def max_resident() -> int:
    """Of the whole process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


# -- what the children do
def grid_ids(side: int) -> Tensor:
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    return ids.view(1, -1, 3)


def inputs(spec: FluxSpec, states: Tensor, side: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of one step: `side` image tokens each way, text states `(1, L, 4096)`."""
    torch.manual_seed(0)
    return {"img": torch.randn(1, side * side, spec.in_channels, dtype=dtype), "img_ids": grid_ids(side),
            "txt": states.to(dtype), "txt_ids": torch.zeros(1, states.shape[1], 3),
            "y": torch.randn(1, spec.vec_in_dim, dtype=dtype), "timesteps": torch.tensor([0.7]),
            "guidance": torch.tensor([3.5])}


@torch.no_grad()
def run_step(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Loads, encodes and runs; the answer goes into `step.safetensors`."""
    dtype, told = DTYPES[options.dtype], {}
    with Memory() as memory:
        began = time.perf_counter()
        t5 = load(folder / "t5.gguf", "t5", dtype=dtype)
        told["t5_load_s"] = time.perf_counter() - began
        ids = torch.randint(2, t5.spec.vocab_size, (1, options.tokens), generator=torch.Generator().manual_seed(1))
        began = time.perf_counter()
        states = t5(ids)
        told["t5_encode_s"] = time.perf_counter() - began
        del t5
    told["t5_memory"] = memory.peak
    with Memory() as memory:
        began = time.perf_counter()
        flux = load(folder / "flux.gguf", "transformer", dtype=dtype)
        told["load_s"] = time.perf_counter() - began
        given = inputs(flux.spec, states, options.side // 16, dtype)
        began, busy = time.perf_counter(), time.process_time()
        velocity = flux(**given)
        told["step_s"], told["step_cpu_s"] = time.perf_counter() - began, time.process_time() - busy
    told["memory"] = memory.peak
    told["max_resident"] = max_resident()
    told["finite"] = bool(velocity.isfinite().all()) and bool(states.isfinite().all())
    told["deviation"] = float(velocity.float().std())
    save_file({**given, "velocity": velocity.contiguous()}, folder / "step.safetensors")
    return told


@torch.no_grad()
def run_check(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same step with plain layers: each block gets its weights from gguf-py when its turn comes, and loses them."""
    dtype, began = DTYPES[options.dtype], time.perf_counter()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "flux.gguf").tensors}
    with torch.device("meta"):
        flux = Flux(flux_spec(options)).requires_grad_(False).eval()
        empty = Flux(flux_spec(options)).requires_grad_(False)

    def unpacked(name: str) -> Tensor:
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        shape = [int(size) for size in reversed(tensors[name].shape)]
        return torch.from_numpy(np.array(values, dtype=np.float32)).view(shape).to(dtype)

    def fill(module: nn.Module, prefix: str) -> None:
        module.load_state_dict({name: unpacked(prefix + name) for name in module.state_dict()}, assign=True)

    for name, block in flux.named_modules():
        if isinstance(getattr(flux, name.split(".")[0], None), nn.ModuleList) and name.count(".") == 1:
            bare = empty.get_submodule(name).state_dict()
            block.register_forward_pre_hook(lambda module, _, prefix=f"{name}.": fill(module, prefix))
            block.register_forward_hook(
                lambda module, _inputs, _outputs, bare=bare: module.load_state_dict(bare, assign=True) and None)
        elif name and "." not in name and not isinstance(block, nn.ModuleList):
            fill(block, f"{name}.")
    given = load_file(folder / "step.safetensors")
    velocity = given.pop("velocity")
    wanted = flux(**given).float()
    difference = (velocity.float() - wanted).norm() / wanted.norm()
    return {"relative": float(difference), "s": time.perf_counter() - began}


def run_gpu(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """s/step and VRAM of one file in one memory mode, as `flux-kit` runs it."""
    from flux_kit.hosts.standalone.folders import Folders
    from flux_kit.hosts.standalone.host import StandaloneHost
    times: list[float] = []

    def bar(total: int) -> Callable[..., None]:
        def report(value: int, preview: Any = None) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

        return report

    (path,) = folder.glob("gpu.*")
    try:
        host = StandaloneHost(Folders(), device="cuda", dtype="bf16", memory=options.memory, progress_bar=bar)
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        model = host.load_model(path)
        loaded = time.perf_counter() - began
        spec = flux_spec(options)
        positive = [[torch.randn(1, GPU_TOKENS, spec.context_in_dim),
                     {"pooled_output": torch.randn(1, spec.vec_in_dim), "guidance": 3.5}]]
        host.sample(model, positive, None, host.empty_latent(GPU_SIDE, GPU_SIDE), seed=0, steps=GPU_STEPS)
    except (FluxKitError, torch.cuda.OutOfMemoryError) as error:
        return {"refused": str(error).splitlines()[0]}
    steps = [after - before for before, after in pairwise(times)]  # without the first, which warms up
    return {"load_s": loaded, "step_s": min(steps), "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved()}


CHILDREN = {"step": run_step, "check": run_check, "gpu": run_gpu}


# -- the parent
def flux_spec(options: argparse.Namespace) -> FluxSpec:
    return replace(FLUX_DEV, depth=options.depth, depth_single_blocks=options.single)


def child(name: str, folder: Path, options: argparse.Namespace, **more: str) -> dict[str, Any]:
    passed = {"type": options.type, "dtype": options.dtype, "depth": options.depth, "single": options.single,
              "t5-layers": options.t5_layers, "side": options.side, "tokens": options.tokens,
              "threads": options.threads, **more}
    command = [sys.executable, "-P", __file__, "--child", name, "--folder", str(folder)]
    command += [text for key, value in passed.items() for text in (f"--{key}", str(value))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the process for '{name}' ended with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def gigabytes(values: dict[str, int]) -> str:
    split = f" ({values['anonymous'] / 1e9:.2f} its own, {values['files'] / 1e9:.2f} mapped files)"
    return f"{values['whole'] / 1e9:.2f} GB" + (split if values["anonymous"] else "")


def measure_cpu(folder: Path, options: argparse.Namespace) -> bool:
    sizes = {}
    for name, role, spec, seed in (("flux", "transformer", flux_spec(options), 0),
                                   ("t5", "t5", replace(T5_XXL, num_layers=options.t5_layers), 1)):
        layout, began = layout_of(role, spec, options.type), time.perf_counter()
        write(folder / f"{name}.gguf", layout, seed)
        sizes[name] = (folder / f"{name}.gguf").stat().st_size
        weights = sum(math.prod(tensor.shape) for tensor in layout.tensors)
        print(f"{name}.gguf: {options.type}, {weights / 1e9:.2f} B weights, {sizes[name] / 1e9:.2f} GB, written in "
              f"{time.perf_counter() - began:.0f} s", flush=True)
    told = child("step", folder, options)
    goal = sizes["flux"] + SLACK
    good = told["memory"]["whole"] <= goal and told["finite"]
    print(f"T5: loaded in {told['t5_load_s']:.1f} s, {options.tokens} tokens encoded in {told['t5_encode_s']:.1f} s, "
          f"peak resident {gigabytes(told['t5_memory'])}")
    print(f"transformer: loaded in {told['load_s']:.1f} s; one step at {options.side} x {options.side} in "
          f"{options.dtype}, threads: {options.threads}: {told['step_s']:.1f} s ({told['step_cpu_s']:.1f} s of CPU)")
    print(f"peak resident {gigabytes(told['memory'])}, goal {goal / 1e9:.2f} GB; of the whole process "
          f"{told['max_resident'] / 1e9:.2f} GB; velocity {'finite' if told['finite'] else 'NOT FINITE'}, deviation "
          f"{told['deviation']:.3g}", flush=True)
    if not options.no_check:
        checked = child("check", folder, options)
        good = good and checked["relative"] <= TOLERANCE
        print(f"against blocks that gguf-py unpacks, run one at a time: relative difference {checked['relative']:.2e}, "
              f"allowed {TOLERANCE:.0e} ({checked['s']:.0f} s)")
    for name in sizes:
        (folder / f"{name}.gguf").unlink()
    return good


def measure_gpu(folder: Path, options: argparse.Namespace) -> None:
    print(f"\n{torch.cuda.get_device_name()}, {GPU_SIDE} x {GPU_SIDE}, {GPU_TOKENS} text tokens, bf16; VRAM as torch "
          "counts it\n\n| weights | memory | load s | s/step | VRAM GB | reserved GB |\n|---|---|---|---|---|---|")
    for type in GPU_TYPES:
        path = folder / ("gpu.gguf" if RECIPES[type].container == GGUF else "gpu.safetensors")
        write(path, layout_of("transformer", flux_spec(options), type), 0)
        for memory in ("full", "stream"):
            told = child("gpu", folder, options, memory=memory)
            row = told.get("refused") or (f"{told['load_s']:.1f} | {told['step_s']:.3f} | "
                                          f"{told['allocated'] / 1e9:.2f} | {told['reserved'] / 1e9:.2f}")
            print(f"| {type} | {memory} | {row} |", flush=True)
        path.unlink()


def stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to make the folder (default: the system's for such)")
    parser.add_argument("--type", default="Q4_K_S", choices=[name for name, row in RECIPES.items()
                                                             if row.container == GGUF and row.is_packed])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the step on the CPU")
    parser.add_argument("--depth", type=int, default=FLUX_DEV.depth)
    parser.add_argument("--single", type=int, default=FLUX_DEV.depth_single_blocks)
    parser.add_argument("--t5-layers", type=int, default=T5_XXL.num_layers)
    parser.add_argument("--side", type=int, default=512, help="pixels, a multiple of 16")
    parser.add_argument("--tokens", type=int, default=256, help="of text")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-check", action="store_true", help="leave out the run by gguf-py, which takes as long")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--memory", default="full", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.folder, options)))
        return 0
    for number in (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="flux-kit-full-size-", dir=options.folder) as folder:
        good = measure_cpu(Path(folder), options)
        if torch.cuda.is_available():
            measure_gpu(Path(folder), options)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
