"""What the checks of tests/hosts/comfyui/inside.py find in a process of a ComfyUI."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from comfy_server import Host, environment

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "hosts" / "comfyui" / "inside.py"
TIMEOUT = 900
Inside = Callable[[str], dict[str, Any]]
"""Gives what one check found, and fails with its traceback if it could not be carried out."""


@cache
def _findings(host: Host, checks: tuple[str, ...], variables: frozenset[tuple[str, str]]) -> dict[str, Any]:
    done = subprocess.run([host.python, str(SCRIPT), str(host.path), str(ROOT), *checks], text=True,
                          env={**environment(), **dict(variables)}, capture_output=True, timeout=TIMEOUT, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def inside_of(host: Host, *checks: str, **variables: str) -> Inside:
    """The findings of these checks, or of all, in one process of `host`, run when it is first asked for them.
    `variables` go into its environment."""
    def get(check: str) -> dict[str, Any]:
        found: dict[str, Any] = copy.deepcopy(_findings(host, checks, frozenset(variables.items()))[check])
        assert "error" not in found, found["error"]
        return found

    return get
