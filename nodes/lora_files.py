"""The node that writes LoRA files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..engine.adapters import Options, rows_of
from ..engine.convert.lora_files import DTYPES, KOHYA, LAYOUTS, MAX_RANK, summand, write_lora
from ..engine.errors import BadInput
from ..engine.weights import load
from ..engine.weights.containers import MODEL_SUFFIXES, SAFETENSORS_SUFFIXES
from ..hosts.fingerprint import fingerprint
from ..hosts.loras import FILES
from ..hosts.names import check_name, problems
from . import api
from .api import host
from .quantise import progress

LORAS, MODELS = "loras", "diffusion_models"
NONE, SAME = "none", "same"
BOTH = "FLUX_LORAS,LORA_STACK"
LORAS_TIP = "What the file is made of: one LoRA to convert or make smaller, several to merge."
NAME_TIP = "Name of the new file in the folder loras; .safetensors is added. A file that is there is never replaced."
LAYOUT_TIP = "Whose names the file uses. kohya: most tools, ComfyUI too. peft: diffusers, ai-toolkit."
RANK_TIP = ("0 keeps everything: ranks of merged LoRAs add up. Else the largest rank of any layer: the nearest LoRA of "
            "that rank is written, and the report shows how far it is off.")
DTYPE_TIP = "Type of the numbers. same: that of the sources."
BASE_TIP = ("The model, for LoRAs that change a weight by what it is: OFT, GLoRA, IA3 and DoRA, which need a rank too. "
            "none for all others.")


def check(name: str, base: str) -> None:
    """What can be told before the run."""
    check_name(name)
    if base != NONE:
        api.file_of(MODELS, base)


def bases(base: str) -> Mapping[str, Any]:
    """The model, its weights left on the disk."""
    return {} if base == NONE else {"transformer": load(api.file_of(MODELS, base), "transformer", dtype=None)}


def make(loras: Any, name: str, layout: str, rank: int, dtype: str, base: str) -> str:
    """Writes the file; what is told of it."""
    named = name.strip() + ("" if name.strip().lower().endswith(MODEL_SUFFIXES) else SAFETENSORS_SUFFIXES[0])
    target = host().new_file(LORAS, named)
    rows = [row for row in rows_of(loras) if row.reads]
    if not rows:
        raise BadInput("no LoRA is connected that is on and has a strength: there is nothing to write")
    summands = [summand(FILES.read(host().resolve_file(LORAS, row.file), Options()), row) for row in rows]
    to, kind = api.choice("layout", layout, LAYOUTS), DTYPES.get(api.choice("dtype", dtype, (SAME, *DTYPES)))
    made = write_lora(target, summands, to=to, rank=rank or None, dtype=kind, bases=bases(base), progress=progress())
    return "\n".join([*made.lines(), *made.notes])


class FluxKitLoraSave(api.ComfyNode):
    KINDS: ClassVar[dict[str, str]] = {"base": MODELS}

    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitLoraSave", display_name="Save LoRA", category="Flux Kit/LoRA", is_output_node=True,
            search_aliases=["merge lora", "convert lora", "resize lora", "extract lora", "lora merger", "bake lora"],
            description="Writes LoRAs as one file: converts any format to kohya's or PEFT's names, merges several at "
                        "their strengths and block weights, brings them to a smaller rank.",
            inputs=[api.Custom(BOTH).Input("loras", tooltip=LORAS_TIP),
                    api.String.Input("name", default="merged", tooltip=NAME_TIP),
                    api.Combo.Input("layout", options=list(LAYOUTS), default=KOHYA, tooltip=LAYOUT_TIP),
                    api.Int.Input("rank", default=0, min=0, max=MAX_RANK, tooltip=RANK_TIP),
                    api.Combo.Input("dtype", options=[SAME, *DTYPES], default=SAME, tooltip=DTYPE_TIP),
                    api.Combo.Input("base", options=[NONE, *api.files(MODELS)], default=NONE, tooltip=BASE_TIP)],
            outputs=[api.String.Output("report", display_name="report",
                                       tooltip="What was made: layers, ranks, and how far each kind of layer is off.")])

    @classmethod
    def validate_inputs(cls, name: str | None = None, base: str | None = None) -> bool | str:
        return problems(check, name, base)

    @classmethod
    def fingerprint_inputs(cls, base: str | None = None, **_: Any) -> list[Any]:
        return [] if base in (None, NONE) else fingerprint(api.file_of(MODELS, base))

    @classmethod
    def execute(cls, loras: Any, name: str, layout: str, rank: int, dtype: str, base: str) -> Any:
        report = make(loras, name, layout, rank, dtype, base)
        host().show(report)
        return api.NodeOutput(report, ui={"text": [report]})
