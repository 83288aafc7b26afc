"""Equivalents of ComfyUI's core loaders, text and utility nodes: same ids, sockets and widget order.

Written from what the nodes do, for FLUX.1 only: a choice that needs another model family is not offered, and the
error for it lists what is.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from ...engine.adapters import Row
from ...engine.errors import BadInput
from ..fingerprint import fingerprint
from ..names import problems
from . import io
from .host import here

log = logging.getLogger(__name__)

INT_LIMIT = 2**63 - 1
GUIDANCE: dict[str, Any] = {"default": 3.5, "min": 0.0, "max": 100.0, "step": 0.1}


def file_input(name: str, kind: str, tooltip: str) -> io.Input:
    return io.Combo.Input(name, options=here().list_files(kind), tooltip=tooltip)


def check_files(kind: str, *names: str | None) -> bool | str:
    """Answer of `validate_inputs` for file widgets: a name may differ in slashes, case or subfolder. None: linked."""
    answers = [problems(here().resolve_file, kind, name) for name in names]
    return next((answer for answer in answers if answer is not True), True)


class FileNode(io.ComfyNode):
    """Runs anew when a file it names has changed on disk. `KIND` is the kind of all its file widgets, the `*_name*`."""

    KIND: ClassVar[str]

    @classmethod
    def fingerprint_inputs(cls, **widgets: Any) -> list[Any]:
        names = [value for key, value in widgets.items() if "_name" in key and value is not None]
        return [fingerprint(here().resolve_file(cls.KIND, name)) for name in names]


def _device() -> io.Input:
    return io.Combo.Input("device", options=["default", "cpu"], optional=True,
                          tooltip="Where the encoders run: the host's device, or the CPU.")


class UNETLoader(FileNode):
    KIND = "diffusion_models"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="UNETLoader", display_name="Load Diffusion Model", category="advanced/loaders",
            inputs=[file_input("unet_name", "diffusion_models", "A FLUX.1 transformer file."),
                    io.Combo.Input("weight_dtype", options=["default"], tooltip="The host's compute precision.")],
            outputs=[io.Model.Output()])

    @classmethod
    def validate_inputs(cls, unet_name: str | None = None) -> bool | str:
        return check_files("diffusion_models", unet_name)

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(here().load_model(here().resolve_file("diffusion_models", unet_name)))


class DualCLIPLoader(FileNode):
    KIND = "text_encoders"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DualCLIPLoader", display_name="DualCLIPLoader", category="advanced/loaders",
            inputs=[file_input("clip_name1", "text_encoders", "CLIP-L or T5, in either order."),
                    file_input("clip_name2", "text_encoders", "The other encoder."),
                    io.Combo.Input("type", options=["flux"], tooltip="The model family."), _device()],
            outputs=[io.Clip.Output()])

    @classmethod
    def validate_inputs(cls, clip_name1: str | None = None, clip_name2: str | None = None) -> bool | str:
        return check_files("text_encoders", clip_name1, clip_name2)

    @classmethod
    def execute(cls, clip_name1: str, clip_name2: str, type: str, device: str = "default") -> io.NodeOutput:
        host = here()
        files = [host.resolve_file("text_encoders", name) for name in (clip_name1, clip_name2)]
        return io.NodeOutput(host.load_text_encoders(files, device=None if device == "default" else device))


class CLIPLoader(FileNode):
    KIND = "text_encoders"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPLoader", display_name="Load CLIP", category="advanced/loaders",
            inputs=[file_input("clip_name", "text_encoders", "A file that holds both CLIP-L and T5."),
                    io.Combo.Input("type", options=["flux"], tooltip="The model family."), _device()],
            outputs=[io.Clip.Output()])

    @classmethod
    def validate_inputs(cls, clip_name: str | None = None) -> bool | str:
        return check_files("text_encoders", clip_name)

    @classmethod
    def execute(cls, clip_name: str, type: str, device: str = "default") -> io.NodeOutput:
        host = here()
        files = [host.resolve_file("text_encoders", clip_name)]
        return io.NodeOutput(host.load_text_encoders(files, device=None if device == "default" else device))


class VAELoader(FileNode):
    KIND = "vae"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="VAELoader", display_name="Load VAE", category="loaders",
                         inputs=[file_input("vae_name", "vae", "A FLUX.1 autoencoder file.")],
                         outputs=[io.Vae.Output()])

    @classmethod
    def validate_inputs(cls, vae_name: str | None = None) -> bool | str:
        return check_files("vae", vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        return io.NodeOutput(here().load_vae(here().resolve_file("vae", vae_name)))


class CheckpointLoaderSimple(FileNode):
    KIND = "checkpoints"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CheckpointLoaderSimple", display_name="Load Checkpoint", category="loaders",
            inputs=[file_input("ckpt_name", "checkpoints", "A file that holds transformer, encoders and autoencoder.")],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()])

    @classmethod
    def validate_inputs(cls, ckpt_name: str | None = None) -> bool | str:
        return check_files("checkpoints", ckpt_name)

    @classmethod
    def execute(cls, ckpt_name: str) -> io.NodeOutput:
        host = here()
        file = host.resolve_file("checkpoints", ckpt_name)
        return io.NodeOutput(host.load_model(file), host.load_text_encoders([file]), host.load_vae(file))


STRENGTH: dict[str, Any] = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}


class LoraLoader(FileNode):
    KIND = "loras"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoader", display_name="Load LoRA", category="loaders",
            inputs=[io.Model.Input("model"), io.Clip.Input("clip"), file_input("lora_name", "loras", "A LoRA file."),
                    io.Float.Input("strength_model", **STRENGTH, tooltip="Of its part for the transformer."),
                    io.Float.Input("strength_clip", **STRENGTH, tooltip="Of its part for the text encoders.")],
            outputs=[io.Model.Output(), io.Clip.Output()])

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return check_files("loras", lora_name)

    @classmethod
    def execute(cls, model: Any, clip: Any, lora_name: str, strength_model: float, strength_clip: float
                ) -> io.NodeOutput:
        model, clip = with_lora(model, clip, Row(lora_name, strength_model, strength_clip))
        return io.NodeOutput(model, clip)


class LoraLoaderModelOnly(FileNode):
    KIND = "loras"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoaderModelOnly", display_name="LoraLoaderModelOnly", category="loaders",
            inputs=[io.Model.Input("model"), file_input("lora_name", "loras", "A LoRA file."),
                    io.Float.Input("strength_model", **STRENGTH, tooltip="Of its part for the transformer.")],
            outputs=[io.Model.Output()])

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return check_files("loras", lora_name)

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength_model: float) -> io.NodeOutput:
        return io.NodeOutput(with_lora(model, None, Row(lora_name, strength_model, 0.0))[0])


def with_lora(model: Any, clip: Any, row: Row) -> tuple[Any, Any]:
    """As core's loaders do, what a file holds beyond the known is left out; that is told in a line."""
    made, text, report = here().with_loras(model, clip, [row], strict=False)
    refused = next((line for line in report.splitlines() if "NOT APPLIED" in line), None)
    if refused is not None:
        raise BadInput(refused.replace("NOT APPLIED: ", ""))
    log.info("%s", report)
    return made, text


class CLIPTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPTextEncode", display_name="CLIP Text Encode (Prompt)", category="conditioning",
            inputs=[io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
                    io.Clip.Input("clip", tooltip="The text encoders.")],
            outputs=[io.Conditioning.Output(tooltip="The encoded prompt.")])

    @classmethod
    def execute(cls, text: str, clip: Any) -> io.NodeOutput:
        return io.NodeOutput(here().encode_prompt(clip, text))


class CLIPTextEncodeFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CLIPTextEncodeFlux", display_name="CLIPTextEncodeFlux", category="advanced/conditioning/flux",
            inputs=[io.Clip.Input("clip"), io.String.Input("clip_l", multiline=True, dynamic_prompts=True),
                    io.String.Input("t5xxl", multiline=True, dynamic_prompts=True),
                    io.Float.Input("guidance", **GUIDANCE)],
            outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, clip: Any, clip_l: str, t5xxl: str, guidance: float) -> io.NodeOutput:
        return io.NodeOutput(here().encode_prompt(clip, clip_l, t5xxl, guidance=guidance))


class FluxGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="FluxGuidance", display_name="FluxGuidance", category="advanced/conditioning/flux",
                         inputs=[io.Conditioning.Input("conditioning"), io.Float.Input("guidance", **GUIDANCE)],
                         outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, conditioning: list[Any], guidance: float) -> io.NodeOutput:
        return io.NodeOutput([[cond, {**values, "guidance": guidance}] for cond, values in conditioning])


class ConditioningZeroOut(io.ComfyNode):
    """All zeros in the text states and the pooled vector; everything else, such as guidance, stays."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="ConditioningZeroOut", display_name="ConditioningZeroOut",
                         category="advanced/conditioning", inputs=[io.Conditioning.Input("conditioning")],
                         outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, conditioning: list[Any]) -> io.NodeOutput:
        def zeroed(values: dict[str, Any]) -> dict[str, Any]:
            pooled = values.get("pooled_output")
            return dict(values) if pooled is None else {**values, "pooled_output": pooled.new_zeros(pooled.shape)}

        return io.NodeOutput([[cond.new_zeros(cond.shape), zeroed(values)] for cond, values in conditioning])


def _primitive(node_id: str, label: str, socket: Any, **options: Any) -> type[io.ComfyNode]:
    """A node that hands its widget's value on."""

    def define_schema(cls: type) -> io.Schema:
        return io.Schema(node_id=node_id, display_name=label, category="utils/primitive",
                         inputs=[socket.Input("value", **options)], outputs=[socket.Output()])

    def execute(cls: type, value: Any) -> io.NodeOutput:
        return io.NodeOutput(value)

    return type(node_id, (io.ComfyNode,), {"define_schema": classmethod(define_schema), "execute": classmethod(execute),
                                           "__module__": __name__})


PRIMITIVES = [
    _primitive("PrimitiveString", "String", io.String),
    _primitive("PrimitiveStringMultiline", "String (Multiline)", io.String, multiline=True),
    _primitive("PrimitiveInt", "Int", io.Int, min=-INT_LIMIT, max=INT_LIMIT, control_after_generate=True),
    _primitive("PrimitiveFloat", "Float", io.Float, min=-float(INT_LIMIT), max=float(INT_LIMIT)),
    _primitive("PrimitiveBoolean", "Boolean", io.Boolean),
]

LOADER_NODES: list[type[io.ComfyNode]] = [
    UNETLoader, DualCLIPLoader, CLIPLoader, VAELoader, CheckpointLoaderSimple, CLIPTextEncode, CLIPTextEncodeFlux,
    FluxGuidance, ConditioningZeroOut, LoraLoader, LoraLoaderModelOnly, *PRIMITIVES]
