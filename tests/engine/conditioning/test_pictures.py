"""What is common to all that take pictures: values that are no picture's are told, by whatever takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flux_kit.engine.conditioning import canvas, fill, kontext, preprocess, redux, regions, structure
from flux_kit.engine.conditioning.pictures import beyond, to_encode
from flux_kit.engine.conditioning.resample import MAX_PIXELS, check_size
from flux_kit.engine.errors import BadInput
from torch import Tensor

SIDE = 32
PROMPT = [[torch.zeros(1, 4, 8), {"pooled_output": torch.zeros(1, 4)}]]
MASK = torch.zeros(1, SIDE, SIDE)
MASK[:, 8:20, 8:20] = 1


def _kontext(image: Tensor) -> list[str]:
    edit = kontext.edited(PROMPT, [image], lambda one: torch.zeros(1, 16, one.shape[1] // 8, one.shape[2] // 8),
                          lambda width, height, batch: {"samples": torch.zeros(batch, 16, height // 8, width // 8)},
                          kontext.Settings(size=kontext.KEEP))
    return edit.report.splitlines()


def _redux(image: Tensor) -> list[str]:
    made = redux.restyled(PROMPT, image, lambda seen, _: torch.zeros(1, 9, 8), lambda states: states, redux.Settings())
    return made[1].splitlines()


TAKERS: dict[str, Callable[[Tensor], list[str]]] = {
    "fill": lambda image: fill.prepare(image, MASK).notes,
    "crop": lambda image: regions.crop(image, MASK).notes,
    "paste": lambda image: regions.paste(torch.zeros(1, SIDE, SIDE, 3), image)[1],
    "outpaint": lambda image: canvas.outpaint_to(image, canvas.Pads(left=16))[2],
    "structure": lambda image: structure.prepare(image).notes,
    "map": lambda image: preprocess.at_size(image)[1],
    "encode": lambda image: to_encode(image, None)[1], "kontext": _kontext, "redux": _redux}


@pytest.mark.parametrize("name", TAKERS)
def test_values_beyond_a_picture_s_are_told_once(name: str) -> None:
    image = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    image[0, 0, 0] = torch.tensor([0.0, 1.0, 0.5])
    assert not [note for note in TAKERS[name](image) if "values" in note]
    for levels in (image * 255, (image * 255).to(torch.uint8)):
        told = [note for note in TAKERS[name](levels) if "values" in note]
        assert len(told) == 1 and "from 0 to 255" in told[0] and "Divide" in told[0]


def test_rounding_is_not_told_and_nan_is_told_elsewhere() -> None:
    image = torch.tensor([-1e-3, 1 + 1e-3]).view(1, 1, 2, 1)
    assert beyond(image) == [] and beyond(image * float("nan")) == [] and beyond(image * float("inf")) == []
    assert "from -0.1 to 0.5" in beyond(torch.tensor([-0.1, 0.5]))[0]


GROWING: dict[str, Callable[[], object]] = {
    "structure": lambda: structure.prepare(torch.rand(1, 40, 2000, 3), height=16384),
    "structure, cut": lambda: structure.prepare(torch.rand(1, 1, 90_000, 3), width=1024, height=1024, fit="crop"),
    "map": lambda: preprocess.at_size(torch.rand(1, 8, 8, 3), 16384, 16384),
    "kontext": lambda: kontext.arranged([("image_1", torch.rand(1, 16, 16, 3)), ("image_2", torch.rand(1, 1, 600, 3))],
                                        kontext.Settings(layout=kontext.RIGHT, size=kontext.STRETCH)),
    "crop": lambda: regions.crop(torch.rand(1, 1, 600_000, 3), torch.ones(1, 1, 600_000))}


@pytest.mark.parametrize("name", GROWING)
def test_no_size_that_a_workflow_asks_for_fills_the_memory(name: str) -> None:
    with pytest.raises(BadInput, match=r"would become .* more than 64 megapixels"):
        GROWING[name]()


def test_a_large_picture_may_shrink() -> None:
    check_size((1, MAX_PIXELS + 2), (1, MAX_PIXELS + 1))
