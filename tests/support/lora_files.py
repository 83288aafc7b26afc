"""Small random LoRA files for tiny-flux: one of each way of writing them, and bad ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

D, TEXT = 128, 64
GENERATOR = torch.Generator()
Tensors = dict[str, Tensor]


def random(*shape: int, size: float = 0.1) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR) * size


def pairs(sizes: Mapping[str, tuple[int, int]], down: str = "lora_down", up: str = "lora_up", prefix: str = "",
          alpha: float | None = None, rank: int = 4) -> Tensors:
    found: Tensors = {}
    for name, (rows, columns) in sizes.items():
        found[f"{prefix}{name}.{down}.weight"] = random(rank, columns)
        found[f"{prefix}{name}.{up}.weight"] = random(rows, rank)
        if alpha is not None:
            found[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return found


KOHYA = {"double_blocks_0_img_attn_qkv": (3 * D, D), "double_blocks_1_txt_mlp_0": (4 * D, D),
         "single_blocks_0_linear1": (7 * D, D), "single_blocks_2_linear2": (D, 5 * D),
         "double_blocks_0_img_mod_lin": (6 * D, D)}
PEFT = {"transformer_blocks.0.attn.to_q": (D, D), "transformer_blocks.0.attn.add_v_proj": (D, D),
        "single_transformer_blocks.1.attn.to_k": (D, D), "single_transformer_blocks.1.proj_mlp": (4 * D, D),
        "single_transformer_blocks.3.proj_out": (D, 5 * D), "transformer_blocks.1.ff.net.0.proj": (4 * D, D)}


def good() -> dict[str, Tensors]:
    """Files by name; those that core reads too are "kohya", "peft" and "lokr"."""
    GENERATOR.manual_seed(5)
    name = "lora_unet_double_blocks_0_img_mlp_0"
    lokr = {f"{name}.lokr_w1": random(8, 8, size=0.3), f"{name}.lokr_w2": random(64, 16, size=0.3)}
    half = "lora_unet_single_blocks_1_linear1"
    swapped = pairs({"norm_out.linear": (2 * D, D), "x_embedder": (D, 64)}, "lora_A", "lora_B", "transformer.")
    bias = pairs({"double_blocks.0.img_attn.proj": (D, D)}, "lora_A", "lora_B")
    bias |= {"double_blocks.0.img_attn.proj.lora_B.bias": random(D),
             "double_blocks.0.img_attn.norm.query_norm.scale": 1 + random(D)}
    control = {**bias, **pairs({"img_in": (D, 128)}, "lora_A", "lora_B"),
               "single_blocks.0.norm.key_norm.scale": 1 + random(D)}  # which core tells such files by
    text = pairs({"text_model_encoder_layers_0_self_attn_q_proj": (TEXT, TEXT)}, prefix="lora_te1_", alpha=4.0)
    text |= pairs({"encoder_block_0_layer_1_DenseReluDense_wi_0": (2 * TEXT, TEXT)}, prefix="lora_te3_", alpha=4.0)
    return {
        "kohya": pairs(KOHYA, prefix="lora_unet_", alpha=2.0),
        "peft": pairs(PEFT, "lora_A", "lora_B", "transformer."), "lokr": lokr,
        "xlabs": {f"double_blocks.0.processor.qkv_lora1.{end}.weight": value for end, value in (
            ("down", random(4, D)), ("up", random(3 * D, 4)))},
        "fal": pairs({"double_blocks.1.img_attn.proj": (D, D)}, "lora_A", "lora_B", "base_model.model."),
        "swapped": swapped, "bias": bias, "control": control,
        "dora": {**pairs({half: (7 * D, D)}), f"{half}.dora_scale": 1 + random(7 * D, 1).abs()},
        "oft": {"lora_unet_double_blocks_0_img_attn_proj.oft_blocks": random(16, 8, 8)},
        "text": text,
        "under": {**pairs({half: (7 * D, D), "lora_unet_double_blocks_0_img_attn_proj": (D, D)}, alpha=8.0)},
        "oft2": {"lora_transformer_transformer_blocks_0_attn_to_out_0.oft_R.weight": random(16, 28, size=0.2)},
        **{name: {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.set_weight": 1 + random(D, size=1.0)}
           for name in ("norm a", "norm b")}}


def bad() -> dict[str, Tensors]:
    """Files to refuse, by what is wrong with them."""
    GENERATOR.manual_seed(6)
    kohya = pairs(KOHYA, prefix="lora_unet_", alpha=2.0)
    halves = {key: value for key, value in kohya.items() if not (key.endswith("lora_up.weight") and "double" in key)}
    ranks = {**kohya, "lora_unet_single_blocks_0_linear1.lora_up.weight": random(7 * D, 6)}
    broken = {**kohya, "lora_unet_single_blocks_0_linear1.lora_up.weight": torch.full((7 * D, 4), float("nan"))}
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_{}_attn1_to_q"
    sdxl = pairs({stem.format(i): (640, 640) for i in range(2)}, alpha=4.0)
    sdxl |= pairs({"lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (768, 768)}, alpha=4.0)
    checkpoint = {"double_blocks.0.img_attn.qkv.weight": random(3 * D, D), "img_in.weight": random(D, 64),
                  "double_blocks.0.img_attn.norm.query_norm.scale": random(D), "txt_in.weight": random(D, 64),
                  "single_blocks.0.linear1.weight": random(7 * D, D), "final_layer.linear.weight": random(64, D)}
    return {
        "bad sdxl": sdxl,
        "bad sd3": pairs({"joint_blocks_0_x_block_attn_qkv": (4608, 1536)}, prefix="lora_unet_"),
        "bad flux2": pairs({"double_stream_modulation_img.lin": (64, 64), "single_blocks.0.linear1": (64, 64)},
                           "lora_A", "lora_B", "diffusion_model."),
        "bad halves": halves, "bad ranks": ranks, "bad nan": broken, "bad inf": {
            key: torch.full_like(value, float("inf")) if key.endswith("linear2.lora_down.weight") else value
            for key, value in kohya.items()}, "bad empty": {}, "bad checkpoint": checkpoint,
        "bad unknown": {**kohya, "lora_unet_double_blocks_0_new_layer.lora_up.weight": random(4, 4)}}


def write(folder: Path) -> Path:
    """All of them as `<name>.safetensors`, and one that is cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in {**good(), **bad()}.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    whole = (folder / "kohya.safetensors").read_bytes()
    (folder / "bad cut.safetensors").write_bytes(whole[:len(whole) // 2])
    return folder


def worst_error(report: str) -> float:
    """The largest error, in per cent of a change, that the report of a written file tells; 0 where it says exact."""
    found = [float(number) for number in re.findall(r"(\S+) %", report)]
    assert bool(found) != ("exact: nothing was rounded" in report), report
    return max(found, default=0.0)
