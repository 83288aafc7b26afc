"""Equivalents of ComfyUI's core nodes that resize, join and extend pictures, and of those that make masks: same ids,
sockets and widget order."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...engine.errors import BadInput
from . import io
from .core_images import MAX_RESOLUTION
from .scaling import CENTER, DISABLED, METHODS, check_picture_size, scaled

MEGAPIXEL = 1024 * 1024
COLOURS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0)}
CHANNELS = ["red", "green", "blue", "alpha"]


def _method(options: list[str] = METHODS) -> io.Input:
    return io.Combo.Input("upscale_method", options=options, tooltip="How pixels are made.")


class ImageScale(io.ComfyNode):
    """A side of 0 follows the other one's ratio; both 0 leave the picture as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"default": 512, "min": 0, "max": MAX_RESOLUTION, "step": 1}
        return io.Schema(node_id="ImageScale", display_name="Upscale Image", category="image/upscaling",
                         inputs=[io.Image.Input("image"), _method(), io.Int.Input("width", **side),
                                 io.Int.Input("height", **side), io.Combo.Input("crop", options=[DISABLED, CENTER])],
                         outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, image: Tensor, upscale_method: str, width: int, height: int, crop: str) -> io.NodeOutput:
        h, w = image.shape[1:3]
        if width == 0 and height == 0:
            return io.NodeOutput(image)
        if width == 0:
            width = max(1, round(w * height / h))
        elif height == 0:
            height = max(1, round(h * width / w))
        return io.NodeOutput(scaled(image, width, height, upscale_method, crop))


class ImageScaleBy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ImageScaleBy", display_name="Upscale Image By", category="image/upscaling",
                         inputs=[io.Image.Input("image"), _method(),
                                 io.Float.Input("scale_by", default=1.0, min=0.01, max=8.0, step=0.01)],
                         outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, image: Tensor, upscale_method: str, scale_by: float) -> io.NodeOutput:
        height, width = (round(side * scale_by) for side in image.shape[1:3])
        return io.NodeOutput(scaled(image, width, height, upscale_method))


class ImageScaleToTotalPixels(io.ComfyNode):
    """`resolution_steps`, of newer versions, rounds sides to its multiples."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ImageScaleToTotalPixels", display_name="Scale Image to Total Pixels",
                         category="image/upscaling",
                         inputs=[io.Image.Input("image"), _method(),
                                 io.Float.Input("megapixels", default=1.0, min=0.01, max=16.0, step=0.01),
                                 io.Int.Input("resolution_steps", default=1, min=1, max=256, optional=True)],
                         outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, image: Tensor, upscale_method: str, megapixels: float, resolution_steps: int = 1
                ) -> io.NodeOutput:
        h, w = image.shape[1:3]
        factor = math.sqrt(megapixels * MEGAPIXEL / (w * h))
        width, height = (round(side * factor / resolution_steps) * resolution_steps for side in (w, h))
        return io.NodeOutput(scaled(image, width, height, upscale_method))


class ImageScaleToMaxDimension(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        methods = ["area", "lanczos", "bilinear", "nearest-exact", "bicubic"]
        return io.Schema(node_id="ImageScaleToMaxDimension", display_name="Scale Image to Max Dimension",
                         category="image/upscaling",
                         inputs=[io.Image.Input("image"), _method(methods),
                                 io.Int.Input("largest_size", default=512, min=0, max=MAX_RESOLUTION, step=1)],
                         outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, image: Tensor, upscale_method: str, largest_size: int) -> io.NodeOutput:
        h, w = image.shape[1:3]
        height = largest_size if h >= w else round((h / w) * largest_size)
        width = largest_size if w >= h else round((w / h) * largest_size)
        return io.NodeOutput(scaled(image, width, height, upscale_method))


class ImageInvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ImageInvert", display_name="Invert Image Colors", category="image",
                         inputs=[io.Image.Input("image")], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, image: Tensor) -> io.NodeOutput:
        return io.NodeOutput(1.0 - image)


class ImageStitch(io.ComfyNode):
    """Two pictures side by side. The second is scaled to the first one's height (or width, where they stand one above
    the other); or, without `match_image_size`, the smaller is padded evenly."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImageStitch", display_name="Image Stitch", category="image/transform",
            inputs=[io.Image.Input("image1"),
                    io.Combo.Input("direction", options=["right", "down", "left", "up"], default="right"),
                    io.Boolean.Input("match_image_size", default=True),
                    io.Int.Input("spacing_width", default=0, min=0, max=1024, step=2),
                    io.Combo.Input("spacing_color", options=list(COLOURS), default="white"),
                    io.Image.Input("image2", optional=True)],
            outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, image1: Tensor, direction: str, match_image_size: bool, spacing_width: int, spacing_color: str,
                image2: Tensor | None = None) -> io.NodeOutput:
        if image2 is None:
            return io.NodeOutput(image1)
        return io.NodeOutput(stitched(image1, image2, direction, match_image_size, spacing_width, spacing_color))


def stitched(first: Tensor, second: Tensor, direction: str, match: bool, gap: int, colour: str) -> Tensor:
    """`ImageStitch` of two IMAGEs; the shorter batch repeats its last picture, three channels become four where the
    other has four."""
    along, across = (2, 1) if direction in ("left", "right") else (1, 2)
    count = max(len(first), len(second))
    if match:
        side, aspect = first.shape[across], second.shape[2] / second.shape[1]
        width, height = (int(side * aspect), side) if along == 2 else (side, int(side / aspect))
        second = scaled(second, width, height, "lanczos")
    rgb = COLOURS[colour]
    grey = rgb[0] if len(set(rgb)) == 1 else 0.0
    side = max(first.shape[across], second.shape[across])
    sides = [side, side]
    sides[along - 1] = first.shape[along] + second.shape[along] + gap + gap % 2
    check_picture_size(sides[1], sides[0], count)
    parts = [_repeated(_padded(picture, across, side, grey), count) for picture in (first, second)]
    channels = max(part.shape[-1] for part in parts)
    parts = [F.pad(part, (0, channels - part.shape[-1]), value=1.0) for part in parts]
    if direction in ("left", "up"):
        parts.reverse()
    if gap:
        shape = list(parts[0].shape)
        shape[along] = gap + gap % 2
        space = torch.tensor((*rgb, 1.0)[:channels]).expand(shape)
        parts.insert(1, space)
    return torch.cat(parts, dim=along)


def _repeated(image: Tensor, count: int) -> Tensor:
    return torch.cat((image, image[-1:].repeat(count - len(image), 1, 1, 1)))


def _padded(image: Tensor, axis: int, side: int, value: float) -> Tensor:
    """An axis filled up to `side`, evenly at both ends."""
    more = side - image.shape[axis]
    before, after = more // 2, more - more // 2
    pad = (0, 0, 0, 0, before, after) if axis == 1 else (0, 0, before, after)
    return F.pad(image, pad, value=value) if more else image


class ImagePadForOutpaint(io.ComfyNode):
    """Grey round a picture, and the mask of it, which fades out over `feathering` pixels inside the picture along the
    sides that grow; not at all where the picture is narrower than twice that."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"default": 0, "min": 0, "max": MAX_RESOLUTION, "step": 8}
        return io.Schema(node_id="ImagePadForOutpaint", display_name="Pad Image for Outpainting", category="image",
                         inputs=[io.Image.Input("image"), io.Int.Input("left", **side), io.Int.Input("top", **side),
                                 io.Int.Input("right", **side), io.Int.Input("bottom", **side),
                                 io.Int.Input("feathering", default=40, min=0, max=MAX_RESOLUTION, step=1)],
                         outputs=[io.Image.Output(), io.Mask.Output()])

    @classmethod
    def execute(cls, image: Tensor, left: int, top: int, right: int, bottom: int, feathering: int) -> io.NodeOutput:
        height, width = image.shape[1:3]
        check_picture_size(width + left + right, height + top + bottom, len(image))
        canvas = F.pad(image, (0, 0, left, right, top, bottom), value=0.5)
        inside = torch.zeros(height, width, dtype=torch.float64)
        if feathering > 0 and feathering * 2 < min(height, width):
            rows, columns = _distance(height, top, bottom), _distance(width, left, right)
            rows = rows.clamp(max=height)[:, None]
            near = torch.minimum(rows, columns[None]).clamp(max=feathering)
            inside = ((feathering - near) / feathering) ** 2
        mask = F.pad(inside.float(), (left, right, top, bottom), value=1.0)
        return io.NodeOutput(canvas, mask[None])


def _distance(side: int, before: int, after: int) -> Tensor:
    """Pixels from each place of a side to the nearer end that grows; far where none does."""
    places = torch.arange(side, dtype=torch.float64)
    far = torch.full_like(places, math.inf)
    return torch.minimum(places if before else far, side - places if after else far)


class SolidMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        side: dict[str, Any] = {"default": 512, "min": 1, "max": MAX_RESOLUTION, "step": 1}
        return io.Schema(node_id="SolidMask", display_name="SolidMask", category="mask",
                         inputs=[io.Float.Input("value", default=1.0, min=0.0, max=1.0, step=0.01),
                                 io.Int.Input("width", **side), io.Int.Input("height", **side)],
                         outputs=[io.Mask.Output()])

    @classmethod
    def execute(cls, value: float, width: int, height: int) -> io.NodeOutput:
        check_picture_size(width, height)
        return io.NodeOutput(torch.full((1, height, width), value))


class InvertMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="InvertMask", display_name="InvertMask", category="mask",
                         inputs=[io.Mask.Input("mask")], outputs=[io.Mask.Output()])

    @classmethod
    def execute(cls, mask: Tensor) -> io.NodeOutput:
        return io.NodeOutput(1.0 - mask)


class GrowMask(io.ComfyNode):
    """Pixel by pixel in all directions, or back where `expand` is negative; over corners only without
    `tapered_corners`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="GrowMask", display_name="GrowMask", category="mask",
                         inputs=[io.Mask.Input("mask"),
                                 io.Int.Input("expand", default=0, min=-MAX_RESOLUTION, max=MAX_RESOLUTION, step=1),
                                 io.Boolean.Input("tapered_corners", default=True)],
                         outputs=[io.Mask.Output()])

    @classmethod
    def execute(cls, mask: Tensor, expand: int, tapered_corners: bool) -> io.NodeOutput:
        made = mask.reshape(-1, 1, *mask.shape[-2:]) * (-1 if expand < 0 else 1)
        for _ in range(min(abs(expand), sum(mask.shape[-2:]))):  # then there is nothing left to grow into
            wide = F.pad(made, (1, 1, 1, 1), mode="replicate")
            rows, columns = F.max_pool2d(wide[..., 1:-1], (3, 1), 1), F.max_pool2d(wide[..., 1:-1, :], (1, 3), 1)
            made = torch.maximum(rows, columns) if tapered_corners else F.max_pool2d(wide, 3, 1)
        return io.NodeOutput(made[:, 0] * (-1 if expand < 0 else 1))


class MaskToImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="MaskToImage", display_name="Convert Mask to Image", category="mask",
                         inputs=[io.Mask.Input("mask")], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, mask: Tensor) -> io.NodeOutput:
        return io.NodeOutput(mask.reshape(-1, *mask.shape[-2:])[..., None].expand(-1, -1, -1, 3))


class ImageToMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ImageToMask", display_name="Convert Image to Mask", category="mask",
                         inputs=[io.Image.Input("image"), io.Combo.Input("channel", options=CHANNELS)],
                         outputs=[io.Mask.Output()])

    @classmethod
    def execute(cls, image: Tensor, channel: str) -> io.NodeOutput:
        index = CHANNELS.index(channel)
        if index >= image.shape[-1]:
            raise BadInput(f"this picture has {image.shape[-1]} channels and no {channel}; the mask of a picture with "
                           "transparency is Load Image's second output")
        return io.NodeOutput(image[..., index])


PICTURE_NODES: list[type[io.ComfyNode]] = [
    ImageScale, ImageScaleBy, ImageScaleToTotalPixels, ImageScaleToMaxDimension, ImageInvert, ImageStitch,
    ImagePadForOutpaint, SolidMask, InvertMask, GrowMask, MaskToImage, ImageToMask]
