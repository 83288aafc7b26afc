"""Small LoRA files and pictures for tests of what is told about them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file


def lora_file(path: Path, metadata: Mapping[str, str]) -> None:
    """A kohya LoRA of rank 2 and alpha 1 on one linear layer of FLUX.1-dev."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{stem}.lora_down.weight": torch.ones(2, 3072), f"{stem}.lora_up.weight": torch.ones(3072, 2),
               f"{stem}.alpha": torch.tensor(1.0)}, path, dict(metadata))


def png(colour: tuple[int, int, int] = (200, 30, 30), size: int = 64) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(made, "PNG")
    return made.getvalue()
