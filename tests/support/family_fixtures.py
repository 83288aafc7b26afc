"""Fixtures on the miniature family; a conftest takes them by `from family_fixtures import *`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench
from family import Family
from flux_kit import hosts
from flux_kit.cli import session
from flux_kit.hosts.standalone.executor import Executor, Result
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from prompts import Nodes, prompt_of

__all__ = ["bench", "family", "host", "host_before", "models", "run_prompt", "tiny_files", "tiny_models"]

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
def host_before() -> Iterator[None]:
    """The current host is put back afterwards."""
    before = hosts._current
    yield
    hosts._current = before


@pytest.fixture
def host(models: Path, tmp_path: Path, host_before: None) -> StandaloneHost:
    """A host on the miniature family, in fp32 on the CPU, made the current one."""
    (tmp_path / "input").mkdir()
    folders = Folders(models=[models], input=[tmp_path / "input"], output=tmp_path / "output", temp=tmp_path / "temp")
    made = StandaloneHost(folders, device="cpu")
    hosts.use(made)
    return made


@pytest.fixture
def bench(models: Path, tmp_path: Path, host_before: None) -> Bench:
    """With the miniature family and LoRAs of every kind in its models folder."""
    return Bench(models, tmp_path)


@pytest.fixture
def run_prompt(host: StandaloneHost) -> Callable[..., Result]:
    """Runs {id: (type, inputs)} and gives the result. `keep`: ids of nodes, with blanks between, that a keeper makes an
    output of."""
    from flux_kit.hosts.standalone import io

    class Keep(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="Keep", inputs=[io.AnyType.Input("value")], is_output_node=True)

        @classmethod
        def execute(cls, value: Any) -> io.NodeOutput:
            return io.NodeOutput()

    executor = Executor({**session.node_classes(), "Keep": Keep})

    def run(nodes: Nodes, keep: str = "") -> Result:
        kept = {f"keep {name}": ("Keep", {"value": [name, 0]}) for name in filter(None, keep.split(" "))}
        return executor.run(prompt_of({**nodes, **kept}))

    return run


def samples(result: Result, node: str, slot: int = 0) -> torch.Tensor:
    """The latent that a node gave."""
    latent: torch.Tensor = result.outputs[node][slot][0]["samples"]
    return latent
