"""The official templates on tiny-flux: its members under the file names that they ask for, and what each is asked so
that its picture can be judged."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import comfyui_workflow_templates_json
import torch
from flux_kit.cli.run import with_settings
from flux_kit.engine.convert import quantize
from flux_kit.engine.quant import FORMATS
from flux_kit.engine.weights import open_checkpoint
from flux_kit.engine.weights.containers import torch_dtype
from flux_kit.hosts.standalone import io
from flux_kit.hosts.standalone.validation import Nodes
from flux_kit.hosts.standalone.workflow import load_workflow
from flux_kit.tiny_flux.examples import RED_CIRCLE, Input
from flux_kit.tiny_flux.scenes import Scene
from prompts import Prompt
from safetensors.torch import save_file

TEMPLATES = Path(comfyui_workflow_templates_json.__file__).parent / "templates"
SHIPPED = Path(__file__).parents[2] / "tiny_flux" / "models"
FP8, FP16 = "fp8_scaled", "fp16"
T5, CLIP_L, VAE = (f"{name}.safetensors" for name in ("text_encoders/tiny-t5", "text_encoders/tiny-clip_l",
                                                      "vae/tiny-ae"))
DEV, SCHNELL, CANNY, KONTEXT = (f"diffusion_models/tiny-flux-{name}.safetensors"
                                for name in ("dev", "schnell", "canny", "kontext"))
FILL = "diffusion_models/tiny-flux-fill.gguf"
# name asked for, without its ending -> the member, and what it is packed in for that (None: it stays as it is shipped)
ASKED_FOR: dict[str, tuple[str, str | None]] = {
    "diffusion_models/flux1-dev": (DEV, None), "diffusion_models/flux1-schnell": (SCHNELL, None),
    "diffusion_models/flux1-krea-dev_fp8_scaled": (DEV, None), "diffusion_models/flux1-dev-fp8": (DEV, FP8),
    "diffusion_models/flux1-fill-dev": (FILL, FP16), "diffusion_models/flux1-canny-dev": (CANNY, None),
    "diffusion_models/flux.1-fill-dev-OneReward-transformer_fp8": (FILL, FP8),
    "diffusion_models/flux1-dev-kontext_fp8_scaled": (KONTEXT, FP8),
    "text_encoders/t5xxl_fp16": (T5, None), "text_encoders/t5xxl_fp8_e4m3fn_scaled": (T5, FP8),
    "text_encoders/clip_l": (CLIP_L, None), "vae/ae": (VAE, None),
    "loras/removal_timestep_alpha-2-1740": ("loras/tiny-lora-cross.safetensors", None),
    "loras/flux1-depth-dev-lora": ("loras/tiny-lora-depth.safetensors", None),
    "clip_vision/sigclip_vision_patch14_384": ("clip_vision/tiny-siglip.safetensors", None),
    "style_models/flux1-redux-dev": ("style_models/tiny-redux.safetensors", None)}
ALL_IN_ONE = "checkpoints/flux1-schnell-fp8.safetensors"
PREFIXES = {"model.diffusion_model.": SCHNELL, "text_encoders.clip_l.transformer.": CLIP_L,
            "text_encoders.t5xxl.transformer.": T5, "vae.": VAE}


def write_models(folder: Path) -> Path:
    """A ComfyUI models folder of tiny-flux's members under the names asked for."""
    for asked, (shipped, type) in ASKED_FOR.items():
        target = folder / f"{asked}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        if type is None:
            shutil.copy(SHIPPED / shipped, target)
        elif type == FP16:
            save_file(unpacked(SHIPPED / shipped), target)
        else:
            quantize(SHIPPED / shipped, target, type, force=True)
    tensors, words = {}, {}
    for prefix, shipped in PREFIXES.items():
        with open_checkpoint(SHIPPED / shipped) as part:
            tensors |= {prefix + name: info.read().clone() for name, info in part.items()}
            if "tokenizer.json" in part.metadata:
                words["t5.tokenizer.json" if shipped == T5 else "clip_l.tokenizer.json"] = part.metadata[
                    "tokenizer.json"]
    (folder / ALL_IN_ONE).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / ALL_IN_ONE, metadata=words)
    return folder


def unpacked(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file in fp16."""
    with open_checkpoint(file) as packed:
        return {name: (FORMATS[info.format].dequantize(info.raw()).view(info.shape)
                       if torch_dtype(info.format) is None else info.read()).half() for name, info in packed.items()}


@dataclass(frozen=True)
class Case:
    """`settings` as NODE.input=value of `flux-kit run`; `inputs`: file name of a picture -> what is on it. A picture
    of `size` is to show `shows`."""

    settings: tuple[str, ...]
    inputs: Mapping[str, Input]
    shows: Scene
    size: tuple[int, int] = (128, 128)

    def write_inputs(self, folder: Path) -> None:
        for name, each in self.inputs.items():
            picture = each.draw()
            picture.save(folder / name, **({"quality": 95} if name.endswith("jpg") else {}))


STAR = Scene("large", "yellow", "star", "center", "purple")
SMALL_TOP = Scene("small", "red", "circle", "top", "blue")
HOLE, WHOLE = Input(RED_CIRCLE, hole=True), Input(RED_CIRCLE)
DEPTH = "flux_depth_lora_example"
KONTEXT_TEMPLATE = "flux_kontext_dev_basic"
CASES: dict[str, Case] = {
    "flux_fill_inpaint_example": Case(
        ("47:23.text=a large yellow star in the center on a blue background",),
        {"flux_fill_inpaint_example_input_image.png": HOLE}, Scene("large", "yellow", "star", "center", "blue")),
    "flux_fill_outpaint_example": Case(
        ("23.text=a small red circle at the top on a blue background", "44.left=16", "44.right=16", "44.bottom=32",
         "44.feathering=8"),
        {"flux_fill_outpaint_example_input_image.png": Input(SMALL_TOP)}, SMALL_TOP, (160, 160)),
    "image_flux.1_fill_dev_OneReward": Case(
        ("108:23.text=a large yellow cross in the center on a blue background", "108:100.strength_model=1.3"),
        {"image_flux.1_fill_dev_OneReward_input_image.png": HOLE},
        Scene("large", "yellow", "cross", "center", "blue")),
    "flux_canny_model_example": Case(
        ("23.text=a large white star in the center on a green background",),
        {"flux_canny_model_example_input_image.png": Input(Scene("large", "yellow", "triangle", "left", "black"))},
        Scene("large", "white", "triangle", "left", "green")),
    DEPTH: Case(
        ("150:23.text=a large orange star in the center on a purple background",),
        {"flux_depth_lora_example_input_image.png": Input(RED_CIRCLE, near=True)},
        Scene("large", "orange", "circle", "center", "purple")),
    "flux_redux_model_example": Case(
        ("6.text=", "27.width=128", "27.height=128", "30.width=128", "30.height=128"),
        {f"flux_redux_model_example_reference_image_{i}.png": Input(STAR) for i in (1, 2)},
        replace(STAR, size=None, place=None, ground=None)),
    KONTEXT_TEMPLATE: Case(
        ("192:6.text=change the background to green",), {"flux_kontext_dev_basic_input_image.jpg": WHOLE},
        Scene("large", "red", "circle", "center", "green")),
}


class Lotus(io.ComfyNode):
    """Stands for the nodes of Lotus while the template is read; none of them runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="LotusConditioning", inputs=[], outputs=[io.Conditioning.Output()])


class FirstSigma(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="SetFirstSigma", inputs=[io.Sigmas.Input("sigmas"), io.Float.Input("sigma")],
                         outputs=[io.Sigmas.Output()])


def without_lotus(nodes: Nodes) -> Prompt:
    """The depth template; the picture itself stands for the depth map that Lotus would make."""
    prompt = load_workflow(TEMPLATES / f"{DEPTH}.json",
                           {**nodes, "LotusConditioning": Lotus, "SetFirstSigma": FirstSigma}).prompt
    kept = {key: entry for key, entry in prompt.items() if not key.startswith("150:41:")}
    cut = [(key, name) for key, entry in kept.items() for name, value in entry["inputs"].items()
           if isinstance(value, list) and value[0] not in kept]
    assert [kept[key]["class_type"] for key, _ in cut] == ["InstructPixToPixConditioning"]
    for key, name in cut:
        kept[key]["inputs"][name] = ["17", 0]
    return kept


def prompt_of(name: str, nodes: Nodes, *more: str) -> Prompt:
    """A template as an API prompt, with what `CASES` sets, and `more`."""
    prompt = without_lotus(nodes) if name == DEPTH else load_workflow(TEMPLATES / f"{name}.json", nodes).prompt
    settings = [(*target.rsplit(".", 1), value) for target, value in (
        text.split("=", 1) for text in (*CASES[name].settings, *more))]
    return with_settings(prompt, settings, nodes)


def sampler_of(prompt: Prompt) -> str:
    sampler, = (key for key, entry in prompt.items() if entry["class_type"] in ("KSampler", "SamplerCustomAdvanced"))
    return sampler
