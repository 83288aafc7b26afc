"""What nodes are made of: the io namespace of the host in use, chosen before this module is imported (`hosts.use`).

Nodes are ComfyUI V3 nodes. `Schema` drops keywords that an older host does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..engine.errors import BadInput, MissingFile
from ..hosts import Host, current
from ..hosts.fingerprint import fingerprint
from ..hosts.names import problems, shown

if TYPE_CHECKING:
    from ..hosts.standalone import io as _io
else:
    _io = current().io

ComfyNode = _io.ComfyNode
NodeOutput = _io.NodeOutput
Hidden = _io.Hidden
Boolean = _io.Boolean
Clip = _io.Clip
ClipVision = _io.ClipVision
Combo = _io.Combo
Conditioning = _io.Conditioning
Custom = _io.Custom
Float = _io.Float
Image = _io.Image
Int = _io.Int
Latent = _io.Latent
Mask = _io.Mask
Model = _io.Model
String = _io.String
StyleModel = _io.StyleModel
Vae = _io.Vae

_SCHEMA_KEYWORDS = frozenset(inspect.signature(_io.Schema).parameters)
ALL_IN_ONE = "checkpoints"
FROM_MODEL = "from the model file"
REPORT_TIP = "What was found, changed or ignored."
NO_FILES = {FROM_MODEL}  # choices of file widgets that name no file


def host() -> Host:
    """The host in use."""
    return current()


def Schema(**keywords: Any) -> Any:  # noqa: N802 - stands in for the host's class
    """The host's Schema of the keywords that it knows."""
    return _io.Schema(**{name: value for name, value in keywords.items() if name in _SCHEMA_KEYWORDS})


def report_output() -> Any:
    """The last output of nodes that change what they are given."""
    return String.Output("report", display_name="report", tooltip=REPORT_TIP)


def told(notes: Iterable[str]) -> str:
    """Notes as the report, shown with the node too."""
    report = "\n".join(notes)
    if report:
        host().show(report)
    return report


def files(kind: str, *before: str) -> list[str]:
    """Options of a file widget: `before`, the files of a kind, then all-in-one files, which hold every kind."""
    return list(dict.fromkeys([*before, *host().list_files(kind), *host().list_files(ALL_IN_ONE)]))


def file_of(kind: str, name: str) -> Path:
    """The file a widget made by `files` means. MissingFile names near matches."""
    where = current()
    for of_kind in (kind, ALL_IN_ONE):
        if name in where.list_files(of_kind):
            return where.resolve_file(of_kind, name)
    try:
        return where.resolve_file(kind, name)
    except MissingFile as error:
        try:
            return where.resolve_file(ALL_IN_ONE, name)
        except MissingFile:
            raise error from None


def choice(name: str, value: Any, options: Iterable[str]) -> str:
    """The value of a widget with these options, which older hosts do not check. BadInput for any other."""
    known = list(options)
    if value not in known:
        raise BadInput(f"{name} '{shown(value)}' is not one of {', '.join(known)}")
    chosen: str = value
    return chosen


class FileNode(ComfyNode):
    """A node with file widgets: `KINDS` maps each to its kind. It runs anew when a file has changed on disk."""

    KINDS: ClassVar[dict[str, str]] = {}

    @classmethod
    def fingerprint_inputs(cls, **widgets: Any) -> list[Any]:
        """What tells each file from another or a later one; a linked widget is None, another text than a file's is
        no file."""
        named = [(cls.KINDS[key], value) for key, value in widgets.items() if key in cls.KINDS and value is not None]
        return [fingerprint(file_of(kind, value)) for kind, value in named if value not in NO_FILES]


def check_files(**kinds_and_names: tuple[str, str | None]) -> bool | str:
    """Answer of `validate_inputs` for file widgets given as `widget=(kind, value)`. A linked widget's value is None."""
    for kind, name in kinds_and_names.values():
        answer = problems(file_of, kind, name)
        if answer is not True:
            return answer
    return True


def metadata(hidden: Any) -> dict[str, Any]:
    """What a saved picture carries, `{"prompt": ..., "workflow": ...}`, from `cls.hidden`."""
    known = {} if hidden.prompt is None else {"prompt": hidden.prompt}
    return {**known, **(hidden.extra_pnginfo or {})}
