"""GGUF headers: what gguf-py writes is read as gguf-py reads it; what is damaged is refused with file and field."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from flux_kit.engine.errors import BadModelFile
from flux_kit.engine.weights import gguf_header, open_checkpoint
from flux_kit.engine.weights.gguf_header import TYPES
from gguf_files import random_blocks, write_gguf

MAGIC = b"GGUF"


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def tensor(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf_bytes(tensors: list[bytes] = (), entries: list[bytes] = (), data: int | None = None, version: int = 3,
               counts: tuple[int, int] | None = None, alignment: int = 32) -> bytes:
    n = counts or (len(tensors), len(entries))
    header = MAGIC + struct.pack("<IQQ", version, *n) + b"".join(entries) + b"".join(tensors)
    return header + (b"" if data is None else b"\0" * (-len(header) % alignment + data))


def opened(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return open_checkpoint(path)


def refused(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(BadModelFile) as caught:
        opened(tmp_path, data)
    assert "model.gguf" in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- what opens

def test_tensors_and_metadata_are_what_gguf_py_reads(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux")
    writer.add_string("general.name", "na\u00efve")
    writer.add_bool("a.flag", True)
    writer.add_float32("a.float", 0.5)
    writer.add_int64("an.int", -3)
    writer.add_array("some.texts", ["", "\u00e9", "x" * 5000])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_tensor("plain", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("half", np.arange(4, dtype=np.float16))
    packed = random_blocks("Q4_K", 3, 512)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.add_tensor("whole", np.arange(3, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        assert {name: (info.shape, info.format) for name, info in checkpoint.items()} == {
            "plain": ((2, 3), "F32"), "half": ((4,), "F16"), "packed": ((3, 512), "Q4_K"), "whole": ((3,), "I32")}
        for read in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
            info = checkpoint[read.name]
            assert info.nbytes == read.n_bytes
            assert info.offset == read.data_offset
            assert np.array_equal(info.read().view(torch.uint8).reshape(-1).numpy(), read.data.view(np.uint8).ravel())
        assert torch.equal(checkpoint["packed"].read(), torch.from_numpy(packed).view(-1))
        assert checkpoint.metadata == {"general.architecture": "flux", "general.name": "na\u00efve", "a.flag": "true",
                                       "a.float": "0.5", "an.int": "-3"}
        assert checkpoint.arrays["some.texts"].read() == ["", "\u00e9", "x" * 5000]
        assert checkpoint.arrays["some.numbers"].read().tolist() == [1.5, 2.5]


def test_every_type_has_gguf_s_number_and_size(tmp_path: Path) -> None:
    assert {kind.value: kind.name for kind in gguf.GGMLQuantizationType} == TYPES
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # gguf-py counts 40 bytes; ggml's block is two halves and 32 codes
            info = opened(tmp_path, gguf_bytes([tensor("a", (block, 3), kind.value, 0)], data=3 * size))["a"]
            assert (info.format, info.shape, info.nbytes) == (kind.name, (3, block), 3 * size)


@pytest.mark.parametrize(("number", "name", "block", "size"), [(9, "Q8_1", 32, 36), (41, "Q1_0", 128, 18)])
def test_types_that_no_weights_are_stored_in_open(tmp_path: Path, number: int, name: str, block: int,
                                                  size: int) -> None:
    """llama.cpp keeps activations in one of them; both have sizes, so files with them are well-formed."""
    names = ("img_in.weight", "txt_in.weight", "time_in.in_layer.weight", "vector_in.in_layer.weight")
    step = -(-64 * size // 32) * 32
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([tensor(key, (block, 64), number, i * step) for i, key in enumerate(names)],
                                data=4 * step))
    with open_checkpoint(path) as checkpoint:
        assert {(info.format, info.shape, info.nbytes) for info in checkpoint.values()} == {
            (name, (64, block), 64 * size)}
        assert checkpoint["img_in.weight"].read().shape == (64 * size,)


@pytest.mark.parametrize(("number", "name"), sorted(gguf_header.REMOVED.items()))
def test_types_that_ggml_has_dropped_are_refused_by_name(tmp_path: Path, number: int, name: str) -> None:
    """As llama.cpp refuses them: they have no size there any more."""
    message = refused(tmp_path, gguf_bytes([tensor("a", (32,), number, 0)], data=128))
    assert f"'a' is stored as {name}, a type that ggml has dropped" in message
    assert "Q4_K" in message  # what to use


def test_alignment_may_be_nothing_but_a_number_of_32_bits(tmp_path: Path) -> None:
    for kind, value in ((8, text("32")), (9, struct.pack("<IQI", 4, 1, 32)), (5, struct.pack("<i", 32))):
        assert "general.alignment" in refused(tmp_path, gguf_bytes(entries=[entry("general.alignment", kind, value)]))


def test_texts_too_long_to_keep_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_TEXT_BYTES", 10)
    checkpoint = opened(tmp_path, gguf_bytes(entries=[
        entry("a", 8, text("12345")), entry("b", 8, text("1234567890")), entry("c", 8, text("é"))]))
    assert checkpoint.metadata == {"a": "12345"}
    assert checkpoint.arrays["b"].read() == ["1234567890"]
    assert checkpoint.arrays["c"].read() == ["é"]


def test_oddities_that_are_well_formed(tmp_path: Path) -> None:
    assert len(opened(tmp_path, gguf_bytes())) == 0
    assert len(opened(tmp_path, gguf_bytes(version=2))) == 0
    assert opened(tmp_path, gguf_bytes([tensor("", (), 0, 0)], data=4))[""].shape == ()
    odd = opened(tmp_path, gguf_bytes([tensor("../../\0\n\u202e", (0, 4), 0, 0), tensor("b", (1,), 0, 0)], data=4))
    assert odd["../../\0\n\u202e"].read().shape == (4, 0)
    assert odd["b"].read().tolist() == [0]
    # the last tensor's padding may be missing, or more may follow
    assert len(opened(tmp_path, gguf_bytes([tensor("a", (3,), 0, 0)], data=12))) == 1
    assert len(opened(tmp_path, gguf_bytes([tensor("a", (3,), 0, 0)], data=100))) == 1
    for alignment in (1, 8, 4096):
        data = gguf_bytes([tensor("a", (3,), 0, 0), tensor("b", (1,), 0, -(-12 // alignment) * alignment)],
                          [entry("general.alignment", 4, struct.pack("<I", alignment))], 2 * max(alignment, 16),
                          alignment=alignment)
        assert opened(tmp_path, data)["b"].read().tolist() == [0]


@pytest.mark.parametrize("tokens", [256_000])
def test_a_large_tokenizer_is_passed_over(tmp_path: Path, tokens: int) -> None:
    words = [f"\u2581word{i}" for i in range(tokens)]
    path = write_gguf(tmp_path / "model.gguf", {"a": torch.zeros(3)}, "t5encoder", {
        "tokenizer.ggml.tokens": words, "tokenizer.ggml.scores": [0.0] * tokens})
    began = time.process_time()
    checkpoint = open_checkpoint(path)
    assert time.process_time() - began < 0.3  # 0.03 s where nothing else runs
    assert checkpoint.arrays["tokenizer.ggml.tokens"].read() == words
    assert len(checkpoint.arrays["tokenizer.ggml.scores"].read()) == tokens


# ------------------------------------------------------------------------------------------------- what is refused

T0 = tensor("a", (32,), 0, 0)
HUGE = 2**63
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic"),
    "another file": (b"PK\x03\x04" + b"\0" * 20, "pickle"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", r"Rename it to \.safetensors"),
    "old version": (gguf_bytes(version=1), "version"),
    "new version": (gguf_bytes(version=4), "version"),
    "big endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (gguf_bytes(counts=(HUGE, 0)), "number of tensors"),
    "more tensors than bytes": (gguf_bytes(counts=(1000, 0)), "number of tensors"),
    "many entries": (gguf_bytes(counts=(0, HUGE)), "number of metadata entries"),
    "long key": (gguf_bytes(entries=[struct.pack("<Q", HUGE) + b"a" * 20]), "key of metadata entry 0"),
    "key of no text": (gguf_bytes(entries=[entry(b"\xff", 0, b"\0")]), "UTF-8"),
    "unknown kind": (gguf_bytes(entries=[entry("k", 13, b"\0" * 8)]), "13 is not a type"),
    "key twice": (gguf_bytes(entries=[entry("k", 0, b"\0"), entry("k", 0, b"\0")]), "'k'; found stands twice"),
    "key twice, once an array": (gguf_bytes(entries=[
        entry("k", 9, struct.pack("<IQ", 0, 0)), entry("k", 0, b"\0")]), "stands twice"),
    "array of arrays": (gguf_bytes(entries=[entry("k", 9, struct.pack("<IQ", 9, 1) + b"\0" * 20)]), "elements"),
    "long array": (gguf_bytes(entries=[entry("k", 9, struct.pack("<IQ", 10, HUGE))]), "'k'"),
    "array of 2^61 numbers": (gguf_bytes(entries=[entry("k", 9, struct.pack("<IQ", 10, 2**61))]), "'k'"),
    "many strings": (gguf_bytes(entries=[entry("k", 9, struct.pack("<IQ", 8, HUGE))]), "texts in arrays"),
    "string past the end": (gguf_bytes(entries=[
        entry("k", 9, struct.pack("<IQ", 8, 2) + text("a") + struct.pack("<Q", HUGE))]), "'k'"),
    "alignment 0": (gguf_bytes(entries=[entry("general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
    "alignment 3": (gguf_bytes(entries=[entry("general.alignment", 4, struct.pack("<I", 3))]), "power of two"),
    "alignment of 64 bits": (gguf_bytes(entries=[entry("general.alignment", 10, struct.pack("<Q", 32))]), "power of"),
    "tensor twice": (gguf_bytes([T0, tensor("a", (32,), 0, 128)], data=256), "'a'; found stands twice"),
    "five sizes": (gguf_bytes([tensor("a", (1,) * 5, 0, 0)], data=4), "at most 4"),
    "size overflow": (gguf_bytes([tensor("a", (2**32, 2**32), 0, 0)], data=4), "63 bits"),
    "size overflow beside 0": (gguf_bytes([tensor("a", (0, 2**63), 0, 0)], data=4), "63 bits"),
    "unknown type": (gguf_bytes([tensor("a", (32,), 77, 0)], data=128), "not known"),
    "removed type": (gguf_bytes([tensor("a", (32,), 36, 0)], data=128), "IQ4_NL_4_4"),
    "part of a block": (gguf_bytes([tensor("a", (33, 32), 8, 0)], data=4096), "multiple of the 32"),
    "scalar of blocks": (gguf_bytes([tensor("a", (), 8, 0)], data=4096), "multiple of the 32"),
    "overlap": (gguf_bytes([T0, tensor("b", (32,), 0, 64)], data=256), "offset of tensor 'b'"),
    "hole": (gguf_bytes([T0, tensor("b", (32,), 0, 256)], data=512), "offset of tensor 'b'"),
    "offset past the end": (gguf_bytes([tensor("a", (32,), 0, HUGE)], data=128), "offset of tensor 'a'"),
    "short data": (gguf_bytes([T0], data=127), "incomplete download"),
    "no data": (gguf_bytes([T0]), "incomplete download"),
}


@pytest.mark.parametrize("case", sorted(DAMAGED))
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    import re

    data, words = DAMAGED[case]
    assert re.search(words, refused(tmp_path, data))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, {"a.weight": (random_blocks("Q4_0", 2, 64), "Q4_0"), "b": torch.zeros(5), "c": torch.zeros(2, 3)},
               "flux", {"tokens": ["one", "two"], "scores": [1.0, 2.0]})
    return path.read_bytes()


def test_truncation_at_every_byte(tmp_path: Path, sound: bytes) -> None:
    needed = len(sound) - 8  # c's 24 bytes are padded to 32
    for length in range(len(sound)):
        if length < needed:
            refused(tmp_path, sound[:length])
        else:
            assert len(opened(tmp_path, sound[:length])) == 3


def gguf_py_reads(path: Path) -> bool:
    try:
        gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError, TypeError):
        return False
    return True


def test_flipped_bytes_never_crash_and_bound_all_tensors(tmp_path: Path, sound: bytes,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(4)
    path = tmp_path / "model.gguf"
    opens = 0
    for _ in range(3000):
        data = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(data))
            data[at] = rng.choice((0, 1, 0xFF, data[at] ^ (1 << rng.randrange(8))))
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(path)
        except BadModelFile as error:
            assert "model.gguf" in str(error)
            continue
        opens += 1
        assert all(info.offset + info.nbytes <= len(data) for info in checkpoint.values())
        assert gguf_py_reads(path)
        checkpoint.close()
    assert 100 < opens < 2900


@pytest.mark.parametrize("make", [
    lambda: gguf_bytes(entries=[entry("k", 9, struct.pack("<IQ", 8, 4_000_000) + b"\0" * 32_000_000)],
                       counts=(0, 2)),
    lambda: gguf_bytes(entries=[entry(str(i), 0, b"\0") for i in range(60_000)], counts=(0, 65_000)),
    lambda: gguf_bytes(tensors=[tensor(str(i), (0,), 0, 0) for i in range(60_000)], counts=(60_001, 0)),
], ids=["strings", "entries", "tensors"])
def test_large_bad_headers_are_refused_soon(tmp_path: Path, make: Callable[[], bytes]) -> None:
    data = make()
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    del data
    began = time.process_time()
    with pytest.raises(BadModelFile):
        open_checkpoint(path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("kind", ["text", "numbers"])
def test_long_values_take_no_memory_to_refuse(tmp_path: Path, kind: str) -> None:
    value = struct.pack("<Q", 200 << 20) if kind == "text" else struct.pack("<IQ", 0, 200 << 20)
    path = tmp_path / "model.gguf"
    with path.open("wb") as file:  # a hole after the header
        file.write(gguf_bytes(entries=[entry("k", 8 if kind == "text" else 9, value)], counts=(0, 3)))
        file.truncate(250 << 20)
    tracemalloc.start()
    with pytest.raises(BadModelFile):
        open_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20


def test_windows_of_any_size_read_the_same(tmp_path: Path, sound: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = opened(tmp_path, sound)
    for window in (16, 37, 64):
        monkeypatch.setattr(gguf_header, "_WINDOW", window)
        part = opened(tmp_path, sound)
        assert dict(part) == dict(whole)
        assert part.metadata == whole.metadata
        assert part.arrays == whole.arrays
        assert part.arrays["tokens"].read() == ["one", "two"]
