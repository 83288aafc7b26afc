"""CLIP and T5 rows: files, chunks, lengths. transformers' own classes are the oracle for ids."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from flux_kit.engine.errors import BadInput, BadModelFile
from flux_kit.engine.text.tokenizer import ClipTokenizer, T5Tokenizer, Token
from flux_kit.engine.text.vocabulary import from_tokenizer_json, from_vocab_and_merges
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import CLIPTokenizerFast

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(
        st.sampled_from(
            [
                "the",
                "Blue",
                "\u041a\u041e\u0422",
                "\u732b",
                "\ufb01",
                "e\u0301",
                "'s",
                "'LL",
                "12",
                " ",
                "\n\t",
                "\u00a0",
                "\U0001f469\u200d\U0001f469\u200d\U0001f467",
                "!?",
                "<|endoftext|>",
                "\u0130",
                "ß",
            ]
        ),
        max_size=14,
    ).map("".join),
)


@pytest.fixture(scope="module")
def clip_oracle(kit: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("clip")
    vocab, merges = kit.clip_files()
    (folder / "vocab.json").write_bytes(vocab)
    (folder / "merges.txt").write_bytes(merges)
    return CLIPTokenizerFast.from_pretrained(folder)


@given(TEXTS)
@settings(max_examples=200)
def test_clip_ids(kit: Any, clip_oracle: Any, text: str) -> None:
    assert kit.clip_tokenizer().ids(text) == clip_oracle(text, add_special_tokens=False)["input_ids"]


@given(TEXTS)
def test_clip_tokenizer_json_is_the_same(kit: Any, clip_oracle: Any, text: str) -> None:
    """What the oracle saves as tokenizer.json reads like the pair of files it was made from."""
    saved = ClipTokenizer(from_tokenizer_json(json.loads(clip_oracle.backend_tokenizer.to_str()), "tokenizer.json"))
    assert saved.tokenize(text.replace("(", "")) == kit.clip_tokenizer().tokenize(text.replace("(", ""))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_t5_tokenizer_json(kit: Any, text: str) -> None:
    ours = T5Tokenizer(from_tokenizer_json(json.loads(kit.t5_json()), "tokenizer.json"))
    assert [*ours.ids(text), 1] == Tokenizer.from_str(kit.t5_json()).encode(text).ids


def test_settings_in_the_file_do_not_change_ids(kit: Any) -> None:
    """Truncation, padding and dropout are the library's own business, not the prompt's."""
    tree = json.loads(kit.clip_tokenizer().vocabulary.backend.to_str())
    tree["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tree["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    tree["model"]["dropout"] = 0.9
    text = "the blueko circle raing shi"
    assert from_tokenizer_json(tree, "tokenizer.json").ids(text) == kit.clip_tokenizer().ids(text)


# --- chunks of CLIP


def test_clip_frames(kit: Any) -> None:
    clip = kit.clip_tokenizer()
    (row,) = clip.tokenize("the (blue:1.5)")
    the, blue = clip.ids("the"), clip.ids("blue")
    assert len(row) == 77 and row[0] == Token(clip.bos, 1.0)
    assert row[1 : 1 + len(the) + len(blue)] == [Token(i, 1.0) for i in the] + [Token(i, 1.5) for i in blue]
    assert set(row[1 + len(the) + len(blue) :]) == {Token(clip.eos, 1.0)}
    assert clip.tokenize("") == [[Token(clip.bos), *[Token(clip.eos)] * 76]]


@pytest.mark.parametrize(
    ("segments", "lengths"),
    [
        ([75], [75]),
        ([76], [75, 1]),
        ([150], [75, 75]),
        ([151], [75, 75, 1]),
        ([1000], [75] * 13 + [25]),
        ([70, 6], [70, 6]),  # a short segment moves on whole
        ([70, 7, 69], [70, 75, 1]),  # the long one after it fills the chunk and is cut
        ([70, 8], [75, 3]),  # eight tokens may be cut
        ([75, 1], [75, 1]),
        ([70, 5], [75]),
        ([70, 5, 3], [75, 3]),
    ],
)
def test_clip_chunks(kit: Any, segments: list[int], lengths: list[int]) -> None:
    clip = kit.clip_tokenizer()
    (one,) = clip.ids("1")
    prompt = "".join(f"({'1' * n}:1.{i + 1})" for i, n in enumerate(segments))
    rows = clip.tokenize(prompt)
    inner = [[token for token in row[1:] if token.id == one] for row in rows]
    assert [len(tokens) for tokens in inner] == lengths and all(len(row) == 77 for row in rows)
    weights = [token.weight for tokens in inner for token in tokens]
    assert weights == [float(f"1.{i + 1}") for i, n in enumerate(segments) for _ in range(n)]
    for row, n in zip(rows, lengths, strict=True):
        assert row[0] == Token(clip.bos) and row[1 + n :] == [Token(clip.eos)] * (76 - n)


@given(st.lists(st.integers(1, 120), max_size=8), st.integers(3, 77))
def test_clip_chunks_lose_nothing(kit: Any, segments: list[int], length: int) -> None:
    clip = kit.clip_tokenizer()
    rows = clip.tokenize("".join(f"({'1' * n}:1.5)" for n in segments), length)
    assert all(len(row) == length for row in rows)
    assert sum(token.weight == 1.5 for row in rows for token in row) == sum(segments)


def test_clip_without_room(kit: Any) -> None:
    with pytest.raises(BadInput, match="at least 3"):
        kit.clip_tokenizer().tokenize("a", 2)


# --- lengths of T5


@pytest.mark.parametrize(
    ("words", "length", "expected"),
    [
        (0, None, 256),
        (10, None, 256),
        (255, None, 256),
        (256, None, 257),
        (1000, None, 1001),
        (0, 128, 128),
        (10, 128, 128),
        (127, 128, 128),
        (128, 128, 128),
        (1000, 256, 256),
        (1000, 512, 512),
        (3, 1, 1),
    ],
)
def test_t5_lengths(kit: Any, words: int, length: int | None, expected: int) -> None:
    t5 = kit.t5_tokenizer()
    (one,) = set(t5.ids("\u043a\u043e\u0442"))
    row = t5.tokenize("\u043a\u043e\u0442 " * words, length)
    kept = min(words, expected - 1)
    assert [token.id for token in row] == [one] * kept + [t5.eos] + [t5.pad] * (expected - kept - 1)


def test_t5_says_what_it_cut(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    t5 = kit.t5_tokenizer()
    with caplog.at_level(logging.WARNING):
        t5.tokenize("\u043a\u043e\u0442 " * 127, 128)
        assert not caplog.records
        t5.tokenize("\u043a\u043e\u0442 " * 127 + "blue circle", 128)
    assert "128" in caplog.text and "blue circle" in caplog.text


@pytest.mark.parametrize("length", [0, -1, 4097, 1.5, "256", True])
def test_t5_bad_length(kit: Any, length: Any) -> None:
    with pytest.raises(BadInput, match="128, 256, 512"):
        kit.t5_tokenizer().tokenize("a", length)


def test_segments_are_read_alone(kit: Any) -> None:
    """`un(happy)` is two words to T5, each with the space that begins a word."""
    t5 = kit.t5_tokenizer()
    assert [token.id for token in t5.tokenize("ra(ko:1.2)")][:-1][:4] == (
        t5.ids("ra") + t5.ids("ko") + [t5.eos, t5.pad]
    )[:4]
    assert t5.ids("ra\u043a\u043e") != t5.ids("ra") + t5.ids("\u043a\u043e")


# --- damaged files


def _vocab(change: dict[str, Any] | None = None, drop: str | None = None) -> Any:
    def edit(vocab: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in {**vocab, **(change or {})}.items() if key != drop}

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_vocab({"x": -1}), "token -> id"),
        (_vocab({"x": True}), "token -> id"),
        (_vocab({"x": "1"}), "token -> id"),
        (_vocab({"x": 1 << 40}), "token -> id"),
        (_vocab({"xx": 0}), "twice"),
        (_vocab(drop="<|endoftext|>"), "endoftext"),
        (_vocab(drop="th"), "belong together"),
        (lambda vocab: [*vocab], "token -> id"),
    ],
)
def test_bad_vocab_json(kit: Any, edit: Any, said: str) -> None:
    vocab, merges = kit.clip_files()
    with pytest.raises(BadModelFile, match=said) as error:
        from_vocab_and_merges(json.dumps(edit(json.loads(vocab))).encode(), merges, Path("/x/vocab.json"))
    assert error.value.file == "/x/vocab.json"


@pytest.mark.parametrize("merges", [b"#version: 0.2\nalone\n", b"a b c\n", b" a\n", b"\xff\xfe\n", b"zzz yyy\n"])
def test_bad_merges(kit: Any, merges: bytes) -> None:
    with pytest.raises(BadModelFile):
        from_vocab_and_merges(kit.clip_files()[0], merges, "merges.txt")


def test_windows_line_ends(kit: Any) -> None:
    vocab, merges = kit.clip_files()
    ours = from_vocab_and_merges(vocab, merges.replace(b"\n", b"\r\n"), "merges.txt")
    assert ours.ids("the blue circle") == kit.clip_tokenizer().ids("the blue circle")


def _t5(**change: Any) -> Any:
    return lambda tree: {**tree, **change}


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: [],
        lambda tree: {},
        _t5(model=None),
        _t5(model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}),
        _t5(model={"type": "Unigram", "vocab": [], "unk_id": None}),
        _t5(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5}),
        _t5(model={"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 0}),
        _t5(model={"type": "BPE", "vocab": {}, "merges": []}),
        _t5(normalizer={"type": "Unheard"}),
        _t5(normalizer={"type": "Precompiled", "precompiled_charsmap": "!!"}),
        _t5(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAQAAAAA"}],
            }
        ),
        _t5(normalizer={"type": "Precompiled", "precompiled_charsmap": 7}),
        _t5(added_tokens=7),
    ],
    ids=range(13),
)
def test_bad_tokenizer_json(kit: Any, edit: Any) -> None:
    with pytest.raises(BadModelFile) as error:
        from_tokenizer_json(edit(json.loads(kit.t5_json())), "/x/tokenizer.json")
    assert str(error.value).startswith("tokenizer.json: ")


def test_wrong_kind_and_missing_special_tokens(kit: Any) -> None:
    with pytest.raises(BadModelFile, match="clip_l"):
        ClipTokenizer(kit.t5_tokenizer().vocabulary)
    with pytest.raises(BadModelFile, match="t5"):
        T5Tokenizer(kit.clip_tokenizer().vocabulary)
    tree = json.loads(kit.t5_json())
    tree["model"]["vocab"][1][0] = "<end>"
    tree["added_tokens"] = []
    tree["post_processor"] = None
    with pytest.raises(BadModelFile, match="</s>"):
        T5Tokenizer(from_tokenizer_json(tree, "tokenizer.json"))
