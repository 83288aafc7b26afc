"""The nodes round LoRAs, run by the executor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from compare import relative
from family_fixtures import samples
from flux_kit.engine.errors import BadInput, FluxKitError
from flux_kit.hosts.standalone.host import StandaloneHost
from prompts import LOAD, sampler

STACK = {"stack": ("FluxKitLoraStack", {"rows": json.dumps([{"lora": "kohya.safetensors", "model": 0.7}])})}


@pytest.fixture(autouse=True)
def files(models: Path) -> None:
    lora_files.write(models / "loras")


def apply(loras: list[Any], **more: Any) -> tuple[str, dict[str, Any]]:
    return "FluxKitLoraApply", {"model": ["load", 0], "loras": loras, "mode": "auto", "on_problem": "strict", **more}


def test_a_chain_of_all_of_them(run_prompt: Callable[..., Any], host: StandaloneHost) -> None:
    nodes = {
        **LOAD, **STACK,
        "blocks": ("FluxKitLoraBlockWeights", {"loras": ["stack", 1], "blocks": "double = 1"}),
        "schedule": ("FluxKitLoraSchedule", {"loras": ["blocks", 0], "start": 0.0, "end": 1.0, "curve": "0: 1"}),
        "apply": apply(["schedule", 0], clip=["load", 1]), "plain": apply(["stack", 1]), "stack2": apply(["stack", 0]),
        "a": sampler(model=["apply", 0]), "b": sampler(model=["plain", 0]), "c": sampler(),
        "d": sampler(model=["stack2", 0])}
    result = run_prompt(nodes, keep="a b c d")
    assert relative(samples(result, "a"), samples(result, "b")) < 2e-6
    assert torch.equal(samples(result, "b"), samples(result, "d"))
    assert relative(samples(result, "b"), samples(result, "c")) > 1e-3
    report = result.outputs["apply"][2][0]
    assert "kohya LoRA" in report and "scheduled" in report and "side path" in report


def test_choices_that_a_host_did_not_check(host: StandaloneHost, models: Path) -> None:
    """ComfyUI 0.3.64 checks none of the widgets with options."""
    from flux_kit.nodes.lora import FluxKitLoraApply
    from flux_kit.nodes.lora_files import FluxKitLoraSave
    from flux_kit.nodes.sampling import FluxKitSampler
    rows = [("kohya.safetensors", 1.0, 1.0)]
    for says, node, values in (
            ("mode 'fast' is not one of auto, side path, merge", FluxKitLoraApply, (None, rows, "fast", "strict")),
            ("on_problem 'ask' is not one of strict, warn", FluxKitLoraApply, (None, rows, "auto", "ask")),
            ("layout '' is not one of kohya, peft", FluxKitLoraSave, (rows, "new", "", 0, "same", "none")),
            ("dtype 'int3' is not one of same, ", FluxKitLoraSave, (rows, "new", "kohya", 0, "int3", "none")),
            ("denoise_meaning 'both' is not one of keep", FluxKitSampler,
             (None, None, None, 0, 1, 1.0, "euler", "bfl", 0.5, "both", 0.0, 1.0))):
        with pytest.raises(BadInput, match=says):
            node.execute(*values)
    assert not list((models / "loras").glob("new*"))


def test_a_region(run_prompt: Callable[..., Any], host: StandaloneHost) -> None:
    from flux_kit.nodes.lora import FluxKitLoraRegion
    rows = FluxKitLoraRegion.execute([("kohya.safetensors", 0.7, 0.7)], torch.zeros(1, 48, 64), 4, 0.5, 0.25)[0]
    assert (rows[0].region.background, rows[0].region.text) == (0.5, 0.25) and rows[0].region.mask.shape == (48, 64)


def test_a_sweep_runs_what_follows_for_each_strength(run_prompt: Callable[..., Any], host: StandaloneHost) -> None:
    nodes = {**LOAD, **STACK, "sweep": ("FluxKitLoraSweep", {"loras": ["stack", 1], "strengths": "0, 0.7", "row": 0}),
             "apply": apply(["sweep", 0]), "a": sampler(model=["apply", 0]), "base": sampler(),
             "one": apply(["stack", 1]), "b": sampler(model=["one", 0])}
    result = run_prompt(nodes, keep="a b base sweep")
    assert result.outputs["sweep"][1] == ["kohya 0", "kohya 0.7"]
    first, second = (latent["samples"] for latent in result.outputs["a"][0])
    assert torch.equal(first, samples(result, "base")) and torch.equal(second, samples(result, "b"))


def test_two_sweeps_make_a_grid(run_prompt: Callable[..., Any], host: StandaloneHost) -> None:
    rows = [{"lora": "kohya.safetensors"}, {"lora": "peft.safetensors"}]
    nodes = {"stack": ("FluxKitLoraStack", {"rows": json.dumps(rows)}),
             "x": ("FluxKitLoraSweep", {"loras": ["stack", 1], "strengths": "0, 1", "row": 1}),
             "y": ("FluxKitLoraSweep", {"loras": ["x", 0], "strengths": "2, 3", "row": 2, "label": ["x", 1]})}
    result = run_prompt(nodes, keep="y")
    stacks, labels = result.outputs["y"]
    assert labels == ["kohya 0, peft 2", "kohya 0, peft 3", "kohya 1, peft 2", "kohya 1, peft 3"]
    assert [tuple(row.model for row in stack) for stack in stacks] == [(0, 2), (0, 3), (1, 2), (1, 3)]


def test_inspect(run_prompt: Callable[..., Any], host: StandaloneHost) -> None:
    nodes = {**LOAD, "info": ("FluxKitLoraInspect", {"lora": "kohya.safetensors", "model": ["load", 0]}),
             "bad": ("FluxKitLoraInspect", {"lora": "bad nan.safetensors"}),
             "other": ("FluxKitLoraInspect", {"lora": "bad sdxl.safetensors"})}
    result = run_prompt(nodes)
    report, _, metadata = (output[0] for output in result.outputs["info"])
    told = json.loads(metadata)
    assert (told["format"], told["rank"], told["alpha"], told["matched"], told["unmatched"]) == ("kohya", 4, 2.0, 15, 0)
    assert 0 < told["share"]["total"] < 10 and len(told["share"]["layers"]) == 5
    assert "format kohya, rank 4, alpha 2, effective scale 0.5" in report and "% of their length" in report
    assert "NaN" in result.outputs["bad"][0][0] and "SDXL" in result.outputs["other"][0][0]


def test_bad_texts_are_told_before_the_run(run_prompt: Callable[..., Any], host: StandaloneHost) -> None:
    for node, values, says in (("FluxKitLoraBlockWeights", {"blocks": "doubble = 1"}, "doubble"),
                               ("FluxKitLoraSchedule", {"start": 0.0, "end": 1.0, "curve": "0 1"}, "schedule"),
                               ("FluxKitLoraSchedule", {"start": 0.6, "end": 0.5, "curve": ""}, "behind")):
        with pytest.raises(FluxKitError, match=says):
            run_prompt({**STACK, "node": (node, {"loras": ["stack", 1], **values})}, keep="node")
    with pytest.raises(FluxKitError, match="near"):
        run_prompt({"info": ("FluxKitLoraInspect", {"lora": "kohia.safetensors"})})


def test_strict_and_warn(run_prompt: Callable[..., Any], host: StandaloneHost) -> None:
    stack = {"stack": ("FluxKitLoraStack", {"rows": json.dumps([{"lora": "bad sdxl.safetensors"}])})}
    with pytest.raises(FluxKitError, match="SDXL"):
        run_prompt({**LOAD, **stack, "apply": apply(["stack", 1])}, keep="apply")
    result = run_prompt({**LOAD, **stack, "apply": apply(["stack", 1], on_problem="warn")}, keep="apply")
    assert "NOT APPLIED" in result.outputs["apply"][2][0]


def test_what_is_no_stack(host: StandaloneHost) -> None:
    from flux_kit.nodes.lora import FluxKitLoraApply
    with pytest.raises(BadInput, match="LORA_STACK"):
        FluxKitLoraApply.execute(None, [("a", 1.0)], "auto", "strict")
