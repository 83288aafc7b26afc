"""Tokenizers that go along: a file made from an encoder is of use alone, with the ids of the original tokenizer."""

from __future__ import annotations

import io
import random
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import torch
from family import Family, random_weights
from flux_kit.engine.convert import quantize
from flux_kit.engine.convert.tokens import spiece
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import T5Spec
from flux_kit.engine.text import find_tokenizer
from flux_kit.engine.text.sentencepiece import read_model
from flux_kit.engine.weights import load
from safetensors.torch import load_file, save_file

ROWS = 370
PROMPTS = ["", "a large red circle", "  two  spaces \n inside\u3000", "\ufb01ne \u2460 \u00bd \u00e9 e\u0301",
           "\u2581typed", "unknown \U0001f469", "circle" * 30, "red, blue; 23-1"]
VARIANTS: dict[str, dict[str, Any]] = {
    "t5": {}, "identity": {"normalization_rule_name": "identity"}, "keep spaces": {"remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False}, "byte fallback": {"byte_fallback": True, "vocab_size": 360},
    "own symbols": {"user_defined_symbols": "<sep>,cir"}}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nothing"))


@cache
def trained(variant: str) -> bytes:
    """A spiece.model with T5's settings."""
    draw, out = random.Random(3), io.BytesIO()
    parts = ["a", "red", "cir", "cle", "blue", "lar", "ge", "on", "\u00e9", "\ufb01", "1", "23", ","]
    words = ["".join(draw.choices(parts, k=draw.randint(1, 3))) for _ in range(200)]
    settings: dict[str, Any] = {
        "vocab_size": 90, "model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1,
        "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(draw.choices(words, k=10)) for _ in range(200)]), model_writer=out,
        **{**settings, **VARIANTS[variant]})
    return out.getvalue()


def ids(data: bytes) -> list[list[int]]:
    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    return [oracle.encode(prompt) for prompt in PROMPTS]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A T5 without a tokenizer, in a folder of its own."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    spec = T5Spec(vocab_size=ROWS, d_model=64, num_heads=1, d_ff=64, num_layers=1)
    save_file(random_weights(T5Encoder(spec), 3), folder / "t5.safetensors")
    return folder / "t5.safetensors"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_spiece_model_beside_the_file_goes_into_gguf(encoder: Path, tmp_path: Path, variant: str) -> None:
    data = trained(variant)
    (encoder.parent / "spiece.model").write_bytes(data)
    report = quantize(encoder, tmp_path / "t5.gguf", "Q8_0")
    assert not any("tokenizer" in note for note in report.notes)
    tokenizer = find_tokenizer("t5", tmp_path / "t5.gguf")
    assert [tokenizer.ids(prompt) for prompt in PROMPTS] == ids(data)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    if oracle.get_piece_size() + 100 <= ROWS:
        assert tokenizer.vocabulary.id_of("<extra_id_0>") == oracle.get_piece_size() + 99
    about = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "t5.gguf").fields.items()}
    count = oracle.get_piece_size()
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    assert tokens == [oracle.id_to_piece(i) for i in range(count)] + [f"[PAD{i}]" for i in range(count, ROWS)]
    assert about["tokenizer.ggml.scores"][:count] == [oracle.get_score(i) for i in range(count)]
    assert kinds[:3] == [3, 3, 2] and set(kinds[count:]) == {5} and (6 in kinds) == (variant == "byte fallback")
    assert (about["tokenizer.ggml.model"], about["tokenizer.ggml.eos_token_id"]) == ("t5", 1)
    assert about["tokenizer.ggml.add_space_prefix"] == (variant != "no prefix")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_written_anew_is_the_same_to_sentencepiece(variant: str) -> None:
    data = trained(variant)
    again = spiece(read_model(data, "spiece.model"))
    assert ids(again) == ids(data)
    one, other = (sentencepiece.SentencePieceProcessor(model_proto=model) for model in (data, again))
    assert [one.normalize(prompt) for prompt in PROMPTS] == [other.normalize(prompt) for prompt in PROMPTS]


def test_through_safetensors_and_back(encoder: Path, tmp_path: Path) -> None:
    """spiece.model -> GGUF -> scaled fp8 with a tensor `spiece_model` -> GGUF, each of use alone."""
    (encoder.parent / "spiece.model").write_bytes(trained("t5"))
    quantize(encoder, tmp_path / "a.gguf", "Q8_0")
    quantize(tmp_path / "a.gguf", tmp_path / "b.safetensors", "fp8_scaled")
    quantize(tmp_path / "b.safetensors", tmp_path / "c.gguf", "Q4_0")
    kept = bytes(load_file(tmp_path / "b.safetensors")["spiece_model"].tolist())
    assert ids(kept) == ids(trained("t5"))
    for name in ("a.gguf", "b.safetensors", "c.gguf"):
        tokenizer = find_tokenizer("t5", tmp_path / name)
        assert [tokenizer.ids(prompt) for prompt in PROMPTS] == ids(kept), name
        states = load(tmp_path / name, "t5")(torch.tensor([[5, 6, 1]]))
        assert bool(states.isfinite().all()) and float(states.std()) > 0.01
    first, last = ({key: field.contents() for key, field in gguf.GGUFReader(tmp_path / name).fields.items()
                    if key.startswith("tokenizer.")} for name in ("a.gguf", "c.gguf"))
    assert first == last


def test_folders_of_the_host_are_searched(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "spiece.model").write_bytes(trained("t5"))
    quantize(encoder, tmp_path / "t5.gguf", "Q8_0", tokenizer_dirs=[tmp_path / "words"])
    assert find_tokenizer("t5", tmp_path / "t5.gguf").ids(PROMPTS[1]) == ids(trained("t5"))[1]


def test_none_at_all_is_said(encoder: Path, tmp_path: Path) -> None:
    report = quantize(encoder, tmp_path / "t5.gguf", "Q8_0")
    (note,) = [note for note in report.notes if "no tokenizer goes along" in note]
    assert "spiece.model" in note
    assert not any(key.startswith("tokenizer.") for key in gguf.GGUFReader(tmp_path / "t5.gguf").fields)


def test_one_that_does_not_fit_is_said(encoder: Path, family: Family, tmp_path: Path) -> None:
    (encoder.parent / "spiece.model").write_bytes(trained("t5")[:-40])
    report = quantize(encoder, tmp_path / "t5.gguf", "Q8_0")
    assert any("no tokenizer goes along" in note and "spiece.model" in note for note in report.notes)


@pytest.mark.parametrize("number", ["9" * 12, "1" * 5000, "-1"])
def test_numbers_that_gguf_cannot_hold_stay_texts(encoder: Path, tmp_path: Path, number: str) -> None:
    source = tmp_path / "numbers.safetensors"
    save_file(load_file(encoder), source, {"tokenizer.ggml.odd_token_id": number, "tokenizer.ggml.good_token_id": "7"})
    quantize(source, tmp_path / "t5.gguf", "Q8_0")
    fields = gguf.GGUFReader(tmp_path / "t5.gguf").fields
    assert fields["tokenizer.ggml.odd_token_id"].contents() == number
    assert fields["tokenizer.ggml.good_token_id"].contents() == 7
