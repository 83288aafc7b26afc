"""Model files: opening them, telling what they are, and loading them into the engine's models."""

from .containers import Checkpoint, ModelFile, TensorInfo, open_checkpoint
from .describe import describe, lines_of
from .detect import ROLE_NAMES, VARIANT_NAMES, Detection, Part, detect
from .keymaps import from_diffusers, to_diffusers
from .load import Match, build, choose, fill, load, match

__all__ = [
    "ROLE_NAMES", "VARIANT_NAMES", "Checkpoint", "Detection", "Match", "ModelFile", "Part", "TensorInfo", "build",
    "choose", "describe", "detect", "fill", "from_diffusers", "lines_of", "load", "match", "open_checkpoint",
    "to_diffusers",
]
