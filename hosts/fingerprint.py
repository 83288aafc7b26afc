"""Whether a file is still what it was: device, inode, size and time of change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..engine.errors import FileChanged
from ..engine.weights.containers import INDEX_SUFFIX, MODEL_SUFFIXES, identity

Identity = tuple[int, int, int, int]


def fingerprint(path: Path) -> list[tuple[str, Identity]]:
    """Changes when the file does, or one of the shards beside an index, or a file of a folder. OSError: it is gone."""
    whole = path.is_dir() or path.name.lower().endswith(INDEX_SUFFIX)
    folder = path if path.is_dir() else path.parent
    files = [path, *sorted(file for file in folder.iterdir() if file.name.lower().endswith(MODEL_SUFFIXES))] \
        if whole else [path]
    return [(str(file), identity(file.stat())) for file in files]


class Watch:
    """Files as they were when they were opened."""

    def __init__(self, files: Mapping[Path, Identity] | Iterable[tuple[Path, Identity]]) -> None:
        self.files = dict(files)

    def change(self) -> tuple[Path, str] | None:
        """The first file that is not what it was, and what happened to it."""
        for path, before in self.files.items():
            try:
                now = identity(path.stat())
            except OSError:
                return path, "was removed"
            if now[:2] != before[:2]:
                return path, "was replaced"
            if now[2] < before[2]:
                return path, "was cut off"
            if now != before:
                return path, "was changed"
        return None

    def check(self) -> None:
        """Raises FileChanged, naming the file."""
        found = self.change()
        if found is not None:
            raise FileChanged(*found)
