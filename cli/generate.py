"""`flux-kit generate`: a sentence to pictures, as a workflow of our nodes that the executor runs."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.adapters import Row
from ..engine.errors import BadInput, BadModelFile, FluxKitError, MissingFile
from ..engine.specs import DEFAULT_GUIDANCE, AutoencoderSpec, ClipTextSpec, FluxSpec, T5Spec
from ..engine.weights import Detection, detect, open_checkpoint
from ..hosts.loras import choose, control_loras
from ..hosts.names import of_user
from ..hosts.standalone.host import StandaloneHost
from ..hosts.standalone.validation import Prompt, label
from . import report, session
from .parser import SEED_MAX, UsageError

KIND_OF_ROLE = {"transformer": "diffusion_models", "t5": "text_encoders", "clip_l": "text_encoders", "vae": "vae"}
OPTION_OF_ROLE = {"transformer": "--model", "t5": "--t5", "clip_l": "--clip", "vae": "--vae"}
OTHERS = ("t5", "clip_l", "vae")
VARIANTS = ("dev", "schnell")
TINY_HIDDEN = 1024  # a transformer narrower than this is a miniature
SIDE, TINY_SIDE = 1024, 128
STEPS, SCHNELL_STEPS = 20, 4
STACK, APPLY = "8", "9"
"""Nodes of the workflow that there are where LoRAs are asked for."""


@dataclass(frozen=True)
class Parts:
    """The file of each part; None: it is in the transformer's file."""

    transformer: Path
    spec: FluxSpec
    others: dict[str, Path | None]


def main(options: argparse.Namespace) -> int:
    """Make the pictures, one run of the graph for each seed; models and prompt are kept between them."""
    started = time.monotonic()
    session.check_target("-o", numbered(options, 0))
    if options.seed + options.count - 1 > SEED_MAX:
        raise UsageError(f"--seed {options.seed} and --count {options.count} lead past {SEED_MAX} (2^64 - 1)")
    if options.negative is not None and options.cfg == 1:
        raise UsageError("--negative has no effect without --cfg above 1, for example --cfg 3")
    host = session.open_host(options, out=options.output.parent, save_to=lambda n: numbered(options, n))
    parts = find_parts(host, options)
    if options.guidance is not None and not parts.spec.guidance_embed:
        report.note(f"flux-kit: {parts.transformer.name} takes no guidance (schnell kind); --guidance has no effect")
    loras = [checked_lora(host, path, strength, parts.spec.in_channels) for path, strength in options.loras]
    nodes = session.node_classes()
    width, height = _size(options, parts.spec)
    session.check_memory(host, {"transformer": parts.transformer, **parts.others}, width, height,
                         [host.resolve_file("loras", name) for name, strength in loras if strength])
    executor = session.executor(host, nodes)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seed, options.seed + options.count):
        prompt = graph(host, options, parts, loras, width, height, seed)
        try:
            executor.run(prompt)
        except FluxKitError as error:
            name_option(error, prompt, options.loras)
            raise
    session.tell(host, options.seed, started, as_json=options.json)
    return 0


def checked_lora(host: StandaloneHost, given: Path, strength: float, in_channels: int) -> tuple[str, float]:
    """The name of a LoRA in the workflow, and its strength, once the file is known to be one that can be used here."""
    path = _found(host, "loras", "--lora", given)
    name = host.name_file("loras", path)
    try:
        chosen, _ = choose(lambda _: path, [Row(name, strength, strength)], strict=True)
    except FluxKitError as error:
        error.message = f"--lora {given}: {error.message}"
        raise
    if control_loras(chosen, in_channels):
        raise BadInput(f"--lora {given}: this is a control LoRA (FLUX.1 Depth or Canny), which follows a picture, and "
                       "generate takes none. Run a workflow with its conditioning: flux-kit run", file=path)
    return name, strength


def name_option(error: FluxKitError, prompt: Prompt, loras: Sequence[tuple[Path, float]]) -> None:
    """Tells an error of the node that applies LoRAs as one of the option behind it; any other stays as it is."""
    if error.node == APPLY:
        names = [str(path) for path, _ in loras]
        guilty = [name for name in names if Path(name).name == Path(error.file or "").name] or names
        said = error.message.removeprefix(f"{label(APPLY, prompt[APPLY])}: ")
        error.message, error.node = f"--lora {', '.join(guilty)}: {said}", None


def numbered(options: argparse.Namespace, index: int) -> Path:
    """`out.png`; with `--count` above 1 `out_00001.png`, `out_00002.png` ..."""
    path: Path = options.output
    return path if options.count == 1 else path.with_name(f"{path.stem}_{index + 1:05}{path.suffix}")


def _size(options: argparse.Namespace, spec: FluxSpec) -> tuple[int, int]:
    from ..nodes.sizes import CUSTOM, picture_size  # nodes can be imported once there is a host
    side = TINY_SIDE if spec.hidden_size < TINY_HIDDEN else SIDE
    return picture_size(CUSTOM, 1.0, options.width or side, options.height or side)


def graph(host: StandaloneHost, options: argparse.Namespace, parts: Parts, loras: Sequence[tuple[str, float]],
          width: int, height: int, seed: int) -> Prompt:
    """The workflow of one picture, in API format. `loras`: names and strengths."""
    from ..nodes.api import FROM_MODEL
    from ..nodes.sampling import KEEP_STEPS
    from ..nodes.sizes import CUSTOM
    names = {role: FROM_MODEL if path is None else host.name_file(KIND_OF_ROLE[role], path)
             for role, path in parts.others.items()}
    guidance = DEFAULT_GUIDANCE if options.guidance is None else options.guidance
    steps = options.steps or (STEPS if parts.spec.guidance_embed else SCHNELL_STEPS)

    def text(prompt: str) -> dict[str, Any]:
        return {"clip": ["1", 1], "prompt": prompt, "t5_prompt": "", "guidance": guidance, "t5_length": "auto"}

    prompt: Prompt = {
        "1": {"class_type": "FluxKitLoadFlux", "inputs": {
            "model": host.name_file(KIND_OF_ROLE["transformer"], parts.transformer), **names}},
        "2": {"class_type": "FluxKitEncodePrompt", "inputs": text(options.prompt), "_meta": {"title": "Prompt"}},
        "3": {"class_type": "FluxKitEmptyLatent", "inputs": {
            "aspect": CUSTOM, "megapixels": 1.0, "width": width, "height": height, "batch_size": 1}},
        "4": {"class_type": "FluxKitSampler", "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "latent": ["3", 0], "seed": seed, "steps": steps,
            "cfg": options.cfg, "solver": "euler", "schedule": "bfl", "denoise": 1.0, "denoise_meaning": KEEP_STEPS,
            "cfg_start": 0.0, "cfg_end": 1.0}},
        "5": {"class_type": "FluxKitDecode", "inputs": {"latent": ["4", 0], "vae": ["1", 2]}},
        "6": {"class_type": "FluxKitSave", "inputs": {"images": ["5", 0], "filename_prefix": options.output.stem}},
    }
    if options.cfg != 1:
        prompt["7"] = {"class_type": "FluxKitEncodePrompt", "inputs": text(options.negative or ""),
                       "_meta": {"title": "Negative prompt"}}
        prompt["4"]["inputs"]["negative"] = ["7", 0]
    return with_loras(prompt, loras) if loras else prompt


def with_loras(prompt: Prompt, loras: Sequence[tuple[str, float]]) -> Prompt:
    """The workflow with a stack of LoRAs between the loader and what uses its model and text encoders."""
    rows = [{"lora": name, "model": strength, "clip": strength} for name, strength in loras]
    for node in prompt.values():
        links = node["inputs"]
        links.update({name: [APPLY, value[1]] for name, value in links.items() if value in (["1", 0], ["1", 1])})
    return {**prompt, STACK: {"class_type": "FluxKitLoraStack", "inputs": {"rows": json.dumps(rows)}},
            APPLY: {"class_type": "FluxKitLoraApply", "inputs": {
                "model": ["1", 0], "loras": [STACK, 1], "clip": ["1", 1], "mode": "auto", "on_problem": "strict"}}}


def find_parts(host: StandaloneHost, options: argparse.Namespace) -> Parts:
    """The files to run with: those named, what the transformer's file holds itself, else found by role."""
    model = _named(host, "transformer", options.model) if options.model else tiny("transformer")
    found = _described(model)
    part = found.parts.get("transformer")
    if part is None or not isinstance(part.spec, FluxSpec):
        raise BadModelFile(model, "no FLUX.1 transformer is in it", found=found.family or found.role,
                           advice="Give a transformer or an all-in-one file as --model")
    if part.variant not in VARIANTS:
        raise BadModelFile(model, f"this is {part.family}, which needs a picture beside the prompt",
                           expected=" or ".join(VARIANTS), found=part.variant, advice="Give a dev or schnell model")
    given = {"t5": options.t5, "clip_l": options.clip, "vae": options.vae}
    others: dict[str, Path | None] = {}
    for role in OTHERS:
        if given[role] is not None:
            others[role] = _named(host, role, given[role])
        else:
            others[role] = None if role in found.parts else find_part(host, role, part.spec, model)
    return Parts(model, part.spec, others)


def tiny(role: str) -> Path:
    """The file of the built-in tiny-flux."""
    path = session.TINY_MODELS / session.TINY_FLUX[role]
    if not path.is_file():
        raise MissingFile(f"the built-in tiny-flux lacks {path.name} (expected {path}); reinstall flux-kit, or name "
                          "your own files with --model, --t5, --clip and --vae", file=path)
    return path


def _named(host: StandaloneHost, role: str, path: Path) -> Path:
    """A path of the user, else a name in the model folders."""
    if role == "transformer" and not path.exists() and str(path) in host.list_files("checkpoints"):
        return host.resolve_file("checkpoints", str(path))
    return _found(host, KIND_OF_ROLE[role], OPTION_OF_ROLE[role], path)


def _found(host: StandaloneHost, kind: str, option: str, path: Path) -> Path:
    if path.exists():
        return path
    try:
        return host.resolve_file(kind, str(path))
    except MissingFile as error:
        raise MissingFile(f"{option} {path}: there is no such file; {error}", file=path) from None


def _described(path: Path) -> Detection:
    with open_checkpoint(path) as checkpoint:
        return detect(checkpoint)


def find_part(host: StandaloneHost, role: str, spec: FluxSpec, model: Path) -> Path:
    """The one file of this role that fits the transformer. tiny-flux's own parts go with tiny-flux, and with any other
    miniature that has none. MissingFile lists several, or says what is missing."""
    if model.resolve().is_relative_to(session.TINY_MODELS.resolve()):
        return tiny(role)
    kind = KIND_OF_ROLE[role]
    tiny_root = session.TINY_MODELS.resolve()
    fitting = []
    for name in host.list_files(kind):
        path = host.resolve_file(kind, name)
        if not path.resolve().is_relative_to(tiny_root) and _fits(path, role, spec):
            fitting.append((name, path))
    if not fitting and spec.hidden_size < TINY_HIDDEN and _fits(tiny(role), role, spec):
        fitting = [(session.TINY_FLUX[role], tiny(role))]
    option = OPTION_OF_ROLE[role]
    if len(fitting) > 1:
        names = ", ".join(name for name, _ in fitting)
        raise MissingFile(f"several files could be the {role}: {names}; choose one with {option}")
    if not fitting:
        roots = ", ".join(str(root) for root in of_user(host.folders.roots(kind))) or "no model folder"
        raise MissingFile(f"no file fits as {role} of {model.name} (looked in {roots}); name one with {option}, or "
                          "give the model folder with --models")
    report.note(f"flux-kit: {role}: took {fitting[0][1]}")
    return fitting[0][1]


def _fits(path: Path, role: str, spec: FluxSpec) -> bool:
    """Whether a file holds this role in the transformer's widths. A file that cannot be read is no candidate."""
    try:
        part = _described(path).parts.get(role)
    except FluxKitError:
        return False
    if part is None or part.problems:
        return False
    sizes = part.spec
    return ((isinstance(sizes, T5Spec) and sizes.d_model == spec.context_in_dim)
            or (isinstance(sizes, ClipTextSpec) and sizes.hidden_size == spec.vec_in_dim)
            or (isinstance(sizes, AutoencoderSpec) and sizes.z_channels * 4 == spec.out_channels))
