"""Draws the thumbnails of the example workflows, example_workflows/*.jpg, which ComfyUI's template browser shows.

    python -P docs/tools/thumbnails.py

Each is what the workflow really draws. Where one asks for the real FLUX.1, the files, the size and the prompt are
tiny-flux's, and everything else is as it stands in the workflow.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from flux_kit.cli import main as flux_kit
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "example_workflows"
SIDE, QUALITY = 512, 90
SIZE = {"aspect": "custom", "width": 128, "height": 128}
ENCODERS = {"clip_l": "tiny-clip_l.safetensors", "t5": "tiny-t5.safetensors"}
AUTOENCODER = {"vae": "tiny-ae.safetensors"}

# node -> the widgets that put tiny-flux into it; a transformer beside them, by its variant
TINY: dict[str, dict[str, Any]] = {
    "FluxKitLoadFlux": {**ENCODERS, **AUTOENCODER}, "FluxKitLoadTransformer": {}, "FluxKitLoadTextEncoders": ENCODERS,
    "FluxKitLoadVAE": AUTOENCODER, "FluxKitEmptyLatent": SIZE,
}
TRANSFORMERS = ("FluxKitLoadFlux", "FluxKitLoadTransformer")

# example -> what to set in it, as NODE.input=value of `flux-kit run`; a new example of the real model gets a row
SETTINGS: dict[str, tuple[str, ...]] = {
    "text_to_image": ("Prompt.prompt=a small yellow star at the top on a black background",),
}


def tiny(workflow: dict[str, Any]) -> list[str]:
    """Settings that put tiny-flux in the place of the files that a workflow names; none if it names tiny-flux."""
    if "tiny-flux-" in json.dumps(workflow["nodes"]):
        return []
    found: list[tuple[int, str, Any]] = []
    for node in workflow["nodes"]:
        found += [(node["id"], widget, value) for widget, value in TINY.get(node["type"], {}).items()]
        if node["type"] in TRANSFORMERS:
            variant = "schnell" if "schnell" in node["widgets_values"][0] else "dev"
            found.append((node["id"], "model", f"tiny-flux-{variant}.safetensors"))
    return [f"{node}.{widget}={value}" for node, widget, value in found]


def draw(name: str) -> Image.Image:
    """The first picture that an example draws."""
    path = EXAMPLES / f"{name}.json"
    settings = [*tiny(json.loads(path.read_text(encoding="utf-8"))), *SETTINGS.get(name, ())]
    flags = [flag for setting in settings for flag in ("--set", setting)]
    with tempfile.TemporaryDirectory() as out:
        code = flux_kit(["run", str(path), "--out", out, "--device", "cpu", "--dtype", "fp32", *flags])
        if code:
            sys.exit(code)
        with Image.open(min(Path(out).rglob("*.png"))) as picture:
            return picture.convert("RGB")


def main() -> None:
    for path in sorted(EXAMPLES.glob("*.json")):
        picture = draw(path.stem)
        scale = SIDE / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        picture.resize(size, Image.Resampling.LANCZOS).save(path.with_suffix(".jpg"), quality=QUALITY, optimize=True)
        print(f"wrote {path.with_suffix('.jpg').relative_to(ROOT).as_posix()}")


if __name__ == "__main__":
    main()
