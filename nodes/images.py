"""Nodes between latents, pictures and files."""

from __future__ import annotations

from typing import Any

from ..engine.conditioning.fill import true_size
from ..engine.conditioning.pictures import to_encode
from ..hosts.names import check_prefix, problems
from . import api
from .api import host


class FluxKitDecode(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitDecode", display_name="Flux Decode", category="Flux Kit/Latent",
            search_aliases=["vae decode", "latent to image"],
            description="Turns a latent into a picture. What Flux Fill added to an odd size is taken off again.",
            inputs=[api.Latent.Input("latent", tooltip="A latent from a sampler."),
                    api.Vae.Input("vae", tooltip="The FLUX.1 autoencoder.")],
            outputs=[api.Image.Output("IMAGE", tooltip="The picture.")])

    @classmethod
    def execute(cls, latent: Any, vae: Any) -> Any:
        return api.NodeOutput(true_size(host().decode(vae, latent), latent))


class FluxKitEncode(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitEncode", display_name="Flux Encode", category="Flux Kit/Latent",
            search_aliases=["vae encode", "image to latent", "img2img", "inpaint mask"],
            description="Turns a picture into a latent to start from. With a mask only the masked part changes.",
            inputs=[api.Image.Input("image", tooltip="A picture. Its sides are cut to multiples of 8."),
                    api.Vae.Input("vae", tooltip="The FLUX.1 autoencoder."),
                    api.Mask.Input("mask", optional=True, tooltip="White where the sampler may change the picture.")],
            outputs=[api.Latent.Output("LATENT", tooltip="The latent of the picture, for a sampler.")])

    @classmethod
    def execute(cls, image: Any, vae: Any, mask: Any = None) -> Any:
        mask, notes = to_encode(image, mask)
        api.told(notes)
        return api.NodeOutput(host().encode(vae, image, mask=mask))


class FluxKitSave(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitSave", display_name="Flux Save", category="Flux Kit/Image", is_output_node=True,
            search_aliases=["save image", "png", "output"],
            description="Saves pictures as PNG files that carry their workflow.",
            inputs=[api.Image.Input("images", tooltip="The pictures to save."),
                    api.String.Input("filename_prefix", default="FluxKit",
                                     tooltip="Start of the file name, inside the output folder; may hold subfolders.")],
            hidden=[api.Hidden.prompt, api.Hidden.extra_pnginfo])

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return problems(check_prefix, filename_prefix)

    @classmethod
    def execute(cls, images: Any, filename_prefix: str) -> Any:
        saved = host().save_images(images, filename_prefix, api.metadata(cls.hidden))
        return api.NodeOutput(ui={"images": saved})
