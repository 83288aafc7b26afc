"""From a checkpoint to a model: strict, and without copying what already is as it should be."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import BadModelFile, NotFinite
from ..models.autoencoder import Autoencoder
from ..models.clip import ClipText
from ..models.flux import Flux
from ..models.ops import PLAIN, Ops
from ..models.t5 import T5Encoder
from ..models.vision import Redux, SiglipVision
from ..quant import FORMATS, PACKED, Embedding, Linear, MissingCodebook, PackedOps, QuantFormat, packed_like
from .containers import Checkpoint, TensorInfo, open_checkpoint
from .detect import ROLE_NAMES, VARIANT_NAMES, Detection, Part, detect
from .header import show, show_shape
from .keymaps import Source, assemble, respelled, source_of
from .stored import SCALES, UNUSED, Stored, beside

log = logging.getLogger(__name__)

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "transformer": Flux, "t5": T5Encoder, "clip_l": ClipText, "vae": Autoencoder,
    "vision": SiglipVision, "redux": Redux,
}
LOADABLE = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Stored types that are weights as they stand; other types need side tensors to mean something."""
SMALL_ELEMENTS = 1 << 16
"""Tensors up to this size, biases and scales among them, are searched for NaN and infinity at load."""
CHECKED_AT_LOAD = 1 << 27
"""Bytes of a model's packed weights on the CPU whose scales are searched for them at load; others at first use."""
EXAMPLES = 5
LISTED = 50


@dataclass(frozen=True)
class Match:
    """A part compared with the model it should fill. Names are ours in `sources`, the checkpoint's elsewhere."""

    sources: Mapping[str, Source]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    """Each `name: shape found, shape expected`."""
    unknown: tuple[str, ...]
    unloadable: tuple[str, ...]
    """Each `name (stored type)`."""


def build(part: Part, ops: Ops = PLAIN) -> nn.Module:
    """The part's model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return MODELS[part.role](part.spec, ops).requires_grad_(False).eval()


def match(checkpoint: Mapping[str, TensorInfo], part: Part, model: nn.Module) -> Match:
    """Compares a part with the names and shapes of `model`, whose q/k norms may go by any known spelling."""
    assert part.spec is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    source = source_of(part.layout, part.spec)
    sources = {name: source(ours, shapes[name]) for ours, name in respelled(part.role, shapes).items()}
    missing, misshapen, unloadable = [], [], []
    used = set()
    for where in sources.values():
        for name, shape in zip(where.names, where.shapes, strict=True):
            used.add(name)
            if name not in part.names:
                missing.append(part.prefix + name)
                continue
            info = checkpoint[part.names[name]]
            if info.shape != shape:
                misshapen.append(f"{show(part.names[name])}: {show_shape(info.shape)}, expected {show_shape(shape)}")
            elif info.format not in LOADABLE and info.format not in FORMATS:
                unloadable.append(f"{show(part.names[name])} ({info.format})")
            for side in (beside(name, ending) for ending in (*SCALES, *UNUSED) if name.endswith(".weight")):
                scale = part.names.get(side)
                if scale is not None:
                    used.add(side)
                    found = checkpoint[scale].shape
                    if math.prod(found) != 1 and found not in ((*shape[:1], 1), (1, *shape[-1:])):
                        misshapen.append(f"{show(scale)}: {show_shape(found)}, expected one number, or one for each "
                                         "row or column")
                    elif checkpoint[scale].format not in LOADABLE:
                        unloadable.append(f"{show(scale)} ({checkpoint[scale].format})")
    unknown = [full for name, full in part.names.items() if name not in used]
    return Match(sources, tuple(missing), tuple(misshapen), tuple(unknown), tuple(unloadable))


def load(source: str | os.PathLike[str] | Checkpoint, role: str, *, variant: Collection[str] | None = None,
         dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu",
         ops: Ops = PLAIN, packed: PackedOps | None = PACKED) -> nn.Module:
    """The model of `role` (a key of `MODELS`) from a file, folder or open checkpoint.

    `variant`: for a transformer, the kinds allowed (`dev`, `schnell`, `fill`, `control`); None allows all.
    `dtype`: of the weights; None keeps each as stored, and one that is put together from several types in a dtype that
    holds the numbers of all. Weights already of that dtype on the CPU stay memory-mapped: loading takes no memory, and
    the file stays mapped until the model is gone.
    `packed`: the layers that hold what the file has packed (GGUF's types, fp8): linear layers and embeddings, their
    bytes memory-mapped on the CPU. All else, and everything for None, is unpacked to `dtype`, to fp32 if that is None.
    Plain fp8, which torch knows, is kept as it is stored where `dtype` is None.
    Returns an instance of the class in `MODELS`, with `.spec`, in eval mode, without gradients.
    Raises `BadModelFile` for a wrong role, variant or size, for missing, misshapen or unknown tensors; `NotFinite` for
    NaN or infinity in small tensors such as scales and norms; for the scales of large packed weights the layer raises
    it when it is first used. Tensors outside all known modules are logged once.
    """
    if isinstance(source, Checkpoint):
        return _load(source, role, variant, dtype, torch.device(device), ops, packed)
    with open_checkpoint(source) as checkpoint:
        return _load(checkpoint, role, variant, dtype, torch.device(device), ops, packed)


def _load(checkpoint: Checkpoint, role: str, variant: Collection[str] | None, dtype: torch.dtype | None,
          device: torch.device, ops: Ops, packed: PackedOps | None) -> nn.Module:
    detection = detect(checkpoint)
    part = choose(checkpoint, detection, role, variant)
    model = build(part, ops)
    fill(model, checkpoint, part, dtype=dtype, device=device, packed=packed)
    if detection.unknown:
        log.warning("%s: %d tensors belong to nothing known and are not used: %s%s", checkpoint.path.name,
                    len(detection.unknown), ", ".join(map(show, detection.unknown[:LISTED])),
                    "" if len(detection.unknown) <= LISTED else ", ...")
    for note in part.notes:
        log.warning("%s: %s", checkpoint.path.name, note)
    return model


def fill(model: nn.Module, checkpoint: Checkpoint, part: Part, *, dtype: torch.dtype | None = None,
         device: torch.device | str = "cpu", packed: PackedOps | None = PACKED) -> None:
    """Puts the part's weights in place of those of `model`, which may be on the meta device or a host's subclass.

    Layers of packed weights take the place of its own; else as `load`. Strict, as that is; a model that does not fit is
    left as it was.
    """
    found = match(checkpoint, part, model)
    refuse(checkpoint, part, found)
    stored = Stored({name: checkpoint[full] for name, full in part.names.items()}, dtype)
    weights: dict[str, Tensor] = {}
    layers: dict[str, nn.Module] = {}
    seen = 0
    for name, parameter in model.state_dict().items():
        where, shape = found.sources[name], tuple(parameter.shape)
        _require_codebooks(checkpoint, part, where)
        path, _, kind = name.rpartition(".")
        format = stored.format_of(where)
        scales = None if format is None else stored.scales_of(where)
        layer = None if packed is None or format is None or kind != "weight" else packed_like(
            model.get_submodule(path), format, None if scales is None else tuple(scales.shape), dtype or torch.float32,
            packed)
        if layer is None or format is None:
            weights[name] = assemble(where, shape, stored.numbers, dtype=stored.dtype_of(where), device=device)
            if parameter.numel() <= SMALL_ELEMENTS:
                _check_finite(checkpoint, part, where, weights[name])
            continue
        layers[path] = layer
        weights[name] = assemble(where, (shape[0], format.row_bytes(shape[1])), stored.rows, device=device)
        seen += weights[name].nbytes
        _check_scales(layer, format, weights[name], seen, _not_finite(checkpoint, part, where,
                                                                      f"scales of {format.name}"))
        if scales is not None:
            _check_finite(checkpoint, part, where, scales)
            weights[f"{path}.{SCALES[0]}"] = scales.to(device)
    for path, layer in layers.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    model.requires_grad_(False)
    model.load_state_dict(weights, strict=True, assign=True)
    model.eval()


def _require_codebooks(checkpoint: Checkpoint, part: Part, where: Source) -> None:
    for name in where.names:
        format = FORMATS.get(checkpoint[part.names[name]].format)
        try:
            if format is not None:
                format.require()
        except MissingCodebook as error:
            raise MissingCodebook(f"{checkpoint.path.name}: {show(part.names[name])}: {error}",
                                  file=checkpoint.path) from error


def choose(checkpoint: Checkpoint, detection: Detection, role: str, variant: Collection[str] | None = None) -> Part:
    """The part of `role`, once it is one that can be loaded; else `BadModelFile` says what the file is."""
    if role not in MODELS:
        raise ValueError(f"role must be one of {', '.join(MODELS)}, not {role!r}")
    part = detection.parts.get(role)
    if part is None or part.foreign:
        raise BadModelFile(checkpoint.path, f"asked for {ROLE_NAMES[role]}, this is "
                                            f"{detection.family if part is None else part.family}",
                           expected=ROLE_NAMES[role], found=detection.role,
                           advice="Choose another file, or load this one where its kind is wanted")
    if part.problems or part.spec is None:
        raise BadModelFile(checkpoint.path, f"{part.family} that cannot be loaded: " + "; ".join(part.problems),
                           advice="Choose another file")
    if variant is not None and part.variant not in variant:
        allowed = " or ".join(VARIANT_NAMES[name] for name in variant)
        raise BadModelFile(checkpoint.path, f"this is a {VARIANT_NAMES[str(part.variant)]} model", field="variant",
                           expected=allowed, found=part.variant, advice="Choose another file, or another node for it")
    return part


def refuse(checkpoint: Checkpoint, part: Part, found: Match) -> None:
    """Raises `BadModelFile` for the first kind of mismatch, with its count and five examples."""
    another = "Get another version of this model"
    for names, problem, expected, advice in (
            (tuple(map(show, found.missing)), "tensors are missing", f"all {len(found.sources)} weights",
             f"Download it again. {another} if that does not help"),
            (found.misshapen, "tensors have the wrong shape", None, another),
            (found.unloadable, "weights are stored in a type that cannot be loaded", " or ".join(LOADABLE), another),
            (tuple(map(show, found.unknown)), "tensors are unknown inside a module that is loaded", None,
             f"The file may be of another family or precision. {another}")):
        if names:
            more = "" if len(names) <= EXAMPLES else ", ..."
            raise BadModelFile(checkpoint.path, f"{part.family}: {len(names)} {problem}", expected=expected,
                               found=", ".join(names[:EXAMPLES]) + more, advice=advice)


def _check_finite(checkpoint: Checkpoint, part: Part, where: Source, weight: Tensor) -> None:
    """NaN or infinity in a scale or bias poisons every picture: it is named here, not as a black picture."""
    values = weight.float() if weight.dtype.itemsize == 1 else weight
    if not bool(torch.isfinite(values).all()):
        raise _not_finite(checkpoint, part, where, str(weight.dtype))


def _check_scales(layer: nn.Module, format: QuantFormat, packed: Tensor, seen: int, error: NotFinite) -> None:
    """Raises `error` for a scale that is no finite number: now, if the bytes are read anyway or few, else by the layer
    when it is first used. To look at all scales of a mapped file is to read all of it from the disk."""
    if packed.device.type != "cpu" or seen <= CHECKED_AT_LOAD or not isinstance(layer, Linear | Embedding):
        if not format.is_finite(packed):
            raise error
    else:
        layer.doubt = (error.message, error.file)


def _not_finite(checkpoint: Checkpoint, part: Part, where: Source, kind: str) -> NotFinite:
    names = ", ".join(show(part.names[name]) for name in where.names)
    return NotFinite(f"{checkpoint.path.name}: NaN or infinity in {names}. The file is damaged, or its numbers do not "
                     f"fit {kind}; download it again or load it in another dtype", file=checkpoint.path)
