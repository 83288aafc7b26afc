"""NF4 and FP4 of bitsandbytes against formulas in numpy, and against bitsandbytes itself where it is installed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from flux_kit.engine.convert import quantize
from flux_kit.engine.errors import BadModelFile, FluxKitError, NotFinite
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.quant import FORMATS, Embedding, Linear
from flux_kit.engine.specs import FluxSpec, T5Spec
from flux_kit.engine.weights import detect, load, open_checkpoint, to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

FLUX = FluxSpec(hidden_size=256, num_heads=2, depth=1, depth_single_blocks=1, context_in_dim=256, vec_in_dim=256)
T5 = T5Spec(vocab_size=300, d_model=256, d_kv=64, num_heads=4, d_ff=512, num_layers=2)
State = dict[str, Tensor]


def nf4_values() -> np.ndarray:
    """Quantiles of the normal distribution, eight above zero and seven below it (arXiv 2305.14314, appendix E)."""
    edge = 0.9677083

    def quantiles(count: int) -> list[float]:
        return [NormalDist().inv_cdf(p) for p in np.linspace(edge, 0.5, count)[:-1]]

    values = np.array([*quantiles(9), 0.0, *(-value for value in quantiles(8))])
    return np.sort(values / values.max()).astype(np.float32)


def fp4_values() -> np.ndarray:
    """Sign, two bits of exponent, one of mantissa, by code; as multiples of a twelfth."""
    ours = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return np.concatenate([ours, -ours]).astype(np.float32)


VALUES = {"nf4": nf4_values(), "fp4": fp4_values()}
STEPS = np.geomspace(1e-3, 1, 128)
NESTED_MAP = np.concatenate([-STEPS[:0:-1], [0.0], STEPS]).astype(np.float32)


def quantise(weight: Tensor, kind: str, block: int = 64, nested: int | None = None) -> tuple[State, Tensor]:
    """The tensors that belong to `weight`, by the ending of their names, and the numbers they stand for."""
    flat = weight.detach().float().numpy().reshape(-1)
    count = -(-flat.size // block)
    blocks = np.zeros((count, block), np.float32)
    blocks.reshape(-1)[:flat.size] = flat
    absmax = np.abs(blocks).max(1)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    sides: dict[str, np.ndarray] = {"quant_map": VALUES[kind]}
    if nested is None:
        sides["absmax"] = absmax
    else:
        offset = np.float32(absmax.mean())
        groups = np.zeros((-(-count // nested), nested), np.float32)
        groups.reshape(-1)[:count] = absmax - offset
        scales = np.abs(groups).max(1)
        codes = np.abs((groups / np.maximum(scales, 1e-12)[:, None])[..., None] - NESTED_MAP).argmin(-1)
        absmax = (NESTED_MAP[codes] * scales[:, None]).reshape(-1)[:count] + offset
        sides |= {"absmax": codes.reshape(-1)[:count].astype(np.uint8), "nested_absmax": scales,
                  "nested_quant_map": NESTED_MAP}
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": float(offset)}
    codes = np.abs((blocks / np.maximum(absmax, 1e-12)[:, None])[..., None] - VALUES[kind]).argmin(-1)
    numbers = (VALUES[kind][codes] * absmax[:, None]).reshape(-1)[:flat.size].reshape(weight.shape)
    codes = codes.astype(np.uint8).reshape(-1)[:flat.size + flat.size % 2]
    sides |= {"": (codes[0::2] << 4 | codes[1::2])[:, None],
              f"quant_state.bitsandbytes__{kind}": np.frombuffer(json.dumps(state).encode(), np.uint8)}
    return {ending: torch.from_numpy(array.copy()) for ending, array in sides.items()}, torch.from_numpy(numbers)


def pack(state: State, **how: Any) -> tuple[State, State]:
    """All matrices quantised, under their names: what is written, and the numbers it stands for."""
    written, numbers = {}, dict(state)
    for name, tensor in state.items():
        if tensor.ndim != 2:
            written[name] = tensor
            continue
        sides, numbers[name] = quantise(tensor, **how)
        written |= {f"{name}.{ending}" if ending else name: side for ending, side in sides.items()}
    return written, numbers


def state_of(kind: Callable[..., Any], spec: Any) -> State:
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(spec).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) * (0.06 if len(shape) > 1 else 0.2)
            + float(name.endswith(("scale", "norm.weight"))) for name, shape in shapes.items()}


def dense(model: torch.nn.Module) -> State:
    """Every weight as numbers."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear | Embedding)}
    return {name: layers[name.removesuffix(".weight")].unpacked(slice(None), torch.float32)
            if name.removesuffix(".weight") in layers else tensor for name, tensor in model.state_dict().items()}


def packed_layers(model: torch.nn.Module) -> set[str]:
    return {layer.format.name for layer in model.modules() if isinstance(layer, Linear | Embedding)}


def close(ours: Mapping[str, Tensor], numbers: State) -> None:
    """Equal but for the digits that the published table of NF4 has more, or fewer, than the quantiles computed here."""
    assert ours.keys() == numbers.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, numbers[name].float(), rtol=3e-6, atol=1e-9)


HOW = [{"kind": kind, "block": block, "nested": nested} for kind in VALUES
       for block, nested in ((64, None), (64, 256), (32, 100), (128, 4096), (256, None))]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
def test_a_transformer_stays_packed(tmp_path: Path, how: dict[str, Any]) -> None:
    written, numbers = pack(state_of(Flux, FLUX), **how)
    save_file(written, tmp_path / "flux.safetensors")
    model = load(tmp_path / "flux.safetensors", "transformer")
    name = how["kind"].upper() + ("" if how["block"] == 64 else f"_{how['block']}")
    # img_in is 64 wide: where a block is larger, it lies across rows, and the weight is unpacked
    assert packed_layers(model) == {name} and isinstance(model.img_in, Linear) == (how["block"] <= 64)
    close(dense(model), numbers)
    x = torch.randn(3, 256)
    layer = model.double_blocks[0].img_mlp[0]
    expected = torch.nn.functional.linear(x, numbers["double_blocks.0.img_mlp.0.weight"], layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    size = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, Linear))
    weights = sum(layer.in_features * layer.out_features for layer in model.modules() if isinstance(layer, Linear))
    assert size == weights * (4 + how["block"] / 2) / how["block"]


def test_packed_off_and_bf16(tmp_path: Path) -> None:
    written, numbers = pack(state_of(Flux, FLUX), kind="nf4", nested=256)
    save_file(written, tmp_path / "flux.safetensors")
    model = load(tmp_path / "flux.safetensors", "transformer", dtype=torch.bfloat16, packed=None)
    assert packed_layers(model) == set()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), numbers[name].float(), rtol=2**-8, atol=1e-6)


def test_diffusers_names_are_fused_packed(tmp_path: Path) -> None:
    state = to_diffusers(state_of(Flux, FLUX), FLUX)
    written, numbers = pack(state, kind="nf4", nested=256)
    save_file(written, tmp_path / "flux.safetensors")
    model = load(tmp_path / "flux.safetensors", "transformer")
    assert packed_layers(model) == {"NF4"}
    close(to_diffusers(dense(model), FLUX), numbers)


@pytest.mark.parametrize("form", ["all in one", "shards"])
def test_all_in_one_with_t5_and_shards(tmp_path: Path, form: str) -> None:
    transformer, numbers = pack(state_of(Flux, FLUX), kind="nf4")
    encoder, words = pack(state_of(T5Encoder, T5), kind="fp4", nested=256)
    both = ({f"model.diffusion_model.{name}": tensor for name, tensor in transformer.items()}
            | {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in encoder.items()})
    path = tmp_path / "all.safetensors"
    if form == "all in one":
        save_file(both, path)
    else:  # side tensors in another file than their weight
        path = tmp_path / "all.safetensors.index.json"
        files = {name: f"{int('absmax' in name)}.safetensors" for name in both}
        for file in set(files.values()):
            save_file({name: both[name] for name in both if files[name] == file}, tmp_path / file)
        path.write_text(json.dumps({"weight_map": files}))
    with open_checkpoint(path) as checkpoint:
        found = detect(checkpoint)
        assert set(found.parts) == {"transformer", "t5"} and not found.problems and not found.unknown
        close(dense(load(checkpoint, "transformer")), numbers)
        model = load(checkpoint, "t5")
    assert isinstance(model.shared, Embedding)
    torch.testing.assert_close(model.shared(torch.tensor([[7, 299]])), words["shared.weight"][[7, 299]][None],
                               rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (7,), (130, 3), (2, 64), (1, 1)])
@pytest.mark.parametrize("nested", [None, 2])
def test_any_shape(tmp_path: Path, shape: tuple[int, ...], nested: int | None) -> None:
    """Also rows that are no whole number of blocks, and an odd number of weights."""
    sides, numbers = quantise(torch.randn(shape), "nf4", nested=nested)
    path = tmp_path / "one.safetensors"
    save_file({f"w.{ending}" if ending else "w": side for ending, side in sides.items()}, path)
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["w"] and checkpoint["w"].shape == shape
        info, raw = checkpoint["w"], checkpoint["w"].raw()
        assert info.nbytes == len(raw)
        ours = info.read() if info.format == "F32" else FORMATS[info.format].dequantize(raw.view(shape[0], -1))
    torch.testing.assert_close(ours, numbers, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128, 512])
def test_same_bits_as_bitsandbytes(tmp_path: Path, kind: str, nested: bool, block: int) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(48, 1024, generator=torch.Generator().manual_seed(1)) * 0.05
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    path = tmp_path / "one.safetensors"
    save_file({"w": codes, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}, path)
    with open_checkpoint(path) as checkpoint:
        info = checkpoint["w"]
        ours = FORMATS[info.format].dequantize(info.raw().view(48, -1))
    assert torch.equal(ours, functional.dequantize_4bit(codes, state))


def _state(changes: Mapping[str, Any]) -> Callable[[State], None]:
    def change(sides: State) -> None:
        key = "w.quant_state.bitsandbytes__nf4"
        state = {**json.loads(bytes(sides[key].tolist())), **changes}
        sides[key] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return change


def _text(text: bytes) -> Callable[[State], None]:
    return lambda sides: sides.update({"w.quant_state.bitsandbytes__nf4":
                                       torch.frombuffer(bytearray(text), dtype=torch.uint8)})


DAMAGE: dict[str, tuple[Callable[[State], Any], str]] = {
    "no codes": (lambda sides: sides.pop("w"), "'w'|w"),
    **{f"no {side}": (lambda sides, side=side: sides.pop(f"w.{side}"), side)
       for side in ("absmax", "nested_absmax", "nested_quant_map")},
    "codes cut": (lambda sides: sides.update(w=sides["w"][:-1]), "512 of U8"),
    "absmax cut": (lambda sides: sides.update({"w.absmax": sides["w.absmax"][1:]}), "absmax"),
    "absmax fp32": (lambda sides: sides.update({"w.absmax": sides["w.absmax"].float()}), "absmax"),
    "map of 15": (lambda sides: sides.update({"w.quant_map": sides["w.quant_map"][1:]}), "quant_map"),
    "map of FP4": (lambda sides: sides.update({"w.quant_map": torch.from_numpy(VALUES["fp4"])}), "16 values of NF4"),
    "map NaN": (lambda sides: sides["w.quant_map"].fill_(math.nan), "16 values of NF4"),
    "nested map": (lambda sides: sides.update({"w.nested_quant_map": torch.zeros(255)}), "nested_quant_map"),
    "no JSON": (_text(b"{"), "JSON"), "no UTF-8": (_text(b"\xff\xfe"), "JSON"), "a list": (_text(b"[]"), "JSON object"),
    "deep": (_text(b"[" * 60_000), "JSON"), "empty": (_text(b"{}"), "shape"),
    "long": (_text(b" " * 70_000 + b"{}"), "at most"),
    "shape": (_state({"shape": [16, 65]}), "'w'|w"), "shape 0": (_state({"shape": [0, 64]}), "shape"),
    "shape text": (_state({"shape": "16x64"}), "shape"), "shape true": (_state({"shape": [True, 64]}), "shape"),
    "shape huge": (_state({"shape": [2**40, 2**40]}), "fewer"), "shape of none": (_state({"shape": []}), "shape"),
    "block 0": (_state({"blocksize": 0}), "blocksize"), "block 48": (_state({"blocksize": 48}), "blocksize"),
    "block list": (_state({"blocksize": [64]}), "blocksize"),
    "kind": (_state({"quant_type": "fp4"}), "quant_type"),
    "nested block": (_state({"nested_blocksize": 0}), "nested_blocksize"),
    "nested block null": (_state({"nested_blocksize": None}), "nested_blocksize"),
    "offset": (_state({"nested_offset": math.nan}), "nested_offset"),
    "no offset": (_state({"nested_offset": None}), "nested_offset"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged(tmp_path: Path, name: str) -> None:
    change, said = DAMAGE[name]
    sides, _ = quantise(torch.randn(16, 64), "nf4", nested=4)
    tensors = {f"w.{ending}" if ending else "w": side for ending, side in sides.items()}
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(BadModelFile, match=said) as error:
        open_checkpoint(tmp_path / "bad.safetensors")
    assert str(error.value).startswith("bad.safetensors: damaged weights in NF4 or FP4")


@pytest.mark.parametrize("side", ["absmax", "nested_absmax", "nested_quant_map"])
def test_scales_that_are_not_finite_are_refused(tmp_path: Path, side: str) -> None:
    written, _ = pack(state_of(Flux, FLUX), kind="nf4", nested=256 if "nested" in side else None)
    written[f"txt_in.weight.{side}"].fill_(math.inf)
    save_file(written, tmp_path / "flux.safetensors")
    with pytest.raises(NotFinite, match=r"txt_in\.weight.*NF4|NF4.*txt_in\.weight"):
        load(tmp_path / "flux.safetensors", "transformer")


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_damaged_byte_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sides, _ = quantise(torch.ones(4, 64), "fp4", nested=2)
    raw = bytearray(save({f"w.{ending}" if ending else "w": side for ending, side in sides.items()}))
    start = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(start, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("mutated") / "w.safetensors"
    path.write_bytes(raw)
    try:
        with open_checkpoint(path) as checkpoint:
            for info in checkpoint.values():
                assert len(info.raw()) == info.nbytes
                info.read()
    except FluxKitError:
        pass


def test_quantised_anew(tmp_path: Path) -> None:
    """A file in NF4 as the source of another: Q8_0 of the numbers it stands for."""
    written, numbers = pack(state_of(Flux, FLUX), kind="nf4", nested=256)
    save_file(written, tmp_path / "nf4.safetensors")
    quantize(tmp_path / "nf4.safetensors", tmp_path / "q8.gguf", "Q8_0")
    model = load(tmp_path / "q8.gguf", "transformer")
    assert "Q8_0" in packed_layers(model)
    for name, tensor in dense(model).items():
        assert float((tensor.float() - numbers[name]).norm() / numbers[name].norm()) < 0.01
