"""Stacks of LoRAs on models: side path equals merge, order does not matter, and nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flux_kit.engine.adapters import (
    Attachment,
    Entry,
    Lora,
    Mask,
    attach,
    block_weights,
    norm_share,
    planned,
    read_lora,
)
from flux_kit.engine.adapters.attach import COPY, MERGED, SIDE
from flux_kit.engine.adapters.sidepath import NAME, PAD, SidePath
from flux_kit.engine.errors import BadInput
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.ops import PLAIN
from flux_kit.engine.quant import FORMATS
from flux_kit.engine.quant import Embedding as PackedEmbedding
from flux_kit.engine.quant import Linear as PackedLinear
from torch import Tensor, nn

H = 128


def r(*shape: int, scale: float = 0.1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype) * scale


def lora(stem: str, out: int, wide: int, rank: int = 4, alpha: float | None = None) -> dict[str, Tensor]:
    found = {f"{stem}.lora_down.weight": r(rank, wide), f"{stem}.lora_up.weight": r(out, rank)}
    return found if alpha is None else {**found, f"{stem}.alpha": torch.tensor(alpha, dtype=torch.float64)}


def kohya() -> dict[str, Tensor]:
    """Fused layers of every kind, with biases and a norm."""
    tensors = {}
    for name, out, wide in (("double_blocks_0_img_attn_qkv", 3 * H, H), ("double_blocks_1_txt_mlp_0", 4 * H, H),
                            ("double_blocks_0_img_mod_lin", 6 * H, H), ("single_blocks_0_linear1", 7 * H, H),
                            ("single_blocks_1_linear2", H, 5 * H), ("img_in", H, 64),
                            ("final_layer_adaLN_modulation_1", 2 * H, H)):
        tensors |= lora(f"lora_unet_{name}", out, wide, alpha=2.0)
    tensors["lora_unet_double_blocks_0_img_attn_qkv.diff_b"] = r(3 * H)
    tensors["lora_unet_double_blocks_0_img_attn_norm_query_norm.diff"] = r(H)
    return tensors


def peft() -> dict[str, Tensor]:
    """Split layers of unequal ranks with parts missing, and the swapped final layer."""
    tensors = {}
    block, single = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
    for name, out, wide, rank in ((f"{block}.attn.to_q", H, H, 4), (f"{block}.attn.to_v", H, H, 7),
                                  (f"{single}.attn.to_k", H, H, 3), (f"{single}.proj_mlp", 4 * H, H, 5),
                                  ("transformer.norm_out.linear", 2 * H, H, 4), ("transformer.x_embedder", H, 64, 4)):
        tensors |= lora(name, out, wide, rank)
    tensors[f"{block}.attn.to_q.lora_magnitude_vector"] = torch.rand(H, dtype=torch.float64) + 0.5
    return tensors


def others() -> dict[str, Tensor]:
    """One layer for each of the other algorithms."""
    stem = "lora_unet_double_blocks_0_{}".format
    tensors = {f"{stem('img_mlp_0')}.{name}": value for name, value in (
        ("lokr_w1", r(8, 8)), ("lokr_w2_a", r(64, 4)), ("lokr_w2_b", r(4, 16)))}
    tensors |= {f"{stem('txt_attn_proj')}.{name}": value for name, value in (
        ("hada_w1_a", r(H, 4)), ("hada_w1_b", r(4, H)), ("hada_w2_a", r(H, 4)), ("hada_w2_b", r(4, H)))}
    tensors |= {f"{stem('txt_mlp_2')}.{name}.weight": value for name, value in (
        ("a1", r(4 * H, 4)), ("a2", r(4, 4 * H)), ("b1", r(H, 4)), ("b2", r(4, 4 * H)))}
    tensors |= {f"{stem('img_attn_proj')}.oft_blocks": r(16, 8, 8), f"{stem('img_attn_proj')}.rescale": 1 + r(H, 1)}
    tensors |= {f"{stem('img_mlp_2')}.oft_blocks": r(5, 16, 8, 8)}
    tensors |= {f"{stem('txt_attn_qkv')}.weight": r(3 * H), f"{stem('txt_attn_qkv')}.on_input": torch.tensor(False)}
    tensors |= {f"{stem('txt_mlp_0')}.weight": r(H), f"{stem('txt_mlp_0')}.on_input": torch.tensor(True)}
    tensors |= lora("lora_unet_double_blocks_1_img_attn_proj", H, H) | {
        "lora_unet_double_blocks_1_img_attn_proj.dora_scale": torch.rand(1, H, dtype=torch.float64) + 1}
    tensors |= {"lora_unet_double_blocks_1_img_mlp_0.diff": r(4 * H, H),
                "lora_unet_single_blocks_1_linear1.set_weight": r(7 * H, H),
                "lora_transformer_single_transformer_blocks_0_attn_to_q.oft_R.weight": r(16, 28)}
    return tensors


KINDS: dict[str, Callable[[], dict[str, Tensor]]] = {"kohya": kohya, "peft": peft, "others": others}


@pytest.fixture()
def loras(save: Any) -> dict[str, Lora]:
    torch.manual_seed(1)
    return {name: read_lora(save(make(), name=f"{name}.safetensors")) for name, make in KINDS.items()}


def inputs(dtype: torch.dtype = torch.float64, channels: int = 64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    img = torch.randn(2, 6, channels, generator=generator).to(dtype)
    txt = torch.randn(2, 5, 64, generator=generator).to(dtype)
    ids = torch.zeros(2, 6, 3)
    ids[..., 1] = torch.arange(6)
    return (img, ids, txt, torch.zeros(2, 5, 3), torch.tensor([0.5, 0.5]),
            torch.randn(2, 64, generator=generator).to(dtype), torch.tensor([3.5, 3.5]))


@torch.no_grad()
def run(model: nn.Module, dtype: torch.dtype = torch.float64, channels: int = 64) -> Tensor:
    out: Tensor = model(*inputs(dtype, channels))
    return out


def stack(loras: dict[str, Lora], *strengths: float) -> list[Entry]:
    return [Entry(one, strength) for one, strength in zip(loras.values(), strengths, strict=True)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor], parameters: dict[str, int], out: Tensor) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert not any(isinstance(module, SidePath) or module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())
    assert torch.equal(run(model, out.dtype), out)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("strengths", [(1.0, 1.0, 1.0), (0.7, -0.4, 0.3)])
def test_side_path_equals_merge(flux: Flux, loras: dict[str, Lora], strengths: tuple[float, ...]) -> None:
    plain = run(flux)
    with_merge = attach(flux, stack(loras, *strengths), mode="merge")
    merged = run(flux)
    with_merge.detach()
    by_side = attach(flux, stack(loras, *strengths), mode="side")
    found = run(flux)
    assert float((merged - plain).abs().max()) > 0.1 * float(plain.abs().max())
    near(found, merged, 1e-12)
    assert sum(applied.layers[SIDE] for applied in by_side.applied) > 20
    assert all(set(applied.layers) <= {MERGED} for applied in with_merge.applied)


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("mode", ["side", "auto"])
def test_a_replaced_bias(flux: Flux, save: Any, mode: str, strength: float) -> None:
    """Whole at any strength but 0, beside packed weights without a copy of them."""
    bias = r(H, scale=3)
    lora = read_lora(save({"diffusion_model.double_blocks.0.img_attn.proj.bias.set_weight": bias}))
    model = flux if mode == "side" else packed(flux, "Q8_0")
    layer, x = model.double_blocks[0].img_attn, r(3, H)
    plain, own = layer.proj(x), layer.proj.bias.clone()
    attachment = attach(model, [Entry(lora, strength)], mode=mode, dtype=torch.float64)
    assert attachment.applied[0].layers == {SIDE: 1}
    near(layer.proj(x), plain + (bias.float() - own if strength else 0), 1e-6)
    attachment.detach()
    assert torch.equal(layer.proj(x), plain)


def test_merge_is_the_sum_of_the_changes(flux: Flux, loras: dict[str, Lora]) -> None:
    """One layer worked out by hand: q and v of a fused layer, with a DoRA on q, under a LoRA on all of it."""
    weight = flux.double_blocks[0].img_attn.qkv.weight.clone().numpy()
    a, b = loras["kohya"], loras["peft"]
    factors = {(adapter.destination.parts, adapter.algorithm): {role: value.numpy() for role, value in
                                                                adapter.factors.items()}
               for one in (a, b) for adapter in one.adapters
               if adapter.destination.module == "double_blocks.0.img_attn.qkv"}
    whole, q, v = (factors[parts, "LoRA"] for parts in (None, (0, 1), (2, 3)))
    expected = weight + 0.5 * (2 / 4) * whole["up"] @ whole["down"]
    changed = weight[:H] + q["up"] @ q["down"]
    gain = q["magnitude"][:, None] / np.linalg.norm(changed, axis=1, keepdims=True)
    expected[:H] += 2 * (changed * gain - weight[:H])
    expected[2 * H:] += 2 * v["up"] @ v["down"]
    attach(flux, [Entry(a, 0.5), Entry(b, 2.0)], mode="merge")
    np.testing.assert_allclose(flux.double_blocks[0].img_attn.qkv.weight.numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mode", ["side", "merge"])
def test_order_does_not_matter(flux: Flux, loras: dict[str, Lora], mode: str) -> None:
    entries = stack(loras, 0.7, -0.4, 0.3)
    outs = []
    for order in (entries, entries[::-1]):
        attachment = attach(flux, order, mode=mode)
        outs.append(run(flux))
        attachment.detach()
    near(outs[0], outs[1], 1e-13)


@pytest.mark.parametrize("mode", ["auto", "side", "merge"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_detach_leaves_nothing(flux: Flux, loras: dict[str, Lora], mode: str, dtype: torch.dtype) -> None:
    flux = flux.to(dtype)
    before, ids, out = state(flux), {name: id(one) for name, one in flux.named_parameters()}, run(flux, dtype)
    attachment = attach(flux, stack(loras, 1, 1, 1), mode=mode)
    assert list(flux.state_dict()) == list(before)  # what saves the model meets its own names only
    assert not torch.equal(run(flux, dtype), out)
    attachment.set_strengths([0.1, 0.2, 0.3])
    run(flux, dtype)
    attachment.detach()
    attachment.detach()
    assert_untouched(flux, before, ids, out)
    attach(flux, stack(loras, 1, 1, 1), mode=mode).detach()
    assert_untouched(flux, before, ids, out)


@pytest.mark.parametrize("mode", ["side", "merge"])
def test_strength_zero_is_the_base(flux: Flux, loras: dict[str, Lora], mode: str) -> None:
    out = run(flux)
    attachment = attach(flux, stack(loras, 1, 1, 1), mode=mode)
    attachment.set_strengths([0, 0, 0])
    assert torch.equal(run(flux), out)


def test_a_strength_writes_vectors_only(flux: Flux, loras: dict[str, Lora]) -> None:
    attachment = attach(flux, stack(loras, 1, 1, 1), mode="side")
    expected_at_half = {}
    sides = {name: module for name, module in flux.named_modules() if isinstance(module, SidePath)}
    held = {f"{name}.{key}": (id(tensor), tensor.clone()) for name, side in sides.items()
            for key, tensor in side.named_buffers()}
    attachment.set_strengths([0.5, 0.5, 0.5])
    for name, side in sides.items():
        for key, tensor in side.named_buffers():
            same, old = held[f"{name}.{key}"]
            assert id(tensor) == same  # compiled code keeps its inputs
            if not torch.equal(tensor, old):
                expected_at_half[key] = tensor
    assert set(expected_at_half) == {"strength", "vector"}
    found = run(flux)
    attachment.detach()
    attach(flux, stack(loras, 0.5, 0.5, 0.5), mode="merge")
    near(found, run(flux), 1e-12)


def test_ranks_are_padded(flux: Flux, loras: dict[str, Lora]) -> None:
    attach(flux, stack(loras, 1, 1, 1), mode="side")
    ranks = [module.rank for module in flux.modules() if isinstance(module, SidePath) and module.rank]
    assert ranks and all(rank % PAD == 0 for rank in ranks)


def test_auto_merges_resident_and_sides_packed_and_offloaded(flux: Flux, loras: dict[str, Lora]) -> None:
    only = {"kohya": loras["kohya"]}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        attachment = attach(copy.deepcopy(flux).to(dtype), stack(only, 1.0))
        assert attachment.applied[0].layers == {MERGED: 9 - 1}
    assert attach(copy.deepcopy(flux), stack(only, 1.0), device="meta", dtype=torch.bfloat16).applied[0].layers == {
        SIDE: 7, MERGED: 1}


def packed(model: nn.Module, format: str) -> nn.Module:
    """The model with all of its Linears of whole blocks packed; the bytes are of random numbers."""
    kind = FORMATS[format]
    for path, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer.in_features % kind.block:
            continue
        if format == "F8_E4M3":
            data = layer.weight.float().to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            blocks = torch.randint(0, 256, (layer.out_features * layer.in_features // kind.block, kind.nbytes),
                                   dtype=torch.uint8)
            for at in kind.halves:
                blocks[:, at:at + 2] = (torch.rand(len(blocks), 1) * 1e-3).half().view(torch.uint8)
            data = blocks.view(layer.out_features, -1)
        new = PackedLinear(layer.in_features, layer.out_features, layer.bias is not None, format=kind)
        new.weight.data = data
        new.bias = layer.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model.requires_grad_(False)


def unpacked(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            new = PLAIN.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
            new.weight.data, new.bias = layer.unpacked(slice(None), torch.float64), layer.bias
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
    return model.requires_grad_(False)


@pytest.mark.parametrize("format", ["F8_E4M3", "Q8_0", "Q4_0"])
def test_packed_bases_keep_their_bytes(flux: Flux, loras: dict[str, Lora], format: str) -> None:
    """On a packed base the stack does what it does on the same numbers unpacked."""
    model = packed(flux, format)
    before, ids, out = state(model), {name: id(one) for name, one in model.named_parameters()}, run(model)
    attachment = attach(model, stack(loras, 0.7, -0.4, 0.3), dtype=torch.float64)
    found = run(model)
    for applied in attachment.applied:
        assert applied.layers[SIDE] > 0
    assert attachment.applied[2].layers[COPY] == 2  # a whole diff and a set weight
    bytes_of = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.uint8}
    assert all(torch.equal(tensor, before[name]) for name, tensor in bytes_of.items()) and len(bytes_of) > 20
    attachment.detach()
    assert_untouched(model, before, ids, out)
    plain = unpacked(model)
    attach(plain, stack(loras, 0.7, -0.4, 0.3), mode="merge")
    # numbers of the base are unpacked in fp32 for DoRA and GLoRA, and packed layers round to fp32 before float64
    near(found, run(plain), 1e-6)
    attachment = attach(model, stack(loras, 0.7, -0.4, 0.3), mode="side", dtype=torch.float64)
    assert COPY not in attachment.applied[2].layers
    near(run(model), found, 1e-6)


WIDE = [(3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360), (21504, 3072)]


@pytest.mark.parametrize("out, wide", WIDE)
@pytest.mark.parametrize("format", ["Q4_K", "F8_E4M3", None])
def test_full_width_layers(out: int, wide: int, format: str | None, save: Any) -> None:
    """Eight LoRAs on layers of FLUX.1's own sizes, against the sum of their products in fp64."""
    torch.manual_seed(0)
    names = {(9216, 3072): "double_blocks.0.img_attn.qkv", (12288, 3072): "double_blocks.0.img_mlp.0",
             (3072, 12288): "double_blocks.0.img_mlp.2", (3072, 3072): "double_blocks.0.img_attn.proj",
             (3072, 15360): "single_blocks.0.linear2", (21504, 3072): "single_blocks.0.linear1"}
    name = names[out, wide]
    layer = PLAIN.Linear(wide, out)
    model = nest(name, layer).requires_grad_(False)
    if format is not None:
        packed(model, format)
    layer = model.get_submodule(name)
    loras = [read_lora(save(
        lora("lora_unet_" + name.replace(".", "_"), out, wide, 16) if i % 2 or "qkv" not in name
        else lora("transformer.transformer_blocks.0.attn.to_k", out // 3, wide, 16), name=f"{i}.safetensors"))
        for i in range(8)]
    x = torch.randn(3, wide)
    base = layer(x)
    attachment = attach(model, [Entry(one, 0.1 * i) for i, one in enumerate(loras)], mode="side")
    expected = base.double()
    for i, one in enumerate(loras):
        adapter = one.adapters[0]
        rows = adapter.destination.rows((out, wide))
        expected[:, rows] += 0.1 * i * (x.double() @ adapter.factors["down"].T) @ adapter.factors["up"].T
    near(layer(x).double(), expected, 1e-5)
    attachment.detach()
    assert torch.equal(layer(x), base)


def nest(name: str, layer: nn.Module) -> nn.Module:
    """A model that has this layer at this place, and nothing else."""
    for word in reversed(name.split(".")):
        outer = nn.Module() if not word.isdigit() else nn.ModuleList([nn.Module()] * int(word))
        if word.isdigit():
            outer.append(layer)  # type: ignore[operator]
        else:
            outer.add_module(word, layer)
        layer = outer
    return layer


def test_bfloat16_side_path_is_no_worse_than_merging(flux: Flux, loras: dict[str, Lora]) -> None:
    entries = stack({"kohya": loras["kohya"], "peft": loras["peft"]}, 1.0, 1.0)
    attachment = attach(flux, entries, mode="merge")
    exact = run(flux)
    attachment.detach()
    low = flux.to(torch.bfloat16)
    errors = {}
    for mode in ("side", "merge"):
        attachment = attach(low, entries, mode=mode)
        errors[mode] = float((run(low, torch.bfloat16).double() - exact).square().mean().sqrt())
        attachment.detach()
    assert errors["side"] < 1.2 * errors["merge"] < 0.1


def test_failed_attach_changes_nothing(flux: Flux, loras: dict[str, Lora], save: Any) -> None:
    wrong = read_lora(save(lora("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072), name="big.safetensors"))
    before, ids, out = state(flux), {name: id(one) for name, one in flux.named_parameters()}, run(flux)
    with pytest.raises(BadInput, match=r"big.safetensors does not fit this model: double_blocks.0.img_attn.proj: the "
                                       r"adapter is for \[3072, 3072\], the layer is \[128, 128\]"):
        attach(flux, [*stack(loras, 1, 1, 1), Entry(wrong)])
    assert_untouched(flux, before, ids, out)

    def fails(sigma: float) -> float:
        raise RuntimeError("boom")
    for mode in ("side", "merge"):
        with pytest.raises(RuntimeError, match="boom"):
            attach(flux, [*stack(loras, 1, 1, 1), Entry(loras["kohya"], factor=fails)], mode=mode)  # type: ignore[arg-type]
        assert_untouched(flux, before, ids, out)


def test_what_is_not_in_the_model_is_told(flux: Flux, save: Any) -> None:
    tensors = (lora("lora_unet_guidance_in_in_layer", H, 256) | lora("lora_unet_double_blocks_18_img_attn_proj", H, H)
               | lora("lora_unet_double_blocks_1_img_attn_proj", H, H))
    schnell = Flux(copy.copy(flux.spec).__class__(**{**vars(flux.spec), "guidance_embed": False})).requires_grad_(False)
    attachment = attach(schnell, [Entry(read_lora(save(tensors)))])
    assert sorted(attachment.applied[0].skipped) == [("double_blocks.18.img_attn.proj", "not in this model"),
                                                     ("guidance_in.in_layer", "not in this model")]
    attachment.detach()
    only = read_lora(save(lora("lora_unet_guidance_in_in_layer", H, 256), name="guidance.safetensors"))
    with pytest.raises(BadInput, match="none of its 1 adapters has a layer in this model"):
        attach(schnell, [Entry(only)])


def test_two_stacks_at_once_are_refused(flux: Flux, loras: dict[str, Lora]) -> None:
    attach(flux, stack(loras, 1, 1, 1))
    with pytest.raises(BadInput, match="carries LoRAs already"):
        attach(flux, stack(loras, 1, 1, 1))


def test_the_same_lora_twice_adds_up(flux: Flux, loras: dict[str, Lora]) -> None:
    attach(flux, [Entry(loras["kohya"], 0.5), Entry(loras["kohya"], 0.25)], mode="side")
    twice = run(flux)
    vars(flux)["flux_kit_attachment"].detach()
    attach(flux, [Entry(loras["kohya"], 0.75)], mode="merge")
    near(twice, run(flux), 1e-12)


def test_block_weights_and_schedule(flux: Flux, loras: dict[str, Lora]) -> None:
    def factor(module: str) -> float:
        return 0.5 if module.startswith("single_blocks.0") else 1.0 if "double" in module else 0.0
    entry = Entry(loras["kohya"], 0.8, factor=factor, schedule=lambda sigma: 1 - sigma)
    attachment = attach(flux, [entry])
    assert attachment.applied[0].layers[SIDE] == 7  # a schedule stays out of the weights
    attachment.set_sigma(0.25)
    found = run(flux)
    attachment.detach()
    attach(flux, [Entry(loras["kohya"], 0.8 * 0.75, factor=factor)], mode="merge")
    near(found, run(flux), 1e-12)


@pytest.mark.parametrize("name", ["kohya", "others"])
def test_masks_divide_the_picture(flux: Flux, loras: dict[str, Lora], name: str) -> None:
    """A mask of ones is no mask, one of zeros the base; in between each token has its own strength."""
    entry = Entry(loras[name], 0.8, masked=True)
    out = run(flux)
    attachment = attach(flux, [entry])
    merged = {module for module, side in attachment._sides if side.stream is not None}
    assert merged
    full = run(flux)

    def mask(image: float, text: float, other: float) -> Mask:
        part = torch.tensor([[text]], dtype=torch.float64)
        return Mask(torch.full((6, 1), image, dtype=torch.float64), part, part, torch.tensor([[other]]).double())
    attachment.set_mask(mask(1, 1, 1))
    near(run(flux), full, 1e-12)
    if name == "kohya":
        # its norm is merged and knows no tokens: left at full strength, so only compare what the mask reaches
        return
    attachment.set_mask(mask(0, 0, 0))
    near(run(flux), out, 1e-12)


def test_a_mask_gives_each_token_its_strength(save: Any) -> None:
    torch.manual_seed(0)
    layer = PLAIN.Linear(H, H, dtype=torch.float64)
    model = nest("single_blocks.0.linear2", layer)
    model.get_submodule("single_blocks.0").linear2 = layer = PLAIN.Linear(5 * H, H, dtype=torch.float64)
    stems = ("lora_unet_single_blocks_0_linear2",)
    loras = [read_lora(save(lora(stems[0], H, 5 * H), name=f"{i}.safetensors")) for i in range(2)]
    attachment = attach(model.requires_grad_(False), [Entry(one, 1 + i, masked=True) for i, one in enumerate(loras)])
    image = torch.rand(4, 2, dtype=torch.float64)
    text, rest = torch.tensor([[0.25, 0.5]]).double(), torch.tensor([[0.0, 1.0]]).double()
    attachment.set_mask(Mask(image, text, rest, text, text_tokens=3))
    x = torch.randn(2, 9, 5 * H, dtype=torch.float64)  # 3 of text, 4 of the picture, 2 of a reference
    share = torch.cat((text.expand(3, 2), image, rest.expand(2, 2)))
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for i, one in enumerate(loras):
        factors = one.adapters[0].factors
        expected = expected + (1 + i) * share[None, :, i, None] * (x @ factors["down"].T @ factors["up"].T)
    near(layer(x), expected, 1e-12)


@pytest.mark.parametrize("mode", ["merge", "side"])
def test_of_two_that_replace_the_same_numbers_the_later_counts(flux: Flux, save: Any, mode: str) -> None:
    """As in ComfyUI; their difference from the base does not add up. Merged, one that is switched off does not count;
    on a norm there is only that way."""
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    linear = "lora_unet_double_blocks_0_img_attn_proj.set_weight"
    first, second = ({norm: 1 + r(H), linear: r(H, H)} for _ in range(2))
    before, ids, out = state(flux), {name: id(one) for name, one in flux.named_parameters()}, run(flux)
    stack = [Entry(read_lora(save(one, name=f"{i}.safetensors")), 0.5) for i, one in enumerate((first, second))]
    attachment = attach(flux, stack, mode=mode)
    attention, x = flux.double_blocks[0].img_attn, r(3, H)
    near(attention.norm.query_norm.scale, second[norm], 1e-12)
    near(attention.proj(x), x @ second[linear].T + attention.proj.bias, 1e-12)
    assert {(where, why) for where, why in attachment.applied[0].skipped} == {
        (module, "1.safetensors, later in the stack, replaces it too")
        for module in ("double_blocks.0.img_attn.norm.query_norm", "double_blocks.0.img_attn.proj")}
    assert not attachment.applied[1].skipped
    attachment.set_strengths([0.5, 0.0])
    near(attention.norm.query_norm.scale, first[norm], 1e-12)
    if mode == "merge":
        near(attention.proj(x), x @ first[linear].T + attention.proj.bias, 1e-12)
    attachment.detach()
    assert_untouched(flux, before, ids, out)


def test_control_lora_widens_the_model(flux: Flux, save: Any) -> None:
    """BFL's form: A, B and a bias on B, norms as absolute numbers, `img_in` of twice the channels."""
    tensors = {"img_in.lora_A.weight": r(4, 128), "img_in.lora_B.weight": r(H, 4), "img_in.lora_B.bias": r(H),
               "double_blocks.0.img_attn.norm.query_norm.scale": 1 + r(H)}
    path = save({**tensors, **{f"single_blocks.{i}.linear2.lora_{x}.weight": r(*s) for i in range(2)
                               for x, s in (("A", (4, 5 * H)), ("B", (H, 4)))}})
    before, ids, out = state(flux), {name: id(one) for name, one in flux.named_parameters()}, run(flux)
    spec, scale = flux.spec, flux.double_blocks[0].img_attn.norm.query_norm.scale.clone()
    attachment = attach(flux, [Entry(read_lora(path), 0.5)])
    assert flux.spec.in_channels == 128 and "128 channels" in attachment.applied[0].notes[0]
    x = inputs(channels=128)[0]
    change = x @ tensors["img_in.lora_A.weight"].T @ tensors["img_in.lora_B.weight"].T + tensors["img_in.lora_B.bias"]
    expected = x[..., :64] @ flux.img_in.weight.T + flux.img_in.bias + 0.5 * change
    near(flux.img_in(x), expected, 1e-12)
    norm = flux.double_blocks[0].img_attn.norm.query_norm.scale
    near(norm, tensors["double_blocks.0.img_attn.norm.query_norm.scale"], 1e-12)  # whole at any strength
    attachment.set_strengths([0.0])
    near(flux.double_blocks[0].img_attn.norm.query_norm.scale, scale, 1e-12)
    attachment.set_strengths([0.5])
    run(flux, channels=128)
    with pytest.raises(BadInput, match="connect its control picture"):
        run(flux)
    attachment.detach()
    assert flux.spec is spec
    assert_untouched(flux, before, ids, out)


def test_narrow_img_in_on_a_wider_model(save: Any) -> None:
    """A LoRA for 64 channels on Fill's 384: the others stay as they are."""
    path = save(lora("lora_unet_img_in", H, 64))
    adapter = read_lora(path).adapters[0]
    layer = PLAIN.Linear(384, H, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(5, 384, dtype=torch.float64)
    expected = layer(x) + x[:, :64] @ adapter.factors["down"].T @ adapter.factors["up"].T
    for mode in ("side", "merge"):
        model = nest("img_in", layer)
        attachment = attach(model, [Entry(read_lora(path))], mode=mode)
        near(layer(x), expected, 1e-12)
        attachment.detach()


def test_text_encoders(clip: nn.Module, t5: nn.Module, save: Any) -> None:
    tensors = (lora("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 64, 64)
               | lora("text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo", 64, 128)
               | {"text_encoders.clip_l.transformer.text_model.final_layer_norm.diff": r(64)})
    found = read_lora(save(tensors))
    for model, role in ((clip, "clip_l"), (t5, "t5")):
        outs: list[Tensor] = []
        ids = torch.arange(1, 8)[None]

        def call(model: nn.Module = model, ids: Tensor = ids) -> Tensor:
            out: Any = model(ids)
            return out[0] if isinstance(out, tuple) else out
        base = call()
        for mode in ("side", "merge"):
            attachment: Attachment = attach(model, [Entry(found)], role=role, mode=mode)
            outs.append(call())
            attachment.detach()
        near(outs[0], outs[1], 1e-12)
        assert not torch.equal(outs[0], base) and torch.equal(call(), base)


def test_a_packed_embedding_becomes_a_plain_copy(t5: nn.Module, save: Any) -> None:
    kind = FORMATS["Q8_0"]
    layer = PackedEmbedding(252, 64, format=kind, dtype=torch.float64)
    data = torch.randint(0, 256, (252, 2 * kind.nbytes), dtype=torch.uint8)
    data.view(252, 2, kind.nbytes)[..., :2] = torch.full((1,), 1e-3).half().view(torch.uint8)
    layer.weight.data = data
    t5.shared = layer
    ids = torch.tensor([[3, 99]])
    before, change = layer(ids), r(252, 64)
    found = read_lora(save({"text_encoders.t5xxl.transformer.shared.diff": change}))
    attachment = attach(t5, [Entry(found, 0.5)], role="t5")
    assert attachment.applied[0].layers == {COPY: 1}
    near(t5.shared(ids), before + 0.5 * change[ids], 1e-6)
    attachment.detach()
    assert t5.shared is layer and torch.equal(layer.weight, data)


def test_a_mapped_file_stays_as_it_is(flux: Flux, loras: dict[str, Lora], tmp_path: Path) -> None:
    """Merging into weights that are views of a file writes nothing into its pages."""
    from flux_kit.engine.models.flux import Flux as Model
    weight = flux.double_blocks[0].img_attn.qkv.weight
    pointer = weight.data_ptr()
    attachment = attach(flux, stack(loras, 1, 1, 1), mode="merge")
    assert flux.double_blocks[0].img_attn.qkv.weight.data_ptr() != pointer
    attachment.detach()
    assert flux.double_blocks[0].img_attn.qkv.weight.data_ptr() == pointer and isinstance(flux, Model)


def test_child_modules_keep_their_names(flux: Flux, loras: dict[str, Lora]) -> None:
    attach(flux, stack(loras, 1, 1, 1), mode="side")
    assert hasattr(flux.double_blocks[0].img_attn.qkv, NAME)
    assert not any(NAME in name for name in flux.state_dict())
    flux.to(torch.float32)  # moves and casts what it carries
    assert run(flux, torch.float32).isfinite().all()


def test_norm_share(flux: Flux, loras: dict[str, Lora]) -> None:
    """Against the lengths of what merging changes."""
    before = {name: weight.clone() for name, weight in flux.named_parameters()}
    for name in ("kohya", "others"):
        share = norm_share(flux, loras[name])
        attachment = attach(flux, [Entry(loras[name])], mode="merge")
        changed = {path: weight - before[path] for path, weight in flux.named_parameters()
                   if not path.endswith("bias") and not torch.equal(weight, before[path])}
        attachment.detach()
        lengths = [float(sum(part.square().sum() for part in parts)) ** 0.5
                   for parts in (changed.values(), [before[path] for path in changed])]
        assert share.total == pytest.approx(lengths[0] / lengths[1], rel=1e-5)
        layer = "double_blocks.0.img_mlp.0" if name == "others" else "single_blocks.0.linear1"
        assert share.by_layer[layer] == pytest.approx(
            float(changed[f"{layer}.weight"].norm() / before[f"{layer}.weight"].norm()), rel=1e-5)


@pytest.mark.parametrize("text, expected", [
    ("", (1, 1, 1, 1, 1, 1)),
    ("double 3-5=0.5, single=0", (1, 0.5, 1, 0, 0, 1)),
    ("all = 0, double txt : 2", (0, 0, 2, 0, 0, 0)),
    ("base=0, mod=.25", (1, 1, 1, 1, 0.25, 0)),
    ("double 0 2-4 img attn = -1", (-1, 1, 1, 1, 1, 1)),
    ("mlp=0.5; single 7=2", (1, 0.5, 1, 2, 1, 1)),
])
def test_block_weights(text: str, expected: tuple[float, ...]) -> None:
    names = ("double_blocks.0.img_attn.qkv", "double_blocks.4.img_mlp.2", "double_blocks.18.txt_attn.proj",
             "single_blocks.7.linear1", "single_blocks.8.modulation.lin", "img_in")
    factor = block_weights(text)
    assert tuple(factor(name) for name in names) == expected


@pytest.mark.parametrize("text, says", [
    ("double 3-5", "is no term"), ("double 19 = 1", "there are 0 to 18"), ("single 5-3=1", "there are 0 to 37"),
    ("triple=1", "'triple'"), ("= 1", "names no blocks"), ("3=1", "'3'"),
])
def test_wrong_block_weights_are_named(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        block_weights(text)


def test_a_strength_does_not_recompile(flux: Flux, loras: dict[str, Lora]) -> None:
    """The graph is whole, and strengths are inputs to it."""
    flux = flux.float()
    attachment = attach(flux, stack({"kohya": loras["kohya"]}, 1.0), mode="side")
    block = flux.double_blocks[0]
    graphs = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward
    compiled = torch.compile(block.img_attn.qkv, backend=count, fullgraph=True)
    x = torch.randn(1, 5, H)
    with torch.no_grad():
        first, plain = compiled(x), block.img_attn.qkv(x)
        attachment.set_strengths([0.25])
        second = compiled(x)
        near(second, block.img_attn.qkv(x), 1e-6)
    near(first, plain, 1e-6)
    assert len(graphs) == 1 and not torch.equal(first, second)


@pytest.mark.parametrize("mode", ["side", "merge"])
@pytest.mark.parametrize("loaded", [True, False])
def test_inference_mode(save: Any, mode: str, loaded: bool) -> None:
    """Hosts run nodes in inference mode: what is loaded, attached, run or detached there works outside, and the other
    way round."""
    torch.manual_seed(0)
    tensors = lora("lora_unet_img_in", H, 64) | lora("transformer.proj_out", 64, H) | {
        "transformer.proj_out.lora_magnitude_vector": torch.rand(64, dtype=torch.float64)}
    with torch.inference_mode(loaded):
        layer = PLAIN.Linear(64, H, dtype=torch.float64).requires_grad_(False)
        model = nest("img_in", layer)
        model.add_module("final_layer", nest("linear", PLAIN.Linear(H, 64, dtype=torch.float64).requires_grad_(False)))
        found = read_lora(save(tensors))
    x = torch.randn(3, 64, dtype=torch.float64)
    outs = []
    for inside in (True, False):
        with torch.inference_mode(inside):
            base = layer(x).clone()
            attachment = attach(model, [Entry(found)], mode=mode)
        with torch.inference_mode(not inside):
            attachment.set_strengths([0.5])
            outs.append(layer(x).clone())
        with torch.inference_mode(inside):
            attachment.detach()
            assert torch.equal(layer(x), base) and not torch.equal(outs[-1], base)
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("mode", ["auto", "side", "merge"])
def test_what_is_planned_is_what_is_done(flux: Flux, save: Callable[..., Path], mode: str) -> None:
    stack = [Entry(read_lora(save(kohya(), name="a.safetensors")), 0.5), Entry(read_lora(save(peft())), masked=True)]
    before = {name: value.clone() for name, value in flux.state_dict().items()}
    told = planned(flux, stack, mode=mode)
    assert all(torch.equal(value, before[name]) for name, value in flux.state_dict().items())
    done = attach(flux, stack, mode=mode)
    assert [one.layers for one in told] == [one.layers for one in done.applied]
    done.detach()


def test_weights_that_are_elsewhere_stay_as_they_are(flux: Flux, save: Callable[..., Path]) -> None:
    """What streams would be overwritten; so it is never merged, whatever the mode."""
    stack = [Entry(read_lora(save(kohya())))]
    for mode in ("auto", "merge"):
        told, = planned(flux, stack, mode=mode, device="meta")
        assert told.layers[SIDE] == 7 and told.layers[MERGED] == 1  # the norm, which is always resident
