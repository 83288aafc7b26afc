"""Nodes that open model files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from . import api
from .api import FROM_MODEL, host

MODELS, ENCODERS, AUTOENCODERS = "diffusion_models", "text_encoders", "vae"
VISION, STYLES = "clip_vision", "style_models"
MODEL_TIP = ("A FLUX.1 transformer (folder diffusion_models), or an all-in-one file (folder checkpoints). Any layout: "
             "BFL, diffusers or ComfyUI; what the file is, is read from its header.")
CLIP_L_TIP = "The CLIP-L text encoder (folder text_encoders), or an all-in-one file that holds it."
T5_TIP = "The T5 text encoder (T5-XXL for FLUX.1; folder text_encoders), or an all-in-one file that holds it."
VAE_TIP = "The FLUX.1 autoencoder, usually ae.safetensors (folder vae), or an all-in-one file that holds it."
MODEL_OUT, CLIP_OUT = "The transformer, for a sampler.", "Both text encoders, for Encode Prompt."
VAE_OUT = "The autoencoder, for Decode and Encode."
VISION_TIP = ("The SigLIP vision encoder, usually sigclip_vision_patch14_384.safetensors (folder clip_vision). CLIP "
              "vision encoders of other models do not fit.")
STYLE_TIP = "FLUX.1 Redux, usually flux1-redux-dev.safetensors (folder style_models)."


class FluxKitLoadFlux(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"model": MODELS, "clip_l": ENCODERS, "t5": ENCODERS, "vae": AUTOENCODERS}

    @classmethod
    def define_schema(cls) -> Any:
        inside = f" \"{FROM_MODEL}\": it is part of the model file."
        return api.Schema(
            node_id="FluxKitLoadFlux", display_name="Load Flux", category="Flux Kit/Load",
            search_aliases=["flux loader", "checkpoint loader", "load checkpoint", "load diffusion model",
                            "gguf loader"],
            description="Loads all that FLUX.1 needs: transformer, both text encoders and autoencoder, from "
                        "single files or from one all-in-one file.",
            inputs=[api.Combo.Input("model", options=api.files(MODELS), tooltip=MODEL_TIP),
                    api.Combo.Input("clip_l", options=api.files(ENCODERS, FROM_MODEL), tooltip=CLIP_L_TIP + inside),
                    api.Combo.Input("t5", options=api.files(ENCODERS, FROM_MODEL), tooltip=T5_TIP + inside),
                    api.Combo.Input("vae", options=api.files(AUTOENCODERS, FROM_MODEL), tooltip=VAE_TIP + inside)],
            outputs=[api.Model.Output("MODEL", tooltip=MODEL_OUT), api.Clip.Output("CLIP", tooltip=CLIP_OUT),
                     api.Vae.Output("VAE", tooltip=VAE_OUT)])

    @classmethod
    def validate_inputs(cls, model: str | None = None, clip_l: str | None = None, t5: str | None = None,
                        vae: str | None = None) -> bool | str:
        def part(kind: str, name: str | None) -> tuple[str, str | None]:
            return (MODELS, model) if name == FROM_MODEL else (kind, name)

        return api.check_files(model=(MODELS, model), clip_l=part(ENCODERS, clip_l), t5=part(ENCODERS, t5),
                               vae=part(AUTOENCODERS, vae))

    @classmethod
    def execute(cls, model: str, clip_l: str, t5: str, vae: str) -> Any:
        def part(kind: str, name: str) -> Path:
            return api.file_of(MODELS, model) if name == FROM_MODEL else api.file_of(kind, name)

        encoders = [part(ENCODERS, name) for name in (clip_l, t5)]
        return api.NodeOutput(host().load_model(api.file_of(MODELS, model)), host().load_text_encoders(encoders),
                              host().load_vae(part(AUTOENCODERS, vae)))


class FluxKitLoadTransformer(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"model": MODELS}

    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoadTransformer", display_name="Load Flux Transformer", category="Flux Kit/Load",
            search_aliases=["unet loader", "load diffusion model", "flux model loader", "gguf loader",
                            "unet loader gguf"],
            description="Loads the FLUX.1 transformer alone.",
            inputs=[api.Combo.Input("model", options=api.files(MODELS), tooltip=MODEL_TIP)],
            outputs=[api.Model.Output("MODEL", tooltip=MODEL_OUT)])

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        return api.check_files(model=(MODELS, model))

    @classmethod
    def execute(cls, model: str) -> Any:
        return api.NodeOutput(host().load_model(api.file_of(MODELS, model)))


class FluxKitLoadTextEncoders(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"clip_l": ENCODERS, "t5": ENCODERS}

    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoadTextEncoders", display_name="Load Text Encoders", category="Flux Kit/Load",
            search_aliases=["dual clip loader", "clip loader", "t5 loader", "gguf loader", "clip loader gguf",
                            "dual clip loader gguf"],
            description="Loads the two text encoders of FLUX.1.",
            inputs=[api.Combo.Input("clip_l", options=api.files(ENCODERS), tooltip=CLIP_L_TIP),
                    api.Combo.Input("t5", options=api.files(ENCODERS), tooltip=T5_TIP)],
            outputs=[api.Clip.Output("CLIP", tooltip=CLIP_OUT)])

    @classmethod
    def validate_inputs(cls, clip_l: str | None = None, t5: str | None = None) -> bool | str:
        return api.check_files(clip_l=(ENCODERS, clip_l), t5=(ENCODERS, t5))

    @classmethod
    def execute(cls, clip_l: str, t5: str) -> Any:
        return api.NodeOutput(host().load_text_encoders([api.file_of(ENCODERS, name) for name in (clip_l, t5)]))


class FluxKitLoadVAE(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"vae": AUTOENCODERS}

    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoadVAE", display_name="Load Flux VAE", category="Flux Kit/Load",
            search_aliases=["vae loader", "load autoencoder", "ae.safetensors"],
            description="Loads the FLUX.1 autoencoder alone.",
            inputs=[api.Combo.Input("vae", options=api.files(AUTOENCODERS), tooltip=VAE_TIP)],
            outputs=[api.Vae.Output("VAE", tooltip=VAE_OUT)])

    @classmethod
    def validate_inputs(cls, vae: str | None = None) -> bool | str:
        return api.check_files(vae=(AUTOENCODERS, vae))

    @classmethod
    def execute(cls, vae: str) -> Any:
        return api.NodeOutput(host().load_vae(api.file_of(AUTOENCODERS, vae)))


class FluxKitLoadRedux(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"clip_vision": VISION, "style_model": STYLES}

    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoadRedux", display_name="Load Flux Redux", category="Flux Kit/Load",
            search_aliases=["clip vision loader", "style model loader", "redux", "siglip"],
            description="Loads what FLUX.1 Redux needs to see a picture: vision encoder and projector.",
            inputs=[api.Combo.Input("clip_vision", options=api.files(VISION), tooltip=VISION_TIP),
                    api.Combo.Input("style_model", options=api.files(STYLES), tooltip=STYLE_TIP)],
            outputs=[api.ClipVision.Output("CLIP_VISION", tooltip="The vision encoder, for CLIP Vision Encode."),
                     api.StyleModel.Output("STYLE_MODEL", tooltip="The projector, for Apply Style Model.")])

    @classmethod
    def validate_inputs(cls, clip_vision: str | None = None, style_model: str | None = None) -> bool | str:
        return api.check_files(clip_vision=(VISION, clip_vision), style_model=(STYLES, style_model))

    @classmethod
    def execute(cls, clip_vision: str, style_model: str) -> Any:
        return api.NodeOutput(host().load_clip_vision(api.file_of(VISION, clip_vision)),
                              host().load_style_model(api.file_of(STYLES, style_model)))
