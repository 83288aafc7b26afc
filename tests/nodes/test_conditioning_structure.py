"""Structure Map and Flux Structure in the standalone host, with a random model of 128 channels and a random control
LoRA, against BFL's recipe written out."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import relative
from family import DEV, write_flux
from flux_kit.engine.adapters.stack import Row
from flux_kit.engine.errors import BadInput, MissingFile
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.sampling.latents import make_noise
from flux_kit.hosts.standalone.host import StandaloneHost
from PIL import Image
from safetensors.torch import save_file
from scenes_8bit import flat_shapes, soft_shapes
from torch import Tensor

CONTROL, FILL, LORA = "flux1-depth-dev.safetensors", "flux1-fill-dev.safetensors", "flux1-depth-dev-lora.safetensors"
MAP: dict[str, Any] = {"kind": "canny", "low": 50.0, "high": 200.0, "depth_model": "none", "depth_range": "min-max",
                       "invert": False, "resolution": 518, "width": 0, "height": 0}
STRUCTURE: dict[str, Any] = {"kind": "depth", "guidance": 0.0, "width": 0, "height": 0, "fit": "stretch"}
SAME = 1e-5


def control_lora() -> dict[str, Tensor]:
    """BFL's kind: pairs with a bias on B for linear layers of both kinds of blocks, `img_in` of 128, norms anew."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    made = {}
    for name, (rows, columns) in {"img_in": (128, 128), "double_blocks.0.img_attn.qkv": (384, 128),
                                  "single_blocks.1.linear1": (896, 128), "final_layer.linear": (64, 128)}.items():
        made |= {f"{name}.lora_A.weight": random(8, columns), f"{name}.lora_B.weight": random(rows, 8),
                 f"{name}.lora_B.bias": random(rows)}
    return {**made, "double_blocks.1.txt_attn.norm.key_norm.scale": 1 + random(128),
            "single_blocks.0.norm.query_norm.scale": 1 + random(128)}


@pytest.fixture(scope="module", autouse=True)
def control_files(models: Path) -> None:
    (models / "loras").mkdir(exist_ok=True)
    for name, channels in ((CONTROL, 128), (FILL, 384)):
        write_flux(models / "diffusion_models" / name, 8, in_channels=channels)
    save_file(control_lora(), models / "loras" / LORA)


def prompt() -> list[list[Any]]:
    generator = torch.Generator().manual_seed(3)
    return [[torch.randn(1, 12, 64, generator=generator), {"pooled_output": torch.randn(1, 64, generator=generator)}]]


def packed(latents: Tensor) -> Tensor:
    """`(1, C, h, w)` -> tokens `(1, h/2 * w/2, C * 4)`, channels first."""
    _, channels, height, width = latents.shape
    cells = latents.reshape(1, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(1, height * width // 4, channels * 4)


def recipe(flux: Any, autoencoder: Any, levels: Image.Image, size: tuple[int, int], guidance: float, sigmas: Tensor,
           seed: int) -> Tensor:
    """BFL's `prepare_control` with a map as it is, and `denoise`, from the noise that ComfyUI draws."""
    width, height = size
    lanczos = Image.Resampling.LANCZOS
    image = levels.resize((width, levels.height), lanczos).resize((width, height), lanczos)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
    cond = packed(0.3611 * (autoencoder.encode(pixels.movedim(-1, 1) / 127.5 - 1) - 0.1159))
    (txt, values), = prompt()
    x = packed(make_noise((1, 16, height // 8, width // 8), seed))
    rows, columns = torch.meshgrid(torch.arange(height // 16), torch.arange(width // 16), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), -1).view(1, -1, 3).float()
    for now, after in pairwise(sigmas):
        velocity = flux(torch.cat((x, cond), -1), ids, txt, torch.zeros(1, txt.shape[1], 3), now[None],
                        values["pooled_output"], torch.tensor([guidance]))
        x = x + (after - now) * velocity
    tokens = x.view(1, height // 16, width // 16, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(1, 16, height // 8, width // 8) / 0.3611 + 0.1159


@pytest.mark.parametrize("size", [(96, 64), (64, 80)])
@torch.no_grad()
def test_d25_a_run_is_the_official_recipe(nodes: dict[str, Any], host: StandaloneHost, vae: Any,
                                          size: tuple[int, int]) -> None:
    """A map of 96 x 64 at its own size and at another, by our sampler."""
    image = soft_shapes(64, 96)
    model = host.load_model(host.resolve_file("diffusion_models", CONTROL))
    positive, negative, latent, report = nodes["FluxKitStructure"](
        positive=prompt(), vae=vae, map=image, model=model, **{**STRUCTURE, "width": size[0], "height": size[1]})
    assert latent["samples"].shape == (1, 16, size[1] // 8, size[0] // 8) and "guidance 10" in report
    assert ("resized" in report) == (size != (96, 64)) and "noise_concat" not in positive[0][1]
    assert not negative[0][0].any() and negative[0][1]["guidance"] == 10
    found = host.sample(model, positive, None, latent, seed=5, steps=3, schedule="bfl")["samples"]
    from flux_kit.engine.sampling import make_sigmas
    sigmas = make_sigmas("bfl", 3, image_seq_len=size[0] * size[1] // 256)
    levels = Image.frombytes("RGB", (96, 64), bytes((image[0] * 255).round().byte().flatten().tolist()))
    expected = recipe(model.flux, vae.autoencoder, levels, size, 10.0, sigmas, 5)
    assert relative(found, expected) <= SAME
    other = nodes["FluxKitStructure"](positive=prompt(), vae=vae, map=1 - image, model=model, **{
        **STRUCTURE, "width": size[0], "height": size[1]})
    changed = host.sample(model, other[0], None, latent, seed=5, steps=3, schedule="bfl")["samples"]
    assert relative(changed, found) > 1e-3


def lora_by_hand(state: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    """BFL's `LinearLora`: W + s B A, b + s bias of B; norms of the file at any scale; `img_in` begun with zeros."""
    made, lora = {name: tensor.float().clone() for name, tensor in state.items()}, control_lora()
    made["img_in.weight"] = torch.nn.functional.pad(made["img_in.weight"], (0, 64))
    for name, tensor in lora.items():
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            made[f"{layer}.weight"] += strength * lora[f"{layer}.lora_B.weight"] @ tensor
            made[f"{layer}.bias"] += strength * lora[f"{layer}.lora_B.bias"]
        elif name.endswith(".scale"):
            made[name] = tensor
    return made


@pytest.mark.parametrize("strength", [0.5, 0.85, 1.0])
@torch.no_grad()
def test_d28_a_control_lora_is_the_formula_at_any_strength(nodes: dict[str, Any], host: StandaloneHost, vae: Any,
                                                           strength: float) -> None:
    model = host.load_model(host.resolve_file("diffusion_models", "flux1-dev.safetensors"))
    whole = Flux(replace(DEV, in_channels=128))
    whole.load_state_dict(lora_by_hand(model.flux.state_dict(), strength))
    oracle = host.wrap_model(whole, "by-hand.safetensors")
    for mode in ("auto", "side"):
        made = host.with_loras(model, None, [Row(LORA, strength)], mode=mode)[0]
        positive, _, latent, _ = nodes["FluxKitStructure"](positive=prompt(), vae=vae, map=flat_shapes(64, 64),
                                                           model=made, **STRUCTURE)
        found = host.sample(made, positive, None, latent, seed=5, steps=2)["samples"]
        assert relative(found, host.sample(oracle, positive, None, latent, seed=5, steps=2)["samples"]) <= SAME
    assert host.img_in_width(made) == 128 and model.flux.spec.in_channels == 64


def test_d29_a_control_lora_on_fill_is_refused(nodes: dict[str, Any], host: StandaloneHost, vae: Any) -> None:
    fill = host.load_model(host.resolve_file("diffusion_models", FILL))
    with pytest.raises(BadInput, match=r"depth-dev-lora.*128 channels.*FLUX\.1 Fill takes 384.*on FLUX\.1 dev"):
        host.with_loras(fill, None, [Row(LORA)])
    kept, _, report = host.with_loras(fill, None, [Row(LORA)], strict=False)
    assert "cannot be joined" in report and host.img_in_width(kept) == 384
    for model, said in ((fill, "384"), (host.load_model(host.resolve_file("diffusion_models",
                                                                          "flux1-dev.safetensors")), "64")):
        with pytest.raises(BadInput, match=said):
            nodes["FluxKitStructure"](positive=prompt(), vae=vae, map=flat_shapes(64, 64), model=model, **STRUCTURE)


def test_maps(nodes: dict[str, Any]) -> None:
    image = flat_shapes(64, 96)
    edges, report = nodes["FluxKitStructureMap"](image=image, **MAP)
    assert edges.shape == image.shape and set(edges.unique().tolist()) == {0.0, 1.0} and report == ""
    inverted, _ = nodes["FluxKitStructureMap"](image=image, **{**MAP, "invert": True})
    assert torch.equal(inverted, 1 - edges)
    small, report = nodes["FluxKitStructureMap"](image=image, **{**MAP, "kind": "as is", "width": 48, "height": 32})
    assert small.shape == (1, 32, 48, 3) and "stretched from 96 x 64 to 48 x 32" in report


def test_depth_without_a_model_says_what_to_download(nodes: dict[str, Any]) -> None:
    from flux_kit.nodes.structure import FluxKitStructureMap as Node
    with pytest.raises(MissingFile, match=r"models/depth/.*Depth-Anything-V2-Small-hf"):
        nodes["FluxKitStructureMap"](image=flat_shapes(32, 32), **{**MAP, "kind": "depth"})
    assert "models/depth" in str(Node.validate_inputs(kind="depth", depth_model="none"))
    assert Node.validate_inputs(kind="canny", depth_model="none") is True
    assert "is in none" in str(Node.validate_inputs(kind="depth", depth_model="gone"))
