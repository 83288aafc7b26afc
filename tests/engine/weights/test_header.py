"""The safetensors header parser against the rules of the format, with the safetensors library as oracle."""

from __future__ import annotations

import json
import math
import pickle
import struct
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import torch
from flux_kit.engine.errors import BadModelFile
from flux_kit.engine.weights import open_checkpoint
from flux_kit.engine.weights.containers import TORCH_DTYPES
from flux_kit.engine.weights.header import BITS, MAX_HEADER_BYTES
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save


def write(path: Path, header: str | bytes, data: bytes = b"", length: int | None = None) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "U8", shape: str = "[1]", offsets: str = "[0, 1]") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# ------------------------------------------------------------------------------------------------- well-formed

@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_of_the_format_opens(file: Path, dtype: str) -> None:
    shape = [4, 6]
    size = math.prod(shape) * BITS[dtype] // 8
    write(file, json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}), bytes(range(size)))
    with safe_open(file, framework="pt") as oracle:  # refuses a size it does not agree with
        assert oracle.get_slice("a").get_dtype() == dtype
    with open_checkpoint(file) as checkpoint:
        info = checkpoint["a"]
        assert (info.format, info.nbytes) == (dtype, size)
        data = info.read()
    if dtype in TORCH_DTYPES and hasattr(torch, TORCH_DTYPES[dtype]):
        assert tuple(data.shape) == (4, 6)
        assert str(data.dtype) == f"torch.{TORCH_DTYPES[dtype]}"
    assert bytes(data.flatten().view(torch.uint8).tolist()) == bytes(range(size))


ODDITIES = {
    "no tensors": "{}",
    "metadata only": '{"__metadata__": {"a": "b"}}',
    "null metadata": '{"__metadata__": null, "a": ' + entry() + "}",
    "padding": '{"a": ' + entry() + "}" + " " * 1000,
    "spaces everywhere": '{ "a" :\n{\t"dtype" : "U8" ,\r"shape" : [ 1 , 1 ] , "data_offsets" : [ 0 , 1 ] } } ',
    "fields in another order": '{"a": {"data_offsets": [0, 1], "shape": [1], "dtype": "U8"}}',
    "unknown field": '{"a": {"dtype": "U8", "why": 1.5e3, "shape": [1], "data_offsets": [0, 1], "x": "y"}}',
    "scalar": '{"a": ' + entry(shape="[]") + "}",
    "empty tensor": '{"e": ' + entry(shape="[0, 7]", offsets="[0, 0]") + ', "a": ' + entry() + "}",
    "empty name": '{"": ' + entry() + "}",
    "hostile names": '{"../../x": ' + entry() + ', "\\u0000\\n": ' + entry(shape="[0]", offsets="[1, 1]")
                     + ', "\\ud83d\\ude00": ' + entry(shape="[0]", offsets="[1, 1]") + "}",
    "tensors out of order": '{"b": ' + entry(offsets="[1, 2]") + ', "a": ' + entry() + "}",
}


@pytest.mark.parametrize("kind", sorted(ODDITIES))
def test_well_formed_oddities_open(file: Path, kind: str) -> None:
    data = b"\x07\x08" if "out of order" in kind else b"\x07" if '"dtype"' in ODDITIES[kind] else b""
    write(file, ODDITIES[kind], data)
    with safe_open(file, framework="pt") as oracle, open_checkpoint(file) as checkpoint:
        assert set(checkpoint) == set(oracle.keys())
        assert checkpoint.metadata == (oracle.metadata() or {})
        for name, info in checkpoint.items():
            assert torch.equal(info.read(), oracle.get_tensor(name))


def test_metadata_text_of_any_length_is_read(file: Path) -> None:
    text = json.dumps({f'piece "{i}" \\ é \U0001f600': i for i in range(40_000)}, ensure_ascii=False)
    write(file, json.dumps({"__metadata__": {"tokenizer.json": text, "é": ""}}, ensure_ascii=False))
    assert open_checkpoint(file).metadata == {"tokenizer.json": text, "é": ""}


def test_data_that_is_not_aligned_is_read_right(file: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(5), "c": torch.randn(2, 2).bfloat16()}
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = bytes(tensor.flatten().view(torch.uint8).tolist())
        dtype = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write(file, json.dumps(header), data)
    with open_checkpoint(file) as checkpoint:
        for name, tensor in tensors.items():
            read = checkpoint[name].read()
            assert torch.equal(read, tensor)
            assert read.data_ptr() % read.dtype.itemsize == 0


# ------------------------------------------------------------------------------------------------- malformed

DEEP = 100_000
REFUSED: dict[str, tuple[str | bytes, bytes, str]] = {
    # kind: header, data, a word of the message
    "space before the brace": (' {"a": ' + entry() + "}", b"\x00", "header start"),
    "not an object": ("[1, 2, 3]", b"", "header start"),
    "no end": ('{"a": ' + entry(), b"\x00", "header"),
    "text after the end": ('{"a": ' + entry() + "} x", b"\x00", "header end"),
    "NUL padding": ('{"a": ' + entry() + "}\x00", b"\x00", "header end"),
    "trailing comma": ('{"a": ' + entry() + ",}", b"\x00", "header"),
    "leading comma": ('{,"a": ' + entry() + "}", b"\x00", "header"),
    "no colon": ('{"a" ' + entry() + "}", b"\x00", "':'"),
    "duplicate name": ('{"a": ' + entry() + ', "a": ' + entry() + "}", b"\x00", "twice"),
    "duplicate name, escaped": ('{"a": ' + entry() + ', "\\u0061": ' + entry() + "}", b"\x00", "twice"),
    "duplicate empty tensor": ('{"a": ' + entry(shape="[0]", offsets="[0, 0]") + ', "a": '
                               + entry(shape="[0]", offsets="[0, 0]") + "}", b"", "twice"),
    "duplicate field": ('{"a": {"dtype": "U8", "dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"\x00",
                        "twice"),
    "duplicate metadata": ('{"__metadata__": {}, "__metadata__": {}}', b"", "twice"),
    "duplicate metadata key": ('{"__metadata__": {"k": "1", "k": "2"}}', b"", "twice"),
    "metadata number": ('{"__metadata__": {"k": 1}}', b"", "__metadata__"),
    "metadata object": ('{"__metadata__": {"k": {}}}', b"", "__metadata__"),
    "metadata list": ('{"__metadata__": ["k"]}', b"", "__metadata__"),
    "unknown dtype": ('{"a": ' + entry("F7") + "}", b"\x00", "dtype"),
    "lower case dtype": ('{"a": ' + entry("u8") + "}", b"\x00", "dtype"),
    "dtype a number": ('{"a": {"dtype": 8, "shape": [1], "data_offsets": [0, 1]}}', b"\x00", "dtype"),
    "no dtype": ('{"a": {"shape": [1], "data_offsets": [0, 1]}}', b"\x00", "dtype"),
    "no shape": ('{"a": {"dtype": "U8", "data_offsets": [0, 1]}}', b"\x00", "shape"),
    "no offsets": ('{"a": {"dtype": "U8", "shape": [1]}}', b"\x00", "data_offsets"),
    "entry a list": ('{"a": []}', b"", "a"),
    "shape a number": ('{"a": ' + entry(shape="1") + "}", b"\x00", "shape"),
    "shape negative": ('{"a": ' + entry(shape="[-1]") + "}", b"\x00", "shape"),
    "shape a float": ('{"a": ' + entry(shape="[1.0]") + "}", b"\x00", "shape"),
    "shape a bool": ('{"a": ' + entry(shape="[true]") + "}", b"\x00", "shape"),
    "shape with a leading zero": ('{"a": ' + entry(shape="[01]") + "}", b"\x00", "a"),
    "shape with a hole": ('{"a": ' + entry(shape="[1,,1]") + "}", b"\x00", "a"),
    "shape with two numbers run together": ('{"a": ' + entry(shape="[1 1]") + "}", b"\x00", "a"),
    "hostile name": ('{"\\n\\u001b' + "x" * 3000 + '": ' + entry(shape="[01]") + "}", b"\x00", "shape"),
    "hostile name, fields in another order": (
        '{"\\n\\u001b' + "x" * 3000 + '": {"shape": [2], "dtype": "U8", "data_offsets": [0, 1]}}', b"\x00", "span"),
    "shape overflows": ('{"a": ' + entry(shape="[4294967296, 4294967296, 4294967296]") + "}", b"\x00", "shape"),
    "shape overflows to the right size": ('{"a": ' + entry(shape="[2, 9223372036854775808]", offsets="[0, 0]") + "}",
                                          b"", "shape"),
    "size of 65 bits": ('{"a": ' + entry(shape="[18446744073709551616]") + "}", b"\x00", "64 bits"),
    "shape too small for the bytes": ('{"a": ' + entry(offsets="[0, 2]") + "}", b"\x00\x00", "data_offsets"),
    "shape too large for the bytes": ('{"a": ' + entry(shape="[2]") + "}", b"\x00", "data_offsets"),
    "half a byte": ('{"a": ' + entry("F4", "[3]", "[0, 1]") + "}", b"\x00", "data_offsets"),
    "offsets backwards": ('{"a": ' + entry(offsets="[1, 0]") + "}", b"\x00", "data_offsets"),
    "one offset": ('{"a": ' + entry(offsets="[1]") + "}", b"\x00", "data_offsets"),
    "three offsets": ('{"a": ' + entry(offsets="[0, 1, 1]") + "}", b"\x00", "data_offsets"),
    "hole at the start": ('{"a": ' + entry(offsets="[1, 2]") + "}", b"\x00\x00", "hole"),
    "hole": ('{"a": ' + entry() + ', "b": ' + entry(offsets="[2, 3]") + "}", b"\x00" * 3, "hole"),
    "overlap": ('{"a": ' + entry("U16", "[1]", "[0, 2]") + ', "b": ' + entry("U16", "[1]", "[1, 3]") + "}",
                b"\x00" * 3, "overlap"),
    "alias": ('{"a": ' + entry() + ', "b": ' + entry() + "}", b"\x00", "overlap"),
    "trailing byte": ('{"a": ' + entry() + "}", b"\x00\x00", "after the last tensor"),
    "data cut": ('{"a": ' + entry("F32", "[2]", "[0, 8]") + "}", b"\x00" * 7, "incomplete download"),
    "not UTF-8": (b'{"\xff": ' + entry().encode() + b"}", b"\x00", "UTF-8"),
    "half a surrogate pair": ('{"\\ud800": ' + entry() + "}", b"\x00", "UTF-8"),
    "control character in a name": ('{"a\nb": ' + entry() + "}", b"\x00", "name"),
    "bad escape": ('{"\\q": ' + entry() + "}", b"\x00", "name"),
    "string without an end": ('{"a', b"", "name"),
    "UTF-16": ('{"a": {}}'.encode("utf-16-le"), b"", "header"),
    "NaN": ('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": NaN}}', b"\x00", "a"),
    "nested field": ('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": {}}}', b"\x00", "a"),
    "deep lists": ('{"a": ' + "[" * DEEP, b"", "a"),
    "deep objects": ('{"a": ' * DEEP, b"", "a"),
    "deep shape": ('{"a": ' + entry(shape="[" * DEEP + "]" * DEEP) + "}", b"\x00", "shape"),
    "deep metadata": ('{"__metadata__": {"a": ' + "[" * DEEP, b"", "__metadata__"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_malformed_files_are_refused_by_name(file: Path, kind: str) -> None:
    header, data, word = REFUSED[kind]
    write(file, header, data)
    with pytest.raises(BadModelFile) as error:
        open_checkpoint(file)
    message = str(error.value)
    assert "model.safetensors" in message
    assert word in message
    assert "\n" not in message
    assert len(message) < 600
    assert error.value.file == str(file)


@pytest.mark.parametrize(("start", "word"), [
    (b"", "incomplete download"), (b"\x10\x00\x00", "incomplete download"), (b"\x00" * 64, "header length"),
    (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "header length"), (b"\xff" * 16, "header length"),
    (b"GGUF\x03\x00\x00\x00" + b"\x00" * 16, "GGUF"), (b"PK\x03\x04\x00\x00\x08\x08" + b"\x00" * 16, "pickle"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
    *((pickle.dumps({"weight": [1.0] * n}, protocol), "pickle.*save_file")
      for protocol in (2, 3, 4, 5) for n in (1, 9)),
    (b"<!DOCTYPE html><html></html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    (struct.pack("<Q", 1000) + b"{" + b" " * 500, "incomplete download"),
])
def test_other_bytes_under_the_suffix_are_named(file: Path, start: bytes, word: str) -> None:
    file.write_bytes(start)
    with pytest.raises(BadModelFile, match=word):
        open_checkpoint(file)


def test_a_cut_download_says_how_much_is_there(file: Path) -> None:
    size = 12_700_000_000
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(4_100_000_000)
    with pytest.raises(BadModelFile, match=r"incomplete download: file 4\.1 GB, header promises 12\.7 GB"):
        open_checkpoint(file)


# ------------------------------------------------------------------------------------------------- damage

SMALL = save({"first.weight": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(2.0, dtype=torch.bfloat16)},
             {"format": "pt"})


def test_a_file_cut_at_any_byte_is_refused(file: Path) -> None:
    for length in range(len(SMALL)):
        file.write_bytes(SMALL[:length])
        with pytest.raises(BadModelFile):
            open_checkpoint(file)


def compare_with_oracle(file: Path, data: bytes) -> bool:
    """Whether `data` opens; what opens must open in the library too, and be the same."""
    file.write_bytes(data)
    try:
        checkpoint = open_checkpoint(file)
    except BadModelFile:
        return False
    oracle = dict(safetensors.deserialize(data))
    assert set(checkpoint) == set(oracle)
    for name, info in checkpoint.items():
        assert list(info.shape) == oracle[name]["shape"]
        assert info.format == oracle[name]["dtype"]
        raw = info.file.view(info.offset, info.nbytes)
        assert bytes(raw.tolist()) == bytes(oracle[name]["data"])
    checkpoint.close()
    return True


def test_any_flipped_bit_of_the_header_is_refused_or_read_as_the_library_reads_it(file: Path) -> None:
    header_end = 8 + int.from_bytes(SMALL[:8], "little")
    opened = 0
    for bit in range(8 * header_end):
        data = bytearray(SMALL)
        data[bit // 8] ^= 1 << bit % 8
        opened += compare_with_oracle(file, bytes(data))
    assert 0 < opened < 4 * header_end  # a name with another letter is a good name


BYTES = st.sampled_from(b'{}[]",:0123456789 \\eEntfU8F.-\x00\xff')


@given(edits=st.lists(st.tuples(st.integers(8, len(SMALL) - 1), BYTES), min_size=1, max_size=4),
       cut=st.integers(0, 3), data=st.data())
def test_edited_headers_never_crash(tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], cut: int,
                                    data: st.DataObject) -> None:
    mutated = bytearray(SMALL)
    for position, byte in edits:
        mutated[position] = byte
    if cut:
        at = data.draw(st.integers(8, len(mutated)))
        del mutated[at:at + cut]
        mutated[:8] = struct.pack("<Q", int.from_bytes(SMALL[:8], "little") - cut)
    compare_with_oracle(tmp_path_factory.getbasetemp() / "edited.safetensors", bytes(mutated))


# ------------------------------------------------------------------------------------------------- bounds

N = 16_000_000
GIANTS = {
    "spaces": b"{" + b" " * N, "a string": b'{"' + b"a" * N, "backslashes": b'{"' + b"\\" * N,
    "lists": b'{"a":' + b"[" * N, "objects": b'{"a":' * (N // 5), "a shape": b'{"a":{"shape":[' + b"1," * (N // 2),
    "commas": b"{" + b"," * N, "a number": b'{"a":{"x":' + b"1" * N,
    "names": b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,1]}' % i for i in range(9)) + b" " * N,
}


@pytest.mark.parametrize("kind", sorted(GIANTS))
def test_a_giant_bad_header_costs_little_memory(file: Path, kind: str) -> None:
    write(file, GIANTS[kind])
    tracemalloc.start()
    try:
        with pytest.raises(BadModelFile):
            open_checkpoint(file)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_twenty_thousand_tensors_open_in_little_memory(file: Path) -> None:
    count = 20_000
    header = "{" + ",".join(f'"t{i}":{entry(offsets=f"[{i}, {i + 1}]")}' for i in range(count)) + "}"
    write(file, header, bytes(count))
    tracemalloc.start()
    try:
        assert len(open_checkpoint(file)) == count
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()
