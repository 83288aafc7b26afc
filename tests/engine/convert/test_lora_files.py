"""LoRA files made here change each layer by what their sources do, read back by the reader and in foreign names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit.engine.adapters import Lora, read_lora
from flux_kit.engine.adapters.blocks import block_weights
from flux_kit.engine.adapters.stack import Row
from flux_kit.engine.adapters.vocabulary import BASES
from flux_kit.engine.convert.lora_files import Summand, layout_of, summand, write_lora
from flux_kit.engine.convert.lora_header import HISTORY
from flux_kit.engine.convert.lora_report import Written
from flux_kit.engine.convert.lowrank import Pair, distance, joined, length, nearest, reduced
from flux_kit.engine.errors import BadInput, Interrupted, NotFinite
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.weights import open_checkpoint
from torch import Tensor

TINY = BASES[1]
H = 128


def changes(lora: Lora, strength: float = 1.0, base: Any = None) -> dict[tuple[str, str, bool], Tensor]:
    """Change of every weight and bias, fp64, whole layers; against `base` or, where it does not matter, zeros."""
    found: dict[tuple[str, str, bool], Tensor] = {}
    for adapter in lora.adapters:
        place = adapter.destination
        size = TINY.size(place)
        if len(size) > 1 and adapter.on_bias:
            size = size[:1]
        rows = place.rows(TINY.size(place))
        key = (place.role, place.module, adapter.on_bias)
        total = found.setdefault(key, torch.zeros(size, dtype=torch.float64))
        own = torch.zeros_like(total)[rows]
        if base is not None and not adapter.on_bias:
            own = base.get_submodule(place.module).weight.detach().double()[rows]
        total[rows] += adapter.change(own, strength)
    return found


def same(left: dict[Any, Tensor], right: dict[Any, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        norm = float(value.norm()) or 1.0
        assert float((value - right[key]).norm()) <= tolerance * norm, key


def pair(rows: int, width: int, rank: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, width).to(dtype), (torch.randn(rows, rank) * 0.1).to(dtype)


def kohya(dtype: torch.dtype = torch.float16, rank: int = 4, alpha: float = 3.0, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    sizes = {"lora_unet_double_blocks_0_img_attn_qkv": (3 * H, H), "lora_unet_double_blocks_1_txt_mlp_2": (H, 4 * H),
             "lora_unet_single_blocks_3_linear1": (7 * H, H), "lora_unet_single_blocks_0_modulation_lin": (3 * H, H),
             "lora_unet_final_layer_adaLN_modulation_1": (2 * H, H), "lora_unet_img_in": (H, 64),
             "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (64, 64),
             "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0": (128, 64)}
    found: dict[str, Tensor] = {}
    for name, (rows, width) in sizes.items():
        found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = pair(rows, width, rank, dtype)
        found[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return found


def peft(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """q, k, v of unequal rank, k missing in a second block, and the halves of the last modulation in their order."""
    torch.manual_seed(1)
    sizes = {"transformer_blocks.0.attn.to_q": (H, H, 4), "transformer_blocks.0.attn.to_k": (H, H, 2),
             "transformer_blocks.0.attn.to_v": (H, H, 3), "transformer_blocks.1.attn.add_q_proj": (H, H, 4),
             "single_transformer_blocks.2.proj_mlp": (4 * H, H, 5), "norm_out.linear": (2 * H, H, 4),
             "single_transformer_blocks.2.proj_out": (H, 5 * H, 4), "x_embedder": (H, 64, 4)}
    found: dict[str, Tensor] = {}
    for name, (rows, width, rank) in sizes.items():
        down, up = pair(rows, width, rank, dtype)
        found |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    return found


def others(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(2)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    def r(*shape: int) -> Tensor:
        return torch.randn(shape) * 0.2
    return {f"{name}.{key}": value for key, value in {
        "loha": {"hada_w1_a": r(3 * H, 3), "hada_w1_b": r(3, H), "hada_w2_a": r(3 * H, 3), "hada_w2_b": r(3, H),
                 "alpha": torch.tensor(2.0)},
        "lokr": {"lokr_w1": r(4, 4), "lokr_w2_a": r(3 * H // 4, 2), "lokr_w2_b": r(2, H // 4),
                 "alpha": torch.tensor(1.0)},
        "lokr_full": {"lokr_w1": r(4, 4), "lokr_w2": r(3 * H // 4, H // 4), "alpha": torch.tensor(1.0)},
        "diff": {"diff": r(3 * H, H)},
        "dora": {"lora_down.weight": r(4, H), "lora_up.weight": r(3 * H, 4), "alpha": torch.tensor(4.0),
                 "dora_scale": r(3 * H, 1).abs() + 0.5},
        "glora": {"a1.weight": r(H, 4), "a2.weight": r(4, H), "b1.weight": r(3 * H, 4), "b2.weight": r(4, H),
                  "alpha": torch.tensor(4.0)},
        "oft": {"oft_blocks": r(12, 32, 32) * 0.1, "alpha": torch.tensor(0.0)},
        "ia3": {"weight": r(3 * H), "on_input": torch.tensor(False)},
    }[kind].items()}


Save = Callable[..., Path]


def written(target: Path, *entries: Summand, **options: Any) -> Written:
    return write_lora(target, entries, **options)


@pytest.mark.parametrize("to", ["kohya", "peft"])
@pytest.mark.parametrize("source", [kohya, peft])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_converted_file_changes_every_layer_by_what_its_source_does(save: Save, tmp_path: Path, to: str, source: Any,
                                                                    dtype: torch.dtype) -> None:
    path = save(source(dtype=dtype))
    before = read_lora(path)
    made = written(tmp_path / "out.safetensors", Summand(before), to=to)
    after = read_lora(made.path)
    same(changes(before), changes(after), 1e-6)
    assert made.error <= 1e-7 and made.layout == to == layout_of(after)
    assert {adapter.factors["up"].dtype for adapter in after.adapters} == {dtype}
    assert after.report.unmatched == after.report.skipped == after.report.problems == ()


def test_there_and_back_is_bit_by_bit_the_same(save: Save, tmp_path: Path) -> None:
    """Ranks do not grow: the parts of a split layer share their `down` and become one again."""
    tensors = kohya(alpha=4.0)
    there = written(tmp_path / "a.safetensors", Summand(read_lora(save(tensors))), to="peft")
    with open_checkpoint(there.path) as checkpoint:
        assert not [key for key in checkpoint if "alpha" in key], "no alpha where every scale is 1"
    back = written(tmp_path / "b.safetensors", Summand(read_lora(there.path)), to="kohya")
    with open_checkpoint(back.path) as checkpoint:
        assert set(checkpoint) == set(tensors)
        for key, tensor in tensors.items():
            assert torch.equal(checkpoint[key].read().double().reshape(tensor.shape), tensor.double()), key
    assert back.ranks == (4,) and back.error == there.error == 0


def test_split_parts_of_unequal_rank_stand_block_by_block(save: Save, tmp_path: Path) -> None:
    made = written(tmp_path / "k.safetensors", Summand(read_lora(save(peft()))), to="kohya")
    with open_checkpoint(made.path) as checkpoint:
        up = checkpoint["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].read()
        assert up.shape == (3 * H, 9)
        blocks = [part.any(0) for part in up.split(H)]  # of q, k, v: which columns each part uses
        assert [int(used.sum()) for used in blocks] == [4, 2, 3] and torch.stack(blocks).sum(0).eq(1).all()
    again = written(tmp_path / "p.safetensors", Summand(read_lora(made.path)), to="peft")
    ranks = {row.stem: row.rank for row in again.layers}
    assert [ranks[f"transformer.transformer_blocks.0.attn.to_{part}"] for part in "qkv"] == [4, 2, 3]
    with open_checkpoint(again.path) as checkpoint:
        for key, tensor in peft().items():
            assert torch.equal(checkpoint[key].read(), tensor), key


def test_a_merge_adds_ranks_and_changes(save: Save, tmp_path: Path) -> None:
    first, second = read_lora(save(kohya(torch.float32))), read_lora(save(peft(torch.float32), name="b.safetensors"))
    for to in ("kohya", "peft"):
        made = written(tmp_path / f"{to}.safetensors", Summand(first, 0.8), Summand(second, -0.5), to=to)
        one, two = changes(first, 0.8), changes(second, -0.5)
        total = {key: sum(found[key] for found in (one, two) if key in found) for key in {**one, **two}}
        same(total, changes(read_lora(made.path)), 1e-6)
        assert made.error < 1e-6
    assert {row.rank for row in made.layers if row.stem.endswith("blocks.0.attn.to_q")} == {8}


def test_a_merge_tells_what_its_type_costs(save: Save, tmp_path: Path) -> None:
    first, second = read_lora(save(kohya())), read_lora(save(kohya(seed=5), name="b.safetensors"))
    made = written(tmp_path / "o.safetensors", Summand(first, 0.8), Summand(second, 0.5), to="kohya")
    one, two = changes(first, 0.8), changes(second, 0.5)
    after = changes(read_lora(made.path))
    squares = sum(float((one[key] + two[key] - after[key]).square().sum()) for key in one)
    whole = sum(float((one[key] + two[key]).square().sum()) for key in one)
    assert math.isclose(made.error, math.sqrt(squares / whole), rel_tol=1e-6)
    assert 1e-6 < made.error < 2 ** -11


def test_strength_on_clip_and_block_weights_are_baked_in(save: Save, tmp_path: Path) -> None:
    lora = read_lora(save(kohya(torch.float32)))
    row = Row("x.safetensors", 0.5, 2.0, "double = 0, single 3 = 3")
    made = read_lora(written(tmp_path / "o.safetensors", summand(lora, row)).path)
    factor = block_weights(row.blocks)
    expected = {key: value * (0.5 * factor(key[1]) if key[0] == "transformer" else 2.0)
                for key, value in changes(lora).items()}
    same({key: value for key, value in expected.items() if value.any()}, changes(made), 1e-6)
    for other in (Row("x", start=0.2), Row("x", schedule=((0.0, 1.0),))):
        with pytest.raises(BadInput, match="cannot hold"):
            summand(lora, other)


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_fewer_ranks_are_the_nearest_there_are(save: Save, tmp_path: Path, to: str) -> None:
    """Against the singular values of each whole change (Eckart and Young)."""
    lora = read_lora(save(kohya(torch.float32, rank=8)))
    made = written(tmp_path / "o.safetensors", Summand(lora), to=to, rank=3)
    assert made.ranks == (3,)
    before, after = changes(lora), changes(read_lora(made.path))
    off = whole = 0.0
    for key, value in before.items():
        parts = [(value, after[key])]
        if to == "peft" and key[1].endswith("qkv"):
            parts = list(zip(value.chunk(3), after[key].chunk(3), strict=True))
        elif to == "peft" and key[1].endswith("linear1"):
            sizes = [H, H, H, 4 * H]
            parts = list(zip(value.split(sizes), after[key].split(sizes), strict=True))
        for left, right in parts:
            best = float(torch.linalg.svdvals(left)[3:].norm())
            assert math.isclose(float((left - right).norm()), best, rel_tol=1e-5), key
            off, whole = off + best ** 2, whole + float(left.norm()) ** 2
    assert math.isclose(made.error, math.sqrt(off / whole), rel_tol=1e-5)
    assert made.worst[0].error == max(row.error for row in made.layers)


def test_a_rank_that_is_there_already_leaves_layers_alone(save: Save, tmp_path: Path) -> None:
    made = written(tmp_path / "o.safetensors", Summand(read_lora(save(kohya()))), rank=4)
    with open_checkpoint(made.path) as checkpoint:
        for key, tensor in kohya().items():
            assert torch.equal(checkpoint[key].read().double().reshape(tensor.shape), tensor.double()), key


@pytest.mark.parametrize(("kind", "rank"), [("loha", 9), ("lokr", 8)])
@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_what_has_an_exact_form_needs_no_rank(save: Save, tmp_path: Path, kind: str, rank: int, to: str) -> None:
    lora = read_lora(save(others(kind)))
    made = written(tmp_path / "o.safetensors", Summand(lora, 0.5), to=to, dtype=torch.float32)
    same(changes(lora, 0.5), changes(read_lora(made.path)), 1e-6)
    assert made.ranks[-1] == rank and made.error < 1e-6


@pytest.mark.parametrize("kind", ["lokr_full", "diff"])
def test_what_has_none_needs_a_rank(save: Save, tmp_path: Path, kind: str) -> None:
    lora = read_lora(save(others(kind)))
    with pytest.raises(BadInput, match=r"double_blocks\.0\.img_attn\.qkv.*--rank"):
        written(tmp_path / "o.safetensors", Summand(lora))
    assert not (tmp_path / "o.safetensors").exists()
    made = written(tmp_path / "o.safetensors", Summand(lora), rank=6, to="kohya")
    (value,), (after,) = changes(lora).values(), changes(read_lora(made.path)).values()
    best = torch.linalg.svdvals(value)
    assert math.isclose(made.error, float(best[6:].norm() / best.norm()), rel_tol=1e-4)
    assert math.isclose(float((value - after).norm() / value.norm()), made.error, rel_tol=1e-4)


@pytest.mark.parametrize(("kind", "rank"), [("dora", 132), ("glora", 8), ("oft", 128), ("ia3", 128)])
def test_what_depends_on_the_base_needs_the_base(save: Save, tmp_path: Path, flux: Flux, kind: str, rank: int) -> None:
    lora = read_lora(save(others(kind)))
    with pytest.raises(BadInput, match="--base"):
        written(tmp_path / "o.safetensors", Summand(lora), rank=rank)
    with pytest.raises(BadInput, match="--rank"):
        written(tmp_path / "o.safetensors", Summand(lora, 0.9), bases={"transformer": flux})
    strength = 1.0 if kind == "dora" else 0.7
    made = written(tmp_path / "o.safetensors", Summand(lora, strength), rank=rank, bases={"transformer": flux},
                   dtype=torch.float32)
    same(changes(lora, strength, flux), changes(read_lora(made.path)), 1e-5)
    assert made.error < 1e-5


@pytest.mark.parametrize("to", ["kohya", "peft"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_dora_at_full_strength_stays_one(save: Save, tmp_path: Path, flux: Flux, to: str, whole: bool) -> None:
    torch.manual_seed(4)
    tensors = others("dora") if whole else {}
    for part in "qkv" if not whole else "":
        down, up = pair(H, H, 3, torch.float32)
        stem = f"transformer.transformer_blocks.0.attn.to_{part}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up,
                    f"{stem}.lora_magnitude_vector": torch.rand(H) + 0.5}
    down, up = pair(2 * H, H, 3, torch.float32)
    tensors |= {"transformer.norm_out.linear.lora_A.weight": down, "transformer.norm_out.linear.lora_B.weight": up,
                "transformer.norm_out.linear.lora_magnitude_vector": torch.rand(2 * H) + 0.5}
    lora = read_lora(save(tensors))
    made = written(tmp_path / "o.safetensors", Summand(lora), to=to)
    after = read_lora(made.path)
    same(changes(lora, base=flux), changes(after, base=flux), 1e-6)
    assert after.report.algorithms == {"DoRA (LoRA)": 4 if to == "peft" else 2}
    with pytest.raises(BadInput, match=r"DoRA.*--base"):
        written(tmp_path / "half.safetensors", Summand(lora, 0.5), to=to)
    if not whole and to == "kohya":
        some = {key: value for key, value in tensors.items() if "to_k" not in key}
        with pytest.raises(BadInput, match=r"DoRA.*--base"):
            written(tmp_path / "k.safetensors", Summand(read_lora(save(some, name="some.safetensors"))), to=to)


def control() -> dict[str, Tensor]:
    """As BFL's control LoRAs: biases, norms that take the place of the model's, a wider `img_in`."""
    torch.manual_seed(3)
    found = {}
    for name, (rows, width) in {"img_in": (H, 128), "double_blocks.0.img_attn.qkv": (3 * H, H),
                                "single_blocks.1.linear1": (7 * H, H)}.items():
        down, up = pair(rows, width, 4, torch.bfloat16)
        found |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up,
                  f"{name}.lora_B.bias": torch.randn(rows).bfloat16()}
    return {**found, "double_blocks.0.img_attn.norm.query_norm.scale": torch.randn(H).bfloat16()}


@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_biases_norms_and_more_columns_go_along(save: Save, tmp_path: Path, to: str) -> None:
    lora = read_lora(save(control()))
    made = written(tmp_path / "o.safetensors", Summand(lora), to=to)
    after = read_lora(made.path)
    total: dict[Any, Tensor] = {}
    for found, sign in ((lora, 1), (after, -1)):
        for adapter in found.adapters:
            place, width = adapter.destination, adapter.size[1]
            rows = place.rows(TINY.size(place))
            shape = (TINY.size(place)[0],) if width is None else (TINY.size(place)[0], width)
            key = (place.module, adapter.on_bias)
            value = total.setdefault(key, torch.zeros(shape, dtype=torch.float64))
            value[rows] += sign * adapter.change(torch.zeros_like(value)[rows])
    assert len(total) == 7 and not any(value.any() for value in total.values())
    assert made.error == 0
    with open_checkpoint(made.path) as checkpoint:
        norm = {"kohya": "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.set_weight",
                "peft": "transformer.transformer_blocks.0.attn.norm_q.weight"}[to]
        assert torch.equal(checkpoint[norm].read(), control()["double_blocks.0.img_attn.norm.query_norm.scale"])


def test_of_norms_that_are_replaced_twice_the_later_counts(save: Save, tmp_path: Path, flux: Flux) -> None:
    """As in a stack, and whole at any strength: what replaces a norm is not taken by halves."""
    norm = "double_blocks.0.img_attn.norm.query_norm"
    three, five = (read_lora(save({f"{norm}.scale": torch.full((H,), value)}, name=f"{value:g}.safetensors"))
                   for value in (3.0, 5.0))
    made = written(tmp_path / "o.safetensors", Summand(three, 0.5), Summand(five, 0.25))
    (adapter,) = read_lora(made.path).adapters
    own = flux.get_submodule(norm).scale.detach().double()
    assert torch.allclose(adapter.change(own), 5 - own, rtol=0, atol=1e-6)
    assert made.notes == ("3.safetensors: 1 of its vectors are left out, 5.safetensors replaces the same and comes "
                          "later",)


def test_a_norm_that_is_replaced_and_changed_needs_the_base(save: Save, tmp_path: Path, flux: Flux) -> None:
    norm = "double_blocks.0.img_attn.norm.query_norm"
    three = read_lora(save({f"{norm}.scale": torch.full((H,), 3.0)}, name="three.safetensors"))
    more = read_lora(save({f"diffusion_model.{norm}.scale.diff": torch.full((H,), 0.5)}, name="more.safetensors"))
    stack = Summand(three), Summand(more, 0.5)
    with pytest.raises(BadInput, match="--base"):
        written(tmp_path / "no.safetensors", *stack)
    made = written(tmp_path / "o.safetensors", *stack, bases={"transformer": flux})
    (adapter,) = read_lora(made.path).adapters
    own = flux.get_submodule(norm).scale.detach().double()
    assert torch.allclose(adapter.change(own), 3.25 - own, rtol=0, atol=1e-6)


def test_names_of_peft_files_are_diffusers_own(save: Save, tmp_path: Path, lists: Any, sparse: Save) -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            num_layers=2, num_single_layers=4, num_attention_heads=1, attention_head_dim=H, joint_attention_dim=64,
            pooled_projection_dim=64, guidance_embeds=True, axes_dims_rope=(16, 56, 56))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    made = written(tmp_path / "o.safetensors", Summand(read_lora(save(kohya()))), to="peft")
    with open_checkpoint(made.path) as checkpoint:
        for key in checkpoint:
            if key.startswith("transformer.") and not key.endswith(".alpha"):
                stem, _, half = key.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
                size = checkpoint[key].shape[1 if half == "lora_A" else 0]
                assert size == (layers[stem].in_features if half == "lora_A" else layers[stem].out_features), key


FULL = {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072, ["transformer_blocks.0.attn.to_q",
                                                                "transformer_blocks.0.attn.to_k",
                                                                "transformer_blocks.0.attn.to_v"]),
        "lora_unet_single_blocks_5_linear1": (21504, 3072, [
            "single_transformer_blocks.5.attn.to_q", "single_transformer_blocks.5.attn.to_k",
            "single_transformer_blocks.5.attn.to_v", "single_transformer_blocks.5.proj_mlp"]),
        "lora_unet_double_blocks_3_txt_mlp_2": (3072, 12288, ["transformer_blocks.3.ff_context.net.2"]),
        "lora_unet_single_blocks_0_modulation_lin": (9216, 3072, ["single_transformer_blocks.0.norm.linear"])}


@pytest.mark.parametrize("to", ["kohya", "peft"])
@pytest.mark.parametrize("alpha", [3.0, 4.0])
def test_diffusers_reads_both_layouts_as_they_are_meant(save: Save, tmp_path: Path, to: str, alpha: float) -> None:
    """At full size, since its converter knows no other; each change is compared by what it makes of one input."""
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    torch.manual_seed(0)
    tensors, expected = {}, {}
    for stem, (rows, width, names) in FULL.items():
        down, up = pair(rows, width, 4, torch.float32)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
                    f"{stem}.alpha": torch.tensor(alpha)}
        out = alpha / 4 * up.double() @ (down.double() @ probe(width))
        sizes = [3072] * 3 + [12288] * (len(names) - 3) if len(names) > 1 else [rows]
        expected |= dict(zip(names, out.split(sizes), strict=True))
    made = written(tmp_path / "o.safetensors", Summand(read_lora(save(tensors))), to=to)
    found, alphas = loaders.FluxLoraLoaderMixin.lora_state_dict(str(made.path), return_alphas=True)
    assert {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in found} == set(expected)
    assert bool(alphas) == (to == "peft" and alpha == 3.0)
    for name, value in expected.items():
        down, up = (found[f"transformer.{name}.lora_{half}.weight"].double() for half in "AB")
        scale = float((alphas or {}).get(f"transformer.{name}.alpha", len(down))) / len(down)
        assert float((scale * up @ (down @ probe(down.shape[1])) - value).norm()) < 1e-6 * float(value.norm()), name


def probe(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)


@pytest.mark.parametrize("name", ["kohya", "kohya_fp8", "kohya_te1_te3", "peft_all_linear", "peft_with_alpha",
                                  "peft_partial_qkv", "xlabs", "uso", "onetrainer_legacy", "bfl_control",
                                  "lycoris_lokr_w2ab", "omini_control", "comfy_extract"])
def test_formats_of_full_size_keep_every_layer(lists: Any, sparse: Save, tmp_path: Path, name: str) -> None:
    """Names and sizes only: the tensors are holes."""
    found = lists[name]
    some = [key for i, key in enumerate(found) if "single_blocks.1." not in key]
    some = [key for key in some if any(word in key for word in ("blocks.0.", "blocks_0_", "_in", "final", "te1", "te3",
                                                                "norm_out", "embed", "bundle"))] or some[:12]
    lora = read_lora(sparse({key: found[key] for key in some}))
    try:
        made = read_lora(written(tmp_path / "o.safetensors", Summand(lora), to="peft").path)
    except BadInput as error:
        assert "--rank" in str(error)
        made = read_lora(written(tmp_path / "o.safetensors", Summand(lora), to="peft", rank=1).path)
    assert {(a.destination.role, a.destination.module) for a in made.adapters} == {
        (a.destination.role, a.destination.module) for a in lora.adapters}


def test_the_header_is_kept_and_added_to(save: Save, tmp_path: Path) -> None:
    header = {"ss_network_dim": "8", "ss_network_module": "lycoris.kohya", "modelspec.trigger_phrase": "qblue",
              "modelspec.title": "Blue", "ss_tag_frequency": '{"1_x": {"a": 2}}', "sshs_model_hash": "0123",
              "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1, "transformer.r": 8})}
    first = read_lora(save(peft(), header, name="a.safetensors"))
    one = written(tmp_path / "one.safetensors", Summand(first, 0.5), rank=2)
    with open_checkpoint(one.path) as checkpoint:
        made = dict(checkpoint.metadata)
    assert made["ss_tag_frequency"] == header["ss_tag_frequency"] and made["modelspec.title"] == "Blue"
    assert made["ss_network_dim"] == "2" and "sshs_model_hash" not in made and "lora_adapter_metadata" not in made
    assert json.loads(made[HISTORY]) == [{"from": [["a.safetensors", 0.5]], "layout": "peft", "ranks": [2]}]
    second = read_lora(save(kohya(), {"modelspec.trigger_phrase": "qred", "modelspec.title": "Red"},
                            name="b.safetensors"))
    both = written(tmp_path / "both.safetensors", Summand(read_lora(one.path)), Summand(second, 2))
    with open_checkpoint(both.path) as checkpoint:
        made = dict(checkpoint.metadata)
    assert made["modelspec.trigger_phrase"] == "qblue, qred" and "modelspec.title" not in made
    again = written(tmp_path / "again.safetensors", Summand(read_lora(both.path)))
    with open_checkpoint(again.path) as checkpoint:
        assert [step["from"] for step in json.loads(checkpoint.metadata[HISTORY])] == [
            [["one.safetensors", 1.0], ["b.safetensors", 2]], [["both.safetensors", 1.0]]]


def test_an_alpha_of_the_header_is_not_lost(save: Save, tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 1, "transformer.r": 4})}
    lora = read_lora(save(peft(torch.float32), header))
    for to in ("kohya", "peft"):
        same(changes(lora), changes(read_lora(written(tmp_path / f"{to}.safetensors", Summand(lora), to=to).path)),
             1e-6)


@pytest.mark.parametrize(("name", "words"), [
    ("o.gguf", r"\.safetensors"), ("no/o.safetensors", "no folder"), ("there.safetensors", "--force"),
    ("lora.safetensors", "--force"), ("folder.safetensors", "folder")])
def test_where_a_file_may_not_go(save: Save, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    (tmp_path / "folder.safetensors").mkdir()
    lora = read_lora(save(kohya()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=words):
        written(tmp_path / name, Summand(lora))
    assert sorted(tmp_path.rglob("*")) == before
    written(tmp_path / "there.safetensors", Summand(lora), force=True)
    same(changes(lora), changes(read_lora(tmp_path / "there.safetensors")), 1e-6)


def test_never_over_its_own_source(save: Save, tmp_path: Path) -> None:
    path = save(kohya())
    content = path.read_bytes()
    lora = read_lora(path)
    (tmp_path / "link.safetensors").symlink_to(path)
    for target in (path, tmp_path / "link.safetensors"):
        with pytest.raises(BadInput, match="same file"):
            written(target, Summand(lora), force=True)
    assert path.read_bytes() == content


def test_what_cannot_be(save: Save, tmp_path: Path, sparse: Save) -> None:
    lora = read_lora(save(kohya()))
    target = tmp_path / "o.safetensors"
    big = read_lora(sparse({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": ((4, 3072), "F16"),
                            "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": ((3072, 4), "F16")},
                           name="big.safetensors"))
    for entries, options, words in [([], {}, "at least one"), ([Summand(lora)], {"rank": 0}, "rank of 0"),
                                    ([Summand(lora, 0)], {}, "nothing is left"),
                                    ([Summand(lora, math.nan)], {}, "finite"),
                                    ([Summand(lora)], {"to": "x"}, "kohya, peft"),
                                    ([Summand(lora), Summand(big)], {}, "different models")]:
        with pytest.raises(BadInput, match=words):
            write_lora(target, entries, **options)
    loud = {key: value.float() * (1 if "down" in key else 3e5) if value.ndim else value
            for key, value in kohya(torch.float32, alpha=4.0).items()}
    with pytest.raises(NotFinite, match="fp32"):
        written(target, Summand(read_lora(save(loud, name="loud.safetensors"))), dtype=torch.float16)
    with pytest.raises(NotFinite, match=r"alpha: .* does not fit fp32"):
        written(target, Summand(lora, 1e39), to="kohya")
    assert not target.exists() and not list(tmp_path.glob(".flux-kit*"))


def test_stopping_leaves_nothing(save: Save, tmp_path: Path) -> None:
    lora = read_lora(save(kohya()))
    before = sorted(tmp_path.iterdir())
    seen: list[tuple[int, int, str]] = []

    def stop(done: int, total: int, name: str) -> None:
        seen.append((done, total, name))
        if done == total:
            raise Interrupted("stopped")
    with pytest.raises(Interrupted):
        written(tmp_path / "o.safetensors", Summand(lora), progress=stop)
    assert [done for done, *_ in seen] == list(range(9)) and sorted(tmp_path.iterdir()) == before


def test_large_matrices_get_nearly_the_nearest_pair() -> None:
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(900, 700)).Q, torch.linalg.qr(torch.randn(600, 600)).Q
    values = torch.arange(1, 601).float() ** -0.5
    matrix = left[:, :600] * values @ right
    found = nearest(matrix, 16, slice(0, 900))
    best = float(values[16:].norm())
    assert float((matrix - found.product()).norm()) < 1.01 * best
    again = nearest(matrix, 16, slice(0, 900))
    assert torch.equal(found.up, again.up) and torch.equal(found.down, again.down)


def test_lengths_and_distances_of_pairs_are_those_of_the_products() -> None:
    torch.manual_seed(0)
    rows = slice(0, 40)
    one = Pair(rows, torch.randn(5, 30).double(), torch.randn(40, 5).double(), 0.3)
    two = Pair(slice(10, 20), torch.randn(3, 20).double(), torch.randn(10, 3).double(), -2.0)
    both = joined([one, two], rows, 30)
    whole = one.product(torch.float64)
    whole[10:20, :20] += two.product(torch.float64)
    assert torch.allclose(both.product(torch.float64), whole, atol=1e-12) and both.scale == 2.0
    assert math.isclose(length(both), float(whole.norm()), rel_tol=1e-12)
    less = reduced(both, 4)
    assert math.isclose(distance(both, less), float((whole - less.product(torch.float64)).norm()), rel_tol=1e-9)
    nudged = Pair(rows, one.down, one.up * (1 + 1e-9), one.scale)
    assert math.isclose(distance(one, nudged), 1e-9 * length(one), rel_tol=1e-3)
