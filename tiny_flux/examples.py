"""tiny-flux in the place of the real models in the example workflows: which settings, and which input pictures.

The tests run the examples so, and `docs/tools/thumbnails.py` draws their thumbnails.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .scenes import Scene, render
from .tasks import Size, box, depth

FILES = ("clip_l=tiny-clip_l.safetensors", "t5=tiny-t5.safetensors", "vae=tiny-ae.safetensors")
SMALL = ("Size.aspect=custom", "Size.width=128", "Size.height=128")
SQUARE = (128, 128)


@dataclass(frozen=True)
class Input:
    """A picture of a scene. `hole`: transparent over the figure and a margin of it, as a mask editor saves it; `near`:
    the scene's depth instead of its colours."""

    scene: Scene
    size: Size = SQUARE
    hole: bool = False
    near: bool = False

    def draw(self) -> Image.Image:
        shown = render(self.scene, *self.size)
        if self.near:
            shown = np.repeat(depth(self.scene, self.size)[..., None], 3, axis=2)
        pixels = (shown * 255).round().astype(np.uint8)
        if not self.hole:
            return Image.fromarray(pixels)
        return Image.fromarray(np.concatenate((pixels, self._alpha()), axis=2))

    def _alpha(self) -> NDArray[np.uint8]:
        alpha = np.full((self.size[1], self.size[0], 1), 255, np.uint8)
        left, top, right, bottom = box(self.scene, self.size)
        alpha[max(0, round(top - 8)):round(bottom + 8), max(0, round(left - 8)):round(right + 8)] = 0
        return alpha


@dataclass(frozen=True)
class Stand:
    """`settings` as NODE.input=value of `flux-kit run`; `inputs`: title of a Load Image node -> its picture; `shows`:
    the scene that the result is to show, if that can be told."""

    settings: tuple[str, ...]
    inputs: Mapping[str, Input] = field(default_factory=dict)
    shows: Scene | None = None

    def all_settings(self) -> list[str]:
        return [*self.settings, *(f"{title}.image={file_name(title)}" for title in self.inputs)]

    def write_inputs(self, folder: Path) -> None:
        for title, each in self.inputs.items():
            each.draw().save(folder / file_name(title))


def file_name(title: str) -> str:
    return f"{title.lower()}.png"


def loaded(model: str) -> tuple[str, ...]:
    return tuple(f"Load Flux.{setting}" for setting in (f"model={model}", *FILES))


def stack(file: str, strength: float = 1.0) -> str:
    return "LoRAs.rows=" + json.dumps([{"on": True, "lora": file, "model": strength, "clip": strength}])


DEV, FILL = "tiny-flux-dev.safetensors", "tiny-flux-fill.gguf"
KONTEXT, CANNY = "tiny-flux-kontext.safetensors", "tiny-flux-canny.safetensors"
RED_CIRCLE = Scene("large", "red", "circle", "center", "blue")

STANDS: dict[str, Stand] = {
    "hello_tiny_flux": Stand(()),
    "text_to_image": Stand((*(f"1.{setting}" for setting in (f"model={DEV}", *FILES)), *SMALL,
                            "Prompt.prompt=a small yellow star at the top on a black background"),
                           shows=Scene("small", "yellow", "star", "top", "black")),
    "inpaint_region": Stand(
        (*loaded(FILL), "Crop.megapixels=0.016384", "Crop.min_context=0",
         "Prompt.prompt=a large yellow star in the center on a blue background"),
        {"Picture": Input(Scene("small", "red", "circle", "right", "blue"), (256, 256), hole=True)},
        Scene("small", "yellow", "star", "right", "blue")),
    "outpaint": Stand(
        (*loaded(FILL), "Canvas.left=32", "Canvas.right=32", "Canvas.overlap=8",
         "Prompt.prompt=a large red circle in the center on a blue background"),
        {"Picture": Input(RED_CIRCLE)}, RED_CIRCLE),
    "depth": Stand(
        (*loaded(DEV), stack("tiny-lora-depth.safetensors"), "Map.kind=as is",
         "Prompt.prompt=a large orange star in the center on a purple background"),
        {"Picture": Input(RED_CIRCLE, near=True)}, Scene("large", "orange", "circle", "center", "purple")),
    "canny": Stand(
        (*loaded(CANNY), "Prompt.prompt=a large white star in the center on a green background"),
        {"Picture": Input(Scene("large", "red", "triangle", "left", "blue"))},
        Scene("large", "white", "triangle", "left", "green")),
    "redux_mix": Stand(
        (*loaded(DEV), *SMALL, "Redux files.clip_vision=tiny-siglip.safetensors",
         "Redux files.style_model=tiny-redux.safetensors", "Redux 2.strength=0.4"),
        {"First": Input(Scene("large", "yellow", "star", "center", "purple")),
         "Second": Input(Scene("small", "red", "circle", "left", "black"))}),
    "kontext_edit": Stand(
        (*loaded(KONTEXT), "Kontext.size=keep-16", "Prompt.prompt=change the background to green"),
        {"Picture": Input(RED_CIRCLE)}, Scene("large", "red", "circle", "center", "green")),
    "kontext_two_references": Stand(
        (*loaded(KONTEXT), "Kontext.size=keep-16", "Prompt.prompt=the star on the other background"),
        {"First": Input(Scene("large", "white", "star", "left", "red")),
         "Second": Input(Scene("small", "yellow", "square", "right", "purple"))},
        Scene("large", "white", "star", "left", "purple")),
    "lora_fill": Stand(
        (*loaded(FILL), stack("tiny-lora-cross.safetensors"),
         "Prompt.prompt=a large yellow cross in the center on a blue background"),
        {"Picture": Input(RED_CIRCLE, hole=True)}, Scene("large", "yellow", "cross", "center", "blue")),
    "image_to_image": Stand(
        (*loaded(DEV), "Sampler.denoise=0.9", "Prompt.prompt=a large yellow circle in the center on a blue background"),
        {"Picture": Input(RED_CIRCLE)}),
    "draft_then_final": Stand(
        (*loaded(DEV), *SMALL, "Load schnell.model=tiny-flux-schnell.safetensors",
         "Prompt.prompt=a small white ring at the left on a red background"),
        shows=Scene("small", "white", "ring", "left", "red")),
}
"""By the example's name."""
