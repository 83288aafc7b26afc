"""The node for FLUX.1 Fill."""

from __future__ import annotations

from typing import Any

from ..engine.conditioning import fill
from ..engine.conditioning.pictures import with_values, zeroed
from . import api
from .api import host

OFFICIAL, BINARY = "official-soft", "binary"
OFF, SOFT = "off", "soft"
GUIDANCE_TIP = "Guidance that the conditionings get: 30 is the official one. 0 leaves theirs as it is."
MODE_TIP = "official-soft: as Black Forest Labs does, grey in the mask is grey. binary: grey becomes black or white."
NOISE_TIP = ("soft: at every step the sampler also puts the picture back outside the mask. off: as Black Forest Labs "
             "does; Region Paste keeps the rest of the picture.")
SIZE_TIP = ("For sides that are no multiples of 16. pad: repeat the edge; Flux Decode and Region Paste take it off. "
            "stretch: resize. error: stop.")
NEGATIVE_TIP = "What to keep out; used by cfg above 1. Nothing: zeros, for samplers that want one."
MODEL_TIP = "Only to check that it is a Fill model."


class FluxKitFill(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitFill", display_name="Flux Fill", category="Flux Kit/Conditioning",
            search_aliases=["inpaint", "outpaint", "inpaint model conditioning", "fill dev", "inpainting"],
            description="Gives a FLUX.1 Fill model the picture and the mask of what to paint, exactly as Black Forest "
                        "Labs does.",
            inputs=[api.Conditioning.Input("positive", tooltip="What the masked part is to show."),
                    api.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE_TIP),
                    api.Vae.Input("vae", tooltip="The FLUX.1 autoencoder."),
                    api.Image.Input("image", tooltip="The picture. An alpha channel is left out."),
                    api.Mask.Input("mask", tooltip="White where it is painted."),
                    api.Model.Input("model", optional=True, tooltip=MODEL_TIP),
                    api.Float.Input("guidance", default=30.0, min=0.0, max=100.0, step=0.5, tooltip=GUIDANCE_TIP),
                    api.Combo.Input("mask_mode", options=[OFFICIAL, BINARY], default=OFFICIAL, tooltip=MODE_TIP),
                    api.Combo.Input("noise_mask", options=[OFF, SOFT], default=OFF, tooltip=NOISE_TIP),
                    api.Combo.Input("size", options=list(fill.SIZES), default=fill.PAD, tooltip=SIZE_TIP)],
            outputs=[api.Conditioning.Output("POSITIVE", display_name="positive",
                                             tooltip="The prompt with picture and mask."),
                     api.Conditioning.Output("NEGATIVE", display_name="negative",
                                             tooltip="The negative prompt with picture and mask."),
                     api.Latent.Output("LATENT", tooltip="The picture as a latent, of the size to sample."),
                     api.report_output()])

    @classmethod
    def execute(cls, positive: Any, vae: Any, image: Any, mask: Any, guidance: float, mask_mode: str, noise_mask: str,
                size: str, negative: Any = None, model: Any = None) -> Any:
        fill.check_width(None if model is None else host().img_in_width(model))
        parts = fill.prepare(image, mask, binary=mask_mode == BINARY, size=size)
        values = fill.values_of(parts, host().encode(vae, parts.masked)["samples"], guidance)
        made = with_values(positive, values)
        other = zeroed(made) if negative is None else with_values(negative, values, "negative")
        latent = fill.latent_of(host().encode(vae, parts.picture)["samples"], parts, noise_mask=noise_mask == SOFT)
        return api.NodeOutput(made, other, latent, api.told(parts.notes))
