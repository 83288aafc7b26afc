"""Files with packed weights through `load`: the pictures' numbers are those of gguf-py's weights in a plain model."""

from __future__ import annotations

import copy
import re
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flux_kit.engine.errors import BadModelFile, FluxKitError, NotFinite
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.quant import FORMATS, Embedding, Linear, QuantFormat, codebooks
from flux_kit.engine.specs import ClipTextSpec, FluxSpec, T5Spec
from flux_kit.engine.weights import detect, load, open_checkpoint, to_diffusers
from gguf_files import GGML, quantise, random_blocks, unpack, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

loading = sys.modules["flux_kit.engine.weights.load"]
FLUX = FluxSpec(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=256, vec_in_dim=256)
MATRICES = 23
T5 = T5Spec(vocab_size=300, d_model=256, d_kv=64, num_heads=4, d_ff=512, num_layers=2)
CLIP = ClipTextSpec(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=16, bos_token_id=62, eos_token_id=63)
TINY = Path(__file__).parents[3] / "tiny_flux" / "models"
State = dict[str, Tensor]
Stored = dict[str, Any]


def state_of(kind: Callable[..., nn.Module], spec: Any) -> State:
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(spec).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * (0.06 if len(shape) > 1 else 0.2)
            + float(name.endswith(("scale", "norm.weight"))) for name, shape in shapes.items()}


def pack(state: State, type_of: Callable[[str], str | None]) -> tuple[Stored, State]:
    """The tensors to write, and the numbers gguf-py reads from them. `type_of` a matrix: None keeps it."""
    stored: Stored = {}
    numbers = dict(state)
    for seed, (name, tensor) in enumerate(state.items()):
        block = 1
        kind = type_of(name) if tensor.ndim == 2 else None
        if kind is not None:
            block = FORMATS[kind].block
        if kind is None or tensor.shape[1] % block:
            stored[name] = tensor
            continue
        packed = quantise(tensor, kind, seed)
        stored[name] = packed, kind
        numbers[name] = unpack(packed, kind)
    return stored, numbers


def flux_inputs(spec: FluxSpec, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    ids = torch.zeros(1, 12, 3)
    ids[0, :, 1], ids[0, :, 2] = torch.arange(12) // 4, torch.arange(12) % 4
    return {"img": noise(1, 12, spec.in_channels), "img_ids": ids, "txt": noise(1, 5, spec.context_in_dim),
            "txt_ids": torch.zeros(1, 5, 3), "timesteps": torch.tensor([0.6]), "y": noise(1, spec.vec_in_dim),
            "guidance": torch.tensor([3.5]) if spec.guidance_embed else None}


def plain(kind: Callable[..., nn.Module], spec: Any, numbers: State) -> nn.Module:
    model = kind(spec)
    model.load_state_dict(numbers)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def same_pictures(model: nn.Module, numbers: State) -> None:
    inputs = flux_inputs(model.spec)
    ours, theirs = model(**inputs), plain(Flux, model.spec, numbers)(**inputs)
    assert torch.isfinite(theirs).all()
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def packed_layers(model: nn.Module) -> dict[str, str]:
    return {name: layer.format.name for name, layer in model.named_modules() if isinstance(layer, Linear | Embedding)}


# ------------------------------------------------------------------------------------------------- GGUF

@pytest.mark.parametrize("name", [name for name in GGML if name != "F32"])
def test_a_transformer_of_every_type(tmp_path: Path, name: str) -> None:
    stored, numbers = pack(state_of(Flux, FLUX), lambda _: name)
    path = write_gguf(tmp_path / "flux.gguf", stored)
    model = load(path, "transformer")
    assert isinstance(model, Flux)
    assert model.spec == FLUX
    packed = packed_layers(model)
    expected = {key.removesuffix(".weight") for key, value in stored.items() if isinstance(value, tuple)}
    if name in ("F16", "BF16"):
        assert packed == {}
    else:
        assert packed == dict.fromkeys(expected, name)
        assert len(packed) == (22 if FORMATS[name].block == 256 else MATRICES)
    same_pictures(model, numbers)


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q4_0"])
def test_tiny_flux(tmp_path: Path, name: str) -> None:
    state = {key: value.float() for key, value in
             load_file(TINY / "diffusion_models" / "tiny-flux-dev.safetensors").items()}
    stored, numbers = pack(state, lambda key: name)
    model = load(write_gguf(tmp_path / "tiny.gguf", stored), "transformer")
    assert len(packed_layers(model)) > 20
    same_pictures(model, numbers)


def mixed(name: str) -> str | None:
    """A type for each tensor, as per-layer mixes have."""
    kinds = ("Q4_K", "Q8_0", "Q6_K", "Q5_1", None, "IQ3_S", "Q2_K", "BF16")
    return kinds[sum(name.encode()) % len(kinds)]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("arch", ["flux", "pig", None])
def test_mixes_prefixes_and_any_architecture(tmp_path: Path, arch: str | None, prefix: str) -> None:
    stored, numbers = pack(state_of(Flux, FLUX), mixed)
    path = write_gguf(tmp_path / "flux.gguf", {prefix + name: tensor for name, tensor in stored.items()}, arch)
    model = load(path, "transformer")
    assert len(set(packed_layers(model).values())) > 4
    same_pictures(model, numbers)


def test_half_precision_norms_and_biases(tmp_path: Path) -> None:
    """Early files keep 1-d tensors as F16; a packed vector, which nobody writes, is unpacked."""
    state = state_of(Flux, FLUX)
    stored, numbers = pack(state, lambda _: "Q8_0")
    for name, tensor in state.items():
        if tensor.ndim == 1 and name.endswith("bias") and tensor.shape[0] % 32 == 0:
            packed = quantise(tensor[None], "Q8_0")[0]
            stored[name], numbers[name] = (packed, "Q8_0"), unpack(packed, "Q8_0")
        elif tensor.ndim == 1:
            stored[name], numbers[name] = tensor.half(), tensor.half().float()
    model = load(write_gguf(tmp_path / "flux.gguf", stored), "transformer")
    same_pictures(model, numbers)


def test_the_compute_dtype(tmp_path: Path) -> None:
    stored, numbers = pack(state_of(Flux, FLUX), lambda _: "Q8_0")
    path = write_gguf(tmp_path / "flux.gguf", stored)
    model = load(path, "transformer", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, torch.bfloat16}
    inputs = flux_inputs(FLUX, torch.bfloat16)
    with torch.no_grad():
        ours = model(**inputs)
        theirs = plain(Flux, FLUX, numbers).to(torch.bfloat16)(**inputs)
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < 0.01


def test_nothing_stays_packed_where_that_is_asked(tmp_path: Path) -> None:
    stored, numbers = pack(state_of(Flux, FLUX), mixed)
    path = write_gguf(tmp_path / "flux.gguf", stored)
    for dtype in (torch.float32, torch.bfloat16):
        model = load(path, "transformer", dtype=dtype, packed=None)
        assert packed_layers(model) == {}
        assert all(torch.equal(tensor, numbers[name].to(dtype)) for name, tensor in model.state_dict().items())


# ------------------------------------------------------------------------------------------------- diffusers' names

@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q3_K", "IQ4_XS"])
def test_parts_of_one_type_are_fused_as_they_are(tmp_path: Path, name: str) -> None:
    state = state_of(Flux, FLUX)
    stored, numbers = pack(to_diffusers(state, FLUX), lambda _: name)
    model = load(write_gguf(tmp_path / "flux.gguf", stored), "transformer")
    packed = packed_layers(model)
    for ours, theirs in {
            "double_blocks.0.img_attn.qkv": ["transformer_blocks.0.attn.to_" + part for part in "qkv"],
            "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
            "single_blocks.0.linear1": [*("single_transformer_blocks.0.attn.to_" + part for part in "qkv"),
                                        "single_transformer_blocks.0.proj_mlp"]}.items():
        assert packed[ours] == name
        rows = np.concatenate([stored[f"{part}.weight"][0] for part in theirs])
        assert torch.equal(model.get_submodule(ours).weight, torch.from_numpy(rows))
    swapped = stored["norm_out.linear.weight"][0]
    assert torch.equal(model.final_layer.adaLN_modulation[1].weight,
                       torch.from_numpy(np.concatenate([swapped[256:], swapped[:256]])))
    from flux_kit.engine.weights import from_diffusers

    same_pictures(model, from_diffusers(numbers, FLUX, {key: tuple(value.shape) for key, value in state.items()}))


def test_parts_of_several_types_are_unpacked(tmp_path: Path) -> None:
    state = state_of(Flux, FLUX)
    stored, numbers = pack(to_diffusers(state, FLUX), lambda name: "Q6_K" if "to_v" in name else "Q4_K")
    path = write_gguf(tmp_path / "flux.gguf", stored)
    from flux_kit.engine.weights import from_diffusers

    model = load(path, "transformer")
    assert "double_blocks.0.img_attn.qkv" not in packed_layers(model)
    assert packed_layers(model)["double_blocks.0.img_mlp.0"] == "Q4_K"
    same_pictures(model, from_diffusers(numbers, FLUX, {key: tuple(value.shape) for key, value in state.items()}))
    half = load(path, "transformer", dtype=torch.bfloat16)
    assert half.double_blocks[0].img_attn.qkv.weight.dtype == torch.bfloat16


NARROW = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}


@pytest.mark.parametrize("narrow", ["fp8", "scaled fp8", "fp16", "Q8_0"])
def test_parts_of_several_types_keep_their_numbers_as_stored(tmp_path: Path, narrow: str) -> None:
    """Without a dtype asked for, the first of q, k, v does not decide what becomes of the others."""
    from flux_kit.engine.weights import from_diffusers

    state = state_of(Flux, FLUX)
    split = {name: tensor.to(torch.bfloat16) for name, tensor in to_diffusers(state, FLUX).items()}
    first = "transformer_blocks.0.attn.to_q.weight"
    split[first.replace("to_q", "to_k")][3, 5] = 1e6  # no number of fp16 or fp8
    stored: Stored = dict(split)
    numbers = {name: tensor.float() for name, tensor in split.items()}
    if narrow == "Q8_0":
        packed, unpacked = pack({first: numbers[first]}, lambda _: narrow)
        stored, numbers = stored | packed, numbers | unpacked
        path = write_gguf(tmp_path / "flux.gguf", stored)
    else:
        scale = 2.0**-6 if narrow.startswith("scaled") else 1.0
        stored[first] = (numbers[first] / scale).to(NARROW[narrow.removeprefix("scaled ")])
        numbers[first] = stored[first].float() * scale
        if scale != 1:
            stored[first.replace("weight", "scale_weight")] = torch.tensor(scale)
        path = tmp_path / "flux.safetensors"
        save_file(stored, path)
    model = load(path, "transformer", dtype=None)
    whole = from_diffusers(numbers, FLUX, {key: tuple(value.shape) for key, value in state.items()})
    assert torch.equal(model.double_blocks[0].img_attn.qkv.weight.float(), whole["double_blocks.0.img_attn.qkv.weight"])
    assert model.double_blocks[0].txt_attn.qkv.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- encoders

LLAMA = ((r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
         (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"enc.blk.\1.attn_rel_b."),
         (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"enc.blk.\1.attn_norm."),
         (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"enc.blk.\1.ffn_norm."),
         (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"enc.blk.\1.ffn_gate."),
         (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"enc.blk.\1.ffn_up."),
         (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"enc.blk.\1.ffn_down."),
         (r"^encoder\.final_layer_norm\.", "enc.output_norm."), (r"^shared\.", "token_embd."))


def llama_name(name: str) -> str:
    for pattern, replacement in LLAMA:
        name = re.sub(pattern, replacement, name)
    return name


def test_the_names_used_here_are_llama_cpp_s() -> None:
    """gguf-py's own table of names, for each name of our T5."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, T5.num_layers)
    for name in state_of(T5Encoder, T5):
        assert table.get_name(name, try_suffixes=(".weight",)) == llama_name(name)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("names", ["llama.cpp", "Hugging Face"])
def test_t5(tmp_path: Path, names: str, kind: str) -> None:
    state = state_of(T5Encoder, T5)
    stored, numbers = pack(state, lambda name: None if "relative" in name else kind)
    if names == "llama.cpp":
        stored = {llama_name(name): tensor for name, tensor in stored.items()}
        assert not set(stored) & set(state)
    path = write_gguf(tmp_path / "t5.gguf", stored, "t5encoder", {"tokenizer.ggml.tokens": ["a", "\u00e9"]})
    with open_checkpoint(path) as checkpoint:
        found = detect(checkpoint)
        assert (found.role, found.layout) == ("t5", "gguf" if names == "llama.cpp" else "hf")
        assert checkpoint.arrays["tokenizer.ggml.tokens"].read() == ["a", "\u00e9"]
    model = load(path, "t5")
    assert model.spec == T5
    assert isinstance(model.shared, Embedding)
    assert len(packed_layers(model)) == 15
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(ids), plain(T5Encoder, T5, numbers)(ids)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    half = load(path, "t5", dtype=torch.bfloat16)
    with torch.no_grad():
        assert half(ids).dtype == torch.bfloat16


def test_clip_l(tmp_path: Path) -> None:
    stored, numbers = pack(state_of(ClipText, CLIP), lambda name: "Q5_K" if "mlp" in name else "Q4_0")
    model = load(write_gguf(tmp_path / "clip.gguf", stored, "clip"), "clip_l")
    assert packed_layers(model)["text_model.embeddings.token_embedding"] == "Q4_0"
    ids = torch.tensor([[62, 5, 6, 63] + [63] * 12])
    with torch.no_grad():
        for ours, theirs in zip(model(ids), plain(ClipText, CLIP, numbers)(ids), strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


# ------------------------------------------------------------------------------------------------- fp8

def fp8_state(state: State, dtype: torch.dtype, scales: Mapping[str, float] | None = None,
              names: tuple[str, str] = ("scale_weight", "scale_input")) -> tuple[State, State]:
    """Matrices in fp8, the rest in bf16; with `scales`, drawn for every matrix, as scaled files have them."""
    stored: State = {}
    numbers: State = {}
    for i, (name, tensor) in enumerate(state.items()):
        if tensor.ndim != 2:
            stored[name] = tensor.to(torch.bfloat16)
            numbers[name] = stored[name].float()
            continue
        scale = 1.0 if scales is None else 2e-3 * (1 + i % 7)
        stored[name] = (tensor / scale).to(dtype)
        numbers[name] = stored[name].float() * torch.tensor(scale)
        if scales is not None:
            base = name.removesuffix("weight")
            stored[base + names[0]] = torch.tensor(scale)
            if i % 2:
                stored[base + names[1]] = torch.ones(1)
    if scales is not None:
        stored["scaled_fp8"] = torch.empty(0, dtype=dtype)
    return stored, numbers


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_plain_fp8_stays_packed(tmp_path: Path, dtype: torch.dtype) -> None:
    stored, numbers = fp8_state(state_of(Flux, FLUX), dtype)
    save_file(stored, tmp_path / "flux.safetensors")
    model = load(tmp_path / "flux.safetensors", "transformer")
    assert len(packed_layers(model)) == MATRICES
    assert set(packed_layers(model).values()) == {"F8_E4M3" if dtype == torch.float8_e4m3fn else "F8_E5M2"}
    same_pictures(model, numbers)
    kept = load(tmp_path / "flux.safetensors", "transformer", dtype=None)  # torch holds fp8 itself
    assert packed_layers(kept) == {}
    assert kept.img_in.weight.dtype == dtype


@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")], ids="-".join)
@pytest.mark.parametrize("layout", ["bfl", "prefixed", "diffusers"])
def test_scaled_fp8(tmp_path: Path, layout: str, names: tuple[str, str]) -> None:
    state = state_of(Flux, FLUX)
    if layout == "diffusers":
        from flux_kit.engine.weights import from_diffusers

        stored, numbers = fp8_state(to_diffusers(state, FLUX), torch.float8_e4m3fn, {}, names)
        numbers = from_diffusers(numbers, FLUX, {key: tuple(value.shape) for key, value in state.items()})
    else:
        stored, numbers = fp8_state(state, torch.float8_e4m3fn, {}, names)
    if layout == "prefixed":
        stored = {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}
    path = tmp_path / "flux.safetensors"
    save_file(stored, path)
    for dtype in (torch.float32, None):
        model = load(path, "transformer", dtype=dtype)
        assert len(packed_layers(model)) == MATRICES
    qkv = load(path, "transformer").double_blocks[0].img_attn.qkv
    assert qkv.scale_weight.shape == ((768, 1) if layout == "diffusers" else ())
    same_pictures(load(path, "transformer"), numbers)
    unpacked = load(path, "transformer", packed=None)
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in unpacked.state_dict().items())


# ------------------------------------------------------------------------------------------------- memory

@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def mapped(path: Path, tensor: Tensor) -> bool:
    """Whether a tensor is a view of the file."""
    maps = re.findall(rf"^(\w+)-(\w+) .*{re.escape(str(path))}$", Path("/proc/self/maps").read_text(), re.M)
    return any(int(begin, 16) <= tensor.data_ptr() < int(end, 16) for begin, end in maps)


def test_packed_bytes_are_views_of_the_file(tmp_path: Path) -> None:
    stored, _ = pack(state_of(Flux, FLUX), lambda _: "Q4_0")
    path = write_gguf(tmp_path / "flux.gguf", stored)
    model = load(path, "transformer", dtype=torch.bfloat16)
    assert all(mapped(path, layer.weight) for layer in model.modules() if isinstance(layer, Linear))
    biases = [layer.bias for layer in model.modules() if isinstance(layer, Linear)]
    assert {bias.dtype for bias in biases} == {torch.bfloat16}


def test_fp8_behind_an_odd_number_of_bytes_is_a_view_too(tmp_path: Path) -> None:
    """Writers put a marker of two bytes among the weights; what is read byte by byte need not be aligned."""
    stored, numbers = fp8_state(state_of(Flux, FLUX), torch.float8_e4m3fn, scales={})
    stored["scaled_fp8"] = torch.zeros(3, dtype=torch.float8_e4m3fn)
    path = tmp_path / "flux.safetensors"
    save_file(stored, path)
    model = load(path, "transformer")
    weights = [layer.weight for layer in model.modules() if isinstance(layer, Linear)]
    assert any(weight.data_ptr() % 4 for weight in weights) and all(mapped(path, weight) for weight in weights)
    same_pictures(model, numbers)


def test_a_model_of_the_host_gets_its_packed_layers(tmp_path: Path) -> None:
    class HostLinear(Linear):
        pass

    class HostOps:
        Linear = HostLinear
        Embedding = Embedding

    stored, _ = pack(state_of(T5Encoder, T5), lambda name: None if "relative" in name else "Q8_0")
    model = load(write_gguf(tmp_path / "t5.gguf", stored), "t5", packed=HostOps())
    assert sum(type(layer) is HostLinear for layer in model.modules()) == 14


# ------------------------------------------------------------------------------------------------- what is refused

BAD = "double_blocks.0.img_mlp.0.weight"


def refused(path: Path, error: type[Exception] = BadModelFile, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(path, "transformer", **options)
    assert isinstance(caught.value, FluxKitError)
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "IQ4_NL"])
def test_a_scale_that_is_no_number_is_named(tmp_path: Path, name: str) -> None:
    stored, _ = pack(state_of(Flux, FLUX), lambda _: name)
    packed = stored[BAD][0].copy()
    at = FORMATS[name].halves[0]
    packed[3, at:at + 2] = (0, 0x7E)
    stored[BAD] = packed, name
    message = refused(write_gguf(tmp_path / "flux.gguf", stored), NotFinite)
    assert BAD in message
    assert name in message


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ1_M", "MXFP4"])
def test_a_layer_of_a_large_file_names_it_when_it_is_first_used(
        tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strict load reads no scales of layers beyond a bound; a picture is not to be had from them either."""
    monkeypatch.setattr(loading, "CHECKED_AT_LOAD", 0)
    stored, _ = pack(state_of(Flux, FLUX), lambda _: name)
    packed = stored[BAD][0].copy()
    nbytes = FORMATS[name].nbytes
    packed[3, -nbytes:] = 255  # the last block of a row
    stored[BAD] = packed, name
    path = write_gguf(tmp_path / "flux.gguf", stored)
    model = load(path, "transformer")
    for _ in range(2):
        with pytest.raises(NotFinite) as caught:
            model(**flux_inputs(FLUX))
        assert BAD in str(caught.value)
        assert "flux.gguf" in str(caught.value)
        assert caught.value.file == str(path)
    with pytest.raises(NotFinite, match="flux"):
        copy.deepcopy(model).double_blocks[0].img_mlp[0](torch.zeros(1, 256))


def test_layers_of_a_large_file_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CHECKED_AT_LOAD", 100_000)
    looked: list[int] = []
    is_finite = QuantFormat.is_finite
    monkeypatch.setattr(QuantFormat, "is_finite", lambda self, packed: (looked.append(packed.nbytes),
                                                                        is_finite(self, packed))[1])
    stored, numbers = pack(state_of(Flux, FLUX), lambda _: "Q8_0")
    model = load(write_gguf(tmp_path / "flux.gguf", stored), "transformer")
    early, all_of_it = sum(looked), sum(value[0].nbytes for value in stored.values() if isinstance(value, tuple))
    assert 0 < early <= 100_000
    same_pictures(model, numbers)
    same_pictures(model, numbers)
    assert sum(looked) == all_of_it


def test_an_embedding_of_a_large_file_is_looked_at_where_it_is_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "CHECKED_AT_LOAD", 0)
    stored, _ = pack(state_of(T5Encoder, T5), lambda name: None if "relative" in name else "Q8_0")
    packed = stored["shared.weight"][0].copy()
    packed[7, :2] = (0, 0x7E)
    stored["shared.weight"] = packed, "Q8_0"
    table = load(write_gguf(tmp_path / "t5.gguf", stored), "t5").shared
    assert table(torch.tensor([[6, 8]])).isfinite().all()
    with pytest.raises(NotFinite, match="shared"):
        table(torch.tensor([[6, 7]]))


def test_a_scale_of_fp8_that_is_no_number_is_named(tmp_path: Path) -> None:
    stored, _ = fp8_state(state_of(Flux, FLUX), torch.float8_e4m3fn, {})
    stored["img_in.scale_weight"] = torch.tensor(float("nan"))
    save_file(stored, tmp_path / "flux.safetensors")
    assert "img_in" in refused(tmp_path / "flux.safetensors", NotFinite)
    stored["img_in.scale_weight"] = torch.ones(128, 1)
    save_file(stored, tmp_path / "flux.safetensors")
    assert "img_in.scale_weight" in refused(tmp_path / "flux.safetensors")


def retyped(path: Path, name: str, number: int) -> Path:
    """The file with another type for one tensor, written over the number in its header."""
    data = bytearray(path.read_bytes())
    text = struct.pack("<Q", len(name)) + name.encode()
    at = data.index(text) + len(text)
    dims = struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at + 4 + 8 * dims, number)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("number", "words"), [
    (99, "type that is not known"), (31, "Q4_0_4_4, a type that ggml has dropped"), (4, "Q4_2")])
def test_types_that_are_not_known_are_named(tmp_path: Path, number: int, words: str) -> None:
    stored, _ = pack(state_of(Flux, FLUX), lambda _: "Q8_0")
    message = refused(retyped(write_gguf(tmp_path / "flux.gguf", stored), BAD, number))
    assert words in message
    assert BAD in message


def test_types_without_meaning_as_weights_are_named(tmp_path: Path) -> None:
    stored, _ = pack(state_of(Flux, FLUX), lambda _: None)
    stored["img_in.bias"] = stored["img_in.bias"].int()
    assert "img_in.bias' (I32)" in refused(write_gguf(tmp_path / "flux.gguf", stored))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_scales_that_are_no_floats_are_named(tmp_path: Path, kind: torch.dtype) -> None:
    stored = {**state_of(Flux, FLUX), "img_in.scale_weight": torch.ones(1, dtype=kind)}
    save_file(stored, tmp_path / "flux.safetensors")
    assert "'img_in.scale_weight' (" in refused(tmp_path / "flux.safetensors")


def test_a_packed_scale_is_named(tmp_path: Path) -> None:
    stored, _ = pack(state_of(Flux, FLUX), lambda _: "Q8_0")
    stored["img_in.scale_weight"] = random_blocks("Q8_0", 1, 64), "Q8_0"
    assert "'img_in.scale_weight' (Q8_0)" in refused(write_gguf(tmp_path / "flux.gguf", stored))


def test_a_row_of_no_whole_blocks_is_refused(tmp_path: Path) -> None:
    """img_in is 64 wide: whole blocks of Q8_0, a quarter of one of Q4_K."""
    stored, _ = pack(state_of(Flux, FLUX), lambda _: "Q8_0")
    message = refused(retyped(write_gguf(tmp_path / "flux.gguf", stored), "img_in.weight", 12))
    assert "no multiple of the 256 weights in a block of Q4_K" in message


def test_codebooks_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _ = pack(state_of(Flux, FLUX), lambda _: "IQ2_XS")
    path = write_gguf(tmp_path / "flux.gguf", stored)
    for made in vars(codebooks).values():
        if hasattr(made, "cache_clear"):
            made.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = refused(path, FluxKitError)
    assert "IQ2_XS" in message
    assert "pip install gguf" in message


def test_another_shape_is_named(tmp_path: Path) -> None:
    stored, _ = pack(state_of(Flux, FLUX), lambda _: "Q8_0")
    stored["single_blocks.0.linear2.weight"] = random_blocks("Q8_0", 64, 1280), "Q8_0"
    assert "[64, 1280], expected [256, 1280]" in refused(write_gguf(tmp_path / "flux.gguf", stored))


def test_a_model_that_does_not_fit_keeps_its_layers(tmp_path: Path) -> None:
    from flux_kit.engine.weights import fill

    stored, _ = pack(state_of(Flux, replace(FLUX, depth=1)), lambda _: "Q8_0")
    packed = stored["final_layer.linear.weight"][0].copy()
    packed[0, :2] = (0, 0x7E)
    stored["final_layer.linear.weight"] = packed, "Q8_0"
    model = Flux(FLUX)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open_checkpoint(write_gguf(tmp_path / "flux.gguf", stored)) as checkpoint, pytest.raises(NotFinite):
        fill(model, checkpoint, detect(checkpoint).parts["transformer"])
    assert packed_layers(model) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
