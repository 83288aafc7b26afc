"""Loading: every layout and spelling gives the same model; what does not fit is refused; nothing is copied in vain."""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit.engine.errors import BadModelFile, NotFinite
from flux_kit.engine.models.autoencoder import Autoencoder
from flux_kit.engine.models.clip import ClipText
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.t5 import T5Encoder
from flux_kit.engine.models.vision import Redux, SiglipVision
from flux_kit.engine.specs import (
    CLIP_L,
    FLUX_AE,
    FLUX_CONTROL,
    FLUX_DEV,
    FLUX_FILL,
    FLUX_SCHNELL,
    REDUX,
    SIGLIP,
    T5_XXL,
    AutoencoderSpec,
    ClipTextSpec,
    FluxSpec,
    ReduxSpec,
    SiglipSpec,
    T5Spec,
)
from flux_kit.engine.weights import build, detect, fill, load, open_checkpoint, to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

FLUX = FluxSpec(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=2, context_in_dim=16, vec_in_dim=8)
SPECS: dict[str, Any] = {
    "transformer": FLUX,
    "t5": T5Spec(vocab_size=40, d_model=24, d_kv=8, num_heads=2, d_ff=20, num_layers=2),
    "clip_l": ClipTextSpec(vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=1, max_position_embeddings=9, bos_token_id=38, eos_token_id=39),
    "vae": AutoencoderSpec(ch=32, ch_mult=(1, 2), num_res_blocks=1),
    "vision": SiglipSpec(image_size=32, patch_size=8, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                         num_attention_heads=1),
    "redux": ReduxSpec(redux_dim=24, txt_in_features=10),
}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "transformer": Flux, "t5": T5Encoder, "clip_l": ClipText, "vae": Autoencoder, "vision": SiglipVision,
    "redux": Redux}
State = dict[str, Tensor]


def random_state(role: str, spec: Any = None, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(7)
    with torch.device("meta"):
        model = MODELS[role](spec or SPECS[role])
    return {name: torch.randn(tensor.shape, generator=generator).to(dtype)
            for name, tensor in model.state_dict().items()}


def check(model: nn.Module, role: str, state: State, dtype: torch.dtype = torch.float32) -> None:
    assert type(model) is MODELS[role]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    loaded = model.state_dict()
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor.to(dtype)), name


def respell(state: State, pattern: str, replacement: str) -> State:
    return {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}


def save(path: Path, state: State) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


# ------------------------------------------------------------------------------------------------- what loads

@pytest.mark.parametrize("role", sorted(MODELS))
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_our_own_names(tmp_path: Path, role: str, stored: torch.dtype) -> None:
    state = random_state(role, dtype=stored)
    path = save(tmp_path / "model.safetensors", state)
    model = load(path, role)
    check(model, role, state)
    assert model.spec == SPECS[role]
    check(load(path, role, dtype=None), role, state, stored)
    check(load(path, role, dtype=torch.bfloat16), role, state, torch.bfloat16)


PREFIXES = {
    "transformer": ["model.diffusion_model.", "diffusion_model.", "transformer.", "net."],
    "t5": ["text_encoders.t5xxl.transformer.", "t5xxl.transformer."],
    "clip_l": ["text_encoders.clip_l.transformer.", "clip_l.transformer."], "vae": ["vae.", "first_stage_model."],
    "vision": ["clip_vision.", "image_encoder."], "redux": ["image_embedder."],
}


@pytest.mark.parametrize(("role", "prefix"), [(role, prefix) for role in PREFIXES for prefix in PREFIXES[role]])
def test_prefixes(tmp_path: Path, role: str, prefix: str) -> None:
    state = random_state(role)
    path = save(tmp_path / "model.sft", {prefix + name: tensor for name, tensor in state.items()})
    check(load(path, role), role, state)


@pytest.mark.parametrize("role", ["transformer", "vae"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_diffusers_layout(tmp_path: Path, role: str, stored: torch.dtype) -> None:
    state = random_state(role, dtype=stored)
    path = save(tmp_path / "diffusion_pytorch_model.safetensors", to_diffusers(state, SPECS[role]))
    check(load(tmp_path, role), role, state)
    check(load(path, role, dtype=None), role, state, stored)
    with open_checkpoint(path) as checkpoint:
        assert detect(checkpoint).layout == "diffusers"


@pytest.mark.parametrize("spec", [
    replace(FLUX, hidden_size=384, num_heads=3, mlp_ratio=2.0, guidance_embed=False), replace(FLUX, depth=0),
    replace(FLUX, in_channels=384, depth=2, depth_single_blocks=0), replace(FLUX, in_channels=128)],
    ids=["3 heads", "no double blocks", "no single blocks", "control"])
def test_sizes_survive_both_layouts(tmp_path: Path, spec: FluxSpec) -> None:
    if spec.depth == 0:
        spec = replace(spec, qkv_bias=False)  # which only double blocks have
    state = random_state("transformer", spec)
    for layout in (state, to_diffusers(state, spec)):
        model = load(save(tmp_path / "model.safetensors", layout), "transformer")
        assert model.spec == spec
        check(model, "transformer", state)


SPELLINGS = {
    "norms called weight": ("transformer", r"((?:query|key)_norm)\.scale$", r"\1.weight"),
    "no text_model": ("clip_l", r"^text_model\.", ""),
    "no vision_model": ("vision", r"^vision_model\.", ""),
    "embed_tokens alone": ("t5", r"^shared\.", "encoder.embed_tokens."),
}


@pytest.mark.parametrize("kind", sorted(SPELLINGS))
@pytest.mark.parametrize("prefix", ["", "some.prefix."])
def test_spellings(tmp_path: Path, kind: str, prefix: str) -> None:
    role, pattern, replacement = SPELLINGS[kind]
    state = random_state(role)
    spelt = respell(state, pattern, replacement)
    assert spelt.keys() != state.keys()
    path = save(tmp_path / "model.safetensors", {prefix + name: tensor for name, tensor in spelt.items()})
    check(load(path, role), role, state)


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_folders_as_the_libraries_save_them(tmp_path: Path, library: str) -> None:
    """`save_pretrained` of the installed versions, sharded too, is an oracle for names we did not write."""
    if library == "diffusers":
        import diffusers

        model = diffusers.FluxTransformer2DModel(
            patch_size=1, num_layers=1, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
            joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(16, 56, 56))
        role, ours = "transformer", lambda state: to_diffusers(state, FLUX)
    else:
        import transformers

        spec = SPECS["clip_l"]
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
            num_hidden_layers=2, num_attention_heads=1, max_position_embeddings=spec.max_position_embeddings))
        role = "clip_l"

        def ours(state: State) -> State:
            return state if any(name.startswith("text_model.") for name in theirs) else respell(
                state, r"^text_model\.", "")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    theirs = model.state_dict()
    assert list(tmp_path.glob("*.index.json"))
    found = ours(load(tmp_path, role).state_dict())
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("position_ids")}
    assert set(found) == set(theirs)
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())


def test_every_part_of_an_all_in_one(tmp_path: Path) -> None:
    states = {role: random_state(role) for role in MODELS}
    prefixes = {"transformer": "model.diffusion_model.", "t5": "text_encoders.t5xxl.transformer.",
                "clip_l": "text_encoders.clip_l.transformer.", "vae": "vae.", "vision": "clip_vision.",
                "redux": "style_model."}
    path = save(tmp_path / "all.safetensors", {prefixes[role] + name: tensor for role, state in states.items()
                                               for name, tensor in state.items()})
    with open_checkpoint(path) as checkpoint:
        assert detect(checkpoint).role == "all-in-one"
        models = {role: load(checkpoint, role) for role in MODELS}
    for role, model in models.items():
        check(model, role, states[role])


def test_a_model_outlives_its_file_and_its_checkpoint(tmp_path: Path) -> None:
    state = random_state("t5")
    path = save(tmp_path / "model.safetensors", state)
    model = load(path, "t5", dtype=None)
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()  # in place, not copied
    path.unlink()
    check(model, "t5", state)
    del model
    gc.collect()
    if sys.platform == "linux":
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_layers_of_the_host_are_used(tmp_path: Path) -> None:
    from flux_kit.engine.models.ops import PlainOps

    class Linear(nn.Linear):
        pass

    class HostOps(PlainOps):
        pass

    HostOps.Linear = Linear
    state = random_state("clip_l")
    model = load(save(tmp_path / "model.safetensors", state), "clip_l", ops=HostOps())
    check(model, "clip_l", state)
    assert sum(type(module) is Linear for module in model.modules()) == 12


# ------------------------------------------------------------------------------------------------- what is refused

def refused(path: Path, role: str, error: type[Exception] = BadModelFile, **options: Any) -> str:
    with pytest.raises(error) as caught:
        load(path, role, **options)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert caught.value.file == str(path)
    return message


@pytest.mark.parametrize("role", sorted(MODELS))
def test_any_missing_tensor_is_named(tmp_path: Path, role: str) -> None:
    state = random_state(role)
    for lost in list(state)[::7]:
        path = save(tmp_path / "model.safetensors", {name: value for name, value in state.items() if name != lost})
        assert "1 tensors are missing" in (message := refused(path, role))
        assert lost in message


def test_many_missing_tensors_are_counted_and_five_named(tmp_path: Path) -> None:
    state = random_state("transformer")
    lost = [name for name in state if name.startswith("single_blocks.0.")]
    path = save(tmp_path / "model.safetensors", {name: value for name, value in state.items() if name not in lost})
    message = refused(path, "transformer")
    assert f"{len(lost)} tensors are missing" in message
    assert sum(name in message for name in lost) == 5


def test_missing_names_of_the_diffusers_layout_are_theirs(tmp_path: Path) -> None:
    state = to_diffusers(random_state("transformer"), FLUX)
    del state["single_transformer_blocks.1.attn.to_k.weight"]
    path = save(tmp_path / "model.safetensors", {"transformer." + name: value for name, value in state.items()})
    assert "transformer.single_transformer_blocks.1.attn.to_k.weight" in refused(path, "transformer")


@pytest.mark.parametrize("role", sorted(MODELS))
def test_wrong_shapes_are_named(tmp_path: Path, role: str) -> None:
    state = random_state(role)
    name = next(name for name in reversed(state) if state[name].ndim >= 2)
    state[name] = state[name][:, :-1]
    message = refused(save(tmp_path / "model.safetensors", state), role)
    assert "shape" in message or "channels" in message
    assert name in message or "channels" in message


def test_a_convolution_saved_flat_is_refused_in_our_own_layout(tmp_path: Path) -> None:
    state = random_state("vae")
    state["encoder.mid.attn_1.q.weight"] = state["encoder.mid.attn_1.q.weight"].flatten(1)
    assert "encoder.mid.attn_1.q.weight" in refused(save(tmp_path / "model.safetensors", state), "vae")


@pytest.mark.parametrize(("role", "surplus"), [
    ("transformer", "double_blocks.0.img_attn.extra.weight"), ("transformer", "double_blocks.7.img_attn.qkv.bias"),
    ("transformer", "img_in.extra"), ("t5", "encoder.block.0.layer.0.SelfAttention.extra"),
    ("clip_l", "text_model.extra"), ("vae", "decoder.extra.weight"), ("vision", "vision_model.extra"),
    ("redux", "redux_up.extra")])
def test_unknown_names_inside_a_module_are_refused(tmp_path: Path, role: str, surplus: str) -> None:
    path = save(tmp_path / "model.safetensors", {**random_state(role), surplus: torch.zeros(2)})
    message = refused(path, role)
    assert surplus in message or "missing" in message  # a block more is a block of which the rest is missing


def test_hostile_names_and_shapes_stay_in_one_short_line(tmp_path: Path) -> None:
    state = random_state("t5")
    bad = {"encoder.block.0.a: (\n\x1b[31m" + "x" * 5000: torch.zeros(2)}
    assert len(refused(save(tmp_path / "a.safetensors", {**state, **bad}), "t5")) < 500
    state["encoder.block.1.layer.1.DenseReluDense.wo.weight"] = torch.zeros([1] * 60)
    assert "and 52 more" in (message := refused(save(tmp_path / "b.safetensors", state), "t5"))
    assert len(message) < 500


def test_both_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    name = "single_blocks.0.norm.key_norm."
    path = save(tmp_path / "model.safetensors", {**random_state("transformer"), name + "weight": torch.ones(128)})
    assert name + "weight" in refused(path, "transformer")


def test_harmless_surplus_is_silent_and_other_surplus_is_one_warning(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = random_state("t5")
    harmless = {"encoder.embed_tokens.weight": state["shared.weight"].clone(), "lm_head.weight": torch.zeros(1),
                "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1), "logit_scale": torch.zeros(())}
    with caplog.at_level(logging.WARNING):
        check(load(save(tmp_path / "a.safetensors", {**state, **harmless}), "t5"), "t5", state)
    assert not caplog.records
    strange = {"my.notes": torch.zeros(1), "other\n": torch.zeros(1)}
    with caplog.at_level(logging.WARNING):
        check(load(save(tmp_path / "b.safetensors", {**state, **strange}), "t5"), "t5", state)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "2 tensors" in message
    assert "'my.notes'" in message
    assert "'other\\n'" in message
    assert "b.safetensors" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("role", "layout", "name"), [
    ("transformer", "bfl", "single_blocks.1.norm.key_norm.scale"), ("transformer", "bfl", "img_in.bias"),
    ("transformer", "diffusers", "single_blocks.1.linear1.bias"), ("t5", "hf", "encoder.final_layer_norm.weight"),
    ("clip_l", "hf", "text_model.encoder.layers.0.layer_norm1.weight"), ("vae", "bfl", "decoder.norm_out.bias"),
    ("vision", "hf", "vision_model.post_layernorm.weight"), ("redux", "bfl", "redux_up.bias")])
def test_nan_and_infinity_in_scales_and_norms_are_found(tmp_path: Path, role: str, layout: str, name: str,
                                                        value: float) -> None:
    state = random_state(role)
    state[name][3] = value
    stored = to_diffusers(state, SPECS[role]) if layout == "diffusers" else state
    message = refused(save(tmp_path / "model.safetensors", stored), role, NotFinite)
    assert ("to_q.bias" if layout == "diffusers" else name) in message


def test_numbers_that_do_not_fit_the_dtype_are_found(tmp_path: Path) -> None:
    state = random_state("vae")
    state["decoder.norm_out.weight"][0] = 1e6
    path = save(tmp_path / "model.safetensors", state)
    check(load(path, "vae"), "vae", state)
    assert "float16" in refused(path, "vae", NotFinite, dtype=torch.float16)


def test_another_role_is_named(tmp_path: Path) -> None:
    paths = {role: save(tmp_path / f"{role}.safetensors", random_state(role)) for role in MODELS}
    says = {"transformer": "a FLUX.1 transformer", "t5": "a T5", "clip_l": "a CLIP-L", "vae": "a FLUX.1 autoencoder",
            "vision": "a SigLIP", "redux": "a FLUX.1 Redux"}
    for role, path in paths.items():
        for wanted in MODELS:
            if wanted != role:
                message = refused(path, wanted)
                assert f"asked for {says[wanted]}" in message
                assert f"this is {says[role]}" in message


def test_another_family_is_named(tmp_path: Path) -> None:
    spec = replace(SPECS["clip_l"], hidden_size=1280, num_attention_heads=20, num_hidden_layers=1, intermediate_size=8)
    path = save(tmp_path / "clip.safetensors", random_state("clip_l", spec, torch.bfloat16))
    assert "this is an SDXL CLIP-G" in refused(path, "clip_l")
    tower = {"vision_model.embeddings.class_embedding": torch.zeros(1024),
             **{name: value for name, value in random_state("vision").items() if "patch_embedding.bias" not in name}}
    message = refused(save(tmp_path / "clip_vision_l.safetensors", tower), "vision")
    assert "this is a CLIP ViT-L vision encoder" in message and "sigclip_vision_patch14_384" in message
    spec = replace(SPECS["vae"], z_channels=4)
    path = save(tmp_path / "sdxl_vae.safetensors", random_state("vae", spec))
    assert "SDXL autoencoder (4 latent channels" in refused(path, "vae")
    lora = {f"lora_unet_double_blocks_{i}_img_attn_qkv.lora_down.weight": torch.zeros(1) for i in range(3)}
    assert "this is a LoRA" in refused(save(tmp_path / "lora.safetensors", lora), "transformer")


def test_another_variant_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", random_state("transformer", replace(FLUX, in_channels=384)))
    assert "this is a FLUX.1 Fill model" in refused(path, "transformer", variant=("dev", "schnell"))
    assert load(path, "transformer", variant=("fill",)).spec.variant == "fill"


def test_weights_in_a_type_that_means_nothing_alone_are_refused(tmp_path: Path) -> None:
    state = random_state("clip_l")
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    state[name] = state[name].to(torch.uint8)
    assert "(U8)" in refused(save(tmp_path / "model.safetensors", state), "clip_l")


def test_plain_fp8_is_cast_where_nothing_may_stay_packed(tmp_path: Path) -> None:
    state = random_state("clip_l", dtype=torch.float8_e4m3fn)
    path = save(tmp_path / "model.safetensors", state)
    check(load(path, "clip_l", dtype=torch.bfloat16, packed=None), "clip_l", state, torch.bfloat16)


def test_a_model_of_the_host_is_filled_whatever_it_calls_its_norms(tmp_path: Path) -> None:
    from flux_kit.engine.models.ops import PlainOps, RMSNorm

    class HostOps(PlainOps):
        @staticmethod
        def RMSNorm(dim: int, eps: float, name: str = "scale") -> nn.Module:  # noqa: N802  (torch's name)
            return RMSNorm(dim, eps, "weight")

    state = random_state("transformer")
    for layout in (state, to_diffusers(state, FLUX)):
        path = save(tmp_path / "model.safetensors", layout)
        loaded = load(path, "transformer", ops=HostOps()).state_dict()
        assert torch.equal(loaded["single_blocks.0.norm.key_norm.weight"], state["single_blocks.0.norm.key_norm.scale"])
        assert len(loaded) == len(state)


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    state = random_state("t5")
    state["encoder.final_layer_norm.weight"][0] = float("nan")
    path = save(tmp_path / "model.safetensors", state)
    model = T5Encoder(SPECS["t5"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open_checkpoint(path) as checkpoint, pytest.raises(NotFinite):
        fill(model, checkpoint, detect(checkpoint).parts["t5"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_unknown_role_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", random_state("t5"))
    with pytest.raises(ValueError, match="role must be one of"):
        load(path, "lora")


# ------------------------------------------------------------------------------------------------- full size

@pytest.mark.parametrize(("name", "role", "spec"), [
    ("flux_dev_bfl", "transformer", FLUX_DEV), ("flux_schnell_bfl", "transformer", FLUX_SCHNELL),
    ("flux_fill_bfl", "transformer", FLUX_FILL), ("flux_control_bfl", "transformer", FLUX_CONTROL),
    ("t5xxl_hf", "t5", T5_XXL), ("clip_l_hf", "clip_l", CLIP_L), ("ae_bfl", "vae", FLUX_AE),
    ("siglip_so400m_vision_hf", "vision", SIGLIP), ("redux", "redux", REDUX)])
def test_full_size_models_have_the_published_names_and_shapes(
        manifest: Callable[[str], Any], sparse: Callable[..., Path], tmp_path: Path, name: str, role: str,
        spec: Any) -> None:
    with open_checkpoint(sparse(tmp_path / "model.safetensors", manifest(name))) as checkpoint:
        part = detect(checkpoint).parts[role]
    assert part.spec == spec
    found = {key: tuple(tensor.shape) for key, tensor in build(part).state_dict().items()}
    assert found == {key: shape for key, (shape, _) in manifest(name).items()}


def private_bytes() -> int:
    """Memory of this process that is shared with no file, in bytes."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M))
    return 1024 * max(int(fields["Private_Dirty"]), int(fields["Anonymous"]))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc/self/smaps_rollup")
@pytest.mark.parametrize("packing", ["all-in-one", "shards"])
def test_the_whole_transformer_loads_without_being_copied(
        manifest: Callable[[str], Any], sparse: Callable[..., Path], sharded: Callable[..., Path], tmp_path: Path,
        packing: str) -> None:
    tensors = manifest("flux_dev_bfl")
    if packing == "shards":
        path = sharded(tmp_path / "model", "flux1-dev", tensors, 3)
    else:
        whole = {"model.diffusion_model." + name: info for name, info in tensors.items()}
        whole |= {"vae." + name: info for name, info in manifest("ae_bfl").items()}
        path = sparse(tmp_path / "model.safetensors", whole)
    before = private_bytes()
    model = load(path, "transformer", dtype=None)
    grown = private_bytes() - before
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_901_408_320
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.spec == FLUX_DEV
    assert grown < 100_000_000
