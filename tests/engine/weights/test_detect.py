"""Meaning read off names and shapes: full-size files of every published model, in every packing, and other families."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flux_kit.engine.specs import (
    CLIP_L,
    FLUX_AE,
    FLUX_CONTROL,
    FLUX_DEV,
    FLUX_FILL,
    FLUX_SCHNELL,
    REDUX,
    SIGLIP,
    T5_XXL,
)
from flux_kit.engine.weights import Detection, build, detect, match, open_checkpoint
from flux_kit.engine.weights.containers import Checkpoint, ModelFile, TensorInfo
from hypothesis import given
from hypothesis import strategies as st

Tensors = dict[str, tuple[tuple[int, ...], str]]
MODELS = {
    # published list: role, variant, layout, sizes
    "flux_dev_bfl": ("transformer", "dev", "bfl", FLUX_DEV),
    "flux_schnell_bfl": ("transformer", "schnell", "bfl", FLUX_SCHNELL),
    "flux_fill_bfl": ("transformer", "fill", "bfl", FLUX_FILL),
    "flux_control_bfl": ("transformer", "control", "bfl", FLUX_CONTROL),
    "flux_dev_diffusers": ("transformer", "dev", "diffusers", FLUX_DEV),
    "flux_schnell_diffusers": ("transformer", "schnell", "diffusers", FLUX_SCHNELL),
    "flux_fill_diffusers": ("transformer", "fill", "diffusers", FLUX_FILL),
    "flux_control_diffusers": ("transformer", "control", "diffusers", FLUX_CONTROL),
    "ae_bfl": ("vae", None, "bfl", FLUX_AE), "ae_diffusers": ("vae", None, "diffusers", FLUX_AE),
    "t5xxl_hf": ("t5", None, "hf", T5_XXL), "clip_l_hf": ("clip_l", None, "hf", CLIP_L),
    "siglip_so400m_vision_hf": ("vision", None, "hf", SIGLIP), "redux": ("redux", None, "bfl", REDUX),
}
PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "net.", "odd.one."),
    "t5": ("", "text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "t5xxl.", "text_encoder_2."),
    "clip_l": ("", "text_encoders.clip_l.transformer.", "clip_l.transformer.", "clip_l.", "text_encoder.",
               "conditioner.embedders.0.transformer.", "cond_stage_model.transformer."),
    "vae": ("", "vae.", "first_stage_model."), "vision": ("", "clip_vision.", "image_encoder."),
    "redux": ("", "image_embedder."),
}
PACKINGS = [
    # prefixes of transformer, CLIP-L, T5 and autoencoder in one file
    ("model.diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "vae."),
    ("diffusion_model.", "clip_l.transformer.", "t5xxl.transformer.", "first_stage_model."),
    ("transformer.", "text_encoder.", "text_encoder_2.", "vae."),
    ("", "clip_l.", "t5xxl.", "first_stage_model."),
]


def in_memory(tensors: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    """A checkpoint of shapes alone; reading from it would fail."""
    path = Path(__file__)
    file = ModelFile(path, path.stat())
    return Checkpoint(path, {name: TensorInfo(shape, "BF16", 0, 0, file) for name, shape in tensors.items()}, {}, ())


def shapes(tensors: Tensors, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, (shape, _) in tensors.items()}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_full_size_files(manifest: Callable[[str], Any], sparse: Callable[..., Path], tmp_path: Path,
                         name: str) -> None:
    role, variant, layout, spec = MODELS[name]
    tensors = manifest(name)
    path = sparse(tmp_path / "any name.safetensors", tensors)
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            found = detect(checkpoint)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert (found.role, found.variant, found.layout) == (role, variant, layout)
    assert list(found.parts) == [role]
    part = found.parts[role]
    assert (part.role, part.variant, part.layout, part.prefix) == (role, variant, layout, "")
    assert part.spec == spec  # every field
    assert set(part.names.values()) == set(tensors)
    assert (found.ignored, found.unknown, found.problems, found.notes) == ((), (), (), ())


@pytest.mark.parametrize("name", ["flux_dev_bfl", "flux_fill_diffusers", "ae_diffusers", "t5xxl_hf"])
def test_shards_and_folders(manifest: Callable[[str], Any], sharded: Callable[..., Path], tmp_path: Path,
                            name: str) -> None:
    role, variant, layout, spec = MODELS[name]
    index = sharded(tmp_path / "part", "diffusion_pytorch_model", manifest(name), 3)
    for path in (index, index.parent):
        with open_checkpoint(path) as checkpoint:
            found = detect(checkpoint)
        assert (found.role, found.variant, found.layout, found.parts[role].spec) == (role, variant, layout, spec)


@pytest.mark.parametrize(("role", "prefix"), [(role, prefix) for role in PREFIXES for prefix in PREFIXES[role]])
def test_prefixes(manifest: Callable[[str], Any], role: str, prefix: str) -> None:
    for name, (of, variant, layout, spec) in MODELS.items():
        if of == role:
            tensors = shapes(manifest(name), prefix)
            found = detect(in_memory(tensors))
            part = found.parts[role]
            assert (found.role, found.variant, found.layout) == (role, variant, layout)
            assert (part.prefix, part.spec) == (prefix, spec)
            assert set(part.names.values()) == set(tensors)
            assert found.unknown == found.problems == ()


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing[0] or "bare")
@pytest.mark.parametrize("transformer", ["flux_dev_bfl", "flux_schnell_diffusers", "flux_fill_bfl"])
def test_all_in_one(manifest: Callable[[str], Any], sparse: Callable[..., Path], tmp_path: Path,
                    packing: tuple[str, ...], transformer: str) -> None:
    vae = "ae_bfl" if transformer.endswith("bfl") else "ae_diffusers"
    models = (transformer, "clip_l_hf", "t5xxl_hf", vae)
    tensors = {prefix + name: info for prefix, model in zip(packing, models, strict=True)
               for name, info in manifest(model).items()}
    surplus = {packing[1] + "text_projection.weight": ((768, 768), "F16"),
               packing[1] + "text_model.embeddings.position_ids": ((1, 77), "I64"),
               packing[1].removesuffix("transformer.") + "logit_scale": ((), "F32"),
               packing[2].removesuffix("transformer.") + "logit_scale": ((), "F32"),
               packing[2] + "encoder.embed_tokens.weight": ((32128, 4096), "BF16"),
               packing[2] + "spiece_model": ((1000,), "U8")}
    path = sparse(tmp_path / "all.safetensors", {**tensors, **surplus})
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            found = detect(checkpoint)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert (found.role, found.variant, found.layout) == ("all-in-one", MODELS[transformer][1], MODELS[transformer][2])
    for prefix, model in zip(packing, models, strict=True):
        role, variant, layout, spec = MODELS[model]
        part = found.parts[role]
        assert (part.prefix, part.variant, part.layout, part.spec) == (prefix, variant, layout, spec)
        assert set(part.names.values()) == {prefix + name for name in manifest(model)}
    assert set(found.ignored) == set(surplus)
    assert found.unknown == found.problems == ()


# ------------------------------------------------------------------------------------------------- sizes

def test_other_sizes_are_read_off_every_shape() -> None:
    flux = {"img_in.weight": (256, 64), "txt_in.weight": (256, 48), "time_in.in_layer.weight": (256, 128),
            "vector_in.in_layer.weight": (256, 40), "guidance_in.in_layer.weight": (256, 128),
            "double_blocks.0.img_attn.norm.query_norm.scale": (128,), "double_blocks.0.img_mlp.0.weight": (768, 256),
            "double_blocks.0.txt_attn.qkv.weight": (768, 256), "double_blocks.4.img_mod.lin.weight": (1536, 256),
            "single_blocks.6.linear1.weight": (1536, 256), "final_layer.linear.weight": (32, 256)}
    spec = detect(in_memory(flux)).parts["transformer"].spec
    assert spec == replace(FLUX_DEV, in_channels=64, out_channels=32, vec_in_dim=40, context_in_dim=48, hidden_size=256,
                           mlp_ratio=3.0, num_heads=2, depth=5, depth_single_blocks=7, qkv_bias=False,
                           frequency_dim=128)
    t5 = {"shared.weight": (100, 96), "encoder.block.0.layer.0.SelfAttention.q.weight": (160, 96),
          "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (16, 5),
          "encoder.block.2.layer.1.DenseReluDense.wi_0.weight": (200, 96),
          "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (200, 96)}
    spec = detect(in_memory(t5)).parts["t5"].spec
    assert spec == replace(T5_XXL, vocab_size=100, d_model=96, d_kv=32, num_heads=5, d_ff=200, num_layers=3,
                           relative_attention_num_buckets=16)
    clip = {"embeddings.token_embedding.weight": (1000, 192), "embeddings.position_embedding.weight": (50, 192),
            "encoder.layers.0.mlp.fc1.weight": (400, 192), "encoder.layers.4.mlp.fc1.weight": (400, 192)}
    spec = detect(in_memory(clip)).parts["clip_l"].spec
    assert spec == replace(CLIP_L, vocab_size=1000, hidden_size=192, intermediate_size=400, num_hidden_layers=5,
                           num_attention_heads=3, max_position_embeddings=50, bos_token_id=998, eos_token_id=999)
    vae = {"encoder.conv_in.weight": (32, 1, 3, 3), "decoder.conv_in.weight": (96, 16, 3, 3),
           "decoder.conv_out.weight": (1, 32, 3, 3), "encoder.mid.attn_1.q.weight": (96, 96, 1, 1),
           **{f"encoder.down.{i}.block.2.conv1.bias": (1,) for i in range(3)},
           **{f"encoder.down.{i}.block.0.conv1.weight": (width, 32, 3, 3) for i, width in enumerate((32, 64, 96))}}
    spec = detect(in_memory(vae)).parts["vae"].spec
    assert spec == replace(FLUX_AE, in_channels=1, out_ch=1, ch=32, ch_mult=(1, 2, 3), num_res_blocks=3)
    redux = {"redux_up.weight": (96, 40), "redux_up.bias": (96,), "redux_down.weight": (32, 96)}
    spec = detect(in_memory(redux)).parts["redux"].spec
    assert spec == replace(REDUX, redux_dim=40, txt_in_features=32)


def vision(hidden: int, side: int, patch: int, layers: int,
           prefix: str = "vision_model.") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
            f"{prefix}embeddings.patch_embedding.bias": (hidden,),
            f"{prefix}embeddings.position_embedding.weight": (side * side, hidden),
            f"{prefix}encoder.layers.0.mlp.fc1.weight": (5 * hidden, hidden),
            f"{prefix}encoder.layers.{layers - 1}.mlp.fc1.weight": (5 * hidden, hidden),
            f"{prefix}post_layernorm.weight": (hidden,), f"{prefix}post_layernorm.bias": (hidden,)}


@pytest.mark.parametrize(("shape", "heads", "picture", "told"), [
    ((1152, 27, 14, 27), 16, 384, None), ((1152, 32, 16, 27), 16, 512, None), ((768, 14, 16, 12), 12, 224, "base"),
    ((1024, 24, 16, 24), 16, 384, "large"), ((64, 4, 14, 2), 1, 56, None), ((144, 4, 8, 2), 2, 32, None)])
@pytest.mark.parametrize("prefix", ["vision_model.", "", "some.prefix.", "some.prefix.vision_model."])
def test_sizes_of_vision_towers(shape: tuple[int, int, int, int], heads: int, picture: int, told: str | None,
                                prefix: str) -> None:
    """Heads and the side of pictures are in no shape: published ones are known, others follow a rule."""
    hidden, side, patch, layers = shape
    part = detect(in_memory(vision(hidden, side, patch, layers, prefix))).parts["vision"]
    assert part.spec == replace(SIGLIP, hidden_size=hidden, patch_size=patch, intermediate_size=5 * hidden,
                                num_hidden_layers=layers, num_attention_heads=heads, image_size=picture,
                                vision_use_head=False)
    assert part.spec.num_positions == side * side
    assert len(part.notes) == (told is not None) and (told or "") in "".join(part.notes)


def test_a_whole_siglip_model_is_its_vision_tower(manifest: Callable[[str], Any]) -> None:
    tower = manifest("siglip_so400m_vision_hf")
    text = {"text_model.embeddings.token_embedding.weight": (32000, 1152), "text_model.head.weight": (1152, 1152),
            "text_model.embeddings.position_embedding.weight": (64, 1152),
            **{f"text_model.encoder.layers.{i}.mlp.fc1.weight": (4304, 1152) for i in range(27)}}
    for prefix in ("", "siglip."):
        beside = {**{prefix + name: shape for name, shape in text.items()}, "logit_scale": (1,), "logit_bias": (1,)}
        found = detect(in_memory({**shapes(tower, prefix), **beside}))
        assert (found.role, found.parts["vision"].spec, found.unknown, found.problems) == ("vision", SIGLIP, (), ())
        assert set(found.ignored) == set(beside)


def changed(tensors: Tensors, **shapes_of: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {**shapes(tensors), **{name.replace("__", "."): shape for name, shape in shapes_of.items()}}


def test_sizes_that_make_no_sense_are_problems(manifest: Callable[[str], Any]) -> None:
    flux, vae = manifest("flux_dev_bfl"), manifest("ae_bfl")
    for tensors, word in (
            (changed(flux, img_in__weight=(3072, 196)), "196 channels"),
            (changed(flux, double_blocks__0__img_attn__norm__query_norm__scale=(64,)), "64 wide"),
            (changed(vae, encoder__conv_in__weight=(100, 3, 3, 3)), "widths"),
            (changed(vae, decoder__conv_in__weight=(512, 8, 3, 3)), "8 latent channels"),
            (changed(vae, quant_conv__weight=(32, 32, 1, 1)), "quant convolutions"),
            (vision(100, 4, 14, 2), "100 wide"),
            ({**vision(64, 4, 14, 2), "vision_model.embeddings.position_embedding.weight": (17, 64)}, "17 positions"),
            ({**vision(64, 4, 14, 2), "vision_model.embeddings.patch_embedding.weight": (64, 1, 14, 14)}, "1 channels"),
            (vision(64, 1000, 1000, 2), "1000000 x 1000000"),
            (changed(manifest("redux"), redux_up__weight=(4096, 1152)), "three times as wide")):
        part = next(iter(detect(in_memory(tensors)).parts.values()))
        assert part.spec is None
        assert word in part.problems[0]


def test_a_file_that_lost_tensors_keeps_its_role(manifest: Callable[[str], Any]) -> None:
    """So that loading can name what is missing. Any one tensor may be the missing one."""
    for name in ("flux_dev_bfl", "flux_schnell_diffusers", "t5xxl_hf", "clip_l_hf", "ae_bfl", "ae_diffusers",
                 "siglip_so400m_vision_hf", "redux"):
        role, variant, layout, _ = MODELS[name]
        tensors = shapes(manifest(name))
        for lost in [*list(tensors)[:40:2], *list(tensors)[-3:]]:
            found = detect(in_memory({key: shape for key, shape in tensors.items() if key != lost}))
            assert (found.role, found.variant, found.layout) == (role, variant, layout)
            assert found.parts[role].spec is not None


def test_block_numbers_from_a_hostile_file_stay_bounded(manifest: Callable[[str], Any]) -> None:
    tensors = {**shapes(manifest("flux_dev_bfl")), "double_blocks.999999999.img_mod.lin.bias": (1,),
               "single_blocks.9999.linear1.bias": (1,), "double_blocks." + "9" * 5000 + ".img_mod.lin.bias": (1,)}
    spec = detect(in_memory(tensors)).parts["transformer"].spec
    assert spec.depth == 19
    assert spec.depth_single_blocks <= 256


# ------------------------------------------------------------------------------------------------- surplus

def test_surplus_is_sorted(manifest: Callable[[str], Any]) -> None:
    clip = {**shapes(manifest("clip_l_hf")), "logit_scale": (), "text_projection.weight": (768, 768),
            "visual_projection.weight": (768, 1024), "text_model.embeddings.position_ids": (1, 77),
            "vision_model.post_layernorm.weight": (1024,), "foo.bar": (3,),
            **{f"vision_model.encoder.layers.{i}.mlp.fc1.weight": (4096, 1024) for i in range(24)},
            "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14)}
    found = detect(in_memory(clip))
    assert found.role == "clip_l"
    assert found.parts["clip_l"].spec == CLIP_L
    assert found.unknown == ("foo.bar",)
    assert set(found.ignored) == set(clip) - set(manifest("clip_l_hf")) - {"foo.bar"}

    t5 = {**shapes(manifest("t5xxl_hf")), "encoder.embed_tokens.weight": (32128, 4096), "lm_head.weight": (1, 1),
          "decoder.block.0.layer.0.SelfAttention.q.weight": (1, 1), "spiece_model": (9,), "scaled_fp8": (0,)}
    found = detect(in_memory(t5))
    assert (found.role, found.parts["t5"].spec, found.unknown) == ("t5", T5_XXL, ())
    assert set(found.ignored) == set(t5) - set(manifest("t5xxl_hf"))

    flux = shapes(manifest("flux_dev_bfl"), "model.diffusion_model.")
    ema = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": shape for name, shape in flux.items()}
    ema |= {"ema." + name: shape for name, shape in flux.items()}
    found = detect(in_memory({**ema, **flux}))
    assert (found.role, found.parts["transformer"].prefix) == ("transformer", "model.diffusion_model.")
    assert set(found.ignored) == set(ema)


def test_of_two_copies_the_better_known_is_taken(manifest: Callable[[str], Any]) -> None:
    flux = manifest("flux_dev_bfl")
    found = detect(in_memory({**shapes(flux, "teacher."), **shapes(flux, "model.diffusion_model.")}))
    assert found.parts["transformer"].prefix == "model.diffusion_model."
    assert len(found.unknown) == len(flux)
    assert "teacher." in found.notes[0]


def test_a_few_leftovers_of_another_part_are_no_part(manifest: Callable[[str], Any]) -> None:
    leftover = {"text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight": (4096,)}
    found = detect(in_memory({**shapes(manifest("flux_dev_bfl"), "model.diffusion_model."), **leftover}))
    assert (found.role, found.unknown) == ("transformer", tuple(leftover))


# ------------------------------------------------------------------------------------------------- other families

def test_every_lora_is_called_a_lora(manifest: Callable[[str], Any], lora_names: list[str]) -> None:
    assert len(lora_names) > 40
    called = {name: detect(in_memory(shapes(manifest(name)))).role for name in lora_names}
    assert set(called.values()) == {"lora"}, {name: role for name, role in called.items() if role != "lora"}


FAMILIES = {
    "an SDXL UNet": {"model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
                     "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048)},
    "an SD 1.5 UNet": {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768)},
    "an SD3 transformer": {f"model.diffusion_model.joint_blocks.{i}.x_block.attn.qkv.weight": (4608, 1536)
                           for i in range(3)},
    "Chroma": {"distilled_guidance_layer.in_proj.weight": (5120, 64),
               **{f"double_blocks.{i}.img_attn.qkv.weight": (9216, 3072) for i in range(19)}},
    "FLUX.2": {"double_stream_modulation_img.lin.weight": (36864, 6144), "img_in.weight": (6144, 128),
               **{f"double_blocks.{i}.img_attn.qkv.weight": (18432, 6144) for i in range(8)}},
    "ControlNet": {"controlnet_x_embedder.weight": (3072, 64), "x_embedder.weight": (3072, 64),
                   **{f"transformer_blocks.{i}.attn.add_q_proj.weight": (3072, 3072) for i in range(5)}},
    "4 latent channels": {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
                          **{f"first_stage_model.decoder.mid.block_{i}.conv1.bias": (512,) for i in (1, 2)},
                          "first_stage_model.encoder.mid.block_1.conv1.bias": (512,)},
    "CLIP-G": {"text_model.embeddings.token_embedding.weight": (49408, 1280),
               **{f"text_model.encoder.layers.{i}.mlp.fc1.weight": (5120, 1280) for i in range(32)}},
    "OpenCLIP": {"conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (3840, 1280)},
    **{f"CLIP {name} vision": {
        "vision_model.embeddings.class_embedding": (width,), "vision_model.pre_layrnorm.weight": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, 14, 14), "visual_projection.weight": (768, width),
        **{f"vision_model.encoder.layers.{i}.mlp.fc1.weight": (4 * width, width) for i in range(24)}}
       for name, width in (("ViT-B", 768), ("ViT-L", 1024), ("ViT-H", 1280), ("ViT-bigG", 1664))},
    "a CLIP ViT-H vision": {
        "embeddings.class_embedding": (1280,), "embeddings.patch_embedding.weight": (1280, 3, 14, 14),
        "embeddings.position_embedding.weight": (257, 1280), "post_layernorm.weight": (1280,),
        "post_layernorm.bias": (1280,), **{f"encoder.layers.{i}.mlp.fc1.weight": (5120, 1280) for i in range(32)}},
    "a CLIP model in OpenCLIP's": {"visual.transformer.resblocks.0.attn.in_proj_weight": (3840, 1280)},
    "NaFlex": {**vision(768, 16, 16, 12), "vision_model.embeddings.patch_embedding.weight": (768, 768)},
    "DINOv2": {"embeddings.patch_embeddings.projection.weight": (1024, 3, 14, 14)},
    "style adapter": {"style_embedding": (1, 8, 1024), "proj": (1024, 768)},
    "language model": {"model.layers.0.self_attn.q_proj.weight": (4096, 4096)},
    "UMT5": {"shared.weight": (256384, 4096),
             **{f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64)
                for i in range(24)}},
}


@pytest.mark.parametrize("says", sorted(FAMILIES))
def test_other_families_are_named(says: str) -> None:
    found = detect(in_memory(FAMILIES[says]))
    assert found.role == "unknown"
    assert says in found.family
    assert any(says in problem for problem in found.problems)


def check_whole(found: Detection) -> None:
    assert isinstance(found.family, str)
    for part in found.parts.values():
        assert part.problems or part.spec is not None
        if part.spec is not None:
            match({}, replace(part, names={}), build(part))  # sizes that a model can be built of


def test_an_sdxl_checkpoint_offers_its_clip_l_and_nothing_else(manifest: Callable[[str], Any]) -> None:
    tensors = {**FAMILIES["an SDXL UNet"], **FAMILIES["OpenCLIP"], **FAMILIES["4 latent channels"],
               **shapes(manifest("clip_l_hf"), "conditioner.embedders.0.transformer.")}
    found = detect(in_memory(tensors))
    assert found.role == "all-in-one"
    assert [role for role, part in found.parts.items() if not part.foreign] == ["clip_l"]
    assert "SDXL UNet" in found.family
    check_whole(found)


def test_a_whole_clip_beside_a_bare_transformer_is_no_other_family(manifest: Callable[[str], Any]) -> None:
    clip = {"clip_l.vision_model.embeddings.class_embedding": (1024,), **shapes(manifest("clip_l_hf"), "clip_l."),
            **{f"clip_l.vision_model.encoder.layers.{i}.mlp.fc1.weight": (4096, 1024) for i in range(24)}}
    found = detect(in_memory({**shapes(manifest("flux_dev_bfl")), **clip}))
    assert {role: part.spec for role, part in found.parts.items()} == {"transformer": FLUX_DEV, "clip_l": CLIP_L}
    assert found.problems == ()


@pytest.mark.parametrize(("width", "name"), [(512, "small"), (768, "base"), (1024, "large"), (2048, "XL")])
def test_another_size_of_t5_is_told(manifest: Callable[[str], Any], width: int, name: str) -> None:
    tensors = {**shapes(manifest("t5xxl_hf")), "shared.weight": (32128, width)}
    found = detect(in_memory(tensors))
    assert found.role == "t5"
    assert found.parts["t5"].spec.d_model == width
    assert f"T5 {name}" in found.notes[0]


@pytest.mark.parametrize(("suffix", "format"), [
    ("comfy_quant", "comfy_quant"), ("qweight", "nunchaku"),
    ("SCB", "8-bit")])
def test_quantised_files_are_named(manifest: Callable[[str], Any], suffix: str, format: str) -> None:
    tensors = shapes(manifest("flux_dev_bfl"))
    tensors |= {f"double_blocks.{i}.img_attn.qkv.{suffix}": (1,) for i in range(19)}
    found = detect(in_memory(tensors))
    assert found.role == "transformer"
    assert format in found.problems[0]


def test_nothing_recognised_says_what_is_there() -> None:
    found = detect(in_memory({"foo.weight": (3,), "bar\n": (2,)}))
    assert found.role == "unknown"
    assert "'bar\\n'" in found.family
    assert detect(in_memory({})).family == "a file without tensors"


WORDS = ["double_blocks", "single_blocks", "0", "1", "img_attn", "qkv", "weight", "scale", "text_model", "vae", "model",
         "encoder", "decoder", "embeddings", "token_embedding", "layers", "mlp", "fc1", "up", "block", "norm", "img_in",
         "transformer_blocks", "attn", "layer", "SelfAttention", "shared", "conv_in", "down_blocks", "", "vision_model",
         "patch_embedding", "post_layernorm", "bias", "redux_up", "redux_down"]


@given(st.dictionaries(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(".".join),
                       st.lists(st.sampled_from([0, 1, 3, 64, 128, 2**40, 2**62]), max_size=5).map(tuple), max_size=20))
def test_any_names_and_shapes_are_judged_without_a_crash(tensors: dict[str, tuple[int, ...]]) -> None:
    check_whole(detect(in_memory(tensors)))
