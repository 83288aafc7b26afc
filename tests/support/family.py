"""A whole FLUX.1 family in miniature with random weights, written as files: tiny-flux's sizes, no training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import AutoencoderSpec, ClipTextSpec, FluxSpec, T5Spec
from flux_kit.tiny_flux.vocabulary import clip_tokenizer, t5_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

DEV = FluxSpec(hidden_size=128, num_heads=1, depth=2, depth_single_blocks=4, context_in_dim=64, vec_in_dim=64)
SCHNELL = replace(DEV, guidance_embed=False)
AUTOENCODER = AutoencoderSpec(ch=32, ch_mult=(1, 2, 2, 2), num_res_blocks=1)
# how all-in-one files of ComfyUI call their parts
ALL_IN_ONE = {"transformer": "model.diffusion_model.", "clip_l": "text_encoders.clip_l.transformer.",
              "t5": "text_encoders.t5xxl.transformer.", "vae": "vae."}


def random_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """fp16 tensors under their names; norms near 1, the rest small enough to stay finite."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        norm = tensor.ndim == 1 and name.endswith(("weight", "scale"))
        state[name] = (1 + 0.05 * noise if norm else noise * (0.02 if tensor.ndim == 1 else 0.08)).half()
    return state


def write_flux(path: Path, seed: int, **sizes: Any) -> None:
    """A random transformer of tiny-flux's sizes, but for these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(random_weights(Flux(replace(DEV, **sizes)), seed), path)


class Family:
    """The parts of one family as state dicts, and as files."""

    def __init__(self) -> None:
        pieces = clip_tokenizer().get_vocab_size()
        t5 = T5Spec(vocab_size=t5_tokenizer().get_vocab_size(), d_model=64, num_heads=1, d_ff=128, num_layers=2)
        clip = ClipTextSpec(vocab_size=pieces, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                            num_attention_heads=1, bos_token_id=pieces - 2, eos_token_id=pieces - 1)
        self.dev = random_weights(Flux(DEV), 1)
        self.schnell = random_weights(Flux(SCHNELL), 2)
        self.t5 = random_weights(T5Encoder(t5), 3)
        self.clip_l = random_weights(ClipText(clip), 4)
        self.vae = random_weights(Autoencoder(AUTOENCODER), 5)
        self.words = {"t5": t5_tokenizer().to_str(), "clip_l": clip_tokenizer().to_str()}

    def write(self, models: Path, names: Mapping[str, str]) -> Path:
        """Files in a ComfyUI models folder: part ("dev", "schnell", "t5", "clip_l", "vae", "all-in-one") -> name."""
        folders = {"dev": "diffusion_models", "schnell": "diffusion_models", "t5": "text_encoders",
                   "clip_l": "text_encoders", "vae": "vae", "all-in-one": "checkpoints"}
        for part, name in names.items():
            path = models / folders[part] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if part == "all-in-one":
                self.write_all_in_one(path)
            else:
                words = {"tokenizer.json": self.words[part]} if part in self.words else None
                save_file(getattr(self, part), path, metadata=words)
        return models

    def write_all_in_one(self, path: Path) -> None:
        """The schnell transformer with encoders and autoencoder in one file."""
        parts = {"transformer": self.schnell, "clip_l": self.clip_l, "t5": self.t5, "vae": self.vae}
        save_file({ALL_IN_ONE[role] + name: tensor for role, state in parts.items() for name, tensor in state.items()},
                  path, metadata={f"{role}.tokenizer.json": text for role, text in self.words.items()})
