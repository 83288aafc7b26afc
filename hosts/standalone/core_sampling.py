"""Equivalents of ComfyUI's core sampling nodes: same ids, sockets and widget order.

Solvers and schedules are those of the engine's tables; a workflow that asks for another one is refused before it runs,
with the list of what there is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...engine.sampling import SCHEDULES, SOLVERS, FlowTable, cut_sigmas, make_sigmas, mu_for_seq_len
from . import io, objects
from .host import here

SEED: dict[str, Any] = {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}
STEPS: dict[str, Any] = {"default": 20, "min": 1, "max": 10000}
CFG: dict[str, Any] = {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
TOKEN_AREA = 16 * 16  # pixels of an image token
TABLE_ENTRIES = 10_000  # of a shifted table in ComfyUI
DENOISE: dict[str, Any] = {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}
# What of the engine's tables ComfyUI has under the same name; the rest is offered by our own sampler node only, so that
# a workflow of core nodes made here also runs there
CORE_SOLVERS = [name for name in SOLVERS if name in {
    "euler", "euler_ancestral", "heun", "dpmpp_2m", "uni_pc", "deis", "ipndm", "res_multistep"}]
CORE_SCHEDULES = [name for name in SCHEDULES if name in {"simple", "sgm_uniform", "beta", "normal"}]


def _solver() -> io.Input:
    return io.Combo.Input("sampler_name", options=CORE_SOLVERS, tooltip="How a step is made.")


def _scheduler() -> io.Input:
    return io.Combo.Input("scheduler", options=CORE_SCHEDULES, tooltip="How noise levels are spaced.")


class KSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSampler", display_name="KSampler", category="sampling",
            inputs=[io.Model.Input("model"), io.Int.Input("seed", **SEED), io.Int.Input("steps", **STEPS),
                    io.Float.Input("cfg", **CFG), _solver(), _scheduler(), io.Conditioning.Input("positive"),
                    io.Conditioning.Input("negative"), io.Latent.Input("latent_image"),
                    io.Float.Input("denoise", **DENOISE)],
            outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, model: objects.Model, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str,
                positive: Any, negative: Any, latent_image: dict[str, Any], denoise: float = 1.0) -> io.NodeOutput:
        sigmas = objects.schedule_sigmas(model, scheduler, steps, solver=sampler_name, denoise=denoise)
        guider = objects.Guider(model, positive, negative, cfg)
        return io.NodeOutput(here().run_sampler(guider, objects.Noise(seed), sampler_name, sigmas, latent_image).latent)


class KSamplerAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSamplerAdvanced", display_name="KSampler (Advanced)", category="sampling",
            inputs=[io.Model.Input("model"), io.Combo.Input("add_noise", options=["enable", "disable"]),
                    io.Int.Input("noise_seed", **SEED), io.Int.Input("steps", **STEPS), io.Float.Input("cfg", **CFG),
                    _solver(), _scheduler(), io.Conditioning.Input("positive"), io.Conditioning.Input("negative"),
                    io.Latent.Input("latent_image"),
                    io.Int.Input("start_at_step", default=0, min=0, max=10000),
                    io.Int.Input("end_at_step", default=10000, min=0, max=10000),
                    io.Combo.Input("return_with_leftover_noise", options=["disable", "enable"])],
            outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, model: objects.Model, add_noise: str, noise_seed: int, steps: int, cfg: float, sampler_name: str,
                scheduler: str, positive: Any, negative: Any, latent_image: dict[str, Any], start_at_step: int,
                end_at_step: int, return_with_leftover_noise: str) -> io.NodeOutput:
        sigmas = objects.schedule_sigmas(model, scheduler, steps, solver=sampler_name)
        sigmas = cut_sigmas(sigmas, start_at_step=start_at_step, end_at_step=end_at_step,
                            leftover_noise=return_with_leftover_noise == "enable")
        guider = objects.Guider(model, positive, negative, cfg)
        noise = objects.Noise(noise_seed if add_noise == "enable" else None)
        return io.NodeOutput(here().run_sampler(guider, noise, sampler_name, sigmas, latent_image).latent)


class KSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="KSamplerSelect", display_name="KSamplerSelect",
                         category="sampling/custom_sampling/samplers", inputs=[_solver()],
                         outputs=[io.Sampler.Output()])

    @classmethod
    def execute(cls, sampler_name: str) -> io.NodeOutput:
        return io.NodeOutput(sampler_name)


class BasicScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="BasicScheduler", display_name="BasicScheduler",
                         category="sampling/custom_sampling/schedulers",
                         inputs=[io.Model.Input("model"), _scheduler(), io.Int.Input("steps", **STEPS),
                                 io.Float.Input("denoise", **DENOISE)],
                         outputs=[io.Sigmas.Output()])

    @classmethod
    def execute(cls, model: objects.Model, scheduler: str, steps: int, denoise: float) -> io.NodeOutput:
        return io.NodeOutput(make_sigmas(scheduler, steps, table=model.table, denoise=denoise))


class BasicGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="BasicGuider", display_name="BasicGuider", category="sampling/custom_sampling/guiders",
                         inputs=[io.Model.Input("model"), io.Conditioning.Input("conditioning")],
                         outputs=[io.Guider.Output()])

    @classmethod
    def execute(cls, model: objects.Model, conditioning: Any) -> io.NodeOutput:
        return io.NodeOutput(objects.Guider(model, conditioning))


class CFGGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="CFGGuider", display_name="CFGGuider", category="sampling/custom_sampling/guiders",
                         inputs=[io.Model.Input("model"), io.Conditioning.Input("positive"),
                                 io.Conditioning.Input("negative"), io.Float.Input("cfg", **CFG)],
                         outputs=[io.Guider.Output()])

    @classmethod
    def execute(cls, model: objects.Model, positive: Any, negative: Any, cfg: float) -> io.NodeOutput:
        return io.NodeOutput(objects.Guider(model, positive, negative, cfg))


class RandomNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="RandomNoise", display_name="RandomNoise", category="sampling/custom_sampling/noise",
                         inputs=[io.Int.Input("noise_seed", **SEED)], outputs=[io.Noise.Output()])

    @classmethod
    def execute(cls, noise_seed: int) -> io.NodeOutput:
        return io.NodeOutput(objects.Noise(noise_seed))


class DisableNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="DisableNoise", display_name="DisableNoise", category="sampling/custom_sampling/noise",
                         inputs=[], outputs=[io.Noise.Output()])

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(objects.Noise(None))


class SamplerCustomAdvanced(io.ComfyNode):
    """Both outputs: the latent at the last sigma, and the model's last guess of the clean latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="SamplerCustomAdvanced", display_name="SamplerCustomAdvanced",
                         category="sampling/custom_sampling",
                         inputs=[io.Noise.Input("noise"), io.Guider.Input("guider"), io.Sampler.Input("sampler"),
                                 io.Sigmas.Input("sigmas"), io.Latent.Input("latent_image")],
                         outputs=[io.Latent.Output("output", display_name="output"),
                                  io.Latent.Output("denoised_output", display_name="denoised_output")])

    @classmethod
    def execute(cls, noise: objects.Noise, guider: objects.Guider, sampler: str, sigmas: Any,
                latent_image: dict[str, Any]) -> io.NodeOutput:
        result = here().run_sampler(guider, noise, sampler, sigmas, latent_image)
        return io.NodeOutput(result.latent, result.denoised)


class ModelSamplingFlux(io.ComfyNode):
    """A copy of the model whose sigmas are shifted for a picture size: BFL's line through (256 tokens, base) and
    (4096 tokens, max)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shift: dict[str, Any] = {"min": 0.0, "max": 100.0, "step": 0.01}
        size: dict[str, Any] = {"default": 1024, "min": 16, "max": 16384, "step": 8}
        return io.Schema(node_id="ModelSamplingFlux", display_name="ModelSamplingFlux", category="advanced/model",
                         inputs=[io.Model.Input("model"), io.Float.Input("max_shift", default=1.15, **shift),
                                 io.Float.Input("base_shift", default=0.5, **shift), io.Int.Input("width", **size),
                                 io.Int.Input("height", **size)],
                         outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model: objects.Model, max_shift: float, base_shift: float, width: int,
                height: int) -> io.NodeOutput:
        mu = mu_for_seq_len(width * height / TOKEN_AREA, base_mu=base_shift, max_mu=max_shift)
        return io.NodeOutput(replace(model, table=FlowTable(mu=mu, entries=TABLE_ENTRIES)))


SAMPLING_NODES: list[type[io.ComfyNode]] = [
    KSampler, KSamplerAdvanced, KSamplerSelect, BasicScheduler, BasicGuider, CFGGuider, RandomNoise, DisableNoise,
    SamplerCustomAdvanced, ModelSamplingFlux]
