"""ComfyUI's quantised layers against numpy's word for them; test_packed.py compares with the host's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfy_quant_files import KINDS, State, config, int8, into_header, mxfp8, nvfp4, packed, rotation, tiled
from compare import relative
from flux_kit.engine.convert import quantize
from flux_kit.engine.errors import BadModelFile, NotFinite
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.quant import FORMATS, Embedding, Linear
from flux_kit.engine.quant.comfy import ROTATED, hadamard
from flux_kit.engine.specs import FluxSpec, T5Spec
from flux_kit.engine.weights import detect, from_diffusers, load, open_checkpoint, to_diffusers
from flux_kit.engine.weights.comfy_quant import untiled
from safetensors.torch import load_file, save_file

FLUX = FluxSpec(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=256, vec_in_dim=256)
T5 = T5Spec(vocab_size=300, d_model=256, d_kv=64, num_heads=4, d_ff=512, num_layers=2)
LAYER = "double_blocks.0.img_mlp.0"


def state_of(kind: Any, spec: Any) -> State:
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(spec).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * 0.06 + float(name.endswith("scale"))
            for name, shape in shapes.items()}


def written(path: Path, stored: State, spelling: str = "tensors") -> Path:
    if spelling == "header":
        stored, metadata = into_header(stored)
        save_file(stored, path, metadata)
    else:
        save_file(stored, path)
    return path


def formats_of(model: torch.nn.Module) -> dict[str, str]:
    return {name: layer.format.name for name, layer in model.named_modules() if isinstance(layer, Linear | Embedding)}


# ------------------------------------------------------------------------------------------------- the formats

@pytest.mark.parametrize("order", sorted(ROTATED)[:-1])
def test_the_rotation(order: int) -> None:
    matrix = hadamard(order, torch.device("cpu"))
    assert torch.equal(matrix, torch.from_numpy(rotation(order)))
    assert torch.equal(matrix @ matrix, torch.eye(order))
    assert torch.equal(matrix, matrix.T)
    assert (matrix.sum(1) == 1).all()


@pytest.mark.parametrize("order", ROTATED)
def test_rotated_codes_are_turned_back_exactly(order: int) -> None:
    codes = torch.randint(-128, 128, (3, order), dtype=torch.int8)
    ours = FORMATS[f"INT8_CONVROT_{order}"].dequantize(codes.view(torch.uint8))
    turn = torch.from_numpy(rotation(order)).double()
    assert torch.equal(ours.double(), codes.double() @ turn)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 4), (96, 12), (130, 5), (300, 8)])
def test_tiles(rows: int, columns: int) -> None:
    scales = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns).astype(np.uint8)
    assert torch.equal(untiled(torch.from_numpy(tiled(scales)).reshape(-1), rows, columns), torch.from_numpy(scales))


@pytest.mark.parametrize("byte", range(256))
def test_every_scale(byte: int) -> None:
    block = torch.full((1, 33), 0x38, dtype=torch.uint8)  # ones
    block[0, 0] = byte
    expected = float("nan") if byte == 255 else 0.0 if byte == 0 else 2.0 ** (byte - 127)
    found = FORMATS["MXFP8"].dequantize(block)
    assert torch.equal(found.nan_to_num(7), torch.full((1, 32), expected).nan_to_num(7))
    assert FORMATS["MXFP8"].is_finite(block) == (byte != 255)
    block = torch.full((1, 9), 0x2A, dtype=torch.uint8)  # one and minus one
    block[0, 0] = byte
    scale = torch.tensor(byte, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    found = FORMATS["NVFP4_16"].dequantize(block)
    assert torch.equal(found.nan_to_num(7), (torch.tensor([1.0, -1.0]).repeat(8) * scale)[None].nan_to_num(7))
    assert FORMATS["NVFP4_16"].is_finite(block) == (byte & 127 != 127)


# ------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("spelling", ["tensors", "header"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_of_each_kind(tmp_path: Path, kind: str, spelling: str) -> None:
    stored, numbers = packed(state_of(Flux, FLUX), lambda _: kind)
    path = written(tmp_path / "flux.safetensors", stored, spelling)
    with open_checkpoint(path) as checkpoint:
        found = detect(checkpoint)
        assert (found.role, found.problems) == ("transformer", ())
        assert found.parts["transformer"].spec == FLUX
        assert checkpoint[f"{LAYER}.weight"].shape == (1024, 256)
        assert checkpoint[f"{LAYER}.weight"].format == kind.partition(" ")[0]
        assert not any(name.endswith("comfy_quant") for name in checkpoint)
    unpacked = load(path, "transformer", packed=None)
    for name, tensor in unpacked.state_dict().items():
        assert relative(tensor, numbers[name]) < 1e-6, name
    model = load(path, "transformer")
    assert set(formats_of(model).values()) == {kind.partition(" ")[0]}
    assert len(formats_of(model)) == (22 if "256" in kind else 23)
    layer, x = model.get_submodule(LAYER), torch.randn(2, 3, 256)
    assert relative(layer(x), F.linear(x, numbers[f"{LAYER}.weight"], numbers[f"{LAYER}.bias"])) < 1e-6
    half = x.to(torch.bfloat16)
    assert relative(layer(half), F.linear(half, numbers[f"{LAYER}.weight"].to(half.dtype),
                                          numbers[f"{LAYER}.bias"].to(half.dtype))) < 4e-3


KEYS = sorted(KINDS)


def mixed(name: str) -> str | None:
    return [*KEYS, None][sum(name.encode()) % (len(KEYS) + 1)]


@pytest.mark.parametrize("layout", ["bfl", "prefixed", "diffusers"])
def test_layouts_with_a_mix_of_kinds(tmp_path: Path, layout: str) -> None:
    state = state_of(Flux, FLUX)
    stored, numbers = packed(to_diffusers(state, FLUX) if layout == "diffusers" else state, mixed)
    if layout == "diffusers":
        numbers = from_diffusers(numbers, FLUX, {name: tuple(tensor.shape) for name, tensor in state.items()})
    prefix = "model.diffusion_model." if layout == "prefixed" else ""
    path = written(tmp_path / "flux.safetensors", {prefix + name: tensor for name, tensor in stored.items()})
    assert len(set(formats_of(load(path, "transformer")).values())) > 4
    for name, tensor in load(path, "transformer", packed=None).state_dict().items():
        assert relative(tensor, numbers[name]) < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_one_kind_are_fused(tmp_path: Path, kind: str) -> None:
    state = state_of(Flux, FLUX)
    stored, theirs = packed(to_diffusers(state, FLUX), lambda _: kind)
    numbers = from_diffusers(theirs, FLUX, {name: tuple(tensor.shape) for name, tensor in state.items()})
    model = load(written(tmp_path / "flux.safetensors", stored), "transformer")
    fused = "double_blocks.0.img_attn.qkv"
    # columns of several tensors with scales of their own: no one layer can hold these packed
    assert formats_of(model).get(fused) == (None if "columns" in kind else kind.partition(" ")[0])
    x = torch.randn(5, 256)
    for name in (fused, "single_blocks.0.linear1", "final_layer.adaLN_modulation.1"):
        ours = model.get_submodule(name)(x)
        assert relative(ours, F.linear(x, numbers[f"{name}.weight"], numbers[f"{name}.bias"])) < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_with_its_embedding(tmp_path: Path, kind: str) -> None:
    state = state_of(T5Encoder, T5)
    stored, numbers = packed(state, lambda name: None if "relative" in name else kind)
    model = load(written(tmp_path / "t5.safetensors", stored), "t5")
    assert isinstance(model.shared, Embedding)
    ids = torch.randint(0, 300, (2, 9))
    assert relative(model.shared(ids), F.embedding(ids, numbers["shared.weight"])) < 1e-6


def test_a_file_of_our_own(tmp_path: Path) -> None:
    """int8_tensorwise and scaled fp8 as `flux-kit quantize` writes them, back to the numbers it wrote."""
    source = written(tmp_path / "source.safetensors", state_of(Flux, FLUX))
    plain = load(source, "transformer").state_dict()
    for type, name, bound in (("int8_tensorwise", "INT8", 0.01), ("fp8_scaled", "F8_E4M3", 0.03)):
        path = tmp_path / f"{type}.safetensors"
        quantize(source, path, type)
        model = load(path, "transformer")
        assert name in formats_of(model).values()
        raw = load_file(path)
        unpacked = load(path, "transformer", packed=None).state_dict()
        for layer in formats_of(model):
            scale = raw[f"{layer}.weight_scale" if name == "INT8" else f"{layer}.scale_weight"]
            assert torch.equal(unpacked[f"{layer}.weight"], raw[f"{layer}.weight"].float() * scale)
            assert relative(unpacked[f"{layer}.weight"], plain[f"{layer}.weight"]) < bound


def test_a_source_to_quantise_from(tmp_path: Path) -> None:
    stored, numbers = packed(state_of(Flux, FLUX), mixed)
    source = written(tmp_path / "source.safetensors", stored)
    quantize(source, tmp_path / "q8.gguf", "Q8_0")
    for name, tensor in load(tmp_path / "q8.gguf", "transformer", packed=None).state_dict().items():
        assert relative(tensor, numbers[name]) < 0.01, name


# ------------------------------------------------------------------------------------------------- what is refused

def refused(tmp_path: Path, stored: State, metadata: dict[str, str] | None = None,
            error: type[Exception] = BadModelFile) -> str:
    path = tmp_path / "flux.safetensors"
    save_file(stored, path, metadata)
    with pytest.raises(error) as caught:
        load(path, "transformer")
    assert "flux.safetensors" in str(caught.value)
    return str(caught.value)


def one_layer(kind: str) -> State:
    return packed(state_of(Flux, FLUX), lambda name: kind if name == f"{LAYER}.weight" else None)[0]


@pytest.mark.parametrize("format", ["convrot_w4a4", "asym_w4a8_int8", "awq_w4a16", "svdquant_w4a4", "of tomorrow",
                                    "F32", "x" * 5000])
@pytest.mark.parametrize("spelling", ["tensors", "header"])
def test_other_formats_are_named(tmp_path: Path, spelling: str, format: str) -> None:
    stored = one_layer("INT8")
    stored[f"{LAYER}.comfy_quant"] = config({"format": format})
    metadata = None
    if spelling == "header":
        stored, metadata = into_header(stored)
    message = refused(tmp_path, stored, metadata)
    assert format[:40] in message
    assert LAYER in message
    assert "GGUF" in message
    assert len(message) < 600
    with open_checkpoint(tmp_path / "flux.safetensors") as checkpoint:  # the container is in order
        assert detect(checkpoint).role == "transformer"


@pytest.mark.parametrize(("kind", "ending", "value"), [
    ("INT8", "comfy_quant", torch.zeros(3, dtype=torch.uint8)),
    ("INT8", "comfy_quant", torch.full((70_000,), 32, dtype=torch.uint8)),
    ("INT8", "comfy_quant", config({"format": 7})),
    ("INT8", "comfy_quant", torch.zeros(3)),
    ("INT8", "comfy_quant", torch.tensor([255, 254], dtype=torch.uint8)),
    ("INT8", "comfy_quant", config({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100})),
    ("INT8", "comfy_quant", config({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 1024})),
    ("INT8", "comfy_quant", config({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": "64"})),
    ("INT8", "comfy_quant", config({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": [64]})),
    ("INT8", "comfy_quant", config({"format": "mxfp8"})),
    ("INT8", "weight_scale", None), ("INT8", "weight_scale", torch.ones(7, 1)), ("INT8", "weight", torch.ones(2, 2)),
    ("MXFP8", "weight_scale", None), ("MXFP8", "weight_scale", torch.ones(1024, 8)),
    ("MXFP8", "weight_scale", torch.ones(1024, 4, dtype=torch.uint8)),
    ("NVFP4_16", "weight_scale", None), ("NVFP4_16", "weight_scale_2", None),
    ("NVFP4_16", "weight_scale_2", torch.ones(2)), ("NVFP4_16", "weight", torch.zeros(1024, 4, dtype=torch.uint8)),
    ("NVFP4_16 with columns", "pre_quant_scale", torch.ones(255)),
], ids=lambda value: None if isinstance(value, torch.Tensor) else str(value))
def test_damage_is_named(tmp_path: Path, kind: str, ending: str, value: torch.Tensor | None) -> None:
    stored = one_layer(kind)
    if value is None:
        del stored[f"{LAYER}.{ending}"]
    else:
        stored[f"{LAYER}.{ending}"] = value
    assert LAYER in refused(tmp_path, stored)


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '{"layers": 3}', json.dumps({"layers": {LAYER: 3}}),
                                  json.dumps({"layers": {LAYER: {}}}), "[" * 100_000])
def test_a_damaged_header_is_named(tmp_path: Path, text: str) -> None:
    stored, _ = into_header(one_layer("INT8"))
    assert "_quantization_metadata" in refused(tmp_path, stored, {"_quantization_metadata": text})


def test_weights_without_their_description_are_named(tmp_path: Path) -> None:
    stored, _ = into_header(one_layer("INT8"))
    assert f"'{LAYER}.weight' (I8)" in refused(tmp_path, stored)
    stored, _ = into_header(one_layer("NVFP4_16"))
    assert "ModelOpt" in refused(tmp_path, stored)


def test_layers_that_are_gone_do_not_matter(tmp_path: Path) -> None:
    stored, metadata = into_header(one_layer("INT8"))
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    path = tmp_path / "flux.safetensors"
    save_file(stored, path, {"_quantization_metadata": json.dumps({"layers": {**layers, "gone": {"format": "nvfp4"}}})})
    assert formats_of(load(path, "transformer")) == {LAYER: "INT8"}


@pytest.mark.parametrize(("kind", "ending"), [("INT8", "weight_scale"), ("MXFP8", "weight_scale"),
                                              ("NVFP4_16", "weight_scale"), ("NVFP4_16", "weight_scale_2"),
                                              ("NVFP4_16 with columns", "pre_quant_scale")])
def test_scales_that_are_no_numbers_are_named(tmp_path: Path, kind: str, ending: str) -> None:
    stored = one_layer(kind)
    name = f"{LAYER}.{ending}"
    if stored[name].dtype.itemsize == 1:
        stored[name].view(torch.uint8).view(-1)[5] = 255
    else:
        stored[name].view(-1)[-1] = float("nan")
    assert LAYER in refused(tmp_path, stored, error=NotFinite)


@pytest.mark.parametrize("write", [int8, mxfp8, nvfp4])
def test_the_writers_of_these_tests_are_close_to_what_they_are_given(write: Any) -> None:
    weight = torch.randn(96, 256)
    weight[3] = 0
    state, numbers = write(weight)
    assert relative(numbers, weight) < 0.12
    assert not numbers[3].any()
    assert state["weight"].dtype.itemsize == 1
