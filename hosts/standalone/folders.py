"""Where files are: ComfyUI's model folders, pictures that go in, pictures that come out.

Names come from workflows of strangers: a model's name is only ever compared with a listing, and a picture's name is
checked before it becomes a path.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...engine.errors import BadInput, MissingFile
from .. import depth
from ..names import check_name, choose_name, places, shown
from .extra_paths import read_extra_paths

log = logging.getLogger(__name__)

KINDS: dict[str, tuple[str, ...]] = {  # kind -> its folders under a models folder; the second is the older name
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "loras": ("loras",),
    "clip_vision": ("clip_vision",),
    "style_models": ("style_models",),
    "checkpoints": ("checkpoints",),
    depth.KIND: (depth.KIND,),
}
OLD_KINDS = {"unet": "diffusion_models", "clip": "text_encoders"}
LISTED = (".safetensors", ".sft", ".gguf", ".safetensors.index.json")
FOUND = (*LISTED, ".ckpt", ".pt", ".pth", ".bin")  # not offered, but the loader's refusal tells more than "not found"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
YAML = "extra_model_paths.yaml"
MAX_FILES = 100_000


@dataclass
class Folders:
    """`models`: folders laid out like ComfyUI's models folder, or ComfyUI folders (with their extra_model_paths.yaml).
    `input`: folders of pictures. `output`, `temp`: where pictures go. `extra`: more extra_model_paths.yaml files."""

    models: Sequence[Path] = ()
    input: Sequence[Path] = ()
    output: Path = Path("output")
    temp: Path | None = None
    extra: Sequence[Path] = ()
    _roots: dict[str, list[Path]] = field(init=False, repr=False)
    _listings: dict[str, tuple[dict[Path, int], dict[str, Path]]] = field(init=False, repr=False, default_factory=dict)
    _told: set[tuple[str, str]] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        roots: dict[str, list[Path]] = {kind: [] for kind in KINDS}
        files = list(self.extra)
        for base in map(Path, self.models):
            direct = any((base / name).is_dir() for names in KINDS.values() for name in names)
            home = base / "models" if not direct and (base / "models").is_dir() else base
            for kind, names in KINDS.items():
                roots[kind] += [home / name for name in names]
            files += [base / YAML] if (base / YAML).is_file() else []
        for file in files:
            for name, path, first in read_extra_paths(Path(file)):
                known = roots.setdefault(OLD_KINDS.get(name, name), [])
                known.insert(0, path) if first else known.append(path)
        self._roots = {kind: list(dict.fromkeys(paths)) for kind, paths in roots.items()}

    def roots(self, kind: str) -> list[Path]:
        """The folders of a kind that are there, those that win first."""
        paths = list(self.input) if kind == "input" else self._roots.get(OLD_KINDS.get(kind, kind))
        if paths is None:
            raise BadInput(f"unknown kind of file {shown(kind)}: known are input, {', '.join(self._roots)}")
        return [path for path in paths if path.is_dir()]

    def list_files(self, kind: str) -> list[str]:
        """Names relative to the folders of a kind, with forward slashes, sorted; of pictures the top level only."""
        if kind == "input":
            found = (entry for root in self.roots(kind) for entry in os.scandir(root))
            return sorted({entry.name for entry in found if entry.name.lower().endswith(PICTURES) and entry.is_file()})
        if kind == depth.KIND:
            return sorted(self._listing(kind))
        return sorted(name for name in self._listing(kind) if name.lower().endswith(LISTED))

    def resolve_file(self, kind: str, name: str) -> Path:
        """The file that a workflow means. Models: exact, else the only file of that base name (slashes, case and
        subfolder may differ; what was taken is logged). Pictures: exact. MissingFile names near matches."""
        if kind == "input" and isinstance(name, str):
            return self._picture(name)
        listing = self._listing(kind)
        taken = choose_name(kind, name, listing, places(self._roots.get(OLD_KINDS.get(kind, kind), [])),
                            lambda: ((other, self._listing(other)) for other in KINDS))
        if taken not in (name, name.replace("\\", "/")) and (kind, name) not in self._told:
            self._told.add((kind, name))  # names are resolved many times a run
            log.warning("%s: '%s' is not there under that name; took '%s'", kind, shown(name), taken)
        return listing[taken]

    def _listing(self, kind: str) -> dict[str, Path]:
        """Name -> path of all model files of a kind, kept until a folder changes: schemas ask many times a run."""
        kind = OLD_KINDS.get(kind, kind)
        roots = self.roots(kind)
        if kind == depth.KIND:
            return depth.folders(roots)
        seen, listing = self._listings.get(kind, ({}, {}))
        if not (set(roots) <= seen.keys()) or any(_stamp(folder) != stamp for folder, stamp in seen.items()):
            seen, listing = {}, {}
            for root in roots:
                for name, path in _walk(root, seen):
                    listing.setdefault(name, path)
            self._listings[kind] = seen, listing
        return listing

    def _picture(self, name: str) -> Path:
        """A picture of the input folders; `name [output]` and `name [temp]` mean those folders, as in ComfyUI."""
        match = re.fullmatch(r"(.*?)(?: \[(input|output|temp)\])?", name, re.DOTALL)
        plain, place = (name, "input") if match is None else (match.group(1), match.group(2) or "input")
        roots = {"input": self.roots("input"), "output": [self.output], "temp": [self.temp] if self.temp else []}[place]
        for root in roots:
            path = inside(root, plain)
            if path.is_file():
                return path
        check_name(plain)  # a bad name is told as such although there is no folder
        near = difflib.get_close_matches(plain[:255], self.list_files("input"), n=3, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        where = ", ".join(map(str, roots)) or f"any folder: no {place} folder is there (give one with --input)"
        raise MissingFile(f"picture '{shown(name)}' is not in {where}{hint}", file=shown(name))


def inside(root: Path, name: str) -> Path:
    """`root / name` if that stays inside `root`, links followed; else BadInput."""
    path = root.joinpath(*check_name(name))
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise BadInput(f"file name '{shown(name)}' is a link that leaves {root}")
    return path


def _walk(root: Path, seen: dict[Path, int]) -> Iterator[tuple[str, Path]]:
    """Model files under `root`; `seen` collects folders and when they changed. Links are followed: users keep models on
    other disks, and nothing in a workflow can make a link. Each real folder is entered once, so loops end."""
    entered: set[str] = set()
    count = 0
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        seen[Path(folder)] = _stamp(Path(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in sorted(files):
            count += 1
            if count > MAX_FILES:
                log.warning("%s holds more than %d files; the rest is not looked at", root, MAX_FILES)
                return
            if file.lower().endswith(FOUND):
                path = Path(folder, file)
                yield path.relative_to(root).as_posix(), path


def _stamp(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1
