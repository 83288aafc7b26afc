"""Quantised weights that are not read here, told by side tensors, the header's metadata or the folder's config.json.

They are named, with what to use instead, before their shapes are judged: packed weights have others.
Sources: the writers themselves: bitsandbytes, nunchaku (merge_safetensors.py), torchao (safetensors support of its
prototype), optimum-quanto, sdnq, auto-round, nvidia-modelopt, compressed-tensors; ComfyUI, comfy/quant_ops.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .comfy_quant import READERS, foreign
from .header import show

if TYPE_CHECKING:
    from .containers import TensorInfo

CONFIG = "quantization_config"
"""What writers of headers and of config.json call their description."""
TENSOR_NAMES = "tensor_names"
MAX_CONFIG_BYTES = 1 << 20
INTEGERS = ("U8", "I8", "U16", "I16", "U32", "I32")
INSTEAD = "Use the bf16, fp8, NF4 or GGUF file of this model"


@dataclass(frozen=True)
class Method:
    """`names`: of side tensors that only this method has. `methods`: what a configuration calls it."""

    says: str
    names: str
    methods: tuple[str, ...] = ()


METHODS: tuple[Method, ...] = (
    Method("8-bit of bitsandbytes", r"\.SCB$"),
    Method("SVDQuant (nunchaku)", r"\.(?:smooth|smooth_orig|wcscales|wtscale|proj_down|proj_up)$",
           ("svdquant", "nunchaku", "nunchaku_lite")),
    Method("AWQ, GPTQ, AutoRound or nunchaku", r"\.(?:qweight|qzeros|wscales|wzeros)$",
           ("auto-round", "auto_round", "autoround", "gptq", "awq")),
    Method("torchao", r"\._weight_(?:qdata|scale|zero_point)$", ("torchao",)),
    Method("quanto", r"\.weight\._(?:data|scale|shift|zeropoint)$", ("quanto",)),
    Method("SDNQ", r"\.(?:svd_up|svd_down|zero_point)$", ("sdnq", "sdnq_training")),
    Method("compressed-tensors", r"\.weight_(?:packed|shape)$", ("compressed-tensors",)),
    Method("comfy_quant that is not put together,", r"\.comfy_quant$"),
    Method("NVFP4 of ModelOpt, without comfy_quant,", r"\.weight_scale_2$"),
)
MODELOPT = "modelopt"
"""Its fp8 is the usual one; its other types keep whole numbers."""


def unreadable(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    """What the weights of these tensors are, if not readable here, with what to use instead; else None."""
    found = foreign(infos)
    if found is not None:
        name, format = found
        return (f"{show(name)} is stored as {show(format)} of comfy_quant, of which only {', '.join(READERS)} are "
                f"read. {INSTEAD}")
    says = _by_names(infos) or _by_metadata(infos, metadata)
    return None if says is None else f"its weights are stored as {says} which is not supported. {INSTEAD}"


def _by_names(infos: Mapping[str, TensorInfo]) -> str | None:
    for row in METHODS:
        pattern = re.compile(row.names)
        name = next((name for name in infos if pattern.search(name)), None)
        if name is not None:
            return f"{row.says.rstrip(',')} ({show(name)}),"
    return None


def _by_metadata(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    integers = any(info.format in INTEGERS for info in infos.values())
    if TENSOR_NAMES in metadata and integers:
        return f"torchao ({TENSOR_NAMES} in the header),"
    try:
        config = json.loads(metadata.get(CONFIG, "{}"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    method = str(config.get("quant_method", config.get("method", ""))).lower()
    if method == MODELOPT and integers:
        return f"{config.get('quant_algo', 'quantised')!s:.40} of ModelOpt ({CONFIG}),"
    return next((f"{row.says} ({CONFIG})," for row in METHODS if method in row.methods), None)


def folder_metadata(folder: Path) -> dict[str, str]:
    """What the config.json of a folder says about quantisation, as a header would: `{"quantization_config": JSON}`.

    Nothing, if there is none, or it cannot be read: then the tensors alone decide.
    """
    try:
        with (folder / "config.json").open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
        config = json.loads(text.decode("utf-8")) if len(text) <= MAX_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError):
        return {}
    found = config.get(CONFIG) if isinstance(config, dict) else None
    return {CONFIG: json.dumps(found)} if isinstance(found, dict) else {}
