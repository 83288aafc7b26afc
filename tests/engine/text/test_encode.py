"""Tokens to states with tiny encoders; what the weights do is worked out here from plain runs of the encoders."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from flux_kit.engine.errors import BadInput, BadModelFile, NotFinite
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.text import TextEncoders
from torch import Tensor


@pytest.fixture(scope="module")
def encoders(kit: Any) -> TextEncoders:
    found: TextEncoders = kit.encoders()
    return found


def plain(encoders: TextEncoders, prompt: str, length: int = 256) -> Tensor:
    """T5 on the bare ids of a prompt without brackets, padded by hand."""
    ids = [*encoders.t5_tokenizer.ids(prompt), 1]
    with torch.no_grad():
        out: Tensor = encoders.t5(torch.tensor([ids + [0] * (length - len(ids))]))
    return out


def test_shapes_and_plain_states(encoders: TextEncoders) -> None:
    cond, pooled = encoders.encode("the blue \u043a\u043e\u0442")
    assert cond.shape == (1, 256, 64) and pooled.shape == (1, 64)
    assert cond.dtype == pooled.dtype == torch.float32 and not cond.requires_grad
    torch.testing.assert_close(cond, plain(encoders, "the blue \u043a\u043e\u0442"), rtol=0, atol=0)
    ids = [encoders.clip_tokenizer.bos, *encoders.clip_tokenizer.ids("the blue \u043a\u043e\u0442")]
    with torch.no_grad():
        states, _ = encoders.clip(torch.tensor([ids + [encoders.clip_tokenizer.eos] * (77 - len(ids))]))
    torch.testing.assert_close(pooled, states[:, len(ids)])  # the state at the first end token


@pytest.mark.parametrize("length", [128, 256, 512])
def test_exact_lengths(encoders: TextEncoders, length: int, caplog: pytest.LogCaptureFixture) -> None:
    text = "the \u043a\u043e\u0442"
    torch.testing.assert_close(encoders.encode(text, t5_length=length)[0], plain(encoders, text, length))
    with caplog.at_level(logging.WARNING):
        assert encoders.encode("\u043a\u043e\u0442 " * 600, t5_length=length)[0].shape[1] == length
    assert "cut off" in caplog.text


def test_long_prompts_are_not_cut(encoders: TextEncoders) -> None:
    cond, _ = encoders.encode("\u043a\u043e\u0442 " * 300)
    torch.testing.assert_close(cond, plain(encoders, "\u043a\u043e\u0442 " * 300, 301))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.1, 1.7, -1.0])
def test_weights_in_t5(encoders: TextEncoders, weight: float) -> None:
    """States of weighted words move along the line from the empty prompt; all others stay as they are."""
    before, heavy = encoders.t5_tokenizer.ids("the "), encoders.t5_tokenizer.ids("blue")
    cond, pooled = encoders.encode(f"the (blue:{weight})")
    same, empty = plain(encoders, "the blue"), plain(encoders, "")
    assert [*before, *heavy] == encoders.t5_tokenizer.ids("the blue")
    expected = same.clone()
    at = slice(len(before), len(before) + len(heavy))
    expected[:, at] = empty[:, at] + weight * (same[:, at] - empty[:, at])
    torch.testing.assert_close(cond, expected, rtol=1e-4, atol=1e-5)
    assert (cond[:, at] - same[:, at]).abs().max() > 0.01
    torch.testing.assert_close(pooled, encoders.encode("the blue")[1])  # weights do not reach the pooled vector


def test_weights_at_exact_length(encoders: TextEncoders) -> None:
    cond, _ = encoders.encode("(blue:0)", t5_length=128)
    blue = len(encoders.t5_tokenizer.ids("blue"))
    torch.testing.assert_close(cond[:, :blue], plain(encoders, "", 128)[:, :blue], rtol=1e-4, atol=1e-5)


def test_weight_one_changes_nothing(encoders: TextEncoders) -> None:
    assert torch.equal(encoders.encode("(the blue:1.0)")[0], encoders.encode("the blue")[0])


def test_separate_prompts(encoders: TextEncoders) -> None:
    cond, pooled = encoders.encode("the \u043a\u043e\u0442", "blue circle")
    assert torch.equal(cond, encoders.encode("blue circle")[0])
    assert torch.equal(pooled, encoders.encode("the \u043a\u043e\u0442")[1])
    assert torch.equal(encoders.encode("the \u043a\u043e\u0442", "")[0], encoders.encode("")[0])


def test_empty_prompts(encoders: TextEncoders) -> None:
    tokens = encoders.tokenize("")
    assert [token.id for token in tokens.t5] == [1] + [0] * 255
    assert [token.id for token in tokens.clip[0]] == [encoders.clip_tokenizer.bos] + [
        encoders.clip_tokenizer.eos
    ] * 76
    cond, _ = encoders.encode("")
    torch.testing.assert_close(cond, plain(encoders, ""))


def test_clip_chunks(encoders: TextEncoders) -> None:
    """Chunks are encoded alone and laid in a row; pooled is the first one's, whatever follows."""
    first, rest = "1" * 75, "2" * 20
    tokens = encoders.tokenize(f"({first}:1.0)({rest}:1.0)")
    states, pooled = encoders.encode_clip(tokens.clip)
    assert len(tokens.clip) == 2 and states.shape == (1, 154, 64)
    alone, alone_pooled = encoders.encode_clip(encoders.tokenize(first).clip)
    torch.testing.assert_close(states[:, :77], alone)
    torch.testing.assert_close(states[:, 77:], encoders.encode_clip(encoders.tokenize(rest).clip)[0])
    torch.testing.assert_close(pooled, alone_pooled)
    torch.testing.assert_close(encoders.encode(f"({first}:1.0)({rest}:1.0)")[1], alone_pooled)


def test_weights_in_clip(encoders: TextEncoders) -> None:
    states, _ = encoders.encode_clip(encoders.tokenize("1(2:0.25)").clip)
    same, _ = encoders.encode_clip(encoders.tokenize("12").clip)
    empty, _ = encoders.encode_clip(encoders.tokenize("").clip)
    expected = same.clone()
    expected[:, 2] = empty[:, 2] + 0.25 * (same[:, 2] - empty[:, 2])
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_encoders_give_fp32(kit: Any, encoders: TextEncoders, dtype: torch.dtype) -> None:
    clip, t5 = ClipText(encoders.clip.spec), T5Encoder(encoders.t5.spec)
    clip.load_state_dict(encoders.clip.state_dict())
    t5.load_state_dict(encoders.t5.state_dict())
    half = replace(encoders, clip=clip.to(dtype), t5=t5.to(dtype))
    for ours, full in zip(half.encode("the (blue:1.3)"), encoders.encode("the (blue:1.3)"), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - full).norm() / full.norm() < 0.1


def test_damaged_weights(encoders: TextEncoders) -> None:
    t5 = T5Encoder(encoders.t5.spec)
    t5.load_state_dict(encoders.t5.state_dict())
    with torch.no_grad():
        t5.encoder.final_layer_norm.weight[0] = float("nan")
    with pytest.raises(NotFinite, match="T5"):
        replace(encoders, t5=t5).encode("the \u043a\u043e\u0442")
    with pytest.raises(NotFinite, match="weight in the prompt"):
        encoders.encode("(the:1e39)")


@pytest.mark.parametrize("prompt", ["a\udc80", "(a:nan)"])
def test_unreadable_prompts(encoders: TextEncoders, prompt: str) -> None:
    with pytest.raises(BadInput):
        encoders.encode(prompt)
    with pytest.raises(BadInput):
        encoders.encode("a", prompt)


def test_tokenizers_that_do_not_fit(encoders: TextEncoders) -> None:
    rows = encoders.t5.spec.vocab_size
    for size in (encoders.t5_tokenizer.size - 1, 3 * rows):
        with pytest.raises(BadModelFile, match=f"{size} rows"):
            replace(encoders, t5=T5Encoder(replace(encoders.t5.spec, vocab_size=size)))
    with pytest.raises(BadModelFile, match="end token"):
        replace(encoders, clip=ClipText(replace(encoders.clip.spec, eos_token_id=1)))
    with pytest.raises(BadModelFile, match="pad token"):
        replace(encoders, t5=T5Encoder(replace(encoders.t5.spec, pad_token_id=5)))
