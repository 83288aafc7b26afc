"""From a file to adapters: keys to layers, layers to algorithms, and everything checked on the way.

`inspect_lora` reads names, shapes and alphas and refuses nothing; `read_lora` refuses what cannot be applied and has
the tensors memory-mapped. Rules of alpha: beside the layer, else in PEFT's header, else none, which means a scale of 1.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BadModelFile, NotFinite
from ..weights import Checkpoint, TensorInfo, detect, open_checkpoint
from ..weights.containers import torch_dtype
from ..weights.header import show
from . import refusals
from .adapter import Adapter
from .algorithms import ALGORITHMS, CONSTRAINED, ON_BIAS, VECTORS, Algorithm, Mismatch, is_on_input
from .dialects import Place, place, skipped
from .peft_header import PeftHeader
from .report import EXAMPLES, Report, header_facts
from .vocabulary import BASES, Base, Destination, Size

MAX_SCALE = 100.0
"""Above this alpha / rank is taken for damage."""
LOSSY = ("reshape_weight",)
SPLIT_FIX = {"qkv": 3, "linear1": 4}
CONTROL_LAYER = "img_in"
"""The one layer whose width differs between FLUX.1 models: adapters of another width are padded, or widen it."""


@dataclass(frozen=True)
class Options:
    """`ignore_alpha`: take a scale of 1 everywhere. `header_alpha`: use PEFT's alpha from the header. `split_fix`: undo
    the third or quarter that kohya's split_qkv lost. `skip_broken`: leave layers out that do not hold together or do
    not fit, instead of refusing the file."""

    ignore_alpha: bool = False
    header_alpha: bool = True
    split_fix: bool = False
    skip_broken: bool = False


DEFAULT = Options()


@dataclass(frozen=True)
class Lora:
    """A file that can be applied."""

    path: Path
    adapters: tuple[Adapter, ...] = field(repr=False)
    report: Report

    def of(self, role: str) -> tuple[Adapter, ...]:
        """The adapters of one model: `transformer`, `clip_l` or `t5`."""
        return tuple(adapter for adapter in self.adapters if adapter.destination.role == role)


@dataclass(frozen=True)
class Draft:
    """An adapter before its tensors are read. `size`: of what it changes; `scale` is None where it makes no sense."""

    place: Place
    algorithm: Algorithm
    destination: Destination
    keys: Mapping[str, str]
    size: tuple[int | None, int | None]
    rank: int | None
    alpha: float | None
    scale: float


@dataclass(frozen=True)
class Found:
    drafts: tuple[Draft, ...]
    report: Report


def inspect_lora(checkpoint: Checkpoint, options: Options = DEFAULT) -> Report:
    """What a file holds, resolved against the names and sizes of FLUX.1 with no model needed. Raises nothing."""
    return find(checkpoint, options).report


def read_lora(source: str | os.PathLike[str] | Checkpoint, options: Options = DEFAULT) -> Lora:
    """The adapters of a file. Their tensors stay memory-mapped, and the file with them.

    Raises `MissingFile`; `BadModelFile` for another family, a model, a file that is empty, cut off or mostly unknown,
    halves of pairs, tensors that do not fit each other or their layer; `NotFinite` for NaN or infinity.
    """
    if isinstance(source, Checkpoint):
        return _read(source, options)
    with open_checkpoint(source) as checkpoint:
        return _read(checkpoint, options)


def _read(checkpoint: Checkpoint, options: Options) -> Lora:
    found = find(checkpoint, options)
    if found.report.problems:
        raise BadModelFile(checkpoint.path, "; ".join(found.report.problems))
    adapters, bad = [], Counter[str]()
    for draft in found.drafts:
        factors = {role: checkpoint[key].read() for role, key in draft.keys.items() if role not in ("alpha", *LOSSY)}
        for role, tensor in factors.items():
            count = _nonfinite(tensor)
            if count:
                bad[draft.keys[role]] += count
        adapters.append(Adapter(draft.destination, draft.algorithm.name, factors, draft.scale, draft.rank, draft.alpha,
                                tuple(draft.keys.values()), draft.size))
    if bad:
        names = ", ".join(show(name) for name in list(bad)[:EXAMPLES])
        raise NotFinite(f"{checkpoint.path.name}: {sum(bad.values())} numbers are NaN or infinite, in {len(bad)} of "
                        f"{found.report.matched} tensors, such as {names}. The training went wrong or the file is "
                        "damaged; use another version of it", file=checkpoint.path)
    notes = found.report.notes + _lost_scale(adapters, options)
    return Lora(checkpoint.path, tuple(adapters), replace(found.report, nonfinite=0, notes=notes))


def _nonfinite(tensor: Tensor) -> int:
    if not tensor.dtype.is_floating_point:
        return 0
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return values.numel() - int(torch.isfinite(values).sum())


def find(checkpoint: Checkpoint, options: Options = DEFAULT) -> Found:
    """Resolves every key, without reading more than alphas."""
    keys = list(checkpoint)
    facts, triggers = header_facts(checkpoint.metadata)
    places = {key: found for key in keys if (found := place(key, checkpoint)) is not None}
    skips = tuple((key, reason) for key in keys if key not in places and (reason := skipped(key)) is not None)
    aside = {key for key, _ in skips}
    unmatched = tuple(key for key in keys if key not in places and key not in aside)
    report = Report(_format(places.values()), None, len(places), unmatched, skips, triggers=triggers, header=facts,
                    dtypes=dict(Counter(info.format for info in checkpoint.values())))
    refused = refusals.no_lora(detect(checkpoint), keys) or refusals.foreign(keys, len(places))
    if refused is None and 2 * len(places) < len(keys) - len(skips):
        refused = _mostly_unknown(len(places), keys, unmatched)
    drafts, problems = _drafts(checkpoint, places, options) if refused is None else ([], [])
    base, misfits, width = _base(drafts)
    refused = refused or width
    if refused is not None:
        return Found((), replace(report, matched=0, unmatched=tuple(key for key in keys if key not in aside),
                                 problems=(refused,)))
    return _summary(checkpoint, report, base, drafts, misfits, problems, options)


def _summary(checkpoint: Checkpoint, report: Report, base: Base, drafts: Sequence[Draft], misfits: Mapping[int, str],
             problems: list[str], options: Options) -> Found:
    notes = [*_notes(checkpoint, drafts, report)]
    kept = tuple(draft for i, draft in enumerate(drafts) if i not in misfits)
    broken = problems + list(misfits.values())
    if options.skip_broken and kept:
        notes += [f"left out: {text}" for text in broken]
        broken = []
    elif len(broken) > EXAMPLES:
        broken = [f"{len(broken)} layers are broken: {'; '.join(broken[:3])}; ... Use another version of the file"]
    if not kept and not broken:
        broken = ["it holds nothing that changes a layer"]
    report = replace(
        report, base=base.name, problems=tuple(broken), notes=tuple(notes),
        ranks=tuple(sorted({draft.rank for draft in kept if draft.rank is not None})),
        alphas=tuple(sorted({draft.alpha for draft in kept if draft.alpha is not None})),
        scales=tuple(sorted({draft.scale for draft in kept if draft.algorithm.name not in CONSTRAINED})),
        algorithms=dict(Counter(_named(draft) for draft in kept)),
        targets={role: len({draft.destination.module for draft in kept if draft.destination.role == role})
                 for role in dict.fromkeys(draft.destination.role for draft in kept)})
    return Found(kept, report)


def _named(draft: Draft) -> str:
    return f"DoRA ({draft.algorithm.name})" if "magnitude" in draft.keys else draft.algorithm.name


def _format(places: Iterable[Place]) -> str:
    counts = Counter(found.dialect for found in places)
    main = Counter({name: count for name, count in counts.items() if not name.startswith("text encoder")}) or counts
    return main.most_common(1)[0][0] if main else "unknown"


def _mostly_unknown(matched: int, keys: Sequence[str], unmatched: Sequence[str]) -> str:
    examples = ", ".join(show(key) for key in unmatched[:EXAMPLES])
    return (f"this is no FLUX.1 LoRA known here: {matched} of {len(keys)} tensors matched; unknown are "
            f"{len(unmatched)}, such as {examples}. Choose a LoRA made for FLUX.1")


def _drafts(checkpoint: Checkpoint, places: Mapping[str, Place], options: Options) -> tuple[list[Draft], list[str]]:
    """Adapters of every stem, and what is wrong with those that cannot be put together."""
    stems: dict[str, dict[str, str]] = {}
    of: dict[str, Place] = {}
    problems: list[str] = []
    for key, found in places.items():
        roles = stems.setdefault(found.stem, {})
        of.setdefault(found.stem, found)
        if found.role in roles:
            problems.append(f"{show(found.stem)}: {show(key)} and {show(roles[found.role])} are the same tensor twice")
        roles[found.role] = key
    header = PeftHeader.read(checkpoint.metadata if options.header_alpha else {})
    drafts: list[Draft] = []
    for stem, roles in stems.items():
        made, wrong = _of_stem(checkpoint, of[stem], roles, header, options)
        drafts += made
        problems += wrong
    return drafts, problems


def _of_stem(checkpoint: Checkpoint, found: Place, roles: dict[str, str], header: PeftHeader, options: Options
             ) -> tuple[list[Draft], list[str]]:
    drafts: list[Draft] = []
    problems: list[str] = []
    left = set(roles)
    for algorithm, destination, used in _recognised(found.destination, roles):
        keys = {role: roles[key_role] for role, key_role in used.items()}
        left -= set(used.values())
        try:
            draft = _draft(checkpoint, found, algorithm, destination, keys, header, options)
        except Mismatch as error:
            problems.append(f"{show(found.stem)}: {error}")
            continue
        if used.get("diff_b") == "up_b":
            draft = replace(draft, scale=next((one.scale for one in drafts if one.algorithm.name == "LoRA"), 1.0))
        drafts.append(draft)
    left -= {"alpha", *LOSSY}
    if left:
        names = ", ".join(show(roles[role]) for role in sorted(left))
        problems.append(f"{show(found.stem)}: half of a pair is missing; there is {names}")
    elif not drafts and not problems:
        problems.append(f"{show(found.stem)}: only {', '.join(sorted(roles))} is there")
    return drafts, problems


def _recognised(destination: Destination, roles: Mapping[str, str]
                ) -> Iterator[tuple[Algorithm, Destination, dict[str, str]]]:
    """The algorithms that a stem's tensors make up; role in the algorithm -> role in the file."""
    numbered = sorted(role for role in roles if role.startswith("oft_") and role[4:].isdigit())
    for i, role in enumerate(numbered):  # kohya's OFT numbers the parts of fused layers
        used = {"oft": role, **({"alpha": "alpha"} if "alpha" in roles else {})}
        part = destination if len(numbered) == 1 else replace(destination, parts=(i, i + 1))
        yield next(row for row in ALGORITHMS if row.name == "OFT"), part, used
    for algorithm in ALGORITHMS:
        taken = algorithm.taken(set(roles))
        if taken:
            yield algorithm, destination, {role: role for role in taken}
    if "up_b" in roles:
        yield next(row for row in ALGORITHMS if row.name == "bias"), destination, {"diff_b": "up_b"}


def _draft(checkpoint: Checkpoint, found: Place, algorithm: Algorithm, destination: Destination,
           keys: dict[str, str], header: PeftHeader, options: Options) -> Draft:
    shapes = {role: checkpoint[key].shape for role, key in keys.items()}
    for role, key in keys.items():
        if torch_dtype(checkpoint[key].format) is None or 0 in shapes[role]:
            raise Mismatch(f"{role} is {checkpoint[key].format} {list(shapes[role])}, expected numbers")
        if len(shapes[role]) < 2 and role not in VECTORS:
            raise Mismatch(f"{role} {list(shapes[role])} is no matrix")
    size = _ia3_size(checkpoint, keys) if algorithm.name == "IA3" else algorithm.extent(shapes)
    _check_vectors(shapes, size)
    rank = algorithm.rank(shapes)
    alpha = None if options.ignore_alpha or "alpha" not in keys else _alpha(checkpoint[keys["alpha"]])
    if algorithm.name in CONSTRAINED:
        if alpha is not None and math.isnan(alpha):
            raise Mismatch("alpha is nan, expected the bound of a rotation")
        return Draft(found, algorithm, destination, keys, size, None, alpha, alpha or 0.0)
    scale, alpha = _scale(rank, alpha, header, found, options)
    if options.split_fix and found.dialect == "kohya" and algorithm.name == "LoRA" and rank:
        scale *= next((times for ending, times in SPLIT_FIX.items() if destination.module.endswith(ending)), 1)
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise Mismatch(f"alpha {alpha} over rank {rank} is a scale of {scale:g}, expected at most {MAX_SCALE:g}")
    return Draft(found, algorithm, destination, keys, size, rank, alpha, scale)


def _check_vectors(shapes: Mapping[str, tuple[int, ...]], size: tuple[int | None, int | None]) -> None:
    """Magnitudes and rescales have one number per row, or, magnitudes of the other kind, per column."""
    for role in ("magnitude", "rescale"):
        if role not in shapes:
            continue
        expected = size[1] if role == "magnitude" and is_on_input(shapes[role]) else size[0]
        if expected is not None and math.prod(shapes[role]) != expected:
            raise Mismatch(f"{role} {list(shapes[role])} has {math.prod(shapes[role])} numbers, expected {expected}")


def _ia3_size(checkpoint: Checkpoint, keys: Mapping[str, str]) -> tuple[int | None, int | None]:
    """A flag in the file tells whether the vector belongs to rows or columns."""
    count = math.prod(checkpoint[keys["ia3"]].shape)
    on_input = bool(checkpoint[keys["on_input"]].read().reshape(-1).any())
    return (None, count) if on_input else (count, None)


def _alpha(info: TensorInfo) -> float:
    values = info.read().reshape(-1)
    if values.numel() != 1:
        raise Mismatch(f"alpha {list(info.shape)} is not one number")
    return float(values[0].double())


def _scale(rank: int | None, alpha: float | None, header: PeftHeader, found: Place, options: Options
           ) -> tuple[float, float | None]:
    """The factor of the change, and the alpha it comes from. An alpha of 0 means the rank, as in all trainers."""
    if rank is None or options.ignore_alpha:
        return 1.0, None
    if alpha is not None:
        return (alpha / rank if alpha != 0 else 1.0), alpha
    told = header.alpha(found.destination.role, found.stem)
    return (1.0, told) if not told else (told / header.divisor(found.destination.role, rank), told)


def _base(drafts: Sequence[Draft]) -> tuple[Base, dict[int, str], str | None]:
    """The base that most layers fit, what is wrong with the others, and a refusal if most fit none."""
    wrong = {base: {i: text for i, draft in enumerate(drafts)
                    if (text := misfit(draft.destination, draft.size, base.size(draft.destination),
                                       draft.algorithm.name in ON_BIAS)) is not None} for base in BASES}
    base = min(BASES, key=lambda candidate: len(wrong[candidate]))
    misfits = wrong[base]
    if 2 * len(misfits) > len(drafts):
        widths = Counter(width for i in misfits if (width := drafts[i].size[1]) is not None)
        if widths:
            return base, misfits, refusals.another_width(widths, len(misfits), len(drafts))
    return base, misfits, None


def misfit(destination: Destination, size: tuple[int | None, int | None], layer: Size, on_bias: bool) -> str | None:
    """Why something of `size` does not fit `layer`, None if it does."""
    expected = destination.size(layer)
    rows, width = size
    wide = len(expected) > 1 and not on_bias
    fits = rows is None or rows == expected[0]
    if wide and width is not None and width != expected[1]:
        fits = fits and destination.module == CONTROL_LAYER
    if not wide and width is not None:
        fits = fits and rows is not None and rows * width == expected[0]
    if fits:
        return None
    shown = [side if side is not None else "any" for side in (size if wide else size[:1])]
    return f"{destination.module}: the adapter is for {shown}, the layer is {list(expected[:len(shown)])}"


def _notes(checkpoint: Checkpoint, drafts: Sequence[Draft], report: Report) -> Iterator[str]:
    doubled = [what for what, count in Counter((draft.destination, draft.algorithm.name) for draft in drafts).items()
               if count > 1]
    if doubled:
        yield (f"{len(doubled)} layers stand twice in the file, under two spellings, such as {doubled[0][0].module}: "
               "their changes are added")
    mixed = [module for module, rows in _by_destination(drafts).items() if len(rows - set(ON_BIAS)) > 1]
    if mixed:
        yield f"{len(mixed)} layers have adapters of several kinds, such as {mixed[0]}: their changes are added"
    if any(draft.destination.module == CONTROL_LAYER and draft.size[1] == 128 for draft in drafts):
        yield ("control LoRA: it widens img_in from 64 to 128 channels and needs its control picture as conditioning "
               "(FLUX.1 Depth or Canny)")
    if any(draft.destination.role != "transformer" for draft in drafts):
        yield "it changes text encoders too: connect CLIP, or these layers have no effect"


def _by_destination(drafts: Sequence[Draft]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for draft in drafts:
        if draft.destination.parts is None:
            found.setdefault(draft.destination.module, set()).add(draft.algorithm.name)
    return found


def _lost_scale(adapters: Sequence[Adapter], options: Options) -> tuple[str, ...]:
    """kohya's split_qkv trains with alpha / r and saves alpha beside a rank of 3 r: told by the zeros of its up."""
    adapter = next((one for one in adapters if one.algorithm == "LoRA" and one.destination.parts is None
                    and one.destination.module.endswith(".qkv") and (one.rank or 1) % 3 == 0), None)
    if adapter is None or options.split_fix:
        return ()
    up = adapter.factors["up"].flatten(1)
    width, rank = up.shape[0] // 3, up.shape[1] // 3
    corners = (up[:width, rank:], up[width:2 * width, :rank], up[2 * width:, :2 * rank])
    if not all(not bool(part.float().any()) for part in corners) or not bool(up.float().any()):
        return ()
    return ("trained with split_qkv: its q, k, v and linear1 act at a third or a quarter of the trained strength, as "
            "in every loader; the option split_fix undoes this",)
