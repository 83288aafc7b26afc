"""The time shift of the picture's size, for samplers that do not shift by themselves."""

from __future__ import annotations

from typing import Any

from ..engine.errors import BadInput
from ..engine.sampling import image_seq_len, mu_for_seq_len
from . import api
from .api import host

UNSHIFTED = {False: "schnell runs without a shift; the model is left as it is",
             None: "this MODEL is no FLUX.1; it is left as it is"}


def mu_of(latent: Any, base_shift: float, max_shift: float) -> tuple[int, float]:
    """Image tokens of a LATENT and the shift for as many. BadInput if it is none."""
    shape = getattr(latent.get("samples") if isinstance(latent, dict) else None, "shape", ())
    if len(shape) != 4 or 0 in shape:
        raise BadInput("a latent must hold samples of shape (batch, channels, height/8, width/8), found "
                       f"{tuple(shape)}")
    tokens = image_seq_len(*shape[-2:])
    return tokens, mu_for_seq_len(tokens, base_mu=base_shift, max_mu=max_shift)


class FluxKitAutoShift(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        shift: dict[str, Any] = {"min": 0.0, "max": 100.0, "step": 0.01}
        return api.Schema(
            node_id="FluxKitAutoShift", display_name="Flux Auto Shift", category="Flux Kit/Conditioning",
            search_aliases=["model sampling flux", "time shift", "sigma shift", "mu"],
            description="Shifts the schedule by the size of the picture, as Black Forest Labs does, for core samplers: "
                        "larger pictures spend more steps on high noise. Flux Sampler does so by itself with the "
                        "schedule bfl. Set the scheduler to simple. schnell is left as it is.",
            inputs=[api.Model.Input("model", tooltip="A FLUX.1 model."),
                    api.Latent.Input("latent", tooltip="The latent that is sampled; its size is what counts."),
                    api.Float.Input("base_shift", default=0.5, **shift, tooltip="The shift at 256 tokens, 256 x 256."),
                    api.Float.Input("max_shift", default=1.15, **shift,
                                    tooltip="The shift at 4096 tokens, 1024 x 1024; larger pictures go beyond it.")],
            outputs=[api.Model.Output("MODEL", tooltip="The model with the shift, for KSampler or BasicScheduler.")])

    @classmethod
    def execute(cls, model: Any, latent: Any, base_shift: float, max_shift: float) -> Any:
        tokens, mu = mu_of(latent, base_shift, max_shift)
        guided = host().embeds_guidance(model)
        if not guided:
            host().show(UNSHIFTED[guided])
            return api.NodeOutput(model)
        host().show(f"{tokens} tokens: shift {mu:.4f}")
        return api.NodeOutput(host().with_shift(model, mu))
