"""The sizes of a model, read off the shapes of its tensors.

What a missing or odd tensor would have told has its published value, so that the strict comparison of `load` can name
the tensor instead. What no shape tells (head width of CLIP and T5, rope axes) has the published rule in `specs`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ..specs import CLIP_L, FLUX_AE, FLUX_DEV, GROUP_NORM_GROUPS, REDUX, SIGLIP, T5_XXL
from .keymaps import Shape, Spec, source_of

MAX_WIDTH = 1 << 20
MAX_LAYERS = 256
MAX_LEVELS = 8
MAX_RES_BLOCKS = 16
IN_CHANNELS = {64: "dev, schnell", 128: "Depth, Canny", 384: "Fill"}
T5_SIZES = {512: "small", 768: "base", 1024: "large", 2048: "XL"}
CLIP_HEAD_WIDTH = 64
SIGLIP_SIZES = {768: "base", 1024: "large", 1152: "so400m"}
SIGLIP_HEAD_WIDTHS = (64, 72)
"""In this order, where the width is not a published one; so400m has heads of 72, base and large of 64."""
MAX_PICTURE = 2048


@dataclass(frozen=True)
class Sizes:
    """`spec` is worth nothing where there are `problems`; `notes` are worth telling."""

    spec: Spec
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class Shapes:
    """Looks sizes up under our names, whatever the layout."""

    def __init__(self, layout: str, shapes: Mapping[str, Shape], like: Spec) -> None:
        self.layout, self.shapes = "hf" if layout == "gguf" else layout, shapes  # llama.cpp's names are respelled
        self.source = source_of(layout, like)

    def size(self, name: str, axis: int, default: int, *others: tuple[str, int]) -> int:
        """Size of `axis` of our tensor `name`, else of the first of `others` that is there, else `default`."""
        for candidate, where in ((name, axis), *others):
            found = self.shapes.get(self.source(candidate, (0, 0, 0, 0)).pieces[0].name, ())
            if len(found) > where and 0 < found[where] <= MAX_WIDTH:
                return found[where]
        return default

    def count(self, **patterns: str) -> int:
        """One more than the highest number in the group of this layout's pattern; 0 if nothing matches."""
        return count(self.shapes, patterns[self.layout])

    def any(self, **patterns: str) -> bool:
        pattern = re.compile(patterns[self.layout])
        return any(pattern.search(name) for name in self.shapes)


def count(names: Iterable[str], pattern: str) -> int:
    matches = (re.match(pattern, name) for name in names)
    numbers = [int(match[1]) for match in matches if match is not None and len(match[1]) <= 4]
    return min(max(numbers, default=-1) + 1, MAX_LAYERS)


def read_flux(layout: str, shapes: Mapping[str, Shape]) -> Sizes:
    at = Shapes(layout, shapes, FLUX_DEV)
    hidden = at.size("img_in.weight", 0, FLUX_DEV.hidden_size, ("txt_in.weight", 0), ("time_in.out_layer.weight", 0))
    head_dim = at.size("double_blocks.0.img_attn.norm.query_norm.scale", 0, FLUX_DEV.head_dim,
                       ("single_blocks.0.norm.query_norm.scale", 0))
    mlp = at.size("double_blocks.0.img_mlp.0.weight", 0, int(hidden * FLUX_DEV.mlp_ratio),
                  ("double_blocks.0.txt_mlp.0.weight", 0))
    spec = replace(
        FLUX_DEV,
        in_channels=at.size("img_in.weight", 1, FLUX_DEV.in_channels),
        out_channels=at.size("final_layer.linear.weight", 0, FLUX_DEV.out_channels),
        vec_in_dim=at.size("vector_in.in_layer.weight", 1, FLUX_DEV.vec_in_dim),
        context_in_dim=at.size("txt_in.weight", 1, FLUX_DEV.context_in_dim),
        hidden_size=hidden, mlp_ratio=mlp / hidden, num_heads=max(hidden // head_dim, 1),
        depth=at.count(bfl=r"double_blocks\.(\d+)\.", diffusers=r"transformer_blocks\.(\d+)\."),
        depth_single_blocks=at.count(bfl=r"single_blocks\.(\d+)\.", diffusers=r"single_transformer_blocks\.(\d+)\."),
        qkv_bias=at.any(bfl=r"_attn\.qkv\.bias$", diffusers=r"^transformer_blocks\..*attn\.(?:to_q|add_q_proj)\.bias$"),
        guidance_embed=at.any(bfl=r"^guidance_in\.", diffusers=r"^time_text_embed\.guidance_embedder\."),
        frequency_dim=at.size("time_in.in_layer.weight", 1, FLUX_DEV.frequency_dim))
    problems = []
    if head_dim != FLUX_DEV.head_dim or hidden % head_dim:
        problems.append(f"its attention heads are {head_dim} wide in a stream of {hidden}; FLUX.1's are "
                        f"{FLUX_DEV.head_dim} wide and fill the stream")
    if spec.in_channels not in IN_CHANNELS:
        known = ", ".join(f"{width} ({names})" for width, names in IN_CHANNELS.items())
        problems.append(f"img_in takes {spec.in_channels} channels; FLUX.1 models take {known}")
    return Sizes(spec, tuple(problems))


def read_autoencoder(layout: str, shapes: Mapping[str, Shape]) -> Sizes:
    at = Shapes(layout, shapes, FLUX_AE)
    ch = at.size("encoder.conv_in.weight", 0, FLUX_AE.ch, ("decoder.norm_out.weight", 0))
    levels = at.count(bfl=r"(?:encoder\.down|decoder\.up)\.(\d+)\.",
                      diffusers=r"(?:encoder\.down|decoder\.up)_blocks\.(\d+)\.")
    # the decoder has one block more a level, so it tells also where the encoder has none
    widths = [at.size(f"decoder.up.{i}.block.0.conv1.weight", 0, ch, (f"encoder.down.{i}.block.0.conv1.weight", 0))
              for i in range(levels)]
    blocks = at.count(bfl=r"decoder\.up\.\d+\.block\.(\d+)\.",
                      diffusers=r"decoder\.up_blocks\.\d+\.resnets\.(\d+)\.") - 1
    if blocks < 0:
        blocks = at.count(bfl=r"encoder\.down\.\d+\.block\.(\d+)\.",
                          diffusers=r"encoder\.down_blocks\.\d+\.resnets\.(\d+)\.") or FLUX_AE.num_res_blocks
    spec = replace(
        FLUX_AE,
        in_channels=at.size("encoder.conv_in.weight", 1, FLUX_AE.in_channels),
        out_ch=at.size("decoder.conv_out.weight", 0, FLUX_AE.out_ch), ch=ch,
        ch_mult=tuple(width // ch for width in widths) or FLUX_AE.ch_mult,
        num_res_blocks=blocks,
        z_channels=at.size("decoder.conv_in.weight", 1, FLUX_AE.z_channels))
    problems = []
    if any(width % ch or width % GROUP_NORM_GROUPS for width in (ch, *widths)):
        problems.append(f"its widths {widths} are not multiples of the first ({ch}) and of {GROUP_NORM_GROUPS}")
    if levels > MAX_LEVELS or blocks > MAX_RES_BLOCKS:
        problems.append(f"it has {levels} resolutions of {blocks} blocks; FLUX.1 has {len(FLUX_AE.ch_mult)} of "
                        f"{FLUX_AE.num_res_blocks}")
    if spec.z_channels != FLUX_AE.z_channels:
        problems.append(f"it has {spec.z_channels} latent channels; FLUX.1 has {FLUX_AE.z_channels}")
    if at.any(bfl=r"quant_conv\.", diffusers=r"quant_conv\."):
        problems.append("it has quant convolutions; FLUX.1's autoencoder has none")
    return Sizes(spec, tuple(problems))


def read_t5(layout: str, shapes: Mapping[str, Shape]) -> Sizes:
    at = Shapes(layout, shapes, T5_XXL)
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    inner = at.size(f"{attention}.q.weight", 0, T5_XXL.num_heads * T5_XXL.d_kv)
    heads = at.size(f"{attention}.relative_attention_bias.weight", 1, max(inner // T5_XXL.d_kv, 1))
    spec = replace(
        T5_XXL,
        vocab_size=at.size("shared.weight", 0, T5_XXL.vocab_size),
        d_model=at.size("shared.weight", 1, T5_XXL.d_model, (f"{attention}.q.weight", 1)),
        d_kv=max(inner // heads, 1), num_heads=heads,
        d_ff=at.size(f"{feed_forward}.wi_0.weight", 0, T5_XXL.d_ff, (f"{feed_forward}.wi_1.weight", 0)),
        num_layers=at.count(hf=r"encoder\.block\.(\d+)\."),
        relative_attention_num_buckets=at.size(f"{attention}.relative_attention_bias.weight", 0,
                                               T5_XXL.relative_attention_num_buckets))
    notes = []
    if spec.d_model in T5_SIZES:
        notes.append(f"this is T5 {T5_SIZES[spec.d_model]} (width {spec.d_model}); FLUX.1 takes T5 v1.1 XXL "
                     f"(width {T5_XXL.d_model})")
    problems = []
    if inner % heads:
        problems.append(f"its attention is {inner} wide, which {heads} heads do not divide")
    return Sizes(spec, tuple(problems), tuple(notes))


def read_clip(layout: str, shapes: Mapping[str, Shape]) -> Sizes:
    at = Shapes(layout, shapes, CLIP_L)
    embeddings, layer = "text_model.embeddings", "text_model.encoder.layers.0"
    hidden = at.size(f"{embeddings}.token_embedding.weight", 1, CLIP_L.hidden_size,
                     ("text_model.final_layer_norm.weight", 0))
    vocab = at.size(f"{embeddings}.token_embedding.weight", 0, CLIP_L.vocab_size)
    spec = replace(
        CLIP_L, vocab_size=vocab, hidden_size=hidden,
        intermediate_size=at.size(f"{layer}.mlp.fc1.weight", 0, CLIP_L.intermediate_size),
        num_hidden_layers=at.count(hf=r"text_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=max(hidden // CLIP_HEAD_WIDTH, 1),
        max_position_embeddings=at.size(f"{embeddings}.position_embedding.weight", 0, CLIP_L.max_position_embeddings),
        bos_token_id=vocab - 2, eos_token_id=vocab - 1)
    problems = () if hidden % CLIP_HEAD_WIDTH == 0 else (
        f"its stream is {hidden} wide, not a multiple of the head width {CLIP_HEAD_WIDTH}",)
    return Sizes(spec, problems)


def read_vision(layout: str, shapes: Mapping[str, Shape]) -> Sizes:
    at = Shapes(layout, shapes, SIGLIP)
    patches, layer = "vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers.0"
    hidden = at.size(patches, 0, SIGLIP.hidden_size, ("vision_model.post_layernorm.weight", 0))
    patch = at.size(patches, 2, SIGLIP.patch_size)
    positions = at.size("vision_model.embeddings.position_embedding.weight", 0, SIGLIP.num_positions)
    side = math.isqrt(positions)
    published = (positions, patch) == (SIGLIP.num_positions, SIGLIP.patch_size)  # 384 is no multiple of 14
    head = SIGLIP.hidden_size // SIGLIP.num_attention_heads if hidden == SIGLIP.hidden_size else next(
        (width for width in SIGLIP_HEAD_WIDTHS if hidden % width == 0), 0)
    spec = replace(
        SIGLIP,
        num_channels=at.size(patches, 1, SIGLIP.num_channels), patch_size=patch,
        image_size=SIGLIP.image_size if published else side * patch, hidden_size=hidden,
        intermediate_size=at.size(f"{layer}.mlp.fc1.weight", 0, SIGLIP.intermediate_size),
        num_hidden_layers=at.count(hf=r"vision_model\.encoder\.layers\.(\d+)\."),
        num_attention_heads=hidden // head if head else 1,
        vision_use_head=at.any(hf=r"^vision_model\.head\."))
    problems = []
    if not head:
        widths = " or ".join(map(str, SIGLIP_HEAD_WIDTHS))
        problems.append(f"its stream is {hidden} wide, not a multiple of the head width {widths}")
    if spec.num_channels != SIGLIP.num_channels:
        problems.append(f"it sees pictures of {spec.num_channels} channels, not {SIGLIP.num_channels}")
    if side * side != positions:
        problems.append(f"its {positions} positions do not make a square")
    elif spec.image_size > MAX_PICTURE:
        problems.append(f"it sees pictures of {spec.image_size} x {spec.image_size}; at most {MAX_PICTURE} are read")
    notes = []
    if hidden != SIGLIP.hidden_size and hidden in SIGLIP_SIZES:
        notes.append(f"this is SigLIP {SIGLIP_SIZES[hidden]} (width {hidden}); FLUX.1 Redux takes SigLIP so400m "
                     f"(width {SIGLIP.hidden_size})")
    return Sizes(spec, tuple(problems), tuple(notes))


def read_redux(layout: str, shapes: Mapping[str, Shape]) -> Sizes:
    at = Shapes(layout, shapes, REDUX)
    features = at.size("redux_down.weight", 0, REDUX.txt_in_features, ("redux_down.bias", 0))
    spec = replace(REDUX, redux_dim=at.size("redux_up.weight", 1, REDUX.redux_dim), txt_in_features=features)
    hidden = at.size("redux_up.weight", 0, spec.hidden_size, ("redux_up.bias", 0))
    problems = () if hidden == spec.hidden_size else (
        f"it goes from {spec.redux_dim} through {hidden} to {features}; FLUX.1 Redux goes from {REDUX.redux_dim} "
        f"through {REDUX.hidden_size} to {REDUX.txt_in_features}, three times as wide in the middle as at the end",)
    return Sizes(spec, problems)


SPECS: Mapping[str, Callable[[str, Mapping[str, Shape]], Sizes]] = {
    "transformer": read_flux, "vae": read_autoencoder, "t5": read_t5, "clip_l": read_clip,
    "vision": read_vision, "redux": read_redux,
}
"""Role -> reader of its sizes, from the layout and the shapes by bare name."""


def read_spec(role: str, layout: str, shapes: Mapping[str, Shape]) -> Sizes:
    return SPECS[role](layout, shapes)
