"""Specs and names against what the publishers' files and configurations say, at full size, on the meta device."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import (
    CLIP_L,
    FLUX_AE,
    FLUX_CONTROL,
    FLUX_DEV,
    FLUX_FILL,
    FLUX_SCHNELL,
    GROUP_NORM_EPS,
    GROUP_NORM_GROUPS,
    T5_XXL,
)
from oracles import autoencoder_oracle, flux_oracle, manifest, mapped, on_meta
from torch import nn

# Facts of the published configurations, typed by hand. black-forest-labs/flux `util.py`; config.json of the
# transformer, vae and text_encoder_2 of FLUX.1-dev; config.json of openai/clip-vit-large-patch14.
FLUX_PARAMS = {
    "in_channels": 64, "out_channels": 64, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
    "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": (16, 56, 56),
    "theta": 10_000, "qkv_bias": True, "guidance_embed": True,
}
AUTOENCODER_PARAMS = {
    "in_channels": 3, "ch": 128, "out_ch": 3, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "z_channels": 16,
    "scale_factor": 0.3611, "shift_factor": 0.1159,
}
T5_CONFIG = {
    "d_ff": 10240, "d_kv": 64, "d_model": 4096, "eos_token_id": 1, "layer_norm_epsilon": 1e-06, "num_heads": 64,
    "num_layers": 24, "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
CLIP_CONFIG = {
    "bos_token_id": 49406, "eos_token_id": 49407, "hidden_size": 768, "intermediate_size": 3072,
    "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "num_attention_heads": 12, "num_hidden_layers": 12,
    "vocab_size": 49408,
}


@pytest.mark.parametrize(("spec", "published"), [
    (FLUX_DEV, FLUX_PARAMS),
    (FLUX_SCHNELL, {**FLUX_PARAMS, "guidance_embed": False}),
    (FLUX_FILL, {**FLUX_PARAMS, "in_channels": 384}),
    (FLUX_CONTROL, {**FLUX_PARAMS, "in_channels": 128}),
    (FLUX_AE, AUTOENCODER_PARAMS),
    (T5_XXL, T5_CONFIG),
    (CLIP_L, CLIP_CONFIG),
], ids=["dev", "schnell", "fill", "control", "autoencoder", "t5", "clip"])
def test_specs_are_as_published(spec: object, published: dict[str, object]) -> None:
    ours = asdict(spec)  # type: ignore[call-overload]
    assert {key: ours[key] for key in published} == published


def test_what_follows_from_the_specs() -> None:
    assert (FLUX_DEV.head_dim, FLUX_AE.downscale) == (128, 8)
    variants = [spec.variant for spec in (FLUX_DEV, FLUX_SCHNELL, FLUX_FILL, FLUX_CONTROL)]
    assert variants == ["dev", "schnell", "fill", "control"]


def test_norms_are_as_published() -> None:
    """LayerNorm and q/k norms 1e-6 in the transformer; GroupNorm(32, 1e-6) in the autoencoder; 1e-5 in CLIP."""
    flux, autoencoder, clip = on_meta(Flux, FLUX_DEV), on_meta(Autoencoder, FLUX_AE), on_meta(ClipText, CLIP_L)
    eps = {module.eps for module in flux.modules() if hasattr(module, "eps")}
    assert eps == {1e-6}
    groups = {(m.num_groups, m.eps) for m in autoencoder.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {(32, 1e-6)} == {(GROUP_NORM_GROUPS, GROUP_NORM_EPS)}
    assert {m.eps for m in clip.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


MODELS = {
    "flux_dev_bfl": (Flux, FLUX_DEV), "flux_schnell_bfl": (Flux, FLUX_SCHNELL), "flux_fill_bfl": (Flux, FLUX_FILL),
    "flux_control_bfl": (Flux, FLUX_CONTROL), "ae_bfl": (Autoencoder, FLUX_AE), "t5xxl_hf": (T5Encoder, T5_XXL),
    "clip_l_hf": (ClipText, CLIP_L),
}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_the_published_file_s(name: str) -> None:
    ours = {key: list(value.shape) for key, value in on_meta(*MODELS[name]).state_dict().items()}
    assert ours == {key: shape for key, (shape, _) in manifest(name).items()}


@pytest.mark.parametrize(("name", "mapping", "other"), [
    ("flux_dev_bfl", "map_flux_bfl_to_diffusers", "flux_dev_diffusers"),
    ("flux_schnell_bfl", "map_flux_bfl_to_diffusers", "flux_schnell_diffusers"),
    ("flux_fill_bfl", "map_flux_bfl_to_diffusers", "flux_fill_diffusers"),
    ("flux_control_bfl", "map_flux_bfl_to_diffusers", "flux_control_diffusers"),
    ("ae_bfl", "map_ae_bfl_to_diffusers", "ae_diffusers"),
])
def test_layouts_map_onto_each_other(name: str, mapping: str, other: str) -> None:
    """Our model's tensors, renamed and cut as the map says, are the other layout's file: all of it, nothing else."""
    state = on_meta(*MODELS[name]).state_dict()
    there = {key: list(value.shape) for key, value in mapped(state, mapping).items()}
    assert there == {key: shape for key, (shape, _) in manifest(other).items()}


def test_oracles_take_the_maps_whole() -> None:
    """diffusers' own classes accept what the maps give at full size (strict loading, meta tensors)."""
    for spec, kind, oracle in ((FLUX_DEV, Flux, flux_oracle), (FLUX_AE, Autoencoder, autoencoder_oracle)):
        state = {key: torch.empty(1).expand(value.shape) for key, value in on_meta(kind, spec).state_dict().items()}
        assert sum(p.numel() for p in oracle(spec, state).parameters()) == sum(v.numel() for v in state.values())
