"""ComfyUI's model folders as ours: the same lists of folders, with `.gguf` in our nodes only."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path

import folder_paths

from ...engine.errors import BadInput, MissingFile
from .. import depth
from ..names import check_name, choose_name, places, shown

log = logging.getLogger(__name__)

KINDS = ("diffusion_models", "text_encoders", "vae", "loras", "clip_vision", "style_models", "checkpoints")
LISTED = (".safetensors", ".sft", ".gguf")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TINY_MODELS = Path(__file__).parents[2] / "tiny_flux" / "models"


def register() -> None:
    """Adds tiny-flux's folders to the host's, and a kind `flux_kit_<kind>` of our own for each kind.

    Ours holds the host's very list of folders, so folders added later and extra_model_paths.yaml count, but a set of
    endings of its own: the host's kinds share one set, and `.gguf` in it would offer core's loaders what they cannot
    read.
    """
    folder_paths.add_model_folder_path(depth.KIND, os.path.join(folder_paths.models_dir, depth.KIND))
    names = folder_paths.folder_names_and_paths
    for kind in KINDS:
        if kind not in names:
            continue
        folders, endings = names[kind]
        names[key_of(kind)] = (folders, {*endings, ".gguf"})
        if (TINY_MODELS / kind).is_dir():
            folder_paths.add_model_folder_path(kind, str(TINY_MODELS / kind))


def key_of(kind: str) -> str:
    return f"flux_kit_{kind}"


def roots(kind: str) -> list[Path]:
    """The folders of a kind, those that win first."""
    return [Path(folder) for folder in folder_paths.get_folder_paths(key_of(kind))]


def list_files(kind: str) -> list[str]:
    """Names relative to the folders of a kind, slashes forward, sorted; from the host's cached listing."""
    if kind == "input":
        found = os.scandir(folder_paths.get_input_directory())
        return sorted(entry.name for entry in found if entry.name.lower().endswith(PICTURES) and entry.is_file())
    if kind == depth.KIND:
        return sorted(depth_models())
    return [name for name in all_files(kind) if name.lower().endswith(LISTED)]


def all_files(kind: str) -> list[str]:
    """Every name of a kind: files that are not offered too, whose refusal by the loader tells more than "not there"."""
    return sorted(name.replace("\\", "/") for name in folder_paths.get_filename_list(key_of(kind)))


def depth_roots() -> list[Path]:
    return [Path(folder) for folder in folder_paths.get_folder_paths(depth.KIND)]


def depth_models() -> dict[str, Path]:
    """Names of the folders of depth models, and where they are."""
    return depth.folders(depth_roots())


def inversions() -> set[str]:
    """Names by which prompts ask for the host's textual inversions: with and without ending, slashes forward."""
    files = [name.replace("\\", "/") for name in folder_paths.get_filename_list("embeddings")]
    return {*files, *(os.path.splitext(name)[0] for name in files)}


def resolve_file(kind: str, name: str) -> Path:
    """The file a workflow means: exact, else the only one of that base name. MissingFile names near matches."""
    if kind == "input" and isinstance(name, str):
        return picture(name)
    if kind == depth.KIND:
        found = depth_models()
        return found[choose_name(kind, name, found, places(depth_roots()))]
    taken = choose_name(kind, name, all_files(kind), places(roots(kind)),
                        lambda: ((other, all_files(other)) for other in KINDS
                                 if key_of(other) in folder_paths.folder_names_and_paths))
    if taken != name.replace("\\", "/"):
        tell_once(kind, name, taken)
    return path_of(kind, taken)


@cache
def tell_once(kind: str, name: str, taken: str) -> None:
    """Names are resolved many times a run."""
    log.warning("%s: '%s' is not there under that name; took '%s'", kind, shown(name), taken)


def path_of(kind: str, name: str) -> Path:
    path = folder_paths.get_full_path(key_of(kind), name)
    if path is None:
        raise MissingFile(f"{kind}: '{name}' was there a moment ago and is gone", file=name)
    return Path(path)


def picture(name: str) -> Path:
    """A picture of the input folder, or of the one its name is annotated with (`name [output]`)."""
    plain, place = folder_paths.annotated_filepath(name)
    check_name(plain)
    root = Path(os.path.realpath(place or folder_paths.get_input_directory()))
    path = Path(os.path.realpath(root / plain))
    if not path.is_relative_to(root):
        raise BadInput(f"picture '{shown(name)}' is a link that leaves {root}")
    if not path.is_file():
        raise MissingFile(f"picture '{shown(name)}' is not in {root}", file=shown(name))
    return path
