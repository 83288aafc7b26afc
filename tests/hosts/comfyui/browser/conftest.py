"""A headless Chromium on the interface of each ComfyUI. Without Playwright, Chromium or COMFYUI_PATH the tests skip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_server import Host, Server
from flux_kit.cli import session
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.workflow import load_workflow
from frontend import Frontend, chromium
from stack_files import lora_folder

ROOT = Path(__file__).parents[4]
EXAMPLES = {path.name: path for path in sorted((ROOT / "example_workflows").glob("*.json"))}
INTERFACES = {"classic": False, "nodes2": True}
TINY = {"model": "tiny-flux-dev", "clip_l": "tiny-clip_l", "t5": "tiny-t5", "vae": "tiny-ae",
        "clip_vision": "tiny-siglip", "style_model": "tiny-redux"}  # by widget
LORA = "tiny-lora-cross.safetensors"
Prompts = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra browser)")
    path = chromium()
    if path is None:
        pytest.skip("no Chromium: CHROMIUM_PATH names none and none is on PATH")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@pytest.fixture(scope="session")
def standalone_prompt(tmp_path_factory: pytest.TempPathFactory) -> Prompts:
    """What `flux-kit run` makes of a workflow file."""
    host = StandaloneHost(Folders(models=[session.TINY_MODELS], output=tmp_path_factory.mktemp("out")), device="cpu",
                          dtype="fp32")

    def read(path: Path) -> dict[str, Any]:
        session.hosts.use(host)
        return load_workflow(path, session.node_classes()).prompt

    return read


@pytest.fixture(scope="session")
def server(browser: Any, comfy: Host, standalone_prompt: Prompts,
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: its model folders hold every file the examples name, each of them a tiny one."""
    base = tmp_path_factory.mktemp("browser")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "flux-kit").symlink_to(ROOT, target_is_directory=True)
    (base / "input").mkdir()
    shutil.copyfile(comfy.path / "input" / "example.png", base / "input" / "example.png")  # comes with every ComfyUI
    for path in EXAMPLES.values():
        for entry in standalone_prompt(path).values():
            for row in json.loads(entry["inputs"].get("rows", "[]")):
                (base / "models" / "loras").mkdir(parents=True, exist_ok=True)
                shutil.copyfile(session.TINY_MODELS / "loras" / LORA, base / "models" / "loras" / row["lora"])
            kinds = getattr(session.node_classes().get(entry["class_type"]), "KINDS", {})
            for widget, kind in kinds.items():
                tiny = session.TINY_MODELS / kind / f"{TINY[widget]}.safetensors"
                wanted = base / "models" / kind / entry["inputs"][widget]
                if not (tiny.parent / wanted.name).exists():
                    wanted.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(tiny, wanted)
    started = Server(comfy, base)
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module", params=INTERFACES)  # not session: a host's tests would not stay together
def frontend(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Frontend]:
    opened = Frontend(browser, server, nodes2=INTERFACES[request.param])
    try:
        if INTERFACES[request.param] and not opened.offers_nodes2:
            pytest.skip("this interface does not offer Nodes 2.0")
        yield opened
    finally:
        opened.page.close()


@pytest.fixture(scope="module")
def lora_files(server: Server) -> None:
    lora_folder(server.base / "models" / "loras")


@pytest.fixture(scope="session")
def workflow() -> Callable[[str], dict[str, Any]]:
    """An example, parsed."""
    return lambda name: json.loads(EXAMPLES[name].read_text(encoding="utf-8"))
