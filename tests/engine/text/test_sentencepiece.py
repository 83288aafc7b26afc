"""spiece.model against the sentencepiece library itself."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import sentencepiece
from flux_kit.engine.errors import BadModelFile
from flux_kit.engine.text.sentencepiece import read_model
from flux_kit.engine.text.vocabulary import from_spiece
from hypothesis import given, settings
from hypothesis import strategies as st

VARIANTS: dict[str, dict[str, Any]] = {
    "t5": {},
    "identity": {"normalization_rule_name": "identity"},
    "keep spaces": {"remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False},
    "suffix": {"treat_whitespace_as_suffix": True},
    "across words": {"split_by_whitespace": False},
    "byte fallback": {"byte_fallback": True, "vocab_size": 460},
    "own symbols": {"user_defined_symbols": "<sep>,\ufb01x,ko"},
    "casefold": {"normalization_rule_name": "nmt_nfkc_cf"},
}
SPECIAL = ("<pad>", "</s>", "<unk>", "<extra_id_")
PARTS = st.sampled_from(
    [
        "ra",
        "ko",
        "\u043a\u043e\u0442",
        "\u732b",
        "\ufb01",
        "\ufb01x",
        "ß",
        "é",
        "e\u0301",
        "\u2460\u0301",
        "\u2460",
        "\uff76\uff9e",
        "\ufdfa",
        "<sep>",
        " ",
        "  ",
        "\n",
        "\t",
        "\u3000",
        "\u00a0",
        "\u200b",
        "\u0085",
        "\u2581",
        "\u2581\u2581",
        "\u00ad",
        "\uac01",
        "\u1100\u1161\u11a8",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\x00",
        "\x07",
        "Å",
        "½",
    ]
)
TEXTS = st.one_of(
    st.lists(PARTS, max_size=12).map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, kit: Any) -> tuple[Any, Any]:
    data = kit.spiece(**VARIANTS[request.param])
    return sentencepiece.SentencePieceProcessor(model_proto=data), from_spiece(data, "spiece.model")


@given(TEXTS)
@settings(max_examples=150)
def test_same_ids(pair: tuple[Any, Any], text: str) -> None:
    oracle, ours = pair
    if not any(
        token in text for token in SPECIAL
    ):  # written out, these are tokens to us, as they are to transformers
        assert ours.ids(text) == oracle.encode(text)


def test_same_ids_in_whole_sentences(pair: tuple[Any, Any], kit: Any) -> None:
    oracle, ours = pair
    from_training = "the blueko \u043a\u043e\u0442, raing  shi'ser \u732b\u5199 23-1ö " * 40
    assert ours.ids(from_training) == oracle.encode(from_training)


def test_special_tokens_and_sentinels(kit: Any) -> None:
    data = kit.spiece()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data).get_piece_size()
    ours = from_spiece(data, "spiece.model")
    assert [ours.id_of(token) for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert ours.id_of("<extra_id_99>") == pieces and ours.id_of("<extra_id_0>") == pieces + 99  # T5's order
    assert ours.ids("ko</s> ko") == [*ours.ids("ko"), 1, *ours.ids("ko")]
    assert from_spiece(data, "spiece.model", rows=pieces).size == pieces  # no room for sentinels: none


def field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field, short enough for one or two bytes of length."""
    size = bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, len(data) >> 7])
    return bytes([number << 3 | 2]) + size + data


def piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    return field(1, field(1, text) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind]))


def charsmap(data: bytes) -> bytes:
    return GOOD + field(3, field(2, data))


GOOD = piece(b"<unk>", kind=2) + piece(b"a", -1.0)
BAD = {
    "empty": (b"", "no pieces"),
    "no protobuf": (b"\x07" * 40, "wire type"),
    "text": (b'{"model": {"type": "Unigram"}}', "SentencePiece"),
    "too long a field": (field(1, b"abc")[:-1], "truncated"),
    "endless number": (b"\x08" + b"\xff" * 20, "number"),
    "cut number": (GOOD + b"\x0a\x80", "number"),
    "nan": (GOOD + piece(b"b", float("nan")), "finite"),
    "infinite": (GOOD + piece(b"b", float("-inf")), "finite"),
    "no text": (GOOD + piece(b""), "piece"),
    "bad utf-8": (GOOD + piece(b"\xff\xfe"), "UTF-8"),
    "bad kind": (GOOD + piece(b"b", kind=9), "type"),
    "twice": (GOOD + piece(b"a"), "twice"),
    "no unknown": (piece(b"a"), "unknown"),
    "bpe": (GOOD + field(2, bytes([3 << 3, 2])), "unigram"),
    "map cut": (charsmap(b"\x00\x10\x00\x00" + b"\0" * 50), "character map"),
    "map odd": (charsmap(b"\x05\x00\x00\x00" + b"\0" * 50), "character map"),
    "map out of bounds": (charsmap(struct.pack("<I", 1024) + b"\xff\xff\xff\x7f" * 256 + b"\0"), "outside"),
    "map no utf-8": (charsmap(struct.pack("<I", 1024) + b"\0" * 1024 + b"\xff\0"), "UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    data, said = BAD[name]
    with pytest.raises(BadModelFile, match=said) as error:
        from_spiece(data, "/somewhere/spiece.model")
    assert str(error.value).startswith("spiece.model: ") and error.value.file == "/somewhere/spiece.model"


def test_good_by_hand() -> None:
    assert from_spiece(GOOD, "spiece.model").ids("aba") == [0, 1, 0, 1]
    assert read_model(GOOD, "spiece.model").add_dummy_prefix  # the defaults of the format


@given(data=st.data())
@settings(max_examples=80)
def test_damaged_bytes(kit: Any, data: st.DataObject) -> None:
    """Any cut or change of bytes: refused by name, or a model that still works within its bounds."""
    raw = bytearray(kit.spiece())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    for _ in range(data.draw(st.integers(1, 4)) if raw else 0):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        vocabulary = from_spiece(bytes(raw), "spiece.model")
    except BadModelFile:
        return
    found = vocabulary.ids("ra \u2460\u0301 \u043a\u043e\u0442 \ufb01 \uff76\uff9e \u732b \u3000 x")
    assert all(0 <= i < vocabulary.size for i in found)
