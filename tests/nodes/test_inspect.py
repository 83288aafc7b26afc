"""The node that tells what a file is, in the standalone host."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flux_kit.engine.errors import FluxKitError
from flux_kit.hosts.standalone.executor import Result
from flux_kit.hosts.standalone.host import StandaloneHost

Run = Callable[..., Result]


def report(run_prompt: Run, file: str) -> str:
    result = run_prompt({"i": ("FluxKitInspect", {"file": file})})
    text: str = result.outputs["i"][0][0]
    assert result.ui["i"] == {"text": [text]}
    return text


@pytest.mark.parametrize(("file", "words"), [
    ("diffusion_models/flux1-dev.safetensors", ("FLUX.1 dev kind", "bfl layout", "not inside: CLIP-L, T5", "memory")),
    ("text_encoders/t5xxl_fp16.safetensors", ("a T5 text encoder", "F16", "memory for weights: t5")),
    ("checkpoints/flux1-schnell-fp8.safetensors", ("all-in-one", "transformer:", "vae:", "together")),
    ("vae/elsewhere/AE.safetensors", ("autoencoder",))])
def test_the_report_is_shown_and_given_on(run_prompt: Run, file: str, words: tuple[str, ...]) -> None:
    text = report(run_prompt, file)
    assert all(word in text for word in words)
    assert text.split(":")[0].lower() == Path(file).name.lower()  # and no folder of the machine


def test_a_file_that_would_be_refused_is_told_and_runs_on(run_prompt: Run, models: Path, tmp_path: Path) -> None:
    path = models / "loras" / "cut.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((models / "vae" / "ae.safetensors").read_bytes()[:-9])
    try:
        assert "problem: cut.safetensors: incomplete download" in report(run_prompt, "loras/cut.safetensors")
    finally:
        path.unlink()


def test_names_are_checked_before_the_run(host: StandaloneHost) -> None:
    from flux_kit.nodes.inspect import FluxKitInspect

    assert FluxKitInspect.validate_inputs("vae/ae.safetensors") is True
    assert FluxKitInspect.validate_inputs(None) is True  # linked
    for name in ("vae/absent.safetensors", "../../etc/passwd", "vae/../../x", "/etc/passwd", "", "vae/\0", "nowhere"):
        answer: Any = FluxKitInspect.validate_inputs(name)
        assert isinstance(answer, str) and answer.isprintable()


def test_a_file_without_its_folder_is_found(run_prompt: Run) -> None:
    assert "a CLIP-L text encoder" in report(run_prompt, "clip_l.safetensors")


def test_it_runs_anew_when_the_file_changes(host: StandaloneHost, models: Path) -> None:
    from flux_kit.nodes.inspect import FluxKitInspect

    path = models / "vae" / "ae.safetensors"
    before = FluxKitInspect.fingerprint_inputs(file="vae/ae.safetensors")
    assert before == FluxKitInspect.fingerprint_inputs(file="vae/ae.safetensors")
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert FluxKitInspect.fingerprint_inputs(file="vae/ae.safetensors") != before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FluxKitInspect.fingerprint_inputs() == []
    with pytest.raises(FluxKitError):
        FluxKitInspect.fingerprint_inputs(file="vae/absent.safetensors")
