"""Flux Kit: FLUX.1 for ComfyUI and without it. Importing this imports nothing else.

Without ComfyUI: the command `flux-kit` (`cli/`). The entry point for ComfyUI's loader, `comfy_entrypoint`, comes with
the ComfyUI host; until then ComfyUI finds no nodes here and says so.
"""
