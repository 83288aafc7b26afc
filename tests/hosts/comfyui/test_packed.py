"""Packed files (GGUF, scaled fp8) inside ComfyUI: written here, opened by our loaders in a process of the host."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy_quant_files
import pytest
import torch
from alone import tiny_host
from comfy_inside import Inside, inside_of
from comfy_server import Host, Server
from compare import relative
from flux_kit.engine.quant import FORMATS
from gguf_files import quantise, unpack, write_gguf
from prompts import Prompt, core, node
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SAME = 1e-5
ROOT = Path(__file__).parents[3]
TINY = ROOT / "tiny_flux" / "models"
State = dict[str, Tensor]
CHECKS = ("packed_models", "packed_loras", "packed_partial_load", "packed_wrappers_and_hooks", "packed_merge_and_save",
          "packed_text", "packed_lifetime", "packed_dynamic", "packed_core_formats")
QUANT = ("INT8", "INT8_CONVROT_64", "MXFP8", "NVFP4_16", "NVFP4_16 with columns", "F8_E4M3", "F8_E5M2")


def fitting(*names: str) -> Callable[[Tensor], str | None]:
    """The first of these types whose blocks divide the rows of a matrix; K types have blocks of 256."""
    return lambda tensor: next((name for name in names if tensor.shape[1] % FORMATS[name].block == 0), None)


def as_gguf(state: State, path: Path, kind: Callable[[Tensor], str | None], arch: str = "flux") -> None:
    """The file, and under `dense/` what gguf-py reads from it."""
    stored: dict[str, Any] = {}
    numbers = {}
    for name, tensor in state.items():
        chosen = kind(tensor) if tensor.ndim == 2 else None
        stored[name], numbers[name] = tensor.float(), tensor.float()
        if chosen is not None:
            packed = quantise(tensor, chosen)
            stored[name], numbers[name] = (packed, chosen), unpack(packed, chosen)
    write_gguf(path, stored, arch)
    save_file(numbers, path.parent / "dense" / f"{path.stem}.safetensors")


def as_scaled_fp8(state: State, path: Path) -> None:
    stored: State = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    numbers = {}
    for name, tensor in state.items():
        stored[name] = numbers[name] = tensor.float()
        if tensor.ndim == 2:
            scale = tensor.float().abs().max() / 448
            stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
            numbers[name] = stored[name].float() * scale
    save_file(stored, path)
    save_file(numbers, path.parent / "dense" / f"{path.stem}.safetensors")


def as_comfy_quant(state: State, path: Path) -> None:
    """One layer after the other in another kind."""
    kinds = itertools.cycle(QUANT)
    stored, numbers = comfy_quant_files.packed(state, lambda _: next(kinds))
    save_file(stored, path)
    save_file(numbers, path.parent / "dense" / f"{path.stem}.safetensors")


def checkouts() -> list[Path]:
    return [Path(path) for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    (folder / "dense").mkdir()
    state = load_file(TINY / "diffusion_models" / "tiny-flux-dev.safetensors")
    as_gguf(state, folder / "flux-k.gguf", fitting("Q4_K", "Q5_1", "Q4_0"))
    as_gguf(state, folder / "flux-q8.gguf", fitting("Q8_0"))
    as_scaled_fp8(state, folder / "flux-scaled.safetensors")
    as_comfy_quant(state, folder / "flux-quant.safetensors")
    text = TINY / "text_encoders"
    as_gguf(load_file(text / "tiny-t5.safetensors"), folder / "t5.gguf", fitting("Q8_0"), "t5encoder")
    as_gguf(load_file(text / "tiny-clip_l.safetensors"), folder / "clip_l.gguf", fitting("Q8_0"), "clip")
    for role in ("t5", "clip_l"):
        with safe_open(text / f"tiny-{role}.safetensors", "pt") as file:
            for place in (folder, folder / "dense", *(folder / path.name for path in checkouts())):
                place.mkdir(exist_ok=True)
                (place / f"{role}.tokenizer.json").write_text(file.metadata()["tokenizer.json"], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def inside(comfy: Host, files: Path) -> Inside:
    return inside_of(comfy, *CHECKS, FLUX_KIT_PACKED=str(files))


KINDS = {"flux-k.gguf": (["Q4_K", "Q5_1"], 0.5, 0.8), "flux-q8.gguf": (["Q8_0"], 1.06, 1.07),
         "flux-scaled.safetensors": (["F8_E4M3"], 1.0, 1.0),
         "flux-quant.safetensors": (sorted({name.partition(" ")[0] for name in QUANT}), 0.7, 1.0)}


@pytest.mark.parametrize("file", KINDS)
def test_a_packed_model_equals_its_plain_weights(inside: Inside, file: str) -> None:
    case = inside("packed_models")[file]
    kinds, low, high = KINDS[file]
    assert case["kinds"] == kinds and case["layers"] > 40 and case["uint8"] and case["cast"]
    assert low <= case["bytes per weight"] <= high
    assert case["off"] <= SAME and case["ksampler"] <= SAME
    assert case["dtype"] == ["torch.float32", "None"] and case["mapped"] == 0
    assert case["half dtype"] == "torch.bfloat16"
    assert 0 < case["half"] <= 0.02 and 0 < case["half with lora"] <= 0.02  # bf16 has 8 bits
    assert 0 <= case["told"] <= 65536  # the table of sigmas is counted in
    assert case["scratch"] >= case["largest"]


@pytest.mark.parametrize("file", KINDS)
def test_the_standalone_host_gives_the_same(inside: Inside, comfy: Host, files: Path, file: str) -> None:
    inside("packed_models")
    left = files / comfy.path.name
    prompt = load_file(left / "prompt.safetensors")
    host = tiny_host(files)
    conditioning = [[prompt["cond"], {"pooled_output": prompt["pooled"], "guidance": 3.5}]]
    mine = host.sample(host.load_model(files / file), conditioning, None, {"samples": torch.zeros(1, 16, 12, 16)},
                       seed=3, steps=3, solver="euler", schedule="simple")["samples"]
    assert relative(mine, load_file(left / f"{file}.latents")["samples"]) <= SAME


def test_loras_on_packed_weights(inside: Inside) -> None:
    found = inside("packed_loras")
    assert len(found) == len(KINDS) * 8
    for name, case in found.items():
        if name.endswith("bytes"):
            assert case["same"] and case["count"] > 40, name
            continue
        assert case["off"] <= SAME and case["changed"] > 1e-4, name
        assert case["base"] == 0 and case["again"] == 0, name
        assert case["said"] == [], name


def test_partly_loaded_is_the_same_bit_for_bit(inside: Inside) -> None:
    found = inside("packed_partial_load")
    assert len(found) == len(KINDS) * 6
    for name, case in found.items():
        assert case["streamed"] and case["taken back"], name
        assert case["share"] < 0.5 and case["freed"] > 0.3, "nothing was tested"
        assert case["after"] == 0 and case["left"] == 0, name


def test_wrappers_and_hooks(inside: Inside) -> None:
    found = inside("packed_wrappers_and_hooks")
    assert found.pop("bytes")["same"] and len(found) == 8
    for name, case in found.items():
        assert case["off"] <= SAME and case["changed"] > 1e-4 and case["base"] == 0, name


def test_merging_and_saving(inside: Inside) -> None:
    found = inside("packed_merge_and_save")
    assert found.pop("asked for one")["off"] == 0
    assert found.pop("after refusals")["off"] == 0
    for name, told in {"foreign patcher": "'single_blocks.0.linear1'.*bf16 or fp16", "another size":
                       "'double_blocks.0.img_attn.proj' from .128, 128. to .256, 128.",
                       "packed as a lora": "packed weights of another model.*bf16 or fp16"}.items():
        assert re.match(f"BadInput: .*{told}", found.pop(name)["refused"]), name
    assert len(found) == 2
    for name, case in found.items():
        for what, off in case.items():
            assert off <= SAME, (name, what)


def test_packed_text_encoders(inside: Inside) -> None:
    found = inside("packed_text")
    assert found["layers"] == {"clip_l": ["Q8_0"], "t5xxl": ["Q8_0"]} and found["embeddings"] >= 3
    assert max(found["off"] + found["off with lora"] + found["mixed"]) <= SAME
    assert min(found["changed"]) > 1e-4 and found["base"] == [0, 0] and all(found["streamed"])
    assert found["kinds"] == ["PackedPatcher", "Clip", "PackedPatcher"]
    assert max(found["saved"]) <= 0.02 and not any("int" in name for name in found["dtypes"])  # saved in bf16


def test_a_packed_model_goes_and_comes_back(inside: Inside) -> None:
    found = inside("packed_lifetime")
    same, *kinds = found.pop("again")
    assert same and len(kinds) == 2 and all(kind.endswith("PackedPatcher") for kind in kinds)
    assert found == {"loaded": True, "freed": True}


# -- the host's dynamic VRAM, with a stand-in for its allocator (inside_packed_dynamic.py)

def test_dynamic_vram_is_only_taken_when_asked_for(inside: Inside) -> None:
    found = inside("packed_dynamic")
    if not found:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    assert set(found["unasked"]) == {"kind", "on a cpu"}
    assert all(kind.endswith("PackedPatcher") for kind in found["unasked"].values())


@pytest.mark.parametrize("file", KINDS)
def test_packed_weights_under_dynamic_vram(inside: Inside, file: str) -> None:
    found = inside("packed_dynamic")
    if not found:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    case = found[file]
    # of the mix all but MXFP8 have a scale outside their blocks
    scaled = {"flux-scaled.safetensors": 41, "flux-quant.safetensors": 41 - 6}.get(file, 0)
    assert case.pop("layout") == {"tensors": 41, "sizes": True, "same": True, "scaled": scaled}
    assert case.pop("kind") == "DynamicPatcher" and case.pop("own") == 0 and case.pop("assigned")
    assert 0 < case.pop("told") < 0.1, "beside the bytes there are only what is not packed and the sigmas"
    places, used, given_back = case.pop("places")
    assert places > 30 and used and given_back
    assert case.pop("packed bytes kept") and case.pop("held bytes kept")
    assert case.pop("packed anew").startswith("BadInput")
    kind, apart, off = case.pop("static copy")
    assert (kind, apart) == ("PackedPatcher", True) and off <= SAME
    assert max(case.pop("saved")) <= SAME
    moved = [case.pop(name) for name in list(case) if name.endswith("moved")]
    assert len(moved) == 5 and all(moved)
    assert len(case) == 5 + 4 * 5
    for name, off in case.items():
        assert off == 0 if "again" in name or "base" in name else off <= SAME, name


# -- the host's own quantised layers

def test_core_s_quantised_layers_hold_the_same_numbers(inside: Inside) -> None:
    found = inside("packed_core_formats")
    if not found:
        pytest.skip("this ComfyUI has no layers of these formats")
    assert len(found["theirs"]) == 42
    assert max(found["theirs"].values()) <= SAME
    assert len(found["made"]) == 7
    for name, (off, error) in found["made"].items():
        assert off <= SAME, name
        assert 1e-4 < error < 0.15, name


# -- through the nodes

@pytest.fixture(scope="module")
def served(server: Server, files: Path) -> Server:
    """The server with the files, packed and plain, and a LoRA in its folders."""
    models = server.base / "models"
    for kind, names in {"diffusion_models": ["flux-q8", "flux-k", "flux-scaled", "flux-quant"],
                        "text_encoders": ["t5", "clip_l"]}.items():
        (models / kind).mkdir(parents=True, exist_ok=True)
        for name in names:
            packed = next(path for path in files.glob(f"{name}.*") if path.suffix != ".json")
            for kept, source in ((f"packed-{packed.name}", packed),
                                 (f"plain-{name}.safetensors", files / "dense" / f"{name}.safetensors")):
                shutil.copy(source, models / kind / kept)
                if kind == "text_encoders":
                    shutil.copy(files / f"{name}.tokenizer.json",
                                models / kind / f"{Path(kept).stem}.tokenizer.json")
    (models / "loras").mkdir(exist_ok=True)
    torch.manual_seed(1)
    sizes = {"lora_unet_single_blocks_0_linear1": (896, 128), "lora_unet_double_blocks_0_img_attn_qkv": (384, 128)}
    save_file({f"{name}.{part}.weight": torch.randn(*shape) * 0.05 for name, (rows, columns) in sizes.items()
               for part, shape in {"lora_down": (4, columns), "lora_up": (rows, 4)}.items()},
              models / "loras" / "small.safetensors")
    return server


def prompt_of(kind: str, model: str, encoders: str) -> Prompt:
    ending = ".safetensors" if kind == "plain" else encoders
    prompt = core(steps=3)
    prompt["load"]["inputs"] |= {"model": f"{kind}-{model}", "t5": f"{kind}-t5{ending}",
                                 "clip_l": f"{kind}-clip_l{ending}"}
    prompt["lora"] = node("LoraLoader", model=["load", 0], clip=["load", 1], lora_name="small.safetensors",
                          strength_model=1.0, strength_clip=1.0)
    prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    prompt["text"]["inputs"]["clip"] = ["lora", 1]
    return prompt


@pytest.mark.parametrize("file", KINDS)
def test_packed_files_through_the_nodes(served: Server, file: str) -> None:
    packed = served.latents(prompt_of("packed", file, ".gguf"))["latent"]
    plain = served.latents(prompt_of("plain", f"{Path(file).stem}.safetensors", ".safetensors"))["latent"]
    assert relative(packed, plain) <= SAME
    without = prompt_of("packed", file, ".gguf")
    without["sampler"]["inputs"]["model"] = ["load", 0]
    assert relative(served.latents(without)["latent"], packed) > 1e-4
