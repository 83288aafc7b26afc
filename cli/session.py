"""What `run` and `generate` share: the host from the options, the nodes, the executor, the outcome."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from .. import hosts
from ..engine.errors import FluxKitError, MissingFile
from ..hosts import Progress
from ..hosts.estimate import estimate_files
from ..hosts.standalone.executor import Executor
from ..hosts.standalone.folders import Folders
from ..hosts.standalone.host import StandaloneHost
from ..hosts.standalone.io import ComfyNode
from ..hosts.standalone.png import replace_file
from ..hosts.standalone.validation import Nodes
from . import report
from .parser import UsageError

TINY_MODELS = Path(__file__).parent.parent / "tiny_flux" / "models"
TINY_FLUX = {"transformer": "diffusion_models/tiny-flux-dev.safetensors", "t5": "text_encoders/tiny-t5.safetensors",
             "clip_l": "text_encoders/tiny-clip_l.safetensors", "vae": "vae/tiny-ae.safetensors"}

SHORTEST_TEXT = 256  # tokens that a prompt is padded to


class _Lines(logging.Handler):
    """Warnings of the engine and the host as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        report.note(f"flux-kit: {record.getMessage()}")


def open_folders(models: Sequence[Path], *, inputs: Sequence[Path] = (), out: Path = Path("output")) -> Folders:
    """The model folders, tiny-flux's last. Without `models` the current folder counts, if it holds any of theirs."""
    for folder in (*models, *inputs):
        if not folder.is_dir():
            raise MissingFile(f"{folder}: there is no such folder", file=folder)
    return Folders(models=[*(models or [Path.cwd()]), TINY_MODELS], input=inputs or [Path("input")], output=out,
                   temp=out)


def open_host(options: argparse.Namespace, *, out: Path, inputs: Sequence[Path] = (),
              save_to: Callable[[int], Path] | None = None) -> StandaloneHost:
    """The standalone host of these options, made the current one."""
    _show_warnings()
    check_writable(out)
    if options.preview is not None:
        check_target("--preview", options.preview)
    folders = open_folders(options.models, inputs=inputs, out=out)
    host = StandaloneHost(folders, device=options.device, dtype=options.dtype, memory=options.memory,
                          progress_bar=partial(progress_bar, preview_file=options.preview), save_to=save_to,
                          previews=options.preview is not None, tell=tell_memory)
    hosts.use(host)
    return host


def check_memory(host: StandaloneHost, files: Mapping[str, Path | None], width: int, height: int,
                 loras: Sequence[Path] = ()) -> None:
    """NotEnoughMemory, from headers alone and before anything is loaded, if these parts cannot make such a picture.
    None stands for the transformer's file; of the prompt the least counts."""
    whole = files["transformer"]
    named = [(role, path or whole) for role, path in files.items()]
    found = estimate_files([(role, path) for role, path in named if path is not None], width=width, height=height,
                           text_tokens=SHORTEST_TEXT, dtype=host.dtype, loras=loras)
    found.plan(host.residence.device.free() if host.residence.moves else None, None, host.memory)


def tell_memory(line: str) -> None:
    """What streams or works in strips, for the person at the terminal; what simply fits is not worth a line."""
    if "stream" in line or "strips" in line:
        report.note(f"flux-kit: {line}")


def _show_warnings() -> None:
    logger = logging.getLogger(__package__.split(".")[0] if __package__ else "")
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines(logging.WARNING))
        logger.propagate = False


def check_writable(folder: Path) -> None:
    """FluxKitError, before a long run and not after it, if nothing could be saved in `folder`."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise FluxKitError(f"{there} is a file, so nothing can be saved in {folder}", file=there)
    if not os.access(there, os.W_OK | os.X_OK):
        raise FluxKitError(f"{there}: no permission to save anything there", file=there)


def node_classes() -> Nodes:
    """Every node of the standalone host by its id. Call after `open_host`: the classes are built from the host's io."""
    from ..hosts.standalone.core_nodes import CORE_NODES
    from ..nodes import NODES
    classes: list[type[ComfyNode]] = [*NODES, *CORE_NODES]
    return {node.GET_SCHEMA().node_id: node for node in classes}


def executor(host: StandaloneHost, nodes: Nodes) -> Executor:
    return Executor(nodes, check_interrupt=host.check_interrupt, guard=host.guard)


def check_target(option: str, file: Path) -> None:
    """UsageError or FluxKitError, before a long run, if no picture can be written to the file of this option."""
    if file.suffix.lower() != ".png":
        raise UsageError(f"{option} {file}: the file must end in .png")
    if file.is_dir():
        raise FluxKitError(f"{option} {file}: this is a folder; name a file in it", file=file)
    check_writable(file.parent)


def progress_bar(total: int, preview_file: Path | None = None) -> Progress:
    """A bar of sampling steps on stderr, silent where stderr is no terminal, and the preview of each step."""
    bar = tqdm(total=total, desc="steps", leave=False, disable=None, file=sys.stderr)

    def report_step(value: int, preview: Any = None) -> None:
        bar.update(value - bar.n)
        if preview is not None and preview_file is not None:
            data = io.BytesIO()
            preview.resize((preview.width * 4, preview.height * 4)).save(data, "PNG")
            replace_file(preview_file, data.getvalue())  # a viewer never sees half a picture
        if value >= total:
            bar.close()

    return report_step


def tell(host: StandaloneHost, seed: int | None, started: float, *, as_json: bool) -> None:
    """The outcome on stdout: the pictures' paths, or the JSON object."""
    images = [str(path) for path in host.saved]
    seconds = round(time.monotonic() - started, 3)
    report.result({"ok": True, "images": images, "seed": seed, "seconds": seconds}, images, as_json=as_json)
