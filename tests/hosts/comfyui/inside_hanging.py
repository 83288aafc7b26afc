"""Checks of inside.py on what hangs on packed weights. Oracle: the weight unpacked as a whole, patched by the host's
own function in fp32, and multiplied. Imported by inside.py."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.lora
import comfy.model_management
import comfy.weight_adapter as host
import torch
from inside import (
    ENGINE,
    HOST,
    MODEL,
    NAME,
    D,
    check,
    conditioning,
    loaded,
    low_rank,
    patched,
    random,
    relative,
    sampled,
)

HANGING = sys.modules[NAME + ".hosts.comfyui.hanging"]
PACKED = sys.modules[NAME + ".hosts.comfyui.packed"]
ADAPTERS = sys.modules[ENGINE + ".adapters"]
DESTINATION = sys.modules[ENGINE + ".adapters.vocabulary"].Destination
STACK = sys.modules[ENGINE + ".adapters.stack"]
FORMAT = sys.modules[ENGINE + ".quant"].FORMATS["F8_E4M3"]
ROWS, WIDE, RANK = 6 * D, D, 4
TILE = 100 * WIDE  # weights at once: 768 rows are eight tiles, the last one shorter
Entries = list[tuple[Any, ...]]


def layer() -> Any:
    made = PACKED.Linear(WIDE, ROWS, format=FORMAT)
    made.weight.data = random(ROWS, WIDE, size=0.1).to(torch.float8_e4m3fn).view(torch.uint8)
    made.bias.data = random(ROWS)
    made.name = "a layer"
    return made


def pair(rows: int = ROWS, **more: Any) -> Any:
    return host.LoRAAdapter(set(), (random(rows, RANK, size=0.1), random(RANK, WIDE, size=0.1), 2.0, None,
                                    more.get("dora"), None))


def loha(rank: int = RANK, dora: Any = None) -> Any:
    parts = [random(*shape, size=0.3) for shape in ((ROWS, rank), (rank, WIDE)) * 2]
    return host.LoHaAdapter(set(), (parts[0], parts[1], 2.0, parts[2], parts[3], None, None, dora))


def lokr(factored: bool) -> Any:
    second = (None, random(ROWS // 8, RANK, size=0.3), random(RANK, WIDE // 8, size=0.3)) if factored else (
        random(ROWS // 8, WIDE // 8, size=0.3), None, None)
    return host.LoKrAdapter(set(), (random(8, 8, size=0.3), second[0], 2.0, None, None, second[1], second[2], None,
                                    None))


def oft(rescale: bool = False) -> Any:
    scales = 1 + random(ROWS, 1, size=0.1) if rescale else None
    return host.OFTAdapter(set(), (random(ROWS // 8, 8, 8, size=0.1), scales, None, None))


def of_ours(algorithm: str, scale: float = 0.5, **factors: torch.Tensor) -> Any:
    made = ADAPTERS.Adapter(DESTINATION("transformer", "a layer"), algorithm, factors, scale, None, None, (),
                            (ROWS, WIDE))
    return HANGING.HostAdapter(set(), (made,))


def ours() -> dict[str, Any]:
    def down() -> dict[str, torch.Tensor]:
        return {"down": random(RANK, WIDE, size=0.1), "up": random(ROWS, RANK, size=0.1)}

    high = {f"hada_w{i}_{part}": random(*shape, size=0.2) for i in (1, 2)
            for part, shape in (("a", (ROWS, 20)), ("b", (20, WIDE)))}
    return {
        "our DoRA by rows": of_ours("LoRA", **down(), magnitude=1 + random(ROWS, 1).abs()),
        "our DoRA by columns": of_ours("LoRA", **down(), magnitude=1 + random(1, WIDE).abs()),
        "our LoHa of high rank": of_ours("LoHa", **high),
        "our GLoRA": of_ours("GLoRA", glora_a1=random(WIDE, RANK, size=0.1), glora_a2=random(RANK, WIDE, size=0.1),
                             glora_b1=random(ROWS, RANK, size=0.1), glora_b2=random(RANK, WIDE, size=0.1)),
        "our OFT": of_ours("OFT", 0.0, oft=random(ROWS // 8, 8, 8, size=0.1)),
        "our BOFT": of_ours("OFT", 0.0, oft=random(4, ROWS // 8, 8, 8, size=0.1)),
        "our OFTv2": of_ours("OFTv2", oft_packed=random(WIDE // 8, 28, size=0.1)),
        "our IA3 on outputs": of_ours("IA3", ia3=random(ROWS, size=0.1), on_input=torch.tensor(False)),
        "our IA3 on inputs": of_ours("IA3", ia3=random(WIDE, size=0.1), on_input=torch.tensor(True)),
        "our diff": of_ours("diff", diff=random(ROWS, WIDE, size=0.05)),
        "our set": of_ours("set", set=random(ROWS, WIDE, size=0.1)),
    }


def entry(value: Any, strength: float = 0.7, first: int | None = None, rows: int = 0, of_weight: float = 1.0,
          function: Any = None) -> tuple[Any, ...]:
    return strength, value, of_weight, None if first is None else (0, first, rows), function


def stacks() -> dict[str, Entries]:
    own = ours()
    lengths = 1 + random(ROWS, 1).abs()
    found = {name: [entry(value)] for name, value in {
        "LoRA": pair(), "LoRA with DoRA": pair(dora=lengths), "LoRA with DoRA by columns": pair(dora=lengths[:WIDE].T),
        "LoHa": loha(), "LoHa of high rank": loha(20), "LoHa with DoRA": loha(dora=lengths), "LoKr": lokr(False),
        "LoKr factored": lokr(True), "OFT": oft(), "OFT rescaled": oft(True), "diff": (random(ROWS, WIDE, size=0.05),),
        "named diff": ("diff", (random(ROWS, WIDE, size=0.05),)), "set": ("set", (random(ROWS, WIDE),)), **own}.items()}
    third = ROWS // 3
    return {**found, "slices of rows": [entry(pair(third), 0.7, first, third) for first in (0, third, third)],
            "everything": [entry(own["our OFT"]), entry(pair()), entry(lokr(True), -0.3), entry(loha())],
            "a rotation behind a LoRA": [entry(pair()), entry(own["our OFT"])],
            "a DoRA behind a LoRA": [entry(pair()), entry(own["our DoRA by rows"])],
            "a diff of some rows": [entry((random(third, WIDE, size=0.05),), 0.7, third, third)],
            "a DoRA of some rows": [entry(pair(third, dora=lengths[:third]), 0.7, third, third)],
            "a scaled weight": [entry(pair(), of_weight=0.5)], "a function": [entry(pair(), function=lambda x: x * 2)]}


@contextmanager
def seen() -> Iterator[list[int]]:
    """Weights unpacked at once."""
    counts: list[int] = []
    dequantize = type(FORMAT).dequantize

    def watched(self: Any, packed: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        counts.append(packed.numel())  # one byte each
        return dequantize(self, packed, *args, **kwargs)

    with mock.patch.object(type(FORMAT), "dequantize", watched):
        yield counts


@check
def hanging_set_twice() -> dict[str, float]:
    """By the host's own function on a plain weight: how far two of ours that replace it are from each's numbers."""
    first, second = (random(ROWS, WIDE, size=0.1) for _ in range(2))
    patches = [entry(of_ours("set", set=numbers)) for numbers in (first, second)]
    made = comfy.lora.calculate_weight(patches, random(ROWS, WIDE), "a layer")
    return {"from the later": relative(made, second), "from the earlier": relative(made, first)}


@check
def hanging_kinds() -> Any:
    """What each kind of patch gives, how it hangs there, and the most weights unpacked to fp32 at once."""
    found: dict[str, Any] = {}
    for name, entries in stacks().items():
        made = layer()
        whole = made.format.dequantize(made.weight, torch.float32)
        merged = comfy.lora.calculate_weight(entries, whole.clone(), "a.weight")
        x = random(2, 5, WIDE)
        expected = torch.nn.functional.linear(x, merged, made.bias)
        base = torch.nn.functional.linear(x, whole, made.bias)
        with mock.patch.object(HANGING, "WIDE_TILE", TILE), seen() as unpacked:
            made.hang("a.weight", entries, None, torch.float32)
            unpacked.clear()
            off = relative(made(x), expected)
            at_once = max(unpacked) if made.whole else 0
            dense = relative(made.dense(torch.float32, entries=entries), merged)
        found[name] = {"off": off, "dense": dense, "changed": relative(base, expected), "whole": made.whole,
                       "at once": at_once / (ROWS * WIDE), "told": HANGING.cost(entries, ROWS, WIDE, 4)[0],
                       "bytes": sum(map(HANGING.nbytes, made.beside))}
        made.release()
        found[name]["after"] = relative(made(x), base)
    return found


def packed_file() -> Path:
    path = Path(tempfile.mkdtemp()) / "tiny-Q8_0.gguf"
    sys.modules[ENGINE + ".convert"].quantize(MODEL, path, "Q8_0")
    return path


@check
def hanging_memory() -> Any:
    """A stack of LoRAs of rank 64 on a packed model: what the host is told, and what it loads of the weights."""
    model = HOST.load_model(packed_file())
    bare = model.model_size()
    weights: dict[str, torch.Tensor] = {}
    for i in range(4):
        for name, rows, wide in ((f"single_blocks_{i}_linear1", 7 * D, D), (f"single_blocks_{i}_linear2", D, 5 * D)):
            weights[f"lora_unet_{name}.lora_down.weight"] = random(64, wide, size=0.02)
            weights[f"lora_unet_{name}.lora_up.weight"] = random(rows, 64, size=0.02)
    patcher = patched(model, weights)
    numbers = sum(value.numel() * 4 for value in weights.values())
    found: dict[str, Any] = {"numbers": numbers / bare, "more": (patcher.model_size() - bare) / numbers}
    again = patcher.clone()
    found["clone"], found["base"] = again.model_size() / patcher.model_size(), model.model_size() / bare
    for share in (0.5, 0.9):
        budget = int(patcher.model_size() * share)
        with loaded(patcher, share):
            layers = PACKED.packed_layers(model.model).values()
            beside = sum(HANGING.nbytes(side) for each in layers for side in each.beside)
            there = [module for module in model.model.modules() if getattr(module, "comfy_patched_weights", False)]
            taken = sum(parameter.nbytes for module in there for parameter in module.parameters(recurse=False))
            case = {"taken": (taken + beside) / budget, "told": patcher.loaded_size() / budget,
                    "beside": beside / numbers}
        found[f"loaded {share}"] = {**case, "after": patcher.loaded_size()}
    with loaded(patcher):
        found["full"] = patcher.loaded_size() / patcher.model_size()
    return found


@check
def hanging_room() -> Any:
    """Bytes that the host is asked to keep free, with a LoRA beside the layers for the run and without."""
    folder = Path(tempfile.mkdtemp())
    weights = low_rank({"single_blocks_0_linear1": (7 * D, D), "double_blocks_0_img_mod_lin": (6 * D, D)}, "lora_down",
                       "lora_up", "lora_unet_", alpha=True)
    sys.modules["safetensors.torch"].save_file(weights, folder / "one.safetensors")
    model, prompt = HOST.load_model(MODEL), conditioning()
    asked: list[tuple[float, float]] = []
    load = comfy.model_management.load_models_gpu

    def watched(models: Any, memory_required: float = 0, *args: Any, **kwargs: Any) -> Any:
        asked.append((memory_required, kwargs.get("minimum_memory_required") or 0))
        return load(models, memory_required, *args, **kwargs)

    lora = sys.modules[NAME + ".hosts.comfyui.lora"]
    rows = [STACK.Row("one.safetensors", 0.7, 0.7)]
    made = lora.with_loras(model, None, rows, mode="side", strict=True,
                           resolve=lambda name: folder / name)[0]
    with mock.patch.object(comfy.model_management, "load_models_gpu", watched):
        outs = [sampled(patcher, prompt) for patcher in (model, made)]
    size = 4 * 16 * (D + 7 * D + D + 6 * D) + 2 * 16 * 16  # ranks are padded to 16, and have 16 bytes of vectors each
    return {"more": [(after - before) / size for before, after in zip(*asked, strict=True)],
            "changed": relative(outs[1], outs[0])}
