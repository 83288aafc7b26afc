"""Quantised files of other kinds, crafted with the names and headers that their writers use: named, with what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit.engine.errors import BadModelFile
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.specs import FluxSpec, T5Spec
from flux_kit.engine.weights import detect, load, open_checkpoint, to_diffusers
from safetensors.torch import save_file
from torch import Tensor

FLUX = FluxSpec(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=256, vec_in_dim=256)
T5 = T5Spec(vocab_size=300, d_model=256, d_kv=64, num_heads=4, d_ff=512, num_layers=2)
State = dict[str, Tensor]
Sides = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
U8, I8, I32, BF16, F32 = torch.uint8, torch.int8, torch.int32, torch.bfloat16, torch.float32


def flux() -> State:
    with torch.device("meta"):
        shapes = Flux(FLUX).state_dict()
    return to_diffusers({name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}, FLUX)


def t5() -> State:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in T5Encoder(T5).state_dict().items()}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def replaced(state: State, sides: Sides, fits: Callable[[str], bool] = lambda name: ".attn." in name or "wi_0" in name,
             ) -> State:
    """The layers whose name `fits`, with these tensors in place of their weights."""
    out: State = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim != 2 or not fits(name):
            out[name] = tensor.to(BF16)
            continue
        out |= {f"{layer}.{ending}": torch.zeros(shape, dtype=dtype) for ending, (dtype, shape) in sides.items()}
    return out


SVDQUANT: Sides = {"qweight": (I8, (256, 128)), "wscales": (BF16, (4, 256)), "smooth": (BF16, (256,)),
                   "smooth_orig": (BF16, (256,)), "lora_down": (BF16, (256, 32)), "lora_up": (BF16, (256, 32))}
NUNCHAKU = {"model_class": "NunchakuFluxTransformer2dModel", "quantization_config": json.dumps(
    {"method": "svdquant", "weight": {"dtype": "int4", "group_size": 64}, "rank": 32})}
FILES: dict[str, tuple[str, Sides, dict[str, str], str]] = {
    "SVDQuant": ("transformer", SVDQUANT, NUNCHAKU, "SVDQuant"),
    "SVDQuant, no header": ("transformer", SVDQUANT, {}, "nunchaku"),
    "AWQ of nunchaku": ("t5", {"qweight": (I32, (64, 128)), "wscales": (BF16, (4, 512)), "wzeros": (BF16, (4, 512))},
                        {}, "AWQ"),
    "torchao": ("transformer", {"_weight_qdata": (I8, (256, 256)), "_weight_scale": (F32, (256,))},
                {"tensor_names": "[]", "format": "pt"}, "torchao"),
    "torchao, by its header": ("transformer", {"weight": (I8, (256, 256))}, {"tensor_names": "[]"}, "torchao"),
    "quanto": ("transformer", {"weight._data": (I8, (256, 256)), "weight._scale": (BF16, (256, 1)),
                               "input_scale": (BF16, ()), "output_scale": (BF16, ())}, {}, "quanto"),
    "SDNQ": ("transformer", {"weight": (U8, (256, 256)), "scale": (BF16, (256, 1)), "zero_point": (BF16, (256, 1))},
             {}, "SDNQ"),
    "8-bit of bitsandbytes": ("transformer", {"weight": (I8, (256, 256)), "SCB": (F32, (256,))}, {}, "bitsandbytes"),
    "AutoRound": ("transformer", {"qweight": (I32, (32, 256)), "qzeros": (I32, (2, 32)), "scales": (BF16, (2, 256))},
                  {}, "AutoRound"),
    "compressed-tensors": ("t5", {"weight_packed": (I32, (512, 32)), "weight_scale": (BF16, (512, 2)),
                                  "weight_shape": (I32, (2,))}, {}, "compressed-tensors"),
    "ModelOpt": ("transformer", {"weight": (U8, (256, 128)), "weight_scale": (torch.float8_e4m3fn, (256, 16)),
                                 "weight_scale_2": (F32, ()), "input_scale": (F32, ())}, {}, "ModelOpt"),
}


def refusal(path: Path, role: str) -> str:
    with open_checkpoint(path) as checkpoint:  # the container is in order
        found = detect(checkpoint)
        assert found.role == role
        assert found.problems
    with pytest.raises(BadModelFile) as caught:
        load(path, role)
    return str(caught.value)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    role, sides, metadata, says = FILES[kind]
    path = tmp_path / "model.safetensors"
    save_file(replaced(flux() if role == "transformer" else t5(), sides), path, metadata or None)
    message = refusal(path, role)
    assert says in message
    assert "model.safetensors" in message
    assert "Use the bf16, fp8, NF4 or GGUF file" in message
    assert "shape" not in message, "its packed shapes are not what is wrong"


METHODS: dict[str, dict[str, Any]] = {
    "torchao": {"quant_method": "torchao", "quant_type": "int8wo"}, "quanto": {"quant_method": "quanto"},
    "SDNQ": {"quant_method": "sdnq", "weights_dtype": "int8"}, "AutoRound": {"quant_method": "auto-round", "bits": 4},
    "AWQ": {"quant_method": "awq"}, "ModelOpt": {"quant_method": "modelopt", "quant_algo": "INT8"},
    "nunchaku": {"quant_method": "nunchaku_lite"},
}


@pytest.mark.parametrize("says", METHODS)
def test_a_folder_is_named_by_its_config(tmp_path: Path, says: str) -> None:
    """Where names say nothing: weights of whole numbers under their usual names."""
    stored = replaced(flux(), {"weight": (I8, (256, 256))})
    save_file(stored, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": METHODS[says]}))
    message = refusal(tmp_path, "transformer")
    assert says in message
    assert "GGUF" in message


@pytest.mark.parametrize("text", ["{}", "[]", "", "{", '{"quantization_config": 3}', "[" * 100_000,
                                  '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true}}',
                                  '{"quantization_config": {"quant_method": ["torchao"]}}',
                                  '{"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}'])
def test_other_folders_load(tmp_path: Path, text: str) -> None:
    save_file(flux(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(text)
    assert isinstance(load(tmp_path, "transformer"), Flux)
