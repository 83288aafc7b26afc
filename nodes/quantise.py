"""The node that makes smaller model files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ..engine.adapters import Options, rows_of
from ..engine.convert import RECIPES, ROLES, lines_of, quantize, result_name, role_of
from ..engine.convert.lora_files import summand
from ..hosts.fingerprint import fingerprint
from ..hosts.loras import FILES
from ..hosts.names import check_name, problems
from . import api
from .api import ALL_IN_ONE, host

MODELS, ENCODERS, LORAS = "diffusion_models", "text_encoders", "loras"
BOTH = "FLUX_LORAS,LORA_STACK"
FOLDERS = {"transformer": MODELS, "t5": ENCODERS, "clip_l": ENCODERS}
KINDS = (MODELS, ENCODERS, ALL_IN_ONE)
AUTO = "auto"
TYPES = list(RECIPES)
SOURCE_TIP = ("The file to make smaller: a FLUX.1 transformer, T5 or CLIP-L, of any layout and precision. "
              "Its folder stands before its name. Large types make better sources.")
TYPE_TIP = ("Q8_0 to Q2_K and IQ4: GGUF, from large and true to small and rough; BF16 and F16: GGUF, not packed. "
            "fp8_scaled and int8_tensorwise: safetensors that ComfyUI's own loader opens too.")
PART_TIP = "Which part of an all-in-one file. auto: the only one there is."
NAME_TIP = ("Name of the new file, in the folder of its kind (diffusion_models or text_encoders). Empty: the name of "
            "the source with the type, and -lora where LoRAs are put in. The ending is added.")
LORAS_TIP = "LoRAs to put into the weights before they are made smaller, at their strengths and block weights."
DONE_OF = 100


def named_file(source: str) -> Path:
    """The file of `folder/name`, as the widget offers it."""
    kind, _, name = source.replace("\\", "/").partition("/")
    return host().resolve_file(kind if kind in KINDS else MODELS, name if kind in KINDS else source)


def progress() -> Callable[[int, int, str], None]:
    """Reports whole per cents to the host, and asks it at every call whether to stop."""
    report, told = host().progress(DONE_OF), [-1]

    def tell(done: int, total: int, name: str) -> None:
        host().check_interrupt()
        share = DONE_OF * done // max(total, 1)
        if share != told[0]:
            told[0] = share
            report(share)

    return tell


def make(source: Path, type: str, part: str, name: str, overwrite: bool, loras: Any = None) -> str:
    """Writes the file; what is told of it."""
    role = role_of(source, None if part == AUTO else part)
    rows = [row for row in rows_of(loras) if row.reads]
    named = Path(result_name(source, type, name.strip()))
    named = named.with_name(f"{named.stem}-lora{named.suffix}") if rows and not name.strip() else named
    target = host().new_file(FOLDERS[role], named.as_posix())
    device = host().device
    summands = [summand(FILES.read(host().resolve_file(LORAS, row.file), Options()), row) for row in rows]
    made = quantize(source, target, type, role=role, force=overwrite, progress=progress(), loras=summands,
                    tokenizer_dirs=[target.parent], device=device if device.type == "cuda" else "cpu")
    return "\n".join([*lines_of(made, target), *made.notes])


class FluxKitQuantize(api.FileNode):
    KINDS: ClassVar[dict[str, str]] = {"source": MODELS}

    @classmethod
    def define_schema(cls) -> Any:
        sources = [f"{kind}/{name}" for kind in KINDS for name in host().list_files(kind)]
        return api.Schema(
            node_id="FluxKitQuantize", display_name="Quantise Flux File", category="Flux Kit/Files",
            is_output_node=True, search_aliases=["quantize", "gguf", "convert model", "fp8", "make model smaller"],
            description="Writes a smaller file of a FLUX.1 transformer, T5 or CLIP-L: GGUF, scaled fp8 or int8.",
            inputs=[api.Combo.Input("source", options=sources, tooltip=SOURCE_TIP),
                    api.Combo.Input("type", options=TYPES, default="Q4_K_S", tooltip=TYPE_TIP),
                    api.Combo.Input("part", options=[AUTO, *ROLES], default=AUTO, tooltip=PART_TIP),
                    api.String.Input("name", default="", tooltip=NAME_TIP),
                    api.Boolean.Input("overwrite", default=False, tooltip="Whether a file of that name may be lost."),
                    api.Custom(BOTH).Input("loras", optional=True, tooltip=LORAS_TIP)],
            outputs=[api.String.Output("report", display_name="report",
                                       tooltip="What was made: sizes, types, and how far from the original.")])

    @classmethod
    def validate_inputs(cls, source: str | None = None, name: str | None = None) -> bool | str:
        answer = problems(named_file, source)
        return answer if answer is not True or not (name or "").strip() else problems(check_name, name)

    @classmethod
    def fingerprint_inputs(cls, source: str | None = None, **_: Any) -> list[Any]:
        return [] if source is None else fingerprint(named_file(source))

    @classmethod
    def execute(cls, source: str, type: str, part: str, name: str, overwrite: bool, loras: Any = None) -> Any:
        report = make(named_file(source), type, part, name, overwrite, loras)
        host().show(report)
        return api.NodeOutput(report, ui={"text": [report]})
