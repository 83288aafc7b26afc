"""The header of a GGUF file, read by a bounded parser of our own.

Format (github.com/ggml-org/ggml, docs/gguf.md; as strict as its src/gguf.cpp): `GGUF`, version, number of tensors,
number of metadata entries; the entries, key, type and value each; the tensors, name, sizes (innermost first), type and
offset each; then, from the next multiple of `general.alignment`, the data: one tensor after the other, each padded to
that alignment. All numbers little-endian, texts with their length (64 bits) before them.

Why not gguf-py: it turns every token of a tokenizer into an object, and hangs on or misreads damaged files. Here
nothing is believed before it is compared with the bytes that are left; arrays are passed over, and read when asked for.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from ..errors import BadModelFile
from ..quant.formats import FORMATS
from .header import MAX_ELEMENTS, Entry, foreign, show, show_shape, size_text

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_TENSORS = 1 << 16
MAX_ENTRIES = 1 << 16
MAX_NAME_BYTES = 1 << 16
MAX_NAMES_BYTES = 16 << 20  # of all keys and names of tensors
MAX_TEXT_BYTES = 8 << 20    # of all texts kept; what is more is read when asked for, as arrays are
MAX_STRINGS = 1 << 22      # in all arrays: sixteen times the largest tokenizer
MAX_DIMS = 4
_WINDOW = 1 << 20

TYPES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}
"""Numbers of ggml's types (ggml.h, `ggml_type`)."""
REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
           38: "IQ4_NL_8_8"}
"""Types that ggml has had, and dropped."""
SIZES: dict[str, tuple[int, int]] = {
    **{row.name: (row.block, row.nbytes) for row in FORMATS.values()},
    "I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8), "F64": (1, 8), "Q8_1": (32, 36), "Q1_0": (128, 18),
}
"""Type -> weights and bytes of a block."""

SCALARS: dict[int, tuple[str, str]] = {
    0: ("U8", "<B"), 1: ("I8", "<b"), 2: ("U16", "<H"), 3: ("I16", "<h"), 4: ("U32", "<I"), 5: ("I32", "<i"),
    6: ("F32", "<f"), 7: ("BOOL", "<?"), 10: ("U64", "<Q"), 11: ("I64", "<q"), 12: ("F64", "<d"),
}
"""Types of metadata values: name and how `struct` reads one."""
STRING, ARRAY, UINT32 = 8, 9, 4
_LENGTH = struct.Struct("<Q")


class StoredArray(NamedTuple):
    """An array of the metadata: type of its elements (`STRING` or a name of `SCALARS`), how many, and its bytes."""

    kind: str
    length: int
    offset: int
    nbytes: int


@dataclass
class GgufHeader:
    """`entries` by name in the order of the data; `data_start` in bytes from the start of the file; `metadata` holds
    texts, and numbers as texts."""

    data_start: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, StoredArray] = field(default_factory=dict)
    alignment: int = DEFAULT_ALIGNMENT


def read_gguf_header(file: BinaryIO, path: Path, file_bytes: int) -> GgufHeader:
    """The header of `file`, open at its start; raises `BadModelFile` unless header and size are well-formed."""
    start = file.read(9)
    if not start.startswith(MAGIC):
        raise _something_else(path, start)
    cursor = _Cursor(file, path, file_bytes)
    cursor.skip(len(MAGIC), "magic")
    version = cursor.number("<I", "version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0 and version >> 24 in VERSIONS:
            raise BadModelFile(path, "a GGUF file for big-endian machines", field="version",
                               advice="Get the usual, little-endian version")
        raise BadModelFile(path, "a version of GGUF that is not known", field="version", expected="2 or 3",
                           found=version, advice="Get a newer version of this model" if version == 1 else None)
    tensors = cursor.count("number of tensors", MAX_TENSORS, 24)
    entries = cursor.count("number of metadata entries", MAX_ENTRIES, 13)
    header = GgufHeader()
    for i in range(entries):
        _read_entry(cursor, header, f"metadata entry {i}")
    _read_tensors(cursor, header, tensors)
    return header


def _something_else(path: Path, start: bytes) -> BadModelFile:
    found = foreign(start)
    if found is None and start[8:9] == b"{":
        found = "this is a safetensors file under another suffix", "Rename it to .safetensors"
    what, advice = found or ("not a GGUF file, or damaged", "Download it again")
    return BadModelFile(path, what, field="magic", expected="GGUF", found=show(start[:4].decode("latin-1")),
                        advice=advice)


def _read_entry(cursor: _Cursor, header: GgufHeader, what: str) -> None:
    key = cursor.name(f"key of {what}")
    if key in header.metadata or key in header.arrays:
        cursor.refuse(f"metadata {show(key)}", "stands twice")
    what = f"metadata {show(key)}"
    kind = cursor.number("<I", f"type of {what}")
    if key == "general.alignment" and kind != UINT32:
        cursor.refuse(f"type of {what}", f"must be a power of two of type U32, found type {kind}")
    if kind == ARRAY:
        header.arrays[key] = cursor.array(what)
        return
    if kind == STRING:
        _read_text(cursor, header, key, what)
        return
    if kind not in SCALARS:
        cursor.refuse(f"type of {what}", f"{kind} is not a type of this format")
    value: Any = cursor.number(SCALARS[kind][1], what)
    header.metadata[key] = str(value).lower() if isinstance(value, bool) else str(value)
    if key == "general.alignment":
        if value == 0 or value & (value - 1):
            cursor.refuse(what, f"must be a power of two, found {value}")
        header.alignment = value


def _read_text(cursor: _Cursor, header: GgufHeader, key: str, what: str) -> None:
    """A text, or, where all would be too long to keep, its place: that of an array of one."""
    begin = cursor.pos
    length: int = cursor.number("<Q", f"length of {what}")
    cursor.need(length, what)
    cursor.text_bytes += length
    if cursor.text_bytes > MAX_TEXT_BYTES:
        cursor.skip(length, what)
        header.arrays[key] = StoredArray("STRING", 1, begin, cursor.pos - begin)
    else:
        header.metadata[key] = cursor.take(length, what).decode("utf-8", "replace")


def _read_tensors(cursor: _Cursor, header: GgufHeader, count: int) -> None:
    at = 0
    for i in range(count):
        name = cursor.name(f"name of tensor {i}")
        what = f"tensor {show(name)}"
        if name in header.entries:
            cursor.refuse(what, "stands twice")
        shape, kind, nbytes = _sizes_and_type(cursor, what)
        begin = cursor.number("<Q", f"offset of {what}")
        if begin != at:
            cursor.refuse(f"offset of {what}", f"must be {at}, found {begin}")
        header.entries[name] = Entry(kind, shape, begin, begin + nbytes)
        at = padded(begin + nbytes, header.alignment)
    header.data_start = padded(cursor.pos, header.alignment)
    end = max((entry.end for entry in header.entries.values()), default=0)
    if end and header.data_start + end > cursor.end:
        raise BadModelFile(cursor.path, f"incomplete download: file {size_text(cursor.end)}, header promises "
                                        f"{size_text(header.data_start + end)}",
                           field="data", expected=f"{end} bytes", found=max(cursor.end - header.data_start, 0),
                           advice="Download it again")


def _sizes_and_type(cursor: _Cursor, what: str) -> tuple[tuple[int, ...], str, int]:
    """Shape in torch's order, type and bytes."""
    dims = cursor.number("<I", f"number of sizes of {what}")
    if dims > MAX_DIMS:
        cursor.refuse(f"number of sizes of {what}", f"must be at most {MAX_DIMS}, found {dims}")
    shape = tuple(reversed(struct.unpack(f"<{dims}Q", cursor.take(8 * dims, f"sizes of {what}"))))
    if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        cursor.refuse(f"sizes of {what}", "more elements than can be counted in 63 bits")
    number = cursor.number("<I", f"type of {what}")
    if number in REMOVED:
        raise BadModelFile(cursor.path, f"{what} is stored as {REMOVED[number]}, a type that ggml has dropped",
                           field=f"type of {what}", advice="Get the file in another type, such as Q4_0 or Q4_K")
    if number not in TYPES:
        raise BadModelFile(cursor.path, f"{what} is stored in a type that is not known", field=f"type of {what}",
                           expected=f"a number of ggml's types up to {max(TYPES)}", found=number,
                           advice="The file is damaged, or newer than this version of Flux Kit")
    kind = TYPES[number]
    block, block_bytes = SIZES[kind]
    width = shape[-1] if shape else 1
    if width % block:
        cursor.refuse(f"sizes of {what}", f"a row of {width} is no multiple of the {block} weights in a block of {kind}"
                                          f", shape {show_shape(shape)}")
    return shape, kind, math.prod(shape) // block * block_bytes


def padded(size: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-size // alignment) * alignment


class _Cursor:
    """A place in the file; a window of its bytes is held, whatever the header's length."""

    def __init__(self, file: BinaryIO, path: Path, end: int) -> None:
        self.file, self.path, self.end = file, path, end
        self.pos = self.base = 0
        self.window = b""
        self.strings = self.text_bytes = self.name_bytes = 0

    def need(self, size: int, what: str) -> None:
        if size > self.end - self.pos:
            raise BadModelFile(self.path, f"incomplete download: file {size_text(self.end)}, ends inside its header",
                               field=what, expected=f"{size} bytes from {self.pos} on", found=self.end - self.pos,
                               advice="Download it again")

    def take(self, size: int, what: str) -> bytes:
        self.need(size, what)
        at = self.pos - self.base
        if not 0 <= at <= len(self.window) - size:
            self.look(max(size, _WINDOW))
            at = 0
        self.pos += size
        return self.window[at:at + size]

    def look(self, size: int) -> None:
        """Moves the window to the place."""
        self.file.seek(self.pos)
        self.base, self.window = self.pos, self.file.read(min(size, self.end - self.pos))

    def skip(self, size: int, what: str) -> None:
        self.need(size, what)
        self.pos += size

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, what: str, limit: int, least: int) -> int:
        """How many there are of what takes at least `least` bytes each."""
        found: int = self.number("<Q", what)
        if found > limit:
            self.refuse(what, f"must be at most {limit}, found {found}")
        self.need(found * least, what)
        return found

    def name(self, what: str) -> str:
        length = self.number("<Q", f"length of {what}")
        self.need(length, what)
        self.name_bytes += length
        if length > MAX_NAME_BYTES or self.name_bytes > MAX_NAMES_BYTES:
            self.refuse(f"length of {what}", f"must be at most {MAX_NAME_BYTES}, of all {MAX_NAMES_BYTES}, "
                                             f"found {length}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(what, "is not valid UTF-8 text")

    def array(self, what: str) -> StoredArray:
        kind = self.number("<I", f"type of {what}")
        count: int = self.number("<Q", f"length of {what}")
        begin = self.pos
        if kind == STRING:
            self.strings += count
            if self.strings > MAX_STRINGS:
                self.refuse(f"length of {what}", f"more than {MAX_STRINGS} texts in arrays, found {count}")
            self.pass_strings(count, what)
            return StoredArray("STRING", count, begin, self.pos - begin)
        if kind not in SCALARS:
            self.refuse(f"type of {what}", f"{kind} is not a type of the elements of an array")
        name, form = SCALARS[kind]
        self.skip(count * struct.calcsize(form), what)
        return StoredArray(name, count, begin, self.pos - begin)

    def pass_strings(self, count: int, what: str) -> None:
        length_at = _LENGTH.unpack_from
        while count:
            self.need(8 * count, what)
            self.look(_WINDOW)
            window, at, last = self.window, 0, len(self.window) - 8
            while count and at <= last:
                at += 8 + length_at(window, at)[0]
                count -= 1
            self.skip(at, what)

    def refuse(self, what: str, problem: str) -> NoReturn:
        raise BadModelFile(self.path, "damaged GGUF header", field=what, found=f"{problem}, before byte {self.pos}",
                           advice="Download it again")


def strings_of(data: bytes, count: int) -> list[str]:
    """The texts of an array; bytes that are no UTF-8 become U+FFFD."""
    texts, at = [], 0
    for _ in range(count):
        length = _LENGTH.unpack_from(data, at)[0]
        texts.append(data[at + 8:at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return texts
