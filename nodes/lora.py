"""Nodes that put stacks of LoRAs on models, shape them, and look at them."""

from __future__ import annotations

from typing import Any, ClassVar

from ..engine.adapters import rows_of
from ..engine.adapters.blocks import parse_blocks
from ..engine.adapters.stack import parse_points, swept, with_blocks, with_region, with_schedule
from ..hosts.loras import inspected
from ..hosts.names import problems
from . import api
from .api import host
from .lora_stack import BOTH

MODES = {"auto": "auto", "side path": "side", "merge": "merge"}
STRICT, WARN = "strict", "warn"
MENU, LORAS = "Flux Kit/LoRA", "FLUX_LORAS"
LORAS_TIP = "A stack of LoRAs: of LoRA Stack, or a LORA_STACK of another pack."
SHAPED_TIP = "The same LoRAs, for Apply LoRAs or another node of this kind."
MODE_TIP = ("auto: beside packed weights, merged into the others; the report tells. side path: beside the weights, on "
            "every layer, which loses nothing. merge: into the weights where they are 16 or 32 bit; packed ones as "
            "unpacked copies, in ComfyUI as with auto.")
PROBLEM_TIP = ("strict: stop at a file that cannot be applied as it is. warn: apply what can be applied and say in the "
               "report what was left out.")
BLOCKS_TIP = ("Factors of the strength, such as: double 0-9 = 0.5, single = 0, img = 1.2. Words: double and single "
              "with numbers of blocks, img, txt, attn, mlp, mod, base, all. The last term that fits a layer counts.")
CURVE_TIP = ("Points share of the run: factor, such as 0: 1, 0.5: 0.3, 1: 0. Straight lines between them. Empty: "
             "constant.")
SHARE: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.01}


def loras_input() -> Any:
    return api.Custom(BOTH).Input("loras", tooltip=LORAS_TIP)


def loras_output() -> Any:
    return api.Custom(LORAS).Output(LORAS, tooltip=SHAPED_TIP)


class FluxKitLoraApply(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoraApply", display_name="Apply LoRAs", category=MENU,
            search_aliases=["lora", "load lora", "lora loader", "lora stack", "apply lora stack"],
            description="Puts a stack of LoRAs on a model and its text encoders, whatever their format and the "
                        "precision of the model, and reports what became of each.",
            inputs=[api.Model.Input("model", tooltip="The transformer, of any loader."),
                    loras_input(),
                    api.Clip.Input("clip", optional=True, tooltip="The text encoders, for LoRAs that change them too."),
                    api.Combo.Input("mode", options=list(MODES), default="auto", tooltip=MODE_TIP),
                    api.Combo.Input("on_problem", options=[STRICT, WARN], default=STRICT, tooltip=PROBLEM_TIP)],
            outputs=[api.Model.Output("MODEL", tooltip="The model with the LoRAs."),
                     api.Clip.Output("CLIP", tooltip="The text encoders with the LoRAs; nothing if none came in."),
                     api.String.Output("report", display_name="report", tooltip="What became of each LoRA.")])

    @classmethod
    def execute(cls, model: Any, loras: Any, mode: str, on_problem: str, clip: Any = None) -> Any:
        way = MODES[api.choice("mode", mode, MODES)]
        strict = api.choice("on_problem", on_problem, (STRICT, WARN)) == STRICT
        model, clip, report = host().with_loras(model, clip, rows_of(loras), mode=way, strict=strict)
        host().show(report or "no LoRA is on")
        return api.NodeOutput(model, clip, report)


class FluxKitLoraBlockWeights(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoraBlockWeights", display_name="LoRA Block Weights", category=MENU,
            search_aliases=["lbw", "lora block weight", "layer weights"],
            description="Gives LoRAs another strength in some blocks or layers of the transformer. Blocks are counted "
                        "as in the model, whatever the file holds.",
            inputs=[loras_input(),
                    api.String.Input("blocks", default="double = 1, single = 1", multiline=True, tooltip=BLOCKS_TIP)],
            outputs=[loras_output()])

    @classmethod
    def validate_inputs(cls, blocks: str | None = None) -> bool | str:
        return problems(parse_blocks, blocks)

    @classmethod
    def execute(cls, loras: Any, blocks: str) -> Any:
        return api.NodeOutput(with_blocks(rows_of(loras), blocks))


class FluxKitLoraSchedule(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoraSchedule", display_name="LoRA Schedule", category=MENU,
            search_aliases=["lora strength over steps", "lora range", "lora keyframes"],
            description="Lets LoRAs act in a part of the run only, or with a strength that changes from step to step. "
                        "It acts on the transformer, not on the text encoders, and costs no reload.",
            inputs=[loras_input(),
                    api.Float.Input("start", default=0.0, **SHARE, tooltip="The share of the run where they begin."),
                    api.Float.Input("end", default=1.0, **SHARE, tooltip="The share of the run where they end."),
                    api.String.Input("curve", default="", tooltip=CURVE_TIP)],
            outputs=[loras_output()])

    @classmethod
    def validate_inputs(cls, curve: str | None = None, start: float | None = None,
                        end: float | None = None) -> bool | str:
        if start is not None and end is not None and start > end:
            return f"start {start} lies behind end {end}"
        return problems(parse_points, curve or None)

    @classmethod
    def execute(cls, loras: Any, start: float, end: float, curve: str) -> Any:
        points = parse_points(curve) if curve.strip() else None
        return api.NodeOutput(with_schedule(rows_of(loras), start, end, points))


class FluxKitLoraRegion(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoraRegion", display_name="LoRA Region", category=MENU,
            search_aliases=["lora mask", "regional lora", "lora area", "masked lora"],
            description="Lets LoRAs act in a part of the picture only. Those that have a region keep it. Several "
                        "regions cost no more than one.",
            inputs=[loras_input(), api.Mask.Input("mask", tooltip="White: where they act. Stretched over the picture."),
                    api.Int.Input("feather", default=0, min=0, max=1024, tooltip="Softens the edge, in pixels of the "
                                                                                 "mask."),
                    api.Float.Input("background", default=0.0, **SHARE, tooltip="Share of the strength elsewhere."),
                    api.Float.Input("text", default=1.0, **SHARE,
                                    tooltip="Share of the strength on the prompt, which the whole picture sees.")],
            outputs=[loras_output()])

    @classmethod
    def execute(cls, loras: Any, mask: Any, feather: int, background: float, text: float) -> Any:
        return api.NodeOutput(with_region(rows_of(loras), mask, feather, background, text))


class FluxKitLoraInspect(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"lora": "loras"}

    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoraInspect", display_name="Inspect LoRA", category=MENU, is_output_node=True,
            search_aliases=["lora info", "trigger words", "lora metadata", "lora rank"],
            description="Tells what a LoRA file holds: format, rank, alpha, layers, trigger words, what is unknown or "
                        "broken, and, with a model, how much of its weights it changes.",
            inputs=[api.Combo.Input("lora", options=host().list_files("loras"), tooltip="The LoRA file."),
                    api.Model.Input("model", optional=True,
                                    tooltip="To compare the LoRA with its weights, which are all read once.")],
            outputs=[api.String.Output("report", display_name="report", tooltip="As shown below the node."),
                     api.String.Output("words", display_name="trigger words", tooltip="For a prompt."),
                     api.String.Output("metadata", display_name="metadata", tooltip="All of it, as JSON.")])

    @classmethod
    def validate_inputs(cls, lora: str | None = None) -> bool | str:
        return problems(host().resolve_file, "loras", lora)

    @classmethod
    def execute(cls, lora: str, model: Any = None) -> Any:
        path = host().resolve_file("loras", lora)
        told = inspected(path, None if model is None else host().lora_share(model, path))
        host().show(told.report)
        return api.NodeOutput(told.report, told.words, told.metadata, ui={"text": [told.report]})


class FluxKitLoraSweep(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoraSweep", display_name="LoRA Strength Sweep", category=MENU,
            search_aliases=["xy plot", "lora grid", "strength comparison"],
            description="The same LoRAs at several strengths: everything behind this node runs once for each. Two in a "
                        "row make a grid.",
            inputs=[loras_input(),
                    api.String.Input("strengths", default="0, 0.5, 1", tooltip="Numbers, with commas between."),
                    api.Int.Input("row", default=0, min=0, max=256, tooltip="The LoRA that changes, counted from 1. 0: "
                                                                           "all of them."),
                    api.String.Input("label", optional=True, force_input=True,
                                     tooltip="Labels of a sweep before this one, to go on.")],
            outputs=[api.Custom(LORAS).Output(LORAS, is_output_list=True, tooltip="A stack for each strength."),
                     api.String.Output("labels", display_name="labels", is_output_list=True,
                                       tooltip="What each is, for a file name or a caption.")])

    @classmethod
    def execute(cls, loras: Any, strengths: str, row: int, label: str | None = None) -> Any:
        stacks, labels = swept(rows_of(loras), strengths, row)
        return api.NodeOutput(stacks, [f"{label}, {text}" if label else text for text in labels])
