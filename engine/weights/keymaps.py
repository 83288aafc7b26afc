"""How the names of one layout become those of another.

The models carry the names of the published checkpoints: BFL's for the transformer and the autoencoder, Hugging Face's
for T5, CLIP and SigLIP. A map says, for one of our tensors, which rows of which foreign tensors fill it: `Source`. It
is worked out from the name and shape of our tensor, so any depth and width has one.

Sources: black-forest-labs/flux (names), huggingface/diffusers `FluxTransformer2DModel` and `AutoencoderKL` and its
conversion scripts (the other side); modules are rows here, and blocks are one row for all depths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..specs import AutoencoderSpec, ClipTextSpec, FluxSpec, ReduxSpec, SiglipSpec, T5Spec

Shape = tuple[int, ...]
Spec = FluxSpec | AutoencoderSpec | T5Spec | ClipTextSpec | SiglipSpec | ReduxSpec


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `first + rows` of ours are rows `theirs` to `theirs + rows` of the foreign tensor `name`."""

    name: str
    first: int
    rows: int
    theirs: int = 0


@dataclass(frozen=True)
class Source:
    """Where one tensor of ours comes from.

    `op` is `copy`, `split_rows` (ours is theirs, one below the other), `swap_halves` (both halves of one tensor change
    places) or `reshape` (same elements, `shape` there).
    """

    op: str
    pieces: tuple[Piece, ...]
    shapes: tuple[Shape, ...]
    """The shape each foreign tensor must have, in the order of `names`."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(piece.name for piece in self.pieces))


SourceOf = Callable[[str, Shape], Source]

_Q_K_V = ("to_q", "to_k", "to_v")
_FLUX_GLOBALS: tuple[tuple[str, str], ...] = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("final_layer.linear", "proj_out"),
)
_FLUX_DOUBLE: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("img_mod.lin", "norm1.linear"),
    ("img_attn.qkv", tuple(f"attn.{name}" for name in _Q_K_V)),
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("img_attn.proj", "attn.to_out.0"),
    ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"),
    ("txt_mod.lin", "norm1_context.linear"),
    ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
    ("txt_attn.proj", "attn.to_add_out"),
    ("txt_mlp.0", "ff_context.net.0.proj"),
    ("txt_mlp.2", "ff_context.net.2"),
)
_FLUX_SINGLE: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("modulation.lin", "norm.linear"),
    ("linear1", (*(f"attn.{name}" for name in _Q_K_V), "proj_mlp")),
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
    ("linear2", "proj_out"),
)
FLUX_MODULES: Mapping[str, Mapping[str, str | tuple[str, ...]]] = {
    "": dict(_FLUX_GLOBALS), "double_blocks": dict(_FLUX_DOUBLE), "single_blocks": dict(_FLUX_SINGLE),
}
"""Kind of block -> our module in it -> the foreign one, or those whose rows make it up, in order."""

FLUX_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
SWAPPED = "final_layer.adaLN_modulation.1"
"""BFL's final modulation has shift above scale, diffusers' scale above shift."""

_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")

AE_SEGMENTS: tuple[tuple[str, str], ...] = (
    (r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bup\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"\bup\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\bmid\.block_1\.", r"mid_block.resnets.0."),
    (r"\bmid\.block_2\.", r"mid_block.resnets.1."),
    (r"\bmid\.attn_1\.norm\.", r"mid_block.attentions.0.group_norm."),
    (r"\bmid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"\bmid\.attn_1\.proj_out\.", r"mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)
"""Parts of an autoencoder name, BFL's pattern and diffusers' replacement; `up` is counted from the other end."""

_UP = re.compile(r"^decoder\.up\.(\d+)\.")
_CONV_1X1 = re.compile(r"\bmid\.attn_1\.(?:[qkv]|proj_out)\.weight$")


def flux_source(hidden: int) -> SourceOf:
    """Where diffusers' layout keeps a transformer tensor, from its BFL name and shape; `hidden` is the stream's width.

    The map raises KeyError for names that the transformer does not have.
    """
    def source(name: str, shape: Shape) -> Source:
        module, _, kind = name.rpartition(".")
        if kind == "scale":
            kind = "weight"
        block = _BLOCK.fullmatch(module)
        if block is None:
            theirs, place = FLUX_MODULES[""][module], ""
        else:
            theirs, place = FLUX_MODULES[block[1]][block[3]], f"{FLUX_BLOCKS[block[1]]}.{block[2]}."
        rows = shape[0]
        if module == SWAPPED:
            full, half = f"{place}{theirs}.{kind}", rows // 2
            return Source("swap_halves", (Piece(full, 0, half, half), Piece(full, half, half, 0)), (shape,))
        if isinstance(theirs, str):
            return Source("copy", (Piece(f"{place}{theirs}.{kind}", 0, rows),), (shape,))
        sizes = [hidden] * 3 + [rows - 3 * hidden] * (len(theirs) - 3)  # q, k, v, and in linear1 the MLP
        return Source("split_rows",
                      tuple(Piece(f"{place}{part}.{kind}", hidden * i, size)
                            for i, (part, size) in enumerate(zip(theirs, sizes, strict=True))),
                      tuple((size, *shape[1:]) for size in sizes))
    return source


def autoencoder_source(levels: int) -> SourceOf:
    """The same for the autoencoder of `levels` resolutions."""
    def source(name: str, shape: Shape) -> Source:
        theirs = _UP.sub(lambda match: f"decoder.up.{levels - 1 - int(match[1])}.", name)
        for pattern, replacement in AE_SEGMENTS:
            theirs = re.sub(pattern, replacement, theirs)
        if _CONV_1X1.search(name):
            return Source("reshape", (Piece(theirs, 0, shape[0]),), (shape[:2],))
        return Source("copy", (Piece(theirs, 0, shape[0]),), (shape,))
    return source


def same_names(name: str, shape: Shape) -> Source:
    """The layouts the models are named after."""
    return Source("copy", (Piece(name, 0, shape[0] if shape else 1),), (shape,))


def source_of(layout: str, spec: Spec) -> SourceOf:
    """The map from (our name, our shape) to the `Source` in `layout`, for the model that `spec` describes."""
    if layout == "diffusers" and isinstance(spec, FluxSpec):
        return flux_source(spec.hidden_size)
    if layout == "diffusers" and isinstance(spec, AutoencoderSpec):
        return autoencoder_source(len(spec.ch_mult))
    return same_names


def assemble(source: Source, shape: Shape, read: Callable[[str], Tensor], *, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu") -> Tensor:
    """Our tensor, `shape` in `dtype` (None: as stored) on `device`; a view of what `read` gives where nothing changes.

    Fused tensors are filled slice by slice, so that no more than one foreign tensor is held beside the result.
    """
    if source.op in ("copy", "reshape"):
        return read(source.pieces[0].name).reshape(shape).to(device=device, dtype=dtype)
    first = read(source.pieces[0].name)
    out = torch.empty(shape, dtype=dtype or first.dtype, device=device)
    for piece in source.pieces:
        out[piece.first:piece.first + piece.rows].copy_(
            read(piece.name)[piece.theirs:piece.theirs + piece.rows].reshape(piece.rows, *shape[1:]))
    return out


def to_diffusers(tensors: Mapping[str, Tensor], spec: FluxSpec | AutoencoderSpec) -> dict[str, Tensor]:
    """A transformer's or autoencoder's state dict with our names -> diffusers' names and shapes (copies)."""
    source = source_of("diffusers", spec)
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        where = source(name, tuple(tensor.shape))
        for foreign, shape in zip(where.names, where.shapes, strict=True):
            converted[foreign] = torch.empty(shape, dtype=tensor.dtype)
        for piece in where.pieces:
            target = converted[piece.name][piece.theirs:piece.theirs + piece.rows]
            target.copy_(tensor[piece.first:piece.first + piece.rows].reshape(target.shape))
    return converted


def from_diffusers(tensors: Mapping[str, Tensor], spec: FluxSpec | AutoencoderSpec,
                   ours: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The reverse: `ours` are the names and shapes wanted, as a model's `state_dict` has them."""
    source = source_of("diffusers", spec)
    return {name: assemble(source(name, shape), shape, tensors.__getitem__) for name, shape in ours.items()}


@dataclass(frozen=True)
class Spelling:
    """Another way of writing names of a role: `pattern` at any place of a bare name becomes `replacement`."""

    role: str
    pattern: re.Pattern[str]
    replacement: str
    unless: str | None = None
    """Not where a tensor of this name is there too: then the odd spelling is a copy."""


SPELLINGS: tuple[Spelling, ...] = (
    # ComfyUI since 0.18 saves its q/k norms so
    Spelling("transformer", re.compile(r"(query_norm|key_norm)\.weight$"), r"\1.scale"),
    # transformers since 5 drops the tower's name when it saves
    Spelling("clip_l", re.compile(r"^(?=embeddings\.|encoder\.|final_layer_norm\.)"), "text_model."),
    Spelling("vision", re.compile(r"^(?=embeddings\.|encoder\.|post_layernorm\.|head\.)"), "vision_model."),
    # the embedding is tied; which of the two names is kept depends on the writer
    Spelling("t5", re.compile(r"^encoder\.embed_tokens\.weight$"), "shared.weight", unless="shared.weight"),
    # llama.cpp's names (gguf-py, tensor_mapping.py), in GGUF files
    *(Spelling("t5", re.compile(rf"^enc\.blk\.(\d+)\.{theirs}\."), rf"encoder.block.\1.layer.{ours}.")
      for theirs, ours in (
          ("attn_norm", "0.layer_norm"), ("attn_([qkvo])", r"0.SelfAttention.\2"),
          ("attn_rel_b", "0.SelfAttention.relative_attention_bias"), ("ffn_norm", "1.layer_norm"),
          ("ffn_gate", "1.DenseReluDense.wi_0"), ("ffn_up", "1.DenseReluDense.wi_1"),
          ("ffn_down", "1.DenseReluDense.wo"))),
    Spelling("t5", re.compile(r"^enc\.output_norm\."), "encoder.final_layer_norm."),
    Spelling("t5", re.compile(r"^token_embd\."), "shared."),
)


def respelled(role: str, names: Iterable[str]) -> dict[str, str]:
    """Our spelling -> the spelling found, for the bare names of one part; of two for one tensor ours is taken.

    The one left over stays under its own name, so that it is seen as surplus.
    """
    rows = [row for row in SPELLINGS if row.role == role]
    found = {name: name for name in names}
    for row in rows:
        if row.unless in found:
            continue
        for name in list(found):
            ours = row.pattern.sub(row.replacement, name, count=1)
            if ours not in found:
                found[ours] = found.pop(name)
    return found
