"""Depth models: folders as Hugging Face lays them out, run by transformers, which nothing else of Flux Kit needs.

They are opened offline, from the folder alone, and only from safetensors: nothing is downloaded, no pickle is read and
no code of a folder is run. transformers is imported when a map is asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.conditioning.preprocess import FILTERS, DepthInput
from ..engine.errors import BadModelFile, FluxKitError, MissingFile

KIND = "depth"
CONFIG, PREPARING = "config.json", "preprocessor_config.json"
LEVELS = 4
"""Folders below a models folder that are looked into: a download cache has three."""
MAX_JSON = 1 << 20
FETCH = ("Put config.json, preprocessor_config.json and model.safetensors of a depth model into models/depth/<a name>: "
         "depth-anything/Depth-Anything-V2-Small-hf from huggingface.co is a small one, LiheYoung/depth-anything-large-"
         "hf the one that Black Forest Labs used")
ACTIVATIONS = 24
"""Bytes for each pixel of the picture given to the model and number of its width, roughly and rather more."""


@dataclass(frozen=True)
class Family:
    """`metric`: whether a config's model tells distances. `own`: what its preprocessor does unless its file says."""

    name: str
    metric: Callable[[Mapping[str, Any]], bool]
    own: DepthInput


FAMILIES: dict[str, Family] = {
    "depth_anything": Family("Depth Anything", lambda config: config.get("depth_estimation_type") == "metric",
                             DepthInput()),
    "dpt": Family("DPT", lambda config: False,
                  DepthInput((384, 384), False, 1, (0.5,) * 3, (0.5,) * 3)),
    "zoedepth": Family("ZoeDepth", lambda config: True,
                       DepthInput((384, 512), True, 32, (0.5,) * 3, (0.5,) * 3, "bilinear", True)),
}
"""`model_type` of config.json -> the family."""


def folders(roots: Sequence[Path]) -> dict[str, Path]:
    """Name -> folder of every depth model below these folders, slashes forward; the first of a name wins."""
    found: dict[str, Path] = {}
    for root in roots:
        entered: set[str] = set()
        for place, below, files in os.walk(root, followlinks=True):
            name = Path(place).relative_to(root).as_posix()
            real = os.path.realpath(place)
            if real in entered or name.count("/") + 1 >= LEVELS or CONFIG in files:
                below.clear()
            entered.add(real)
            below[:] = sorted(folder for folder in below if not folder.startswith("."))
            if CONFIG in files and name != ".":
                found.setdefault(name, Path(place))
    return found


def chosen(name: str, none: str) -> str:
    """The name of a depth model; MissingFile, which says how to get one, where none was chosen."""
    if name == none:
        raise MissingFile(f"no depth model was chosen. {FETCH}")
    return name


def nearness(folder: Path, image: Tensor, resolution: int, device: torch.device,
             room: Callable[[int], AbstractContextManager[Any]]) -> Tensor:
    """How near each pixel of IMAGE `(B, H, W, 3)` is, near large: `(B, H, W)` fp32 on the CPU.

    `resolution`: 518 is each model's own size, others scale it. `room(bytes)`: inside it, the device has so much free.
    FluxKitError where transformers is missing, MissingFile, BadModelFile, NotFinite.
    """
    config = read_json(folder / CONFIG)
    family = family_of(folder, config)
    wanted = input_of(folder, family, config)
    model = load(folder, config)
    pixels = wanted.pixels(image, resolution)
    width = max([int(value) for key, value in flat(config) if key == "hidden_size"] or [1024])
    need = sum(tensor.nbytes for tensor in model.state_dict().values()) + ACTIVATIONS * width * pixels[0, 0].numel()
    with room(need), torch.inference_mode():
        model.to(device)
        found = torch.cat([model(pixel_values=one.to(device)).predicted_depth.float().cpu() for one in pixels.split(1)])
    return wanted.nearness(found, image.shape[1], image.shape[2]).clone()


def family_of(folder: Path, config: Mapping[str, Any]) -> Family:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise BadModelFile(folder / CONFIG, "no depth model known here", field="model_type",
                           expected=" or ".join(FAMILIES), found=kind, advice=FETCH)
    if isinstance(config.get("backbone"), str) and not isinstance(config.get("backbone_config"), Mapping):
        raise BadModelFile(folder / CONFIG, "its backbone would have to be downloaded, and nothing is",
                           field="backbone", expected="backbone_config with its sizes", found=config["backbone"],
                           advice="Choose a depth model whose folder is complete. " + FETCH)
    return FAMILIES[kind]


def input_of(folder: Path, family: Family, config: Mapping[str, Any]) -> DepthInput:
    """What preprocessor_config.json says, of what it leaves out the family's own."""
    said, own = read_json(folder / PREPARING), family.own
    size = said.get("size", {})
    size = size if isinstance(size, Mapping) else {"height": size, "width": size}
    try:
        made = DepthInput(
            size=(int(size.get("height", own.size[0])), int(size.get("width", own.size[1]))),
            keep_aspect=bool(said.get("keep_aspect_ratio", own.keep_aspect)),
            multiple=max(1, int(said.get("ensure_multiple_of") or own.multiple)),
            mean=tuple(float(value) for value in said.get("image_mean", own.mean)),
            std=tuple(float(value) for value in said.get("image_std", own.std)),
            filter=FILTERS.get(int(said.get("resample", -1)), own.filter),
            pad=own.pad and bool(said.get("do_pad", True)), metric=family.metric(config))
    except (TypeError, ValueError) as error:
        raise BadModelFile(folder / PREPARING, f"a value is not what it should be: {error}", advice=FETCH) from None
    if min(made.size) < 1 or len(made.mean) != 3 or len(made.std) != 3 or min(made.std) <= 0:
        raise BadModelFile(folder / PREPARING, "size, image_mean and image_std do not describe a colour picture",
                           found=f"{made.size}, {made.mean}, {made.std}", advice=FETCH)
    return made


def load(folder: Path, config: Mapping[str, Any]) -> Any:
    """The model on the CPU, fp32."""
    try:
        from transformers import AutoModelForDepthEstimation
    except ImportError as error:
        raise FluxKitError("a depth map needs the Python package transformers, which is not installed here: pip "
                           "install transformers. Or make edges with canny, which needs nothing") from error
    if not any(file.suffix == ".safetensors" for file in folder.iterdir()):
        raise MissingFile(f"{folder}: there is no model.safetensors (files of other endings are not opened). {FETCH}",
                          file=str(folder))
    try:
        model, told = AutoModelForDepthEstimation.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise BadModelFile(folder, f"transformers cannot open it: {error}", advice=FETCH) from error
    lacking = sorted(told["missing_keys"])
    if lacking:
        raise BadModelFile(folder, f"{len(lacking)} of its weights are missing, such as {', '.join(lacking[:3])}",
                           expected=f"a {FAMILIES[config['model_type']].name} model in Hugging Face's layout (an "
                           "original .pth file has other names)", advice=FETCH)
    return model.float().eval()


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise BadModelFile(path, "too long for a configuration")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFile(f"{path} is not there. {FETCH}", file=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadModelFile(path, f"it cannot be read: {error}", advice=FETCH) from None
    if not isinstance(found, dict):
        raise BadModelFile(path, "it holds no object", advice=FETCH)
    return found


def flat(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Names and values, those of configurations inside too."""
    return [pair for key, value in config.items()
            for pair in (flat(value) if isinstance(value, Mapping) else [(key, value)])]
