"""The node that tells what a run will need, before anything is loaded."""

from __future__ import annotations

from typing import Any, ClassVar

from ..engine.adapters import rows_of
from ..hosts.estimate import estimate_files, told
from . import api
from .api import FROM_MODEL, host
from .loaders import AUTOENCODERS, CLIP_L_TIP, ENCODERS, MODEL_TIP, MODELS, T5_TIP, VAE_TIP, FluxKitLoadFlux
from .sampling import SIDE

BOTH = "FLUX_LORAS,LORA_STACK"
LORAS_TIP = "LoRAs, which stand beside the weights where these are packed or do not all fit."
ROLES = {"transformer": "model", "t5": "t5", "clip_l": "clip_l", "vae": "vae"}


class FluxKitMemoryEstimate(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"model": MODELS, "clip_l": ENCODERS, "t5": ENCODERS, "vae": AUTOENCODERS}

    @classmethod
    def define_schema(cls) -> Any:
        inside = f" \"{FROM_MODEL}\": it is part of the model file."
        return api.Schema(
            node_id="FluxKitMemoryEstimate", display_name="Estimate Flux Memory", category="Flux Kit/Files",
            is_output_node=True, search_aliases=["vram", "out of memory", "gpu memory", "does it fit", "oom"],
            description="Tells how much memory a picture will take, on this machine and on cards of 6 to 24 GB, from "
                        "the headers of the files. Nothing is loaded.",
            inputs=[api.Combo.Input("model", options=api.files(MODELS), tooltip=MODEL_TIP),
                    api.Combo.Input("clip_l", options=api.files(ENCODERS, FROM_MODEL), tooltip=CLIP_L_TIP + inside),
                    api.Combo.Input("t5", options=api.files(ENCODERS, FROM_MODEL), tooltip=T5_TIP + inside),
                    api.Combo.Input("vae", options=api.files(AUTOENCODERS, FROM_MODEL), tooltip=VAE_TIP + inside),
                    api.Int.Input("width", tooltip="Width of the picture in pixels.", **SIDE),
                    api.Int.Input("height", tooltip="Height of the picture in pixels.", **SIDE),
                    api.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures made at once."),
                    api.Custom(BOTH).Input("loras", optional=True, tooltip=LORAS_TIP)],
            outputs=[api.String.Output("report", display_name="report",
                                       tooltip="The estimate, as shown below the node.")])

    @classmethod
    def validate_inputs(cls, model: str | None = None, clip_l: str | None = None, t5: str | None = None,
                        vae: str | None = None) -> bool | str:
        return FluxKitLoadFlux.validate_inputs(model, clip_l, t5, vae)

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int, loras: Any = None, **names: str) -> Any:
        files = {role: names["model"] if names[key] == FROM_MODEL else names[key] for role, key in ROLES.items()}
        found = estimate_files([(role, api.file_of(cls.KINDS[ROLES[role]], name)) for role, name in files.items()],
                               width=width, height=height, batch=batch_size, dtype=host().dtype,
                               loras=[host().resolve_file("loras", row.file) for row in rows_of(loras) if row.reads])
        report = told(found, host().device, host().memory)
        host().show(report)
        return api.NodeOutput(report, ui={"text": [report]})
