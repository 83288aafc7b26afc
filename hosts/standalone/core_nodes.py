"""The core nodes of ComfyUI that FLUX.1 workflows use, for the standalone host."""

from __future__ import annotations

from . import io
from .core_conditioning import CONDITIONING_NODES
from .core_images import IMAGE_NODES
from .core_loaders import LOADER_NODES
from .core_pictures import PICTURE_NODES
from .core_sampling import SAMPLING_NODES
from .core_vision import VISION_NODES

CORE_NODES: list[type[io.ComfyNode]] = [*LOADER_NODES, *SAMPLING_NODES, *IMAGE_NODES, *PICTURE_NODES, *VISION_NODES,
                                        *CONDITIONING_NODES]
