"""The node that tells what a model file is."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..engine.adapters.describing import describe, lines_of
from ..engine.memory import estimate_weights
from ..hosts.fingerprint import fingerprint
from ..hosts.names import problems
from . import api
from .api import host

KINDS = ("diffusion_models", "text_encoders", "vae", "loras", "clip_vision", "style_models", api.ALL_IN_ONE)
FILE_TIP = "The file to look at, of any kind; its folder stands before its name. Only its header is read."


def named_file(file: str) -> Path:
    """The file of `folder/name`, as the widget offers it; without a known folder, of that name in any of them."""
    kind, _, name = file.replace("\\", "/").partition("/")
    if kind in KINDS:
        return host().resolve_file(kind, name)
    return host().resolve_file(next((kind for kind in KINDS if file in host().list_files(kind)), KINDS[0]), file)


class FluxKitInspect(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"file": KINDS[0]}

    @classmethod
    def define_schema(cls) -> Any:
        files = [f"{kind}/{name}" for kind in KINDS for name in host().list_files(kind)]
        return api.Schema(
            node_id="FluxKitInspect", display_name="Inspect Flux File", category="Flux Kit/Files", is_output_node=True,
            search_aliases=["model info", "what is this file", "checkpoint info", "gguf info", "inspect model"],
            description="Tells what a model file is: model, layout, precision, parts inside and missing, memory.",
            inputs=[api.Combo.Input("file", options=files, tooltip=FILE_TIP)],
            outputs=[api.String.Output("report", display_name="report",
                                       tooltip="What the file is, as shown below the node.")])

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return problems(named_file, file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: Any) -> list[Any]:
        return [] if file is None else fingerprint(named_file(file))

    @classmethod
    def execute(cls, file: str) -> Any:
        told = describe(named_file(file), partial(estimate_weights, dtype=host().dtype))
        report = "\n".join(lines_of({**told, "path": Path(told["path"]).name}))
        host().show(report)
        return api.NodeOutput(report, ui={"text": [report]})
