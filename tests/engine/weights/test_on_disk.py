"""What lies on people's disks: a file of full size for each kind, told apart by its header alone, whatever its name."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit.engine.errors import BadModelFile
from flux_kit.engine.memory import estimate_weights
from flux_kit.engine.quant.fourbit import VALUES
from flux_kit.engine.weights import describe, lines_of, load, open_checkpoint
from sparse_files import Tensors, gguf_file, safetensors_file

Manifest = Callable[[str], Tensors]
COMFY = {"transformer": "model.diffusion_model.", "clip_l": "text_encoders.clip_l.transformer.",
         "t5": "text_encoders.t5xxl.transformer.", "vae": "vae."}
LISTS = {"transformer": "flux_dev_bfl", "clip_l": "clip_l_hf", "t5": "t5xxl_hf", "vae": "ae_bfl"}
BLOCKS = re.compile(r"(?:double|single)_blocks\.|transformer_blocks\.|encoder\.block\.\d+\.layer\.\d\.(?!.*bias)|blk\.")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "flux1-dev-fp8.safetensors"  # the name that two files share, and tells nothing


def typed(tensors: Tensors, matrices: str, others: str | None = None, prefix: str = "") -> Tensors:
    """In other types: matrices of blocks, and the rest (None: the same)."""
    return {prefix + name: (shape, matrices if others is None or (len(shape) == 2 and BLOCKS.search(name)) else others)
            for name, (shape, _) in tensors.items()}


def told(path: Path) -> dict[str, Any]:
    """The description, with the claims that hold for every file."""
    found = describe(path, lambda checkpoint, parts: estimate_weights(checkpoint, parts, torch.bfloat16))
    assert all(line.isprintable() for line in lines_of(found))
    return found


def check(path: Path, role: str, variant: str | None, layout: str, precision: set[str], **parts: str) -> dict[str, Any]:
    """`parts`: role -> prefix; one without a prefix unless given."""
    found = told(path)
    assert (found["problems"], found["missing"]) == ([], [])
    assert (found["role"], found["variant"], found["layout"]) == (role, variant, layout)
    assert set(found["precision"]) == precision
    assert {part["role"]: part["prefix"] for part in found["parts"]} == (parts or {role: ""})
    return found


# ------------------------------------------------------------------------------------------------- safetensors

def all_in_one(manifest: Manifest, transformer: str = "F8_E4M3") -> Tensors:
    types = {"transformer": transformer, "clip_l": "F16", "t5": "F8_E4M3", "vae": "F32"}
    return {name: info for role, prefix in COMFY.items()
            for name, info in typed(manifest(LISTS[role]), types[role], prefix=prefix).items()}


def test_the_all_in_one_of_17_gb(manifest: Manifest, file: Path) -> None:
    tensors = all_in_one(manifest)
    tensors[COMFY["clip_l"] + "text_projection.weight"] = (768, 768), "F16"
    tensors["text_encoders.t5xxl.logit_scale"] = (), "F32"
    found = check(safetensors_file(file, tensors), "all-in-one", "dev", "bfl", {"F8_E4M3", "F16", "F32"}, **COMFY)
    assert 17.0e9 < found["bytes"] < 17.5e9
    assert found["absent"] == []
    by_role = {part["role"]: part for part in found["parts"]}
    assert by_role["transformer"]["bytes"] == 11_901_408_320
    assert by_role["vae"]["precision"] == {"F32": 244}
    # fp8 stays packed in linear layers, the rest becomes bf16
    assert 11.9e9 < found["memory"]["transformer"] < 12.0e9
    assert found["memory"]["vae"] == 2 * by_role["vae"]["parameters"]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_the_transformer_of_12_gb_of_the_same_name(manifest: Manifest, file: Path, dtype: str) -> None:
    found = check(safetensors_file(file, typed(manifest("flux_dev_bfl"), dtype)), "transformer", "dev", "bfl", {dtype})
    assert found["absent"] == ["clip_l", "t5", "vae"]
    assert any("not inside: CLIP-L, T5, autoencoder" in line for line in lines_of(found))


def scaled(tensors: Tensors, keys: tuple[str, ...], shape: tuple[int, ...] = ()) -> Tensors:
    """Linear layers of blocks in fp8 with scales beside them."""
    found = typed(tensors, "F8_E4M3", "BF16")
    for name, (_, dtype) in list(found.items()):
        if dtype == "F8_E4M3":
            found |= {f"{name.removesuffix('.weight')}.{key}": (shape, "F32") for key in keys}
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("spelling", ["scale_weight", "scale_weight and scale_input", "of one element", "weight_scale"])
def test_scaled_fp8(manifest: Manifest, file: Path, spelling: str, prefix: str) -> None:
    keys = {"scale_weight": ("scale_weight",), "weight_scale": ("weight_scale", "input_scale")}.get(
        spelling, ("scale_weight", "scale_input"))
    tensors = scaled(manifest("flux_dev_bfl"), keys, (1,) if spelling == "of one element" else ())
    if keys[0] == "scale_weight":
        tensors["scaled_fp8"] = (2 if spelling == "of one element" else 0,), "F8_E4M3"
    check(safetensors_file(file, {prefix + name: info for name, info in tensors.items()}), "transformer", "dev", "bfl",
          {"F8_E4M3", "BF16", "F32"}, transformer=prefix)


@pytest.mark.parametrize("where", ["tensors", "header"])
def test_scaled_fp8_as_comfy_quant(manifest: Manifest, file: Path, where: str) -> None:
    tensors = scaled(manifest("flux_dev_bfl"), ("weight_scale",))
    layers = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    assert len(layers) == 304
    config = json.dumps({"format": "float8_e4m3fn"}).encode()
    if where == "tensors":
        tensors |= {f"{layer}.comfy_quant": ((len(config),), "U8") for layer in layers}
        safetensors_file(file, tensors, data={f"{layer}.comfy_quant": config for layer in layers})
    else:
        safetensors_file(file, tensors, metadata={"_quantization_metadata": json.dumps(
            {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}})})
    check(file, "transformer", "dev", "bfl", {"F8_E4M3", "BF16", "F32"})


def test_a_scaled_t5(manifest: Manifest, file: Path) -> None:
    tensors = scaled(manifest("t5xxl_hf"), ("scale_weight",))
    safetensors_file(file, {**tensors, "scaled_fp8": ((0,), "F8_E4M3"), "spiece_model": ((791_656,), "U8")})
    found = check(file, "t5", None, "hf", {"F8_E4M3", "BF16", "F32", "U8"})
    assert set(found["ignored"]) == {"scaled_fp8", "spiece_model"}


@pytest.mark.parametrize("prefix", ["model.", "diffusion_model.", "net.", "model.diffusion_model."])
def test_merges_with_a_prefix_and_leftovers(manifest: Manifest, file: Path, prefix: str) -> None:
    tensors = typed(manifest("flux_dev_bfl"), "F16", "F32", prefix)
    tensors[f"{prefix}img_in.weight"] = (3072, 64), "BF16"
    leftovers: Tensors = {"text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight": ((4096,), "F16"),
                          "first_stage_model.decoder.norm_out.bias": ((128,), "F32")}
    found = check(safetensors_file(file, {**tensors, **leftovers}), "transformer", "dev", "bfl", {"F16", "F32", "BF16"},
                  transformer=prefix)
    with open_checkpoint(file) as checkpoint:
        assert set(checkpoint) - {prefix + name for name in manifest("flux_dev_bfl")} == set(leftovers)
    assert found["absent"] == ["clip_l", "t5", "vae"]


def test_an_all_in_one_without_t5(manifest: Manifest, file: Path) -> None:
    tensors = {name: info for name, info in all_in_one(manifest).items() if "t5xxl" not in name}
    found = check(safetensors_file(file, tensors), "all-in-one", "dev", "bfl", {"F8_E4M3", "F16", "F32"},
                  **{role: prefix for role, prefix in COMFY.items() if role != "t5"})
    assert found["absent"] == ["t5"]
    assert any("not inside: T5; load it" in line for line in lines_of(found))


def test_norms_as_comfyui_saves_them(manifest: Manifest, file: Path) -> None:
    tensors = {COMFY["transformer"] + re.sub(r"_norm\.scale$", "_norm.weight", name): info
               for name, info in manifest("flux_dev_bfl").items()}
    assert sum(name.endswith("query_norm.weight") for name in tensors) == 19 * 2 + 38
    check(safetensors_file(file, tensors), "transformer", "dev", "bfl", {"BF16"}, transformer=COMFY["transformer"])


def nf4(tensors: Tensors, nested: bool, kind: str = "nf4") -> tuple[Tensors, dict[str, bytes]]:
    """Matrices of blocks as bitsandbytes stores them, and the data of tables and states."""
    found: Tensors = {}
    data: dict[str, bytes] = {}
    for name, (shape, dtype) in tensors.items():
        if len(shape) != 2 or not BLOCKS.search(name):
            found[name] = shape, dtype
            continue
        count = math.prod(shape)
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
        found[name] = (count // 2, 1), "U8"
        found[f"{name}.absmax"] = (count // 64,), "U8" if nested else "F32"
        found[f"{name}.quant_map"] = (16,), "F32"
        data[f"{name}.quant_map"] = torch.tensor(VALUES[kind.upper()]).numpy().tobytes()
        if nested:
            state |= {"nested_blocksize": 256, "nested_offset": 0.25, "nested_dtype": "float32"}
            found[f"{name}.nested_absmax"] = (-(-count // 64 // 256),), "F32"
            found[f"{name}.nested_quant_map"] = (256,), "F32"
        text = json.dumps(state).encode()
        found[f"{name}.quant_state.bitsandbytes__{kind}"] = (len(text),), "U8"
        data[f"{name}.quant_state.bitsandbytes__{kind}"] = text
    return found, data


@pytest.mark.parametrize(("nested", "kind"), [(True, "nf4"), (False, "nf4"), (False, "fp4")])
def test_nf4_with_everything_and_alone(manifest: Manifest, file: Path, nested: bool, kind: str) -> None:
    tensors, data = nf4(manifest("flux_dev_bfl"), nested, kind)
    found = check(safetensors_file(file, tensors, data=data), "transformer", "dev", "bfl", {kind.upper(), "BF16"})
    assert found["precision"][kind.upper()] == 304
    assert found["parameters"] == 11_901_408_320
    assert found["absent"] == ["clip_l", "t5", "vae"]
    prefix = COMFY["transformer"]
    others = {name: info for name, info in all_in_one(manifest).items() if not name.startswith(prefix)}
    whole = {**{prefix + name: info for name, info in tensors.items()}, **others}
    safetensors_file(file, whole, data={prefix + name: content for name, content in data.items()})
    found = check(file, "all-in-one", "dev", "bfl", {kind.upper(), "BF16", "F8_E4M3", "F16", "F32"}, **COMFY)
    assert found["memory"]["transformer"] < 7.5e9


# ------------------------------------------------------------------------------------------------- GGUF

GGUF_NAME = "flux1-dev-Q4_K_S.gguf"


@pytest.mark.parametrize("arch", ["flux", "pig", "cow", None])
@pytest.mark.parametrize(("model", "variant"), [
    ("flux_dev_bfl", "dev"), ("flux_schnell_bfl", "schnell"), ("flux_fill_bfl", "fill"),
    ("flux_control_bfl", "control")])
def test_gguf_of_any_architecture_string(manifest: Manifest, tmp_path: Path, arch: str | None, model: str,
                                         variant: str) -> None:
    path = gguf_file(tmp_path / GGUF_NAME, typed(manifest(model), "Q4_K", "F32"), arch)
    found = check(path, "transformer", variant, "bfl", {"Q4_K", "F32"})
    assert found["precision"]["Q4_K"] == 304
    assert found["memory"]["transformer"] < found["bytes"]  # what is F32 there becomes bf16


def test_gguf_sizes_are_the_published_ones(manifest: Manifest, tmp_path: Path) -> None:
    """Of files whose matrices outside the blocks are F16."""
    sizes = {"Q4_0": 6.80, "Q5_K": 8.28, "Q6_K": 9.85, "Q8_0": 12.71, "Q2_K": 4.02, "Q3_K": 5.23}
    for kind, gigabytes in sizes.items():
        tensors = {name: (shape, dtype if dtype != "F32" or len(shape) == 1 else "F16")
                   for name, (shape, dtype) in typed(manifest("flux_dev_bfl"), kind, "F32").items()}
        found = told(gguf_file(tmp_path / GGUF_NAME, tensors))
        assert abs(found["bytes"] / 1e9 - gigabytes) < 0.02, kind


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_gguf_with_a_prefix(manifest: Manifest, tmp_path: Path, prefix: str) -> None:
    path = gguf_file(tmp_path / GGUF_NAME, typed(manifest("flux_dev_bfl"), "Q5_K", "F16", prefix))
    check(path, "transformer", "dev", "bfl", {"Q5_K", "F16"}, transformer=prefix)


def test_gguf_with_everything_in_it(manifest: Manifest, tmp_path: Path) -> None:
    types = {"transformer": "Q4_0", "clip_l": "F16", "t5": "Q8_0", "vae": "F16"}
    tensors = {name: info for role, prefix in COMFY.items()
               for name, info in typed(manifest(LISTS[role]), types[role], "F16", prefix).items()}
    check(gguf_file(tmp_path / GGUF_NAME, tensors, None), "all-in-one", "dev", "bfl", {"Q4_0", "F16", "Q8_0"}, **COMFY)


@pytest.mark.parametrize("arch", ["flux", None])
def test_gguf_with_diffusers_names(manifest: Manifest, tmp_path: Path, arch: str | None) -> None:
    path = gguf_file(tmp_path / GGUF_NAME, typed(manifest("flux_dev_diffusers"), "Q4_K", "F32"), arch)
    check(path, "transformer", "dev", "diffusers", {"Q4_K", "F32"})


def test_gguf_mixes_by_layer(manifest: Manifest, tmp_path: Path) -> None:
    tensors = typed(manifest("flux_dev_bfl"), "Q5_1", "BF16")
    kinds = ("Q8_0", "Q4_1", "IQ4_XS", "TQ1_0", "IQ1_S", "Q3_K")
    for i, name in enumerate(name for name, (_, kind) in list(tensors.items()) if kind == "Q5_1"):
        tensors[name] = tensors[name][0], kinds[i % 6]
    tensors["final_layer.linear.weight"] = (64, 3072), "Q6_K"
    check(gguf_file(tmp_path / GGUF_NAME, tensors), "transformer", "dev", "bfl", {*kinds, "BF16", "Q6_K"})


LLAMA_CPP = (
    ("shared.", "token_embd."), ("encoder.final_layer_norm.", "enc.output_norm."), ("encoder.block.", "enc.blk."),
    ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"), ("layer.0.layer_norm", "attn_norm"),
    ("layer.0.SelfAttention.", "attn_"), ("layer.1.layer_norm", "ffn_norm"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"), ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn_down"))


@pytest.mark.parametrize("arch", ["t5encoder", "t5", "pig", None])
def test_t5_in_gguf(manifest: Manifest, tmp_path: Path, arch: str | None) -> None:
    tensors: Tensors = {}
    for name, (shape, _) in manifest("t5xxl_hf").items():
        for ours, theirs in LLAMA_CPP:
            name = name.replace(ours, theirs)
        tensors[name] = shape, "Q5_K" if len(shape) == 2 and "rel_b" not in name else "F32"
    check(gguf_file(tmp_path / "t5-v1_1-xxl-encoder-Q5_K_S.gguf", tensors, arch), "t5", None, "gguf", {"Q5_K", "F32"})
    names = typed(manifest("t5xxl_hf"), "Q8_0", "F32")
    check(gguf_file(tmp_path / "t5.gguf", names, arch), "t5", None, "hf", {"Q8_0", "F32"})


def test_clip_l_in_gguf(manifest: Manifest, tmp_path: Path) -> None:
    tensors = {name: (shape, "Q8_0" if len(shape) == 2 else "F32")
               for name, (shape, _) in manifest("clip_l_hf").items()}
    check(gguf_file(tmp_path / "clip_l.gguf", tensors, "pig"), "clip_l", None, "hf", {"Q8_0", "F32"})


@pytest.mark.parametrize("kind", ["Q8_1", "Q1_0"])
def test_types_that_weights_cannot_be_loaded_from_are_named(manifest: Manifest, tmp_path: Path, kind: str) -> None:
    """ggml's own, so the file opens; one is for activations, the other has no published use here."""
    path = gguf_file(tmp_path / GGUF_NAME, typed(manifest("flux_dev_bfl"), kind, "F32"))
    found = told(path)
    assert (found["role"], found["precision"][kind]) == ("transformer", 304)
    assert f"({kind})" in found["problems"][0]
    with pytest.raises(BadModelFile, match=kind):
        load(path, "transformer")


def test_bytes_behind_the_data_are_told(manifest: Manifest, tmp_path: Path) -> None:
    """llama.cpp opens such a file, and so do we; but not in silence."""
    path = gguf_file(tmp_path / "clip_l.gguf", typed(manifest("clip_l_hf"), "F16"))
    assert told(path)["notes"] == []
    with path.open("ab") as out:
        out.write(bytes(5000))
    assert told(path)["notes"] == ["5000 bytes after the last tensor are not used"]


# ------------------------------------------------------------------------------------------------- encoders

@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3"])
def test_t5_files(manifest: Manifest, file: Path, dtype: str) -> None:
    for extra in ({}, {"encoder.embed_tokens.weight": ((32128, 4096), dtype)}):
        check(safetensors_file(file, {**typed(manifest("t5xxl_hf"), dtype), **extra}), "t5", None, "hf", {dtype})
    renamed = {name.replace("shared.", "encoder.embed_tokens."): info
               for name, info in typed(manifest("t5xxl_hf"), dtype).items()}
    check(safetensors_file(file, renamed), "t5", None, "hf", {dtype})


def test_a_whole_clip_of_the_vit_l_files(manifest: Manifest, file: Path) -> None:
    """ViT-L-14-*.safetensors: both towers, a float temperature, positions as whole numbers."""
    vision: Tensors = {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": ((4096, 1024), "F32") for i in range(24)}
    vision |= {"vision_model.embeddings.class_embedding": ((1024,), "F32"), "logit_scale": ((), "F32"),
               "vision_model.embeddings.patch_embedding.weight": ((1024, 3, 14, 14), "F32"),
               "text_model.embeddings.position_ids": ((1, 77), "I64"), "text_projection.weight": ((768, 768), "F32")}
    found = check(safetensors_file(file, {**typed(manifest("clip_l_hf"), "F32"), **vision}), "clip_l", None, "hf",
                  {"F32", "I64"})
    assert len(found["ignored"]) == len(vision)


# ------------------------------------------------------------------------------------------------- not read here

def _svdquant() -> Tensors:
    """nunchaku's names: fused, in tiles for its kernels."""
    tensors: Tensors = {}
    for i in range(19):
        for layer in ("qkv_proj", "qkv_proj_context", "out_proj", "mlp_fc1", "mlp_context_fc2"):
            base = f"transformer_blocks.{i}.{layer}"
            tensors |= {f"{base}.qweight": ((9216, 1536), "I8"), f"{base}.wscales": ((48, 9216), "BF16"),
                        f"{base}.smooth": ((3072,), "BF16"), f"{base}.smooth_orig": ((3072,), "BF16"),
                        f"{base}.lora_down": ((3072, 32), "BF16"), f"{base}.lora_up": ((9216, 32), "BF16"),
                        f"{base}.bias": ((9216,), "BF16")}
        tensors |= {f"transformer_blocks.{i}.norm1.linear.qweight": ((4608, 1536), "I32"),
                    f"transformer_blocks.{i}.norm1.linear.wzeros": ((48, 18432), "BF16")}
    for i in range(38):
        tensors |= {f"single_transformer_blocks.{i}.mlp_fc1.qweight": ((12288, 1536), "I8"),
                    f"single_transformer_blocks.{i}.mlp_fc1.wscales": ((48, 12288), "BF16"),
                    f"single_transformer_blocks.{i}.norm.linear.qweight": ((2304, 1536), "I32")}
    return tensors


def _with(tensors: Tensors, pattern: str, dtype: str, *sides: str) -> Tensors:
    """Matrices whose names match in `dtype`, with side tensors; `{}` stands for the name of the layer."""
    found: Tensors = {}
    for name, (shape, kind) in tensors.items():
        hit = len(shape) == 2 and re.search(pattern, name)
        found[name] = shape, dtype if hit else kind
        if hit:
            found |= {side.format(name.removesuffix(".weight")): ((shape[0], 1), "F32") for side in sides}
    return found


BLOCK = r"transformer_blocks\."
FOREIGN: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, str], str]] = {
    "SVDQuant": (lambda _: _svdquant(), {"quantization_config": '{"method": "svdquant", "rank": 32}'}, "nunchaku"),
    "torchao": (lambda tensors: {
        name.replace(".weight", "._weight_qdata") if len(info[0]) == 2 and BLOCK in name else name: info
        for name, info in _with(tensors, BLOCK, "I8", "{}._weight_scale").items()}, {"tensor_names": "[]"}, "torchao"),
    "quanto": (lambda tensors: {
        name.replace(".weight", ".weight._data") if info[1] == "I8" else name: info
        for name, info in _with(tensors, BLOCK, "I8", "{}.weight._scale").items()}, {}, "quanto"),
    "8-bit": (lambda tensors: _with(tensors, BLOCK, "I8", "{}.SCB"), {}, "bitsandbytes"),
}


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_other_packings_are_named_with_what_to_use_instead(manifest: Manifest, file: Path, kind: str) -> None:
    make, metadata, word = FOREIGN[kind]
    found = told(safetensors_file(file, make(manifest("flux_dev_diffusers")), metadata=metadata))
    assert found["role"] == "transformer"
    problem = found["problems"][0]
    assert word in problem
    assert "GGUF" in problem  # what to use


@pytest.mark.parametrize(("config", "word"), [
    ({"quant_method": "quanto", "weights_dtype": "int8"}, "quanto"), ({"quant_method": "sdnq"}, "SDNQ"),
    ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    ({"quant_method": "auto-round", "bits": 4}, "AutoRound")])
def test_folders_whose_config_names_the_method(manifest: Manifest, tmp_path: Path, config: dict[str, Any],
                                               word: str) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    safetensors_file(folder / "diffusion_pytorch_model.safetensors", _with(manifest("flux_dev_diffusers"), BLOCK, "I8"))
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel",
                                                    "quantization_config": config}))
    found = told(folder)
    assert found["role"] == "transformer"
    assert word in found["problems"][0]


def test_an_awq_t5_is_named(file: Path) -> None:
    tensors: Tensors = {f"encoder.block.{i}.layer.0.SelfAttention.{name}.{side}": ((1024, 2048), "I32")
                        for i in range(24) for name in "qkvo" for side in ("qweight", "scales", "scaled_zeros")}
    tensors |= {f"encoder.block.{i}.layer.0.layer_norm.weight": ((4096,), "BF16") for i in range(24)}
    found = told(safetensors_file(file, {**tensors, "shared.weight": ((32128, 4096), "BF16")}))
    assert found["role"] == "t5"
    assert "AWQ" in found["problems"][0]
