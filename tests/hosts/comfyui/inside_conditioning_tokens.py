"""Checks of inside.py: Redux with references and the automatic shift, on our models and on core's. Imported by it."""

from __future__ import annotations

import importlib
import math
from typing import Any

import comfy.clip_vision
import comfy.model_patcher
import comfy.samplers
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from inside import ENGINE, HOST, MODEL, TINY, D, check, conditioning, core_patcher, random, relative, sampled
from inside import NAME as PACKAGE
from inside_vision import SMALL_REDUX, VISION, core_style, file_of

import nodes as core_nodes

KONTEXT = importlib.import_module(ENGINE + ".conditioning.kontext")
REDUX = importlib.import_module(ENGINE + ".conditioning.redux")
SHIFT = importlib.import_module(PACKAGE + ".nodes.shift").FluxKitAutoShift


def latent(tokens: int) -> dict[str, Any]:
    side = 2 * math.isqrt(tokens)
    return {"samples": torch.zeros(1, 16, side, side)}


def shifted(model: Any, tokens: int = 4096) -> Any:
    return SHIFT.execute(model, latent(tokens), 0.5, 1.15).args[0]


def sigmas(model: Any) -> torch.Tensor:
    made: torch.Tensor = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 20)
    return made


def published(tokens: int) -> torch.Tensor:
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    t = torch.linspace(1, 0, 21)
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1))


@check
def auto_shift() -> Any:
    """Sigmas of "simple" against the published formula and against core's node; what is left as it is."""
    ours = HOST.load_model(MODEL)
    models = {"ours": ours, "core's": core_patcher(ours)}
    before = sigmas(ours)
    far = {name: {str(tokens): float((sigmas(shifted(model, tokens)) - published(tokens)).abs().max())
                  for tokens in (1024, 4096, 8100, 16384)} for name, model in models.items()}
    core = {name: float((sigmas(shifted(model, 1024)) - sigmas(ModelSamplingFlux().patch(
        model, 1.15, 0.5, 512, 512)[0])).abs().max()) for name, model in models.items()}
    schnell = HOST.load_model(TINY / "diffusion_models" / "tiny-flux-schnell.safetensors")
    other = comfy.model_patcher.ModelPatcher(torch.nn.Identity(), torch.device("cpu"), torch.device("cpu"))
    told: list[str] = []
    show, HOST.show = HOST.show, told.append
    try:
        kept = shifted(other) is other
    finally:
        HOST.show = show
    return {"far from BFL": far, "far from ModelSamplingFlux": core, "schnell stays": shifted(schnell) is schnell,
            "given model is as it was": torch.equal(sigmas(ours), before),
            "twice is once": torch.equal(sigmas(shifted(shifted(ours, 1024), 1024)), sigmas(shifted(ours, 1024))),
            "another family stays": kept, "told": told[0]}


def styled(prompt: Any, tokens: torch.Tensor, strength: float, latents: torch.Tensor | None = None) -> Any:
    return REDUX.restyled(prompt, torch.zeros(1, 8, 8, 3), lambda pictures, crop: tokens, lambda states: states,
                          REDUX.Settings(strength), latents=latents)[0]


@check
def redux_with_references() -> Any:
    """Core's network with our masks against ours, Redux before and behind Kontext."""
    ours = HOST.load_model(MODEL)
    core, prompt = core_patcher(ours), conditioning()
    tokens, first = random(1, 9, prompt[0][0].shape[-1], size=0.3), random(1, 16, 10, 14)
    sampled_at = torch.zeros(1, 16, 12, 16)

    def edit(start: Any) -> Any:
        return KONTEXT.edited(start, [torch.zeros(1, 80, 112, 3)], lambda image: first,
                              lambda *_: {"samples": sampled_at}, KONTEXT.Settings("keep-16")).positive

    off, made = {}, {}
    for strength in (1e-30, 0.3, 2.0):
        for name, prompts in (("before", edit(styled(prompt, tokens, strength))),
                              ("behind", styled(edit(prompt), tokens, strength, sampled_at))):
            made[strength] = sampled(core, prompts, steps=1)
            off[f"{strength} {name}"] = relative(sampled(ours, prompts, steps=1), made[strength])
    alone = sampled(core, edit(prompt), steps=1)
    _, state = file_of(VISION.Redux, SMALL_REDUX, "reference_redux.safetensors")
    output = comfy.clip_vision.Output()
    output["last_hidden_state"] = random(1, 9, D)
    theirs = core_nodes.StyleModelApply().apply_stylemodel(
        edit(prompt), core_style(SMALL_REDUX, state), output, 0.3, "attn_bias")[0]
    try:
        crash = str(sampled(core, theirs, steps=1).shape)
    except RuntimeError as error:
        crash = f"RuntimeError: {error}"
    return {"off": off, "nearly off": relative(made[1e-30], alone), "redux shows": relative(made[0.3], alone),
            "core's nodes": crash}
