"""Kontext: sizes, layouts and what the transformer gets of the pictures; by formula on a small Flux.

Tests named d14, d22 ... d24 are rows of the table of deviations between Black Forest Labs, diffusers and ComfyUI."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import relative
from flux_kit.engine.conditioning import kontext, redux
from flux_kit.engine.conditioning.kontext import SIZES, Settings, edited, snapped
from flux_kit.engine.errors import BadInput, NotFinite
from flux_kit.engine.sampling import Denoiser
from flux_kit.engine.sampling.slots import positions
from hypothesis import given, settings
from hypothesis import strategies as st
from joint import TEXT, ids_of, prompt, random, small_flux, velocity
from PIL import Image
from torch import Tensor

FLUX = small_flux()
KEEP = Settings(size="keep-16")
PUBLISHED = """672x1568 688x1504 720x1456 752x1392 800x1328 832x1248 880x1184 944x1104 1024x1024
    1104x944 1184x880 1248x832 1328x800 1392x752 1456x720 1504x688 1568x672"""
TABLE = [tuple(map(int, size.split("x"))) for size in PUBLISHED.split()]


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


class Encoder:
    """Stands for the autoencoder: latents that follow the pixels. Counts and checks what it is given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, image: Tensor) -> Tensor:
        assert image.ndim == 4 and image.shape[-1] == 3 and image.shape[1] % 16 == 0 == image.shape[2] % 16
        assert image.min() >= 0 and image.max() <= 1
        self.given.append(image)
        small = F.pixel_unshuffle(image.movedim(-1, 1), 8)[:, :16]
        return small * 4 - 2


def empty(width: int, height: int, batch: int) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 16, height // 8, width // 8)}


def photo(height: int, width: int, seed: int = 0, batch: int = 1) -> Tensor:
    """Eight bits a channel."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, height, width, 3), generator=draw).float() / 255


def run(*images: Tensor | None, settings: Settings = KEEP, positive: Any = None, **more: Any) -> kontext.Edit:
    return edited(positive or prompt(), images, Encoder(), empty, settings, **more)


def references(edit: kontext.Edit) -> list[Tensor]:
    found: list[Tensor] = edit.positive[0][1].get("reference_latents", [])
    return found


# ------------------------------------------------------------------------------------------------------------- sizes

def test_the_17_sizes_are_the_published_ones() -> None:
    assert list(SIZES) == TABLE and len(set(SIZES)) == 17
    assert {(h, w) for w, h in SIZES} == set(SIZES)


@pytest.mark.parametrize(("width", "height"), TABLE)
def test_d22_a_preferred_size_stays_to_the_bit(width: int, height: int) -> None:
    """Others shrink 672x1568, 800x1328 and their transposes, or cut and resize them."""
    image = photo(height, width)
    edit = run(image, settings=Settings())
    assert edit.size == (width, height) and references(edit)[0].shape[-2:] == (height // 8, width // 8)
    assert edit.latent["samples"].shape[-2:] == references(edit)[0].shape[-2:]
    assert torch.equal(references(edit)[0], Encoder()(image)) and "becomes" not in edit.report


@given(width=st.integers(1, 6000), height=st.integers(1, 6000))
def test_any_other_goes_to_the_nearest_aspect(width: int, height: int) -> None:
    far = {size: abs(width / height - size[0] / size[1]) for size in TABLE}
    assert far[snapped(width, height)] == min(far.values())


@pytest.mark.parametrize("sides", [(320, 256), (60, 190)])
def test_d22_the_picture_is_stretched_as_pil_does_and_nothing_is_cut(sides: tuple[int, int]) -> None:
    image, encoder = photo(*sides), Encoder()
    edit = edited(prompt(), [image], encoder, empty, Settings())
    levels = Image.fromarray((image[0] * 255).round().byte().numpy()).resize(edit.size, Image.Resampling.LANCZOS)
    assert torch.equal(encoder.given[0][0], torch.from_numpy(np.array(levels)).float() / 255)
    assert edit.size == snapped(sides[1], sides[0]) and f"{sides[1]} x {sides[0]} becomes" in edit.report


@pytest.mark.parametrize(("old", "new", "told"), [
    ((1920, 1080), (1392, 752), "1920 x 1080 becomes 1392 x 752, stretched: 4.1% or 55 px wider"),
    ((1500, 500), (1568, 672), "1500 x 500 becomes 1568 x 672, stretched: 22.2% or 448 px narrower"),
    ((1020, 1000), (1024, 1024), "1020 x 1000 becomes 1024 x 1024")])
def test_a_stretch_above_3_percent_is_told_in_pixels(old: tuple[int, int], new: tuple[int, int], told: str) -> None:
    assert snapped(*old) == new
    note = kontext.resized(old, new)
    assert note.startswith(told) and ("stretched" in told) == ("stretched" in note)


def test_what_happened_is_told_of_each_picture() -> None:
    report = run(photo(20, 64), photo(65, 16)).report
    assert "image_1: 64 x 20 becomes 64 x 16, stretched: 25.0% or 13 px wider" in report
    assert "image_2: 16 x 65 becomes 16 x 64\n" in report


@pytest.mark.parametrize("sides", [(108, 192), (160, 90)])
def test_preferred_pad_keeps_aspect_and_content(sides: tuple[int, int]) -> None:
    image, encoder = photo(*sides), Encoder()
    edit = edited(prompt(), [image], encoder, empty, Settings(size="preferred-pad"))
    whole = encoder.given[0]
    inside = (whole[0] != 0.5).any(-1)
    rows, columns = (inside.any(axis).nonzero().flatten() for axis in (1, 0))
    height, width = (int(line[-1] - line[0]) + 1 for line in (rows, columns))
    assert abs(width / height / (sides[1] / sides[0]) - 1) < 1.01 / min(height, width)
    assert (width, height)[0] == edit.size[0] or height == edit.size[1]
    inner = whole[:, rows[0]:rows[0] + height, columns[0]:columns[0] + width]
    levels = Image.fromarray((image[0] * 255).round().byte().numpy()).resize((width, height), Image.Resampling.LANCZOS)
    assert torch.equal(inner[0], torch.from_numpy(np.array(levels)).float() / 255)
    assert ("grey bars" in edit.report) == ((width, height) != edit.size)


@pytest.mark.parametrize(("sides", "size"), [
    ((128, 128), (128, 128)), ((100, 75), (80, 96)), ((5, 9), (16, 16)), ((108, 192), (192, 112))])
def test_keep_16_works_for_small_models(sides: tuple[int, int], size: tuple[int, int]) -> None:
    image = photo(*sides)
    edit = run(image)
    assert edit.size == size and edit.latent["samples"].shape == (1, 16, size[1] // 8, size[0] // 8)
    if size == sides[::-1]:
        assert torch.equal(references(edit)[0], Encoder()(image))


@pytest.mark.parametrize(("aspect", "size"), [
    ((16, 9), (1360, 768)), ((1, 1), (1024, 1024)), ((9, 21), (656, 1552)), ((3, 2), (1248, 832))])
def test_other_aspects_are_near_a_megapixel_as_published(aspect: tuple[int, int], size: tuple[int, int]) -> None:
    settings = Settings(target=aspect, target_is_aspect=True)
    edit = run(photo(64, 64), settings=settings)
    assert edit.size == size and references(edit)[0].shape[-2:] == (128, 128)
    small = run(photo(128, 128), settings=replace(settings, size="keep-16"))
    assert small.size[0] * small.size[1] <= 128 * 128 and min(small.size) >= 80


def test_a_size_of_the_user_s_own() -> None:
    edit = run(photo(128, 128), settings=replace(KEEP, target=(96, 160)))
    assert edit.size == (96, 160) and edit.latent["samples"].shape == (1, 16, 20, 12)
    with pytest.raises(BadInput, match="width 100 is no multiple of 16; the nearest is 96"):
        run(photo(128, 128), settings=replace(KEEP, target=(100, 160)))


@settings(max_examples=40)
@given(sides=st.lists(st.tuples(st.integers(1, 140), st.integers(1, 140)), min_size=1, max_size=4),
       layout=st.sampled_from(kontext.LAYOUTS))
def test_no_latent_has_an_odd_side(sides: list[tuple[int, int]], layout: str) -> None:
    edit = run(*(torch.rand(1, *pair, 3) for pair in sides), settings=replace(KEEP, layout=layout))
    for latents in (*references(edit), edit.latent["samples"]):
        assert latents.shape[-2] % 2 == 0 == latents.shape[-1] % 2
    assert len(references(edit)) == (1 if layout.startswith("stitch") else len(sides))


# ------------------------------------------------------------------------------------------------ what the model gets

@pytest.mark.parametrize("target", [None, (96, 160), (48, 32)], ids=["its size", "larger", "smaller"])
def test_d23_one_reference_lies_in_the_second_plane(target: tuple[int, int] | None) -> None:
    """BFL's recipe: its tokens follow the noise, with positions (1, row, column); only the noise's come out."""
    edit = run(photo(64, 96), settings=replace(KEEP, target=target))
    x = random(*edit.latent["samples"].shape, seed=4)
    latents = Encoder()(photo(64, 96))
    expected = velocity(FLUX, x, [edit.positive[0][0], {**prompt()[0][1], "guidance": 2.5}],
                        references=[(latents, ids_of(latents, 1))])
    found = (x - Denoiser(FLUX, edit.positive)(x, torch.tensor([0.6]))) / 0.6
    assert relative(found, expected) < 1e-5
    assert relative((x - Denoiser(FLUX, prompt(guidance=2.5))(x, torch.tensor([0.6]))) / 0.6, expected) > 1e-3


def test_d14_the_same_noise_gives_the_same_edit_in_the_formula_and_the_sampler() -> None:
    """Seeds mean other noise elsewhere, so a comparison hands the noise over: three Euler steps by hand."""
    edit = run(photo(48, 64))
    noise, sigmas = random(1, 16, 6, 8, seed=9), [1.0, 0.7, 0.3, 0.0]
    latents, x, y = references(edit)[0], noise, noise
    denoiser = Denoiser(FLUX, edit.positive)
    for now, then in pairwise(sigmas):
        x = x + (then - now) * velocity(FLUX, x, edit.positive[0], now, [(latents, ids_of(latents, 1))])
        y = y + (then - now) * (y - denoiser(y, torch.tensor([now]))) / now
    assert relative(y, x) < 1e-5


def placed(edit: kontext.Edit) -> Tensor:
    """Positions of all reference tokens by the sampler's rule for this conditioning's method."""
    sizes = [(latents.shape[-2], latents.shape[-1]) for latents in references(edit)]
    samples = edit.latent["samples"]
    return torch.cat(positions(1, samples.shape[-2:], sizes, edit.positive[0][1]["reference_latents_method"])[1:], 1)[0]


@pytest.mark.parametrize(("sides", "layout"), [((96, 64), "stitch-right"), ((64, 96), "stitch-down")])
def test_d23_a_chain_has_the_positions_of_the_stitched_picture(sides: tuple[int, int], layout: str) -> None:
    two = photo(*sides), photo(*sides, seed=1)
    chain, stitch = (run(*two, settings=replace(KEEP, layout=name)) for name in ("chain", layout))
    assert {tuple(row) for row in placed(chain).tolist()} == {tuple(row) for row in placed(stitch).tolist()}
    assert [latents.shape[-2:] for latents in references(chain)] == [(sides[0] // 8, sides[1] // 8)] * 2
    x = random(*chain.latent["samples"].shape, seed=2)
    outs = [Denoiser(FLUX, edit.positive)(x, torch.tensor([0.6])) for edit in (chain, stitch)]
    assert relative(*outs) < 1e-5, "this encoder does not look across the seam, so it is the same picture"


def test_d23_index_gives_each_a_plane_of_its_own() -> None:
    edit = run(photo(64, 64), photo(32, 48), photo(48, 48), settings=replace(KEEP, layout="index"))
    assert placed(edit)[:, 0].unique().tolist() == [1, 2, 3] and "trained for it" in edit.report
    x = random(1, 16, 8, 8)
    given = [(latents, ids_of(latents, plane)) for plane, latents in enumerate(references(edit), 1)]
    found = (x - Denoiser(FLUX, edit.positive)(x, torch.tensor([0.6]))) / 0.6
    assert relative(found, velocity(FLUX, x, edit.positive[0], references=given)) < 1e-5


def test_d24_positions_of_wide_strips_are_all_different() -> None:
    """Half precision has one number for several of them."""
    edit = run(photo(16, 4800), photo(16, 4800, 1), settings=replace(KEEP, layout="stitch-right", target=(16, 16)))
    ids = placed(edit)
    assert ids.dtype == torch.float32 and len(ids) == 600 and len(ids.unique(dim=0)) == 600
    assert len(ids.bfloat16().unique(dim=0)) < 600


def test_stitched_pictures_take_the_height_of_the_first() -> None:
    encoder = Encoder()
    edit = edited(prompt(), [photo(64, 96), photo(128, 64, 1)], encoder, empty, replace(KEEP, layout="stitch-right"))
    assert encoder.given[0].shape == (1, 64, 96 + 32, 3) and edit.size == (96, 64)
    assert torch.equal(encoder.given[0][:, :, :96], photo(64, 96))
    encoder = Encoder()
    edited(prompt(), [photo(64, 96), photo(128, 64, 1)], encoder, empty, replace(KEEP, layout="stitch-down"))
    assert encoder.given[0].shape == (1, 64 + 192, 96, 3)


def test_the_negative_gets_the_same_pictures() -> None:
    edit = run(photo(64, 64), negative=prompt(4, seed=7))
    mine, theirs = edit.negative[0][1], edit.positive[0][1]
    assert all(a is b for a, b in zip(mine["reference_latents"], theirs["reference_latents"], strict=True))
    assert (mine["reference_latents_method"], mine["guidance"]) == ("offset", 2.5) == (
        theirs["reference_latents_method"], theirs["guidance"])
    assert edit.negative[0][0].shape[1] == 4
    alone = run(photo(64, 64))
    assert not alone.negative[0][0].any() and not alone.negative[0][1]["pooled_output"].any()
    assert alone.negative[0][0].shape == alone.positive[0][0].shape


def test_guidance_is_set_or_left() -> None:
    start = prompt(guidance=7.0)
    assert run(photo(16, 16), positive=start).positive[0][1]["guidance"] == 2.5
    assert run(photo(16, 16), positive=start, settings=replace(KEEP, guidance=0)).positive[0][1]["guidance"] == 7.0
    assert start[0][1]["guidance"] == 7.0 and "reference_latents" not in start[0][1]


# ----------------------------------------------------------------------------------------------------- with Redux masks

def styled(conditioning: Any, latents: Tensor | None, area: Tensor | None = None) -> Any:
    return redux.restyled(conditioning, torch.zeros(1, 8, 8, 3), lambda pictures, crop: random(1, 4, TEXT),
                          lambda states: states, redux.Settings(strength=0.4), area=area, latents=latents)[0]


@pytest.mark.parametrize("area", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_d20_before_or_behind_redux_is_the_same(area: bool, known: bool) -> None:
    if area and not known:
        return
    images, x = (photo(64, 96), photo(48, 48, 1)), random(1, 16, 8, 12)
    mask = None
    if area:
        mask = torch.zeros(1, 64, 96)
        mask[..., :48] = 1
    behind = styled(run(*images).positive, x, mask)
    before = run(*images, positive=styled(prompt(), x if known else None, mask)).positive
    assert torch.equal(before[0][1]["attention_mask"], behind[0][1]["attention_mask"])
    assert before[0][1]["attention_mask_img_shape"] == (8 // 2, 12 // 2)
    outs = [Denoiser(FLUX, each)(x, torch.tensor([0.6])) for each in (before, behind)]
    assert torch.equal(*outs) and torch.isfinite(outs[0]).all()


def test_d20_a_mask_of_another_size_is_refused() -> None:
    start = styled(prompt(), random(1, 16, 8, 8))
    with pytest.raises(BadInput, match="4 x 4 tokens, this one has 6 x 4"):
        run(photo(64, 96), positive=start)


# ------------------------------------------------------------------------------------------------------------- editing

def test_an_edit_mask_starts_from_the_first_picture() -> None:
    image, mask = photo(64, 96), torch.zeros(1, 64, 96)
    mask[:, :32] = 1
    edit = run(image, photo(32, 32, 1), edit_mask=mask, settings=replace(KEEP, batch=2))
    assert torch.equal(edit.latent["samples"], Encoder()(image).expand(2, -1, -1, -1))
    assert torch.equal(edit.latent["noise_mask"], mask[:, None].expand(2, -1, -1, -1))
    stitched = run(image, photo(64, 32, 1), edit_mask=mask, settings=replace(KEEP, layout="stitch-right"))
    assert torch.equal(stitched.latent["samples"], Encoder()(image)) and len(references(stitched)) == 1


def test_an_edit_mask_moves_with_its_picture() -> None:
    mask = torch.zeros(1, 50, 150)
    mask[..., :75] = 1
    padded = run(photo(100, 300), edit_mask=mask, settings=Settings(size="preferred-pad")).latent["noise_mask"]
    assert padded.shape == (1, 1, 672, 1568)
    inside = padded[0, 0, 336]
    assert (inside[:770] == 1).all() and (inside[800:] == 0).all()
    assert (padded[0, 0, :70] == 0).all() and (padded[0, 0, -70:] == 0).all(), "bars are not to change"


@pytest.mark.parametrize(("changes", "told"), [
    ({"edit_mask": torch.zeros(1, 64, 96)}, "edit_mask is empty"),
    ({"edit_mask": torch.ones(1, 64, 64)}, "64 x 64, the first picture 96 x 64: another aspect"),
    ({"edit_mask": torch.ones(1, 64, 96), "settings": replace(KEEP, target=(64, 64))}, "set aspect"),
    ({"edit_mask": torch.ones(3, 64, 96), "settings": replace(KEEP, batch=2)}, "batch"),
    ({"edit_mask": torch.ones(64)}, "edit_mask must be")])
def test_edit_masks_that_do_not_fit_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        run(photo(64, 96), **changes)


def test_an_edit_mask_without_a_picture_is_refused_and_a_full_one_told() -> None:
    with pytest.raises(BadInput, match="connect image_1"):
        run(edit_mask=torch.ones(1, 64, 64))
    assert "whole picture" in run(photo(64, 64), edit_mask=torch.ones(1, 64, 64)).report


# ----------------------------------------------------------------------------------------------------------- bad input

def test_without_pictures_it_is_text_to_image() -> None:
    start = prompt()
    edit = run(positive=start, settings=Settings())
    assert edit.size == (1024, 1024) and edit.latent["samples"].shape == (1, 16, 128, 128)
    assert edit.positive[0][1] == {**start[0][1], "guidance": 2.5} and "text to image" in edit.report


def test_pictures_are_counted_by_their_place() -> None:
    with pytest.raises(NotFinite, match="image_3 holds NaN"):
        run(None, photo(16, 16), torch.full((1, 16, 16, 3), math.nan))
    assert run(None, photo(32, 48)).size == (48, 32)


def test_batches() -> None:
    edit = run(photo(32, 32, batch=3), photo(32, 32))
    assert len(edit.latent["samples"]) == 3 and [len(latents) for latents in references(edit)] == [3, 1]
    x = random(3, 16, 4, 4)
    out = Denoiser(FLUX, edit.positive)(x, torch.full((3,), 0.6))
    for item in range(3):
        alone = run(photo(32, 32, batch=3)[item:item + 1], photo(32, 32))
        expected = Denoiser(FLUX, alone.positive)(x[item:item + 1], torch.tensor([0.6]))
        assert relative(out[item:item + 1], expected) < 1e-5
    with pytest.raises(BadInput, match=r"batches of 3, 2 pictures and a batch_size of 1"):
        run(photo(32, 32, batch=3), photo(32, 32, batch=2))
    with pytest.raises(BadInput, match="batch_size of 4"):
        run(photo(32, 32, batch=3), settings=replace(KEEP, batch=4))


def test_many_reference_tokens_are_counted() -> None:
    report = run(photo(128, 128), photo(128, 128), settings=replace(KEEP, target=(64, 64))).report
    assert "128 tokens, the result 16: a step takes memory and time for 144" in report
    assert "tokens" not in run(photo(128, 128)).report


def test_references_that_are_there_stay_in_front() -> None:
    first = run(photo(64, 64))
    second = run(photo(32, 32, 1), positive=first.positive, settings=replace(KEEP, target=(64, 64)))
    assert references(second)[0] is references(first)[0] and len(references(second)) == 2
    assert "behind references of 16 tokens" in second.report and len(references(first)) == 1


def test_alpha_and_values_outside_are_told() -> None:
    image = torch.cat((photo(16, 16), torch.rand(1, 16, 16, 1)), -1)
    edit = run(image)
    assert torch.equal(references(edit)[0], Encoder()(photo(16, 16))) and "alpha" in edit.report
    edit = run(photo(16, 16) * 2 - 0.5)
    assert "image_1: its values go from -0." in edit.report
    assert torch.equal(references(edit)[0], Encoder()((photo(16, 16) * 2 - 0.5).clamp(0, 1)))


@pytest.mark.parametrize(("settings", "told"), [
    (Settings(size="crop"), "preferred-stretch"), (Settings(layout="grid"), "stitch-right"),
    (Settings(guidance=math.nan), "guidance"), (Settings(batch=0), "batch")])
def test_unknown_settings_are_refused(settings: Settings, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        run(photo(16, 16), settings=settings)


@pytest.mark.parametrize("positive", [[], [[torch.zeros(1, 4, 8)]], torch.zeros(1, 4, 8)])
def test_what_is_no_conditioning_is_refused(positive: Any) -> None:
    with pytest.raises(BadInput, match="positive is no conditioning"):
        edited(positive, [photo(16, 16)], Encoder(), empty, KEEP)


@pytest.mark.parametrize(("image", "told"), [(torch.zeros(1, 16, 16, 2), r"\(1, 16, 16, 2\)"),
                                             (torch.zeros(16, 16, 3), "found"), (torch.zeros(1, 0, 16, 3), "found")])
def test_what_is_no_picture_is_refused(image: Tensor, told: str) -> None:
    with pytest.raises(BadInput, match=f"image_1.*{told}"):
        run(image)


@pytest.mark.parametrize(("width", "told"), [(384, "Fill"), (128, "Depth or Canny"), (96, "another")])
def test_wrong_models_are_named(width: int, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        kontext.check_model(width)
    for fine in (64, None):
        kontext.check_model(fine)
