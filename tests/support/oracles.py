"""Random weights, and the same weights inside diffusers' and transformers' classes.

The maps of names are data (`tests/data/manifests/map_*.json.gz`) and are interpreted here independently of the package.
Tensors are shared wherever the layouts allow it, so that full-width models need their memory once.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from flux_kit.engine.specs import AutoencoderSpec, ClipTextSpec, FluxSpec, T5Spec
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

State = dict[str, Tensor]
MANIFESTS = Path(__file__).parent.parent / "data" / "manifests"


def manifest(name: str) -> dict[str, Any]:
    """A list of tensors (name -> [shape, dtype]) or a map of names, as published."""
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


# ---------------------------------------------------------------------------------------------------- our models

def on_meta(kind: type[nn.Module], spec: object) -> nn.Module:
    with torch.device("meta"):
        return kind(spec).eval().requires_grad_(False)  # type: ignore[call-arg]


def random_state(model: nn.Module, seed: int = 0) -> State:
    """Values for every parameter: matrices that keep the variance, scales about 1, biases about 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, like in model.state_dict().items():
        value = torch.empty(like.shape).uniform_(-1, 1, generator=generator)
        if like.ndim == 1:
            value = 1 + 0.3 * value if name.endswith(("scale", "norm.weight", "weight")) else 0.1 * value
        elif "embed" not in name and "shared" not in name and "relative" not in name:
            value.mul_(math.sqrt(3 / value[0].numel()))
        state[name] = value
    return state


def loaded(model: nn.Module, state: State) -> nn.Module:
    model.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    return model.eval().requires_grad_(False)


def tied(state: State, name: str, depth: int) -> State:
    """The only block of the list `name` repeated to `depth`: one storage, many names."""
    out = {}
    for key, value in state.items():
        if key.startswith(f"{name}.0."):
            out |= {f"{name}.{i}.{key.removeprefix(f'{name}.0.')}": value for i in range(depth)}
        else:
            out[key] = value
    return out


# ------------------------------------------------------------------------------------------------ maps of layouts

def _whole(name: str, value: Tensor, row: dict[str, Any]) -> State:
    return {row["to"][0][0]: value}


def _split_rows(name: str, value: Tensor, row: dict[str, Any]) -> State:
    """Row counts are published for hidden 3072; other widths keep the proportions."""
    total = sum(rows for _, _, rows in row["to"])
    unit = value.shape[0] / total
    return {to: value[round(first * unit):round((first + rows) * unit)] for to, first, rows in row["to"]}


def _swap_halves(name: str, value: Tensor, row: dict[str, Any]) -> State:
    half = value.shape[0] // 2
    return {row["to"][0][0]: torch.cat((value[half:], value[:half]))}


def _reshape(name: str, value: Tensor, row: dict[str, Any]) -> State:
    return {row["to"][0][0]: value.flatten(1)}


OPS = {"copy": _whole, "split_rows": _split_rows, "swap_halves": _swap_halves, "reshape": _reshape}


def mapped(state: State, name: str) -> State:
    """The state under the names of the other layout; every tensor has to be known to the map."""
    rows = manifest(name)
    out: State = {}
    for key, value in state.items():
        new = OPS[rows[key]["op"]](key, value, rows[key])
        assert not new.keys() & out.keys()
        out |= new
    return out


# ------------------------------------------------------------------------------------------------------- oracles

def flux_oracle(spec: FluxSpec, state: State) -> FluxTransformer2DModel:
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=spec.in_channels, out_channels=spec.out_channels, num_layers=spec.depth,
            num_single_layers=spec.depth_single_blocks, attention_head_dim=spec.head_dim,
            num_attention_heads=spec.num_heads, joint_attention_dim=spec.context_in_dim,
            pooled_projection_dim=spec.vec_in_dim, guidance_embeds=spec.guidance_embed,
            axes_dims_rope=spec.axes_dim)
    return loaded(model, mapped(state, "map_flux_bfl_to_diffusers"))


def autoencoder_oracle(spec: AutoencoderSpec, state: State) -> AutoencoderKL:
    levels = len(spec.ch_mult)
    with torch.device("meta"):
        model = AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels, block_out_channels=[spec.ch * m for m in spec.ch_mult],
            layers_per_block=spec.num_res_blocks, act_fn="silu", latent_channels=spec.z_channels, norm_num_groups=32,
            use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=True)
    return loaded(model, mapped(state, "map_ae_bfl_to_diffusers"))


def t5_oracle(spec: T5Spec, state: State) -> T5EncoderModel:
    config = T5Config(
        vocab_size=spec.vocab_size, d_model=spec.d_model, d_kv=spec.d_kv, d_ff=spec.d_ff, num_layers=spec.num_layers,
        num_heads=spec.num_heads, relative_attention_num_buckets=32, relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu", dropout_rate=0.0, attn_implementation="eager")
    with torch.device("meta"):
        model = T5EncoderModel(config)
    return loaded(model, {**state, "encoder.embed_tokens.weight": state["shared.weight"]})


def clip_oracle(spec: ClipTextSpec, state: State) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers, num_attention_heads=spec.num_attention_heads,
        max_position_embeddings=spec.max_position_embeddings, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        bos_token_id=spec.bos_token_id, eos_token_id=spec.eos_token_id, attn_implementation="eager")
    model = CLIPTextModel(config)  # not on meta: it keeps a table of positions that no file holds
    wanted = set(model.state_dict())
    short = {key.removeprefix("text_model."): value for key, value in state.items()}
    return loaded(model, state if set(state) <= wanted else short)
