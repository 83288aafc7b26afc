"""Every format resolves whole, no key has two meanings, and what is no FLUX.1 LoRA is named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit.engine.adapters import Options, inspect_lora, read_lora
from flux_kit.engine.adapters import vocabulary as v
from flux_kit.engine.adapters.dialects import DIALECTS, SUFFIXES, candidates, place, skipped, spelled, stems
from flux_kit.engine.errors import BadModelFile, MissingFile, NotFinite
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import CLIP_L, FLUX_DEV, T5_XXL
from flux_kit.engine.weights import open_checkpoint

MORE = {  # formats that are described but have no list: a few of their keys each
    "fal_kontext": ["base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight",
                    "base_model.model.final_layer.linear.lora_B.weight"],
    "musubi_mangled": ["diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight",
                       "diffusion_model.double_blocks.18.txt_mlp_2.lora_B.weight"],
    "peft_mlx_nosuffix": ["transformer.transformer_blocks.3.attn.to_k.lora_A",
                          "transformer.single_transformer_blocks.37.proj_out.lora_B"],
    "peft_base_model_prefix": ["transformer.base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight"],
    "kohya_prefix_diffusers_names_underscore": [
        "lora_unet_single_transformer_blocks_0_attn_to_k_.lora_down.weight",
        "lora_unet_transformer_blocks_0_attn_to_out_0_.alpha"],
    "ai_toolkit_te": ["lora_te1.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"],
    "transformers_5_te": ["text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"],
    "onetrainer_omi": ["transformer.double_blocks.0.img_attn.qkv.0.lora_down.weight",
                       "transformer.single_blocks.0.linear1.3.lora_up.weight"],
    "onetrainer_oft2": ["lora_transformer_transformer_blocks_0_attn_to_q.oft_R.weight"],
    "onetrainer_dora_magnitude": ["transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector.weight"],
    "lycoris_glora": ["lora_unet_double_blocks_0_img_attn_qkv.a1.weight",
                      "lora_unet_double_blocks_0_img_attn_qkv.b2.weight"],
    "ai_toolkit_lokr_old": ["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"],
    "xlabs_diffusion_model": ["diffusion_model.double_blocks.0.processor.proj_lora2.up.weight"],
    "kohya_in_layers": ["lora_unet_img_in.lora_down.weight", "lora_unet_guidance_in_in_layer.alpha"],
    "t5": ["text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
           "lora_te3_encoder_block_23_layer_1_DenseReluDense_wo.lora_up.weight"],
    "comfy_norms": ["diffusion_model.single_blocks.0.norm.key_norm.scale.diff"],
}


def test_every_list_resolves_whole(lists: Any) -> None:
    for name, keys in lists.items():
        if not name.startswith("neg_"):
            assert [key for key in keys if place(key, keys) is None and skipped(key) is None] == [], name


@pytest.mark.parametrize("name", MORE)
def test_every_described_format_resolves(name: str) -> None:
    assert all(len(list(candidates(key, MORE[name]))) == 1 for key in MORE[name])


def test_no_key_is_claimed_twice(lists: Any) -> None:
    """Of the keys of all files, and of every spelling the tables can produce with every suffix."""
    for name, keys in lists.items():
        assert [key for key in keys if len(list(candidates(key, keys))) > 1] == [], name
    every = [(stem, suffix) for stem in list(stems())[::101] for suffix in SUFFIXES]
    for stem, suffix in every:
        key = stem + suffix.text
        found = list(candidates(key, {key} if suffix.beside is None else {key, stem + suffix.beside}))
        meant = {(one.stem, one.role) for one in found}
        assert len(meant) == len(found) <= 1 or suffix.beside is not None, key


def test_dialects_that_spell_alike_mean_the_same() -> None:
    seen: dict[str, Any] = {}
    for dialect in DIALECTS:
        for name, destination in dialect.vocabulary().items():
            for prefix in dialect.prefixes:
                for ending in dialect.endings:
                    key = spelled(dialect, prefix, name, ending)
                    assert seen.setdefault(key, destination) == destination, key


@pytest.mark.parametrize("model, spec, role", [(Flux, FLUX_DEV, "transformer"), (ClipText, CLIP_L, "clip_l"),
                                               (T5Encoder, T5_XXL, "t5")])
def test_vocabularies_name_every_layer_of_the_models_with_its_size(model: Any, spec: Any, role: str) -> None:
    with torch.device("meta"):
        built = model(spec)
    sizes = {name.rpartition(".")[0]: tuple(tensor.shape) for name, tensor in built.state_dict().items()
             if not name.endswith(".bias")}
    ours = {"transformer": v.bfl, "clip_l": v.clip_l, "t5": v.t5}[role]()
    assert {place.module: v.BASES[0].size(place) for place in ours.values()} == sizes


def test_diffusers_rows_are_those_of_the_row_exact_map(manifest_map: dict[str, Any]) -> None:
    """Against the published map of BFL's tensors to diffusers'."""
    table = v.diffusers()
    checked = 0
    for ours, entry in manifest_map.items():
        if not ours.endswith(".weight"):
            continue
        for theirs, first, rows in entry["to"]:
            place = table[theirs.removesuffix(".weight")]
            found = place.rows(v.BASES[0].size(place))
            assert (place.module, found.start, found.stop) == (ours.removesuffix(".weight"), first, first + rows)
            assert place.swapped == (entry["op"] == "swap_halves")
            checked += 1
    assert checked == 504


@pytest.fixture(scope="module")
def manifest_map() -> dict[str, Any]:
    import gzip
    path = Path(__file__).parents[2] / "data" / "manifests" / "map_flux_bfl_to_diffusers.json.gz"
    return dict(json.loads(gzip.decompress(path.read_bytes())))


POSITIVE = {"kohya": ("kohya", 304, (16,)), "peft_uneven": None, "xlabs": ("XLabs", 76, (16,)),
            "kohya_te1_te3": ("kohya", 304, (8, 16)), "bfl_control": ("BFL", 466, (16,)),
            "onetrainer_legacy": ("OneTrainer", 314, (16,)), "lycoris_lokr_both": ("kohya", 304, (4,)),
            "ai_toolkit_lokr": ("PEFT", 304, ()), "lycoris_boft": ("kohya", 152, ()), "uso": ("XLabs", 152, (16,))}


@pytest.mark.parametrize("name", [name for name, told in POSITIVE.items() if told])
def test_reports_of_published_formats(name: str, lists: Any, sparse: Any) -> None:
    told = POSITIVE[name]
    assert told is not None
    report = inspect_lora(open_checkpoint(sparse(lists[name])))
    assert (report.format, report.targets["transformer"], report.ranks) == told
    assert report.problems == () and report.unmatched == () and report.base == "FLUX.1"
    said = report.as_json()
    assert said["matched"] + len(said["skipped"]) == len(lists[name]) and said["unmatched"] == 0


def test_every_positive_list_can_be_applied(lists: Any, sparse: Any) -> None:
    for name, keys in lists.items():
        if not name.startswith("neg_"):
            report = inspect_lora(open_checkpoint(sparse(keys, name=f"{name}.safetensors")))
            assert report.problems == () and report.unmatched == () and report.targets, name


def respelled(keys: Any, *pairs: tuple[str, str]) -> dict[str, Any]:
    """A list of keys in another spelling."""
    found = {}
    for key, info in keys.items():
        for pattern, text in pairs:
            key = re.sub(pattern, text, key)
        found[key] = info
    return found


def only(keys: Any, pattern: str) -> dict[str, Any]:
    return {key: info for key, info in keys.items() if re.search(pattern, key)}


DERIVED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "fal_kontext": lambda k: respelled(k["bfl_bare"], ("^", "base_model.model.")),
    "musubi_mangled": lambda k: respelled(k["bfl_peft"], (r"(blocks\.\d+\.\w+)\.(\w+)\.lora", r"\1_\2.lora")),
    "peft_mlx_nosuffix": lambda k: respelled(k["peft_all_linear"], (r"\.weight$", "")),
    "peft_base_model_prefix": lambda k: respelled(
        k["peft_all_blocks"], ("^transformer.", "transformer.base_model.model.")),
    "kohya_prefix_diffusers_names_underscore": lambda k: respelled(
        k["kohya_prefix_diffusers_names"], (r"\.(lora_(?:down|up)\.weight|alpha)$", r"_.\1")),
    "ai_toolkit_te": lambda k: k["peft_all_blocks"] | respelled(
        only(k["peft_te"], "^text_encoder"), ("^text_encoder.", "lora_te1.")),
    "te_of_transformers_5": lambda k: respelled(k["peft_te"], (r"\.text_model", "")),
    "xlabs_diffusion_model": lambda k: respelled(k["xlabs"], ("^", "diffusion_model.")),
    "ai_toolkit_lokr_old": lambda k: k["simpletuner_lokr"],
    "onetrainer_dora_peft": lambda k: respelled(k["peft_dora"], (r"(magnitude_vector)$", r"\1.weight")),
    "onetrainer_omi": lambda k: {
        f"transformer.{kind}.{i}.{module}.{part}.{side}": (shape, "BF16")
        for kind, count, module, sizes in (("double_blocks", 19, "img_attn.qkv", [3072] * 3),
                                           ("single_blocks", 38, "linear1", [3072] * 3 + [12288]))
        for i in range(count) for part, size in enumerate(sizes)
        for side, shape in (("lora_down.weight", (16, 3072)), ("lora_up.weight", (size, 16)), ("alpha", ()))},
    "onetrainer_oft2": lambda k: {
        re.sub(r"lora_down\.weight$", "oft_R.weight", key): ((shape[1] // 32, 496), "BF16")
        for key, (shape, _) in k["onetrainer_legacy_dit"].items() if key.endswith("lora_down.weight")},
    "lycoris_glora": lambda k: {
        key.replace("lora_down", name): (shape_of(shape, k["kohya"][key.replace("down", "up")][0])[name], "F16")
        for key, (shape, _) in k["kohya"].items() if "lora_down" in key for name in ("a1", "a2", "b1", "b2")},
    "peft_uneven_ranks": lambda k: {
        key: (tuple(8 if "to_k" in key and side == 16 else side for side in shape), dtype)
        for key, (shape, dtype) in k["peft_attn"].items()},
    "lycoris_tucker_free_full_lokr": lambda k: respelled(k["ai_toolkit_lokr"], ("^transformer.", "")),
}


def shape_of(down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    return {"a1": (down[1], down[0]), "a2": (down[0], down[1]), "b1": (up[0], down[0]), "b2": (down[0], down[1])}


@pytest.mark.parametrize("name", DERIVED)
def test_described_formats_without_a_list(name: str, lists: Any, sparse: Any) -> None:
    keys = DERIVED[name](lists)
    report = inspect_lora(open_checkpoint(sparse(keys)))
    assert report.problems == () and report.unmatched == () and report.matched == len(keys)
    assert report.targets["transformer"] >= 57


@pytest.mark.parametrize("name, says", [
    ("neg_sdxl", r"SDXL LoRA \(768 of 984 keys are UNet blocks; only 216 keys would match\): nothing was applied"),
    ("neg_sd3_same_names", r"SD3 LoRA \(width 1536\): 95 of 95 layers have other sizes"),
    ("neg_flux2_same_names", r"FLUX.2 LoRA \(width 6144\)"),
    ("neg_orphan_half", r"266 layers are broken.*half of a pair is missing"),
])
def test_other_families_and_halves_are_named(name: str, says: str, lists: Any, sparse: Any) -> None:
    path = sparse(lists[name])
    with pytest.raises(BadModelFile, match=says) as caught:
        read_lora(path)
    assert path.name in str(caught.value) and len(str(caught.value)) < 1000
    report = inspect_lora(open_checkpoint(path))
    assert report.problems and not report.targets


def test_models_pickles_and_damage_are_refused(lists: Any, sparse: Any, tmp_path: Path) -> None:
    full = {f"double_blocks.{i}.img_attn.qkv.weight": ((9216, 3072), "BF16") for i in range(19)}
    full |= {f"single_blocks.{i}.linear1.weight": ((21504, 3072), "BF16") for i in range(38)}
    with pytest.raises(BadModelFile, match=r"FLUX\.1 transformer.*, not a LoRA"):
        read_lora(sparse(full))
    with pytest.raises(BadModelFile, match="no tensors"):
        read_lora(sparse({}))
    with pytest.raises(BadModelFile, match="pickle"):
        (tmp_path / "old.pt").write_bytes(b"PK\x03\x04")
        read_lora(tmp_path / "old.pt")
    with pytest.raises(MissingFile):
        read_lora(tmp_path / "gone.safetensors")
    whole = sparse(lists["xlabs"])
    with whole.open("r+b") as file:
        file.truncate(whole.stat().st_size - 10)
    with pytest.raises(BadModelFile, match="incomplete download"):
        read_lora(whole)


@pytest.mark.parametrize("keys, says", [
    ({f"transformer_blocks.{i}.qkv_proj.lora_down": ((3072, 16), "BF16") for i in range(19)}, "converted for nunchaku"),
    ({f"diffusion_model.blocks.{i}.self_attn.q.lora_A.weight": ((16, 5120), "BF16") for i in range(40)}, "Wan LoRA"),
    ({f"transformer.transformer_blocks.{i}.img_mlp.net.2.lora_A.weight": ((16, 3072), "BF16") for i in range(60)},
     "Qwen-Image LoRA"),
    ({f"lora_unet_down_blocks_{i}_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": ((4, 320), "F16")
      for i in range(3)}, r"SD 1\.5 or SDXL LoRA"),
    ({f"something.{i}.lora_A.weight": ((4, 320), "F16") for i in range(3)}, r"0 of 3 tensors matched; unknown are 3"),
])
def test_other_families_by_name(keys: Any, says: str, sparse: Any) -> None:
    with pytest.raises(BadModelFile, match=says):
        read_lora(sparse(keys))


Q = "transformer.transformer_blocks.0.attn.to_q"


def pair(rank: int = 4, out: int = 128, wide: int = 128, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"{Q}.lora_A.weight": torch.randn(rank, wide), f"{Q}.lora_B.weight": torch.randn(out, rank),
            **{f"{Q}.{name}": value for name, value in more.items()}}


@pytest.mark.parametrize("alpha, metadata, scale", [
    (None, {}, 1.0),
    (torch.tensor(2.0), {}, 0.5),
    (torch.tensor([2], dtype=torch.int64), {}, 0.5),
    (torch.tensor(0.0), {}, 1.0),
    (None, {"transformer.r": 4, "transformer.lora_alpha": 1}, 0.25),
    (None, {"transformer.lora_alpha": 1, "transformer.use_rslora": True}, 0.5),
    (None, {"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"attn.to_q": 8}}, 2.0),
    (None, {"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"^transformer_blocks.0.attn.to_q$": 8}}, 2.0),
    (None, {"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"^attn.to_q": 8}}, 0.25),
    (torch.tensor(2.0), {"transformer.lora_alpha": 1}, 0.5),
    (None, {"r": 4, "lora_alpha": 2}, 0.5),
    (None, {"transformer.lora_alpha": 0}, 1.0),
    (None, "not json", 1.0),
])
def test_alpha(alpha: torch.Tensor | None, metadata: Any, scale: float, save: Any) -> None:
    more = {} if alpha is None else {"alpha": alpha}
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    path = save(pair(**more), {"lora_adapter_metadata": text})
    assert [adapter.scale for adapter in read_lora(path).adapters] == [pytest.approx(scale)]
    assert read_lora(path, Options(ignore_alpha=True)).adapters[0].scale == 1


def test_alpha_told_by_a_regular_expression(save: Any) -> None:
    """It is never run: one such as this takes for ever."""
    told = {"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(.*)*x|attn.to_[qk]": 8}}
    with pytest.raises(BadModelFile, match=r"alpha_pattern '\(\.\*\)\*x\|attn\.to_\[qk\]' is a regular expression"):
        read_lora(save(pair(), {"lora_adapter_metadata": json.dumps(told)}))
    assert read_lora(save(pair(alpha=torch.tensor(2.0)), {"lora_adapter_metadata": json.dumps(told)})).adapters


@pytest.mark.parametrize("tensors, says", [
    (pair() | {f"{Q}.lora_B.weight": torch.zeros(128, 5)}, r"ranks differ: up \[128, 5\] and down \[4, 128\]"),
    (pair(alpha=torch.tensor(math.inf)), r"alpha inf over rank 4"),
    (pair(alpha=torch.tensor(math.nan)), r"alpha nan over rank 4"),
    (pair(alpha=torch.tensor(4000.0)), r"scale of 1000"),
    (pair(alpha=torch.zeros(3)), r"alpha \[3\] is not one number"),
    (pair(lora_magnitude_vector=torch.ones(7)), r"magnitude \[7\] has 7 numbers, expected 128"),
    ({f"{Q}.diff": torch.tensor(1.0)}, r"the adapter is for \[1, 1\], the layer is \[128, 128\]"),
    ({f"{Q}.diff": torch.ones(128)}, r"the adapter is for \[128, 1\], the layer is \[128, 128\]"),
    ({f"{Q}.diff_b": torch.ones(128, 2)}, r"the adapter is for \[256\], the layer is \[128\]"),
    ({f"{Q}.diff_b": torch.tensor(1.0)}, r"the adapter is for \[1\], the layer is \[128\]"),
    ({f"{Q}.lora_A.weight": torch.ones(4, 128), f"{Q}.lora_B.weight": torch.ones(128)}, r"up \[128\] is no matrix"),
    ({f"{Q}.lora_A.weight": torch.tensor(1.0), f"{Q}.lora_B.weight": torch.ones(128, 1)}, r"down \[\] is no matrix"),
    ({f"{Q}.oft_R.weight": torch.tensor(1.0)}, r"oft_packed \[\] is no matrix"),
    ({f"{Q}.oft_blocks": torch.ones(16, 8, 8), f"{Q}.alpha": torch.tensor(math.nan)}, r"alpha is nan"),
    ({f"{Q}.{name}": torch.ones(4, 128) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
     | {f"{Q}.hada_t1": torch.ones(4, 4), f"{Q}.hada_t2": torch.ones(4, 5)}, r"ranks differ: hada_w2_a"),
    ({f"{Q}.{name}": torch.ones(4, 128) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
     | {f"{Q}.hada_t1": torch.ones(4, 4)}, r"only one of its two products has a core"),
])
def test_layers_that_do_not_hold_together(tensors: Any, says: str, save: Any) -> None:
    good = {key.replace("to_q", "to_k"): value for key, value in pair().items()}
    with pytest.raises(BadModelFile, match=says):
        read_lora(save({**tensors, **good}))
    lora = read_lora(save({**tensors, **good}), Options(skip_broken=True))
    assert len(lora.adapters) == 1 and any(note.startswith("left out") for note in lora.report.notes)


@pytest.mark.parametrize("more, scale", [({}, 1.0), ({"alpha": torch.tensor(2.0)}, 0.5)])
def test_the_bias_of_a_pair_is_scaled_with_it(more: Any, scale: float, save: Any) -> None:
    """PEFT's `lora_bias`: base + scale * (B (A x) + b). A bias of its own is not scaled."""
    bias = {"lora_B.bias": torch.arange(128.0)}
    pair_of, bias_of = read_lora(save(pair(**more, **bias))).adapters
    assert pair_of.scale == bias_of.scale == scale
    assert torch.equal(bias_of.change(torch.zeros(128)), scale * torch.arange(128.0))
    (term,) = bias_of.terms(lambda tile: torch.zeros(0), 128, torch.float32, "cpu") or ()
    assert torch.equal(term.get_buffer("vector"), scale * torch.arange(128.0))
    _, own = read_lora(save(pair(**more, diff_b=torch.arange(128.0)))).adapters
    assert torch.equal(own.change(torch.zeros(128)), torch.arange(128.0))


def test_nan_and_infinity_are_counted(save: Any) -> None:
    tensors = pair()
    tensors[f"{Q}.lora_A.weight"][0, :3] = math.nan
    tensors[f"{Q}.lora_B.weight"][1, 1] = math.inf
    with pytest.raises(NotFinite, match="4 numbers are NaN or infinite, in 2 of 2 tensors"):
        read_lora(save(tensors))


def test_infinite_alpha_of_a_whole_lokr_means_nothing(save: Any) -> None:
    path = save({f"{Q}.lokr_w1": torch.randn(8, 8), f"{Q}.lokr_w2": torch.randn(16, 16),
                 f"{Q}.alpha": torch.tensor(math.inf)})
    assert read_lora(path).adapters[0].scale == 1


def test_split_qkv_is_told_and_undone(save: Any) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    up = torch.block_diag(*(torch.randn(128, 2) for _ in range(3)))
    path = save({f"{stem}.lora_down.weight": torch.randn(6, 128), f"{stem}.lora_up.weight": up,
                 f"{stem}.alpha": torch.tensor(2.0)})
    lora = read_lora(path)
    assert lora.adapters[0].scale == pytest.approx(1 / 3) and "split_fix" in lora.report.notes[-1]
    assert read_lora(path, Options(split_fix=True)).adapters[0].scale == pytest.approx(1)


def test_header_facts_and_triggers(save: Any) -> None:
    tags = json.dumps({"10_cat": {"zxc cat": 30, "a cat": 12}, "5_dog": {"dog": 3}})
    lora = read_lora(save(pair(), {"ss_base_model_version": "flux1", "ss_tag_frequency": tags}))
    assert lora.report.header["ss_base_model_version"] == "flux1" and lora.report.triggers == ("zxc cat",)
    named = read_lora(save(pair(), {"modelspec.trigger_phrase": "in the style of x", "ss_tag_frequency": tags}))
    assert named.report.triggers == ("in the style of x",)
    assert read_lora(save(pair(), {"ss_tag_frequency": "[" * 100_000})).report.triggers == ()
    assert lora.report.base == "tiny-flux"
