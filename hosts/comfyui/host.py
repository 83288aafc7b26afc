"""The port of `hosts` on ComfyUI."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension
from comfy_api.latest import io as _io
from comfy_execution.utils import get_executing_context
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...engine.adapters import Options, Row, Share
from ...engine.errors import BadInput, NotFinite
from ...engine.models.autoencoder import Autoencoder
from ...engine.models.flux import Flux
from ...engine.models.vision import Redux, SiglipVision
from ...engine.specs import FLUX_AE
from ...engine.text import TextEncoders
from .. import Conditioning, Latent, Metadata, Progress, depth
from ..loras import FILES
from ..names import check_prefix, place_for
from . import folders, lora, objects, sampling, text
from .vision import (
    load_clip_vision,
    load_style_model,
    make_clip_vision,
    make_style_model,
    states_of,
    tokens_of,
)

SUPPORTED = [torch.bfloat16, torch.float16, torch.float32]


def extension(nodes: Sequence[type[Any]]) -> Any:
    """What `comfy_entrypoint` returns for these node classes. Where a server runs, it gets our routes."""
    if "server" in sys.modules:  # loaded long before us, or not at all: it pulls in all of the host's nodes
        from .routes import register
        register()

    class FluxKitExtension(ComfyExtension):  # type: ignore[misc]
        async def get_node_list(self) -> list[type[Any]]:
            return list(nodes)

    return FluxKitExtension()


class ComfyHost:
    """MODEL, CLIP, VAE, CLIP_VISION and STYLE_MODEL are the host's own classes, and any that hold FLUX.1 are taken,
    whoever loaded them.

    Where the port says Interrupted, the host's own exception is raised, which is how its server knows.
    """

    name = "comfyui"
    memory = "auto"
    io = _io

    def __init__(self) -> None:
        folders.register()

    # -- files
    def list_files(self, kind: str) -> list[str]:
        return folders.list_files(kind)

    def resolve_file(self, kind: str, name: str) -> Path:
        return folders.resolve_file(kind, name)

    def new_file(self, kind: str, name: str) -> Path:
        return place_for(kind, name, folders.roots(kind))

    # -- objects
    def load_model(self, path: Path) -> Any:
        return objects.load_patcher(str(path))

    def load_text_encoders(self, paths: Sequence[Path]) -> Any:
        return text.load_clip(paths, folders.roots("text_encoders"))

    def load_vae(self, path: Path) -> Any:
        return objects.load_vae(str(path))

    def load_clip_vision(self, path: Path) -> Any:
        return load_clip_vision(str(path))

    def load_style_model(self, path: Path) -> Any:
        return load_style_model(str(path))

    def wrap_model(self, flux: Flux, path: str | Path) -> Any:
        return objects.model_patcher(flux, path)

    def wrap_clip(self, text_encoders: TextEncoders, path: str | Path) -> Any:
        return text.make_clip(text_encoders, [str(path)])

    def wrap_vae(self, autoencoder: Autoencoder, path: str | Path) -> Any:
        return objects.make_vae(autoencoder, path)

    def wrap_clip_vision(self, vision: SiglipVision, path: str | Path) -> Any:
        return make_clip_vision(vision, path)

    def wrap_style_model(self, redux: Redux, path: str | Path) -> Any:
        return make_style_model(redux, path)

    def img_in_width(self, model: Any) -> int | None:
        return lora.img_in_width(model)

    def drops_control(self, model: Any) -> bool:
        return lora.drops_control(model)

    def embeds_guidance(self, model: Any) -> bool | None:
        return sampling.embeds_guidance(model)

    def with_shift(self, model: Any, mu: float) -> Any:
        return sampling.with_shift(model, mu)

    # -- LoRAs
    def with_loras(self, model: Any, clip: Any | None, rows: Sequence[Row], *, mode: str = "auto", strict: bool = True
                   ) -> tuple[Any, Any | None, str]:
        return lora.with_loras(model, clip, rows, mode=mode, strict=strict, resolve=partial(self.resolve_file, "loras"))

    def lora_share(self, model: Any, path: Path) -> Share:
        return lora.share(model, FILES.read(path, Options(skip_broken=True)))

    # -- work
    def encode_prompt(self, clip: Any, clip_text: str, t5_text: str | None = None, guidance: float | None = None,
                      t5_length: int | None = None) -> Conditioning:
        return text.encode(clip, clip_text, t5_text, guidance, t5_length)

    def empty_latent(self, width: int, height: int, batch: int = 1) -> Latent:
        pixels = FLUX_AE.downscale
        if min(width, height) < pixels or batch < 1:
            raise BadInput(f"a picture of {width} x {height}, {batch} of them, cannot be made")
        return {"samples": torch.zeros(batch, FLUX_AE.z_channels, height // pixels, width // pixels,
                                       device=comfy.model_management.intermediate_device())}

    def sample(self, model: Any, positive: Conditioning, negative: Conditioning | None, latent: Latent, *, seed: int,
               steps: int, cfg: float = 1.0, solver: str = "euler", schedule: str = "simple", denoise: float = 1.0,
               strength: float = 1.0, shift: float | None = None,
               cfg_window: tuple[float, float] = (0.0, 1.0)) -> Latent:
        return sampling.sample(model, positive, negative, latent, seed=seed, steps=steps, cfg=cfg, solver=solver,
                               schedule=schedule, denoise=denoise, strength=strength, shift=shift,
                               cfg_window=cfg_window)

    def decode(self, vae: Any, latent: Latent) -> Tensor:
        require_vae(vae)
        samples = latent["samples"]
        if samples.shape[1] != FLUX_AE.z_channels:
            raise BadInput(f"this latent has {samples.shape[1]} channels, the FLUX.1 VAE decodes {FLUX_AE.z_channels}")
        image: Tensor = vae.decode(samples)
        if not bool(torch.isfinite(image).all()):
            raise NotFinite("the VAE decoded to NaN or infinity. Check its file, or start ComfyUI with --fp32-vae")
        return image

    def encode(self, vae: Any, image: Tensor, *, mask: Tensor | None = None) -> Latent:
        require_vae(vae)
        grid = FLUX_AE.downscale
        if image.ndim != 4 or image.shape[-1] < 3 or min(image.shape[1:3]) < grid:
            raise BadInput("a picture must be (batch, height, width, 3) and at least 8 x 8, found "
                           f"{tuple(image.shape)}")
        latent: Latent = {"samples": vae.encode(image[..., :3])}
        if mask is not None:
            height, width = (side // grid * grid for side in image.shape[1:3])
            top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
            cut = mask[..., top:top + height, left:left + width] if mask.shape[-2:] == image.shape[1:3] else mask
            latent["noise_mask"] = cut.reshape(-1, 1, *cut.shape[-2:])
        return latent

    def see(self, clip_vision: Any, image: Tensor, *, crop: bool = False) -> Tensor:
        return states_of(clip_vision, image, crop)

    def nearness(self, folder: Path, image: Tensor, resolution: int) -> Tensor:
        return depth.nearness(folder, image, resolution, self.device, partial(objects.room_for, self.device))

    def style_tokens(self, style_model: Any, states: Tensor) -> Tensor:
        return tokens_of(style_model, states)

    def save_images(self, images: Tensor, prefix: str, metadata: Metadata | None = None) -> list[dict[str, str]]:
        if not bool(torch.isfinite(images).all()):
            raise NotFinite("the picture holds NaN or infinity; nothing was saved")
        check_prefix(prefix)
        root = os.path.realpath(folder_paths.get_output_directory())
        if not Path(os.path.realpath(os.path.join(root, prefix))).is_relative_to(root):
            raise BadInput(f"file name prefix '{prefix}' is a link that leaves the output folder")
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, root, images.shape[2], images.shape[1])
        texts = png_texts(metadata)
        saved = []
        for number, image in enumerate(images, start=counter):
            file = f"{name.replace('%batch_num%', str(number - counter))}_{number:05}_.png"
            pixels = (image.cpu().float() * 255).clamp(0, 255).to(torch.uint8)  # cut off, as core's node does
            Image.fromarray(pixels.numpy()).save(os.path.join(folder, file), pnginfo=texts, compress_level=4)
            saved.append({"filename": file, "subfolder": subfolder, "type": "output"})
        return saved

    # -- running
    def progress(self, total: int) -> Progress:
        return reporter(comfy.utils.ProgressBar(total), total)

    def check_interrupt(self) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()

    def show(self, text: str) -> None:
        """Below the widgets of the node; nowhere where no node runs, or no server."""
        module = sys.modules.get("server")  # not imported: it pulls in all of the host's nodes, and runs or does not
        context, server = get_executing_context(), getattr(getattr(module, "PromptServer", None), "instance", None)
        if context is not None and server is not None:
            server.send_progress_text(text, context.node_id)

    # -- where and how models run
    @property
    def device(self) -> torch.device:
        device: torch.device = comfy.model_management.get_torch_device()
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = comfy.model_management.unet_dtype(device=self.device, supported_dtypes=SUPPORTED)
        return dtype


def reporter(bar: Any, total: int) -> Callable[..., None]:
    """Progress with an optional PIL image as preview, in the size limits of the host."""
    def report(value: int, preview: Any = None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        shown = None if preview is None else ("JPEG", preview, None)
        bar.update_absolute(value, total, shown)

    return report


def require_vae(vae: Any) -> None:
    """BadInput unless VAE is an autoencoder of 16 channels, eight pixels to one."""
    channels = getattr(vae, "latent_channels", None)
    if channels != FLUX_AE.z_channels or getattr(vae, "latent_dim", 2) != 2:
        raise BadInput(f"this VAE has {channels} channels, FLUX.1 needs the one with {FLUX_AE.z_channels} "
                       "(ae.safetensors); load it with Load Flux VAE")


def png_texts(metadata: Metadata | None) -> PngInfo | None:
    """The workflow in the picture, unless the user has switched that off."""
    if not metadata or comfy.cli_args.args.disable_metadata:
        return None
    texts = PngInfo()
    for key, value in metadata.items():
        texts.add_text(key, json.dumps(value))
    return texts
