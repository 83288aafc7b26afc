"""Files, shards and folders: what opens, what is refused, and what stays open."""

from __future__ import annotations

import errno
import json
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from flux_kit.engine.errors import BadModelFile, FluxKitError, MissingFile
from flux_kit.engine.weights import Checkpoint, open_checkpoint
from safetensors.torch import load_file, save_file

TENSORS = {"a.weight": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.arange(4), "d": torch.zeros(0, 2)}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"format": "pt", "who": "test"})
    return path


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def held_open(path: Path) -> bool:
    return any(os.path.realpath(f"/proc/self/fd/{fd}") == str(path) for fd in os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".SAFETENSORS"])
def test_a_checkpoint_is_a_mapping_of_what_the_file_holds(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    save_file(TENSORS, path, {"format": "pt", "who": "test"})
    with open_checkpoint(path) as checkpoint:
        assert isinstance(checkpoint, Mapping)
        assert checkpoint.path == path
        assert checkpoint.metadata == {"format": "pt", "who": "test"}
        assert set(checkpoint) == set(TENSORS)
        assert len(checkpoint) == 4
        assert "nothing" not in checkpoint
        assert {name: info.format for name, info in checkpoint.items()} == {
            "a.weight": "F32", "b": "BF16", "c": "I64", "d": "F32"}
        for name, expected in load_file(path).items():
            info = checkpoint[name]
            assert info.shape == tuple(expected.shape)
            assert info.nbytes == expected.nbytes
            read = info.read()
            assert read.dtype == expected.dtype
            assert torch.equal(read, expected)


def test_a_string_is_a_path_too(model: Path) -> None:
    with open_checkpoint(str(model)) as checkpoint:
        assert len(checkpoint) == 4


@LINUX
def test_nothing_is_open_before_the_first_read_and_after_the_last_tensor(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert not held_open(model)
    assert not mapped(model)
    kept = checkpoint["a.weight"].read()
    assert mapped(model)
    checkpoint.close()
    checkpoint.close()  # twice is no harm
    assert torch.equal(kept, TENSORS["a.weight"])  # a tensor outlives its checkpoint
    del kept
    assert not mapped(model)
    assert not held_open(model)


def test_a_closed_checkpoint_can_be_read_again(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    checkpoint.close()
    assert torch.equal(checkpoint["c"].read(), TENSORS["c"])
    checkpoint.close()


def test_writing_into_a_tensor_leaves_the_file_alone(model: Path) -> None:
    before = model.read_bytes()
    with open_checkpoint(model) as checkpoint:
        checkpoint["a.weight"].read().mul_(0)
    assert model.read_bytes() == before


def test_a_file_that_changed_between_opening_and_reading_is_refused(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    other = model.with_name("other")
    save_file({"a.weight": torch.randn(30, 4)}, other)
    os.replace(other, model)
    with pytest.raises(BadModelFile, match="changed"):
        checkpoint["a.weight"].read()


def test_memory_that_does_not_hold_the_map_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with open_checkpoint(model) as checkpoint:
        monkeypatch.setattr(mmap, "mmap", none_left)
        with pytest.raises(BadModelFile, match=r"model.safetensors: cannot be mapped .*\(Cannot allocate memory\)"):
            checkpoint["a.weight"].read()


@LINUX
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, suffix: str) -> None:
    """A bad disk, a network that is gone: here the memory of this process, which has nothing at its start."""
    (tmp_path / f"model{suffix}").symlink_to("/proc/self/mem")
    with pytest.raises(BadModelFile, match=f"model{suffix}: cannot be read"):
        open_checkpoint(tmp_path / f"model{suffix}")


# ------------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(BadModelFile, match=r"pickle.*\.safetensors version"):
        open_checkpoint(path)


@pytest.mark.parametrize(("name", "word"), [("model.gguf", "incomplete download"), ("model.onnx", "not a kind"),
                                            ("model", "no suffix"), ("config.json", "not a kind")])
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(BadModelFile, match=word) as error:
        open_checkpoint(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"nothing\.safetensors"):
        open_checkpoint(tmp_path / "nothing.safetensors")


def test_a_link_to_nowhere_is_a_missing_file(tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    try:
        link.symlink_to(tmp_path / "nowhere.safetensors")
    except OSError:
        pytest.skip("no links here")
    with pytest.raises(FluxKitError, match=r"link\.safetensors"):
        open_checkpoint(link)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(BadModelFile, match="regular"):
        open_checkpoint(tmp_path / "pipe.safetensors")


# ------------------------------------------------------------------------------------------------- shards

def write_shards(folder: Path, weight_map: Mapping[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a.weight": TENSORS["a.weight"], "b": TENSORS["b"]}, folder / "m-00001-of-00002.safetensors",
              {"format": "pt"})
    save_file({"c": TENSORS["c"], "d": TENSORS["d"]}, folder / "m-00002-of-00002.safetensors")
    index = folder / "m.safetensors.index.json"
    usual = {"a.weight": "m-00001-of-00002.safetensors", "b": "m-00001-of-00002.safetensors",
             "c": "m-00002-of-00002.safetensors", "d": "m-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map or usual}))
    return index


def check_shards(checkpoint: Checkpoint) -> None:
    assert set(checkpoint) == set(TENSORS)
    assert checkpoint.metadata == {"format": "pt"}
    assert len(checkpoint.files) == 2
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint[name].read(), tensor)


def test_shards_open_by_their_index_and_by_their_folder(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "transformer")
    (tmp_path / "transformer" / "config.json").write_text("{}")
    for path in (index, index.parent):
        with open_checkpoint(path) as checkpoint:
            check_shards(checkpoint)


def test_an_index_may_say_more(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "transformer")
    text = json.loads(index.read_text())
    text = {"a": [1, -2.5e3, None, {"b": [[], {}]}], **text, "metadata": {"total_size": 1, "é\n": "\u2028"}, "z": False}
    index.write_text(" " + json.dumps(text, indent=2) + "\r\n")
    with open_checkpoint(index) as checkpoint:
        check_shards(checkpoint)


FIRST, SECOND = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"
BAD_MAPS = {
    "a shard that is not there": ({"a.weight": FIRST, "b": FIRST, "c": "m-00003.safetensors"}, "shard is missing"),
    "a tensor in another shard": ({"a.weight": SECOND, "b": FIRST, "c": SECOND, "d": SECOND}, "do not belong"),
    "a tensor the index leaves out": ({"a.weight": FIRST, "b": FIRST, "c": SECOND}, "do not belong"),
    "a tensor that is nowhere": ({"a.weight": FIRST, "b": FIRST, "c": SECOND, "d": SECOND, "e": FIRST},
                                 "do not belong"),
    "a name too long for any system": ({"a.weight": FIRST, "b": FIRST, "c": "c" * 300 + ".safetensors"},
                                       "shard is missing"),
    "a parent folder": ({"a": "../secret.safetensors"}, "may not name"),
    "a parent folder within": ({"a": "x/../../secret.safetensors"}, "may not name"),
    "an absolute path": ({"a": "/etc/secret.safetensors"}, "may not name"),
    "a drive": ({"a": "C:secret.safetensors"}, "may not name"),
    "backslashes": ({"a": "..\\secret.safetensors"}, "may not name"),
    "a share": ({"a": "//host/share/secret.safetensors"}, "may not name"),
    "a NUL": ({"a": "x\x00.safetensors"}, "may not name"),
    "a pickle": ({"a": "model.bin"}, "may not name"),
    "an empty name": ({"a": ""}, "may not name"),
}


@pytest.mark.parametrize("kind", sorted(BAD_MAPS))
def test_indexes_that_lie_are_refused(tmp_path: Path, kind: str) -> None:
    weight_map, word = BAD_MAPS[kind]
    save_file({"a": TENSORS["b"]}, tmp_path / "secret.safetensors")
    index = write_shards(tmp_path / "transformer", weight_map)
    with pytest.raises(BadModelFile, match=word) as error:
        open_checkpoint(index)
    assert "weight_map" in str(error.value)


@pytest.mark.parametrize("other", ["./m-00002-of-00002.safetensors", "M-00002-OF-00002.safetensors"])
def test_a_shard_under_two_names_is_refused(tmp_path: Path, other: str) -> None:
    """Its tensors would count twice; where case matters, there is no such file."""
    index = write_shards(tmp_path / "transformer", {"a.weight": FIRST, "b": FIRST, "c": SECOND, "d": other})
    with pytest.raises(BadModelFile, match=r"do not belong|shard is missing"):
        open_checkpoint(index)


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    """Hugging Face's cache keeps files elsewhere, and links to them beside the index."""
    index = write_shards(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    try:
        for name in (FIRST, SECOND, index.name):
            (index.parent / name).rename(tmp_path / "blobs" / f"{name}.blob")
            (index.parent / name).symlink_to(tmp_path / "blobs" / f"{name}.blob")
    except OSError:
        pytest.skip("no links here")
    with open_checkpoint(index.parent) as checkpoint:
        check_shards(checkpoint)


def test_a_link_to_itself_and_a_folder_called_like_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(BadModelFile, match="no model"):
        open_checkpoint(tmp_path / "folder.safetensors")
    try:
        (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    except OSError:
        pytest.skip("no links here")
    with pytest.raises(FluxKitError, match=r"loop\.safetensors"):
        open_checkpoint(tmp_path / "loop.safetensors")


@pytest.mark.parametrize(("shard", "word"), [(b"", "incomplete download"), (b"GGUF\x03\0\0\0" + bytes(24), "GGUF"),
                                             (pickle.dumps([1.0] * 9, 2), "pickle")])
def test_a_damaged_shard_is_named(tmp_path: Path, shard: bytes, word: str) -> None:
    index = write_shards(tmp_path / "transformer")
    (index.parent / SECOND).write_bytes(shard)
    with pytest.raises(BadModelFile, match=word) as error:
        open_checkpoint(index)
    assert SECOND in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}',
                                  b'{"weight_map": {"a": "x.sft", "a": "y.sft"}}', b"\xff\xfe", b"[" * 200_000,
                                  b'{"weight_map":' * 50_000, b"9" * 10_000,
                                  b'{"weight_map":{"a":"x.sft"},"weight_map":{"a":"x.sft"}}',
                                  b'{"metadata":{"a":[1,}],"weight_map":{}}', b'{"weight_map":{}} x',
                                  b'{"metadata":' + b"[" * 50 + b"]" * 50 + b',"weight_map":{}}',
                                  b'{"weight_map":{"\\ud800":"x.sft"}}'])
def test_damaged_indexes_are_refused(tmp_path: Path, text: bytes) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_bytes(text)
    with pytest.raises(BadModelFile, match="index"):
        open_checkpoint(index)


# ------------------------------------------------------------------------------------------------- folders

def test_a_folder_with_one_model_opens(model: Path) -> None:
    (model.parent / "config.json").write_text("{}")
    with open_checkpoint(model.parent) as checkpoint:
        assert checkpoint.path == model


def test_a_folder_with_precision_variants_gives_the_usual_one(model: Path) -> None:
    save_file(TENSORS, model.with_name("model.fp16.safetensors"))
    with open_checkpoint(model.parent) as checkpoint:
        assert checkpoint.path == model


def make_files(names: tuple[str, ...]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            save_file({"a": torch.zeros(1)}, folder / name)
    return make


@pytest.mark.parametrize(("names", "word"), [
    ((), "no model"), (("ae.safetensors", "flux1-dev.safetensors"), "several models"),
    (("pytorch_model.bin",), "pickles"), (("model_index.json", "notes.txt"), "whole pipeline")])
def test_folders_without_one_clear_model_are_refused(tmp_path: Path, names: tuple[str, ...], word: str) -> None:
    make_files(names)(tmp_path)
    with pytest.raises(BadModelFile, match=word):
        open_checkpoint(tmp_path)
