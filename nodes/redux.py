"""Redux: pictures beside the prompt."""

from __future__ import annotations

from typing import Any

from ..engine.conditioning import redux
from . import api
from .api import host

STRENGTH_TIP = ("1 is the official one and costs nothing. Less lets the prompt have more of a say, 0 is off; useful "
                "values are often below 0.1. Other than 1 it needs an attention mask, which costs memory; lower detail "
                "first.")
DETAIL_TIP = ("Tokens along a side, at most what the vision encoder has; 27 are all. Fewer carry the mood and leave "
              "the rest to the prompt: 9 or less for a style.")
LATENT_TIP = "The latent that is sampled. Needed with an area mask, and with Kontext when the strength is not 1."
AREA_TIP = ("White: where in the result the pictures are seen. Their influence still spreads, since the parts of a "
            "picture see each other.")


def inputs() -> list[Any]:
    return [api.Conditioning.Input("conditioning", tooltip="The encoded prompt; it may be empty."),
            api.StyleModel.Input("style_model", tooltip="The Redux model."),
            api.ClipVision.Input("clip_vision", tooltip="The SigLIP vision encoder."),
            api.Image.Input("images", tooltip="One picture or several. For another strength each, chain two of these "
                                              "nodes; the order does not matter."),
            api.Mask.Input("subject", optional=True, tooltip="White: what of the pictures to look at."),
            api.Mask.Input("area", optional=True, tooltip=AREA_TIP),
            api.Latent.Input("latent", optional=True, tooltip=LATENT_TIP),
            api.Float.Input("strength", default=1.0, min=0.0, max=redux.MAX_STRENGTH, step=0.01, tooltip=STRENGTH_TIP),
            api.Int.Input("detail", default=redux.OFFICIAL_DETAIL, min=1, max=redux.MAX_DETAIL, tooltip=DETAIL_TIP),
            api.Combo.Input("fit", options=list(redux.FITS), default=redux.STRETCH,
                            tooltip="The encoder sees a square. stretch: all of the picture, as published. crop: its "
                                    "middle. letterbox: all of it in its aspect, with bars that are not looked at."),
            api.Combo.Input("several", options=list(redux.SEVERAL), default=redux.APPEND,
                            tooltip="Several pictures: append takes the tokens of all; average mixes them into one "
                                    "picture's worth.")]


class FluxKitRedux(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitRedux", display_name="Flux Redux", category="Flux Kit/Conditioning",
            search_aliases=["redux", "style model", "image prompt", "ip adapter", "image variation", "siglip"],
            description="Puts pictures beside the prompt, by FLUX.1 Redux: variations of a picture, its style or its "
                        "subject. In place of CLIP Vision Encode and Apply Style Model.",
            inputs=inputs(),
            outputs=[api.Conditioning.Output("CONDITIONING", tooltip="The prompt with the pictures, for a sampler."),
                     api.String.Output("report", display_name="report", tooltip="What was done.")])

    @classmethod
    def execute(cls, conditioning: Any, style_model: Any, clip_vision: Any, images: Any, strength: float, detail: int,
                fit: str, several: str, subject: Any = None, area: Any = None, latent: Any = None) -> Any:
        made, report = redux.restyled(
            conditioning, images, lambda pictures, crop: host().see(clip_vision, pictures, crop=crop),
            lambda states: host().style_tokens(style_model, states),
            redux.Settings(strength, detail, fit, several), subject=subject, area=area,
            latents=None if latent is None else latent["samples"])
        host().show(report)
        return api.NodeOutput(made, report)
