"""Kontext: pictures to edit by words."""

from __future__ import annotations

from typing import Any

from ..engine.conditioning import kontext
from . import api
from .api import host
from .sizes import ASPECTS, CUSTOM, MAX_SIDE

FROM_IMAGE = "from image"
SIZE_TIP = ("In which size pictures are encoded. preferred-stretch: the nearest of the 17 sizes that Kontext was "
            "trained on, stretched, as published. preferred-pad: the same with grey bars in place of the stretch. "
            "keep-16: its own, to the nearest multiple of 16; for small models and small pictures.")
LAYOUT_TIP = ("Several pictures. chain: each for itself, placed as if they were stitched. stitch-right, stitch-down: "
              "one picture, side by side or one below the other, which Kontext knows best. index: for models that know "
              "it.")
ASPECT_TIP = ("Of the result. from image: the size of the first picture. custom: width and height. A ratio: as many "
              "pixels as 1024 x 1024, or with keep-16 as the first picture has.")
MASK_TIP = "White: what of the first picture may change. The latent is then that picture, not an empty one."
SAME_SHAPE = "hint: Kontext and dev have the same shape and cannot be told apart; only flux1-kontext-dev edits pictures"
SCHNELL = "hint: this model is schnell, which does not edit pictures; load flux1-kontext-dev"


def inputs() -> list[Any]:
    side: dict[str, Any] = {"default": 1024, "min": 16, "max": MAX_SIDE, "step": 16}
    more = [api.Image.Input(f"image_{number}", optional=True, tooltip="A picture to edit or to take from.")
            for number in range(1, 5)]
    return [api.Conditioning.Input("positive", tooltip="What to change, encoded."),
            api.Vae.Input("vae", tooltip="The FLUX.1 autoencoder."), *more,
            api.Conditioning.Input("negative", optional=True, tooltip="It gets the same pictures, so that CFG compares "
                                                                      "like with like."),
            api.Mask.Input("edit_mask", optional=True, tooltip=MASK_TIP),
            api.Model.Input("model", optional=True, tooltip="To check that it takes pictures. It is not changed."),
            api.Combo.Input("size", options=list(kontext.FITS), default=kontext.STRETCH, tooltip=SIZE_TIP),
            api.Combo.Input("layout", options=list(kontext.LAYOUTS), default=kontext.CHAIN, tooltip=LAYOUT_TIP),
            api.Combo.Input("aspect", options=[FROM_IMAGE, *ASPECTS], default=FROM_IMAGE, tooltip=ASPECT_TIP),
            api.Int.Input("width", **side, tooltip="Of the result, with the aspect custom."),
            api.Int.Input("height", **side, tooltip="Of the result, with the aspect custom."),
            api.Float.Input("guidance", default=kontext.GUIDANCE, min=0.0, max=100.0, step=0.1,
                            tooltip="2.5 is the official one. 0 leaves what the prompt has."),
            api.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many results.")]


def outputs() -> list[Any]:
    return [api.Conditioning.Output("POSITIVE", display_name="positive", tooltip="The prompt with the pictures."),
            api.Conditioning.Output("NEGATIVE", display_name="negative",
                                    tooltip="The negative prompt with them; zeros where none is connected."),
            api.Latent.Output("LATENT", tooltip="What to sample: empty, or the first picture with the mask."),
            api.Int.Output("picture_width", display_name="width", tooltip="Of the result."),
            api.Int.Output("picture_height", display_name="height", tooltip="Of the result."),
            api.String.Output("report", display_name="report", tooltip="What was done.")]


class FluxKitKontext(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitKontext", display_name="Flux Kontext", category="Flux Kit/Conditioning",
            search_aliases=["kontext", "reference latent", "edit image", "image scale", "multi reference"],
            description="Gives up to four pictures to FLUX.1 Kontext, which changes them by words. In place of "
                        "FluxKontextImageScale, which cuts pictures off, VAE Encode, ReferenceLatent and FluxGuidance.",
            inputs=inputs(), outputs=outputs())

    @classmethod
    def execute(cls, positive: Any, vae: Any, size: str, layout: str, aspect: str, width: int, height: int,
                guidance: float, batch_size: int, image_1: Any = None, image_2: Any = None, image_3: Any = None,
                image_4: Any = None, negative: Any = None, edit_mask: Any = None, model: Any = None) -> Any:
        hint = [] if model is None else checked(model)
        target = None if aspect == FROM_IMAGE else ASPECTS[aspect] or (width, height)
        made = kontext.edited(
            positive, [image_1, image_2, image_3, image_4], lambda image: host().encode(vae, image)["samples"],
            host().empty_latent,
            kontext.Settings(size, layout, target, aspect != CUSTOM, guidance, batch_size),
            negative=negative, edit_mask=edit_mask)
        report = "\n".join([made.report, *hint])
        host().show(report)
        return api.NodeOutput(made.positive, made.negative, made.latent, *made.size, report)


def checked(model: Any) -> list[str]:
    """BadInput for a model that takes no pictures, a hint for one that is not made for them."""
    kontext.check_model(host().img_in_width(model))
    return [SAME_SHAPE if host().embeds_guidance(model) else SCHNELL]
