"""What a command tells: lines for people, one JSON object for programs (shapes: see README, "For programs")."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from ..engine.errors import FluxKitError, Interrupted, MissingFile
from .parser import UsageError

REQUIRED_PACKAGES = ("torch", "safetensors", "numpy", "PIL", "tokenizers", "scipy", "tqdm")
INSTALL = 'install PyTorch for your machine (https://pytorch.org), then: pip install "flux-kit[standalone]"'


def wants_json(argv: Sequence[str] | None) -> bool:
    """Whether `--json` was asked for on a command line that could not be parsed."""
    return "--json" in (sys.argv[1:] if argv is None else argv)


def note(text: str) -> None:
    """One line for the person at the terminal, on stderr so that stdout stays for results."""
    sys.stderr.write(one_line(text) + "\n")


def result(values: dict[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """The outcome on stdout: `values` as one JSON object, or the lines."""
    if as_json:
        _print_object(values)
    else:
        sys.stdout.writelines(line + "\n" for line in lines)


def failure(error: FluxKitError | UsageError, *, as_json: bool) -> None:
    """One clear line on stderr; with `--json` also `{"ok": false, "error": {...}}` on stdout."""
    node = getattr(error, "node", None)
    file = getattr(error, "file", None)
    message = one_line(str(error))
    sys.stderr.write(f"flux-kit: {message}\n")
    if as_json:
        details = {"type": type(error).__name__, "message": message, "file": file, "node": node}
        _print_object({"ok": False, "error": details})


def _print_object(values: dict[str, Any]) -> None:
    """ASCII only: a terminal with a narrow encoding must not turn a result into a crash."""
    sys.stdout.write(json.dumps(values) + "\n")


def one_line(text: str) -> str:
    """Line breaks and control characters, which names in hostile files may hold, become spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def from_os_error(error: OSError) -> FluxKitError:
    """The system's own words with the path they are about."""
    reason = error.strerror or str(error)
    where = f"{error.filename}: " if error.filename else ""
    return FluxKitError(f"{where}{reason}", file=error.filename if isinstance(error.filename, str) else None)


def missing_package(error: ModuleNotFoundError) -> MissingFile:
    return MissingFile(f"the Python package {error.name} is not installed; {INSTALL}")


def interrupted() -> Interrupted:
    return Interrupted("interrupted; pictures finished before stay, nothing was written half")
