"""Flux Kit in ComfyUI: the only package that imports ComfyUI's modules. `host.ComfyHost` is the port of `hosts`."""
