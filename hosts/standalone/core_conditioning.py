"""Equivalents of ComfyUI's core nodes round Fill, Depth, Canny and Kontext: same ids, sockets and widget order. They do
what core's do, also where BFL does otherwise; Flux Kit's own nodes follow BFL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...engine.conditioning.kontext import SIZES
from ...engine.errors import BadInput, FluxKitError
from ...engine.sampling.slots import METHOD, METHODS, PICTURE, REFERENCES
from ...engine.specs import FLUX_AE
from . import io, objects
from .host import here
from .scaling import CENTER, scaled

UXO = "uxo/uno"
KONTEXT_SIZES = list(SIZES)


def with_values(conditioning: list[Any], **values: Any) -> list[Any]:
    return [[cond, {**known, **values}] for cond, known in conditioning]


def _given() -> list[io.Input]:
    return [io.Conditioning.Input("positive"), io.Conditioning.Input("negative"), io.Vae.Input("vae"),
            io.Image.Input("pixels")]


def _conditioned() -> list[io.Output]:
    return [io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative"),
            io.Latent.Output(display_name="latent")]


class InpaintModelConditioning(io.ComfyNode):
    """The picture with a grey hole, and the mask, for a Fill model; its latent, with a noise mask if asked for. The
    hole is where the mask rounds to 1, the mask itself stays soft."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InpaintModelConditioning", display_name="InpaintModelConditioning",
            category="conditioning/inpaint",
            inputs=[*_given(), io.Mask.Input("mask"),
                    io.Boolean.Input("noise_mask", default=True, tooltip="Keep what lies outside the mask at every "
                                     "step.")],
            outputs=_conditioned())

    @classmethod
    def execute(cls, positive: list[Any], negative: list[Any], vae: objects.Vae, pixels: Tensor, mask: Tensor,
                noise_mask: bool = True) -> io.NodeOutput:
        mask = F.interpolate(mask.reshape(-1, 1, *mask.shape[-2:]), size=pixels.shape[1:3], mode="bilinear")
        count = max(len(pixels), len(mask))
        if {len(pixels), len(mask)} - {1, count}:
            raise BadInput(f"{len(pixels)} pictures and {len(mask)} masks do not go together; give one of either, or "
                           "one mask for each picture")
        pixels = pixels[..., :3].expand(count, -1, -1, -1)
        grid = FLUX_AE.downscale
        height, width = (side // grid * grid for side in pixels.shape[1:3])
        top, left = ((side % grid) // 2 for side in pixels.shape[1:3])
        mask = mask[..., top:top + height, left:left + width]
        whole = pixels[:, top:top + height, left:left + width]
        hole = (whole - 0.5) * (1.0 - mask.round()).movedim(1, -1) + 0.5
        picture = here().encode(vae, hole)["samples"]
        latent = here().encode(vae, whole)
        if noise_mask:
            latent["noise_mask"] = mask
        values = {PICTURE: picture, "concat_mask": mask}
        return io.NodeOutput(with_values(positive, **values), with_values(negative, **values), latent)


class DifferentialDiffusion(io.ComfyNode):
    """Soft noise masks decide from which step on a place is painted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="DifferentialDiffusion", display_name="Differential Diffusion",
                         category="_for_testing", is_experimental=True,
                         inputs=[io.Model.Input("model"),
                                 io.Float.Input("strength", default=1.0, min=0.0, max=1.0, step=0.01, optional=True)],
                         outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model: objects.Model, strength: float = 1.0) -> io.NodeOutput:
        return io.NodeOutput(replace(model, differential=strength))


class InstructPixToPixConditioning(io.ComfyNode):
    """A control picture (edges, a depth map) for a Depth or Canny model, and an empty latent of its size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="InstructPixToPixConditioning", display_name="InstructPixToPixConditioning",
                         category="conditioning/instructpix2pix", inputs=_given(), outputs=_conditioned())

    @classmethod
    def execute(cls, positive: list[Any], negative: list[Any], vae: objects.Vae, pixels: Tensor) -> io.NodeOutput:
        picture = here().encode(vae, pixels)["samples"]
        latent = {"samples": torch.zeros_like(picture)}
        return io.NodeOutput(*(with_values(one, **{PICTURE: picture}) for one in (positive, negative)), latent)


class Canny(io.ComfyNode):
    """Edges, white on black."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        threshold: dict[str, Any] = {"min": 0.01, "max": 0.99, "step": 0.01}
        return io.Schema(node_id="Canny", display_name="Canny", category="image/preprocessors",
                         inputs=[io.Image.Input("image"), io.Float.Input("low_threshold", default=0.4, **threshold),
                                 io.Float.Input("high_threshold", default=0.8, **threshold)],
                         outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, image: Tensor, low_threshold: float, high_threshold: float) -> io.NodeOutput:
        try:
            from kornia.filters import canny
        except ImportError as error:
            raise FluxKitError("Canny needs the package kornia, which is not installed: pip install kornia. Or take "
                               "Flux Kit's Structure Map") from error
        if high_threshold < low_threshold:
            raise BadInput(f"low_threshold {low_threshold} is above high_threshold {high_threshold}; exchange them")
        pixels = image[..., :3].to(here().device, torch.float32).movedim(-1, 1)
        edges: Tensor = canny(pixels, low_threshold, high_threshold)[1]
        return io.NodeOutput(edges.cpu().repeat(1, 3, 1, 1).movedim(1, -1))


class ReferenceLatent(io.ComfyNode):
    """A reference picture, behind those that the conditioning has already."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ReferenceLatent", display_name="ReferenceLatent",
                         category="advanced/conditioning/edit_models",
                         inputs=[io.Conditioning.Input("conditioning"), io.Latent.Input("latent", optional=True)],
                         outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, conditioning: list[Any], latent: dict[str, Any] | None = None) -> io.NodeOutput:
        if latent is None:
            return io.NodeOutput(conditioning)
        samples = objects.checked_samples(latent)
        return io.NodeOutput([[cond, {**values, REFERENCES: [*(values.get(REFERENCES) or []), samples]}]
                              for cond, values in conditioning])


class FluxKontextMultiReferenceLatentMethod(io.ComfyNode):
    """Where references lie for the model. `index_timestep_zero`, for models trained with it, is refused by FLUX.1."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FluxKontextMultiReferenceLatentMethod", display_name="Edit Model Reference Method",
                         category="advanced/conditioning/flux", is_experimental=True,
                         inputs=[io.Conditioning.Input("conditioning"),
                                 io.Combo.Input("reference_latents_method",
                                                options=["offset", "index", UXO, "index_timestep_zero"])],
                         outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, conditioning: list[Any], reference_latents_method: str) -> io.NodeOutput:
        method = METHODS[2] if reference_latents_method == UXO else reference_latents_method
        return io.NodeOutput(with_values(conditioning, **{METHOD: method}))


class FluxKontextImageScale(io.ComfyNode):
    """To the size of the nearest aspect that Kontext is trained on; what sticks out is cut away."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FluxKontextImageScale", display_name="FluxKontextImageScale",
                         category="advanced/conditioning/flux", inputs=[io.Image.Input("image")],
                         outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, image: Tensor) -> io.NodeOutput:
        aspect = image.shape[2] / image.shape[1]
        width, height = min(KONTEXT_SIZES, key=lambda size: (abs(aspect - size[0] / size[1]), size))
        return io.NodeOutput(scaled(image, width, height, "lanczos", CENTER))


class FluxDisableGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FluxDisableGuidance", display_name="FluxDisableGuidance",
                         category="advanced/conditioning/flux", inputs=[io.Conditioning.Input("conditioning")],
                         outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, conditioning: list[Any]) -> io.NodeOutput:
        return io.NodeOutput(with_values(conditioning, guidance=None))


CONDITIONING_NODES: list[type[io.ComfyNode]] = [
    InpaintModelConditioning, DifferentialDiffusion, InstructPixToPixConditioning, Canny, ReferenceLatent,
    FluxKontextMultiReferenceLatentMethod, FluxKontextImageScale, FluxDisableGuidance]
