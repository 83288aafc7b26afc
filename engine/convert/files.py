"""One model file into another of a packed type, tensor by tensor; what is in memory is one tensor, as fp32."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..errors import BadInput, BadModelFile, NotFinite
from ..quant import FORMATS, MissingCodebook
from ..weights import ROLE_NAMES, Checkpoint, Detection, Match, Part, build, choose, detect, match, open_checkpoint
from ..weights.containers import GGUF_SUFFIX, MODEL_SUFFIXES, SAFETENSORS_SUFFIXES, identity
from ..weights.header import show
from ..weights.keymaps import Source, assemble
from ..weights.load import refuse
from ..weights.stored import Stored
from . import tokens
from .bake import Baking
from .codecs import Codec, codec, side_tensors
from .lora_files import Summand
from .recipes import GGUF, RECIPES, ROLES, Recipe, description, stored_type, written_name
from .report import Deviation, Report, Row
from .saving import check_sources, check_space, check_target, complete_or_gone
from .writers import Layout, Planned, gguf_layout, safetensors_layout

SUFFIXES = {GGUF: (GGUF_SUFFIX,), "safetensors": SAFETENSORS_SUFFIXES}
TILE_WEIGHTS = {"cpu": 1 << 20}
WIDE_TILE = 1 << 23
MARKER = "scaled_fp8"
"""The empty tensor by which ComfyUI knows a file of scaled fp8; its type is that of the weights."""

Progress = Callable[[int, int, str], None]
"""Weights done, weights in all, and the tensor that comes next. What it raises ends the work."""


def _silent(done: int, total: int, name: str) -> None:
    pass


@dataclass(frozen=True)
class Item:
    """One tensor of ours on its way: `source` says where it comes from, `planned` how it is written."""

    name: str
    shape: tuple[int, ...]
    source: Source
    planned: Planned
    beside: tuple[Planned, ...]


@dataclass(frozen=True)
class _Job:
    checkpoint: Checkpoint
    part: Part
    recipe: Recipe
    stored: Stored
    items: tuple[Item, ...]
    layout: Layout
    device: torch.device
    extra: bytes
    """What follows the tensors: a SentencePiece model."""
    baking: Baking


def quantize(source: str | os.PathLike[str], destination: str | os.PathLike[str], type: str, *,
             role: str | None = None, force: bool = False, tokenizer_dirs: Sequence[str | os.PathLike[str]] = (),
             device: torch.device | str = "cpu", loras: Sequence[Summand] = (), progress: Progress = _silent) -> Report:
    """Writes the transformer, T5 or CLIP-L of `source`, anything `load` takes, as a file of `type` (see `RECIPES`).

    `role`: which part of an all-in-one file. `force`: whether `destination` may be there already. The tokenizer of an
    encoder goes along, from where `find_tokenizer` finds it, `tokenizer_dirs` included. `device`: where it is worked
    out. `loras` are put into the weights before they are quantised; errors are told against the sum. The file is
    complete when it appears; if anything fails, nothing is left behind.

    Raises `BadInput` for a type, suffix or destination that cannot be or a LoRA that does not fit, `BadModelFile` for a
    source that is damaged, of another kind or changed meanwhile, `NotFinite` for NaN or infinity, `FluxKitError` for
    want of disk space.
    """
    target = Path(destination)
    recipe = _recipe(type)
    _check_target(target, recipe, force)
    with open_checkpoint(source) as checkpoint:
        check_sources(target, (file.path for file in checkpoint.files))
        part, notes = _part(checkpoint, detect(checkpoint), role)
        words = tokens.find(checkpoint, part.role, tokenizer_dirs)
        job = _planned(checkpoint, part, recipe, words, torch.device(device), loras)
        check_space(target, job.layout.nbytes, "a smaller type")
        with complete_or_gone(target, lambda: _check_target(target, recipe, force)) as file:
            rows = _write(job, file, progress)
            _check_unchanged(checkpoint)
        before = sum(checkpoint[name].nbytes for name in part.names.values())
    return Report(part.role, recipe.name, before, job.layout.nbytes, rows, (*notes, *filter(None, [words.note])),
                  job.baking.report)


def role_of(source: str | os.PathLike[str], role: str | None = None) -> str:
    """Which part of `source` would be quantised; raises as `quantize` does."""
    with open_checkpoint(source) as checkpoint:
        return _part(checkpoint, detect(checkpoint), role)[0].role


def result_name(source: Path, type: str, name: str = "") -> str:
    """`name`, or one made of the source's, with the ending of a file of `type` where it has none of a model."""
    recipe = _recipe(type)
    stem = name or f"{source.stem if source.is_file() else source.name}-{recipe.name}"
    return stem if stem.lower().endswith(MODEL_SUFFIXES) else stem + SUFFIXES[recipe.container][0]


def _recipe(type: str) -> Recipe:
    known = {name.lower(): row for name, row in RECIPES.items()}
    recipe = known.get(type.lower())
    if recipe is None:
        raise BadInput(f"no type is called {type!r}; there are {', '.join(RECIPES)}")
    if recipe.base in FORMATS:
        FORMATS[recipe.base].require()
    return recipe


def _check_target(target: Path, recipe: Recipe, force: bool) -> None:
    check_target(target, SUFFIXES[recipe.container], f"a file of type {recipe.name}", force)


def _part(checkpoint: Checkpoint, detection: Detection, role: str | None) -> tuple[Part, tuple[str, ...]]:
    """The part to take, and what to tell about it."""
    if role is not None and role not in ROLES:
        raise BadInput(f"no part is called {role!r}; there are {', '.join(ROLES)}")
    here = [name for name in ROLES if name in detection.parts and not detection.parts[name].foreign]
    if role is None and len(here) > 1:
        raise BadModelFile(checkpoint.path, f"this is {detection.family}", expected="one of its parts",
                           found=", ".join(here), advice=f"Choose the part, for example {here[0]} (part, --part)")
    if role is None and not here:
        raise BadModelFile(checkpoint.path, f"this is {detection.family}, which is not quantised here",
                           expected=" or ".join(ROLE_NAMES[name] for name in ROLES), found=detection.role)
    part = choose(checkpoint, detection, role or here[0])
    others = [name for name in detection.parts if name != part.role]
    notes = (*part.notes, *((f"not taken: {', '.join(others)}",) if others else ()))
    if detection.unknown:
        notes += (f"{len(detection.unknown)} tensors belong to nothing known and are left out, such as "
                  f"{show(detection.unknown[0])}",)
    return part, notes


def _planned(checkpoint: Checkpoint, part: Part, recipe: Recipe, words: tokens.Words, device: torch.device,
             loras: Sequence[Summand]) -> _Job:
    model = build(part)
    found = match(checkpoint, part, model)
    refuse(checkpoint, part, found)
    items = tuple(_items(checkpoint, part, recipe, model, found))
    planned = [tensor for item in items for tensor in (item.planned, *item.beside)]
    extra = b""
    if recipe.container == GGUF:
        rows = model.state_dict()["shared.weight"].shape[0] if part.role == "t5" else 0
        about = tokens.for_gguf(checkpoint, part.role, words, rows)
        layout = gguf_layout(planned, {**description(recipe, part.role, part.spec), **about})
    else:
        if recipe.base == "F8_E4M3":
            planned.insert(0, Planned(MARKER, (0,), recipe.base))
        if words.pieces is not None:
            extra = tokens.spiece(words.pieces)
            planned.append(Planned(tokens.SPIECE_TENSOR, (len(extra),), "U8"))
        layout = safetensors_layout(planned, {} if words.text is None else {tokens.JSON_KEY: words.text})
    stored = Stored({name: checkpoint[full] for name, full in part.names.items()}, torch.float32)
    baking = Baking(loras, part.role, {item.name: item.shape for item in items})
    return _Job(checkpoint, part, recipe, stored, items, layout, device, extra, baking)


def _items(checkpoint: Checkpoint, part: Part, recipe: Recipe, model: nn.Module, found: Match) -> Iterator[Item]:
    layers = _layers(model)
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, tensor in model.state_dict().items():
        shape, where = tuple(tensor.shape), found.sources[name]
        formats = [checkpoint[part.names[theirs]].format for theirs in where.names]
        for format in formats:
            _require(checkpoint, format)
        type = stored_type(recipe, part.role, layers, name, shape, formats[0], name in linears)
        written = written_name(recipe, part.role, name)
        yield Item(name, shape, where, Planned(written, shape, type), side_tensors(written, shape, type))


def _layers(model: nn.Module) -> int:
    """The length of the longest list of blocks."""
    return max((len(module) for module in model.modules() if isinstance(module, nn.ModuleList)), default=0)


def _require(checkpoint: Checkpoint, format: str) -> None:
    try:
        if format in FORMATS:
            FORMATS[format].require()
    except MissingCodebook as error:
        raise MissingCodebook(f"{checkpoint.path.name}: {error}", file=checkpoint.path) from error


def _check_unchanged(checkpoint: Checkpoint) -> None:
    for file in checkpoint.files:
        if not file.path.exists() or identity(file.path.stat()) != file.identity:
            raise BadModelFile(file.path, "the file was changed while it was read", advice="Start again")


def _write(job: _Job, file: BinaryIO, progress: Progress) -> tuple[Row, ...]:
    file.write(job.layout.header)
    total, done = sum(math.prod(item.shape) for item in job.items), 0
    rows = []
    for item in job.items:
        deviation = Deviation()
        for data, weights in _data(job, item, deviation):
            progress(done, total, item.name)
            file.write(data.contiguous().cpu().numpy().data)
            done += weights
        nbytes = item.planned.nbytes + sum(tensor.nbytes for tensor in item.beside)
        rows.append(Row(item.name, item.planned.format, math.prod(item.shape), nbytes, deviation))
    file.write(job.extra)
    progress(total, total, "")
    return tuple(rows)


def _data(job: _Job, item: Item, deviation: Deviation) -> Iterator[tuple[Tensor, int]]:
    """The bytes of one tensor in order, uint8, with the number of weights they hold; 0 for what only fills up."""
    width = item.shape[-1]
    count = math.prod(item.shape) // width
    step = max(1, TILE_WEIGHTS.get(job.device.type, WIDE_TILE) // width)
    tiles = [slice(first, min(first + step, count)) for first in range(0, count, step)]
    packed = _same(job, item)
    beside: tuple[Tensor, ...] = ()
    if packed is not None:
        for rows in tiles:
            yield _copied(job, item, packed[rows], deviation), (rows.stop - rows.start) * width
    else:
        weight = assemble(item.source, item.shape, job.stored.numbers, dtype=torch.float32)
        weight = (job.baking.changed(item.name, weight) if job.baking.changes(item.name) else weight).view(count, width)
        coded = _codec(job, item, weight)
        for rows in tiles:
            data = _encoded(job, item, weight[rows].to(job.device), rows, coded, deviation)
            yield data, (rows.stop - rows.start) * width
        beside = coded.beside
    yield _zeros(job.layout.padding(item.planned.nbytes)), 0
    for planned, data in zip(item.beside, beside, strict=True):
        yield data, 0
        yield _zeros(job.layout.padding(planned.nbytes)), 0


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8)


def _same(job: _Job, item: Item) -> Tensor | None:
    """The packed rows of a tensor that comes in the type in which it is written: nothing is rounded twice."""
    format = job.stored.format_of(item.source)
    if format is None or format.name != item.planned.format or item.beside or len(item.shape) != 2:
        return None
    if job.stored.scales_of(item.source) is not None or job.baking.changes(item.name):
        return None
    return assemble(item.source, (item.shape[0], format.row_bytes(item.shape[1])), job.stored.rows)


def _copied(job: _Job, item: Item, packed: Tensor, deviation: Deviation) -> Tensor:
    values = FORMATS[item.planned.format].dequantize(packed)
    if not bool(values.isfinite().all()):
        raise _not_finite(job, item)
    deviation.add(values, values)
    return packed


def _codec(job: _Job, item: Item, weight: Tensor) -> Codec:
    if item.beside and not bool(torch.stack(weight.aminmax()).isfinite().all()):  # before scales are made of it
        raise _not_finite(job, item)
    return codec(item.planned.format, weight)


def _encoded(job: _Job, item: Item, tile: Tensor, rows: slice, coded: Codec, deviation: Deviation) -> Tensor:
    if not bool(tile.isfinite().all()):
        raise _not_finite(job, item)
    data = coded.encode(tile, rows)
    after = coded.decode(data, rows)
    if not bool(after.isfinite().all()):
        raise NotFinite(f"{job.checkpoint.path.name}: {_names(job, item)}: numbers up to {float(tile.abs().max()):.3g} "
                        f"do not fit {item.planned.format}. Write it as BF16 instead", file=job.checkpoint.path)
    deviation.add(tile, after)
    return data


def _names(job: _Job, item: Item) -> str:
    return ", ".join(show(job.part.names[name]) for name in item.source.names)


def _not_finite(job: _Job, item: Item) -> NotFinite:
    return NotFinite(f"{job.checkpoint.path.name}: NaN or infinity in {_names(job, item)}. The file is damaged; "
                     "download it again", file=job.checkpoint.path)
