"""Real ComfyUI hosts, from COMFYUI_PATH (several: os.pathsep between). COMFYUI_PYTHON names the interpreter of each, in
step; without it the one that runs the tests. Without COMFYUI_PATH the tests skip and say so."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from comfy_server import Failed, Host, Server, environment
from flux_kit.cli import session
from flux_kit.hosts.standalone import io
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from prompts import core, core_loader

ROOT = Path(__file__).parents[3]
INSIDE = Path(__file__).parent / "inside.py"
INSIDE_TIMEOUT = 900


def hosts() -> list[Host]:
    paths = [Path(path) for path in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if path]
    pythons = os.environ.get("COMFYUI_PYTHON", "").split(os.pathsep)
    pythons = pythons if any(pythons) else [sys.executable] * len(paths)
    if len(pythons) != len(paths):
        raise pytest.UsageError(f"COMFYUI_PYTHON names {len(pythons)} interpreters for {len(paths)} COMFYUI_PATH")
    return [Host(path, python) for path, python in zip(paths, pythons, strict=True)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", action="store_true", help="print which core nodes work in each ComfyUI, and why not")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--table", default=False):
        spec = importlib.util.spec_from_file_location("flux_kit_table", Path(__file__).parent / "table.py")
        assert spec is not None and spec.loader is not None
        table = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(table)
        columns = {host.path.name: table.version_of(host.path) for host in hosts()}
        config.pluginmanager.register(table.Table(columns), "flux-kit-table")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "comfy" in metafunc.fixturenames:
        found = hosts() or [pytest.param(None, marks=pytest.mark.skip(reason="COMFYUI_PATH names no ComfyUI"))]
        metafunc.parametrize("comfy", found, ids=lambda host: "" if host is None else host.path.name, scope="session")


@pytest.fixture(scope="session")
def comfy(request: pytest.FixtureRequest) -> Host:
    host: Host = request.param
    return host


@pytest.fixture(scope="session")
def server(comfy: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The host's server with the pack, and the stand-ins for other packs, linked into a fresh base folder; stopped in
    the end. `base/elsewhere` holds models too, by an extra_model_paths.yaml."""
    base = tmp_path_factory.mktemp("base")
    (base / "custom_nodes").mkdir()
    for name, folder in (("flux-kit", ROOT), ("stand-ins", Path(__file__).parent / "stand_ins")):
        (base / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)
    (base / "extra_model_paths.yaml").write_text(
        "elsewhere:\n  base_path: elsewhere\n  diffusion_models: unets\n  text_encoders: |\n    encoders\n    more\n"
        "  vae: autoencoders\n")
    started = Server(comfy, base, "--extra-model-paths-config", str(base / "extra_model_paths.yaml"))
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def core_can_load(server: Server) -> bool:
    """Whether core's own loader takes the tiny transformer; where sizes are not inferred (0.3.64) it does not."""
    try:
        server.latents(core_loader(core(steps=1)))
    except Failed as failed:
        assert "size mismatch" in str(failed)
        return False
    return True


@cache
def findings(host: Host) -> dict[str, Any]:
    """What inside.py found in a process of this host, by the name of the check."""
    done = subprocess.run([host.python, str(INSIDE), str(host.path), str(ROOT)], env=environment(), text=True,
                          capture_output=True, timeout=INSIDE_TIMEOUT, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


@pytest.fixture
def inside(comfy: Host) -> dict[str, Any]:
    return findings(comfy)


@pytest.fixture(scope="session")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs an API prompt in the standalone host; returns what its SaveLatent nodes were given, by prefix."""
    host = StandaloneHost(Folders(models=[session.TINY_MODELS], output=tmp_path_factory.mktemp("out")), device="cpu",
                          dtype="fp32")
    session.hosts.use(host)
    kept: dict[str, Any] = {}

    class SaveLatent(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="SaveLatent", display_name="Save Latent", category="tests", is_output_node=True,
                             inputs=[io.Latent.Input("samples"), io.String.Input("filename_prefix")], outputs=[])

        @classmethod
        def execute(cls, samples: Any, filename_prefix: str) -> Any:
            kept[filename_prefix] = samples["samples"]
            return io.NodeOutput()

    nodes = {**session.node_classes(), "SaveLatent": SaveLatent}

    def run(prompt: dict[str, Any]) -> dict[str, Any]:
        kept.clear()
        session.hosts.use(host)
        Executor(nodes).run(prompt, {})
        return dict(kept)

    return run
