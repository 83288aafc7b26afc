"""Both containers under fire: thousands of crafted and mutated files, against independent strict readers.

What they take must open, with the same names, shapes, types and bytes; what they refuse must be refused as
`BadModelFile`, soon, in little memory, in one line that names the file.

FLUX_KIT_FUZZ=20 multiplies the mutations, with other seeds each time it is another number.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import bad_files
import pytest
import strict_readers
from flux_kit.engine.errors import BadModelFile
from flux_kit.engine.weights import detect, open_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from strict_readers import Read, Refused

TIMES = int(os.environ.get("FLUX_KIT_FUZZ", "1"))
MUTATED = 2000 * TIMES
SECONDS, MEGABYTES = 1.0, 50

Reader = Callable[[bytes], Read]
FORMATS: dict[str, tuple[Reader, Callable[[], Iterator[tuple[str, bytes]]], bytes]] = {
    "safetensors": (strict_readers.read_safetensors, bad_files.crafted_safetensors, bad_files.sound_safetensors()),
    "gguf": (strict_readers.read_gguf, bad_files.crafted_gguf, bad_files.GGUF_SOUND.bytes()),
}


def resident() -> int:
    """The most memory that this process has had, in bytes; 0 where it cannot be told."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(path: Path, data: bytes, oracle: Reader) -> str | None:
    """What is wrong with what we make of `data`; None if nothing is."""
    path.write_bytes(data)
    try:
        expected: Read | None = oracle(data)
        reason = ""
    except Refused as error:
        expected, reason = None, str(error)
    began = time.process_time()
    try:
        with open_checkpoint(path) as checkpoint:
            found = {name: (info.shape, info.format, bytes(info.raw().numpy())) for name, info in checkpoint.items()}
            detect(checkpoint)
    except BadModelFile as error:
        message = str(error)
        if expected is not None:
            return f"wrongly refused: {message}"
        if path.name not in message or "\n" in message or len(message) > 700 or error.file != str(path):
            return f"bad message: {message}"
    else:
        if expected is None:
            return f"wrongly taken, must be refused: {reason}"
        if found != expected:
            return f"misread: {found} for {expected}"
    took = time.process_time() - began
    return f"took {took:.1f} s" if took > SECONDS else None


def check(path: Path, cases: Iterator[tuple[str, bytes]], oracle: Reader) -> tuple[int, int]:
    """How many cases there were, and how many the oracle takes; fails with the first few that go wrong."""
    before, wrong, seen, good = resident(), [], 0, 0
    for kind, data in cases:
        problem = compare(path, data, oracle)
        if problem is not None:
            wrong.append(f"{kind}: {problem}")
        seen += 1
        good += is_good(oracle, data)
    assert not wrong, f"{len(wrong)} of {seen}:\n" + "\n".join(line[:400] for line in wrong[:20])
    assert resident() - before < MEGABYTES << 20
    return seen, good


def is_good(oracle: Reader, data: bytes) -> bool:
    try:
        oracle(data)
    except Refused:
        return False
    return True


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_crafted_files(tmp_path: Path, format: str) -> None:
    oracle, crafted, _ = FORMATS[format]
    seen, good = check(tmp_path / f"model.{format}", crafted(), oracle)
    assert seen > 500
    assert good > 50


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_mutated_files(tmp_path: Path, format: str) -> None:
    oracle, _, sound = FORMATS[format]
    seen, good = check(tmp_path / f"model.{format}", bad_files.mutations(sound, MUTATED, TIMES), oracle)
    assert seen == MUTATED
    assert 50 < good < MUTATED // 2


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_truncation_at_every_byte(tmp_path: Path, format: str) -> None:
    oracle, _, sound = FORMATS[format]
    check(tmp_path / f"model.{format}", ((f"first {n}", sound[:n]) for n in range(len(sound) + 1)), oracle)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_single_bit_of_the_header(tmp_path: Path, format: str) -> None:
    """A sample of a third of them; all with FLUX_KIT_FUZZ above 2."""
    oracle, _, sound = FORMATS[format]
    end = 8 + int.from_bytes(sound[:8], "little") if format == "safetensors" else len(sound) - 352
    flips = ((f"bit {bit}", sound[:bit // 8] + bytes([sound[bit // 8] ^ 1 << bit % 8]) + sound[bit // 8 + 1:])
             for bit in range(0, 8 * end, 3 if TIMES < 3 else 1))
    check(tmp_path / f"model.{format}", flips, oracle)


# ------------------------------------------------------------------------------------------------- large

MANY = 40_000 * TIMES
EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
ODD = b'{"shape":[0],"dtype":"U8","x":1,"data_offsets":[0,0]}'
LARGE: dict[str, Callable[[], bytes]] = {
    # bad at the end only, so that all of it has to be read
    "entries.safetensors": lambda: b"{" + b",".join(b'"%d":' % i + EMPTY for i in range(MANY)) + b",x",
    "odd entries.safetensors": lambda: b"{" + b",".join(b'"%d":' % i + ODD for i in range(5000 * TIMES)) + b",x",
    "long names.safetensors": lambda: b"{" + b",".join(
        b'"%d%s":' % (i, b"n" * 10**6) + EMPTY for i in range(30)) + b",x",
    "long text.safetensors": lambda: b'{"__metadata__":{"a":"' + b"a" * 30_000_000 + b'"},x}',
    "long text of escapes.safetensors": lambda: b'{"__metadata__":{"a":"' + b"\\n" * 5_000_000 + b'"},x}',
    "long text, then no text.safetensors": lambda: b'{"__metadata__":{"a":"' + b"a" * 30_000_000 + b'\xff"}}',
    "texts.safetensors": lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(MANY)) + b"},x",
    "spaces.safetensors": lambda: b"{}" + b" " * 50_000_000 + b"x",
    "entries.safetensors.index.json": lambda: (
        b'{"weight_map":{' + b",".join(b'"%d":"%d.safetensors"' % (i, i) for i in range(MANY)) + b"}}"),
    "lists.safetensors.index.json": lambda: b'{"metadata":[' + b"[]," * 4_000_000,
    "long.safetensors.index.json": lambda: b'{"weight_map":{},"a":"' + b"a" * 20_000_000,
    "text.gguf": lambda: bad_files.Gguf(
        entries=(bad_files.gguf_entry("k", 8, bad_files.gguf_text(b"a" * 30_000_000)),), counts=(None, 5)).bytes(),
    "names.gguf": lambda: bad_files.Gguf(counts=(2000, None), tensors=tuple(
        bad_files.gguf_tensor(f"{i}" + "n" * 60_000, (0,), 0, 0) for i in range(400))).bytes(),
    "tensors.gguf": lambda: bad_files.Gguf(counts=(15_001, None), tensors=tuple(
        bad_files.gguf_tensor(f"{i}", (0,), 0, 0) for i in range(15_000))).bytes(),
    "entries.gguf": lambda: bad_files.Gguf(counts=(None, 15_003), entries=tuple(
        bad_files.gguf_entry(f"{i}", 9, struct.pack("<IQ", 8, 0)) for i in range(15_000))).bytes(),
    "texts in an array.gguf": lambda: bad_files.Gguf(counts=(None, 3), entries=(
        bad_files.gguf_entry("k", 9, struct.pack("<IQ", 8, 1_000_000) + bytes(8_000_000)),)).bytes(),
}


@pytest.mark.parametrize("name", sorted(LARGE))
def test_large_bad_headers_cost_little_time_and_memory(tmp_path: Path, name: str) -> None:
    data = LARGE[name]()
    path = tmp_path / name.replace(" ", "_")
    path.write_bytes((struct.pack("<Q", len(data)) if name.endswith(".safetensors") else b"") + data)
    del data
    began = time.process_time()
    with pytest.raises(BadModelFile):
        open_checkpoint(path)
    assert time.process_time() - began < SECONDS
    tracemalloc.start()
    try:
        with pytest.raises(BadModelFile):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()


def test_a_tokenizer_of_256k_pieces_takes_little_memory(tmp_path: Path) -> None:
    """Passed over by length; about 0.03 s on a machine with nothing else to do."""
    pieces = b"".join(bad_files.gguf_text(f"piece {i}") for i in range(256_000))
    scores = struct.pack("<IQ", 6, 256_000) + bytes(4 * 256_000)
    data = bad_files.Gguf(entries=(
        bad_files.gguf_entry("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 256_000) + pieces),
        bad_files.gguf_entry("tokenizer.ggml.scores", 9, scores)),
        tensors=(bad_files.gguf_tensor("a", (4,), 0, 0),), data=32)
    path = tmp_path / "model.gguf"
    path.write_bytes(data.bytes())
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.arrays["tokenizer.ggml.tokens"].stored.length == 256_000
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------- hypothesis

SIZES = st.one_of(st.integers(0, 5), st.sampled_from((32, 64, 256, *bad_files.HUGE)))
LIES = st.sampled_from((0, 0, 0, 0, 0, 0, 1, -1, 8, -8, 32, 2**63))
TEXTS = st.one_of(st.sampled_from(bad_files.NAMES), st.text(max_size=8))


@given(st.lists(st.tuples(TEXTS, st.sampled_from(["F32", "BF16", "U8", "F4", "F8_E4M3", "C64", "F3"]),
                          st.lists(SIZES, max_size=4), LIES, LIES), max_size=5),
       st.dictionaries(TEXTS, TEXTS, max_size=3), LIES, st.booleans())
def test_any_safetensors_file(tmp_path_factory: pytest.TempPathFactory,
                              tensors: list[tuple[str, str, list[int], int, int]], metadata: dict[str, str], tail: int,
                              spaces: bool) -> None:
    """Headers that are true but for lies about places and sizes."""
    bits = {"F32": 32, "BF16": 16, "F4": 4, "C64": 64}
    rows, at = [], 0
    for name, dtype, shape, moved, longer in tensors:
        size = math.prod(shape) * bits.get(dtype, 8) // 8
        rows.append(bad_files.Tensor(name, dtype, tuple(shape), at + moved, at + moved + size + longer))
        at += size
    text = bad_files.header_of(rows, json.dumps(metadata, ensure_ascii=False, indent=1 if spaces else None))
    data = bad_files.safetensors_bytes(text.encode("utf-8", "surrogatepass"), min(max(at + tail, 0), 3000))
    problem = compare(tmp_path_factory.getbasetemp() / "any.safetensors", data, strict_readers.read_safetensors)
    assert problem is None


TYPES = st.sampled_from((0, 1, 2, 8, 9, 12, 24, 30, 36, 42))


@given(st.lists(st.tuples(TEXTS, st.lists(SIZES, max_size=5), TYPES, LIES), max_size=4),
       st.lists(st.tuples(TEXTS, st.integers(0, 13), st.binary(max_size=24)), max_size=3),
       st.sampled_from((None, None, 0, 1, 8, 24, 64)), LIES)
def test_any_gguf_file(tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, list[int], int, int]],
                       entries: list[tuple[str, int, bytes]], alignment: int | None, tail: int) -> None:
    blocks = {number: sizes[1:] for number, sizes in strict_readers.BLOCKS.items()}
    step, at, rows = alignment or 32, 0, []
    for name, dims, kind, moved in tensors:
        rows.append(bad_files.gguf_tensor(name.encode("utf-8", "surrogatepass"), tuple(dims), kind,
                                          (at + moved) % 2**64))
        block, size = blocks.get(kind, (1, 1))
        nbytes = math.prod(dims) // block * size
        at += nbytes + -nbytes % step
    values = [bad_files.gguf_entry(key.encode("utf-8", "surrogatepass"), kind, value) for key, kind, value in entries]
    if alignment is not None:
        values.append(bad_files.gguf_entry("general.alignment", 4, struct.pack("<I", alignment)))
    data = bad_files.Gguf(entries=tuple(values), tensors=tuple(rows), data=min(max(at + tail, 0), 3000), alignment=step)
    problem = compare(tmp_path_factory.getbasetemp() / "any.gguf", data.bytes(), strict_readers.read_gguf)
    assert problem is None
