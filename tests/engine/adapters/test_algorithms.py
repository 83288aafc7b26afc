"""Each algorithm against LyCORIS's own forward, or, where it has none, against the formula written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flux_kit.engine.adapters import read_lora
from flux_kit.engine.adapters.adapter import Adapter
from flux_kit.engine.models.ops import PLAIN
from lycoris import modules
from torch import Tensor, nn

MODULE = "double_blocks.0.img_mlp.0"
STEM = "lora_unet_double_blocks_0_img_mlp_0"
OUT, IN = 512, 128
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def base(dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(7)
    return PLAIN.Linear(IN, OUT).to(dtype).requires_grad_(False)


def random(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Sets all of a LyCORIS module's numbers and gives them as a file would hold them."""
    torch.manual_seed(5)
    module.to(dtype)
    for name, parameter in module.named_parameters():
        if "org" not in name:
            kept = parameter.data if "dora" in name or "rescale" in name else 0
            parameter.data = kept + torch.randn_like(parameter) * (0.02 if "oft_blocks" in name else 0.3)
    saved = module.custom_state_dict() if hasattr(module, "custom_state_dict") and module.custom_state_dict() else (
        module.state_dict())
    return {f"{STEM}.{name}": value.detach().clone() for name, value in saved.items() if "org_module" not in name}


def only(path: Any) -> Adapter:
    (adapter,) = read_lora(path).adapters
    return adapter


def by_terms(adapter: Adapter, layer: nn.Linear, x: Tensor, strength: float) -> Tensor | None:
    """The change of the output by the adapter's own side path."""
    terms = adapter.terms(lambda tile: layer.weight[tile].clone(), IN, torch.float64, "cpu")
    if terms is None:
        return None
    out = torch.zeros(len(x), OUT, dtype=torch.float64)
    for term in terms:
        term.add(out, x, F.linear(x, layer.weight), lambda z: F.linear(z, layer.weight),
                 torch.tensor(strength, dtype=torch.float64))
    return out


LYCORIS = [
    ("locon", {"lora_dim": 4, "alpha": 2}), ("locon", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    ("locon", {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    ("locon", {"lora_dim": 4, "alpha": 2, "rs_lora": True}),
    ("loha", {"lora_dim": 4, "alpha": 2}), ("loha", {"lora_dim": 20, "alpha": 2}),
    ("loha", {"lora_dim": 4, "alpha": 2, "weight_decompose": True}),
    ("lokr", {"lora_dim": 4, "alpha": 2, "factor": 8}),
    ("lokr", {"lora_dim": 2, "alpha": 1, "factor": 8, "decompose_both": True}),
    ("lokr", {"lora_dim": 10000, "alpha": 1, "factor": 8}),
    ("lokr", {"lora_dim": 4, "alpha": 2, "factor": 8, "weight_decompose": True}),
    ("glora", {"lora_dim": 4, "alpha": 2}),
    ("diag-oft", {"lora_dim": 8, "constraint": 0}), ("diag-oft", {"lora_dim": 8, "constraint": 1e-4}),
    ("diag-oft", {"lora_dim": 8, "constraint": 0, "rescaled": True}),
    ("boft", {"lora_dim": 8, "constraint": 0}), ("boft", {"lora_dim": 8, "constraint": 1e-4}),
    ("boft", {"lora_dim": 8, "constraint": 0, "rescaled": True}),
    ("ia3", {}), ("ia3", {"train_on_input": True}),
]


def lycoris_module(kind: str, options: dict[str, Any], layer: nn.Linear, strength: float) -> Any:
    kinds = {"locon": modules.locon.LoConModule, "loha": modules.loha.LohaModule, "lokr": modules.lokr.LokrModule,
             "glora": modules.glora.GLoRAModule, "diag-oft": modules.diag_oft.DiagOFTModule,
             "boft": modules.boft.ButterflyOFTModule, "ia3": modules.ia3.IA3Module}
    return kinds[kind](STEM, layer, strength, **options)


def is_left_whole(options: dict[str, Any]) -> bool:
    """LyCORIS leaves part of these at full strength whatever the strength; here strength 0 is the base."""
    return bool(options.get("weight_decompose") or options.get("rescaled"))


CASES = [(kind, options, strength) for kind, options in LYCORIS
         for strength in ((1.0,) if is_left_whole(options) else (1.0, 0.5))]


@pytest.mark.parametrize("kind, options, strength", CASES, ids=lambda value: None if isinstance(value, dict) else value)
def test_lycoris(kind: str, options: dict[str, Any], strength: float, save: Any) -> None:
    exact = torch.float32 if "oft" in kind else torch.float64  # its rotations are fp32 only
    layer = base(exact)
    module = lycoris_module(kind, options, layer, strength)
    saved = random(module, exact)
    module.eval()
    module.apply_to()
    with torch.no_grad():
        given = X.to(exact)
        expected = (module.forward(given) - F.linear(given, layer.weight, layer.bias)).double()
    adapter = only(save(saved))
    layer = layer.double()
    weight = layer.weight
    change = F.linear(X, adapter.change(weight, strength))
    scale = float(expected.abs().max())
    assert scale > 1e-3
    # in fp32 it rounds the changed weight, whose products are of the order of 1
    assert float((change - expected).abs().max()) < (5e-6 if exact == torch.float32 else 2e-7 * scale)
    side = by_terms(adapter, layer, X, strength)
    if side is None:
        assert options.get("weight_decompose") or options["lora_dim"] ** 2 > 256
    else:
        assert float((side - change).abs().max()) < 1e-12 * scale


def test_dora_of_peft_and_onetrainer(save: Any) -> None:
    """1-D magnitudes belong to rows; `[1, in]` to columns, on square layers too."""
    torch.manual_seed(0)
    weight = torch.randn(128, 128, dtype=torch.float64)
    down, up = torch.randn(4, 128, dtype=torch.float64), torch.randn(128, 4, dtype=torch.float64)
    length = torch.rand(128, dtype=torch.float64) + 0.5
    stem = "transformer.transformer_blocks.0.attn.to_out.0"
    for name, value, axis in (("lora_magnitude_vector", length, 1), ("lora_magnitude_vector.weight", length, 1),
                              ("dora_scale", length[:, None], 1), ("dora_scale", length[None], 0)):
        adapter = only(save({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.{name}": value}))
        changed = (weight + up @ down).numpy()
        norm = np.sqrt((changed ** 2).sum(axis, keepdims=True))
        expected = changed * (length.numpy()[:, None] if axis == 1 else length.numpy()[None]) / norm
        np.testing.assert_allclose((weight + adapter.change(weight)).numpy(), expected, rtol=1e-10, atol=1e-14)


def skew(triangle: np.ndarray, side: int) -> np.ndarray:
    found = np.zeros((side, side))
    found[np.triu_indices(side, 1)] = triangle
    return found - found.T


@pytest.mark.parametrize("blocks", [16, 1])
def test_oft_v2_turns_inputs(blocks: int, save: Any) -> None:
    torch.manual_seed(0)
    packed = torch.randn(blocks, 28, dtype=torch.float64) * 0.05
    adapter = only(save({"lora_transformer_transformer_blocks_0_attn_to_q.oft_R.weight": packed}))
    weight = torch.randn(128, 128, dtype=torch.float64)
    turned = X.clone().numpy()
    for i in range(16):
        q = skew(packed[i % blocks].numpy(), 8)
        series = np.eye(8) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        turned[:, 8 * i:8 * i + 8] = turned[:, 8 * i:8 * i + 8] @ series
    expected = turned @ weight.numpy().T
    np.testing.assert_allclose((X @ (weight + adapter.change(weight)).T).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_oft_of_kohya_turns_each_part_by_itself(save: Any) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(4, 32, 32, dtype=torch.float64) * 0.02 for _ in range(3)]
    stem = "oft_unet_double_blocks_0_img_attn_qkv"
    alpha = 0.001
    lora = read_lora(save({f"{stem}.oft_blocks.{i}": part for i, part in enumerate(parts)}
                          | {f"{stem}.alpha": torch.tensor(alpha, dtype=torch.float64)}))
    weight = torch.randn(384, 128, dtype=torch.float64)
    found = weight.clone()
    for adapter in lora.adapters:
        rows = adapter.destination.rows((384, 128))
        found[rows] += adapter.change(weight[rows])
    expected = weight.numpy().copy()
    for i, part in enumerate(parts):
        q = part.numpy() - part.numpy().transpose(0, 2, 1)
        length = np.sqrt((q ** 2).sum())
        q = q * min(1, alpha * 128 / length)
        for k in range(4):
            rows = slice(128 * i + 32 * k, 128 * i + 32 * k + 32)
            turn = (np.eye(32) + q[k]) @ np.linalg.inv(np.eye(32) - q[k])
            expected[rows] = turn.T @ expected[rows]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_early_glora_has_its_pairs_the_other_way_round(save: Any) -> None:
    torch.manual_seed(0)
    a1, a2 = torch.randn(IN, 4).double(), torch.randn(4, IN).double()
    b1, b2 = torch.randn(OUT, 4).double(), torch.randn(4, IN).double()
    weight = base().weight
    new = only(save({f"{STEM}.{name}.weight": value for name, value in
                     (("a1", a1), ("a2", a2), ("b1", b1), ("b2", b2))})).change(weight)
    old = only(save({f"{STEM}.{name}.weight": value for name, value in
                     (("a1", a2), ("a2", a1), ("b1", b2), ("b2", b1))})).change(weight)
    np.testing.assert_allclose(new.numpy(), old.numpy(), rtol=1e-12)
    np.testing.assert_allclose(new.numpy(), (weight @ a1 @ a2 + b1 @ b2).numpy(), rtol=1e-10)


def test_set_diff_and_bias(save: Any) -> None:
    weight, bias = base().weight, base().bias
    lora = read_lora(save({f"{STEM}.set_weight": weight * 3, f"{STEM}.diff_b": bias, f"{STEM}.diff": weight}))
    diff, setter, biased = lora.adapters
    assert torch.equal(diff.change(weight), weight)
    for strength in (0.5, 1.0):  # whole at any strength, as BFL and ComfyUI do
        np.testing.assert_allclose(setter.change(weight, strength).numpy(), 2 * weight.numpy(), rtol=1e-12)
    assert not setter.change(weight, 0.0).any()
    np.testing.assert_allclose(biased.change(bias, 0.5).numpy(), bias.numpy() / 2, rtol=1e-12)


def test_fp8_factors_are_read_as_numbers(save: Any) -> None:
    down, up = torch.randn(4, IN).to(torch.float8_e4m3fn), torch.randn(OUT, 4).to(torch.float8_e4m3fn)
    adapter = only(save({f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up}))
    weight = base().weight.float()
    assert torch.equal(adapter.change(weight), up.float() @ down.float())


def test_swapped_final_layer(save: Any) -> None:
    """diffusers keeps scale above shift, BFL shift above scale."""
    torch.manual_seed(0)
    down, up = torch.randn(4, 128).double(), torch.randn(256, 4).double()
    stem = "transformer.norm_out.linear"
    magnitude = torch.rand(256).double() + 1
    for more in ({}, {f"{stem}.lora_magnitude_vector": magnitude}):
        adapter = only(save({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, **more}))
        weight = torch.randn(256, 128).double()
        theirs = torch.cat((weight[128:], weight[:128]))
        changed = theirs + up @ down
        if more:
            changed = changed / changed.norm(dim=1, keepdim=True) * magnitude[:, None]
        delta = changed - theirs
        np.testing.assert_allclose(adapter.change(weight).numpy(), torch.cat((delta[128:], delta[:128])).numpy(),
                                   rtol=1e-10, atol=1e-12)
