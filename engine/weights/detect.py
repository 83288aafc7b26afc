"""What a checkpoint is: role, variant, layout, sizes. Judged by names and shapes alone, never by the file's name.

A file is split into parts (transformer, T5, CLIP-L, autoencoder, ...), each under a prefix; each part's sizes are read
off its shapes. Nothing here raises: what is wrong is listed in `problems`, and `load` refuses it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..specs import FluxSpec
from .containers import TensorInfo
from .families import Shapes, family_of, is_lora
from .header import show
from .keymaps import Spec, respelled
from .sizes import SPECS, read_spec
from .unreadable import unreadable

ROLE_NAMES = {
    "transformer": "a FLUX.1 transformer", "t5": "a T5 text encoder", "clip_l": "a CLIP-L text encoder",
    "vae": "a FLUX.1 autoencoder (VAE)", "vision": "a SigLIP vision encoder",
    "redux": "a FLUX.1 Redux projector", "lora": "a LoRA", "all-in-one": "an all-in-one checkpoint",
    "unknown": "not recognised",
}
VARIANT_NAMES = {"dev": "FLUX.1 dev kind", "schnell": "FLUX.1 schnell kind", "fill": "FLUX.1 Fill",
                 "control": "FLUX.1 Depth/Canny"}


@dataclass(frozen=True)
class Signature:
    """Names that only one role and layout has; what stands before a match, up to its dot, is the prefix.

    `roots` are the first words of all its names: without a prefix, only such names are its own.
    """

    role: str
    layout: str
    pattern: re.Pattern[str]
    roots: frozenset[str]


def _signature(role: str, layout: str, roots: str, pattern: str) -> Signature:
    return Signature(role, layout, re.compile(rf"(?:^|(?<=\.))(?:{pattern})"), frozenset(roots.split()))


SIGNATURES: tuple[Signature, ...] = (
    _signature("transformer", "bfl",
               "img_in txt_in time_in vector_in guidance_in double_blocks single_blocks final_layer",
               r"double_blocks\.\d+\.(?:img|txt)_(?:attn|mod|mlp)\."
               r"|single_blocks\.\d+\.(?:linear[12]|modulation|norm)\."
               r"|(?:time|vector|guidance)_in\.(?:in|out)_layer\.|(?:img|txt)_in\.(?:weight|bias)"),
    _signature("transformer", "diffusers",
               "x_embedder context_embedder time_text_embed transformer_blocks single_transformer_blocks norm_out "
               "proj_out",
               r"transformer_blocks\.\d+\.(?:attn\.|ff_context\.|norm1_context\.)"
               r"|single_transformer_blocks\.\d+\.(?:attn\.|norm\.|proj_mlp\.|proj_out\.)|time_text_embed\."),
    _signature("vision", "hf", "vision_model text_model embeddings encoder post_layernorm head",
               r"vision_model\.|embeddings\.(?:patch|class)_embedding\b|post_layernorm\."),
    _signature("clip_l", "hf",
               "text_model embeddings encoder final_layer_norm text_projection vision_model visual_projection",
               r"text_model\.|embeddings\.(?:token|position)_embedding\."
               r"|encoder\.layers\.\d+\.(?:self_attn|layer_norm[12]|mlp)\."),
    _signature("t5", "hf", "shared encoder decoder lm_head",
               r"encoder\.block\.\d+\.layer\.[01]\.(?:SelfAttention|DenseReluDense|layer_norm)\."
               r"|shared\.weight$|encoder\.final_layer_norm\.weight$"),
    _signature("t5", "gguf", "enc dec token_embd output", r"enc\.blk\.\d+\.(?:attn|ffn)_"),
    _signature("vae", "bfl", "encoder decoder quant_conv post_quant_conv",
               r"(?:encoder|decoder)\.(?:mid\.(?:block|attn)_|norm_out\.|down\.\d+\.|up\.\d+\.)"),
    _signature("vae", "diffusers", "encoder decoder quant_conv post_quant_conv",
               r"(?:encoder|decoder)\.(?:mid_block\.|conv_norm_out\.|(?:down|up)_blocks\.\d+\.)"),
    _signature("redux", "bfl", "redux_up redux_down", r"redux_(?:up|down)\."),
)
MIN_EVIDENCE = 3
"""Fewer matching names than this are leftovers, not a part."""

KNOWN_PREFIXES = (
    "", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "net.", "module.", "unet.",
    "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "text_encoders.clip_l.",
    "text_encoders.t5xxl.", "clip_l.transformer.", "t5xxl.transformer.", "clip_l.", "t5xxl.", "text_encoder.",
    "text_encoder_2.", "conditioner.embedders.0.transformer.", "cond_stage_model.transformer.",
    "vae.", "first_stage_model.", "ae.",
)
"""Of several copies of a part, the one whose prefix stands first is taken."""

EMA = re.compile(r"(?:^|\.)(?:model_)?ema(?:\.|_model\.)")
HARMLESS: tuple[tuple[str | None, re.Pattern[str]], ...] = (
    (None, EMA),
    (None, re.compile(r"(?:^|\.)(?:logit_scale|logit_bias|spiece_model|scaled_fp8)$")),
    (None, re.compile(r"(?:^|\.)position_ids$")),
    (None, re.compile(r"(?:^|\.)text_projection(?:$|\.)")),
    ("t5", re.compile(r"(?:^|\.)(?:encoder\.embed_tokens\.weight$|decoder\.|lm_head\.|dec\.|output\.weight$)")),
    ("clip_l", re.compile(r"(?:^|\.)(?:vision_model\.|visual_projection\.)")),
    ("vision", re.compile(r"^text_model\.")),
)
"""Surplus that publishers leave in, with the role of the part it lies in (None: anywhere). Ignored, and shown."""


@dataclass(frozen=True)
class Part:
    """One model in a checkpoint.

    `names` maps our spelling, without prefix, to the name in the checkpoint; harmless surplus is left out. `spec` is
    None when the sizes make no sense, when the part is of another family, and for roles without a model of ours.
    `family` says in words what it is; `problems` are reasons to refuse it, `notes` worth telling.
    """

    role: str
    layout: str
    prefix: str
    names: Mapping[str, str]
    variant: str | None = None
    spec: Spec | None = None
    family: str = ""
    foreign: bool = False
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detection:
    """What a file is.

    `role` is that of the only part, `all-in-one` for several, else `lora` or `unknown`; `variant` and `layout` are
    those of the transformer, else of the first part. `parts` by role. `ignored` are surplus tensors known to be
    harmless, `unknown` those that belong to nothing recognised. `family` says in words what the file is; `problems`
    and `notes` are those of all parts.
    """

    role: str
    variant: str | None
    layout: str | None
    family: str
    parts: Mapping[str, Part] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def detect(checkpoint: Mapping[str, TensorInfo]) -> Detection:
    """Judges the meaning of a checkpoint from its names and shapes. Raises nothing, and reads no data."""
    if is_lora(checkpoint):
        return Detection("lora", None, None, ROLE_NAMES["lora"])
    harmless = [name for name in checkpoint if _is_harmless(None, name)]
    surplus = set(harmless)
    names = [name for name in checkpoint if name not in surplus]
    places, notes = _places(names)
    claims = _claims(names, places)
    owned = {name for claimed in claims for name in claimed}
    parts: dict[str, Part] = {}
    for (prefix, row), claimed in zip(places, claims, strict=True):
        bare = {name.removeprefix(prefix): name for name in claimed}
        spelling = respelled(row.role, bare)
        own = {ours: bare[found] for ours, found in spelling.items()
               if ours != found or not _is_harmless(row.role, found)}
        harmless += sorted(set(claimed) - set(own.values()))
        outside = {name: checkpoint[name].shape for name in names if name not in owned}
        parts[row.role] = _described(Part(row.role, row.layout, prefix, own), checkpoint, outside)
    unknown = tuple(name for name in names if name not in owned)
    return _summary(parts, checkpoint, tuple(harmless), unknown, tuple(notes))


def _is_harmless(role: str | None, name: str) -> bool:
    return any(owner == role and row.search(name) is not None for owner, row in HARMLESS)


def _places(names: Iterable[str]) -> tuple[list[tuple[str, Signature]], list[str]]:
    """Prefix and signature of the part of each role, and what to tell about copies not taken."""
    evidence: Counter[tuple[str, str, str]] = Counter()
    for name in names:
        for row in SIGNATURES:
            match = row.pattern.search(name)
            if match is not None:
                evidence[row.role, row.layout, name[:match.start()]] += 1
                break
    chosen: list[tuple[str, Signature]] = []
    notes: list[str] = []
    for role in dict.fromkeys(row.role for row in SIGNATURES):
        found = [(key, count) for key, count in evidence.items() if key[0] == role and count >= MIN_EVIDENCE]
        if not found:
            continue
        most = max(count for _, count in found)
        (_, layout, prefix), _ = min(found, key=lambda item: _preference(item[0][2], item[1], most))
        notes += [f"another {ROLE_NAMES[role].split(' ', 1)[1]} under {other!r} is not used"
                  for (_, _, other), _ in found if other != prefix]
        chosen.append((prefix, next(row for row in SIGNATURES if (row.role, row.layout) == (role, layout))))
    return _without_companions(chosen, set(names)), notes


def _preference(prefix: str, count: int, most: int) -> tuple[bool, int, int]:
    """Whole copies before leftovers, then the better known prefix, then the fuller copy."""
    rank = KNOWN_PREFIXES.index(prefix) if prefix in KNOWN_PREFIXES else len(KNOWN_PREFIXES)
    return 2 * count < most, rank, -count


def _without_companions(places: list[tuple[str, Signature]], names: Collection[str]) -> list[tuple[str, Signature]]:
    """Vision and text towers share names: where both stand at one place, what is there decides.

    A whole CLIP model counts as its text tower, a whole SigLIP model, whose patches have a bias, as its vision tower;
    the other tower is harmless surplus. A vision tower saved without `vision_model.` has the layers of a text tower.
    """
    by_role = {row.role: prefix for prefix, row in places}
    if by_role.get("vision") is None or by_role.get("vision") != by_role.get("clip_l"):
        return places
    prefix = by_role["vision"]
    both = all(any(name.startswith(prefix + tower) for name in names) for tower in ("text_model.", "vision_model."))
    siglip = f"{prefix}vision_model.embeddings.patch_embedding.bias" in names
    drop = "vision" if both and not siglip else "clip_l"
    return [(where, row) for where, row in places if row.role != drop]


def _claims(names: Iterable[str], places: list[tuple[str, Signature]]) -> list[list[str]]:
    """The names of each place: those under the longest prefix that fits."""
    claims: list[list[str]] = [[] for _ in places]
    order = sorted(range(len(places)), key=lambda i: -len(places[i][0]))
    for name in names:
        for i in order:
            prefix, row = places[i]
            if name.startswith(prefix) and (prefix or name.split(".", 1)[0] in row.roots):
                claims[i].append(name)
                break
    return claims


def _described(part: Part, checkpoint: Mapping[str, TensorInfo], outside: Shapes) -> Part:
    """The part with its spec, variant and problems. `outside`: what no part of the file claims."""
    shapes = {name: checkpoint[found].shape for name, found in part.names.items()}
    foreign = family_of(shapes)
    if foreign is None and part.role == "transformer" and part.prefix == "":
        # without a prefix, markers of other families stand outside its roots
        foreign = family_of({**shapes, **outside})
    if foreign is not None:
        return replace(part, family=foreign, foreign=True, problems=(f"this is {foreign}",))
    family = ROLE_NAMES[part.role]
    quantised = unreadable({name: checkpoint[found] for name, found in part.names.items()},
                           getattr(checkpoint, "metadata", {}))
    if quantised is not None:
        return replace(part, family=family, problems=(quantised,))
    if part.role not in SPECS:
        return replace(part, family=family)
    sizes = read_spec(part.role, part.layout, shapes)
    if isinstance(sizes.spec, FluxSpec):
        family = f"{family} ({VARIANT_NAMES[sizes.spec.variant]})"
    return replace(part, family=family, spec=None if sizes.problems else sizes.spec, problems=sizes.problems,
                   notes=sizes.notes,
                   variant=sizes.spec.variant if isinstance(sizes.spec, FluxSpec) and not sizes.problems else None)


def _summary(parts: Mapping[str, Part], checkpoint: Mapping[str, TensorInfo], ignored: tuple[str, ...],
             unknown: tuple[str, ...], notes: tuple[str, ...]) -> Detection:
    beside = family_of({name: checkpoint[name].shape for name in unknown}) if unknown else None
    families = [part.family for part in parts.values()]
    if beside in families:
        beside = None  # markers of the part itself that stand outside its roots
    families += [beside] if beside else []
    problems = tuple(problem for part in parts.values() for problem in part.problems)
    if beside:
        problems += (f"it holds {beside}",)
    notes += tuple(note for part in parts.values() for note in part.notes)
    if len(families) > 1:
        role, family = "all-in-one", "an all-in-one checkpoint: " + ", ".join(families)
    elif families:
        known = [part.role for part in parts.values() if not part.foreign]
        role, family = known[0] if known else "unknown", families[0]
    else:
        role, family = "unknown", _unrecognised(checkpoint)
        problems += (f"this is {family}",)
    lead = parts.get("transformer") or next(iter(parts.values()), None)
    return Detection(role, lead.variant if lead else None, lead.layout if lead else None, family, parts, ignored,
                     unknown, problems, notes)


def _unrecognised(checkpoint: Mapping[str, TensorInfo]) -> str:
    if not checkpoint:
        return "a file without tensors"
    examples = ", ".join(show(name) for name in sorted(checkpoint)[:3])
    return f"not recognised ({len(checkpoint)} tensors such as {examples})"
