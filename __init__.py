"""Flux Kit: FLUX.1 for ComfyUI and without it. Importing this imports nothing else.

Without ComfyUI: the command `flux-kit` (`cli/`). ComfyUI's loader calls `comfy_entrypoint`.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"  # help pages of the nodes


async def comfy_entrypoint() -> Any:
    """ComfyUI's extension with all nodes. The host is chosen first: node classes are built from its io."""
    from . import hosts
    from .hosts.comfyui.host import ComfyHost, extension
    hosts.use(ComfyHost())
    from .nodes import NODES
    return extension(NODES)
