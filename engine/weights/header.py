"""The header of a safetensors file, read by a bounded parser of our own.

Format (github.com/huggingface/safetensors, README "Format"): 8 bytes, the header's length n as little-endian uint64;
then n bytes of UTF-8 JSON that begin with `{` and may end in padding spaces,
`{"NAME": {"dtype": "F16", "shape": [1, 2], "data_offsets": [BEGIN, END]}, "__metadata__": {"KEY": "TEXT"}}`;
the rest is data, offsets counted from its first byte, every byte of it in exactly one tensor.

Why not `json.loads`: it forgets duplicate keys, recurses as deep as the file says, takes NaN, and needs the whole
header in memory before it can refuse it. Here each token is checked where it stands and nothing nests.
"""

from __future__ import annotations

import codecs
import json
import mmap
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from ..errors import BadModelFile

MAX_HEADER_BYTES = 100_000_000
MAX_ELEMENTS = 2**63 - 1
MAX_TENSORS = 1 << 15          # an all-in-one file in NF4 has a sixth of it
MAX_NAMES_BYTES = 16 << 20     # of all names together
MAX_METADATA_BYTES = 32 << 20  # of all texts together
MAX_VALUE_BYTES = 1 << 16      # of a value that is passed over
LENGTH_BYTES = 8
READ_WHOLE_BYTES = 4 << 20  # longer headers are mapped, so that a bad one costs no memory

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}
"""Bits of one element, of every dtype the format knows (safetensors/src/tensor.rs, `Dtype::bitsize`)."""

NO_PICKLES = ("Pickles can run code and are never opened. Get the .safetensors version, or convert it where you trust "
              "it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)")
FOREIGN_STARTS = (
    (b"GGUF", "this is a GGUF file under another suffix", "Rename it to .gguf"),
    (b"PK\x03\x04", "this is a PyTorch pickle or zip archive under another suffix", NO_PICKLES),
    *((b"\x80%c" % protocol, "this is a Python pickle under another suffix", NO_PICKLES) for protocol in range(2, 6)),
    (b"version ", "this is a Git LFS pointer, not the file itself", "Fetch it with `git lfs pull`, or download it"),
    (b"<", "this is a web page, not a model", "Downloads are refused so, often for want of a log-in; get it again"),
)
"""What else is found under the suffix: first bytes (as a length they are absurd), what it is, what to do."""


class Entry(NamedTuple):
    """One tensor of the header; `begin` and `end` are bytes from the start of the data."""

    format: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass
class Header:
    """`entries` by name in the order of the data; `data_start` in bytes from the start of the file."""

    data_start: int
    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def show(name: str) -> str:
    """A name from a file, safe and short enough for one line of a message."""
    return ascii(name if len(name) <= 100 else name[:97] + "...")


def show_shape(shape: tuple[int, ...]) -> str:
    """`[3072, 64]`, and no more than the first eight sizes."""
    return str(list(shape)) if len(shape) <= 8 else f"{list(shape[:8])} and {len(shape) - 8} more"


def size_text(size: int) -> str:
    """`"12.7 GB"`, or exact bytes below 1 MB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def read_header(file: BinaryIO, path: Path, file_bytes: int) -> Header:
    """The header of `file`, open at its start; raises `BadModelFile` unless the whole file is well-formed."""
    start = file.read(LENGTH_BYTES)
    if len(start) < LENGTH_BYTES:
        raise BadModelFile(path, f"incomplete download: file {size_text(file_bytes)}, too short for a header",
                           field="header length", expected=f"at least {LENGTH_BYTES} bytes", found=file_bytes,
                           advice="Download it again")
    length = int.from_bytes(start, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise _something_else(path, start, "header length", f"2 to {MAX_HEADER_BYTES}", str(length))
    if file.read(1) != b"{":
        raise _something_else(path, start, "header start", "'{'", "another byte or nothing")
    if LENGTH_BYTES + length > file_bytes:
        raise BadModelFile(path, f"incomplete download: file {size_text(file_bytes)}, its header alone promises "
                                 f"{size_text(LENGTH_BYTES + length)}",
                           field="header length", expected=f"at most {file_bytes - LENGTH_BYTES}", found=length,
                           advice="Download it again")
    if length <= READ_WHOLE_BYTES:
        text = b"{" + file.read(length - 1)
        return Parser(path, text, 0, len(text)).header(LENGTH_BYTES + length, file_bytes)
    with mmap.mmap(file.fileno(), LENGTH_BYTES + length, access=mmap.ACCESS_READ) as mapped:
        return Parser(path, mapped, LENGTH_BYTES, LENGTH_BYTES + length).header(LENGTH_BYTES + length, file_bytes)


def foreign(start: bytes) -> tuple[str, str] | None:
    """What a file is that starts so, and what to do with it; None for what is not known."""
    return next(((what, advice) for magic, what, advice in FOREIGN_STARTS if start.startswith(magic)), None)


def _something_else(path: Path, start: bytes, field: str, expected: str, found: str) -> BadModelFile:
    what, advice = foreign(start) or ("not a safetensors file, or damaged", "Download it again")
    return BadModelFile(path, what, field=field, expected=expected, found=found, advice=advice)


def _laid_out(header: Header, path: Path, file_bytes: int) -> dict[str, Entry]:
    """The entries in the order of their data, once that leaves no hole, overlap or trailing byte."""
    entries, data_bytes = header.entries, file_bytes - header.data_start
    ordered = sorted(entries.items(), key=lambda item: item[1][2:])
    promised = max((entry.end for entry in entries.values()), default=0)
    at = 0
    for name, entry in ordered:
        if entry.begin != at:
            kind = "overlaps the tensor before it" if entry.begin < at else "leaves a hole before it"
            raise BadModelFile(path, f"tensor {show(name)} {kind}", field="data_offsets",
                               expected=f"to begin at {at}", found=entry.begin,
                               advice="The file is damaged or was written by a broken tool")
        at = entry.end
    if promised > data_bytes:
        raise BadModelFile(path, f"incomplete download: file {size_text(file_bytes)}, header promises "
                                 f"{size_text(header.data_start + promised)}",
                           field="data_offsets", expected=f"{promised} bytes of data", found=data_bytes,
                           advice="Download it again")
    if promised < data_bytes:
        raise BadModelFile(path, f"{size_text(data_bytes - promised)} after the last tensor", field="data_offsets",
                           expected=f"{promised} bytes of data", found=data_bytes,
                           advice="The file is damaged or was written by a broken tool")
    return dict(ordered)


# The engine of `re` stacks repeated groups, and a map's pages count as memory while they are looked at: so repeats are
# bounded, and the loops around them let go of what is behind.
_WINDOW = 1 << 20
_RELEASE_BYTES = 8 << 20
_SPACE = re.compile(rb"[ \t\n\r]{0,%d}" % _WINDOW)
_PLAIN_STRING = re.compile(rb'"[^"\\\x00-\x1f]{0,4096}"')
_STRING_PART = re.compile(rb'[^"\\\x00-\x1f]{0,65536}'
                          rb'(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]{0,64}){0,256}')
_MAX_NAME_BYTES = 1 << 20
MAX_DEPTH = 16
_LIST_TEXT = 16_384  # a list of 64-bit sizes longer than this is no shape; torch stops at 64 of them
_INTEGERS = re.compile(rb"\[([0-9, \t\n\r]{0,%d})\]" % _LIST_TEXT)
_OTHER_VALUE = re.compile(rb"-?(?:0|[1-9][0-9]{0,400})(?:\.[0-9]{1,400})?(?:[eE][-+]?[0-9]{1,9})?|true|false|null")
_INTEGER = re.compile(rb"0|[1-9][0-9]{0,19}")
_USUAL_ENTRY = re.compile(
    rb'[ ]?\{"dtype":[ ]?"([A-Z0-9_]{1,16})",[ ]?"shape":[ ]?(\[[0-9, ]{0,400}\]),'
    rb'[ ]?"data_offsets":[ ]?(\[[0-9, ]{3,50}\])\}')
"""An entry as the usual writers put it; others are read field by field, half as fast."""


class Parser:
    """A cursor over the bytes of JSON. `data` is bytes or a map; positions count within it."""

    def __init__(self, path: Path, data: bytes | mmap.mmap, pos: int, end: int, what: str = "safetensors header"
                 ) -> None:
        self.path, self.data, self.pos, self.end, self.what = path, data, pos, end, what
        self.origin = self.released = pos

    def header(self, data_start: int, file_bytes: int) -> Header:
        """The whole header; texts of the metadata are looked at first, and kept when all the rest is in order."""
        header = Header(data_start)
        texts: dict[str, int] | None = None
        names_bytes = 0
        for name in self.keys("header"):
            if name == "__metadata__":
                if texts is not None:
                    self.refuse("__metadata__", "stands twice")
                texts = self.metadata()
            elif name in header.entries:
                self.refuse(f"tensor {show(name)}", "stands twice")
            else:
                header.entries[name] = self.entry(name)
                names_bytes += len(name)
            if len(header.entries) > MAX_TENSORS or names_bytes > MAX_NAMES_BYTES:
                self.refuse("header", f"more than {MAX_TENSORS} tensors, or {size_text(MAX_NAMES_BYTES)} of names")
        self.finish()
        header.entries = _laid_out(header, self.path, file_bytes)
        for key, begin in (texts or {}).items():
            self.pos = begin
            header.metadata[key] = self.string(f"__metadata__ {show(key)}")
        return header

    def metadata(self) -> dict[str, int]:
        """Key -> where its text begins."""
        if self.peek() == b"n" and self.data[self.pos:self.pos + 4] == b"null":  # the reference reader takes it
            self.pos += 4
            return {}
        texts: dict[str, int] = {}
        begin = self.pos
        for key in self.keys("__metadata__"):
            if key in texts:
                self.refuse(f"__metadata__ {show(key)}", "stands twice")
            if self.peek() != b'"':
                self.refuse(f"__metadata__ {show(key)}", "must be a string")
            texts[key] = self.pos
            self.pass_string(f"__metadata__ {show(key)}")
            if len(texts) > MAX_TENSORS or self.pos - begin > MAX_METADATA_BYTES:
                self.refuse("__metadata__", f"more than {MAX_TENSORS} texts, or {size_text(MAX_METADATA_BYTES)}")
        return texts

    def finish(self) -> None:
        self.skip_space()
        if self.pos != self.end:
            self.refuse("header end", "more than spaces after the closing brace")

    def entry(self, name: str) -> Entry:
        what = f"tensor {show(name)}"
        usual = _USUAL_ENTRY.match(self.data, self.pos, self.end)
        if usual is not None:
            self.pos = usual.end()
            kind, sizes, span = usual.groups()
            return self.checked(what, kind.decode("ascii"), self.parsed(sizes, f"{what} shape"),
                                self.parsed(span, f"{what} data_offsets"))
        found: dict[str, object] = {}
        for key in self.keys(what):
            if key in found:
                self.refuse(what, f"gives {show(key)} twice")
            if key in ("shape", "data_offsets"):
                found[key] = self.integers(f"{what} {key}")
            elif self.peek() == b'"':
                found[key] = self.string(f"{what} {show(key)}", _MAX_NAME_BYTES)
            else:  # a field the format does not know: passed over, as the reference reader does
                self.pass_scalar(f"{what} {show(key)}")
                found[key] = None
        kind, shape, offsets = found.get("dtype"), found.get("shape"), found.get("data_offsets")
        for key, value in (("dtype", kind), ("shape", shape), ("data_offsets", offsets)):
            if value is None:
                self.refuse(f"{what} {key}", "is missing or of the wrong type")
        assert isinstance(kind, str) and isinstance(shape, tuple) and isinstance(offsets, tuple)
        return self.checked(what, kind, shape, offsets)

    def checked(self, what: str, kind: str, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Entry:
        if kind not in BITS:
            self.refuse(f"{what} dtype", f"{show(kind)} is not a dtype of this format")
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            self.refuse(f"{what} data_offsets", f"must be [begin, end], found {show_shape(offsets)}")
        elements, span = 1, 1
        for size in shape:
            elements, span = elements * size, span * max(size, 1)
            if span > MAX_ELEMENTS:
                self.refuse(f"{what} shape", "has more elements than can be counted in 63 bits")
        bits, got = elements * BITS[kind], offsets[1] - offsets[0]
        if bits % 8 or bits // 8 != got:
            self.refuse(f"{what} data_offsets",
                        f"span {got} bytes, but shape {show_shape(shape)} of {kind} takes {bits / 8:g}")
        return Entry(kind, shape, offsets[0], offsets[1])

    def keys(self, what: str) -> _Keys:
        """Iterates over the keys of an object that starts here; the caller reads each value in between."""
        self.expect(b"{", what)
        return _Keys(self, what)

    def integers(self, what: str) -> tuple[int, ...]:
        self.skip_space()
        match = _INTEGERS.match(self.data, self.pos, self.end)
        if match is None:
            self.refuse(what, "must be a list of integers, none negative")
        self.pos = match.end()
        return self.parsed(match[0], what)

    def parsed(self, text: bytes, what: str) -> tuple[int, ...]:
        """`[1, 2]` as integers; JSON has no leading zeros, and the format no more than 64 bits."""
        inner = text[1:-1].strip()
        if not inner:
            return ()
        parts = [part.strip() for part in inner.split(b",")]
        for part in parts:
            if _INTEGER.fullmatch(part) is None or (len(part) == 20 and int(part) >= 2**64):
                self.refuse(what, f"holds {show(part[:40].decode('ascii'))}, not an integer of 64 bits")
        return tuple(map(int, parts))

    def string(self, what: str, limit: int | None = None) -> str:
        """The string that starts here, its escapes resolved; `limit` in bytes."""
        start = self.pos
        plain = self.pass_string(what, limit)
        try:
            text = str(self.data[start:self.pos], "utf-8")
            if plain:
                return text[1:-1]
            value: str = json.loads(text)
            value.encode("utf-8")  # half a surrogate pair is no text
        except UnicodeError:
            self.pos = start
            self.refuse(what, "is not valid UTF-8 text")
        return value

    def pass_string(self, what: str, limit: int | None = None) -> bool:
        """Goes behind the string that starts here; whether it is a short one without escapes."""
        plain = _PLAIN_STRING.match(self.data, self.pos, self.end)
        self.pos = self.string_end(what, limit) if plain is None else plain.end()
        return plain is not None

    def string_end(self, what: str, limit: int | None) -> int:
        """Where the string ends that starts here; its text is checked on the way, and not kept."""
        pos = self.pos + 1
        decoder = codecs.getincrementaldecoder("utf-8")()
        while limit is None or pos - self.pos <= limit:
            match = _STRING_PART.match(self.data, pos, self.end)
            assert match is not None
            try:
                ended = match.end() < self.end and self.data[match.end()] == 0x22
                decoder.decode(match[0], final=ended)
            except UnicodeError:
                self.refuse(what, "is not valid UTF-8 text")
            if ended:
                return match.end() + 1
            if match.end() >= self.end:
                self.refuse(what, "is a string without an end")
            if match.end() == pos:
                self.refuse(what, "is not a JSON string (a bad escape, or a control character)")
            pos = match.end()
            self.release(pos)
        self.refuse(what, f"is longer than {limit} bytes")

    def pass_value(self, what: str, limit: int | None = None, depth: int = 0) -> None:
        """Goes behind the value of any kind that starts here; `limit` is the place where it must have ended."""
        start = self.peek()
        limit = self.pos + MAX_VALUE_BYTES if limit is None else limit
        if depth > MAX_DEPTH or self.pos > limit:
            self.refuse(what, "is nested too deep, or too long")
        if start == b'"':
            self.pass_string(what)
        elif start == b"{":
            for _ in self.keys(what):
                self.pass_value(what, limit, depth + 1)
        elif start == b"[":
            self.pos += 1
            first = True
            while self.peek() != b"]":
                if not first:
                    self.expect(b",", what)
                self.pass_value(what, limit, depth + 1)
                first = False
            self.pos += 1
        else:
            self.pass_scalar(what)

    def pass_scalar(self, what: str) -> None:
        self.skip_space()
        match = _OTHER_VALUE.match(self.data, self.pos, self.end)
        if match is None:
            self.refuse(what, "is not a value this format allows there")
        self.pos = match.end()

    def expect(self, byte: bytes, what: str) -> None:
        if self.peek() != byte:
            self.refuse(what, f"lacks {byte.decode()!r}")
        self.pos += 1

    def peek(self) -> bytes:
        """The next byte that is not space, empty at the end."""
        self.skip_space()
        return self.data[self.pos:min(self.pos + 1, self.end)]

    def skip_space(self) -> None:
        while True:
            match = _SPACE.match(self.data, self.pos, self.end)
            assert match is not None
            ended = match.end() - self.pos < _WINDOW
            self.pos = match.end()
            if ended:
                return
            self.release(self.pos)

    def release(self, pos: int) -> None:
        """Lets go of a map's pages up to `pos`, now and then; they are read again if they are wanted again."""
        if pos - self.released > _RELEASE_BYTES and isinstance(self.data, mmap.mmap) and hasattr(self.data, "madvise"):
            self.data.madvise(mmap.MADV_DONTNEED, 0, pos // mmap.PAGESIZE * mmap.PAGESIZE)
            self.released = pos

    def refuse(self, what: str, problem: str) -> NoReturn:
        raise BadModelFile(self.path, f"damaged {self.what}", field=what,
                           found=f"{problem}, at byte {self.pos - self.origin} of it",
                           advice="Download it again")


class _Keys:
    """The loop over one object's keys, after its opening brace."""

    def __init__(self, parser: Parser, what: str) -> None:
        self.parser, self.what, self.first = parser, what, True

    def __iter__(self) -> _Keys:
        return self

    def __next__(self) -> str:
        parser = self.parser
        following = parser.peek()
        if following == b"}":
            parser.pos += 1
            raise StopIteration
        if not self.first:
            parser.expect(b",", self.what)
        self.first = False
        if parser.peek() != b'"':
            parser.refuse(self.what, "lacks a name")
        key = parser.string(f"a name in the {self.what}", _MAX_NAME_BYTES)
        parser.release(parser.pos)
        parser.expect(b":", self.what)
        parser.skip_space()
        return key
