"""The example workflows in a running ComfyUI, with tiny-flux in the place of the real models: they show what they are
to show, and give the pictures of `flux-kit run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alone import tiny_host
from comfy_server import Server
from flux_kit.cli import session
from flux_kit.cli.run import with_settings
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.workflow import load_workflow
from flux_kit.tiny_flux.examples import STANDS
from flux_kit.tiny_flux.score import matches, read_picture
from numpy.typing import NDArray
from PIL import Image

EXAMPLES = Path(__file__).parents[3] / "example_workflows"
STEPS = 12
SAMPLERS = ("Sampler", "Final")
LEVELS = 1
"""Pictures of the two hosts may differ by this much of 255."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> StandaloneHost:
    return tiny_host(tmp_path_factory.mktemp("out"))


def prompt_of(name: str, host: StandaloneHost, inputs: Path) -> dict[str, Any]:
    """An example as an API prompt, tiny-flux in it; its pictures go into the input folder."""
    session.hosts.use(host)
    inputs.mkdir(exist_ok=True)
    stand, nodes = STANDS[name], session.node_classes()
    stand.write_inputs(inputs)
    host.folders.input = [inputs]
    read = load_workflow(EXAMPLES / f"{name}.json", nodes).prompt
    titles = {entry.get("_meta", {}).get("title") for entry in read.values()}
    settings = [*stand.all_settings(), *(f"{title}.steps={STEPS}" for title in SAMPLERS if title in titles)]
    split = [(node, key, value) for node, (key, value) in (
        (part[0], part[1].split("=", 1)) for part in (setting.split(".", 1) for setting in settings))]
    return with_settings(read, split, nodes)


def saved(told: dict[str, Any]) -> list[dict[str, str]]:
    return [picture for _, each in sorted(told.items()) for picture in each.get("images", ())
            if picture["type"] == "output"]


def pixels(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize("name", STANDS)
def test_an_example_shows_what_it_is_to_show(name: str, server: Server, host: StandaloneHost) -> None:
    prompt = prompt_of(name, host, server.base / "input")
    pictures = [pixels(server.path_of(each)) for each in saved(server.run(prompt))]
    assert pictures and all(np.ptp(picture) > 50 for picture in pictures)
    wanted = STANDS[name].shows
    if wanted is not None:
        assert any(matches(wanted, picture) for picture in pictures), [read_picture(picture) for picture in pictures]
    alone = [pixels(host.folders.output / each["subfolder"] / each["filename"])
             for each in saved(Executor(session.node_classes()).run(prompt).ui)]
    assert len(alone) == len(pictures)
    for here, there in zip(pictures, alone, strict=True):
        assert np.abs(np.int16(here) - np.int16(there)).max() <= LEVELS
