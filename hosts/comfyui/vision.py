"""Genuine CLIP_VISION and STYLE_MODEL objects of ComfyUI round the engine's SigLIP and Redux.

The host has no memory management for style models; ours are moved as all other models are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from ...engine.errors import BadInput, NotFinite
from ...engine.models.vision import Redux, SiglipVision, check_pictures, check_width
from ...engine.specs import SiglipSpec
from ...engine.weights import load
from .layers import adopt, plain_layers
from .objects import archive_dtypes

Answer = tuple[Tensor, Tensor | None, Tensor, None]


class Tower(SiglipVision):
    """Answers as the host's own vision towers do."""

    def forward(self, pixel_values: Tensor, attention_mask: Tensor | None = None,  # type: ignore[override]
                intermediate_output: str | int | None = None) -> Answer:
        """Normed last states `(B, L, d)`; the states after one layer, or with "all" those after each
        `(B, layers, L, d)`; the normed states again in place of a pooled vector; no projection."""
        _, *states = self.layer_states(pixel_values)
        last = self.normed(states[-1])
        if intermediate_output == "all":
            return last, torch.stack(states, dim=1), last, None
        return last, None if intermediate_output is None else states[int(intermediate_output)], last, None


class ClipVision(comfy.clip_vision.ClipVisionModel):  # type: ignore[misc]
    """The host's class; pictures are checked on their way in, states on their way out."""

    def encode_image(self, image: Tensor, crop: bool = True, **more: Any) -> Any:
        check_pictures(image, self.image_size, crop)
        output = super().encode_image(image, crop=crop, **more)
        require_finite(output.last_hidden_state, "vision encoder")
        return output


class StyleModel(comfy.sd.StyleModel):  # type: ignore[misc]
    """The host's class, with a patcher. Computes on the device of text encoders, in fp32 as the host does."""

    def __init__(self, redux: Redux, patcher: Any) -> None:
        super().__init__(redux)
        self.patcher = patcher

    def get_cond(self, input: Any) -> Tensor:
        states: Tensor = input.last_hidden_state
        comfy.model_management.load_models_gpu([self.patcher])
        tokens = self.model(states.to(self.patcher.load_device, torch.float32)).to(states.device)
        require_finite(tokens, "Redux model")
        return tokens  # type: ignore[no-any-return]


def require_finite(values: Tensor, model: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NotFinite(f"the {model} gave NaN or infinity. Check its file, or start ComfyUI with --fp32-text-enc")


def load_clip_vision(path: str) -> Any:
    vision = load(path, "vision", dtype=None)
    assert isinstance(vision, SiglipVision)
    return make_clip_vision(vision, path)


def load_clip_vision_patcher(path: str, disable_dynamic: bool = False) -> Any:
    return load_clip_vision(path).patcher


def make_clip_vision(vision: SiglipVision, path: str | Path) -> Any:
    """CLIP_VISION of an engine vision encoder, its weights in the dtype that the host stores such models in."""
    # the host has no head, and does not move tensors outside layers
    spec = replace(vision.spec, vision_use_head=False, layer_norm_eps=host_eps())
    made = empty_clip_vision(spec)
    with torch.device("meta"):
        headless, made.model = SiglipVision(spec), Tower(spec, plain_layers())
    weights = vision.state_dict()
    headless.load_state_dict({name: weights[name] for name in headless.state_dict()}, assign=True)
    adopt(headless, made.model, made.dtype)
    archive_dtypes(made.model)
    made.patcher = static_patcher(made.model, load_clip_vision_patcher, path)
    return made


def host_eps() -> float:
    """Of the norms in the host's own vision towers, ten times the published one: 1e-5 off where states are small."""
    probe = comfy.clip_model.CLIPLayer(8, 1, 8, "gelu_pytorch_tanh", torch.float32, "meta", comfy.ops.manual_cast)
    return float(probe.layer_norm1.eps)


def empty_clip_vision(spec: SiglipSpec) -> ClipVision:
    """The host's object for these sizes, whatever its version puts on it; its own network has no layers."""
    config = {**asdict(spec), "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh",
              "image_mean": [spec.image_mean] * 3, "image_std": [spec.image_std] * 3, "num_hidden_layers": 0}
    with TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(config), encoding="utf-8")
        made = ClipVision(str(file))
    if hasattr(made, "config"):
        made.config["num_hidden_layers"] = spec.num_hidden_layers
    return made


def load_style_model(path: str) -> Any:
    redux = load(path, "redux", dtype=None)
    assert isinstance(redux, Redux)
    return make_style_model(redux, path)


def load_style_model_patcher(path: str, disable_dynamic: bool = False) -> Any:
    return load_style_model(path).patcher


def make_style_model(redux: Redux, path: str | Path) -> Any:
    """STYLE_MODEL of an engine Redux projector, its weights as they are stored."""
    with torch.device("meta"):
        ours = Redux(redux.spec, plain_layers())
    adopt(redux, ours)
    archive_dtypes(ours)
    return StyleModel(ours, static_patcher(ours, load_style_model_patcher, path))


def static_patcher(model: torch.nn.Module, factory: Any, path: str | Path) -> Any:
    """The patcher of a model that runs where text encoders do; the host loads it anew by `factory`."""
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device())
    patcher.cached_patcher_init = (factory, (str(path),))
    return patcher


def states_of(clip_vision: Any, image: Tensor, crop: bool) -> Tensor:
    """Last states of an IMAGE by any CLIP_VISION of the host, ours or core's."""
    check_pictures(image, clip_vision.image_size, crop)
    states: Tensor = clip_vision.encode_image(image, crop=crop).last_hidden_state.float()
    require_finite(states, "vision encoder")
    return states


def tokens_of(style_model: Any, states: Tensor) -> Tensor:
    """Text tokens of states by any STYLE_MODEL of the host that is a Redux, ours or core's."""
    layer = getattr(style_model.model, "redux_up", None)
    if layer is None:
        raise BadInput(f"this STYLE_MODEL is {type(style_model.model).__name__}, FLUX.1 takes Redux "
                       "(flux1-redux-dev.safetensors); load it with Load Flux Redux")
    check_width(states, layer.weight.shape[1])
    tokens: Tensor = style_model.get_cond(SimpleNamespace(last_hidden_state=states)).float()
    require_finite(tokens, "Redux model")
    return tokens
