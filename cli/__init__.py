"""`flux-kit`: the command line. `main` is the console script; nothing heavy is imported before a command needs it."""

from __future__ import annotations

import importlib
import io
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ..engine.errors import FluxKitError
from . import report
from .parser import UsageError, build_parser

DONE, FAILED, WRONG_USAGE = 0, 1, 2
COMMANDS = {"run": ".run", "generate": ".generate", "inspect": ".inspect", "quantize": ".quantize",
            "lora": ".lora", "doctor": ".doctor"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 wrong usage).

    What the user can cause ends as one line on stderr, and with `--json` as one object on stdout; anything else is a
    defect of ours and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path that a narrow console cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    try:
        options = parser.parse_args(argv)
    except UsageError as error:
        report.failure(error, as_json=report.wants_json(argv))
        return WRONG_USAGE
    before = _stop_on_request()
    try:
        command = importlib.import_module(COMMANDS[options.command], __package__)
        code: int = command.main(options)
        return code
    except UsageError as error:
        report.failure(error, as_json=options.json)
        return WRONG_USAGE
    except FluxKitError as error:
        report.failure(error, as_json=options.json)
    except OSError as error:  # a full disk, a folder without permission: the user's machine, not a defect
        report.failure(report.from_os_error(error), as_json=options.json)
    except ModuleNotFoundError as error:
        if error.name not in report.REQUIRED_PACKAGES:
            raise
        report.failure(report.missing_package(error), as_json=options.json)
    except KeyboardInterrupt:
        report.failure(report.interrupted(), as_json=options.json)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return FAILED


def _stop_on_request() -> Any:
    """Let SIGTERM end a command as Ctrl-C does, in order, and return its handler before; None where a program that
    calls `main` from one of its threads keeps its signals to itself."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)
