"""Equivalents of ComfyUI's core nodes between latents, pictures and files: same ids, sockets and widget order."""

from __future__ import annotations

from typing import Any

from ..names import check_prefix, problems
from . import io
from .host import here, metadata_of
from .objects import checked_samples, resized

MAX_RESOLUTION = 16384


class VAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="VAEDecode", display_name="VAE Decode", category="latent",
                         inputs=[io.Latent.Input("samples"), io.Vae.Input("vae")], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any) -> io.NodeOutput:
        return io.NodeOutput(here().decode(vae, samples))


class VAEDecodeTiled(io.ComfyNode):
    """Decodes in tiles of `tile_size`. The tiles fit exactly (their statistics are global), so `overlap` is not needed
    and, like the two settings for video, has no effect."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        unused = "Not needed: tiles fit exactly."
        return io.Schema(
            node_id="VAEDecodeTiled", display_name="VAE Decode (Tiled)", category="_for_testing",
            inputs=[io.Latent.Input("samples"), io.Vae.Input("vae"),
                    io.Int.Input("tile_size", default=512, min=64, max=4096, step=32, tooltip="Rows of a strip."),
                    io.Int.Input("overlap", default=64, min=0, max=4096, step=32, tooltip=unused),
                    io.Int.Input("temporal_size", default=64, min=8, max=4096, step=4, tooltip="Video only."),
                    io.Int.Input("temporal_overlap", default=8, min=4, max=4096, step=4, tooltip="Video only.")],
            outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, tile_size: int, overlap: int = 64, temporal_size: int = 64,
                temporal_overlap: int = 8) -> io.NodeOutput:
        return io.NodeOutput(here().decode(vae, samples, tile_size=tile_size))


class VAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="VAEEncode", display_name="VAE Encode", category="latent",
                         inputs=[io.Image.Input("pixels"), io.Vae.Input("vae")], outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, pixels: Any, vae: Any) -> io.NodeOutput:
        return io.NodeOutput(here().encode(vae, pixels))


class LoadImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadImage", display_name="Load Image", category="image",
            inputs=[io.Combo.Input("image", options=here().list_files("input"), upload=io.UploadType.image,
                                   tooltip="A picture in an input folder.")],
            outputs=[io.Image.Output(), io.Mask.Output()])

    @classmethod
    def validate_inputs(cls, image: str | None = None) -> bool | str:
        return problems(here().resolve_file, "input", image)

    @classmethod
    def fingerprint_inputs(cls, image: str | None = None, **_: Any) -> Any:
        return here().input_fingerprint(image)

    @classmethod
    def execute(cls, image: str) -> io.NodeOutput:
        return io.NodeOutput(*here().load_image(image))


class SaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveImage", display_name="Save Image", category="image", is_output_node=True,
            inputs=[io.Image.Input("images", tooltip="The pictures to save."),
                    io.String.Input("filename_prefix", default="ComfyUI", tooltip="Start of the name; may hold "
                                    "subfolders, %width%, %height%, %year%, %month%, %day%, %date:yyyy-MM-dd%.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo])

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None = None) -> bool | str:
        return problems(check_prefix, filename_prefix)

    @classmethod
    def execute(cls, images: Any, filename_prefix: str = "ComfyUI") -> io.NodeOutput:
        saved = here().save_images(images, filename_prefix, metadata_of(cls.hidden))
        return io.NodeOutput(ui={"images": saved})


class PreviewImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="PreviewImage", display_name="Preview Image", category="image", is_output_node=True,
                         inputs=[io.Image.Input("images", tooltip="The pictures to look at.")],
                         hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo])

    @classmethod
    def execute(cls, images: Any) -> io.NodeOutput:
        saved = here().save_images(images, "preview", metadata_of(cls.hidden), temporary=True)
        return io.NodeOutput(ui={"images": saved})


class EmptyLatentImage(io.ComfyNode):
    """Four channels, as in ComfyUI: an all-zero latent of another width is widened when it is sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        size: dict[str, Any] = {"default": 512, "min": 16, "max": MAX_RESOLUTION, "step": 8}
        return io.Schema(node_id="EmptyLatentImage", display_name="Empty Latent Image", category="latent",
                         inputs=[io.Int.Input("width", **size), io.Int.Input("height", **size),
                                 io.Int.Input("batch_size", default=1, min=1, max=4096)],
                         outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int = 1) -> io.NodeOutput:
        return io.NodeOutput(here().empty_latent(width, height, batch_size, channels=4))


class EmptySD3LatentImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size: dict[str, Any] = {"default": 1024, "min": 16, "max": MAX_RESOLUTION, "step": 16}
        return io.Schema(node_id="EmptySD3LatentImage", display_name="EmptySD3LatentImage", category="latent/sd3",
                         inputs=[io.Int.Input("width", **size), io.Int.Input("height", **size),
                                 io.Int.Input("batch_size", default=1, min=1, max=4096)],
                         outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int = 1) -> io.NodeOutput:
        return io.NodeOutput(here().empty_latent(width, height, batch_size))


class SetLatentNoiseMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="SetLatentNoiseMask", display_name="Set Latent Noise Mask", category="latent/inpaint",
                         inputs=[io.Latent.Input("samples"), io.Mask.Input("mask")], outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, samples: dict[str, Any], mask: Any) -> io.NodeOutput:
        return io.NodeOutput({**samples, "noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])})


UPSCALE_METHODS = ["nearest-exact", "bilinear", "area", "bicubic"]


class LatentUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"default": 512, "min": 0, "max": MAX_RESOLUTION, "step": 8,
                                "tooltip": "0: by the other side's ratio."}
        return io.Schema(node_id="LatentUpscale", display_name="Upscale Latent", category="latent",
                         inputs=[io.Latent.Input("samples"), io.Combo.Input("upscale_method", options=UPSCALE_METHODS),
                                 io.Int.Input("width", **side), io.Int.Input("height", **side),
                                 io.Combo.Input("crop", options=["disabled", "center"])],
                         outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, samples: dict[str, Any], upscale_method: str, width: int, height: int, crop: str) -> io.NodeOutput:
        if width == 0 and height == 0:
            return io.NodeOutput(samples)
        h, w = checked_samples(samples).shape[-2:]
        if width == 0:
            height = max(64, height)
            width = round(w * height / h)
        elif height == 0:
            width = max(64, width)
            height = round(h * width / w)
        size = max(64, width) // 8, max(64, height) // 8
        scaled = resized(samples["samples"], *size, upscale_method, crop == "center")
        return io.NodeOutput({**samples, "samples": scaled})


class LatentUpscaleBy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="LatentUpscaleBy", display_name="Upscale Latent By", category="latent",
                         inputs=[io.Latent.Input("samples"), io.Combo.Input("upscale_method", options=UPSCALE_METHODS),
                                 io.Float.Input("scale_by", default=1.5, min=0.01, max=8.0, step=0.01)],
                         outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, samples: dict[str, Any], upscale_method: str, scale_by: float) -> io.NodeOutput:
        h, w = (max(1, round(side * scale_by)) for side in checked_samples(samples).shape[-2:])
        return io.NodeOutput({**samples, "samples": resized(samples["samples"], w, h, upscale_method, crop=False)})


IMAGE_NODES: list[type[io.ComfyNode]] = [
    VAEDecode, VAEDecodeTiled, VAEEncode, LoadImage, SaveImage, PreviewImage, EmptyLatentImage, EmptySD3LatentImage,
    SetLatentNoiseMask, LatentUpscale, LatentUpscaleBy]
