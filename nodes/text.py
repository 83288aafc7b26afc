"""Nodes that turn prompts into conditionings."""

from __future__ import annotations

from typing import Any

from . import api
from .api import host

AUTO_LENGTH = "auto"
T5_LENGTHS = [AUTO_LENGTH, "128", "256", "512"]


class FluxKitEncodePrompt(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitEncodePrompt", display_name="Encode Flux Prompt", category="Flux Kit/Text",
            search_aliases=["clip text encode", "flux guidance", "positive prompt", "negative prompt"],
            description="Encodes a prompt with both text encoders and sets the guidance. (word:1.2) weighs words.",
            inputs=[api.Clip.Input("clip", tooltip="Both text encoders."),
                    api.String.Input("prompt", multiline=True, dynamic_prompts=True, default="",
                                     tooltip="What the picture shows. May be empty."),
                    api.String.Input("t5_prompt", multiline=True, dynamic_prompts=True, default="",
                                     tooltip="Another text for T5, which understands sentences; the prompt then "
                                             "goes to CLIP-L only. Empty: both get the prompt."),
                    api.Float.Input("guidance", default=3.5, min=0.0, max=100.0, step=0.1,
                                    tooltip="Distilled guidance of dev models: higher follows the prompt more closely, "
                                            "lower looks more natural. schnell takes no notice of it."),
                    api.Combo.Input("t5_length", options=T5_LENGTHS, default=AUTO_LENGTH,
                                    tooltip="Tokens that T5 gives the model. auto: at least 256, never cut, as "
                                            "ComfyUI. A number: exactly that many, longer prompts are cut.")],
            outputs=[api.Conditioning.Output("CONDITIONING", tooltip="The encoded prompt, for a sampler.")])

    @classmethod
    def execute(cls, clip: Any, prompt: str, t5_prompt: str, guidance: float, t5_length: str) -> Any:
        length = None if t5_length == AUTO_LENGTH else int(t5_length)
        return api.NodeOutput(host().encode_prompt(clip, prompt, t5_prompt or None, guidance=guidance,
                                                   t5_length=length))
