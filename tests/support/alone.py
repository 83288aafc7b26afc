"""The standalone host on tiny-flux, in fp32 on the CPU: what a ComfyUI on the same prompt is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flux_kit.cli import session
from flux_kit.hosts.standalone import io
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from prompts import Prompt
from torch import Tensor


def tiny_host(output: Path, *models: Path, inputs: Sequence[Path] = ()) -> StandaloneHost:
    """With what lies in `models`, folders as ComfyUI has them, besides tiny-flux."""
    folders = Folders(models=[session.TINY_MODELS, *models], input=inputs, output=output)
    return StandaloneHost(folders, device="cpu", dtype="fp32")


class Alone:
    """Runs prompts in a host of its own."""

    def __init__(self, host: StandaloneHost) -> None:
        self.host = host

    def latents(self, prompt: Prompt) -> dict[str, Tensor]:
        """What the SaveLatent nodes of a prompt are given, by prefix."""
        kept: dict[str, Tensor] = {}

        class SaveLatent(io.ComfyNode):
            """ComfyUI's, which `flux-kit run` has not."""

            @classmethod
            def define_schema(cls) -> io.Schema:
                return io.Schema(node_id="SaveLatent", is_output_node=True, outputs=[],
                                 inputs=[io.Latent.Input("samples"), io.String.Input("filename_prefix")])

            @classmethod
            def execute(cls, samples: Any, filename_prefix: str) -> Any:
                kept[filename_prefix] = samples["samples"]
                return io.NodeOutput()

        session.hosts.use(self.host)
        Executor({**session.node_classes(), "SaveLatent": SaveLatent}).run(prompt, {})
        return kept
