"""Picture files to IMAGE and MASK. Files are hostile input: size and frames are bounded before anything is decoded."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from ...engine.errors import BadInput

MAX_PIXELS = 64 * 1024 * 1024  # of all frames together
MAX_FRAMES = 64
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no others are tried: fewer decoders, fewer surprises
STILLS = {"MPO"}  # several pictures in one file that are no animation
EMPTY_MASK = 64  # side of the mask of a picture without transparency


def read_image(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGE `(B, H, W, 3)` and MASK `(B, H, W)`, fp32 0..1, frames as batch; the mask is 1 where the picture is
    transparent, and 64 x 64 zeros without transparency, as in ComfyUI. Frames of another size than the first are
    left out. BadInput for what is no picture, is damaged or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is below
            with Image.open(path, formats=FORMATS) as file:
                frames = 1 if file.format in STILLS else getattr(file, "n_frames", 1)
                _check_size(path, file.size, frames)
                pairs = [_frame(frame) for _, frame in zip(range(frames), ImageSequence.Iterator(file), strict=False)]
    except Image.DecompressionBombError:
        raise BadInput(f"{path.name}: more than {MAX_PIXELS // 2**20} megapixels; make it smaller first",
                       file=path) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path.name}: not a picture that can be read ({' '.join(str(error).split())})",
                       file=path) from error
    pairs = [pair for pair in pairs if pair[0].shape == pairs[0][0].shape]
    masks = [mask for _, mask in pairs]
    if len({mask.shape for mask in masks}) > 1:  # some frames with transparency, some without
        size = pairs[0][0].shape[1:3]
        masks = [mask if mask.shape[1:] == size else mask.new_zeros(1, *size) for mask in masks]
    return torch.cat([image for image, _ in pairs]), torch.cat(masks)


def _check_size(path: Path, size: tuple[int, int], frames: int) -> None:
    if frames > MAX_FRAMES:
        raise BadInput(f"{path.name}: {frames} frames, at most {MAX_FRAMES} are read", file=path)
    if size[0] * size[1] * frames > MAX_PIXELS:
        of_frames = f", {frames} frames" if frames > 1 else ""
        raise BadInput(f"{path.name}: {size[0]} x {size[1]} pixels{of_frames} is more than {MAX_PIXELS // 2**20} "
                       "megapixels; make it smaller first", file=path)


def _frame(frame: Image.Image) -> tuple[Tensor, Tensor]:
    picture = ImageOps.exif_transpose(frame)
    if picture.mode.startswith("I"):  # 16 bits a channel in files, scaled as ComfyUI does
        picture = picture.convert("I").point(lambda value: value * (1 / 255))
    alpha = None
    if "A" in picture.getbands():
        alpha = picture.getchannel("A")
    elif picture.mode == "P" and "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
    image = torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255)[None]  # (1, H, W, 3)
    if alpha is None:
        return image, torch.zeros(1, EMPTY_MASK, EMPTY_MASK)
    return image, 1 - torch.from_numpy(np.array(alpha, dtype=np.float32) / 255)[None]  # (1, H, W)
