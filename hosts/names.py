"""Names that workflows of strangers give to files: shown safely, and checked before they are paths."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..engine.errors import BadInput, FluxKitError, MissingFile

_DEVICE = re.compile(r"^(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³]) *(\..*)?$", re.IGNORECASE)
_TOKEN = re.compile(r"%[^%]+%")
OWN = Path(os.path.realpath(__file__)).parents[1] / "tiny_flux"


def shown(value: Any, limit: int = 100) -> str:
    """`value` on one line, short, with nothing unprintable in it: workflow text is not to be trusted."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"


def choose_name(kind: str, name: Any, known: Collection[str], places: str,
                others: Callable[[], Iterable[tuple[str, Collection[str]]]] = tuple) -> str:
    """Which of the `known` files of a kind a workflow means by `name`: the exact one, else the only one of that base
    name (slashes, case and subfolder may differ). MissingFile names the kind among the `others` (with their files)
    that has it, or near matches, or `places` to put the file into."""
    if not isinstance(name, str):  # in a workflow anything can stand where a name should
        raise BadInput(f"{kind}: {shown(name)} is no file name")
    slashed = name.replace("\\", "/")
    for spelling in (name, slashed):
        if spelling in known:
            return spelling
    wanted = slashed.rpartition("/")[2]
    same = sorted(other for other in known if _base(other) == wanted.casefold())
    if len(same) == 1:
        return same[0]
    if same:
        problem = f"under that name, and several files could be meant: {', '.join(same[:8])}. Choose one of them"
        raise MissingFile(f"{kind}: '{shown(name)}' is not there {problem}", file=shown(name))
    homes = [other for other, names in others() if any(_base(each) == wanted.casefold() for each in names)]
    if homes and wanted:
        raise MissingFile(f"{kind}: '{shown(name)}' lies in {' and in '.join(homes)}, where this slot does not look. "
                          f"Choose it in a slot of that kind, or if it belongs here move it into {places}",
                          file=shown(name))
    bases = {other.rpartition("/")[2]: other for other in known}
    near = [bases[base] for base in difflib.get_close_matches(wanted[:255], list(bases), n=3, cutoff=0.5)]
    hint = f"near: {', '.join(near)}" if near else f"{len(known)} files are there"
    raise MissingFile(f"{kind}: '{shown(name)}' is in none of the folders ({hint}). Put it into {places}",
                      file=shown(name))


def _base(name: str) -> str:
    return name.rpartition("/")[2].casefold()


def check_name(name: str) -> tuple[str, ...]:
    """The parts of a relative name that means a place below its folder on every system, Windows too; else BadInput."""
    slashed = name.replace("\\", "/")
    parts = PurePosixPath(slashed).parts
    problem = None
    if not name.strip() or not parts:
        problem = "is empty"
    elif any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) <= 0xDFFF for char in name):
        problem = "holds control characters or halves of characters"
    elif slashed.startswith("/") or ":" in name:
        problem = "is no name relative to the folder (leading slash or colon)"
    elif ".." in parts:
        problem = "leaves its folder (..)"
    elif any(_DEVICE.match(part.strip(" .")) for part in parts):
        problem = "holds the name of a device"
    elif any(part != part.rstrip(" .") for part in parts):
        problem = "has a part that ends in a space or dot"
    elif len(slashed.encode()) > 1024 or any(len(part.encode()) > 240 for part in parts):
        problem = "is too long"
    if problem is not None:
        raise BadInput(f"file name '{shown(name)}' {problem}")
    return parts


def of_user(roots: Sequence[Path]) -> list[Path]:
    """Without the folders of tiny-flux, which are no place to put files into."""
    return [root for root in roots if not Path(os.path.realpath(root)).is_relative_to(OWN)]


def places(roots: Sequence[Path]) -> str:
    """Where to put a file, for an error that says so."""
    return " or ".join(str(root) for root in of_user(roots)[:2]) or "a models folder given by --models"


def place_for(kind: str, name: str, roots: Sequence[Path]) -> Path:
    """The path of a new file `name` in the folder of `roots` that is called as its kind is, else in the first; never in
    tiny-flux's. BadInput for a name that leaves it, links followed, or where there is no folder."""
    parts = check_name(name)
    theirs = of_user(roots)
    if not theirs:
        raise BadInput(f"{kind}: there is no folder of this kind to put '{shown(name)}' into; make one in a models "
                       "folder, and name that (--models)")
    root = next((root for root in theirs if root.name == kind), theirs[0])
    path = root.joinpath(*parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise BadInput(f"file name '{shown(name)}' is a link that leaves {root}")
    return path


def check_prefix(prefix: str) -> None:
    """BadInput for a save prefix that cannot be, whatever its tokens (`%width%`, `%date:yyyy%`) stand for; so that a
    node can tell before the run. What the tokens became is checked again when the file is named."""
    check_name(_TOKEN.sub("x", prefix).rstrip("/\\") + "_")


def problems(check: Callable[..., Any], *arguments: Any) -> bool | str:
    """What a node's `validate_inputs` answers for a check that raises: True, or the reason. An argument that is None
    is linked: nothing can be said of it before the run."""
    try:
        if None not in arguments:
            check(*arguments)
    except FluxKitError as error:
        return error.message
    return True
