"""Small real vocabularies, trained on the spot: a CLIP-like BPE and T5-like SentencePiece models."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import ClipTextSpec, T5Spec
from flux_kit.engine.text import ClipTokenizer, T5Tokenizer, TextEncoders
from flux_kit.engine.text.vocabulary import from_spiece, from_vocab_and_merges
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@cache
def corpus() -> list[str]:
    draw = random.Random(5)
    syllables = [
        "ra",
        "ko",
        "shi",
        "the",
        "ing",
        "er",
        "blue",
        "cir",
        "cle",
        "é",
        "ö",
        "\u043d\u044f",
        "\u043a\u043e\u0442",
        "\u732b",
        "\u5199",
        "1",
        "23",
        "-",
        ",",
        "'s",
        "\ufb01",
        "ß",
    ]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(300)]
    return [" ".join(draw.choices(words, k=12)) for _ in range(400)]


@cache
def spiece(**options: Any) -> bytes:
    """A unigram model with T5's settings (nmt_nfkc, pad 0, end 1, unknown 2); `options` override them."""
    out = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 200,
        "model_type": "unigram",
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "hard_vocab_limit": False,
        "character_coverage": 0.98,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, **{**settings, **options}
    )
    return out.getvalue()


@cache
def clip_files() -> tuple[bytes, bytes]:
    """vocab.json and merges.txt in CLIP's shape: bytes, bytes that end a word, merges, the two special tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=700,
            end_of_word_suffix="</w>",
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    learned = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" "))
        for merge in json.loads(tokenizer.to_str())["model"]["merges"]
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(char + "</w>" for char in alphabet)])
    merges = []
    for left, right in learned:
        if "\u0120" not in left + right:  # CLIP's words carry no leading space
            tokens[left + right] = None
            merges.append((left, right))
    vocab = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
    merges = [pair for pair in merges if pair[0] in vocab and pair[1] in vocab]
    text = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)
    return json.dumps(vocab).encode(), text.encode()


@cache
def t5_json() -> str:
    """A tokenizer.json in the shape of T5's, from the same pieces."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece())
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("  ", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<pad>", "</s>", "<unk>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return tokenizer.to_str()


def spiece_of(tree: dict[str, Any]) -> bytes:
    """T5's tokenizer.json as the spiece.model it came from: pieces without sentinels, the character map."""

    def number(value: int) -> bytes:
        head = b""
        while value > 127:
            head += bytes([value & 127 | 128])
            value >>= 7
        return head + bytes([value])

    def field(index: int, data: bytes) -> bytes:
        return number(index << 3 | 2) + number(len(data)) + data

    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = [(text, score) for text, score in tree["model"]["vocab"] if not text.startswith("<extra_id_")]
    out = b"".join(
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kinds.get(text, 1)]))
        for text, score in pieces
    )
    maps = [
        part["precompiled_charsmap"] for part in tree["normalizer"]["normalizers"] if "precompiled_charsmap" in part
    ]
    none = number((1 << 64) - 1)
    ids = b"".join(
        number(index << 3) + value for index, value in ((40, b"\2"), (41, none), (42, b"\1"), (43, b"\0"))
    )
    return out + field(2, ids) + field(3, field(2, base64.b64decode(maps[0])))


@cache
def clip_tokenizer() -> ClipTokenizer:
    return ClipTokenizer(from_vocab_and_merges(*clip_files(), "vocab.json"))


@cache
def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(from_spiece(spiece(), "spiece.model"))


def randomized(module: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module.eval().requires_grad_(False)


@cache
def encoders() -> TextEncoders:
    clip_words, t5_words = clip_tokenizer(), t5_tokenizer()
    clip = ClipText(
        ClipTextSpec(
            vocab_size=clip_words.size,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            bos_token_id=clip_words.bos,
            eos_token_id=clip_words.eos,
        )
    )
    t5 = T5Encoder(T5Spec(vocab_size=t5_words.size + 4, d_model=64, num_heads=1, d_ff=96, num_layers=2))
    randomized(clip)
    randomized(t5)
    return TextEncoders(clip, clip_words, t5, t5_words)


@dataclass(frozen=True, repr=False)
class Kit:
    """What the tests of this folder build on, each made once."""

    spiece: Callable[..., bytes] = spiece
    spiece_of: Callable[[dict[str, Any]], bytes] = spiece_of
    clip_files: Callable[[], tuple[bytes, bytes]] = clip_files
    t5_json: Callable[[], str] = t5_json
    clip_tokenizer: Callable[[], ClipTokenizer] = clip_tokenizer
    t5_tokenizer: Callable[[], T5Tokenizer] = t5_tokenizer
    encoders: Callable[[], TextEncoders] = encoders

    def write_weights(
        self, path: Path, role: str, rows: int, metadata: dict[str, str] | None = None, **more: torch.Tensor
    ) -> Path:
        """A file with nothing but the encoder's embedding, which is all that the search looks at."""
        name = {"t5": "shared.weight", "clip_l": "text_model.embeddings.token_embedding.weight"}[role]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.zeros(rows, 4), **more}, path, metadata)
        return path


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()
