"""What each type of file is made of: which tensors are packed how, under which names. Tables, and who reads them.

Sources: for transformers the published files of city96 and unsloth, for T5 llama.cpp's `llama-quant.cpp`, whose names
T5 files have; for fp8 and int8 what ComfyUI reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..quant.formats import FORMATS
from ..specs import T5Spec
from ..weights.keymaps import Shape, Spec

GGUF, SAFETENSORS = "gguf", "safetensors"
ROLES = ("transformer", "t5", "clip_l")
"""What can be quantised."""
SIXTEEN = ("F16", "BF16")
WHOLE = ("F8_E4M3",)
"""Formats in which all linear layers are packed: ComfyUI 0.3 casts the others of such a file to fp8 without a scale."""
SMALL = 1024
"""Matrices of no more weights than this stay in fp32, as vectors do."""


@dataclass(frozen=True)
class Recipe:
    """One choice of `--type`. `base`: the format of what is packed; `file_type`: its number in GGUF's metadata."""

    name: str
    base: str
    file_type: int = 0
    container: str = GGUF

    @property
    def is_packed(self) -> bool:
        return self.base not in SIXTEEN


_ROWS: tuple[Recipe, ...] = (
    Recipe("Q8_0", "Q8_0", 7), Recipe("Q6_K", "Q6_K", 18), Recipe("Q5_K_M", "Q5_K", 17), Recipe("Q5_K_S", "Q5_K", 16),
    Recipe("Q5_1", "Q5_1", 9), Recipe("Q5_0", "Q5_0", 8), Recipe("Q4_K_M", "Q4_K", 15), Recipe("Q4_K_S", "Q4_K", 14),
    Recipe("Q4_1", "Q4_1", 3), Recipe("Q4_0", "Q4_0", 2),
    Recipe("IQ4_NL", "IQ4_NL", 25), Recipe("IQ4_XS", "IQ4_XS", 30),
    Recipe("Q3_K_M", "Q3_K", 12), Recipe("Q3_K_S", "Q3_K", 11), Recipe("Q2_K", "Q2_K", 10),
    Recipe("BF16", "BF16", 32), Recipe("F16", "F16", 1),
    Recipe("fp8_scaled", "F8_E4M3", container=SAFETENSORS),
    Recipe("int8_tensorwise", "I8", container=SAFETENSORS),
)
RECIPES: Mapping[str, Recipe] = {row.name: row for row in _ROWS}

NARROWER: Mapping[str, str] = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
                               "IQ4_XS": "IQ4_NL"}
"""What takes the place of a type whose blocks of 256 do not divide the row: no worse, in blocks of 32. FLUX.1 has no
such row, tiny-flux has."""

KEPT: Mapping[str, re.Pattern[str]] = {
    "transformer": re.compile(r"(?:img|txt|time|vector|guidance)_in\.|final_layer\."),
    "t5": re.compile(r"relative_attention_bias\."),
    "clip_l": re.compile(r"position_embedding\."),
}
"""Role -> matrices that stay in 16 bits in every GGUF: small, and at the ends of the network."""
FP32_KEPT = re.compile(r"relative_attention_bias\.")
"""Of these the ones that llama.cpp writes in fp32."""


def _every(layer: int, layers: int) -> bool:
    return True


def _some(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _first(part: int) -> Callable[[int, int], bool]:
    return lambda layer, layers: layer < layers // part


def _below(count: int) -> Callable[[int, int], bool]:
    return lambda layer, layers: layer < count


@dataclass(frozen=True)
class Mix:
    """In files of these recipes, tensors that match in layers that pass are of `type` instead of the base."""

    role: str
    recipes: frozenset[str]
    pattern: re.Pattern[str]
    type: str
    layers: Callable[[int, int], bool] = _every


_DOWN = r"DenseReluDense\.wo\."
_V = r"SelfAttention\.v\."


def _mix(role: str, recipes: str, pattern: str, type: str, layers: Callable[[int, int], bool] = _every) -> Mix:
    return Mix(role, frozenset(recipes.split()), re.compile(pattern), type, layers)


MIXES: tuple[Mix, ...] = (
    _mix("transformer", "Q3_K_M", r"double_blocks\.\d+\.\w+_attn\.qkv\.", "Q4_K"),
    _mix("transformer", "Q4_K_M", r"double_blocks\.\d+\.\w+_attn\.qkv\.", "Q5_K"),
    _mix("transformer", "Q5_K_M", r"double_blocks\.\d+\.\w+_attn\.qkv\.", "Q6_K"),
    # tied to an output that an encoder does not have, the embedding is treated as one
    _mix("t5", " ".join(row.name for row in _ROWS if row.is_packed and row.base != "Q8_0" and row.container == GGUF),
         r"^shared\.", "Q6_K"),
    _mix("t5", "Q2_K", f"{_V}|{_DOWN}", "Q3_K"),
    _mix("t5", "Q3_K_M", _V, "Q5_K", _below(2)),
    _mix("t5", "Q3_K_M", _DOWN, "Q5_K", _first(16)),
    _mix("t5", "Q3_K_M", f"{_V}|{_DOWN}", "Q4_K"),
    _mix("t5", "Q4_K_S", _V, "Q5_K", _below(4)),
    _mix("t5", "Q4_K_S", _DOWN, "Q5_K", _first(8)),
    _mix("t5", "Q4_K_M Q5_K_M", f"{_V}|{_DOWN}", "Q6_K", _some),
)
"""First match first."""

_LAYER = re.compile(r"\.(?:block|layers|double_blocks|single_blocks)\.(\d+)\.")


def stored_type(recipe: Recipe, role: str, layers: int, name: str, shape: Shape, source: str, is_linear: bool) -> str:
    """The type in which our tensor `name` of `shape` is written; `source` is the one it comes in."""
    sixteen = source if source in SIXTEEN else "F16"
    if recipe.container == SAFETENSORS:
        if is_linear and (recipe.base in WHOLE or not KEPT[role].search(name)):
            return recipe.base
        return sixteen if len(shape) > 1 or source in SIXTEEN else "F32"
    if len(shape) != 2 or shape[0] * shape[1] <= SMALL or FP32_KEPT.search(name):
        return "F32"
    if not recipe.is_packed:
        return recipe.base
    if KEPT[role].search(name):
        return sixteen
    match = _LAYER.search(f".{name}")
    layer = int(match[1]) if match else 0
    wanted = next((row.type for row in MIXES if row.role == role and recipe.name in row.recipes
                   and row.pattern.search(name) and row.layers(layer, layers)), recipe.base)
    for type in (wanted, NARROWER.get(wanted, wanted)):
        if shape[1] % FORMATS[type].block == 0:
            return type
    return sixteen


T5_NAMES: tuple[tuple[str, str], ...] = (
    (r"^shared\.", "token_embd."),
    (r"^encoder\.final_layer_norm\.", "enc.output_norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.", r"enc.blk.\1.attn_rel_b."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"enc.blk.\1.attn_norm."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"enc.blk.\1.ffn_gate."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"enc.blk.\1.ffn_up."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"enc.blk.\1.ffn_down."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"enc.blk.\1.ffn_norm."),
)
"""Our pattern and llama.cpp's name (gguf-py, tensor_mapping.py)."""


def written_name(recipe: Recipe, role: str, name: str) -> str:
    """How the file calls our tensor: BFL's and Hugging Face's names, llama.cpp's for T5 in GGUF."""
    if role == "t5" and recipe.container == GGUF:
        for pattern, theirs in T5_NAMES:
            renamed, count = re.subn(pattern, theirs, name)
            if count:
                return renamed
    return name


ARCHITECTURES = {"transformer": "flux", "t5": "t5encoder", "clip_l": "clip_l"}
"""`general.architecture`. CLIP-L alone has none in llama.cpp; what reads such files goes by their names."""
T5_CONTEXT = 512
Value = str | int | float | bool


def description(recipe: Recipe, role: str, spec: Spec | None) -> dict[str, Value]:
    """GGUF's metadata: whole numbers become U32, others F32."""
    arch = ARCHITECTURES[role]
    found: dict[str, Value] = {"general.architecture": arch, "general.quantization_version": 2,
                               "general.file_type": recipe.file_type}
    if isinstance(spec, T5Spec):
        found |= {f"{arch}.{key}": value for key, value in (
            ("context_length", T5_CONTEXT), ("embedding_length", spec.d_model), ("feed_forward_length", spec.d_ff),
            ("block_count", spec.num_layers), ("attention.head_count", spec.num_heads),
            ("attention.key_length", spec.d_kv), ("attention.value_length", spec.d_kv),
            ("attention.layer_norm_epsilon", spec.layer_norm_epsilon),
            ("attention.layer_norm_rms_epsilon", spec.layer_norm_epsilon),
            ("attention.relative_buckets_count", spec.relative_attention_num_buckets))}
    return found
