"""Real ComfyUI hosts, from COMFYUI_PATH (several: os.pathsep between). COMFYUI_PYTHON names the interpreter of each, in
step; without it the one that runs the tests. Without COMFYUI_PATH the tests skip and say so."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from alone import Alone, tiny_host
from comfy_inside import Inside, inside_of
from comfy_server import Failed, Host, Server
from family import random_weights
from flux_kit.cli import session
from flux_kit.engine.models.vision import Redux, SiglipVision
from flux_kit.engine.specs import REDUX, SIGLIP
from PIL import Image
from prompts import Prompt, core, core_loader
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[3]


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


@pytest.fixture(scope="session")
def inside(comfy: Host) -> Inside:
    return inside_of(comfy)


@pytest.fixture(scope="session")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Prompt], dict[str, Tensor]]:
    """The latents of a prompt in the standalone host, by prefix. That host is then the current one."""
    host = tiny_host(tmp_path_factory.mktemp("out"))
    session.hosts.use(host)
    return Alone(host).latents


# -- Redux

@pytest.fixture(scope="session")
def redux_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision encoder, a Redux of tiny-flux's width, and pictures."""
    folder = tmp_path_factory.mktemp("redux")
    sizes = replace(SIGLIP, hidden_size=128, num_attention_heads=2, intermediate_size=200, num_hidden_layers=2,
                    image_size=56)
    models = {"clip_vision/siglip": SiglipVision(sizes),
              "style_models/redux": Redux(replace(REDUX, redux_dim=128, txt_in_features=64))}
    for seed, (name, model) in enumerate(models.items(), start=1):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir()
        save_file(random_weights(model, seed), path)
    (folder / "input").mkdir()
    draw = np.random.default_rng(3)
    for name, sides in (("wide.png", (112, 128, 3)), ("small.png", (60, 90, 3))):
        Image.fromarray(draw.integers(0, 255, sides, dtype=np.uint8)).save(folder / "input" / name)
    return folder


@pytest.fixture(scope="session")
def with_redux(server: Server, redux_files: Path) -> Server:
    """The server with these files in its folders."""
    for kind, into in (("clip_vision", "models"), ("style_models", "models"), ("input", "")):
        shutil.copytree(redux_files / kind, server.base / into / kind, dirs_exist_ok=True)
    return server


@pytest.fixture(scope="session")
def alone(redux_files: Path) -> Callable[[Prompt], Tensor]:
    """The latent of a prompt on these files in the standalone host."""
    runs = Alone(tiny_host(redux_files / "output", redux_files, inputs=[redux_files / "input"]))
    return lambda prompt: runs.latents(prompt)["latent"]
