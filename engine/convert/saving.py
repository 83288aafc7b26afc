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
from ..weights.header import size_text


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
        raise FluxKitError(f"{target}: {size_text(needed)} are needed on this disk, {size_text(free)} are free; "
                           f"make room, choose {smaller}, or name a file on another disk", file=target)


@contextmanager
def complete_or_gone(target: Path, check: Callable[[], None]) -> Iterator[BinaryIO]:
    """A file beside `target` that takes its name once all is written to the disk, and is removed if it is not.

    `check`: looks at `target` once more before that, since a file may have come into being meanwhile. FluxKitError for
    what the system refuses.
    """
    partial = target.with_name(f".flux-kit-{secrets.token_hex(6)}.part")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(partial, target)
    except OSError as error:
        if isinstance(error, FluxKitError):
            raise
        raise FluxKitError(f"{target}: it could not be written ({error.strerror or error}), and nothing of it is left. "
                           "Make sure that the disk has room, that the folder may be written to, and that no program "
                           "uses a file of this name", file=target) from error
    finally:
        partial.unlink(missing_ok=True)
