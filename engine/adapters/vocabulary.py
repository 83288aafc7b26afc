"""Where an adapter may go: the layers of FLUX.1 and its text encoders, and what the trainers call them.

A vocabulary maps the names of one naming scheme, dotted, to destinations: a layer of ours, and the part of its rows
that is meant. Nothing is guessed from the adapter's own numbers. Sources: black-forest-labs/flux, huggingface/diffusers
(`FluxTransformer2DModel`), XLabs-AI/x-flux, transformers (CLIP, T5), Nerogar/OneTrainer (OMI names).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..specs import CLIP_L, FLUX_DEV, T5_XXL, ClipTextSpec, FluxSpec, T5Spec
from ..weights.keymaps import FLUX_BLOCKS, FLUX_MODULES, SWAPPED

Size = tuple[int, ...]
"""`(out, in)` of a linear layer, `(rows, width)` of an embedding, `(width,)` of a norm."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Rows of a layer. `role`: the model; `module`: our name of the layer, or of the tensor if it is no weight.

    `parts`: first and last + 1 of the parts q, k, v (and mlp in `linear1`) that are meant, None for all rows.
    `swapped`: the adapter has both halves of the rows in the other order.
    """

    role: str
    module: str
    parts: tuple[int, int] | None = None
    swapped: bool = False

    def rows(self, size: Size) -> slice:
        """The rows meant, in a layer of this size."""
        if self.parts is None:
            return slice(0, size[0])
        width = size[1] if self.module.endswith("linear1") else size[0] // 3
        edges = [0, width, 2 * width, 3 * width, size[0]]
        return slice(edges[self.parts[0]], edges[self.parts[1]])

    def size(self, size: Size) -> Size:
        """`size` of the layer with only the rows meant."""
        rows = self.rows(size)
        return (rows.stop - rows.start, *size[1:])


Vocabulary = Mapping[str, Destination]

SIZES: Mapping[str, Callable[[FluxSpec], Size]] = {
    "img_in": lambda s: (s.hidden_size, s.in_channels),
    "txt_in": lambda s: (s.hidden_size, s.context_in_dim),
    "time_in.in_layer": lambda s: (s.hidden_size, s.frequency_dim),
    "guidance_in.in_layer": lambda s: (s.hidden_size, s.frequency_dim),
    "vector_in.in_layer": lambda s: (s.hidden_size, s.vec_in_dim),
    "out_layer": lambda s: (s.hidden_size, s.hidden_size),
    "final_layer.linear": lambda s: (s.out_channels, s.hidden_size),
    "final_layer.adaLN_modulation.1": lambda s: (2 * s.hidden_size, s.hidden_size),
    "_mod.lin": lambda s: (6 * s.hidden_size, s.hidden_size),
    "modulation.lin": lambda s: (3 * s.hidden_size, s.hidden_size),
    "qkv": lambda s: (3 * s.hidden_size, s.hidden_size),
    "proj": lambda s: (s.hidden_size, s.hidden_size),
    "_mlp.0": lambda s: (int(s.hidden_size * s.mlp_ratio), s.hidden_size),
    "_mlp.2": lambda s: (s.hidden_size, int(s.hidden_size * s.mlp_ratio)),
    "linear1": lambda s: (3 * s.hidden_size + int(s.hidden_size * s.mlp_ratio), s.hidden_size),
    "linear2": lambda s: (s.hidden_size, s.hidden_size + int(s.hidden_size * s.mlp_ratio)),
    "query_norm": lambda s: (s.head_dim,),
    "key_norm": lambda s: (s.head_dim,),
}
"""End of a module's name -> its size; the first that fits."""
CLIP_SIZES: Mapping[str, Callable[[ClipTextSpec], Size]] = {
    "_proj": lambda s: (s.hidden_size, s.hidden_size),
    "fc1": lambda s: (s.intermediate_size, s.hidden_size),
    "fc2": lambda s: (s.hidden_size, s.intermediate_size),
    "layer_norm1": lambda s: (s.hidden_size,),
    "layer_norm2": lambda s: (s.hidden_size,),
    "final_layer_norm": lambda s: (s.hidden_size,),
    "token_embedding": lambda s: (s.vocab_size, s.hidden_size),
    "position_embedding": lambda s: (s.max_position_embeddings, s.hidden_size),
}
T5_SIZES: Mapping[str, Callable[[T5Spec], Size]] = {
    **dict.fromkeys((".q", ".k", ".v"), lambda s: (s.num_heads * s.d_kv, s.d_model)),
    ".o": lambda s: (s.d_model, s.num_heads * s.d_kv),
    "wi_0": lambda s: (s.d_ff, s.d_model),
    "wi_1": lambda s: (s.d_ff, s.d_model),
    "wo": lambda s: (s.d_model, s.d_ff),
    "layer_norm": lambda s: (s.d_model,),
    "shared": lambda s: (s.vocab_size, s.d_model),
    "relative_attention_bias": lambda s: (s.relative_attention_num_buckets, s.num_heads),
}


@dataclass(frozen=True)
class Base:
    """A family of models that an adapter may be made for."""

    name: str
    transformer: FluxSpec
    clip_l: ClipTextSpec
    t5: T5Spec

    def size(self, destination: Destination) -> Size:
        """Of the whole layer."""
        if destination.role == "transformer":
            return _first(SIZES, destination.module)(self.transformer)
        if destination.role == "clip_l":
            return _first(CLIP_SIZES, destination.module)(self.clip_l)
        return _first(T5_SIZES, destination.module)(self.t5)


def _first(table: Mapping[str, Callable[..., Size]], module: str) -> Callable[..., Size]:
    return next(size for ending, size in table.items() if module.endswith(ending))


BASES: tuple[Base, ...] = (
    Base("FLUX.1", FLUX_DEV, CLIP_L, T5_XXL),
    Base("tiny-flux",
         replace(FLUX_DEV, vec_in_dim=64, context_in_dim=64, hidden_size=128, num_heads=1, depth=2,
                 depth_single_blocks=4),
         replace(CLIP_L, vocab_size=913, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                 num_attention_heads=1),
         replace(T5_XXL, vocab_size=252, d_model=64, num_heads=2, d_ff=128, num_layers=2)),
)
"""Asked in this order without a model at hand; the one that more layers fit is taken."""


def _blocks() -> Iterator[tuple[str, int]]:
    for kind, depth in (("double_blocks", FLUX_DEV.depth), ("single_blocks", FLUX_DEV.depth_single_blocks)):
        yield from ((kind, i) for i in range(depth))


def bfl() -> Vocabulary:
    """Our own names, which are BFL's."""
    names = [*FLUX_MODULES[""], *(f"{kind}.{i}.{module}" for kind, i in _blocks() for module in FLUX_MODULES[kind])]
    return {name: Destination("transformer", name) for name in names}


def bfl_half_flat() -> Vocabulary:
    """The same with underscores below the block: `double_blocks.0.img_attn_qkv`."""
    return {f"{kind}.{i}.{module.replace('.', '_')}": Destination("transformer", f"{kind}.{i}.{module}")
            for kind, i in _blocks() for module in FLUX_MODULES[kind]}


def diffusers() -> Vocabulary:
    """diffusers' names, which split q, k, v and the mlp of single blocks."""
    found: dict[str, Destination] = {}
    for kind, i in [("", 0), *_blocks()]:
        ours = f"{kind}.{i}." if kind else ""
        theirs = f"{FLUX_BLOCKS[kind]}.{i}." if kind else ""
        for module, names in FLUX_MODULES[kind].items():
            whole = Destination("transformer", ours + module, swapped=module == SWAPPED)
            if isinstance(names, str):
                found[theirs + names] = whole
            else:
                found |= {theirs + name: replace(whole, parts=(part, part + 1)) for part, name in enumerate(names)}
    return found


_XLABS_DOUBLE = {"qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv", "proj_lora1": "img_attn.proj",
                 "proj_lora2": "txt_attn.proj"}


def xlabs() -> Vocabulary:
    """XLabs' and USO's attention processors; in single blocks their qkv is three quarters of `linear1`'s parts."""
    found = {f"double_blocks.{i}.processor.{name}": Destination("transformer", f"double_blocks.{i}.{module}")
             for kind, i in _blocks() if kind == "double_blocks" for name, module in _XLABS_DOUBLE.items()}
    for kind, i in _blocks():
        if kind == "single_blocks":
            place = f"single_blocks.{i}"
            found[f"{place}.processor.qkv_lora"] = Destination("transformer", f"{place}.linear1", (0, 3))
            found[f"{place}.processor.proj_lora"] = Destination("transformer", f"{place}.linear2")
    return found


def numbered_parts() -> Vocabulary:
    """BFL's names with the number of the part: `img_attn.qkv.0` to `.2`, `linear1.0` to `.3`, and `linear1_qkv`."""
    found: dict[str, Destination] = {}
    for kind, i in _blocks():
        for module, names in FLUX_MODULES[kind].items():
            name = f"{kind}.{i}.{module}"
            if isinstance(names, tuple):
                found |= {f"{name}.{part}": Destination("transformer", name, (part, part + 1))
                          for part in range(len(names))}
            if module == "linear1":
                found[f"{name}_qkv"] = Destination("transformer", name, (0, 3))
    return found


def clip_l() -> Vocabulary:
    """transformers' names, with the tower's prefix and, as its fifth version saves them, without."""
    layers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
              "layer_norm1", "layer_norm2")
    names = ["embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm",
             *(f"encoder.layers.{i}.{layer}" for i in range(CLIP_L.num_hidden_layers) for layer in layers)]
    return {tower + name: Destination("clip_l", f"text_model.{name}")
            for name in names for tower in ("text_model.", "")}


def t5() -> Vocabulary:
    layers = ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v",
              "layer.0.SelfAttention.o", "layer.0.layer_norm", "layer.1.DenseReluDense.wi_0",
              "layer.1.DenseReluDense.wi_1", "layer.1.DenseReluDense.wo", "layer.1.layer_norm")
    names = ["shared", "encoder.final_layer_norm", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
             *(f"encoder.block.{i}.{layer}" for i in range(T5_XXL.num_layers) for layer in layers)]
    return {name: Destination("t5", name) for name in names}
