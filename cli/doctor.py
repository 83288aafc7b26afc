"""`flux-kit doctor`: what this installation has and lacks."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..engine.errors import FluxKitError
from . import report

if TYPE_CHECKING:
    from ..hosts.standalone.folders import Folders

OK, WARNING, PROBLEM = "ok", "warning", "problem"
PACKAGES = ("torch", "safetensors", "numpy", "pillow", "tokenizers", "scipy", "tqdm")
KINDS = ("diffusion_models", "text_encoders", "vae", "checkpoints")


@dataclass(frozen=True)
class Check:
    name: str
    status: str
    detail: str


def main(options: argparse.Namespace) -> int:
    """Print every check, or with `--plans` the table of plans; 1 if a check is a problem, else 0."""
    if options.plans:
        from .plans import markdown, rows
        table = rows()
        report.result({"ok": True, "plans": table}, markdown(table), as_json=options.json)
        return 0
    checks = [Check("python", OK, f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
              *map(_package, PACKAGES)]
    if all(check.status == OK for check in checks):  # what follows needs the packages
        checks += [_device(options.device), *_folders(options), _tiny_flux()]
    failed = [check for check in checks if check.status == PROBLEM]
    lines = [f"{check.status:8} {check.name}: {report.one_line(check.detail)}" for check in checks]
    report.result({"ok": not failed, "checks": [asdict(check) for check in checks]}, lines, as_json=options.json)
    for check in failed:
        report.note(f"flux-kit: {check.name}: {check.detail}")
    return 1 if failed else 0


def _package(distribution: str) -> Check:
    try:
        return Check(distribution, OK, importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        detail = f"not installed in {sys.executable}; {report.INSTALL}"
        return Check(distribution, PROBLEM, detail)


def _device(name: str) -> Check:
    import torch

    from ..hosts.standalone.host import choose_device, choose_dtype
    try:
        device = choose_device(name)
    except FluxKitError as error:
        return Check("device", PROBLEM, str(error))
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        about = f"{torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    else:
        about = f"{torch.get_num_threads()} threads" if device.type == "cpu" else "Apple GPU"
    return Check("device", OK, f"{device} ({about}), computes in {dtype}")


def _folders(options: argparse.Namespace) -> list[Check]:
    from .session import open_folders
    folders: Folders = open_folders(options.models)
    checks = []
    for kind in KINDS:
        names = folders.list_files(kind)
        roots = ", ".join(str(root) for root in folders.roots(kind))
        checks.append(Check(kind, OK if names else WARNING, f"{len(names)} files in {roots or 'no folder'}"))
    return checks


def _tiny_flux() -> Check:
    """Whether the built-in family is whole: each file opens and is what its place says."""
    from ..engine.weights import detect, open_checkpoint
    from .session import TINY_FLUX, TINY_MODELS
    for role, name in TINY_FLUX.items():
        path = TINY_MODELS / name
        try:
            with open_checkpoint(path) as checkpoint:
                found = detect(checkpoint)
        except (FluxKitError, OSError) as error:
            return Check("tiny-flux", PROBLEM, f"{error}; reinstall flux-kit")
        if found.role != role or found.problems:
            return Check("tiny-flux", PROBLEM, f"{path} is not what it should be ({role}); reinstall flux-kit")
    return Check("tiny-flux", OK, str(TINY_MODELS))
