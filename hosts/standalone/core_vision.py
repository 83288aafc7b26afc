"""Equivalents of ComfyUI's core nodes round Redux: same ids, sockets and widget order. What they do with FLUX.1's
models, to the number; other families are refused by the loader, by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...engine.errors import BadInput
from . import io, objects
from .core_loaders import FileNode, check_files, file_input
from .host import here

CENTER, NONE = "center", "none"
MULTIPLY, BIAS = "multiply", "attn_bias"


class CLIPVisionLoader(FileNode):
    KIND = "clip_vision"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="CLIPVisionLoader", display_name="Load CLIP Vision", category="loaders",
                         inputs=[file_input("clip_name", "clip_vision", "A SigLIP vision encoder file.")],
                         outputs=[io.ClipVision.Output()])

    @classmethod
    def validate_inputs(cls, clip_name: str | None = None) -> bool | str:
        return check_files("clip_vision", clip_name)

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        return io.NodeOutput(here().load_clip_vision(here().resolve_file("clip_vision", clip_name)))


class StyleModelLoader(FileNode):
    KIND = "style_models"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="StyleModelLoader", display_name="Load Style Model", category="loaders",
                         inputs=[file_input("style_model_name", "style_models", "A FLUX.1 Redux file.")],
                         outputs=[io.StyleModel.Output()])

    @classmethod
    def validate_inputs(cls, style_model_name: str | None = None) -> bool | str:
        return check_files("style_models", style_model_name)

    @classmethod
    def execute(cls, style_model_name: str) -> io.NodeOutput:
        return io.NodeOutput(here().load_style_model(here().resolve_file("style_models", style_model_name)))


class CLIPVisionEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="CLIPVisionEncode", display_name="CLIP Vision Encode", category="conditioning",
                         inputs=[io.ClipVision.Input("clip_vision"), io.Image.Input("image"),
                                 io.Combo.Input("crop", options=[CENTER, NONE],
                                                tooltip="center: the middle square. none: all of it, stretched, as "
                                                        "Black Forest Labs does.")],
                         outputs=[io.ClipVisionOutput.Output()])

    @classmethod
    def execute(cls, clip_vision: objects.ClipVision, image: Tensor, crop: str) -> io.NodeOutput:
        return io.NodeOutput(objects.ClipVisionOutput(here().see(clip_vision, image, crop=crop == CENTER)))


class StyleModelApply(io.ComfyNode):
    """The picture's tokens behind those of the text. `multiply` scales the tokens; `attn_bias` makes all other tokens
    look at them less or more, where 1 changes nothing and 0 hides them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleModelApply", display_name="Apply Style Model", category="conditioning/style_model",
            inputs=[io.Conditioning.Input("conditioning"), io.StyleModel.Input("style_model"),
                    io.ClipVisionOutput.Input("clip_vision_output"),
                    io.Float.Input("strength", default=1.0, min=0.0, max=10.0, step=0.001),
                    io.Combo.Input("strength_type", options=[MULTIPLY, BIAS])],
            outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, conditioning: list[Any], style_model: objects.StyleModel,
                clip_vision_output: objects.ClipVisionOutput, strength: float, strength_type: str) -> io.NodeOutput:
        tokens = here().style_tokens(style_model, clip_vision_output.last_hidden_state).flatten(0, 1)[None]
        if strength_type == MULTIPLY:
            tokens = tokens * strength
        factor = strength if strength_type == BIAS else 1.0
        return io.NodeOutput([with_tokens(text, values, tokens, factor) for text, values in conditioning])


def with_tokens(text: Tensor, values: dict[str, Any], tokens: Tensor, factor: float) -> list[Any]:
    """An entry of a conditioning with `tokens` `(1, n, d)` behind its text `(B, t, d)`. All others attend to them
    `factor` times as much; BadInput if they are of another width."""
    if tokens.shape[-1] != text.shape[-1]:
        raise BadInput(f"the style model makes tokens of width {tokens.shape[-1]}, this conditioning's text tokens are "
                       f"{text.shape[-1]} wide; take the text encoders and the Redux model of one family")
    values = dict(values)
    if "attention_mask" in values or factor != 1:
        grid = values.get("attention_mask_img_shape", (1, 1))
        values["attention_mask"] = mask_with_tokens(values.get("attention_mask"), text, tokens.shape[1], grid, factor)
        values["attention_mask_img_shape"] = grid
    return [torch.cat((text, tokens.to(text).expand(len(text), -1, -1)), dim=1), values]


def mask_with_tokens(mask: Tensor | None, text: Tensor, count: int, grid: tuple[int, int], factor: float) -> Tensor:
    """The attention mask of text `(B, t, d)` and a picture of `grid` tokens, widened by `count` tokens between them:
    `(B, L, L)` fp16, added to the scores. The new tokens see everything; the others see them by log(factor)."""
    old = text.shape[1] + math.prod(grid)
    if mask is None:
        mask = torch.zeros(len(text), old, old, dtype=torch.float16)
    elif mask.shape[-2:] != (old, old):
        raise BadInput(f"this conditioning's attention mask has shape {tuple(mask.shape)}; {text.shape[1]} text and "
                       f"{math.prod(grid)} image tokens need sides of {old}; remove the node that added it")
    elif mask.dtype == torch.bool:
        mask = torch.log(mask.half())
    first = text.shape[1]
    others = torch.cat((torch.arange(first), torch.arange(first, old) + count))
    wide = torch.zeros(len(text), old + count, old + count, dtype=torch.float16)
    wide[:, others[:, None], others] = mask.to(wide)
    wide[:, others, first:first + count] = torch.log(torch.tensor(factor)).to(wide)
    return wide.to(text.device)


VISION_NODES: list[type[io.ComfyNode]] = [CLIPVisionLoader, CLIPVisionEncode, StyleModelLoader, StyleModelApply]
