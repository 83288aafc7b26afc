"""Files that are complete when they appear: where they may be written, and how."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import BadInput, FluxKitError


def check_target(target: Path, suffixes: Sequence[str], what: str, force: bool) -> None:
    """BadInput unless `what` may be written to `target`; `force`: whether a file may be there already."""
    if not target.name.lower().endswith(tuple(suffixes)):
        raise BadInput(f"{target}: {what} must end in {' or '.join(suffixes)}", file=target)
    if target.is_dir():
        raise BadInput(f"{target}: this is a folder; name a file in it", file=target)
    if not target.parent.is_dir():
        raise BadInput(f"{target}: there is no folder {target.parent}; make it, or name another", file=target)
    if target.exists() and not force:
        raise BadInput(f"{target}: there is such a file already; remove it, name another, or allow to overwrite it "
                       "(overwrite, --force)", file=target)


def check_sources(target: Path, sources: Iterable[Path]) -> None:
    """BadInput if `target` is one of the files that are read."""
    if any(target.exists() and os.path.samefile(target, source) for source in sources):
        raise BadInput(f"{target}: source and destination are the same file; give another destination", file=target)


def check_space(target: Path, needed: int, smaller: str) -> None:
    """FluxKitError unless `needed` bytes fit on the disk; `smaller`: what would take less."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise FluxKitError(f"{target}: {needed / 1e9:.2f} GB are needed on this disk, {free / 1e9:.2f} GB are free; "
                           f"make room, choose {smaller}, or name a file on another disk", file=target)


@contextmanager
def complete_or_gone(target: Path, check: Callable[[], None]) -> Iterator[BinaryIO]:
    """A file beside `target` that takes its name once all is written to the disk, and is removed if it is not.

    `check`: looks at `target` once more before that, since a file may have come into being meanwhile.
    """
    partial = target.with_name(f".flux-kit-{secrets.token_hex(6)}.part")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
