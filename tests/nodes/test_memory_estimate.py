"""The node that estimates: from headers, without loading anything."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from family import Family
from flux_kit.engine.errors import FluxKitError
from flux_kit.hosts.estimate import CARDS, estimate_files
from flux_kit.hosts.standalone import host as host_module
from flux_kit.hosts.standalone.host import StandaloneHost
from safetensors.torch import load_file

FILES: dict[str, Any] = {"model": "flux1-dev.safetensors", "clip_l": "clip_l.safetensors",
                         "t5": "t5xxl_fp16.safetensors", "vae": "ae.safetensors", "width": 64, "height": 48,
                         "batch_size": 2}


def test_the_report_counts_what_loading_would_take(host: StandaloneHost, family: Family, run_prompt: Any,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    result = run_prompt({"1": ("FluxKitMemoryEstimate", FILES)})
    report = result.outputs["1"][0][0]
    assert result.ui["1"] == {"text": [report]}
    size = sum(tensor.numel() for tensor in family.dev.values()) * torch.float32.itemsize
    assert f"{size / 2**20:.2f} MiB of weights (flux1-dev.safetensors)" in report
    assert "64 x 48, 2 at once" in report
    assert all(f"card of {card} GiB: all fits at once" in report for card in CARDS)


def test_an_all_in_one_file_and_a_wrong_one(run_prompt: Any) -> None:
    whole = "flux1-schnell-fp8.safetensors"
    inside = dict.fromkeys(("clip_l", "t5", "vae"), "from the model file")
    report = run_prompt({"1": ("FluxKitMemoryEstimate", {**FILES, "model": whole, **inside})}).outputs["1"][0][0]
    assert report.count(f"({whole})") == 4
    with pytest.raises(FluxKitError, match=r"holds no part of this kind.*T5"):
        run_prompt({"1": ("FluxKitMemoryEstimate", {**FILES, "t5": "clip_l.safetensors"})})


def test_loras_are_a_part_of_the_plan(host: StandaloneHost, run_prompt: Any, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    loras = lora_files.write(tmp_path / "loras")
    monkeypatch.setattr(host, "folders", replace(host.folders, models=[*host.folders.models, tmp_path]))
    rows = [{"lora": "kohya.safetensors"}, {"lora": "text.safetensors"}, {"lora": "peft.safetensors", "on": False}]
    result = run_prompt({"1": ("FluxKitMemoryEstimate", {**FILES, "loras": ["2", 1]}),
                         "2": ("FluxKitLoraStack", {"rows": json.dumps(rows)})})
    report = result.outputs["1"][0][0]
    numbers = sum(tensor.numel() for name in ("kohya", "text")
                  for tensor in load_file(loras / f"{name}.safetensors").values() if tensor.ndim)
    assert f"{4 * numbers / 2**20:.2f} MiB of these are LoRAs beside the weights (kohya.safetensors, " in report
    without = estimate_files([("transformer", host.resolve_file("diffusion_models", FILES["model"]))], width=64,
                             height=48, dtype=torch.float32)
    found = estimate_files([("transformer", host.resolve_file("diffusion_models", FILES["model"]))], width=64,
                           height=48, dtype=torch.float32, loras=[loras / "kohya.safetensors"])
    part, more = without.parts["transformer"], found.loras["kohya.safetensors"]
    assert found.parts["transformer"].total == part.total + more
    assert found.plan(None, None).peak == without.plan(None, None).peak + more
    assert found.plan(1 << 40, None).peak == without.plan(1 << 40, None).peak + more
