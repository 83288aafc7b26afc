"""Bytes of weights as they will be held, from a header alone or from a model: what must be there, what can stream."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.modulation import modulation_modules
from ..quant import FORMATS
from ..quant.formats import WIDE_TILE
from ..quant.ops import Linear as PackedLinear

BLOCK_LISTS: Mapping[str, tuple[str, ...]] = {
    "transformer": ("double_blocks", "single_blocks"),
    "t5": ("encoder.block",),
}
"""Where the blocks of a role stand, in the order they run. What has none comes and goes as a whole."""
STAYS = "relative_attention_bias"
"""T5's first block holds it, and its caller reads it there."""
WIDE = ("vae", "vision", "redux")
"""Roles that run in bf16 or fp32, as they overflow in fp16."""
PARTS = ("t5", "clip_l", "transformer", "vae")
UNPACK_BYTES = 17
"""Bytes of intermediate results for each weight that is unpacked at once; counted: 8 to 16.02, by type."""
TABLE_SHARE = 1 / 48
"""What a table of modulations may take, of the weights it stands for: of FLUX.1-dev in bf16 64 entries of a picture."""
TABLE_RESERVE = 1 / 40
"""The same of the weights of blocks alone, which are most of these."""
SCALES = ("scale_weight", "weight_scale")
_ORDER = ("double_blocks", "transformer_blocks", "single_blocks", "single_transformer_blocks", "encoder.block")
_BLOCK = re.compile(rf"^({'|'.join(map(re.escape, _ORDER))})\.(\d{{1,9}})\.")
_MODULATIONS = ("img_mod.lin.weight", "txt_mod.lin.weight", "modulation.lin.weight", "norm1.linear.weight",
                "norm1_context.linear.weight", "norm.linear.weight")
_FUSED = re.compile(r"\.(?:to_[qkv]|proj_mlp|add_[qkv]_proj)\.(weight|bias)$")
_SWAPPED = "norm_out.linear."
"""diffusers keeps the halves of this layer the other way round."""
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Info(Protocol):
    """A tensor of a header; `engine.weights.TensorInfo` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def format(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def is_mapped(self) -> bool: ...


class Part(Protocol):
    """A part of a checkpoint; `engine.weights.Part` is one."""

    @property
    def role(self) -> str: ...
    @property
    def names(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class PartWeights:
    """Bytes of one part. `rest` is what is needed all the time, `blocks` the weights of each block, which may stream.

    `made`: bytes that loading makes in host memory, where stored numbers are cast, put together or put in another
    order; the others stay mapped.
    `scratch`: bytes to unpack the largest packed layer before its product, and those of the modulations: the weights of
    one block, and their table. `home`: bytes of weights that the table stands for; they stay in host memory.
    """

    role: str
    rest: int
    blocks: tuple[int, ...] = ()
    made: int = 0
    scratch: int = 0
    home: int = 0

    @property
    def total(self) -> int:
        """What goes to the device, at once or block by block."""
        return self.rest + sum(self.blocks)

    @property
    def loaded(self) -> int:
        return self.total + self.home


def held_dtype(role: str, dtype: torch.dtype) -> torch.dtype:
    """What a role computes in where the transformer computes in `dtype`."""
    return torch.float32 if role in WIDE and dtype != torch.bfloat16 else dtype


def streams(name: str, ndim: int) -> bool:
    """Whether a block's tensor may come just in time: the matrices. Norms and biases are a thousandth of them."""
    return ndim == 2 and name.endswith(".weight") and STAYS not in name


def estimate_weights(checkpoint: Mapping[str, Info], parts: Mapping[str, Part], dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each part once loaded, packed weights as they are stored, all else cast to `dtype`.

    `parts`: role -> part, as `detect(checkpoint).parts` has them; no weights are read.
    """
    return {role: part_weights(checkpoint, part, dtype).loaded for role, part in parts.items()}


def part_weights(checkpoint: Mapping[str, Info], part: Part, dtype: torch.dtype) -> PartWeights:
    """One part of a checkpoint, from its header."""
    dtype = held_dtype(part.role, dtype)
    groups = _groups(part)
    mixed = _mixed(checkpoint, part, groups)
    rest, made = 0, 0
    unpacked: dict[str, int] = {}  # by layer: diffusers' q, k, v and mlp become one
    blocks: dict[tuple[int, int], int] = {}
    home: dict[tuple[int, int], int] = {}
    for name, full in part.names.items():
        info = checkpoint[full]
        if name.rpartition(".")[2] in (*SCALES, "scale_input", "input_scale"):
            continue  # counted with their weights, or of no use
        numbers = math.prod(info.shape)
        layer = _layer(part.role, name)
        packed = _stays_packed(part.role, name, info) and name not in mixed
        size = info.nbytes if packed else numbers * dtype.itemsize
        if packed:
            rest += _scale_bytes(checkpoint, part, name, groups[layer])
            if "embed" not in name and "shared" not in name:
                unpacked[layer] = unpacked.get(layer, 0) + numbers
        if (not info.is_mapped or len(groups[layer]) > 1 or name.startswith(_SWAPPED)
                or (not packed and info.format != _STORED.get(dtype))):
            made += size
        block = _BLOCK.match(name)
        if block is not None and streams(name, len(info.shape)):
            at = (_ORDER.index(block[1]), int(block[2]))
            into = home if part.role == "transformer" and name[block.end():] in _MODULATIONS else blocks
            into[at] = into.get(at, 0) + size
        else:
            rest += size
    scratch = unpack_bytes(max(unpacked.values(), default=0), dtype.itemsize) + modulation_bytes(home.values())
    return PartWeights(part.role, rest, tuple(blocks[at] for at in sorted(blocks)), made, scratch, sum(home.values()))


def modulation_bytes(home: Iterable[int]) -> int:
    """On the device for modulations whose weights, so many bytes in each block, stay in host memory."""
    each = list(home)
    return max(each, default=0) + int(sum(each) * TABLE_RESERVE)


def unpack_bytes(weights: int, itemsize: int) -> int:
    """A packed layer's weight in the compute dtype, and a tile on its way there."""
    return weights * itemsize + min(weights, WIDE_TILE) * UNPACK_BYTES


def _stays_packed(role: str, name: str, info: Info) -> bool:
    """Linear layers and embeddings hold packed rows; so does plain fp8, which needs a cast as well."""
    matrix = name.endswith(".weight") and len(info.shape) == 2 and role != "vae"
    plain = info.format in ("F32", "F16", "BF16", "F64")
    return matrix and info.format in FORMATS and not plain


def _groups(part: Part) -> dict[str, list[str]]:
    """Names of tensors by what tells the tensor of ours that they go to."""
    groups: dict[str, list[str]] = {}
    for name in part.names:
        groups.setdefault(_layer(part.role, name), []).append(name)
    return groups


def _mixed(checkpoint: Mapping[str, Info], part: Part, groups: Mapping[str, list[str]]) -> set[str]:
    """Names of tensors that one layer of ours joins although they are stored in several types, or have a scale for each
    column: these are unpacked."""
    joined = [names for names in groups.values() if len(names) > 1]
    return {name for names in joined
            if len({checkpoint[part.names[name]].format for name in names}) > 1
            or any(len(shape) == 2 and shape[1] > 1 for each in names for shape in _scales(checkpoint, part, each))
            for name in names}


def _scales(checkpoint: Mapping[str, Info], part: Part, name: str) -> list[tuple[int, ...]]:
    """Shapes of the scales beside the tensor `name`; the first counts."""
    stem = name.rpartition(".")[0]
    return [checkpoint[part.names[side]].shape for ending in SCALES if (side := f"{stem}.{ending}") in part.names]


def _scale_bytes(checkpoint: Mapping[str, Info], part: Part, name: str, joined: Sequence[str]) -> int:
    """Bytes of fp32 scales that stay beside a packed tensor; where one layer joins several, each row has its own."""
    if len(joined) > 1:
        scaled = any(_scales(checkpoint, part, each) for each in joined)
        return 4 * checkpoint[part.names[name]].shape[0] if scaled else 0
    return sum(4 * math.prod(shape) for shape in _scales(checkpoint, part, name)[:1])


def _layer(role: str, name: str) -> str:
    """What tells the tensor of ours that one goes to: its name, or what the names of those in a fused layer share."""
    found = _FUSED.search(name) if role == "transformer" else None
    if found is None:
        return name
    stem = name[:found.start()].removesuffix(".attn")
    return f"{stem} {'added ' if 'add_' in found[0] else ''}{found[1]}"


def weights_of(module: nn.Module, role: str, dtype: torch.dtype) -> PartWeights:
    """The same of a model that is there and computes in `dtype`."""
    home = [sum(nbytes(tensor) for _, _, tensor in found) for found in modulations_of(module, role)]
    streamed = [sum(nbytes(tensor) for _, _, tensor in matrices(block)) for block in blocks_of(module, role)]
    streamed = [size - at_home for size, at_home in zip(streamed, home or [0] * len(streamed), strict=True)]
    total = sum(nbytes(tensor) for tensor in module.parameters()) - sum(home)
    unpacked = max((layer.in_features * layer.out_features for layer in module.modules()
                    if isinstance(layer, PackedLinear)), default=0)
    return PartWeights(role, total - sum(streamed), tuple(streamed), 0,
                       unpack_bytes(unpacked, dtype.itemsize) + modulation_bytes(home), sum(home))


def modulations_of(module: nn.Module, role: str) -> list[list[tuple[nn.Module, str, nn.Parameter]]]:
    """For each block those of its `matrices` that a table of modulations stands for; nothing without a table."""
    if role != "transformer" or getattr(module, "modulations", None) is None:
        return []
    layers = {id(layer) for _, layer in modulation_modules(module)}
    return [[found for found in matrices(block) if id(found[0]) in layers] for block in blocks_of(module, role)]


def blocks_of(module: nn.Module, role: str) -> list[nn.Module]:
    """The blocks in the order they run."""
    return [block for path in BLOCK_LISTS.get(role, ()) for block in children(module.get_submodule(path))]


def children(module: nn.Module) -> Iterable[nn.Module]:
    return module.children()


def matrices(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The weights of a block that may stream: (layer, name of the parameter, parameter)."""
    for path, layer in block.named_modules():
        for name, tensor in layer.named_parameters(recurse=False):
            if streams(f"{path}.{name}", tensor.ndim):
                yield layer, name, tensor


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
