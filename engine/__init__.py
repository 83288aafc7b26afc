"""The Flux engine: PyTorch only. Knows no ComfyUI, no nodes and no workflow files."""
