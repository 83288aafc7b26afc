"""The equivalents of core nodes: their sockets, and what they do, against independent arithmetic."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_fixtures import samples
from flux_kit.engine.errors import BadInput, BadModelFile, FluxKitError, MissingFile, NotFinite
from flux_kit.engine.sampling import process_out
from flux_kit.hosts.standalone.core_nodes import CORE_NODES
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.io import WidgetInput
from flux_kit.hosts.standalone.png import read_text
from PIL import Image

# id -> inputs in the order that decides which widget value is which in saved workflows; "*" is a socket
CORE = {
    "LoraLoader": "*model *clip lora_name strength_model strength_clip -> MODEL CLIP",
    "LoraLoaderModelOnly": "*model lora_name strength_model -> MODEL",
    "UNETLoader": "unet_name weight_dtype -> MODEL",
    "DualCLIPLoader": "clip_name1 clip_name2 type device -> CLIP",
    "CLIPLoader": "clip_name type device -> CLIP",
    "VAELoader": "vae_name -> VAE",
    "CheckpointLoaderSimple": "ckpt_name -> MODEL CLIP VAE",
    "CLIPTextEncode": "text *clip -> CONDITIONING",
    "CLIPTextEncodeFlux": "*clip clip_l t5xxl guidance -> CONDITIONING",
    "FluxGuidance": "*conditioning guidance -> CONDITIONING",
    "ConditioningZeroOut": "*conditioning -> CONDITIONING",
    "EmptyLatentImage": "width height batch_size -> LATENT",
    "EmptySD3LatentImage": "width height batch_size -> LATENT",
    "KSampler": "*model seed steps cfg sampler_name scheduler *positive *negative *latent_image denoise -> LATENT",
    "KSamplerAdvanced": "*model add_noise noise_seed steps cfg sampler_name scheduler *positive *negative "
                        "*latent_image start_at_step end_at_step return_with_leftover_noise -> LATENT",
    "KSamplerSelect": "sampler_name -> SAMPLER",
    "BasicScheduler": "*model scheduler steps denoise -> SIGMAS",
    "BasicGuider": "*model *conditioning -> GUIDER",
    "CFGGuider": "*model *positive *negative cfg -> GUIDER",
    "RandomNoise": "noise_seed -> NOISE",
    "DisableNoise": " -> NOISE",
    "SamplerCustomAdvanced": "*noise *guider *sampler *sigmas *latent_image -> LATENT LATENT",
    "ModelSamplingFlux": "*model max_shift base_shift width height -> MODEL",
    "VAEDecode": "*samples *vae -> IMAGE",
    "VAEDecodeTiled": "*samples *vae tile_size overlap temporal_size temporal_overlap -> IMAGE",
    "VAEEncode": "*pixels *vae -> LATENT",
    "LoadImage": "image -> IMAGE MASK",
    "SaveImage": "*images filename_prefix -> ",
    "PreviewImage": "*images -> ",
    "SetLatentNoiseMask": "*samples *mask -> LATENT",
    "LatentUpscale": "*samples upscale_method width height crop -> LATENT",
    "LatentUpscaleBy": "*samples upscale_method scale_by -> LATENT",
    "CLIPVisionLoader": "clip_name -> CLIP_VISION",
    "CLIPVisionEncode": "*clip_vision *image crop -> CLIP_VISION_OUTPUT",
    "StyleModelLoader": "style_model_name -> STYLE_MODEL",
    "StyleModelApply": "*conditioning *style_model *clip_vision_output strength strength_type -> CONDITIONING",
    "ImageScale": "*image upscale_method width height crop -> IMAGE",
    "ImageScaleBy": "*image upscale_method scale_by -> IMAGE",
    "ImageScaleToTotalPixels": "*image upscale_method megapixels resolution_steps -> IMAGE",
    "ImageScaleToMaxDimension": "*image upscale_method largest_size -> IMAGE",
    "ImageInvert": "*image -> IMAGE",
    "ImageStitch": "*image1 direction match_image_size spacing_width spacing_color *image2 -> IMAGE",
    "ImagePadForOutpaint": "*image left top right bottom feathering -> IMAGE MASK",
    "SolidMask": "value width height -> MASK", "InvertMask": "*mask -> MASK",
    "GrowMask": "*mask expand tapered_corners -> MASK", "MaskToImage": "*mask -> IMAGE",
    "ImageToMask": "*image channel -> MASK",
    "InpaintModelConditioning": "*positive *negative *vae *pixels *mask noise_mask -> CONDITIONING CONDITIONING LATENT",
    "InstructPixToPixConditioning": "*positive *negative *vae *pixels -> CONDITIONING CONDITIONING LATENT",
    "DifferentialDiffusion": "*model strength -> MODEL",
    "Canny": "*image low_threshold high_threshold -> IMAGE",
    "ReferenceLatent": "*conditioning *latent -> CONDITIONING",
    "FluxKontextMultiReferenceLatentMethod": "*conditioning reference_latents_method -> CONDITIONING",
    "FluxKontextImageScale": "*image -> IMAGE", "FluxDisableGuidance": "*conditioning -> CONDITIONING",
    "PrimitiveString": "value -> STRING", "PrimitiveStringMultiline": "value -> STRING", "PrimitiveInt": "value -> INT",
    "PrimitiveFloat": "value -> FLOAT", "PrimitiveBoolean": "value -> BOOLEAN",
}

LOAD: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
    "clip": ("DualCLIPLoader", {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors",
                                "type": "flux", "device": "default"}),
    "pos": ("CLIPTextEncode", {"text": "a red circle", "clip": ["clip", 0]}),
    "neg": ("CLIPTextEncode", {"text": "blue", "clip": ["clip", 0]}),
    "empty": ("EmptySD3LatentImage", {"width": 48, "height": 32, "batch_size": 1}),
}
KSAMPLER: dict[str, Any] = {
    "model": ["model", 0], "positive": ["pos", 0], "negative": ["neg", 0], "latent_image": ["empty", 0], "seed": 7,
    "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def test_sockets_and_widget_order_are_core_s(host: StandaloneHost) -> None:
    found = {}
    for node in CORE_NODES:
        schema = node.GET_SCHEMA()
        inputs = " ".join(("" if isinstance(spec, WidgetInput) else "*") + spec.id for spec in schema.inputs)
        found[schema.node_id] = f"{inputs} -> {' '.join(output.io_type for output in schema.outputs)}"
    assert found == CORE


def test_seeds_have_the_control_widget_that_shifts_saved_values(host: StandaloneHost) -> None:
    controlled = {f"{schema.node_id}.{spec.id}" for schema in (node.GET_SCHEMA() for node in CORE_NODES)
                  for spec in schema.inputs if getattr(spec, "control_after_generate", None)}
    assert controlled == {"KSampler.seed", "KSamplerAdvanced.noise_seed", "RandomNoise.noise_seed",
                          "PrimitiveInt.value"}


def test_ksampler_equals_the_five_custom_nodes(run_prompt: Any) -> None:
    result = run_prompt({
        **LOAD, "k": ("KSampler", KSAMPLER), "noise": ("RandomNoise", {"noise_seed": 7}),
        "guider": ("BasicGuider", {"model": ["model", 0], "conditioning": ["pos", 0]}),
        "solver": ("KSamplerSelect", {"sampler_name": "euler"}),
        "sigmas": ("BasicScheduler", {"model": ["model", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0}),
        "custom": ("SamplerCustomAdvanced", {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["solver", 0],
                                             "sigmas": ["sigmas", 0], "latent_image": ["empty", 0]})}, "k custom")
    assert samples(result, "k").shape == (1, 16, 4, 6)
    assert torch.equal(samples(result, "k"), samples(result, "custom"))
    # the last step of euler lands on the last estimate of the clean latent
    assert torch.allclose(samples(result, "custom", 1), samples(result, "custom"), atol=1e-5)


def test_two_halves_of_ksampler_advanced_make_the_whole(run_prompt: Any) -> None:
    common = {key: value for key, value in KSAMPLER.items() if key not in ("seed", "denoise")} | {"noise_seed": 7}
    first = {**common, "add_noise": "enable", "start_at_step": 0, "end_at_step": 2,
             "return_with_leftover_noise": "enable"}
    second = {**common, "add_noise": "disable", "start_at_step": 2, "end_at_step": 10000,
              "return_with_leftover_noise": "disable", "latent_image": ["a", 0]}
    result = run_prompt({**LOAD, "k": ("KSampler", KSAMPLER), "a": ("KSamplerAdvanced", first),
                         "b": ("KSamplerAdvanced", second)}, "k b")
    assert not torch.allclose(samples(result, "a"), samples(result, "k"), atol=1e-2)
    assert torch.allclose(samples(result, "b"), samples(result, "k"), atol=1e-4)


def test_cfg_is_a_straight_line_through_negative_and_positive(run_prompt: Any) -> None:
    one = {**KSAMPLER, "steps": 1}  # one euler step from noise gives the estimate itself
    result = run_prompt({
        **LOAD, "p": ("KSampler", one), "n": ("KSampler", {**one, "positive": ["neg", 0]}),
        "both": ("KSampler", {**one, "cfg": 2.5})}, "p n both")
    p, n = samples(result, "p"), samples(result, "n")
    assert not torch.allclose(p, n, atol=1e-4)
    assert torch.allclose(samples(result, "both"), n + (p - n) * 2.5, atol=1e-4)


def test_guidance_left_out_means_three_and_a_half(run_prompt: Any) -> None:
    guided = {name: ("FluxGuidance", {"conditioning": ["pos", 0], "guidance": value})
              for name, value in (("g35", 3.5), ("g8", 8.0))}
    result = run_prompt({**LOAD, **guided, "k": ("KSampler", KSAMPLER),
                         **{f"k{name}": ("KSampler", {**KSAMPLER, "positive": [name, 0]}) for name in guided}},
                        "k kg35 kg8")
    assert torch.equal(samples(result, "k"), samples(result, "kg35"))
    assert not torch.allclose(samples(result, "k"), samples(result, "kg8"), atol=1e-4)


def test_zero_out_keeps_what_is_no_text(run_prompt: Any) -> None:
    result = run_prompt({**LOAD, "g": ("FluxGuidance", {"conditioning": ["pos", 0], "guidance": 2.0}),
                         "z": ("ConditioningZeroOut", {"conditioning": ["g", 0]})}, "z")
    [[cond, values]], = result.outputs["z"][0]
    assert cond.shape == (1, 256, 64) and values["guidance"] == 2.0
    assert not cond.any() and not values["pooled_output"].any()
    assert result.outputs["g"][0][0][0][0].any()  # the one it was made from is untouched


def test_an_empty_latent_of_other_width_is_widened(run_prompt: Any) -> None:
    result = run_prompt({
        **LOAD, "four": ("EmptyLatentImage", {"width": 48, "height": 32, "batch_size": 1}), "k": ("KSampler", KSAMPLER),
        "k4": ("KSampler", {**KSAMPLER, "latent_image": ["four", 0]})}, "k k4")
    assert samples(result, "four").shape[1] == 4
    assert torch.equal(samples(result, "k"), samples(result, "k4"))


def test_model_sampling_flux_shifts_the_sigmas(run_prompt: Any) -> None:
    result = run_prompt({
        **LOAD, "shifted": ("ModelSamplingFlux", {"model": ["model", 0], "max_shift": 1.15, "base_shift": 0.5,
                                                  "width": 512, "height": 768}),
        "s": ("BasicScheduler", {"model": ["shifted", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0})}, "s")
    mu = 0.5 + (512 * 768 / 256 - 256) * (1.15 - 0.5) / (4096 - 256)
    expected = [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in (1, 0.75, 0.5, 0.25)] + [0]
    assert result.outputs["s"][0][0].tolist() == pytest.approx(expected, abs=1e-6)


def test_partial_denoise_keeps_the_number_of_steps(run_prompt: Any) -> None:
    result = run_prompt({**LOAD, **{
        name: ("BasicScheduler", {"model": ["model", 0], "scheduler": "simple", "steps": steps, "denoise": denoise})
        for name, steps, denoise in (("whole", 10, 1.0), ("part", 4, 0.4), ("none", 4, 0.0))}}, "whole part none")
    whole, part, none = (result.outputs[name][0][0] for name in ("whole", "part", "none"))
    assert torch.equal(part, whole[-5:])
    assert len(none) == 0


def test_a_noise_mask_keeps_what_it_covers(run_prompt: Any, host: StandaloneHost) -> None:
    picture = np.random.default_rng(1).integers(0, 255, (32, 48, 4), dtype=np.uint8)
    picture[:, :24, 3], picture[:, 24:, 3] = 255, 0  # the right half is transparent: repaint it
    Image.fromarray(picture).save(host.folders.roots("input")[0] / "p.png")
    result = run_prompt({
        **LOAD, "vae": ("VAELoader", {"vae_name": "ae.safetensors"}), "image": ("LoadImage", {"image": "p.png"}),
        "enc": ("VAEEncode", {"pixels": ["image", 0], "vae": ["vae", 0]}),
        "masked": ("SetLatentNoiseMask", {"samples": ["enc", 0], "mask": ["image", 1]}),
        "k": ("KSampler", {**KSAMPLER, "latent_image": ["masked", 0]})}, "k")
    before, after = samples(result, "enc"), samples(result, "k")
    assert torch.allclose(before[..., :2], after[..., :2], atol=1e-4)
    assert not torch.allclose(before[..., 4:], after[..., 4:], atol=1e-1)


def test_decode_is_the_autoencoder_s_picture_and_tiles_fit(run_prompt: Any, host: StandaloneHost) -> None:
    result = run_prompt({
        **LOAD, "vae": ("VAELoader", {"vae_name": "ae.safetensors"}), "k": ("KSampler", KSAMPLER),
        "d": ("VAEDecode", {"samples": ["k", 0], "vae": ["vae", 0]}),
        "t": ("VAEDecodeTiled", {"samples": ["k", 0], "vae": ["vae", 0], "tile_size": 64, "overlap": 64,
                                 "temporal_size": 64, "temporal_overlap": 8})}, "d t")
    autoencoder = host.load_vae(host.resolve_file("vae", "ae.safetensors")).autoencoder
    with torch.no_grad():
        expected = ((autoencoder.decode(samples(result, "k")) + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
    image = result.outputs["d"][0][0]
    assert image.shape == (1, 32, 48, 3) and image.dtype == torch.float32
    assert torch.equal(image, expected)
    assert torch.allclose(result.outputs["t"][0][0], image, atol=1e-4)


@pytest.mark.parametrize(("node", "inputs", "size"), [
    ("LatentUpscale", {"upscale_method": "bilinear", "width": 96, "height": 64, "crop": "disabled"}, (8, 12)),
    ("LatentUpscale", {"upscale_method": "nearest-exact", "width": 128, "height": 128, "crop": "center"}, (16, 16)),
    ("LatentUpscale", {"upscale_method": "area", "width": 0, "height": 128, "crop": "disabled"}, (16, 24)),
    ("LatentUpscale", {"upscale_method": "bicubic", "width": 0, "height": 0, "crop": "disabled"}, (4, 6)),
    ("LatentUpscaleBy", {"upscale_method": "bicubic", "scale_by": 1.5}, (6, 9)),
])
def test_latents_are_resized(run_prompt: Any, node: str, inputs: dict[str, Any], size: tuple[int, int]) -> None:
    result = run_prompt({"empty": LOAD["empty"], "up": (node, {"samples": ["empty", 0], **inputs})}, "up")
    assert samples(result, "up").shape == (1, 16, *size)


def test_centre_crop_keeps_the_middle() -> None:
    from flux_kit.hosts.standalone.objects import resized
    row = torch.arange(8.0).expand(1, 1, 4, 8)
    assert torch.equal(resized(row, 4, 4, "nearest-exact", crop=True), row[..., 2:6])


def test_saved_pictures_carry_their_prompt(run_prompt: Any, host: StandaloneHost) -> None:
    result = run_prompt({
        **LOAD, "vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
        "d": ("VAEDecode", {"samples": ["empty", 0], "vae": ["vae", 0]}),
        "s": ("SaveImage", {"images": ["d", 0], "filename_prefix": "sub/x"}),
        "p": ("PreviewImage", {"images": ["d", 0]})})
    assert result.ui["s"]["images"] == [{"filename": "x_00001_.png", "subfolder": "sub", "type": "output"}]
    assert result.ui["p"]["images"][0]["type"] == "temp"
    path = host.saved[0]
    assert path.name == "x_00001_.png" and '"SaveImage"' in read_text(path, ["prompt"])["prompt"]
    expected = (result.outputs["d"][0][0][0].numpy() * 255).astype(np.uint8)
    assert np.array_equal(np.asarray(Image.open(path)), expected)


def test_a_picture_with_nan_is_not_saved(host: StandaloneHost) -> None:
    image = torch.full((2, 8, 8, 3), 0.5)
    image[1, 0, 0, 0] = float("nan")
    with pytest.raises(NotFinite):
        host.save_images(image, "x")
    assert not host.folders.output.exists() or not list(host.folders.output.rglob("*"))


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "a/../../x", "C:\\x", "..\\x"])
def test_prefixes_cannot_leave_the_output_folder(host: StandaloneHost, prefix: str) -> None:
    with pytest.raises(BadInput):
        host.save_images(torch.zeros(1, 8, 8, 3), prefix)
    assert not host.folders.output.exists() or not list(host.folders.output.rglob("*.png"))


def test_load_image_reads_transparency_and_turns_photos(host: StandaloneHost) -> None:
    folder = host.folders.roots("input")[0]
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[0, 0] = (255, 0, 51, 255)
    Image.fromarray(pixels).save(folder / "a.png")
    image, mask = host.load_image("a.png")
    assert image.shape == (1, 2, 3, 3) and image[0, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert mask.shape == (1, 2, 3) and mask[0, 0].tolist() == [0, 1, 1]
    exif = Image.Exif()
    exif[274] = 6  # a camera held upright: the file lies on its side
    Image.fromarray(pixels[..., :3]).save(folder / "b.jpg", exif=exif)
    image, mask = host.load_image("b.jpg")
    assert image.shape == (1, 3, 2, 3)
    assert mask.shape == (1, 64, 64) and not mask.any()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png() -> bytes:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND", b"")


def test_hostile_pictures_are_refused(host: StandaloneHost) -> None:
    folder = host.folders.roots("input")[0]
    (folder / "huge.png").write_bytes(huge_png())
    (folder / "text.png").write_bytes(b"no picture at all")
    frames = [Image.new("P", (4, 4), i % 2) for i in range(65)]
    frames[0].save(folder / "long.gif", save_all=True, append_images=frames[1:], duration=20, optimize=False)
    Image.new("RGB", (64, 64)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
    for name, words in (("huge.png", "megapixels"), ("text.png", "not a picture"), ("long.gif", "65 frames"),
                        ("cut.png", "not a picture")):
        with pytest.raises(BadInput, match=words):
            host.load_image(name)
    for name in ("../secret.png", "/etc/passwd", "absent.png"):
        with pytest.raises((BadInput, MissingFile)):
            host.load_image(name)


def test_models_are_shared_until_their_file_changes(host: StandaloneHost, models: Path) -> None:
    path = models / "vae" / "ae.safetensors"
    first = host.load_vae(path)
    assert host.load_vae(path).autoencoder is first.autoencoder
    status = path.stat()
    import os
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert host.load_vae(path).autoencoder is not first.autoencoder


@pytest.mark.parametrize(("node", "inputs", "words"), [
    ("UNETLoader", {"unet_name": "absent.safetensors", "weight_dtype": "default"}, "absent.safetensors"),
    ("UNETLoader", {"unet_name": "../vae/ae.safetensors", "weight_dtype": "default"}, "lies in vae"),
    ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "fp8_e4m3fn"}, "default"),
    ("DualCLIPLoader", {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "sdxl"},
     "flux"),
    ("KSamplerSelect", {"sampler_name": "dpm_fast"}, "euler"),
    ("EmptySD3LatentImage", {"width": 8, "height": 64, "batch_size": 1}, "16 to 16384"),
    ("RandomNoise", {"noise_seed": -1}, "18446744073709551615"),
    ("PrimitiveInt", {"value": "many"}, "INT"),
])
def test_bad_widgets_are_refused_before_the_run(run_prompt: Any, node: str, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(FluxKitError, match=words) as caught:
        run_prompt({"bad": (node, inputs)}, "bad")
    assert caught.value.node == "bad"


def test_a_file_of_another_role_is_named(host: StandaloneHost, models: Path) -> None:
    with pytest.raises(BadModelFile, match="autoencoder"):
        host.load_model(models / "vae" / "ae.safetensors")
    encoder = models / "text_encoders" / "clip_l.safetensors"
    with pytest.raises(BadModelFile, match=r"^ae.safetensors: this is .*autoencoder.*expected a T5"):
        host.load_text_encoders([encoder, models / "vae" / "ae.safetensors"])
    with pytest.raises(BadModelFile, match="both files hold a CLIP-L"):
        host.load_text_encoders([encoder, models / "checkpoints" / "flux1-schnell-fp8.safetensors"])


def test_file_names_may_differ_in_slashes_case_and_folder(run_prompt: Any, caplog: pytest.LogCaptureFixture) -> None:
    name = "FLUX\\Flux1-Dev.safetensors"
    result = run_prompt({"m": ("UNETLoader", {"unet_name": name, "weight_dtype": "default"})}, "m")
    assert result.outputs["m"][0][0].path.name == "flux1-dev.safetensors"
    assert "flux1-dev.safetensors" in caplog.text


@pytest.mark.parametrize(("node", "value"), [
    ("PrimitiveInt", 5), ("PrimitiveFloat", 2.5), ("PrimitiveString", "a b"), ("PrimitiveStringMultiline", "a\nb"),
    ("PrimitiveBoolean", True)])
def test_primitives_hand_their_value_on(run_prompt: Any, node: str, value: Any) -> None:
    assert run_prompt({"p": (node, {"value": value})}, "p").outputs["p"] == [[value]]


def test_an_interrupt_stops_between_steps(run_prompt: Any, host: StandaloneHost) -> None:
    from flux_kit.engine.errors import Interrupted
    steps: list[int] = []

    def bar(total: int) -> Any:
        def report(value: int, preview: Any = None) -> None:
            steps.append(value)
            if value == 2:
                host.interrupt()
        return report

    host._progress_bar = bar
    with pytest.raises(Interrupted):
        run_prompt({**LOAD, "k": ("KSampler", {**KSAMPLER, "seed": 99})}, "k")
    assert steps == [1, 2]
    assert run_prompt({**LOAD}, "pos").outputs["pos"]  # asked once, stopped once


def test_devices_and_dtypes(models: Path) -> None:
    from flux_kit.hosts.standalone.host import choose_device, choose_dtype
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32 and choose_dtype("bf16", cpu) == torch.bfloat16
    for name in ("cuda:99", "nonsense", "meta"):
        with pytest.raises(BadInput, match=name.split(":")[0]):
            choose_device(name)


def test_raw_latents_flow_between_nodes(run_prompt: Any) -> None:
    """A LATENT is on the autoencoder's raw scale: one step from noise gives process_out of the model's estimate."""
    result = run_prompt({**LOAD, "noise": ("RandomNoise", {"noise_seed": 7}),
                         "guider": ("BasicGuider", {"model": ["model", 0], "conditioning": ["pos", 0]}),
                         "k": ("KSampler", {**KSAMPLER, "steps": 1})}, "k guider")
    guider = result.outputs["guider"][0][0]
    from flux_kit.engine.sampling import Denoiser
    noise = torch.randn((1, 16, 4, 6), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        estimate = Denoiser(guider.model.flux, guider.positive)(noise, torch.ones(1))
    assert torch.allclose(samples(result, "k"), process_out(estimate), atol=1e-5)
