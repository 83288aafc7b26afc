"""The node that estimates: from headers, without loading anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family import Family
from flux_kit.engine.errors import FluxKitError
from flux_kit.hosts.estimate import CARDS
from flux_kit.hosts.standalone import host as host_module
from flux_kit.hosts.standalone.host import StandaloneHost

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
