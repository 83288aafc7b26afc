"""Attention masks of conditionings: resized as a linear map would, and obeyed by the denoiser."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flux_kit.engine.errors import BadInput, NotFinite
from flux_kit.engine.sampling import Denoiser
from flux_kit.engine.sampling.masks import AttentionMask, read_mask

X = torch.randn(2, 16, 6, 7, generator=torch.Generator().manual_seed(11))  # 3 x 4 tokens
SIGMA = torch.tensor([0.6, 0.6])
TEXT = 20


def joined(prompt: Any, other: Any, **options: Any) -> Any:
    """The text of two prompts in one, with the first one's pooled vector."""
    return [[torch.cat((prompt[0][0], other[0][0]), dim=1), {**prompt[0][1], **options}]]


def hiding(first: int, last: int, image: int, value: Any = -math.inf) -> torch.Tensor:
    """Nobody but themselves sees text tokens `first` to `last`."""
    mask = torch.zeros(last + image, last + image)
    mask[:first, first:last] = value
    mask[last:, first:last] = value
    return mask


@pytest.mark.parametrize("old", [(1, 1), (2, 3), (5, 4)])
@pytest.mark.parametrize("new", [(1, 1), (3, 4), (7, 2)])
def test_resizing_is_one_linear_map_on_queries_and_keys(old: tuple[int, int], new: tuple[int, int]) -> None:
    image, text = math.prod(old), 3
    bias = torch.randn(2, text + image, text + image)
    eye = torch.eye(image).reshape(image, 1, *old)
    map_image = F.interpolate(eye, size=new, mode="bilinear").reshape(image, -1).T  # (new tokens, old tokens)
    whole = torch.block_diag(torch.eye(text), map_image)
    torch.testing.assert_close(AttentionMask(bias, old).fitted(new), (whole @ bias @ whole.T)[:, None])


def test_what_is_hidden_is_as_if_it_were_not_there(flux: Any, make_prompt: Any) -> None:
    prompt, other = make_prompt(1, length=TEXT), make_prompt(2, length=9)
    alone = Denoiser(flux, prompt)(X, SIGMA)
    assert not torch.allclose(Denoiser(flux, joined(prompt, other))(X, SIGMA), alone, atol=1e-2)
    for mask, grid in ((hiding(TEXT, TEXT + 9, 1), (1, 1)), (hiding(TEXT, TEXT + 9, 12), (3, 4)),
                       (hiding(TEXT, TEXT + 9, 4), (2, 2)), (hiding(TEXT, TEXT + 9, 1).half()[None], (1, 1)),
                       (hiding(TEXT, TEXT + 9, 1, 1.0) == 0, (1, 1))):
        masked = joined(prompt, other, attention_mask=mask, attention_mask_img_shape=grid)
        torch.testing.assert_close(Denoiser(flux, masked)(X, SIGMA), alone, rtol=1e-5, atol=1e-5)


def test_a_bias_of_log_two_is_two_of_each(flux: Any, make_prompt: Any) -> None:
    """Attention cannot tell a token with twice the weight from two of it."""
    prompt, other = make_prompt(1, length=TEXT), make_prompt(2, length=1)
    double = joined(joined(prompt, other), other)
    once = joined(prompt, other, attention_mask=hiding(TEXT, TEXT + 1, 1, math.log(2)),
                  attention_mask_img_shape=(1, 1))
    once[0][1]["attention_mask"][TEXT, TEXT] = math.log(2)  # as the two see each other
    torch.testing.assert_close(Denoiser(flux, once)(X, SIGMA), Denoiser(flux, double)(X, SIGMA), rtol=1e-5, atol=1e-5)


def test_each_item_and_each_prompt_has_its_own_mask(flux: Any, make_prompt: Any) -> None:
    prompt, other = make_prompt(1, length=TEXT), make_prompt(2, length=9)
    masks = torch.stack((hiding(TEXT, TEXT + 9, 1), torch.zeros(TEXT + 10, TEXT + 10)))
    wide = [[joined(prompt, other)[0][0].repeat(2, 1, 1), {**prompt[0][1], "attention_mask": masks,
                                                           "attention_mask_img_shape": (1, 1)}]]
    out = Denoiser(flux, wide)(X, SIGMA)
    torch.testing.assert_close(out[:1], Denoiser(flux, prompt)(X, SIGMA)[:1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[1:], Denoiser(flux, joined(prompt, other))(X, SIGMA)[1:], rtol=1e-5, atol=1e-5)
    masked = joined(prompt, other, attention_mask=masks[:1], attention_mask_img_shape=(1, 1))
    guided = Denoiser(flux, masked, prompt, cfg=3.0)(X, SIGMA)  # both are the same then
    torch.testing.assert_close(guided, Denoiser(flux, prompt)(X, SIGMA), rtol=1e-4, atol=1e-4)


def test_masks_in_half_precision_stay_finite(make_flux: Any, make_prompt: Any) -> None:
    prompt, other = make_prompt(1, length=TEXT), make_prompt(2, length=9)
    masked = joined(prompt, other, attention_mask=hiding(TEXT, TEXT + 9, 1), attention_mask_img_shape=(1, 1))
    for dtype in (torch.bfloat16, torch.float16):
        half = make_flux().to(dtype)
        out, plain = (Denoiser(half, given)(X, SIGMA) for given in (masked, prompt))
        assert torch.isfinite(out).all() and float((out - plain).norm() / plain.norm()) < 0.02


def test_a_large_mask_is_told(caplog: pytest.LogCaptureFixture) -> None:
    mask = AttentionMask(torch.zeros(1, 21, 21), (1, 1))
    with caplog.at_level(logging.WARNING):
        mask.fitted((32, 32))
        assert not caplog.records
        mask.fitted((64, 96))
    assert "144 MB" in caplog.text and "96 x 64" in caplog.text


@pytest.mark.parametrize(("options", "words"), [
    ({"attention_mask": torch.zeros(21, 21)}, "attention_mask_img_shape"),
    ({"attention_mask": torch.zeros(21, 21), "attention_mask_img_shape": (1, 1, 1)}, "image tokens"),
    ({"attention_mask": torch.zeros(21, 21), "attention_mask_img_shape": (0, 1)}, "image tokens"),
    ({"attention_mask": torch.zeros(21, 20), "attention_mask_img_shape": (1, 1)}, "sides of 21"),
    ({"attention_mask": torch.zeros(1, 1, 21, 21), "attention_mask_img_shape": (1, 1)}, "sides of 21"),
    ({"attention_mask": torch.zeros(21, 21), "attention_mask_img_shape": (2, 3)}, "sides of 26"),
    ({"attention_mask": [[0.0]], "attention_mask_img_shape": (1, 1)}, "list")])
def test_masks_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read_mask(options, TEXT, "positive")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(value: float) -> None:
    mask = torch.zeros(21, 21)
    mask[2, 3] = value
    with pytest.raises(NotFinite, match="positive"):
        read_mask({"attention_mask": mask, "attention_mask_img_shape": (1, 1)}, TEXT, "positive")


def test_no_mask_is_none() -> None:
    assert read_mask({"attention_mask": None, "attention_mask_img_shape": (1, 1)}, TEXT, "positive") is None
