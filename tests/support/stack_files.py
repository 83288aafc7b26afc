"""Small LoRA files and pictures for tests of what is told about them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

HTML = "people/<img src=x onerror=hacked()>.safetensors"
RED, INK = "red.safetensors", "style/ink/sumi-e flux rank16.safetensors"


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


def lora_folder(folder: Path) -> None:
    """RED with a picture beside it, INK with one inside, HTML whose name, title and trigger words are markup."""
    lora_file(folder / RED, {"modelspec.trigger_phrase": "r3d style", "modelspec.title": "Red all over"})
    thumbnail = base64.b64encode(png((20, 120, 60))).decode()
    lora_file(folder / INK, {"modelspec.thumbnail": f"data:image/png;base64,{thumbnail}"})
    lora_file(folder / HTML, {"modelspec.trigger_phrase": HTML, "modelspec.title": "<b onclick=hacked()>bold</b>"})
    for number in range(3):
        lora_file(folder / "people" / f"person_{number}.safetensors", {})
    (folder / "red.preview.png").write_bytes(png())
