"""Model files that lie: crafted ones, each with one fault or oddity, and mutations of sound ones.

Nothing here says what must be refused: that is the business of independent readers (`strict_readers`).
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
NAMES = ("", "a", "../../etc/passwd", "/abs", "C:\\x", "a\\b", "a/b", "nul\x00byte", "new\nline", "\x1b[31m",
         "\u202eabc", "\U0001f600", "é" * 31, "x" * 63, "x" * 64, "x" * 300, "__metadata", "weight ", " weight",
         "%s%n", "..", "\x7f")
"""Well-formed names, and hard to handle."""
NO_TEXT = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"a\xc0\x80")
"""Bytes that are no UTF-8, nul in two bytes and half a surrogate pair among them."""

# ------------------------------------------------------------------------------------------------- safetensors


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file as the header describes it, true or not."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def text(self) -> str:
        return (f'{json.dumps(self.name)}:{{"dtype":"{self.dtype}","shape":{list(self.shape)},'
                f'"data_offsets":[{self.begin},{self.end}]}}')


SOUND = (Tensor("a.weight", "F32", (2, 3), 0, 24), Tensor("b", "BF16", (), 24, 26), Tensor("c", "F16", (0, 4), 26, 26),
         Tensor("d.weight", "F8_E4M3", (7,), 26, 33), Tensor("e", "I64", (2,), 33, 49))


def safetensors_bytes(header: str | bytes, data: int | bytes, length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    filler = data if isinstance(data, bytes) else bytes(i % 251 for i in range(data))
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + filler


def header_of(tensors: Sequence[Tensor], metadata: str | None = '{"format":"pt"}') -> str:
    parts = [] if metadata is None else [f'"__metadata__":{metadata}']
    return "{" + ",".join(parts + [tensor.text() for tensor in tensors]) + "}"


def sound_safetensors() -> bytes:
    return safetensors_bytes(header_of(SOUND), 49)


def crafted_safetensors() -> Iterator[tuple[str, bytes]]:
    """Kind and bytes; each kind changes one thing."""
    yield from _crafted_layouts()
    yield from _crafted_texts()
    yield from _crafted_entries()


def _crafted_layouts() -> Iterator[tuple[str, bytes]]:
    end = SOUND[-1].end
    usual = header_of(SOUND)
    for length in (0, 1, 2, 7, 8, len(usual) - 1, len(usual) + 1, len(usual) + end, *HUGE, -1, 100_000_000,
                   100_000_001):
        yield f"header length {length}", safetensors_bytes(usual, end, length)
    for cut in range(-3, 40):
        yield f"data of {end + cut} bytes", safetensors_bytes(usual, max(end + cut, 0))
    for i, tensor in enumerate(SOUND):
        def changed(tensor: Tensor = tensor, i: int = i, **values: object) -> bytes:
            tensors = [*SOUND[:i], replace(tensor, **values), *SOUND[i + 1:]]  # type: ignore[arg-type]
            return safetensors_bytes(header_of(tensors), end)

        for number in (0, 1, tensor.begin + 1, tensor.begin - 1, end, end + 1, *HUGE):
            yield f"tensor {i} begins at {number}", changed(begin=number)
            yield f"tensor {i} ends at {number}", changed(end=number)
            yield f"tensor {i} moved to {number}", changed(begin=number, end=number + tensor.end - tensor.begin)
        for shape in ((), (0,), (1,), (2, 3), (3, 2), (6,), (2, 4), (-2, -3), *((n,) for n in HUGE),
                      *((n, n) for n in HUGE), *((0, n) for n in HUGE), (2**32, 2**32, 1), (1,) * 64, (1,) * 1000):
            yield f"tensor {i} of shape {str(shape)[:40]}", changed(shape=shape)
        for dtype in ("F32", "F16", "U8", "F4", "F6_E2M3", "C64", "BOOL", "f32", "F7", "", "F32 ", "__proto__", "Q4_0"):
            yield f"tensor {i} of {dtype!r}", changed(dtype=dtype)
        for name in NAMES:
            yield f"tensor {i} is called {name!r:.30}", changed(name=name)
        yield f"tensor {i} left out", safetensors_bytes(header_of([*SOUND[:i], *SOUND[i + 1:]]), end)
        yield f"tensor {i} twice", safetensors_bytes(header_of([*SOUND, tensor]), end)
        yield f"tensor {i} under two names", safetensors_bytes(header_of([*SOUND, replace(tensor, name="f")]), end)
    yield "out of order", safetensors_bytes(header_of(SOUND[::-1]), end)


def _crafted_texts() -> Iterator[tuple[str, bytes]]:
    end = SOUND[-1].end
    usual = header_of(SOUND)
    for kind, metadata in {
            "none": "{}", "null": "null", "number": "1", "list": "[]", "text": '"x"', "true": "true",
            "number inside": '{"a":1}', "null inside": '{"a":null}', "object inside": '{"a":{}}',
            "list inside": '{"a":[]}',
            "key twice": '{"a":"1","a":"2"}', "same key escaped": '{"a":"1","\\u0061":"2"}', "empty": '{"":""}',
            "nul": '{"a":"\\u0000"}', "half a pair": '{"a":"\\ud800"}', "pair": '{"a":"\\ud83d\\ude00"}',
            "bad escape": '{"a":"\\x"}', "short escape": '{"a":"\\u00"}', "raw tab": '{"a":"\t"}',
            "trailing comma": '{"a":"b",}', "no colon": '{"a" "b"}', "single quotes": "{'a':'b'}",
            "unclosed": '{"a":"b"',
            "long": '{"a":"' + "x" * 100_000 + '"}', "hostile": json.dumps({name: name for name in NAMES})}.items():
        yield f"metadata {kind}", safetensors_bytes(header_of(SOUND, metadata), end)
    yield "metadata twice", safetensors_bytes('{"__metadata__":{},' + usual[1:], end)
    for kind, text in {
            "empty": "{}", "nothing": "", "list": "[]", "number": "12", "unclosed": "{", "closed twice": "{}}",
            "spaces after": "{}   ", "newlines after": "{}\n\r\t ", "spaces before": "  {}", "NUL after": "{}\0",
            "BOM": "\ufeff{}",
            "no quotes": "{a:1}", "comma": "{,}", "colon": "{:}", "comment": "{}//", "NaN": '{"a":NaN}'}.items():
        yield f"header {kind}", safetensors_bytes(text, 0)
    for raw in NO_TEXT:
        yield f"a name of {raw!r}", safetensors_bytes(
            b'{"' + raw + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1)
        yield f"metadata of {raw!r}", safetensors_bytes(b'{"__metadata__":{"a":"' + raw + b'"}}', 0)
        yield f"long metadata ending in {raw!r}", safetensors_bytes(
            b'{"__metadata__":{"a":"' + b"x" * 100_000 + raw + b'"}}', 0)
    for depth in (1, 2, 100, 100_000):
        yield f"lists {depth} deep", safetensors_bytes('{"a":' + "[" * depth + "]" * depth + "}", 0)
        yield f"objects {depth} deep", safetensors_bytes('{"a":' * depth + "{}" + "}" * depth, 0)


def _crafted_entries() -> Iterator[tuple[str, bytes]]:
    for kind, extra in {"text": '"x"', "number": "-1.5e3", "null": "null", "true": "true", "NaN": "NaN", "hex": "0x1",
                        "leading zero": "01", "plus": "+1", "dot": "1.", "twice": '1,"x":2'}.items():
        yield f"unknown field {kind}", safetensors_bytes(
            '{"a":{"x":' + extra + ',"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1)
    for field in ("dtype", "shape", "data_offsets"):
        for value in ("1", "null", '"U8"', "[]", "[1]", "[0,1]", "[1,0]", "[0,1,1]", "[0.0,1]", "[0,1e0]", "[-0]",
                      "[01]", "[1,]", "[,1]", "[1 1]", '["1"]', "[true]", "{}", "[[1]]",
                      "[18446744073709551616]", "[1"):
            fields = {"dtype": '"U8"', "shape": "[1]", "data_offsets": "[0,1]", field: value}
            text = ",".join(f'"{key}":{shown}' for key, shown in fields.items())
            yield f"{field} {value}", safetensors_bytes('{"a":{' + text + "}}", 1)
        fields = {"dtype": '"U8"', "shape": "[1]", "data_offsets": "[0,1]"}
        kept = ",".join(f'"{key}":{shown}' for key, shown in fields.items() if key != field)
        yield f"no {field}", safetensors_bytes('{"a":{' + kept + "}}", 1)
        twice = 2 * f'"{field}":{fields[field]},'
        yield f"{field} twice", safetensors_bytes('{"a":{' + kept + "," + twice + '"x":0}}', 1)


# ------------------------------------------------------------------------------------------------- GGUF

def gguf_text(value: str | bytes, length: int | None = None) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def gguf_entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return gguf_text(key) + struct.pack("<I", kind) + value


def gguf_tensor(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int, count: int | None = None) -> bytes:
    """`dims` innermost first, as they are stored."""
    many = len(dims) if count is None else count
    return gguf_text(name) + struct.pack(f"<I{len(dims)}QIQ", many, *dims, kind, offset)


@dataclass(frozen=True)
class Gguf:
    """A GGUF file in parts; `data` are the bytes from the start of the data on."""

    magic: bytes = b"GGUF"
    version: int = 3
    entries: tuple[bytes, ...] = ()
    tensors: tuple[bytes, ...] = ()
    data: int = 0
    counts: tuple[int | None, int | None] = (None, None)
    alignment: int = 32
    order: str = "<"

    def bytes(self) -> bytes:
        tensors, entries = self.counts
        header = self.magic + struct.pack(f"{self.order}IQQ", self.version,
                                          len(self.tensors) if tensors is None else tensors,
                                          len(self.entries) if entries is None else entries)
        header += b"".join(self.entries) + b"".join(self.tensors)
        return header + bytes(-len(header) % self.alignment) + bytes(i % 251 for i in range(self.data))


TEXTS = struct.pack("<IQ", 8, 2) + gguf_text("one") + gguf_text("")
GGUF_ENTRIES = (gguf_entry("general.architecture", 8, gguf_text("flux")),
                gguf_entry("tokenizer.ggml.tokens", 9, TEXTS),
                gguf_entry("tokenizer.ggml.scores", 9, struct.pack("<IQ2f", 6, 2, 0.5, 1.5)),
                gguf_entry("an.int", 4, struct.pack("<I", 7)), gguf_entry("a.flag", 7, b"\x01"))
GGUF_TENSORS = (("a.weight", (64, 2), 2, 0), ("b", (5,), 0, 96), ("c.weight", (256, 1), 12, 128), ("d", (), 30, 288),
                ("e", (0, 4), 1, 320), ("f", (3,), 24, 320))
"""Q4_0, F32, Q4_K, BF16 scalar, an empty F16, I8; the data takes 323 bytes, 352 padded."""
GGUF_SOUND = Gguf(entries=GGUF_ENTRIES, tensors=tuple(gguf_tensor(*row) for row in GGUF_TENSORS), data=352)


def crafted_gguf() -> Iterator[tuple[str, bytes]]:
    """Kind and bytes; each kind changes one thing."""
    yield from _crafted_gguf_frames()
    yield from _crafted_gguf_entries()
    yield from _crafted_gguf_tensors()


def _crafted_gguf_frames() -> Iterator[tuple[str, bytes]]:
    sound = GGUF_SOUND
    for magic in (b"GGML", b"GGJT", b"gguf", b"FUGG", b"\0\0\0\0", b"PK\x03\x04", b"<htm"):
        yield f"magic {magic!r}", replace(sound, magic=magic).bytes()
    for version in (0, 1, 2, 3, 4, 255, 2**16, 2**24, 2**31, 2**32 - 1):
        yield f"version {version}", replace(sound, version=version).bytes()
    yield "big-endian", replace(sound, order=">").bytes()
    for number in (0, 1, 3, 4, 6, 7, 20, 1000, 65_536, 65_537, *HUGE):
        yield f"{number} tensors", replace(sound, counts=(number, None)).bytes()
        yield f"{number} entries", replace(sound, counts=(None, number)).bytes()
    for data in (0, 1, 287, 290, 319, 320, 322, 323, 324, 351, 353, 1000):
        yield f"data of {data} bytes", replace(sound, data=data).bytes()
    yield "no tensors", Gguf(entries=GGUF_ENTRIES).bytes()
    yield "no tensors, some data", Gguf(entries=GGUF_ENTRIES, data=100).bytes()
    yield "nothing", Gguf().bytes()


def _crafted_gguf_entries() -> Iterator[tuple[str, bytes]]:
    def among(*entries: bytes) -> bytes:
        return replace(GGUF_SOUND, entries=(*GGUF_ENTRIES, *entries)).bytes()

    for kind in range(16):
        yield f"a value of kind {kind}", among(gguf_entry("k", kind, bytes(8)))
        yield f"an array of kind {kind}", among(gguf_entry("k", 9, struct.pack("<IQ", kind, 2) + bytes(16)))
        yield f"an empty array of kind {kind}", among(gguf_entry("k", 9, struct.pack("<IQ", kind, 0)))
        value = {8: gguf_text("32"), 9: struct.pack("<IQI", 4, 1, 32)}.get(kind, struct.pack("<Q", 32)[:_size(kind)])
        yield f"alignment of kind {kind}", among(gguf_entry("general.alignment", kind, value))
    for kind in (2**31, 2**32 - 1):
        yield f"a value of kind {kind}", among(gguf_entry("k", kind, bytes(8)))
    for count in (3, 100, 2**22 + 1, *HUGE):
        for kind in (0, 3, 6, 8, 10):
            array = struct.pack("<IQ", kind, count) + bytes(16)
            yield f"an array of {count} of kind {kind}", among(gguf_entry("k", 9, array))
        yield f"a text of {count} bytes", among(gguf_entry("k", 8, gguf_text("abc", count)))
        yield f"a key of {count} bytes", among(gguf_text("k", count) + struct.pack("<I", 0) + b"\0")
        yield f"a text of {count} bytes in an array", among(
            gguf_entry("k", 9, struct.pack("<IQ", 8, 1) + gguf_text("abc", count)))
    for alignment in (*range(9), 16, 31, 33, 48, 64, 96, 128, 4096, 2**20, 2**31, 2**32 - 1):
        entry = gguf_entry("general.alignment", 4, struct.pack("<I", alignment))
        yield f"alignment {alignment}, offsets of 32", among(entry)
        if 0 < alignment <= 4096:
            yield f"alignment {alignment}", _aligned(alignment, entry).bytes()
    yield "a key twice", among(GGUF_ENTRIES[3])
    yield "a key twice, then an array", among(gguf_entry("an.int", 9, struct.pack("<IQ", 0, 0)))
    yield "alignment twice", among(*2 * [gguf_entry("general.alignment", 4, struct.pack("<I", 32))])
    for name in NAMES[1:]:
        yield f"key {name!r:.30}", among(gguf_entry(name, 8, gguf_text(name)))
    for raw in NO_TEXT:
        yield f"a key of {raw!r}", among(gguf_entry(raw, 0, b"\0"))
        yield f"a text of {raw!r}", among(gguf_entry("k", 8, gguf_text(raw)))


def _crafted_gguf_tensors() -> Iterator[tuple[str, bytes]]:
    for i, row in enumerate(GGUF_TENSORS):
        def changed(*new: object, i: int = i) -> bytes:
            tensors = tuple(gguf_tensor(*(new if j == i else row)) for j, row in enumerate(GGUF_TENSORS))  # type: ignore[arg-type]
            return replace(GGUF_SOUND, tensors=tensors).bytes()

        name, dims, kind, offset = row
        for number in (offset + 1, offset - 1, offset + 32, offset - 32, 0, 96, 352, *HUGE):
            yield f"tensor {i} at {number}", changed(name, dims, kind, number % 2**64)
        for other in (*range(45), 255, 2**31, 2**32 - 1):
            yield f"tensor {i} of type {other}", changed(name, dims, other, offset)
        for shape in ((), (0,), (1,), (64, 2), (2, 64), (128,), (32, 4), (33, 2), (5,), (1, 1, 1, 1), (1,) * 5,
                      (1,) * 64, *((n,) for n in HUGE), *((n, n) for n in HUGE[:6]), *((0, n) for n in HUGE),
                      (2**32, 2**32), (2**16,) * 4, (2**21, 2**21, 2**21)):
            yield f"tensor {i} of dims {str(shape)[:40]}", changed(name, shape, kind, offset)
        for count in (0, 1, 3, 4, 5, 2**16, 2**31, 2**32 - 1):
            yield f"tensor {i} of {count} dims", changed(name, dims, kind, offset, count)
        for other_name in (*NAMES, "b", *NO_TEXT):
            yield f"tensor {i} is called {other_name!r:.30}", changed(other_name, dims, kind, offset)
    yield "many over the same bytes", replace(
        GGUF_SOUND, tensors=tuple(gguf_tensor(f"t{i}", (64,), 0, 0) for i in range(2000))).bytes()
    yield "out of order", replace(
        GGUF_SOUND, tensors=tuple(gguf_tensor(*row) for row in GGUF_TENSORS[::-1])).bytes()


def _size(kind: int) -> int:
    return {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1}.get(kind, 8)


def _aligned(alignment: int, entry: bytes) -> Gguf:
    """The sound file with its data laid out for another alignment; 29 bytes are left over at the end, or more."""
    at, tensors = 0, []
    for (name, dims, kind, offset), following in zip(GGUF_TENSORS, (*GGUF_TENSORS[1:], ("", (), 0, 352)), strict=True):
        tensors.append(gguf_tensor(name, dims, kind, at))
        size = {"b": 20, "d": 2, "f": 3}.get(name, following[3] - offset)
        at += -(-size // alignment) * alignment if alignment else size
    return Gguf(entries=(*GGUF_ENTRIES, entry), tensors=tuple(tensors), data=at, alignment=alignment)


# ------------------------------------------------------------------------------------------------- mutations

Mutation = Callable[[random.Random, bytearray], None]


def _at(rng: random.Random, data: bytearray) -> int:
    """A place, three times out of four in the first half, where the header is."""
    return rng.randrange(max(len(data) // 2, 1) if rng.random() < 0.75 else max(len(data), 1))


def _bit(rng: random.Random, data: bytearray) -> None:
    data[_at(rng, data)] ^= 1 << rng.randrange(8)


def _byte(rng: random.Random, data: bytearray) -> None:
    data[_at(rng, data)] = rng.choice((0, 1, 0x22, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _number(rng: random.Random, data: bytearray) -> None:
    """Overwrites four or eight bytes with a number that is often a limit."""
    at, width = _at(rng, data), rng.choice((4, 8))
    value = rng.choice((*HUGE, 0, 1, 31, 33, rng.randrange(2**16)))
    data[at:at + width] = (value % 2**(8 * width)).to_bytes(width, "little")


def _insert(rng: random.Random, data: bytearray) -> None:
    at = _at(rng, data)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 8, 32)))


def _delete(rng: random.Random, data: bytearray) -> None:
    at = _at(rng, data)
    del data[at:at + rng.choice((1, 2, 8, 32))]


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)):]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at, size = _at(rng, data), rng.randrange(1, 64)
    data[at:at] = data[at:at + size]


def _zero(rng: random.Random, data: bytearray) -> None:
    at = _at(rng, data)
    piece = data[at:at + rng.choice((4, 8, 32))]
    data[at:at + len(piece)] = bytes(len(piece))


def _swap(rng: random.Random, data: bytearray) -> None:
    a, b, size = _at(rng, data), _at(rng, data), rng.choice((1, 4, 8))
    if max(a, b) + size <= len(data) and abs(a - b) >= size:
        data[a:a + size], data[b:b + size] = data[b:b + size], data[a:a + size]


def _digit(rng: random.Random, data: bytearray) -> None:
    """Another digit where one stands; in a file without any, another byte."""
    places = [i for i, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    if places:
        data[rng.choice(places)] = 0x30 + rng.randrange(10)


def _splice(rng: random.Random, data: bytearray) -> None:
    at, other, size = _at(rng, data), _at(rng, data), rng.randrange(1, 40)
    data[at:at + size] = data[other:other + size]


MUTATIONS: tuple[Mutation, ...] = (_bit, _byte, _number, _insert, _delete, _cut, _repeat, _zero, _swap, _digit, _splice)


def mutations(sound: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` damaged copies, with one to three changes each."""
    rng = random.Random(seed)
    for i in range(count):
        data = bytearray(sound)
        done = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change = rng.choice(MUTATIONS)
            if data:
                change(rng, data)
            done.append(change.__name__[1:])
        yield f"{i}: {' '.join(done)}", bytes(data)
