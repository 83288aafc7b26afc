"""What the engine offers for a host such as ComfyUI, tried without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from flux_kit.cli.session import TINY_MODELS
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.sampling.latents import image_ids, text_ids
from flux_kit.engine.specs import FluxSpec
from flux_kit.engine.text import TextEncoders, find_tokenizer
from flux_kit.engine.weights import load
from torch import Tensor, nn

SPEC = FluxSpec(hidden_size=128, num_heads=1, depth=2, depth_single_blocks=2, context_in_dim=64, vec_in_dim=64)


class Told:
    """Runs the blocks as they are and writes down what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def before(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        self.calls.append(("before", *(t.shape[1] for t in tokens)))
        return tokens

    def double(self, index: int, block: nn.Module, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor,
               attn_mask: Tensor | None) -> Any:
        self.calls.append(("double", index, img.shape[1], txt.shape[1]))
        return block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=attn_mask, transformer_options={})

    def single(self, index: int, block: nn.Module, x: Tensor, txt_tokens: int, vec: Tensor, pe: Tensor,
               attn_mask: Tensor | None) -> Any:
        self.calls.append(("single", index, x.shape[1], txt_tokens))
        return block(x, vec=vec, pe=pe, attn_mask=attn_mask)


def test_hooks_see_every_block_and_change_nothing_by_themselves() -> None:
    torch.manual_seed(0)
    flux = Flux(SPEC).eval().requires_grad_(False)
    inputs = (torch.randn(1, 6, 64), image_ids(1, 4, 6), torch.randn(1, 5, 64), text_ids(1, 5), torch.tensor([0.5]),
              torch.randn(1, 64), torch.tensor([3.5]))
    hooks = Told()
    assert torch.equal(flux.forward_orig(*inputs, hooks=hooks), flux(*inputs))
    assert hooks.calls == [("before", 6, 5, 6, 5), ("double", 0, 6, 5), ("double", 1, 6, 5), ("single", 0, 11, 5),
                           ("single", 1, 11, 5)]


def test_text_encoders_run_on_the_device_they_are_told() -> None:
    folder = TINY_MODELS / "text_encoders"
    files = {"clip_l": folder / "tiny-clip_l.safetensors", "t5": folder / "tiny-t5.safetensors"}
    clip, t5 = (load(path, role) for role, path in files.items())
    encoders = TextEncoders(clip, find_tokenizer("clip_l", files["clip_l"]), t5, find_tokenizer("t5", files["t5"]))
    asked: list[str] = []

    class Elsewhere(nn.Module):
        """Stands for an encoder whose weights lie on one device while it computes on another."""

        def __init__(self, encoder: Any) -> None:
            super().__init__()
            self.spec, self.kept, self.weight = encoder.spec, [encoder], nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, ids: Tensor) -> Any:
            asked.append(ids.device.type)
            return self.kept[0](ids)

    away = replace(encoders, clip=Elsewhere(clip), t5=Elsewhere(t5), device=torch.device("cpu"))
    for mine, theirs in zip(away.encode("a red circle"), encoders.encode("a red circle"), strict=True):
        assert torch.equal(mine, theirs)
    assert asked == ["cpu", "cpu"]
