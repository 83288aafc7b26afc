"""Fixtures on the miniature family; a conftest takes them by `from family_fixtures import *`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family import Family
from flux_kit import hosts
from flux_kit.cli import session
from flux_kit.hosts.standalone.executor import Executor, Result
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost

__all__ = ["family", "host", "models", "run_prompt", "tiny_files", "tiny_models"]

NAMES = {"dev": "flux1-dev.safetensors", "schnell": "flux1-schnell.safetensors", "t5": "t5xxl_fp16.safetensors",
         "clip_l": "clip_l.safetensors", "vae": "ae.safetensors", "all-in-one": "flux1-schnell-fp8.safetensors"}
TINY_NAMES = {"dev": "tiny-flux-dev.safetensors", "schnell": "tiny-flux-schnell.safetensors",
              "t5": "tiny-t5.safetensors", "clip_l": "tiny-clip_l.safetensors", "vae": "tiny-ae.safetensors"}


@pytest.fixture(scope="session")
def family() -> Family:
    return Family()


@pytest.fixture(scope="session")
def models(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the miniature family under the names of the real one."""
    return family.write(tmp_path_factory.mktemp("models"), NAMES)


@pytest.fixture(scope="session")
def tiny_files(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.write(tmp_path_factory.mktemp("tiny"), TINY_NAMES)


@pytest.fixture
def tiny_models(tiny_files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The miniature family in the place of the built-in one, for tests that do not ask what pictures show."""
    monkeypatch.setattr(session, "TINY_MODELS", tiny_files)
    return tiny_files


@pytest.fixture
def host(models: Path, tmp_path: Path) -> Iterator[StandaloneHost]:
    """A host on the miniature family, in fp32 on the CPU, made the current one."""
    (tmp_path / "input").mkdir()
    folders = Folders(models=[models], input=[tmp_path / "input"], output=tmp_path / "output", temp=tmp_path / "temp")
    made = StandaloneHost(folders, device="cpu")
    before = hosts._current
    hosts.use(made)
    yield made
    hosts._current = before


@pytest.fixture
def run_prompt(host: StandaloneHost) -> Callable[[dict[str, tuple[str, dict[str, Any]]]], Result]:
    """Runs {id: (type, inputs)} and gives the result; every node that is no parent becomes an output by a keeper."""
    from flux_kit.hosts.standalone import io

    class Keep(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="Keep", inputs=[io.AnyType.Input("value")], is_output_node=True)

        @classmethod
        def execute(cls, value: Any) -> io.NodeOutput:
            return io.NodeOutput()

    executor = Executor({**session.node_classes(), "Keep": Keep})

    def run(nodes: dict[str, tuple[str, dict[str, Any]]], keep: str = "") -> Result:
        prompt = {id_: {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
                  for id_, (kind, inputs) in nodes.items()}
        for name in filter(None, keep.split(" ")):
            prompt[f"keep {name}"] = {"class_type": "Keep", "inputs": {"value": [name, 0]}, "_meta": {"title": "Keep"}}
        return executor.run(prompt)

    return run


def samples(result: Result, node: str, slot: int = 0) -> torch.Tensor:
    """The latent that a node gave."""
    latent: torch.Tensor = result.outputs[node][slot][0]["samples"]
    return latent
