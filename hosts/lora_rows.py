"""What hosts and nodes tell of LoRA files: trigger words and pictures, which stand beside a file or in its header, and
the rows of a stack as any workflow writes them. No weights are read."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.adapters import inspect_lora
from ..engine.adapters.report import header_facts
from ..engine.adapters.stack import FluxLoras, LoraStack, parse_rows, rows_of, stack_of
from ..engine.errors import BadInput, FluxKitError
from ..engine.weights import open_checkpoint
from ..engine.weights.header import size_text
from . import current
from .names import shown

KIND = "loras"
MAX_SIDECAR, MAX_PICTURE = 8_000_000, 24_000_000  # bytes
WORDS = 40  # of one file, at most

SIDECARS = (
    (".civitai.info", ("trainedWords",)),            # Civitai Helper
    (".metadata.json", ("civitai", "trainedWords")),  # Lora Manager
    (".rgthree-info.json", ("trainedWords",)),       # rgthree
    (".json", ("activation text",)),                 # A1111
)
"""Files beside a LoRA, by what follows its name, and where in them the trigger words stand."""
PICTURES = (".preview.png", ".preview.jpg", ".preview.jpeg", ".preview.webp", ".png", ".jpg", ".jpeg", ".webp")
MAGIC = {"image/png": re.compile(rb"\x89PNG\r\n\x1a\n"), "image/jpeg": re.compile(rb"\xff\xd8\xff"),
         "image/webp": re.compile(rb"RIFF....WEBP", re.DOTALL)}
THUMBNAIL = "modelspec.thumbnail"  # a data URL in the header (sai_model_spec)
_CORE_ROW = re.compile(r"loras\.(\d{1,4})\.(lora_name|strength|enabled)")
_CORE_NAMES = {"lora_name": "lora", "strength": "model", "enabled": "on"}


@dataclass(frozen=True)
class Facts:
    """`lines` for people, `problems` for which the file would be refused, `words` to trigger it."""

    lines: list[str]
    problems: list[str]
    words: list[str]
    picture: bool


def facts(path: Path) -> Facts:
    """What the header of a LoRA file and the files beside it tell. A file that cannot be read is a problem."""
    words = words_beside(path)
    try:
        with open_checkpoint(path) as checkpoint:
            report, has_thumbnail = inspect_lora(checkpoint), THUMBNAIL in checkpoint.metadata
    except FluxKitError as error:
        return Facts([], [error.message], words, bool(pictures_beside(path)))
    size = size_text(path.stat().st_size)
    lines = [line for line in report.lines() if not line.startswith(("problem: ", "trigger words: "))]
    titles = [f"{name.rpartition('.')[2]}: {report.header[name]}"[:300]
              for name in ("modelspec.title", "modelspec.author", "modelspec.usage_hint") if name in report.header]
    return Facts([size, *lines, *titles], list(report.problems), words or unique(report.triggers),
                 bool(pictures_beside(path)) or has_thumbnail)


def trigger_words(path: Path) -> list[str]:
    """Trigger words of a file: those beside it, else those of its header. A file that cannot be read has none."""
    beside = words_beside(path)
    if beside:
        return beside
    try:
        with open_checkpoint(path) as checkpoint:
            return unique(header_facts(checkpoint.metadata)[1])
    except FluxKitError:
        return []  # whoever applies it tells why


def words_beside(path: Path) -> list[str]:
    """Trigger words of the first file beside a LoRA that names some."""
    for ending, keys in SIDECARS:
        for beside in (path.with_suffix(ending), path.with_name(path.name + ending)):
            found: Any = _json_of(beside)
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            words = unique(item.get("word") if isinstance(item, dict) else item
                           for item in (found if isinstance(found, list) else [found]))
            if words:
                return words
    return []


def unique(words: Iterable[Any]) -> list[str]:
    """Texts as they are but for commas and spaces at their ends, each once."""
    texts = (word.strip(" ,\t\r\n") for word in words if isinstance(word, str))
    return list(dict.fromkeys(shown(text, 300) for text in texts if text))[:WORDS]


def _json_of(path: Path) -> Any:
    try:
        if not path.is_file() or path.stat().st_size > MAX_SIDECAR:
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # other tools' files: what cannot be read tells nothing
        return None


def pictures_beside(path: Path) -> list[Path]:
    return [beside for ending in PICTURES if (beside := path.with_suffix(ending)).is_file()]


def picture(path: Path) -> tuple[str, bytes] | None:
    """(MIME type, bytes) of a LoRA's picture, beside it or in its header; what is no PNG, JPEG or WebP is none."""
    for beside in pictures_beside(path):
        if beside.stat().st_size <= MAX_PICTURE and (found := _picture(beside.read_bytes())) is not None:
            return found
    try:
        with open_checkpoint(path) as checkpoint:
            address = checkpoint.metadata.get(THUMBNAIL, "")
    except FluxKitError:
        return None
    head, _, data = address.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or len(data) > MAX_PICTURE:
        return None
    try:
        return _picture(base64.b64decode(data))
    except binascii.Error:
        return None


def _picture(data: bytes) -> tuple[str, bytes] | None:
    return next(((kind, data) for kind, magic in MAGIC.items() if magic.match(data)), None)


def read_rows(text: Any, inputs: Mapping[str, Any] | None = None) -> FluxLoras:
    """The rows of a stack that are on. `text` is the widget's JSON; in it, or in the `inputs` of the node, rows may
    also stand as those of core's LoadLoraModel do: `loras.0.lora_name`, `loras.0.strength`. BadInput names the row."""
    if not isinstance(text, str):
        raise BadInput(f"the rows of a LoRA stack are {shown(text)}, expected a text that is a JSON list")
    rows = parse_rows(json.dumps(_core_rows(_object(text)))) if text.lstrip().startswith("{") else parse_rows(text)
    return (*rows, *parse_rows(json.dumps(_core_rows(inputs or {}))))


def _object(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"the rows of a LoRA stack are no JSON: {error}") from error
    if not isinstance(found, dict) or not all(_CORE_ROW.fullmatch(key) for key in found):
        raise BadInput("the rows of a LoRA stack must be a JSON list of {\"lora\": FILE, \"model\": STRENGTH, ...}")
    return found


def _core_rows(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for key, value in inputs.items():
        found = _CORE_ROW.fullmatch(key)
        if found is not None:
            rows.setdefault(int(found[1]), {})[_CORE_NAMES[found[2]]] = value
    return [{"lora": "", **row} for _, row in sorted(rows.items())]


def find_files(rows: FluxLoras) -> list[Path | None]:
    """The file of each row, None for one that needs none. MissingFile names near matches."""
    return [current().resolve_file(KIND, row.file) if row.reads else None for row in rows]


@dataclass(frozen=True)
class Stack:
    """What a stack node gives: both socket types, the trigger words and a report."""

    stack: LoraStack
    rows: FluxLoras
    words: str
    report: str


def make_stack(rows: FluxLoras, before: Any) -> Stack:
    """A stack of the rows of `before` (FLUX_LORAS or LORA_STACK or None), then `rows`. Rows that read nothing are left
    out. MissingFile."""
    every = [row for row in (*rows_of(before), *rows) if row.reads]
    files = [path for path in find_files(tuple(every)) if path is not None]
    stack, lost = stack_of(every)
    named = [(listed_name(path, name), model, clip) for path, (name, model, clip) in zip(files, stack, strict=True)]
    words = {path: trigger_words(path) for path in dict.fromkeys(files)}
    twice = [f"{path.name} stands in the stack {files.count(path)} times; its strengths add"
             for path in words if files.count(path) > 1]
    lines = [f"{name}: model {model:g}, clip {clip:g}" + (f"; trigger words: {', '.join(words[path])}"
                                                          if words[path] else "")
             for path, (name, model, clip) in zip(files, named, strict=True)]
    every_word = dict.fromkeys(word for found in words.values() for word in found)
    return Stack(named, tuple(every), ", ".join(every_word), "\n".join([*lines, *twice, *lost] or ["no LoRA is on"]))


def listed_name(path: Path, name: str) -> str:
    """The name by which other nodes find this file below the folders of its kind."""
    slashed = name.replace("\\", "/")
    known = [other for other in current().list_files(KIND) if path.as_posix().endswith("/" + other)]
    return slashed if slashed in known or not known else max(known, key=len)

