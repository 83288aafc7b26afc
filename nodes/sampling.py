"""Nodes that make latents: empty ones, and pictures out of noise."""

from __future__ import annotations

from typing import Any

from ..engine.sampling import SCHEDULES, SOLVERS
from ..hosts.names import problems
from . import api
from .api import host
from .sizes import ASPECTS, CUSTOM, GRID, MAX_SIDE, MIN_SIDE, check_side, picture_size

KEEP_STEPS, SKIP_STEPS = "keep steps (ComfyUI)", "skip steps (diffusers)"


SIDE: dict[str, Any] = {"default": 1024, "min": MIN_SIDE, "max": MAX_SIDE, "step": GRID}
SIDE_TIP = "in pixels, a multiple of 16. Used when the aspect is custom."


class FluxKitEmptyLatent(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitEmptyLatent", display_name="Empty Flux Latent", category="Flux Kit/Latent",
            search_aliases=["empty latent image", "resolution", "aspect ratio", "picture size", "width height"],
            description="The size of the picture: an aspect and megapixels, or width and height.",
            inputs=[api.Combo.Input("aspect", options=list(ASPECTS), default=CUSTOM,
                                    tooltip="Width : height. custom: the sizes below."),
                    api.Float.Input("megapixels", default=1.0, min=0.01, max=64.0, step=0.05,
                                    tooltip="Area for an aspect, in units of 1024 x 1024. FLUX.1 knows 0.1 to 2."),
                    api.Int.Input("width", tooltip=f"Width {SIDE_TIP}", **SIDE),
                    api.Int.Input("height", tooltip=f"Height {SIDE_TIP}", **SIDE),
                    api.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures made at once.")],
            outputs=[api.Latent.Output("LATENT", tooltip="An empty latent, for a sampler."),
                     api.Int.Output("picture_width", display_name="picture_width",
                                    tooltip="Width of the picture in pixels."),
                     api.Int.Output("picture_height", display_name="picture_height",
                                    tooltip="Height of the picture in pixels.")])

    @classmethod
    def validate_inputs(cls, aspect: str | None = None, width: int | None = None,
                        height: int | None = None) -> bool | str:
        if aspect is not None and aspect not in list(ASPECTS):  # a list: anything can stand in a workflow
            return f"aspect '{aspect}' is not one of {', '.join(ASPECTS)}"
        for name, value in (("width", width), ("height", height)):
            answer = problems(check_side, name, value) if aspect == CUSTOM else True
            if answer is not True:
                return answer
        return True

    @classmethod
    def execute(cls, aspect: str, megapixels: float, width: int, height: int, batch_size: int) -> Any:
        width, height = picture_size(aspect, megapixels, width, height)
        return api.NodeOutput(host().empty_latent(width, height, batch_size), width, height)


SHARE: dict[str, Any] = {"min": 0.0, "max": 1.0, "step": 0.01}
SEED_TIP = "Picks the noise. The same seed gives the same picture, as in ComfyUI."
CFG_TIP = ("Classifier-free guidance with the negative prompt; twice the time. 1: off, as FLUX.1 is meant to be run.")
SCHEDULE_TIP = ("How noise levels are spaced. bfl: by the size of the picture, as Black Forest Labs does. simple: "
                "ComfyUI's usual one.")
DENOISE_TIP = "Below 1 a given picture shows through: 0.6 changes it by 60 %."
MEANING_TIP = ("With denoise 0.5 and 20 steps: 20 small steps over the last half (ComfyUI), or the last 10 of 20 steps "
               "(strength in diffusers).")


class FluxKitSampler(api.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return api.Schema(
            node_id="FluxKitSampler", display_name="Flux Sampler", category="Flux Kit/Sampling",
            search_aliases=["ksampler", "sampling", "denoise", "steps", "seed"],
            description="Makes a latent out of noise, or out of a given latent and noise, step by step.",
            inputs=[
                api.Model.Input("model", tooltip="The transformer."),
                api.Conditioning.Input("positive", tooltip="What the picture shows."),
                api.Latent.Input("latent", tooltip="An empty latent, or an encoded picture to start from."),
                api.Conditioning.Input("negative", optional=True, tooltip="What to keep out. Used when cfg is not 1."),
                api.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip=SEED_TIP),
                api.Int.Input("steps", default=20, min=1, max=10000, tooltip="20 or more for dev, 4 for schnell."),
                api.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, tooltip=CFG_TIP),
                api.Combo.Input("solver", options=list(SOLVERS), default="euler", tooltip="How a step is made."),
                api.Combo.Input("schedule", options=list(SCHEDULES), default="bfl", tooltip=SCHEDULE_TIP),
                api.Float.Input("denoise", default=1.0, **SHARE, tooltip=DENOISE_TIP),
                api.Combo.Input("denoise_meaning", options=[KEEP_STEPS, SKIP_STEPS], default=KEEP_STEPS,
                                tooltip=MEANING_TIP),
                api.Float.Input("cfg_start", default=0.0, **SHARE, tooltip="cfg is used from this share of steps on."),
                api.Float.Input("cfg_end", default=1.0, **SHARE, tooltip="cfg is used up to this share of the steps.")],
            outputs=[api.Latent.Output("LATENT", tooltip="The finished latent, for Decode.")])

    @classmethod
    def execute(cls, model: Any, positive: Any, latent: Any, seed: int, steps: int, cfg: float, solver: str,
                schedule: str, denoise: float, denoise_meaning: str, cfg_start: float, cfg_end: float,
                negative: Any = None) -> Any:
        meaning = api.choice("denoise_meaning", denoise_meaning, (KEEP_STEPS, SKIP_STEPS))
        amount = {"denoise" if meaning == KEEP_STEPS else "strength": denoise}
        return api.NodeOutput(host().sample(
            model, positive, negative, latent, seed=seed, steps=steps, cfg=cfg, solver=solver, schedule=schedule,
            cfg_window=(cfg_start, cfg_end), **amount))
