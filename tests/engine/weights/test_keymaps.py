"""The maps between layouts, against the published maps and against diffusers' and transformers' own classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.specs import FLUX_AE, FLUX_DEV, AutoencoderSpec, FluxSpec
from flux_kit.engine.weights import from_diffusers, to_diffusers
from flux_kit.engine.weights.keymaps import respelled, source_of

FLUX_SPECS = [
    FluxSpec(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=2, context_in_dim=64, vec_in_dim=32),
    FluxSpec(hidden_size=256, num_heads=2, depth=3, depth_single_blocks=1, mlp_ratio=2.0, in_channels=128,
             context_in_dim=8, vec_in_dim=8, guidance_embed=False),
    FluxSpec(hidden_size=384, num_heads=3, depth=1, depth_single_blocks=0, mlp_ratio=3.0, context_in_dim=8,
             vec_in_dim=8),
    FluxSpec(hidden_size=128, num_heads=1, depth=0, depth_single_blocks=11, context_in_dim=8, vec_in_dim=8),
]
AE_SPECS = [AutoencoderSpec(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1),
            AutoencoderSpec(ch=64, ch_mult=(1, 2, 3), num_res_blocks=2), AutoencoderSpec(ch=32, ch_mult=(2, 4))]


@pytest.mark.parametrize(("spec", "ours", "theirs", "published"), [
    (FLUX_DEV, "flux_dev_bfl", "flux_dev_diffusers", "map_flux_bfl_to_diffusers"),
    (FLUX_AE, "ae_bfl", "ae_diffusers", "map_ae_bfl_to_diffusers")])
def test_the_maps_are_the_published_ones(manifest: Callable[[str], dict[str, Any]], spec: FluxSpec | AutoencoderSpec,
                                         ours: str, theirs: str, published: str) -> None:
    source, expected = source_of("diffusers", spec), manifest(published)
    foreign = {}
    for name, (shape, _) in manifest(ours).items():
        found = source(name, shape)
        row = expected.pop(name)
        assert found.op == row["op"]
        if found.op == "swap_halves":
            half = shape[0] // 2
            assert [(p.first, p.rows, p.theirs) for p in found.pieces] == [(0, half, half), (half, half, 0)]
            assert row["to"] == [[found.names[0], 0, shape[0]]]
        else:
            assert [[p.name, p.first, p.rows] for p in found.pieces] == row["to"]
            assert all(p.theirs == 0 for p in found.pieces)
        if found.op == "reshape":
            assert [list(shape) for shape in found.shapes] == [row["reshape"]]
        foreign.update(zip(found.names, found.shapes, strict=True))
    assert not expected
    assert foreign == {name: shape for name, (shape, _) in manifest(theirs).items()}


def diffusers_model(spec: FluxSpec | AutoencoderSpec) -> torch.nn.Module:
    if isinstance(spec, FluxSpec):
        return diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=spec.in_channels, out_channels=spec.out_channels, num_layers=spec.depth,
            num_single_layers=spec.depth_single_blocks, attention_head_dim=spec.head_dim,
            num_attention_heads=spec.num_heads, joint_attention_dim=spec.context_in_dim,
            pooled_projection_dim=spec.vec_in_dim, guidance_embeds=spec.guidance_embed, axes_dims_rope=spec.axes_dim)
    levels = len(spec.ch_mult)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(spec.ch * m for m in spec.ch_mult), layers_per_block=spec.num_res_blocks,
        latent_channels=spec.z_channels, use_quant_conv=False, use_post_quant_conv=False)


def our_shapes(spec: FluxSpec | AutoencoderSpec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Flux(spec) if isinstance(spec, FluxSpec) else Autoencoder(spec)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("spec", [FLUX_SPECS[0], replace(FLUX_SPECS[1], mlp_ratio=4.0), AE_SPECS[0], AE_SPECS[1]],
                         ids=["flux", "flux schnell", "ae", "ae of 3 levels"])
def test_names_and_shapes_are_those_of_diffusers(spec: FluxSpec | AutoencoderSpec) -> None:
    source = source_of("diffusers", spec)
    found = {}
    for name, shape in our_shapes(spec).items():
        where = source(name, shape)
        found.update(zip(where.names, where.shapes, strict=True))
    with torch.device("meta"):
        theirs = diffusers_model(spec).state_dict()
    assert found == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("spec", [*FLUX_SPECS, *AE_SPECS], ids=lambda spec: type(spec).__name__)
def test_there_and_back_changes_nothing(spec: FluxSpec | AutoencoderSpec) -> None:
    """With every element its own number, so that no swap goes unseen."""
    shapes, start, tensors = our_shapes(spec), 0, {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + size, dtype=torch.int32).reshape(shape)
        start += size
    theirs = to_diffusers(tensors, spec)
    assert sum(tensor.numel() for tensor in theirs.values()) == start
    back = from_diffusers(theirs, spec, shapes)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("role", "found", "ours"), [
    ("transformer", ["double_blocks.0.img_attn.norm.query_norm.weight", "single_blocks.3.norm.key_norm.weight"],
     ["double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.3.norm.key_norm.scale"]),
    ("transformer", ["norm.key_norm.scale", "norm.key_norm.weight"], ["norm.key_norm.scale", "norm.key_norm.weight"]),
    ("clip_l", ["encoder.layers.0.mlp.fc1.bias", "final_layer_norm.bias", "text_projection.weight"],
     ["text_model.encoder.layers.0.mlp.fc1.bias", "text_model.final_layer_norm.bias", "text_projection.weight"]),
    ("t5", ["encoder.embed_tokens.weight"], ["shared.weight"]),
    ("t5", ["encoder.embed_tokens.weight", "shared.weight"], ["encoder.embed_tokens.weight", "shared.weight"]),
    ("vae", ["decoder.norm_out.weight"], ["decoder.norm_out.weight"]),
])
def test_spellings(role: str, found: list[str], ours: list[str]) -> None:
    assert respelled(role, found) == dict(zip(ours, found, strict=True))
