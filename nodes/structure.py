"""Nodes for FLUX.1 Depth and Canny: maps of a picture, and prompts that follow one."""

from __future__ import annotations

from typing import Any

from ..engine.conditioning import preprocess, structure
from ..hosts import depth
from ..hosts.fingerprint import fingerprint
from ..hosts.names import problems
from . import api
from .api import host
from .fill import NEGATIVE_TIP

CANNY, DEPTH, AS_IS = MAPS = ("canny", "depth", "as is")
NONE = "none"
MENU = "Flux Kit/Conditioning"
THRESHOLD: dict[str, Any] = {"min": 0.0, "max": 1000.0, "step": 1.0}
SIDE: dict[str, Any] = {"default": 0, "min": 0, "max": 16384, "step": 16}
KIND_TIP = ("canny: edges, for FLUX.1 Canny. depth: how near things are, by a depth model, for FLUX.1 Depth. as is: "
            "the picture is a map already.")
LOW_TIP = "canny: weaker edges end here, where they touch strong ones. OpenCV's units, 50 is the official value."
HIGH_TIP = "canny: an edge begins where the picture changes more than this. 200 is the official value."
DEPTH_TIP = "A folder in models/depth with config.json, preprocessor_config.json and model.safetensors."
RANGE_TIP = ("min-max: nearest is white, farthest black. raw: the depth model's own numbers, as the official tool "
             "takes them, often darker.")
RESOLUTION_TIP = "depth: how fine the depth model looks. 518: each model's own size."
WIDTH_TIP = "Width the picture is brought to before the map is made, as the official tool does. 0: its own."
GUIDANCE_TIP = "How closely the prompt and the map are followed. 0: 10 for depth, 30 for canny, else the prompt's own."
FIT_TIP = "Where the aspects differ. stretch: the official way. crop: cut the sides. pad: black bars."
MODEL_TIP = ("To check that the model takes a map. Needed where a Depth or Canny LoRA is put on by ComfyUI's own "
             "loader and the model does not fit into memory.")


class FluxKitStructureMap(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitStructureMap", display_name="Structure Map", category=MENU,
            search_aliases=["canny", "edge detection", "depth anything", "preprocessor", "controlnet aux", "zoe"],
            description="Makes the map that FLUX.1 Canny or Depth follows: edges, or how near things are.",
            inputs=[api.Image.Input("image", tooltip="The picture. An alpha channel is left out."),
                    api.Combo.Input("kind", options=list(MAPS), tooltip=KIND_TIP),
                    api.Float.Input("low", default=float(preprocess.BFL_LOW), **THRESHOLD, tooltip=LOW_TIP),
                    api.Float.Input("high", default=float(preprocess.BFL_HIGH), **THRESHOLD, tooltip=HIGH_TIP),
                    api.Combo.Input("depth_model", options=[NONE, *host().list_files(depth.KIND)], tooltip=DEPTH_TIP),
                    api.Combo.Input("depth_range", options=list(preprocess.RANGES), tooltip=RANGE_TIP),
                    api.Boolean.Input("invert", default=False, tooltip="Black becomes white, near becomes far."),
                    api.Int.Input("resolution", default=preprocess.OWN_RESOLUTION, min=140, max=1540, step=14,
                                  tooltip=RESOLUTION_TIP),
                    api.Int.Input("width", tooltip=WIDTH_TIP, **SIDE),
                    api.Int.Input("height", tooltip=WIDTH_TIP.replace("Width", "Height"), **SIDE)],
            outputs=[api.Image.Output("IMAGE", tooltip="The map."), api.report_output()])

    @classmethod
    def validate_inputs(cls, kind: str | None = None, depth_model: str | None = None) -> bool | str:
        return problems(depth_folder, depth_model) if kind == DEPTH else True

    @classmethod
    def fingerprint_inputs(cls, kind: str | None = None, depth_model: str | None = None, **_: Any) -> list[Any]:
        return fingerprint(depth_folder(depth_model)) if kind == DEPTH and depth_model else []

    @classmethod
    def execute(cls, image: Any, kind: str, low: float, high: float, depth_model: str, depth_range: str, invert: bool,
                resolution: int, width: int, height: int) -> Any:
        picture, notes = preprocess.at_size(image, width, height)
        near = host().nearness(depth_folder(depth_model), picture, resolution) if kind == DEPTH else None
        made, more = preprocess.map_of(picture, near, (low, high) if kind == CANNY else None, depth_range, invert)
        return api.NodeOutput(made, api.told([*notes, *more]))


def depth_folder(name: str) -> Any:
    """The folder of a depth model, by the widget's value."""
    return host().resolve_file(depth.KIND, depth.chosen(name, NONE))


class FluxKitStructure(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitStructure", display_name="Flux Structure", category=MENU,
            search_aliases=["depth", "canny", "control", "controlnet", "instruct pix to pix", "flux tools"],
            description="Makes prompts follow a depth or edge map with FLUX.1 Depth, FLUX.1 Canny or their LoRAs, "
                        "exactly as Black Forest Labs does.",
            inputs=[api.Conditioning.Input("positive", tooltip="What the picture shows."),
                    api.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE_TIP),
                    api.Vae.Input("vae", tooltip="The FLUX.1 autoencoder."),
                    api.Image.Input("map", tooltip="The map, of Structure Map or of another node."),
                    api.Model.Input("model", optional=True, tooltip=MODEL_TIP),
                    api.Combo.Input("kind", options=list(structure.KINDS), default="depth",
                                    tooltip="What the map shows, and the model was trained for."),
                    api.Float.Input("guidance", default=0.0, min=0.0, max=100.0, step=0.5, tooltip=GUIDANCE_TIP),
                    api.Int.Input("width", tooltip="Width of the picture. 0: the map's.", **SIDE),
                    api.Int.Input("height", tooltip="Height of the picture. 0: the map's.", **SIDE),
                    api.Combo.Input("fit", options=list(structure.FITS), tooltip=FIT_TIP)],
            outputs=[api.Conditioning.Output("POSITIVE", display_name="positive", tooltip="The prompt with its map."),
                     api.Conditioning.Output("NEGATIVE", display_name="negative", tooltip="The negative one with it."),
                     api.Latent.Output("LATENT", tooltip="An empty latent of the map's size, to sample."),
                     api.report_output()])

    @classmethod
    def execute(cls, positive: Any, vae: Any, map: Any, kind: str, guidance: float, width: int,
                height: int, fit: str, negative: Any = None, model: Any = None) -> Any:
        structure.check_model(None if model is None else host().img_in_width(model))
        prepared, level = structure.prepare(map, kind, width, height, fit), structure.guided(kind, guidance)
        made = structure.both(positive, negative, host().encode(vae, prepared.image)["samples"], level,
                              beside_noise=model is not None and host().drops_control(model))
        latent = host().empty_latent(*prepared.size, len(prepared.image))
        return api.NodeOutput(*made, latent, api.told(structure.report(prepared, kind, level)))
