"""Write what was trained as the files people load: fp16, the published names, tokenizers in the header.

`python -m flux_kit.tiny_flux.export --autoencoder FILE --dev FILE --schnell FILE --fill FILE ... --redux FILE`

Some members are packed, as people have them: Fill in GGUF, Canny in scaled fp8.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..engine.convert import quantize
from .vocabulary import clip_tokenizer, t5_tokenizer

MODELS = Path(__file__).parent / "models"
PACKED = {  # member: its file, and what the quantiser makes of it
    "fill": ("tiny-flux-fill.gguf", "Q8_0"), "canny": ("tiny-flux-canny.safetensors", "fp8_scaled"),
    "kontext": ("tiny-flux-kontext.safetensors", None),
}


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it, in fp16; refuses what fp16 cannot hold."""
    chosen = {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}
    for name, value in chosen.items():
        if not math.isfinite(value.half().float().abs().max().item()):
            raise ValueError(f"{prefix}{name} leaves the range of fp16")
    return {name: value.to(torch.float16).contiguous() for name, value in chosen.items()}


def write(state: dict[str, Tensor], file: str, metadata: dict[str, str] | None = None) -> None:
    path = MODELS / file
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, {"format": "pt", **(metadata or {})})
    path.chmod(0o644)  # the library writes 0600, which a shared install cannot read


def write_member(state: dict[str, Tensor], file: str, type: str | None) -> None:
    target = MODELS / "diffusion_models" / file
    if type is None:
        write(part(state, "flux."), f"diffusion_models/{file}")
        return
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.safetensors"
        save_file(part(state, "flux."), plain)
        quantize(plain, target, type, force=True)
    target.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path)
    parser.add_argument("--dev", type=Path, help="average.safetensors of the dev run")
    parser.add_argument("--schnell", type=Path, help="average.safetensors of the schnell run")
    for member in PACKED:
        parser.add_argument(f"--{member}", type=Path, help=f"average.safetensors of the {member} run")
    parser.add_argument("--redux", type=Path, help="eye.safetensors of the Redux run")
    arguments = parser.parse_args()
    for member, (file, type) in PACKED.items():
        if getattr(arguments, member):
            write_member(load_file(getattr(arguments, member)), file, type)
    if arguments.redux:
        state = load_file(arguments.redux)
        write(part(state, "siglip."), "clip_vision/tiny-siglip.safetensors")
        write(part(state, "redux."), "style_models/tiny-redux.safetensors")
    if arguments.autoencoder:
        write(part(load_file(arguments.autoencoder), ""), "vae/tiny-ae.safetensors")
    if arguments.dev:
        state = load_file(arguments.dev)
        write(part(state, "flux."), "diffusion_models/tiny-flux-dev.safetensors")
        write(part(state, "t5."), "text_encoders/tiny-t5.safetensors", {"tokenizer.json": t5_tokenizer().to_str()})
        write(part(state, "clip."), "text_encoders/tiny-clip_l.safetensors",
              {"tokenizer.json": clip_tokenizer().to_str()})
    if arguments.schnell:
        write(part(load_file(arguments.schnell), "flux."), "diffusion_models/tiny-flux-schnell.safetensors")


if __name__ == "__main__":
    main()
