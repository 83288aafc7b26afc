"""Where tokenizers are looked for, in which order, and what is said when there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit.engine.errors import BadInput, BadModelFile, MissingFile
from flux_kit.engine.text import ClipTokenizer, T5Tokenizer, find_tokenizer
from flux_kit.engine.weights.containers import open_checkpoint

CACHE_NAMES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty Hugging Face cache of the test's own."""
    for name in CACHE_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


@pytest.fixture
def t5_rows(kit: Any) -> int:
    return int(kit.t5_tokenizer().size)


def marked(kit: Any, mark: str) -> str:
    """A T5 tokenizer.json that tells where it came from: the text of its last piece."""
    tree = json.loads(kit.t5_json())
    tree["model"]["vocab"][-1][0] = f"[{mark}]"
    return json.dumps(tree)


def mark_of(tokenizer: T5Tokenizer) -> str:
    vocab = tokenizer.vocabulary.backend.get_vocab()
    return next(token[1:-1] for token in vocab if token.startswith("[") and len(token) > 1)


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def test_order(kit: Any, tmp_path: Path, cache: Path) -> None:
    """All places filled; each is taken away in turn and the next one counts."""
    rows = len(json.loads(kit.t5_json())["model"]["vocab"])
    models, extra = tmp_path / "pipe" / "text_encoder_2", tmp_path / "extra"
    file = models / "enc.safetensors"
    metadata = {"t5.tokenizer.json": marked(kit, "own key"), "tokenizer.json": marked(kit, "key")}
    snapshots = cache / "models--black-forest-labs--FLUX.1-dev" / "snapshots"
    places = {
        "stem": models / "enc.tokenizer.json",
        "beside": models / "tokenizer.json",
        "inner": models / "tokenizer_2" / "tokenizer.json",
        "sibling": models.parent / "tokenizer_2" / "tokenizer.json",
        "extra": extra / "tokenizer.json",
        "google": cache / "models--google--t5-v1_1-xxl" / "snapshots" / "aaa" / "tokenizer.json",
        "main": snapshots / "bbb" / "tokenizer_2" / "tokenizer.json",
        "other": snapshots / "aaa" / "tokenizer_2" / "tokenizer.json",
    }
    write(snapshots.parent / "refs" / "main", "bbb")
    for mark, path in places.items():
        write(path, marked(kit, mark))

    def found() -> str:
        return mark_of(find_tokenizer("t5", file, [extra]))

    kit.write_weights(file, "t5", rows, metadata)
    assert found() == "own key"
    kit.write_weights(file, "t5", rows, {"tokenizer.json": metadata["tokenizer.json"]})
    assert found() == "key"
    kit.write_weights(file, "t5", rows)
    for mark, path in places.items():
        assert found() == mark
        path.unlink()
    with pytest.raises(MissingFile):
        found()


def test_spiece_in_the_file_and_beside(kit: Any, tmp_path: Path, t5_rows: int) -> None:
    data = kit.spiece()
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    inside = kit.write_weights(tmp_path / "a" / "enc.safetensors", "t5", t5_rows, spiece_model=tensor)
    beside = kit.write_weights(tmp_path / "b" / "enc.safetensors", "t5", t5_rows)
    write(beside.parent / "spiece.model", data)
    for path in (inside, beside):
        tokenizer = find_tokenizer("t5", path)
        assert isinstance(tokenizer, T5Tokenizer)
        text = "the (\u043a\u043e\u0442:1.2)"
        assert tokenizer.tokenize(text) == kit.t5_tokenizer().tokenize(text)
    with open_checkpoint(inside) as checkpoint:
        assert find_tokenizer("t5", checkpoint).size == t5_rows
        assert checkpoint["shared.weight"].read().shape == (t5_rows, 4)  # still open


def test_clip_pair_and_pipeline_folder(kit: Any, tmp_path: Path) -> None:
    file = kit.write_weights(tmp_path / "text_encoder" / "model.safetensors", "clip_l", kit.clip_tokenizer().size)
    vocab, merges = kit.clip_files()
    write(tmp_path / "tokenizer" / "vocab.json", vocab)
    with pytest.raises(MissingFile, match=r"merges\.txt is not beside it"):
        find_tokenizer("clip_l", file)
    write(tmp_path / "tokenizer" / "merges.txt", merges)
    for weights in (file, file.parent):
        tokenizer = find_tokenizer("clip_l", weights)
        assert isinstance(tokenizer, ClipTokenizer) and tokenizer.ids("the") == kit.clip_tokenizer().ids("the")


def test_both_roles_in_one_folder(kit: Any, tmp_path: Path, t5_rows: int) -> None:
    """A flat models folder: CLIP's tokenizer.json is passed over for T5, and named when nothing else is there."""
    clip = kit.clip_tokenizer()
    t5_file = kit.write_weights(tmp_path / "t5.safetensors", "t5", t5_rows)
    clip_file = kit.write_weights(tmp_path / "clip.safetensors", "clip_l", clip.size)
    write(tmp_path / "tokenizer.json", clip.vocabulary.backend.to_str())
    assert find_tokenizer("clip_l", clip_file).ids("the blue") == clip.ids("the blue")
    with pytest.raises(MissingFile, match=r"holds BPE, T5 needs Unigram"):
        find_tokenizer("t5", t5_file)
    write(tmp_path / "spiece.model", kit.spiece())
    assert find_tokenizer("t5", t5_file).ids("ra") == kit.t5_tokenizer().ids("ra")


def test_all_in_one(kit: Any, tmp_path: Path, t5_rows: int) -> None:
    clip = kit.clip_tokenizer()
    metadata = {"t5.tokenizer.json": kit.t5_json(), "clip_l.tokenizer.json": clip.vocabulary.backend.to_str()}
    file = tmp_path / "all.safetensors"
    kit.write_weights(
        file, "clip_l", clip.size, metadata, **{"t5xxl.transformer.shared.weight": torch.zeros(t5_rows, 4)}
    )
    assert isinstance(find_tokenizer("t5", file), T5Tokenizer)
    assert isinstance(find_tokenizer("clip_l", file), ClipTokenizer)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_cache_variables(
    kit: Any, tmp_path: Path, t5_rows: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(name, str(tmp_path / "elsewhere"))
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}.get(name, "")
    write(
        tmp_path / "elsewhere" / below / "models--google--t5-v1_1-xxl" / "snapshots" / "x" / "spiece.model",
        kit.spiece(),
    )
    assert find_tokenizer("t5", kit.write_weights(tmp_path / "t5.safetensors", "t5", t5_rows)).size == t5_rows


def test_missing_says_what_to_do(kit: Any, tmp_path: Path) -> None:
    file = kit.write_weights(tmp_path / "text_encoders" / "t5xxl_fp16.safetensors", "t5", 100)
    with pytest.raises(MissingFile) as error:
        find_tokenizer("t5", file, [tmp_path / "host"])
    said = str(error.value)
    for part in (
        "t5xxl_fp16.safetensors",
        "T5",
        "spiece.model",
        "google/t5-v1_1-xxl",
        str(file.parent),
        "t5xxl_fp16.tokenizer.json",
        str(tmp_path / "host"),
    ):
        assert part in said
    assert error.value.file == str(file) and "\n" not in said
    with pytest.raises(MissingFile, match=r"vocab\.json and merges\.txt"):
        find_tokenizer("clip_l", kit.write_weights(tmp_path / "clip.safetensors", "clip_l", 100))


@pytest.mark.parametrize("rows", [-1, 400])
def test_vocabulary_must_fit(kit: Any, tmp_path: Path, rows: int) -> None:
    """One id too many, or an embedding of more than twice the ids: the tokenizer of another encoder."""
    ids = len(json.loads(kit.t5_json())["model"]["vocab"])
    file = kit.write_weights(
        tmp_path / "t5.safetensors", "t5", ids - 1 if rows < 0 else rows, {"tokenizer.json": kit.t5_json()}
    )
    with pytest.raises(BadModelFile, match="does not belong") as error:
        find_tokenizer("t5", file)
    assert f"{ids} ids" in str(error.value)


def _tensor(kit: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"spiece_model": torch.zeros(16, dtype=dtype)}


@pytest.mark.parametrize(
    "place",
    [
        lambda kit, folder: {"metadata": {"tokenizer.json": "{"}},
        lambda kit, folder: {"metadata": {"tokenizer.json": "[" * 100_000}},
        lambda kit, folder: {"metadata": {"tokenizer.json": kit.t5_json()[:-40]}},
        lambda kit, folder: _tensor(kit, torch.float32),
        lambda kit, folder: _tensor(kit, torch.uint8),
        lambda kit, folder: write(folder / "spiece.model", kit.spiece()[:500]),
        lambda kit, folder: write(folder / "tokenizer.json", b"\xff\xfe\x00"),
        lambda kit, folder: write(folder / "enc.tokenizer.json", ""),
    ],
    ids=range(8),
)
def test_damaged(kit: Any, tmp_path: Path, place: Callable[[Any, Path], dict[str, Any] | None]) -> None:
    """The first tokenizer found counts: a damaged one is named, never skipped."""
    more = place(kit, tmp_path) or {}
    file = kit.write_weights(tmp_path / "enc.safetensors", "t5", 300, **more)
    with pytest.raises(BadModelFile):
        find_tokenizer("t5", file)


def test_unknown_role(kit: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="clip_g"):
        find_tokenizer("clip_g", tmp_path / "nothing.safetensors")
    with pytest.raises(MissingFile):
        find_tokenizer("t5", tmp_path / "nothing.safetensors")
