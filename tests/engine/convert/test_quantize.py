"""Whole files: what is written is what gguf-py, safetensors and our own loader read; what fails leaves nothing."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compare import relative
from family import Family, random_weights
from flux_kit.engine.convert import RECIPES, quantize
from flux_kit.engine.convert.recipes import stored_type, written_name
from flux_kit.engine.convert.writers import Planned, gguf_layout
from flux_kit.engine.errors import BadInput, BadModelFile, FluxKitError, Interrupted, NotFinite
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import FluxSpec, T5Spec
from flux_kit.engine.text import find_tokenizer
from flux_kit.engine.weights import detect, load, open_checkpoint, to_diffusers
from gguf_files import quantise, unpack, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFESTS = Path(__file__).parents[2] / "data" / "manifests"
GGUF = [name for name, recipe in RECIPES.items() if recipe.container == "gguf"]
WIDE = FluxSpec(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=64, vec_in_dim=64)
BANDS = {
    # relative RMS error of Gaussian weights
    "F32": (0, 0), "F16": (0, 3e-4), "BF16": (0, 1.8e-3), "Q8_0": (4e-3, 6e-3), "Q6_K": (0.016, 0.02),
    "Q5_K": (0.033, 0.039), "Q5_1": (0.033, 0.041), "Q5_0": (0.038, 0.047), "Q4_K": (0.066, 0.077),
    "Q4_1": (0.07, 0.084), "Q4_0": (0.078, 0.092), "IQ4_NL": (0.07, 0.082), "IQ4_XS": (0.07, 0.083),
    "Q3_K": (0.14, 0.16), "Q2_K": (0.27, 0.32), "F8_E4M3": (0.02, 0.03), "I8": (3e-3, 0.012),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer whose rows hold whole blocks of 256, in fp16."""
    path = tmp_path_factory.mktemp("wide") / "wide.safetensors"
    save_file(random_weights(Flux(WIDE), 7), path)
    return path


@pytest.fixture
def dev(models: Path) -> Path:
    return models / "diffusion_models" / "flux1-dev.safetensors"


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    return found


def read_gguf(path: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and numbers of every tensor, by gguf-py."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        found[tensor.name] = tensor.tensor_type.name, torch.from_numpy(values).view(*map(int, reversed(tensor.shape)))
    return found


def fields(path: Path) -> Mapping[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("name", GGUF)
def test_every_type_is_read_by_gguf_py_and_by_us(wide: Path, tmp_path: Path, name: str) -> None:
    report = quantize(wide, tmp_path / "out.gguf", name)
    original, found = load_file(wide), read_gguf(tmp_path / "out.gguf")
    assert {key: values.shape for key, (_, values) in found.items()} == {k: v.shape for k, v in original.items()}
    for key, (kind, values) in found.items():
        low, high = BANDS[kind]
        assert low <= relative(values, original[key]) <= high, key
    with open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        part = detect(checkpoint).parts["transformer"]
        assert part.spec == WIDE and part.variant == "dev" and not part.problems
    ours = load(tmp_path / "out.gguf", "transformer", packed=None).state_dict()
    assert all(torch.equal(ours[key], values) for key, (_, values) in found.items())
    kinds = [kind for kind, _ in found.values()]
    assert report.types == {kind: kinds.count(kind) for kind in set(kinds)}
    assert report.bytes_after == (tmp_path / "out.gguf").stat().st_size
    assert found["single_blocks.0.linear1.weight"][0] == RECIPES[name].base
    assert left(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize("name", GGUF)
def test_a_miniature_takes_blocks_of_32(dev: Path, family: Family, tmp_path: Path, name: str) -> None:
    """Rows of 128 weights hold no block of 256: a type that is no worse takes its place."""
    report = quantize(dev, tmp_path / "out.gguf", name)
    found = read_gguf(tmp_path / "out.gguf")
    base, (low, high) = RECIPES[name].base, BANDS[RECIPES[name].base]
    assert detect(open_checkpoint(tmp_path / "out.gguf")).role == "transformer"
    for key, (kind, values) in found.items():
        assert relative(values, family.dev[key]) <= max(high, BANDS[kind][1])
        assert (kind == "F32") == (values.ndim == 1 or values.numel() <= 1024)
    assert found["single_blocks.0.linear1.weight"][0] == {
        "Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0", "IQ4_XS": "IQ4_NL", "Q3_K": "Q4_0", "Q2_K": "Q4_0",
    }.get(base, base)
    assert report.relative_error <= high and low == BANDS[base][0]


@pytest.mark.parametrize(("name", "gigabytes"), [
    ("Q2_K", 4.02), ("Q3_K_S", 5.23), ("Q3_K_M", 5.37), ("Q4_0", 6.80), ("Q4_K_S", 6.80), ("Q4_K_M", 6.93),
    ("Q4_1", 7.54), ("Q5_0", 8.28), ("Q5_K_S", 8.28), ("Q5_K_M", 8.42), ("Q5_1", 9.02), ("Q6_K", 9.85),
    ("Q8_0", 12.71)])
def test_sizes_of_flux1_dev_are_those_of_the_published_files(name: str, gigabytes: float) -> None:
    planned = _planned("flux_dev_bfl", name, "transformer", 19)
    assert gguf_layout(planned, {}).nbytes / 1e9 == pytest.approx(gigabytes, abs=0.006)
    kinds = [tensor.format for tensor in planned]
    assert (len(kinds), kinds.count("F32"), kinds.count("BF16")) == (780, 466, 10)
    mixed = {tensor.name for tensor in planned if tensor.format not in ("F32", "BF16", RECIPES[name].base)}
    assert len(mixed) == (38 if name.endswith("_M") else 0) and all("_attn.qkv." in tensor for tensor in mixed)


@pytest.mark.parametrize(("name", "gibibytes"), [("Q3_K_S", 1.96), ("Q5_K_S", 3.07), ("Q6_K", 3.64)])
def test_sizes_of_t5_xxl_are_those_of_the_published_files(name: str, gibibytes: float) -> None:
    planned = _planned("t5xxl_hf", name, "t5", 24)
    assert gguf_layout(planned, {}).nbytes / 2**30 == pytest.approx(gibibytes, abs=0.012)
    names = manifest("map_t5xxl_hf_to_gguf")
    assert {tensor.name for tensor in planned} == set(names.values()) and len(planned) == len(names)
    types = {tensor.name: tensor.format for tensor in planned}
    assert types["token_embd.weight"] == "Q6_K" and types["enc.blk.0.attn_rel_b.weight"] == "F32"


def _planned(name: str, type: str, role: str, layers: int) -> list[Planned]:
    recipe = RECIPES[type]
    return [Planned(written_name(recipe, role, key), tuple(shape),
                    stored_type(recipe, role, layers, key, tuple(shape), dtype, len(shape) == 2))
            for key, (shape, dtype) in manifest(name).items()]


def test_t5_goes_by_the_names_of_llama_cpp_and_takes_its_tokenizer_along(models: Path, family: Family,
                                                                       tmp_path: Path) -> None:
    source = models / "text_encoders" / "t5xxl_fp16.safetensors"
    quantize(source, tmp_path / "out.gguf", "Q8_0")
    names = manifest("map_t5xxl_hf_to_gguf")
    found, about = read_gguf(tmp_path / "out.gguf"), fields(tmp_path / "out.gguf")
    assert set(found) == {names[key] for key in family.t5}
    for key, original in family.t5.items():
        kind, values = found[names[key]]
        assert values.shape == original.shape and relative(values, original) <= BANDS[kind][1]
    wanted = {"general.architecture": "t5encoder", "general.file_type": 7, "t5encoder.block_count": 2,
              "t5encoder.embedding_length": 64, "t5encoder.feed_forward_length": 128,
              "t5encoder.attention.head_count": 1, "t5encoder.attention.relative_buckets_count": 32,
              "tokenizer.ggml.model": "t5", "tokenizer.ggml.add_eos_token": True}
    assert {key: about[key] for key in wanted} == wanted
    tokens = about["tokenizer.ggml.tokens"]
    assert len(tokens) == len(about["tokenizer.ggml.scores"]) == len(family.t5["shared.weight"])
    assert tokens[about["tokenizer.ggml.eos_token_id"]] == "</s>"
    prompt = "a large red circle on the left"
    before, after = (find_tokenizer("t5", path).ids(prompt) for path in (source, tmp_path / "out.gguf"))
    assert before == after and [tokens[i] for i in before] == [find_tokenizer("t5", source).vocabulary.token(i)
                                                               for i in before]
    # from GGUF to GGUF the same goes along
    quantize(tmp_path / "out.gguf", tmp_path / "again.gguf", "Q4_0")
    again = fields(tmp_path / "again.gguf")
    assert {key: value for key, value in again.items() if key.startswith("tokenizer.")} == {
        key: value for key, value in about.items() if key.startswith("tokenizer.")}


def test_clip_l(models: Path, family: Family, tmp_path: Path) -> None:
    quantize(models / "text_encoders" / "clip_l.safetensors", tmp_path / "out.gguf", "Q6_K")
    found = read_gguf(tmp_path / "out.gguf")
    assert {key: values.shape for key, (_, values) in found.items()} == {k: v.shape for k, v in family.clip_l.items()}
    assert found["text_model.embeddings.position_embedding.weight"][0] == "F16"
    load(tmp_path / "out.gguf", "clip_l")
    assert find_tokenizer("clip_l", tmp_path / "out.gguf").ids("a circle")


def _fp8_plain(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    stored = {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in state.items()}
    save_file(stored, path)
    return {key: value.float() for key, value in stored.items()}


def _fp8_scaled(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    wanted = {}
    for key, value in state.items():
        if value.ndim == 2:
            scale = value.float().abs().max() / 448
            stored[key] = (value.float() / scale).to(torch.float8_e4m3fn)
            stored[key.replace(".weight", ".scale_weight")] = scale
            wanted[key] = stored[key].float() * scale
        else:
            stored[key] = wanted[key] = value
    save_file(stored, path)
    return wanted


def _bf16_prefixed(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    stored = {f"model.diffusion_model.{key}": value.bfloat16() for key, value in state.items()}
    save_file(stored, path)
    return {key: value.bfloat16().float() for key, value in state.items()}


def _fp32_diffusers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    save_file(to_diffusers({key: value.float() for key, value in state.items()}, WIDE), path)
    return {key: value.float() for key, value in state.items()}


def _q8_0(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    packed = {key: quantise(value, "Q8_0") for key, value in state.items() if value.ndim == 2}
    write_gguf(path.with_suffix(".gguf"), {key: (packed[key], "Q8_0") if key in packed else value.float()
                                           for key, value in state.items()})
    return {key: unpack(packed[key], "Q8_0") if key in packed else value.float() for key, value in state.items()}


@pytest.mark.parametrize("make", [_fp8_plain, _fp8_scaled, _bf16_prefixed, _fp32_diffusers, _q8_0])
def test_every_kind_of_source(wide: Path, tmp_path: Path, make: Any) -> None:
    wanted = make(load_file(wide), tmp_path / "in.safetensors")
    (source,) = tmp_path.iterdir()
    quantize(source, tmp_path / "out.gguf", "Q4_1")
    found = read_gguf(tmp_path / "out.gguf")
    assert set(found) == set(wanted)
    for key, (kind, values) in found.items():
        assert relative(values, wanted[key]) <= BANDS[kind][1], key
    kept = {found[key][0] for key in ("img_in.weight", "final_layer.linear.weight", "time_in.in_layer.weight")}
    assert kept == {"BF16" if make is _bf16_prefixed else "F16"}


def test_what_is_of_the_type_already_is_copied_byte_by_byte(wide: Path, tmp_path: Path) -> None:
    quantize(wide, tmp_path / "a.gguf", "Q4_K_M")
    report = quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q4_K_M")
    assert report.relative_error == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_one_part_of_an_all_in_one(models: Path, family: Family, tmp_path: Path) -> None:
    source = models / "checkpoints" / "flux1-schnell-fp8.safetensors"
    with pytest.raises(BadModelFile, match="--part"):
        quantize(source, tmp_path / "out.gguf", "Q8_0")
    report = quantize(source, tmp_path / "out.gguf", "Q8_0", role="t5")
    assert report.role == "t5" and "transformer" in " ".join(report.notes)
    assert relative(read_gguf(tmp_path / "out.gguf")["token_embd.weight"][1], family.t5["shared.weight"]) < 0.006
    assert find_tokenizer("t5", tmp_path / "out.gguf").ids("circle")


def test_shards(wide: Path, tmp_path: Path) -> None:
    state = load_file(wide)
    folder = tmp_path / "model"
    folder.mkdir()
    names = sorted(state)
    halves = {"a-00001.safetensors": names[::2], "a-00002.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / file)
    (folder / "a.safetensors.index.json").write_text(
        json.dumps({"weight_map": {key: file for file, keys in halves.items() for key in keys}}))
    quantize(folder, tmp_path / "shards.gguf", "Q5_K_S")
    quantize(wide, tmp_path / "whole.gguf", "Q5_K_S")
    assert (tmp_path / "shards.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_scaled_fp8(wide: Path, tmp_path: Path) -> None:
    """Every linear layer with its scale, and the marker: what ComfyUI looks for."""
    quantize(wide, tmp_path / "out.safetensors", "fp8_scaled")
    found, original = load_file(tmp_path / "out.safetensors"), load_file(wide)
    marker = found.pop("scaled_fp8")
    assert (marker.dtype, marker.numel()) == (torch.float8_e4m3fn, 0)
    for key, value in original.items():
        if value.ndim == 2:
            scale = found[key.replace(".weight", ".scale_weight")]
            assert scale.shape == () and scale.dtype == torch.float32 and scale == scale.bfloat16()
            assert found[key].dtype == torch.float8_e4m3fn and 440 < found[key].float().abs().max() <= 448
            assert 0.02 < relative(found[key].float() * scale, value) < 0.03
            assert torch.equal(found[key].view(torch.uint8),
                               (value.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8))
        else:
            assert torch.equal(found[key], value)
    assert len(found) == len(original) + sum(value.ndim == 2 for value in original.values())
    ours = load(tmp_path / "out.safetensors", "transformer", packed=None).state_dict()
    assert relative(ours["img_in.weight"], original["img_in.weight"]) < 0.03


def test_int8_tensorwise(wide: Path, tmp_path: Path) -> None:
    quantize(wide, tmp_path / "out.safetensors", "int8_tensorwise")
    found, original = load_file(tmp_path / "out.safetensors"), load_file(wide)
    packed = [key for key, value in found.items() if value.dtype == torch.int8]
    assert len(packed) == 13 and not any(key.startswith(("img_in", "final_layer")) for key in packed)
    for key in packed:
        layer = key.removesuffix(".weight")
        scale = found[f"{layer}.weight_scale"]
        assert json.loads(bytes(found[f"{layer}.comfy_quant"].tolist())) == {"format": "int8_tensorwise"}
        assert scale.shape == (original[key].shape[0], 1) and found[key].abs().amax(1).min() == 127
        assert float((found[key] * scale - original[key].float()).abs().max()) <= 0.501 * float(scale.max())


def test_the_report_adds_up(wide: Path, tmp_path: Path) -> None:
    report = quantize(wide, tmp_path / "out.gguf", "Q3_K_M")
    found, original = read_gguf(tmp_path / "out.gguf"), load_file(wide)
    assert report.bytes_before == sum(2 * value.numel() for value in original.values())
    assert sum(row.weights for row in report.classes) == sum(value.numel() for value in original.values())
    assert sum(report.types.values()) == len(original)
    wanted = sorted(((relative(values, original[key]), key) for key, (_, values) in found.items()), reverse=True)
    assert [row.name for row in report.worst[:3]] == [key for _, key in wanted[:3]]
    assert report.worst[0].deviation.relative == pytest.approx(wanted[0][0], rel=1e-4)
    (qkv,) = (row for row in report.classes if row.name == "double_blocks.*.img_attn.qkv.weight")
    assert qkv.types == ("Q4_K",) and BANDS["Q4_K"][0] <= qkv.relative_error <= BANDS["Q4_K"][1]
    assert {"double_blocks.*.img_mlp.0.weight", "double_blocks.*.img_mlp.2.weight"} <= {
        row.name for row in report.classes}


def _damaged(path: Path, state: dict[str, Tensor], key: str, value: float) -> Path:
    save_file({**state, key: state[key].float().index_fill(0, torch.tensor([1]), value)}, path)
    return path


@pytest.mark.parametrize("type", ["fp8_scaled", "BF16"])
def test_errors_of_large_weights_are_numbers(tmp_path: Path, type: str) -> None:
    """The squares of such weights do not fit fp32."""
    state = {name: tensor.float() for name, tensor in random_weights(Flux(WIDE), 7).items()}
    state["img_in.weight"] *= 1e25
    save_file(state, tmp_path / "large.safetensors")
    ending = "gguf" if type == "BF16" else "safetensors"
    report = quantize(tmp_path / "large.safetensors", tmp_path / f"out.{ending}", type)
    (row,) = [row for row in report.rows if row.name == "img_in.weight"]
    written = load(tmp_path / f"out.{ending}", "transformer", packed=None).img_in.weight
    assert row.deviation.relative == pytest.approx(relative(written / 1e25, state["img_in.weight"] / 1e25), rel=1e-3)
    assert 0 < report.relative_error < 0.1


@pytest.mark.parametrize("type", ["Q4_K_S", "Q8_0", "BF16", "fp8_scaled", "int8_tensorwise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["single_blocks.0.linear1.weight", "img_in.bias"])
def test_nan_and_infinity_are_refused_by_name(wide: Path, tmp_path: Path, type: str, value: float, key: str) -> None:
    source = _damaged(tmp_path / "in.safetensors", load_file(wide), key, value)
    suffix = "gguf" if type in GGUF else "safetensors"
    with pytest.raises(NotFinite, match=key):
        quantize(source, tmp_path / f"out.{suffix}", type)
    assert left(tmp_path) == ["in.safetensors"]


def test_numbers_that_do_not_fit_are_refused_by_name(wide: Path, tmp_path: Path) -> None:
    source = _damaged(tmp_path / "in.safetensors", load_file(wide), "img_in.weight", 1e6)
    with pytest.raises(NotFinite, match=r"img_in\.weight.*1e\+06 do not fit F16"):
        quantize(source, tmp_path / "out.gguf", "Q4_0")
    quantize(source, tmp_path / "out.gguf", "BF16")
    assert read_gguf(tmp_path / "out.gguf")["img_in.weight"][1].max() == pytest.approx(1e6, rel=0.004)


def test_a_nan_scale_in_gguf_is_refused_even_where_blocks_are_copied(wide: Path, tmp_path: Path) -> None:
    quantize(wide, tmp_path / "in.gguf", "Q4_0")
    info = open_checkpoint(tmp_path / "in.gguf")["single_blocks.0.linear2.weight"]
    data = bytearray((tmp_path / "in.gguf").read_bytes())
    data[info.offset + 18:info.offset + 20] = b"\xff\x7f"
    (tmp_path / "in.gguf").write_bytes(data)
    with pytest.raises(NotFinite, match=r"linear2"):
        quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q4_0")
    assert left(tmp_path) == ["in.gguf"]


def test_places_that_cannot_be_written(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "there.gguf").write_bytes(b"precious")
    (tmp_path / "folder.gguf").mkdir()
    same = tmp_path / "same.safetensors"
    shutil.copy(wide, same)
    for path, type, message in (
            ("there.gguf", "Q8_0", "already"), ("folder.gguf", "Q8_0", "folder"), ("no/out.gguf", "Q8_0", "no folder"),
            ("out.safetensors", "Q8_0", r"must end in \.gguf"), ("out.gguf", "fp8_scaled", "must end in .safetensors"),
            ("out.gguf", "Q9_Z", "Q4_K_M")):
        with pytest.raises(BadInput, match=message):
            quantize(same, tmp_path / path, type)
    with pytest.raises(BadInput, match="same file"):
        quantize(same, same, "fp8_scaled", force=True)
    assert left(tmp_path) == ["folder.gguf", "same.safetensors", "there.gguf"]
    assert (tmp_path / "there.gguf").read_bytes() == b"precious"
    quantize(same, tmp_path / "there.gguf", "q8_0", force=True)
    assert (tmp_path / "there.gguf").read_bytes().startswith(b"GGUF")


def test_sources_of_another_kind(models: Path, wide: Path, tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="autoencoder"):
        quantize(models / "vae" / "ae.safetensors", tmp_path / "out.gguf", "Q8_0")
    with pytest.raises(BadModelFile, match="T5"):
        quantize(wide, tmp_path / "out.gguf", "Q8_0", role="t5")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(wide.read_bytes()[:-1000])
    with pytest.raises(BadModelFile, match="incomplete download"):
        quantize(cut, tmp_path / "out.gguf", "Q8_0")
    state = load_file(wide)
    del state["img_in.weight"]
    save_file(state, cut)
    with pytest.raises(BadModelFile, match=r"img_in\.weight"):
        quantize(cut, tmp_path / "out.gguf", "Q8_0")
    assert left(tmp_path) == ["cut.safetensors"]


def test_a_full_disk_is_told_before(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**5))
    with pytest.raises(FluxKitError, match="are free"):
        quantize(wide, tmp_path / "out.gguf", "Q8_0")
    assert left(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_is_named(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FluxKitError, match=r"out\.gguf: .*No space left on device.*nothing of it is left") as caught:
        quantize(wide, tmp_path / "out.gguf", "Q8_0")
    assert caught.value.file == str(tmp_path / "out.gguf") and left(tmp_path) == []


@pytest.mark.parametrize("error", [Interrupted("stop"), KeyboardInterrupt()])
def test_interrupted_leaves_what_was_there(wide: Path, tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out.gguf").write_bytes(b"precious")
    seen: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, name: str) -> None:
        seen.append((done, total, name))
        if done > total / 2:
            raise error

    with pytest.raises(type(error)):
        quantize(wide, tmp_path / "out.gguf", "Q8_0", force=True, progress=progress)
    assert left(tmp_path) == ["out.gguf"] and (tmp_path / "out.gguf").read_bytes() == b"precious"
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen) and seen[0][0] == 0


def test_progress_ends_with_all_weights(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_kit.engine.convert.files.TILE_WEIGHTS", {"cpu": 1 << 14})
    seen: list[tuple[int, int, str]] = []
    quantize(wide, tmp_path / "tiles.gguf", "Q8_0", progress=lambda *step: seen.append(step))
    total = sum(value.numel() for value in load_file(wide).values())
    assert seen[-1][:2] == (total, total) and len(seen) > 60
    monkeypatch.undo()
    quantize(wide, tmp_path / "whole.gguf", "Q8_0")
    assert (tmp_path / "tiles.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_source_that_changes_meanwhile_is_refused(wide: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    shutil.copy(wide, source)

    def progress(done: int, total: int, name: str) -> None:
        if done == total:
            os.utime(source, ns=(1, 1))

    with pytest.raises(BadModelFile, match="changed"):
        quantize(source, tmp_path / "out.gguf", "Q8_0", progress=progress)
    assert left(tmp_path) == ["in.safetensors"]


def test_a_t5_of_true_width_takes_k_types_as_llama_cpp_mixes_them(tmp_path: Path) -> None:
    spec = T5Spec(vocab_size=64, d_model=256, d_kv=64, num_heads=4, d_ff=256, num_layers=8)
    save_file(random_weights(T5Encoder(spec), 3), tmp_path / "t5.safetensors")
    quantize(tmp_path / "t5.safetensors", tmp_path / "out.gguf", "Q4_K_M")
    kinds = {key: kind for key, (kind, _) in read_gguf(tmp_path / "out.gguf").items()}
    assert kinds["token_embd.weight"] == "Q6_K" and kinds["enc.blk.0.attn_q.weight"] == "Q4_K"
    assert [kinds[f"enc.blk.{i}.ffn_down.weight"] for i in range(8)] == [
        "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"]
