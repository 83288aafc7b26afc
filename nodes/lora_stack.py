"""The node that lists LoRAs. Its widget is one JSON text, which `web/js` shows as rows."""

from __future__ import annotations

from typing import Any

from ..hosts import lora_rows as files
from ..hosts.fingerprint import fingerprint
from ..hosts.names import problems
from . import api

ROWS_TIP = ("LoRAs with their strengths, one in a row. In the API format this is a JSON list; each row has lora, a "
            "file of the folder loras, and as needed on, model, clip, blocks, start and end.")
BOTH = "FLUX_LORAS,LORA_STACK"


def check(rows: Any) -> None:
    """Whether the rows can be read and every file they need is there."""
    files.find_files(files.read_rows(rows))


class FluxKitLoraStack(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoraStack", display_name="LoRA Stack", category="Flux Kit/LoRA",
            hidden=[api.Hidden.prompt, api.Hidden.unique_id],
            search_aliases=["lora", "lora loader", "load lora", "power lora loader", "lora stacker", "multi lora"],
            description="Any number of LoRAs with their strengths, in rows. A row that is off, or has strengths of 0, "
                        "reads no file. Connect it to Apply LoRAs.",
            inputs=[api.String.Input("rows", default="[]", tooltip=ROWS_TIP),
                    api.Custom(BOTH).Input("loras", optional=True,
                                           tooltip="Another stack, also of other packs, to put in front of this one.")],
            outputs=[api.Custom("LORA_STACK").Output("LORA_STACK", tooltip="Files and strengths, for any pack."),
                     api.Custom("FLUX_LORAS").Output("FLUX_LORAS", tooltip="All of each row, for Apply LoRAs."),
                     api.String.Output("words", display_name="trigger words",
                                       tooltip="Trigger words of the LoRAs that are on, for a prompt."),
                     api.String.Output("report", display_name="report", tooltip="What is in the stack, in words.")])

    @classmethod
    def validate_inputs(cls, rows: str | None = None) -> bool | str:
        return problems(check, rows)

    @classmethod
    def fingerprint_inputs(cls, rows: str | None = None, **_: Any) -> list[Any]:
        found = [] if rows is None else files.find_files(files.read_rows(rows))
        return [fingerprint(path) for path in found if path is not None]

    @classmethod
    def execute(cls, rows: str, loras: Any = None) -> Any:
        own = (cls.hidden.prompt or {}).get(cls.hidden.unique_id, {}).get("inputs", {})
        made = files.make_stack(files.read_rows(rows, own), loras)
        return api.NodeOutput(made.stack, made.rows, made.words, made.report)
