"""The node that tells what a file is, in a running ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest
from comfy_server import Failed, Server


def prompt(file: str) -> dict[str, Any]:
    return {"i": {"class_type": "FluxKitInspect", "inputs": {"file": file}}}


def test_every_kind_of_file_is_offered_and_told(server: Server) -> None:
    spec = server.call("/object_info/FluxKitInspect")["FluxKitInspect"]["input"]["required"]["file"]
    offered = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
    for file, words in (("diffusion_models/tiny-flux-dev.safetensors", "not inside: CLIP-L, T5"),
                        ("text_encoders/tiny-t5.safetensors", "a T5 text encoder"),
                        ("vae/tiny-ae.safetensors", "autoencoder")):
        assert file in offered
        (report,) = server.run(prompt(file))["i"]["text"]
        assert words in report and "memory for weights" in report


@pytest.mark.parametrize("file", ["vae/absent.safetensors", "../../etc/passwd"])
def test_other_names_are_refused_before_the_run(server: Server, file: str) -> None:
    with pytest.raises(Failed, match="file"):
        server.run(prompt(file))
