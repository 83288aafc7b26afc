"""Redux: what is put behind the prompt, and how much of it the transformer sees; by formula on a small Flux.

Tests named d16 ... d21 are rows of the table of deviations between Black Forest Labs, diffusers and ComfyUI."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import relative
from flux_kit.engine.conditioning import redux
from flux_kit.engine.conditioning.redux import Settings, restyled
from flux_kit.engine.errors import BadInput, NotFinite
from flux_kit.engine.sampling import Denoiser
from hypothesis import given, settings
from hypothesis import strategies as st
from joint import TEXT, ids_of, prompt, random, small_flux, velocity
from torch import Tensor

SIDE = 6  # of the encoder's grid of tokens
X = random(1, 16, 8, 12, seed=5)
ONES, IMAGE = torch.ones(1, 60, 60), torch.rand(1, 60, 60, 3, generator=torch.Generator().manual_seed(3))
FLUX = small_flux()


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def grid_tokens(pictures: Tensor, side: int = SIDE) -> Tensor:
    """Stands for vision encoder and projector: a token is a fixed random function of its cell."""
    cells = F.adaptive_avg_pool2d(pictures.movedim(-1, 1), side).flatten(2).transpose(1, 2)  # (B, L, 3)
    return torch.sin(cells * 9) @ random(3, TEXT, seed=8) + random(1, side * side, TEXT, seed=9)


class Calls:
    """What the encoder was shown."""

    def __init__(self, side: int = SIDE) -> None:
        self.side, self.seen = side, []

    def see(self, pictures: Tensor, crop: bool) -> Tensor:
        self.seen.append((pictures, crop))
        return grid_tokens(pictures, self.side)


def run(conditioning: Any, images: Tensor = IMAGE, side: int = SIDE, tokens: Tensor | None = None, **changes: Any
        ) -> tuple[Any, str]:
    masks = {name: changes.pop(name) for name in ("subject", "area", "latents") if name in changes}
    calls = Calls(side)
    return restyled(conditioning, images, calls.see, lambda states: states if tokens is None else tokens,
                    Settings(**changes), **masks)


def masked(conditioning: Any) -> Tensor:
    return conditioning[0][1]["attention_mask"][0]


# ---------------------------------------------------------------------------------------------------------- official

def test_strength_1_is_the_encoder_s_tokens_behind_the_text_and_no_mask() -> None:
    start = prompt(guidance=2.5)
    made, report = run(start)
    assert torch.equal(made[0][0], torch.cat((start[0][0], grid_tokens(IMAGE)), 1))
    assert made[0][1] == start[0][1] and "no attention mask" in report
    assert start[0][0].shape == (1, 6, TEXT), "what was given has changed"


def test_d16_the_picture_is_stretched_unless_the_user_says_otherwise() -> None:
    wide = torch.rand(1, 30, 90, 3)
    for fit, crop in (("stretch", False), ("crop", True)):
        calls = Calls()
        restyled(prompt(), wide, calls.see, lambda states: states, Settings(fit=fit))
        assert calls.seen[0][1] is crop and torch.equal(calls.seen[0][0], wide)
    calls = Calls()
    made, _ = restyled(prompt(), wide, calls.see, lambda states: states, Settings(fit="letterbox"))
    boxed, crop = calls.seen[0]
    assert boxed.shape == (1, 90, 90, 3) and not crop
    assert torch.equal(boxed[:, 30:60], wide) and (boxed[:, :30] == 0.5).all() and (boxed[:, 60:] == 0.5).all()
    assert torch.equal(made[0][0][0, 6:], grid_tokens(boxed)[0, 2 * SIDE:4 * SIDE]), "bars are looked at"


def test_d17_the_text_stays_whatever_it_is() -> None:
    for length in (1, 6, 40):
        start = prompt(length)
        made, _ = run(start, strength=0.5)
        assert torch.equal(made[0][0][:, :length], start[0][0]) and made[0][1]["pooled_output"] is start[0][1][
            "pooled_output"]


def test_d18_several_pictures_follow_each_other_and_leave_the_text_alone() -> None:
    three = torch.rand(3, 60, 60, 3)
    start = prompt()
    made, _ = run(start, three)
    expected = torch.cat([grid_tokens(picture[None]) for picture in three], 1)
    assert torch.equal(made[0][0], torch.cat((start[0][0], expected), 1))
    averaged, _ = run(start, three, several="average")
    assert relative(averaged[0][0][:, 6:], grid_tokens(three).mean(0, keepdim=True)) < 1e-6
    assert torch.equal(averaged[0][0][:, :6], start[0][0])


def test_the_average_of_copies_is_the_picture() -> None:
    copies, _ = run(prompt(), IMAGE.expand(4, -1, -1, -1), several="average")
    assert relative(copies[0][0], run(prompt())[0][0][0]) < 1e-7


def test_tokens_have_no_place_so_their_order_does_not_matter() -> None:
    tokens = grid_tokens(IMAGE)
    order = torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(4))
    for strength in (1.0, 0.3):
        one, other = (run(prompt(), tokens=each, strength=strength)[0] for each in (tokens, tokens[:, order]))
        outs = [Denoiser(FLUX, each)(X, torch.tensor([0.6])) for each in (one, other)]
        assert relative(*outs) < 1e-6
    assert relative(outs[0], Denoiser(FLUX, prompt())(X, torch.tensor([0.6]))) > 1e-3


# ---------------------------------------------------------------------------------------------------------- strength

def bias_by_hand(text: int, redux_tokens: int, image: int, strength: float, more: int = 0) -> Tensor:
    """All but Redux's own tokens see them by log(strength)."""
    length = text + redux_tokens + image + more
    bias = torch.zeros(length, length)
    own = range(text, text + redux_tokens)
    for query in range(length):
        if query not in own:
            bias[query, list(own)] = math.log(strength)
    return bias.half().float()


@pytest.mark.parametrize("latents", [None, X], ids=["any size", "the latent's own"])
@pytest.mark.parametrize("strength", [1e-6, 0.3, 2.0])
def test_a_strength_is_a_bias_of_its_logarithm(strength: float, latents: Tensor | None) -> None:
    made, _ = run(prompt(), strength=strength, latents=latents)
    expected = velocity(FLUX, X, made[0], mask=bias_by_hand(6, SIDE**2, 24, strength))
    assert relative((X - Denoiser(FLUX, made)(X, torch.tensor([0.6]))) / 0.6, expected) < 1e-5
    plain = velocity(FLUX, X, run(prompt())[0][0])
    assert relative(plain, expected) > 1e-3


def test_d19_strength_0_is_off_and_a_tiny_one_nearly() -> None:
    start = prompt()
    calls = Calls()
    made, report = restyled(start, IMAGE, calls.see, lambda states: states, Settings(strength=0))
    assert made is start and calls.seen == [] and "off" in report
    off = velocity(FLUX, X, start[0])
    for latents in (None, X):
        tiny, _ = run(start, strength=1e-30, latents=latents)
        assert relative((X - Denoiser(FLUX, tiny)(X, torch.tensor([0.6]))) / 0.6, off) < 1e-6


def with_reference(start: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    latents = random(1, 16, 6, 10, seed=7)
    made = [[text, {**values, "reference_latents": [latents]}] for text, values in start]
    return made, [(latents, ids_of(latents, 1))]


@pytest.mark.parametrize("strength", [0.0, 1e-30, 1e-6, 0.5, 1.0, 2.0])
def test_d20_with_kontext_every_strength_is_finite_and_by_formula(strength: float) -> None:
    start, references = with_reference(prompt())
    made, _ = run(start, strength=strength, latents=X)
    out = (X - Denoiser(FLUX, made)(X, torch.tensor([0.6]))) / 0.6
    assert torch.isfinite(out).all()
    if strength <= 1e-30:
        assert relative(out, velocity(FLUX, X, start[0], references=references)) < 1e-6
        return
    mask = None if strength == 1 else bias_by_hand(6, SIDE**2, 24, strength, more=15)
    assert relative(out, velocity(FLUX, X, made[0], references=references, mask=mask)) < 1e-5
    if strength != 1:
        assert masked(made).shape == (6 + SIDE**2 + 24 + 15,) * 2
        assert made[0][1]["attention_mask_img_shape"] == (4, 6)


def test_d20_with_kontext_a_strength_needs_the_latent() -> None:
    start, _ = with_reference(prompt())
    with pytest.raises(BadInput, match="'latent'"):
        run(start, strength=0.5)
    assert "attention_mask" not in run(start)[0][0][1]


def test_d21_the_report_names_backends_that_take_no_notice_of_a_mask() -> None:
    assert "Nunchaku" in run(prompt(), strength=0.5)[1] and "detail" in run(prompt(), strength=0.5)[1]
    assert "Nunchaku" not in run(prompt())[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_stay_finite_in_half_precision(dtype: torch.dtype) -> None:
    area = torch.zeros(1, 64, 96)
    area[:, :, :48] = 1
    made, _ = run(prompt(), strength=1e-6, area=area, latents=X)
    mask = masked(made).to(dtype)
    scores = torch.full_like(mask, -60.0) + mask
    assert torch.isfinite(mask).all() and torch.isfinite(scores).all()
    assert torch.isfinite(F.interpolate(mask[None, None].float(), scale_factor=1.5, mode="bilinear")).all()


def test_a_mask_that_is_there_is_widened_even_at_strength_1() -> None:
    first, _ = run(prompt(), strength=0.25)
    second, _ = run(first, tokens=grid_tokens(IMAGE.flip(1)))
    mask = masked(second)
    n = SIDE**2
    assert mask.shape == (6 + 2 * n + 1,) * 2 and torch.equal(mask[:, 6 + n:], torch.zeros_like(mask[:, 6 + n:]))
    quarter = torch.tensor(math.log(0.25)).half()
    seen = mask[:, 6:6 + n]
    assert (seen[6:6 + n] == 0).all() and (torch.cat((seen[:6], seen[6 + n:])) == quarter).all()


@pytest.mark.parametrize("latents", [None, X])
def test_the_order_of_a_chain_does_not_matter(latents: Tensor | None) -> None:
    parts = [{"tokens": grid_tokens(IMAGE), "strength": 0.3}, {"tokens": grid_tokens(IMAGE.flip(2)), "strength": 1.5}]
    if latents is not None:
        parts[0]["area"], parts[1]["area"] = ONES.new_zeros(1, 64, 96), ONES.new_zeros(1, 64, 96)
        parts[0]["area"][..., :48], parts[1]["area"][..., 32:] = 1, 1
    outs = []
    for first, second in (parts, parts[::-1]):
        made, _ = run(run(prompt(), latents=latents, **first)[0], latents=latents, **second)
        outs.append(Denoiser(FLUX, made)(X, torch.tensor([0.6])))
    assert relative(*outs) < 1e-6


# ---------------------------------------------------------------------------------------------------------- the area

def halves() -> Tensor:
    area = torch.zeros(1, 64, 96)
    area[..., :48] = 1
    return area


def test_an_area_says_which_parts_of_the_picture_see_the_tokens() -> None:
    """Attention itself: what the softmax gives to Redux's tokens, for random queries and keys."""
    made, report = run(prompt(), area=halves(), latents=X)
    mask, n = masked(made).float(), SIDE**2
    q, k = random(len(mask), 16, seed=1), random(len(mask), 16, seed=2)
    weights = torch.softmax(q @ k.T / 4 + mask, -1)[:, 6:6 + n].sum(1)
    free = torch.softmax(q @ k.T / 4, -1)[:, 6:6 + n].sum(1)
    picture = weights[6 + n:].reshape(4, 6)
    assert torch.equal(picture[:, :3], free[6 + n:].reshape(4, 6)[:, :3]) and (picture[:, 3:] == 0).all()
    assert (weights[:6] == 0).all(), "the prompt would carry it everywhere"
    assert torch.equal(weights[6:6 + n], free[6:6 + n])
    assert "by 12 of 24 tokens" in report


def test_a_soft_area_scales_and_a_full_one_needs_no_mask() -> None:
    made, _ = run(prompt(), strength=0.5, area=torch.full((64, 96), 0.5), latents=X)
    assert torch.equal(made[0][1]["attention_mask"], run(prompt(), strength=0.25, latents=X)[0][0][1]["attention_mask"])
    assert "attention_mask" not in run(prompt(), area=torch.ones(1, 64, 96), latents=X)[0][0][1]


def test_an_area_with_references_holds_where_they_lie() -> None:
    start, _ = with_reference(prompt())
    start[0][1]["reference_latents"] = [random(1, 16, 8, 12)]
    made, _ = run(start, area=halves(), latents=X)
    mask, first = masked(made), 6 + SIDE**2
    assert torch.equal(mask[first:first + 24], mask[first + 24:])


# -------------------------------------------------------------------------------------------------- detail and subject

@pytest.mark.parametrize("detail", [1, 2, 3])
def test_less_detail_is_the_mean_of_tokens(detail: int) -> None:
    made, report = run(prompt(), detail=detail)
    grid = grid_tokens(IMAGE).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    expected = F.adaptive_avg_pool2d(grid, detail).flatten(2).transpose(1, 2)
    assert relative(made[0][0][:, 6:], expected) < 1e-6 and f"{detail} x {detail} tokens" in report


@pytest.mark.parametrize("side", [1, 4, 8, 27])
def test_detail_is_capped_at_the_encoder_s_own_grid(side: int) -> None:
    made, _ = run(prompt(), side=side, detail=64)
    assert torch.equal(made[0][0][:, 6:], grid_tokens(IMAGE, side))


def test_uneven_cells_share_tokens_by_their_area() -> None:
    ramp = torch.arange(SIDE, dtype=torch.float32).repeat(SIDE, 1).reshape(1, -1, 1).expand(-1, -1, TEXT)
    made, _ = run(prompt(), tokens=ramp, detail=4)  # cells of 1.5 tokens
    assert torch.allclose(made[0][0][0, 6:10, 0], torch.tensor([1 / 3, 1.0 + 2 / 3, 3 + 1 / 3, 4 + 2 / 3]), atol=1e-6)


@pytest.mark.parametrize("detail", [SIDE, 4, 3, 1])
def test_a_subject_everywhere_is_none(detail: int) -> None:
    made, _ = run(prompt(), detail=detail, subject=ONES)
    assert torch.equal(made[0][0], run(prompt(), detail=detail)[0][0][0])


def test_what_is_outside_the_subject_has_no_influence() -> None:
    subject = torch.zeros(60, 60)
    subject[10:40, 20:60] = 1  # rows 1 ... 3 and columns 2 ... 5 of the tokens
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[1:4, 2:] = True
    tokens = grid_tokens(IMAGE)
    spoilt = tokens.clone()
    spoilt[:, ~inside.flatten()] = 1e6
    made, report = run(prompt(), tokens=tokens, subject=subject)
    assert torch.equal(made[0][0][:, 6:], tokens[:, inside.flatten()]) and "12 of 36" in report
    for detail in (5, 3, 2, 1):
        clean, dirty = (run(prompt(), tokens=each, subject=subject, detail=detail)[0][0][0]
                        for each in (tokens, spoilt))
        assert torch.equal(clean, dirty) and clean.shape[1] > 6
    whole, _ = run(prompt(), tokens=tokens, subject=subject, detail=1)
    assert relative(whole[0][0][0, 6], tokens[0, inside.flatten()].mean(0)) < 1e-6


@settings(max_examples=40)
@given(seed=st.integers(0, 999), detail=st.integers(1, 7), several=st.sampled_from(["append", "average"]),
       fit=st.sampled_from(["stretch", "crop", "letterbox"]), height=st.integers(5, 70), width=st.integers(5, 70))
def test_constant_tokens_stay_constant_under_any_mask(seed: int, detail: int, several: str, fit: str, height: int,
                                                      width: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    subject = torch.rand(2, height, width, generator=draw) * (torch.rand(2, height, width, generator=draw) < 0.3)
    value = random(TEXT, seed=seed)
    made, report = run(prompt(), torch.rand(2, height, width, 3), tokens=value.expand(2, SIDE**2, -1), detail=detail,
                       several=several, fit=fit, subject=subject)
    taken = made[0][0][0, 6:]
    assert torch.isfinite(taken).all() and torch.allclose(taken, value.expand_as(taken), rtol=1e-6, atol=1e-6)
    if bool(subject.any()):
        assert 1 <= len(taken) <= 2 * min(detail, SIDE)**2
    else:
        assert "empty" in report


def test_one_subject_for_all_or_one_for_each() -> None:
    two = torch.rand(2, 60, 60, 3)
    left, right = torch.zeros(1, 60, 60), torch.zeros(1, 60, 60)
    left[..., :30], right[..., 30:] = 1, 1
    made, _ = run(prompt(), two, subject=torch.cat((left, right)))
    tokens = grid_tokens(two).unflatten(1, (SIDE, SIDE))
    expected = torch.cat((tokens[0, :, :3].flatten(0, 1), tokens[1, :, 3:].flatten(0, 1)))
    assert torch.equal(made[0][0][0, 6:], expected)
    with pytest.raises(BadInput, match="3 subject masks for 2 pictures"):
        run(prompt(), two, subject=ONES.expand(3, -1, -1))


# ----------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("name", ["subject", "area"])
def test_an_empty_mask_changes_nothing_and_says_so(name: str) -> None:
    start = prompt()
    made, report = run(start, latents=X, **{name: torch.zeros(1, 64, 64)})
    assert made is start and f"the {name} mask is empty" in report and "alpha" in report


@pytest.mark.parametrize(("changes", "told"), [
    ({"strength": -0.1}, "-0.1"), ({"strength": math.nan}, "nan"), ({"detail": 0}, "detail 0"),
    ({"fit": "squeeze"}, "stretch, crop, letterbox"), ({"several": "sum"}, "append, average"),
    ({"images": torch.zeros(60, 60, 3)}, r"\(60, 60, 3\)"), ({"images": None}, "NoneType"),
    ({"subject": torch.ones(1, 60, 90)}, "90 x 60, the picture 60 x 60: another aspect"),
    ({"area": torch.ones(1, 64, 96)}, "'latent'"),
    ({"area": torch.ones(1, 64, 64), "latents": X}, "64 x 64, the picture to sample 96 x 64"),
    ({"area": torch.ones(2, 64, 96), "latents": X}, "2 area masks"),
    ({"tokens": torch.zeros(1, 257, TEXT)}, "257 tokens.*sigclip"),
    ({"tokens": torch.zeros(1, 36, TEXT + 1)}, f"width {TEXT + 1}, this conditioning's are {TEXT}"),
    ({"latents": X[0]}, "latent"), ({"images": torch.zeros(1, 1, 90000, 3), "fit": "letterbox"}, "90000")])
def test_bad_input_is_refused_in_words(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        run(prompt(), **changes)


def test_nan_in_masks_and_an_empty_conditioning_are_refused() -> None:
    with pytest.raises(NotFinite, match="subject"):
        run(prompt(), subject=torch.full((1, 60, 60), math.nan))
    with pytest.raises(BadInput, match="empty"):
        run([])
    spoilt = prompt()
    spoilt[0][1].update(attention_mask=torch.full((1, 7, 7), math.nan), attention_mask_img_shape=(1, 1))
    with pytest.raises(NotFinite, match="attention mask"):
        run(spoilt)


@pytest.mark.parametrize(("mask", "grid", "told"), [
    (torch.zeros(1, 7, 7), None, "attention_mask_img_shape"), (torch.zeros(1, 9, 9), (1, 1), "sides of 7"),
    (torch.zeros(7), (1, 1), "attention_mask_img_shape"), (torch.zeros(1, 12, 12), (2, 3), "3 x 2 tokens")])
def test_attention_masks_that_do_not_fit_are_refused(mask: Tensor, grid: Any, told: str) -> None:
    start = prompt(attention_mask=mask, attention_mask_img_shape=grid)
    with pytest.raises(BadInput, match=told):
        run(start, latents=X)


def test_a_boolean_mask_becomes_a_bias() -> None:
    see = torch.ones(7, 7, dtype=torch.bool)
    see[6, 2] = False  # the picture does not see the third word
    made, _ = run(prompt(attention_mask=see, attention_mask_img_shape=(1, 1)), strength=0.5)
    mask = masked(made)
    assert mask[-1, 2] == redux.FLOOR and mask[6, 2] == redux.FLOOR and mask[0, 2] == 0


def test_large_masks_are_told_in_megabytes() -> None:
    big = torch.zeros(1, 16, 172, 172)
    made, report = run(prompt(), strength=0.5, latents=big)
    mask = made[0][1]["attention_mask"]
    assert mask.dtype == torch.float16 and f"{mask.numel() * 2 >> 20} MB" in report
    assert "MB" not in run(prompt(), strength=0.5, latents=X)[1]


def test_settings_are_frozen_and_official_by_default() -> None:
    official = Settings()
    assert (official.strength, official.detail, official.fit, official.several) == (1.0, 27, "stretch", "append")
    assert replace(official, strength=0.5) != official
