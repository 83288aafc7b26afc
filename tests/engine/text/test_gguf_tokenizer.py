"""Tokenizers in the metadata of GGUF files, written by gguf-py as llama.cpp's converter does, against sentencepiece
and transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
from flux_kit.engine.convert.tokens import from_json
from flux_kit.engine.convert.writers import Array
from flux_kit.engine.errors import BadModelFile, FluxKitError, MissingFile
from flux_kit.engine.text import ClipTokenizer, T5Tokenizer, find_tokenizer
from flux_kit.engine.text.sentencepiece import _fields as protobuf_fields
from flux_kit.engine.text.vocabulary import from_spiece, from_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5TokenizerFast

ROWS = 288
PROMPTS = [
    "",
    " ",
    "ra",
    "the blueko \u043a\u043e\u0442, raing  shi'ser \u732b\u5199 23-1ö",
    "  two  spaces \n\t inside\u3000",
    "\ufb01x \u2460 ½ \uff76\uff9e é e\u0301 \u00ad \u200b",
    "unknown \U0001f469\u200d\U0001f467 \u0e27\u0e07",
    "\u2581typed\u2581",
    "ko" * 60,
    "[PAD250] ra",
]
Value = Any
KEYS = {"model": "t5", "pre": "default", "add_space_prefix": True, "remove_extra_whitespaces": True,
        "add_bos_token": False, "add_eos_token": True, "eos_token_id": 1, "unknown_token_id": 2, "padding_token_id": 0}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty Hugging Face cache, so that nothing but the file counts."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))


def arrays_of(data: bytes, rows: int = ROWS, **options: Any) -> dict[str, Value]:
    """A spiece.model as the converter writes it: padded to the rows of the embedding with unused `[PAD<id>]`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    own = options.get("user_defined_symbols", "").split(",")

    def kind(i: int) -> int:
        asked = (processor.is_unknown, processor.is_control, processor.is_unused, processor.is_byte)
        return next((number for test, number in zip(asked, (2, 3, 5, 6), strict=True) if test(i)),
                    4 if processor.id_to_piece(i) in own else 1)

    count = processor.get_piece_size()
    return {**KEYS, "tokens": [processor.id_to_piece(i) if i < count else f"[PAD{i}]" for i in range(rows)],
            "scores": [processor.get_score(i) if i < count else -10000.0 for i in range(rows)],
            "token_type": [kind(i) if i < count else 5 for i in range(rows)],
            "add_space_prefix": options.get("add_dummy_prefix", True),
            "remove_extra_whitespaces": options.get("remove_extra_whitespaces", True),
            "precompiled_charsmap": _charsmap(data)}


def _charsmap(data: bytes) -> bytes:
    """The bytes of `normalizer_spec.precompiled_charsmap`: fields 3 and 2, each after its length."""
    fields = dict(protobuf_fields(dict(protobuf_fields(data, "spiece"))[3], "spiece"))
    return fields.get(2, b"")


def write(path: Path, keys: Mapping[str, Value], *, rows: int = ROWS, tensor: str = "token_embd.weight",
          prefix: str = "tokenizer.ggml.") -> Path:
    """A GGUF file with an embedding and these entries."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(prefix + key, value)
        elif isinstance(value, int):
            writer.add_uint32(prefix + key, value)
        elif isinstance(value, str):
            writer.add_string(prefix + key, value)
        elif len(value):
            writer.add_array(prefix + key, value)
    writer.add_tensor(tensor, np.zeros((rows, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("options", [
    {}, {"normalization_rule_name": "identity"}, {"remove_extra_whitespaces": False}, {"add_dummy_prefix": False},
    {"user_defined_symbols": "<sep>,ko"}, {"byte_fallback": True, "vocab_size": 460},
], ids=lambda options: "+".join(options) or "t5")
def test_same_ids_as_sentencepiece(kit: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    rows = 600 if "byte_fallback" in options else ROWS
    data = kit.spiece(**options)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = find_tokenizer("t5", write(tmp_path / "t5.gguf", arrays_of(data, rows, **options), rows=rows))
    assert isinstance(ours, T5Tokenizer)
    for text in PROMPTS:
        assert ours.ids(text) == oracle.encode(text), text
    same = T5Tokenizer(from_spiece(data, "spiece.model", rows))
    assert ours.size == same.size and ours.tokenize("the (ko:1.2) ra") == same.tokenize("the (ko:1.2) ra")
    assert ours.ids("ra<extra_id_0></s> ko") == same.ids("ra<extra_id_0></s> ko")


def test_same_ids_as_transformers(kit: Any, tmp_path: Path) -> None:
    """From a tokenizer.json, through the entries of our own quantiser; its text is left out, so the arrays count."""
    written = from_json(kit.t5_json(), ROWS, tmp_path / "src")
    keys: dict[str, Value] = {}
    for key, value in written.items():
        if isinstance(value, Array):
            array = value
            keys[key] = (_texts(array.data) if array.kind == "STRING" else
                         np.frombuffer(array.data, {"F32": "<f4", "I32": "<i4", "U8": "u1"}[array.kind]).tolist())
        elif key != "tokenizer.json":
            keys[key] = value
    ours = find_tokenizer("t5", write(tmp_path / "t5.gguf", keys, prefix=""))
    (tmp_path / "tokenizer.json").write_text(kit.t5_json())
    theirs = T5TokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), extra_ids=0)
    for text in ("ra", "the blueko \u043a\u043e\u0442, raing shi'ser \u732b", "<pad>"):
        assert [*ours.ids(text), ours.eos] == theirs(text).input_ids, text


HOSTS = [path for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]


@pytest.mark.skipif(not HOSTS, reason="COMFYUI_PATH names no ComfyUI checkout")
def test_the_published_vocabulary(kit: Any, tmp_path: Path) -> None:
    """T5's own 32000 pieces and its map of characters, in the rows of T5 XXL, against its fast tokenizer."""
    folder = Path(HOSTS[0], "comfy", "text_encoders", "t5_tokenizer")
    data = kit.spiece_of(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    ours = find_tokenizer("t5", write(tmp_path / "t5.gguf", arrays_of(data, 32128), rows=32128))
    theirs = T5TokenizerFast.from_pretrained(folder)
    assert ours.size == 32100
    for text in [*PROMPTS[2:5], "A photo of a cat, it's 3.14 m high",
                 "na\u00efve caf\u00e9 \u2167 \uff46\uff55\uff4c\uff4c",
                 "Gr\u00f6\u00dfe \u043a\u0440\u0443\u0433", "one<extra_id_3>two"]:
        assert [*ours.ids(text), ours.eos] == theirs(text).input_ids, text


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_damaged_bytes(kit: Any, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any cut or change of the file's bytes: refused by name, or a tokenizer that still works within its bounds."""
    path = tmp_path_factory.mktemp("mutated") / "t5.gguf"
    raw = bytearray(write(path, arrays_of(kit.spiece())).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - ROWS * 128))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[:data.draw(st.integers(len(raw) - 9, len(raw)))])
    try:
        tokenizer = find_tokenizer("t5", path)
    except FluxKitError:
        return
    assert all(0 <= i < max(ROWS, tokenizer.size) for i in tokenizer.ids("ra \u2460 \u043a\u043e\u0442 \ufb01 x"))


def _texts(data: bytes) -> list[str]:
    texts, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at:at + 8], "little")
        texts.append(data[at + 8:at + 8 + size].decode())
        at += 8 + size
    return texts


def test_sentinels_named_in_the_file(kit: Any, tmp_path: Path) -> None:
    """As from a tokenizer with added tokens: they are special whatever kind they are called, and not added again."""
    keys = arrays_of(kit.spiece())
    first = len(kit.t5_tokenizer().vocabulary.backend.get_vocab()) - 100
    for i in range(100):
        keys["tokens"][first + i], keys["token_type"][first + i] = f"<extra_id_{99 - i}>", 4
    ours = find_tokenizer("t5", write(tmp_path / "t5.gguf", keys))
    assert ours.size == first + 100
    assert ours.ids("ra<extra_id_7> ko") == kit.t5_tokenizer().ids("ra<extra_id_7> ko")


@pytest.mark.parametrize("key", ["tokenizer.json", "t5.tokenizer.json", "tokenizer.huggingface.json"])
def test_json_comes_first(kit: Any, tmp_path: Path, key: str) -> None:
    tree = json.loads(kit.t5_json())
    tree["model"]["vocab"][-1][0] = "[here]"
    keys = {f"tokenizer.ggml.{name}": value for name, value in arrays_of(kit.spiece()).items()}
    path = write(tmp_path / "t5.gguf", {**keys, key: json.dumps(tree)}, prefix="")
    assert "[here]" in find_tokenizer("t5", path).vocabulary.backend.get_vocab()


def test_clip(kit: Any, tmp_path: Path) -> None:
    """A tokenizer.json text, and tokens with merges as llama.cpp has them for BPE."""
    clip = kit.clip_tokenizer()
    vocab, merges = kit.clip_files()
    table = json.loads(vocab)
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": sorted(table, key=table.__getitem__),
            "tokenizer.ggml.merges": merges.decode().splitlines()[1:]}
    for entries in (keys, {"tokenizer.json": clip.vocabulary.backend.to_str()}):
        path = write(tmp_path / "clip.gguf", entries, rows=clip.size, prefix="",
                     tensor="text_model.embeddings.token_embedding.weight")
        ours = find_tokenizer("clip_l", path)
        assert isinstance(ours, ClipTokenizer)
        for text in ("the blue circle's", "Shi RA 23", "\u732b \u043a\u043e\u0442"):
            assert ours.tokenize(text) == clip.tokenize(text)
    with pytest.raises(BadModelFile, match="merges"):
        find_tokenizer("clip_l", write(path, {**keys, "tokenizer.ggml.merges": ["a b c"]}, rows=clip.size, prefix="",
                                       tensor="text_model.embeddings.token_embedding.weight"))


def _cut(keys: dict[str, Value], key: str) -> None:
    keys[key] = keys[key][:-1]


DAMAGE = {
    "no scores": (lambda keys: keys.pop("scores"), "ggml.scores"),
    "no tokens": (lambda keys: keys.pop("tokens"), "ggml.tokens"),
    "no kinds": (lambda keys: keys.pop("token_type"), "ggml.token_type"),
    "tokens one value": (lambda keys: keys.update(tokens="ra"), "a single value"),
    "few tokens": (lambda keys: _cut(keys, "tokens"), "ggml.scores"),
    "few scores": (lambda keys: _cut(keys, "scores"), "ggml.scores"),
    "few kinds": (lambda keys: _cut(keys, "token_type"), "ggml.token_type"),
    "scores of integers": (lambda keys: keys.update(scores=[1] * ROWS), "array of F32"),
    "nan": (lambda keys: keys["scores"].__setitem__(9, float("nan")), r"tokens\[9\]"),
    "kind": (lambda keys: keys["token_type"].__setitem__(9, 7), r"tokens\[9\]"),
    "empty text": (lambda keys: keys["tokens"].__setitem__(9, ""), r"tokens\[9\]"),
    "no utf-8": (lambda keys: keys.update(tokens=[b"\xff", *(text.encode() for text in keys["tokens"][1:])]),
                 r"tokens\[0\]"),
    "twice": (lambda keys: keys["tokens"].__setitem__(9, keys["tokens"][8]), "twice"),
    "no unknown": (lambda keys: keys["token_type"].__setitem__(2, 1), "unknown"),
    "end elsewhere": (lambda keys: keys.update(eos_token_id=5), "eos_token_id"),
    "end outside": (lambda keys: keys.update(eos_token_id=1 << 31), "eos_token_id"),
    "charsmap": (lambda keys: keys.update(precompiled_charsmap=b"\1\2\3\4\5"), "character map"),
    "charsmap of words": (lambda keys: keys.update(precompiled_charsmap=["a"]), "precompiled_charsmap"),
    "flag": (lambda keys: keys.update(add_space_prefix="yes"), "add_space_prefix"),
    "too many": (lambda keys: keys.update(_longer(keys)), "does not belong"),
}


def _longer(keys: dict[str, Value]) -> dict[str, Value]:
    """Real pieces beyond the embedding."""
    more = [f"piece {i}" for i in range(8)]
    return {"tokens": keys["tokens"] + more, "scores": keys["scores"] + [-1.0] * 8,
            "token_type": keys["token_type"] + [1] * 8}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged(kit: Any, tmp_path: Path, name: str) -> None:
    """Refused by name, though a good spiece.model lies beside it: the first tokenizer found counts."""
    change, said = DAMAGE[name]
    keys = arrays_of(kit.spiece())
    change(keys)
    (tmp_path / "spiece.model").write_bytes(kit.spiece())
    with pytest.raises(BadModelFile, match=said) as error:
        find_tokenizer("t5", write(tmp_path / "t5.gguf", keys))
    assert str(error.value).startswith("t5.gguf")


@pytest.mark.parametrize(("model", "told"), [("llama", "holds llama"), ("gpt2", "holds BPE"), (None, "holds unknown")])
def test_another_kind_is_passed_over(kit: Any, tmp_path: Path, model: str | None, told: str) -> None:
    keys = arrays_of(kit.spiece())
    keys["model"] = model
    path = write(tmp_path / "t5.gguf", {key: value for key, value in keys.items() if value is not None})
    with pytest.raises(MissingFile, match=rf"{told}, T5 needs Unigram"):
        find_tokenizer("t5", path)
    (tmp_path / "spiece.model").write_bytes(kit.spiece())
    assert find_tokenizer("t5", path).ids("ra ko") == kit.t5_tokenizer().ids("ra ko")


def test_without_a_tokenizer(kit: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "t5.gguf", {})
    with pytest.raises(MissingFile, match=r"Put tokenizer\.json or spiece\.model"):
        find_tokenizer("t5", path)
    (tmp_path / "t5.tokenizer.json").write_text(kit.t5_json())
    same = from_tokenizer_json(json.loads(kit.t5_json()), "here")
    assert find_tokenizer("t5", path).ids("ra ko") == same.ids("ra ko")
