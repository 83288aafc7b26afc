"""LoRA files of our own: any number of LoRAs, of any format, as one plain LoRA file in kohya's or PEFT's names.

What is a product of thin matrices stays exactly that, ranks adding up; the rest, and all of it where a rank is given,
is brought to the nearest product of that rank. Every layer as it stands in the file is compared with what it was made
from, and the report says how far it is off.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import Lora, Row, block_weights, layers
from ..adapters.adapter import Adapter, swapped
from ..adapters.algorithms import REPLACING, is_on_input
from ..adapters.dialects import DIALECTS
from ..adapters.vocabulary import BASES, Base, Destination, bfl, clip_l, diffusers, t5
from ..errors import BadInput, NotFinite
from ..weights.containers import SAFETENSORS_SUFFIXES
from .lora_header import header, name_of
from .lora_report import Made, Source, Written
from .lowrank import NEEDS_BASE, Pair, cut, distance, folded, joined, length, nearest, needs_base, pair_of, reduced
from .saving import check_sources, check_space, check_target, complete_or_gone
from .writers import Planned, safetensors_layout

KOHYA, PEFT = "kohya", "peft"
LAYOUTS = (KOHYA, PEFT)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_RANK = 3072
"""No layer's change has a larger rank: that of FLUX.1's width."""
ADVICE = {"rank": "give a rank to bring them to the nearest LoRA of that rank (rank, --rank)",
          "base": "they change a weight by what it is: give the model that they are for (base, --base)"}

Progress = Callable[[int, int, str], None]
"""Layers done, layers in all, and the layer that comes next. What it raises ends the work."""
Job = tuple[Adapter, float, str]
"""An adapter, its strength, and the name of its file."""


def _silent(done: int, total: int, name: str) -> None:
    pass


@dataclass(frozen=True)
class Summand:
    """A LoRA of a sum. `clip`: its strength on text encoders, None for the same; `factor`: our name of a layer of the
    transformer -> factor of its strength."""

    lora: Lora
    strength: float = 1.0
    clip: float | None = None
    factor: Callable[[str], float] | None = None

    def at(self, destination: Destination) -> float:
        """The strength for one layer."""
        if destination.role != "transformer":
            return self.strength if self.clip is None else self.clip
        return self.strength * (1.0 if self.factor is None else self.factor(destination.module))


def summand(lora: Lora, row: Row) -> Summand:
    """One row of a stack. BadInput for what a file cannot hold: a range, a schedule, a region."""
    if row.varies:
        raise BadInput(f"{row.file}: it has a range, a schedule or a region, which a file cannot hold; take it off "
                       "before writing", file=lora.path)
    return Summand(lora, row.model, row.clip, block_weights(row.blocks) if row.blocks.strip() else None)


@dataclass(frozen=True)
class Unit:
    """One layer of the file to come: its name there without the ending, and the rows of ours that it is for."""

    stem: str
    destination: Destination


@dataclass(frozen=True)
class Layout:
    """How the files of one layout spell layers and endings. `splits`: whether by diffusers' split names."""

    splits: bool
    prefixes: Mapping[str, str]
    flat: bool
    endings: Mapping[str, str]
    magnitude: tuple[int, ...]
    """Shape of a DoRA's magnitudes, one a row."""


_PLAIN = {"diff": ".diff", "set": ".set_weight", "set_b": ".bias.set_weight"}
_LAYOUTS = {
    KOHYA: Layout(False, {"transformer": "lora_unet_", "clip_l": "lora_te1_", "t5": "lora_te3_"}, True,
                  {**_PLAIN, "down": ".lora_down.weight", "up": ".lora_up.weight", "diff_b": ".diff_b",
                   "magnitude": ".dora_scale"}, (-1, 1)),
    PEFT: Layout(True, {"transformer": "transformer.", "clip_l": "text_encoder.", "t5": "text_encoder_2."}, False,
                 {**_PLAIN, "down": ".lora_A.weight", "up": ".lora_B.weight", "diff_b": ".lora_B.bias",
                  "magnitude": ".lora_magnitude_vector"}, (-1,)),
}
_NORM_STEMS = {KOHYA: "diffusion_model.{module}.scale", PEFT: None}
"""kohya has no name for norms; ComfyUI's is taken, which stands beside it in its own files."""
_NORM_SET = {KOHYA: ".set_weight", PEFT: ".weight"}


def layout_of(lora: Lora) -> str:
    """The layout that is nearest to a file's own."""
    split = {row.name for row in DIALECTS if row.vocabulary is diffusers}
    return PEFT if lora.report.format in split else KOHYA


def write_lora(destination: str | os.PathLike[str], entries: Sequence[Summand], *, to: str | None = None,
               rank: int | None = None, dtype: torch.dtype | None = None, bases: Mapping[str, nn.Module] | None = None,
               force: bool = False, progress: Progress = _silent) -> Written:
    """Writes the sum of `entries` at their strengths and block weights as one LoRA file.

    `to`: one of `LAYOUTS`; None takes that of the first. `rank`: the largest of any layer; None keeps all and refuses
    what is no product of thin matrices. `dtype`: of the tensors; None takes the sources'. `bases`: model of a role ->
    the model, for adapters that change a weight by what it is (OFT, GLoRA, IA3, DoRA). `force`: whether `destination`
    may be there already. The file is complete when it appears; if anything fails, nothing is left behind.

    Raises `BadInput` for what cannot be, `NotFinite` where numbers do not fit the dtype, `FluxKitError` for want of
    disk space.
    """
    target = Path(destination)
    _check(target, entries, to or KOHYA, rank, force)
    layout = to or layout_of(entries[0].lora)
    work = _Work(layout, _base(entries), rank, dtype or _dtype(entries), bases or {})
    jobs = _jobs(entries)
    units = [(unit, found) for unit in _units(layout) if (found := _of_unit(unit, jobs, work.base))]
    work.check(units)
    work.choose_scales([job for _, found in units for job in found])
    for done, (unit, found) in enumerate(units):
        progress(done, len(units), unit.stem)
        work.add(unit, found)
    if not work.tensors:
        raise BadInput(f"{target.name}: nothing is left to write; every strength is 0")
    ranks = sorted({row.rank for row in work.made if row.rank is not None})
    metadata = header([(entry.lora.path, entry.strength) for entry in entries], layout, ranks)
    progress(len(units), len(units), "")
    _save(target, work.tensors, metadata, force)
    return Written(target, layout, name_of(work.dtype), target.stat().st_size, tuple(work.made),
                   tuple(Source(entry.lora.path.name, entry.strength) for entry in entries), tuple(_notes(entries)))


def _check(target: Path, entries: Sequence[Summand], layout: str, rank: int | None, force: bool) -> None:
    if not entries:
        raise BadInput("no LoRA was given: give at least one")
    if layout not in LAYOUTS:
        raise BadInput(f"no layout is called {layout!r}; there are {', '.join(LAYOUTS)}")
    if rank is not None and rank < 1:
        raise BadInput(f"a rank of {rank} was asked for: it must be at least 1")
    for entry in entries:
        if not math.isfinite(entry.strength) or not math.isfinite(entry.clip or 0):
            raise BadInput(f"{entry.lora.path.name}: its strength is {entry.strength}, expected a finite number")
    check_lora_target(target, force)
    check_sources(target, (entry.lora.path for entry in entries))


def check_lora_target(target: Path, force: bool) -> None:
    """BadInput unless a LoRA file may be written there."""
    check_target(target, SAFETENSORS_SUFFIXES, "a LoRA file", force)


def _save(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], force: bool) -> None:
    """Wide types first, so that each tensor lies aligned."""
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    layout = safetensors_layout([Planned(name, tuple(tensor.shape), name_of(tensor.dtype)) for name, tensor in order],
                                metadata)
    check_space(target, layout.nbytes, "a smaller rank or type")
    with complete_or_gone(target, lambda: check_lora_target(target, force)) as file:
        file.write(layout.header)
        for _, tensor in order:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _base(entries: Sequence[Summand]) -> Base:
    names = {entry.lora.report.base: entry.lora.path.name for entry in entries}
    if len(names) > 1:
        raise BadInput("these LoRAs are for different models: "
                       f"{', '.join(f'{file} for {base}' for base, file in names.items())}. Merge those of one model")
    return next(base for base in BASES if base.name in names)


def _dtype(entries: Sequence[Summand]) -> torch.dtype:
    """The smallest type that holds all tensors of the sources; of fp8 ones, fp16."""
    found: torch.dtype | None = None
    for tensor in (tensor for entry in entries for adapter in entry.lora.adapters
                   for tensor in adapter.factors.values() if tensor.is_floating_point()):
        kind = torch.float16 if tensor.dtype.itemsize == 1 else tensor.dtype
        found = kind if found is None else torch.promote_types(found, kind)
    return torch.float32 if found in (None, torch.float64) else found


def _jobs(entries: Sequence[Summand]) -> dict[tuple[str, str], list[Job]]:
    """Adapters that have an effect, by model and layer; of two that replace the same numbers the later one."""
    found: dict[tuple[str, str], list[Job]] = {}
    for entry in entries:
        for adapter in entry.lora.adapters:
            place = adapter.destination
            strength = entry.at(place)
            if strength:
                before = found.get((place.role, place.module), [])
                found[place.role, place.module] = [*(job for job in before if not job[0].outdone(adapter)),
                                                   (adapter, strength, entry.lora.path.name)]
    return found


def _units(name: str) -> Iterator[Unit]:
    """Every layer that a file of this layout may have."""
    layout = _LAYOUTS[name]
    tables = [diffusers() if layout.splits else bfl(),
              {key: place for key, place in clip_l().items() if key.startswith("text_model.")}, t5()]
    for table in tables:
        for key, place in table.items():
            stem = layout.prefixes[place.role] + (key.replace(".", "_") if layout.flat else key)
            norm = _NORM_STEMS[name] if place.role == "transformer" and place.module.endswith("_norm") else None
            yield Unit(stem if norm is None else norm.format(module=place.module), place)


def _of_unit(unit: Unit, jobs: Mapping[tuple[str, str], list[Job]], base: Base) -> list[Job]:
    """What changes any of the unit's rows."""
    found = jobs.get((unit.destination.role, unit.destination.module), [])
    if not found:
        return []
    size = base.size(unit.destination)
    own = unit.destination.rows(size)
    return [job for job in found
            if max(own.start, (at := job[0].destination.rows(size)).start) < min(own.stop, at.stop)]


@dataclass
class _Work:
    """The file as it grows."""

    layout: str
    base: Base
    rank: int | None
    dtype: torch.dtype
    bases: Mapping[str, nn.Module]
    fold: bool = True
    tensors: dict[str, Tensor] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)

    def check(self, units: Sequence[tuple[Unit, list[Job]]]) -> None:
        """Refuses what cannot be written as asked, all of it in one message."""
        missing: dict[str, dict[int, Job]] = {}
        for unit, jobs in units:
            for job in jobs if not self._keeps_magnitudes(unit, jobs) else ():
                alone = sum(other.on_bias == job[0].on_bias for other, *_ in jobs) == 1
                reason = self._missing(job, alone)
                if reason is not None:
                    missing.setdefault(reason, {})[id(job[0])] = job
        for reason, found in missing.items():
            kinds = Counter("DoRA" if "magnitude" in adapter.factors else adapter.algorithm
                            for adapter, *_ in found.values())
            adapter, _, file = next(iter(found.values()))
            raise BadInput(f"{file}: {len(found)} layers are no plain LoRA and have no exact form as one "
                           f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())}), such as "
                           f"{adapter.destination.module}: {ADVICE[reason]}")

    def _missing(self, job: Job, alone: bool) -> str | None:
        adapter, strength, _ = job
        size = self.base.size(adapter.destination)
        vector = adapter.on_bias or len(size) == 1
        if needs_base(adapter) and adapter.destination.role not in self.bases:
            return None if vector and alone and adapter.algorithm in REPLACING else "base"
        if vector or self.rank is not None:
            return None
        return "rank" if pair_of(adapter, adapter.destination.rows(size), strength) is None else None

    def _keeps_magnitudes(self, unit: Unit, jobs: Sequence[Job]) -> bool:
        """Whether a layer can stay the DoRA that it is: at strength 1, with its rank, and with a magnitude for each
        row from one adapter. Lengths of rows do not depend on other rows; lengths of columns do."""
        if self.rank is not None or not jobs:
            return False
        size = self.base.size(unit.destination)
        own, at = unit.destination.rows(size), []
        for adapter, strength, _ in jobs:
            magnitude = adapter.factors.get("magnitude")
            if adapter.algorithm != "LoRA" or magnitude is None or is_on_input(tuple(magnitude.shape)) or strength != 1:
                return False
            at.append(adapter.destination.rows(size))
        edges = sorted((max(rows.start, own.start), min(rows.stop, own.stop)) for rows in at)
        return [own.start, *(stop for _, stop in edges)] == [*(start for start, _ in edges), own.stop]

    def _magnitudes(self, unit: Unit, jobs: Sequence[Job], size: tuple[int, ...]) -> Tensor:
        own = unit.destination.rows(size)
        found = torch.zeros(own.stop - own.start, dtype=torch.float64)
        for adapter, *_ in jobs:
            at = adapter.destination.rows(size)
            values = adapter.factors["magnitude"].double().reshape(-1)
            values = swapped(values) if adapter.destination.swapped else values
            first, last = max(at.start, own.start), min(at.stop, own.stop)
            found[first - own.start:last - own.start] = values[first - at.start:last - at.start]
        return swapped(found) if unit.destination.swapped else found

    def choose_scales(self, jobs: Sequence[Job]) -> None:
        """kohya's files have an alpha for each layer. PEFT's have none if every scale can go into `up` without loss:
        readers of them differ in what they make of an alpha. Of biases they scale, all scales must go."""
        scales = {adapter.scale * strength for adapter, strength, _ in jobs
                  if not adapter.on_bias and adapter.algorithm not in NEEDS_BASE}
        exact = all(math.frexp(scale)[0] in (0.5, -0.5) for scale in scales)
        self.fold = self.layout == PEFT and (exact or any(adapter.on_bias for adapter, *_ in jobs))

    def add(self, unit: Unit, jobs: Sequence[Job]) -> None:
        size = self.base.size(unit.destination)
        weights = [job for job in jobs if not job[0].on_bias]
        biases = [job for job in jobs if job[0].on_bias]
        if weights and len(size) == 1:
            self._vector(unit, weights, "set", "diff")
        elif weights:
            self._matrix(unit, weights, size)
        if biases:
            self._vector(unit, biases, "set_b", "diff_b")

    def _weight(self, adapter: Adapter, rows: slice) -> Tensor:
        """The base's numbers, fp32."""
        module = adapter.destination.module
        layer = layers.layer_of(self.bases[adapter.destination.role], module)
        expected = self.base.size(adapter.destination)
        if layer is None or layers.size_of(layer) != expected:
            found = "none" if layer is None else list(layers.size_of(layer))
            raise BadInput(f"the base model does not fit: its {module} is {found}, the LoRA's is {list(expected)}")
        if adapter.on_bias:
            bias: Tensor = layer.bias
            return bias.detach()[rows].float()
        return layers.numbers(layer, rows, torch.float32)

    def _vector(self, unit: Unit, jobs: Sequence[Job], absolute: str, added: str) -> None:
        """A norm or a bias: numbers that take its place, whole at any strength, if nothing else changes it; else the
        sum of all changes, which is added."""
        size = self.base.size(unit.destination)
        own = unit.destination.rows(size)
        whole = len(jobs) == 1 and jobs[0][0].algorithm in REPLACING
        total = torch.zeros(own.stop - own.start, dtype=torch.float64)
        for adapter, strength, _ in jobs:
            at = adapter.destination.rows(size)
            if whole:
                change = adapter.numbers(torch.float64, "cpu")[absolute].reshape(-1)
            elif needs_base(adapter):
                change = adapter.change(self._weight(adapter, at), strength).double()
            else:
                change = adapter.change(torch.zeros(at.stop - at.start, dtype=torch.float64)) * strength
            first, last = max(at.start, own.start), min(at.stop, own.stop)
            total[first - own.start:last - own.start] += change[first - at.start:last - at.start]
        ending = _LAYOUTS[self.layout].endings[absolute if whole else added]
        if whole and absolute == "set" and unit.destination.role == "transformer":
            ending = _NORM_SET[self.layout]
        written = self._stored(unit.stem + ending, total)
        off = float(torch.linalg.vector_norm(written.double() - total))
        self.made.append(Made(unit.destination.role, unit.stem, _kinds(jobs), None, None,
                              float(torch.linalg.vector_norm(total)), off))

    def _matrix(self, unit: Unit, jobs: Sequence[Job], size: tuple[int, ...]) -> None:
        own = unit.destination.rows(size)
        width = max(size[1], *(adapter.size[1] or 0 for adapter, *_ in jobs))
        keeps = self._keeps_magnitudes(unit, jobs)
        if keeps:
            values = self._magnitudes(unit, jobs, size)
            self._stored(unit.stem + _LAYOUTS[self.layout].endings["magnitude"],
                         values.reshape(_LAYOUTS[self.layout].magnitude))
        found = [(job, pair_of(job[0], job[0].destination.rows(size), job[1], keeps)) for job in jobs]
        pairs = [part for _, pair in found if pair is not None and (part := cut(pair, own)) is not None]
        before = sum(pair.rank for pair in pairs) if pairs else None
        whole = joined(pairs, own, width) if pairs else None
        dense = [job for job, pair in found if pair is None]
        if dense:
            change = self._dense(dense, own, width, size)
            change = change if whole is None else change + whole.product()
            assert self.rank is not None
            pair = nearest(change, self.rank, own)
            written = self._pair(unit, pair)
            total = float(torch.linalg.vector_norm(change))
            off = float(torch.linalg.vector_norm(change - written.product()))
            self.made.append(Made(unit.destination.role, unit.stem, _kinds(jobs), None, pair.rank, total, off))
            return
        assert whole is not None
        pair = whole if self.rank is None else reduced(whole, self.rank)
        written = self._pair(unit, pair)
        same = pair is whole and torch.equal(written.down, whole.down) and torch.equal(
            written.up * written.scale, whole.up * whole.scale)
        self.made.append(Made(unit.destination.role, unit.stem, _kinds(jobs), before, pair.rank, length(whole),
                              0.0 if same else distance(whole, written)))

    def _dense(self, jobs: Sequence[Job], own: slice, width: int, size: tuple[int, ...]) -> Tensor:
        """The sum of changes that are no pairs, fp32."""
        total = torch.zeros(own.stop - own.start, width)
        for adapter, strength, _ in jobs:
            at = adapter.destination.rows(size)
            columns = adapter.size[1] or size[1]
            if needs_base(adapter):
                change = adapter.change(self._weight(adapter, at), strength)
            else:
                change = adapter.change(torch.zeros(at.stop - at.start, columns)) * strength
            first, last = max(at.start, own.start), min(at.stop, own.stop)
            total[first - own.start:last - own.start, :change.shape[1]] += change[first - at.start:last - at.start]
        return total

    def _pair(self, unit: Unit, pair: Pair) -> Pair:
        """Writes a pair, and gives it as it was written."""
        pair = folded(pair) if self.fold else pair
        endings = _LAYOUTS[self.layout].endings
        down = self._stored(unit.stem + endings["down"], pair.down)
        up = self._stored(unit.stem + endings["up"],
                          swapped(pair.up) if unit.destination.swapped else pair.up)
        up = swapped(up) if unit.destination.swapped else up
        scale = pair.scale
        if not self.fold:
            alpha = torch.tensor(pair.scale * pair.rank, dtype=torch.float32)
            if not bool(alpha.isfinite()):
                raise NotFinite(f"{unit.stem}.alpha: {pair.scale * pair.rank:.3g} does not fit fp32; choose a smaller "
                                "strength")
            self.tensors[f"{unit.stem}.alpha"] = alpha
            scale = float(alpha.double()) / pair.rank
        return Pair(pair.rows, down.double(), up.double(), scale)

    def _stored(self, key: str, values: Tensor) -> Tensor:
        written = values.to(self.dtype).contiguous()
        if not bool(torch.isfinite(written).all()):
            raise NotFinite(f"{key}: numbers up to {float(values.abs().max()):.3g} do not fit {name_of(self.dtype)}; "
                            "write the file as fp32 or bf16 (dtype, --dtype)")
        self.tensors[key] = written
        return written


def _kinds(jobs: Sequence[Job]) -> str:
    return "/".join(dict.fromkeys("DoRA" if "magnitude" in adapter.factors else adapter.algorithm
                                  for adapter, *_ in jobs))


def _notes(entries: Sequence[Summand]) -> Iterator[str]:
    for i, entry in enumerate(entries):
        for later in entries[i + 1:]:
            count = sum(any(one.outdone(other) for other in later.lora.adapters) for one in entry.lora.adapters
                        if one.algorithm in REPLACING and later.at(one.destination))
            if count:
                yield (f"{entry.lora.path.name}: {count} of its vectors are left out, {later.lora.path.name} replaces "
                       "the same and comes later")
        report = entry.lora.report
        lost = len(report.unmatched) + len(report.skipped)
        if lost:
            first = report.unmatched[0] if report.unmatched else report.skipped[0][0]
            yield f"{entry.lora.path.name}: {lost} tensors belong to no layer and are left out, such as {first}"
        for note in report.notes:
            if note.startswith(("left out", "trained with split_qkv")):
                yield f"{entry.lora.path.name}: {note}"
