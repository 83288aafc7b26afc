"""Reads ComfyUI's extra_model_paths.yaml: sections of `kind: path` and nothing else of YAML, so without a library."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...engine.errors import BadInput, MissingFile

MAX_BYTES = 2**20
_ENTRY = re.compile(r"^(?P<key>[^\s:#'\"][^:]*?|'[^']*'|\"[^\"]*\")\s*:(?:\s+(?P<value>.*))?$")
_TRUE = {"true", "yes", "on"}


def read_extra_paths(file: Path) -> list[tuple[str, Path, bool]]:
    """(kind, folder, goes before the others) for each path of the file, absolute, in its order.

    As in ComfyUI: `base_path` precedes the others of its section, `~` and variables in it are expanded, relative paths
    count from the file's folder, `|` begins a list of one path a line, `is_default: true` puts a section first.
    """
    if not file.is_file():
        raise MissingFile(f"{file}: there is no such file", file=file)
    if file.stat().st_size > MAX_BYTES:
        raise BadInput(f"{file.name}: larger than 1 MB, which no list of paths is", file=file)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput(f"{file.name}: not UTF-8 text", file=file) from None
    found = []
    for section in _sections(file, lines):
        base = file.parent.absolute()
        if section.get("base_path"):
            base = base / os.path.expandvars(os.path.expanduser(section["base_path"][0]))
        first = section.get("is_default", [""])[0].lower() in _TRUE
        for kind, paths in section.items():
            if kind not in ("base_path", "is_default"):
                found += [(kind, Path(os.path.normpath(base / path)), first) for path in paths]
    return found


def _sections(file: Path, lines: list[str]) -> list[dict[str, list[str]]]:
    """Each section's entries: key -> its lines."""
    sections: list[dict[str, list[str]]] = []
    block: list[str] | None = None  # the open `|` list and the indent of its key
    block_indent = 0
    for number, line in enumerate(lines, 1):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if not text or (text.startswith("#") and (block is None or indent <= block_indent)):
            continue
        if block is not None and indent > block_indent:
            block.append(text)
            continue
        block = None
        if line[:indent].count("\t"):
            raise BadInput(f"{file.name}, line {number}: indented by a tab; use spaces", file=file)
        match = _ENTRY.match(text)
        if match is None:
            raise BadInput(f"{file.name}, line {number}: expected 'name: path', found '{text[:80]}'", file=file)
        key, value = _plain(match["key"]), _plain(match["value"] or "")
        if indent == 0:
            if value:
                raise BadInput(f"{file.name}, line {number}: '{key}' must be a section (nothing after its colon), with "
                               "its paths indented below", file=file)
            sections.append({})
        elif not sections:
            raise BadInput(f"{file.name}, line {number}: '{key}' stands outside any section", file=file)
        elif value in ("|", "|-", "|+", ">", ">-"):
            block, block_indent = sections[-1].setdefault(key, []), indent
        elif value:
            sections[-1].setdefault(key, []).append(value)
    return sections


def _plain(value: str) -> str:
    """A scalar without its quotes or the comment after it."""
    value = value.strip()
    if len(value) > 1 and value[0] in "'\"":
        end = value.find(value[0], 1)
        return value[1:end] if end > 0 else value
    return re.split(r"\s+#", value, maxsplit=1)[0].strip() if not value.startswith("#") else ""
