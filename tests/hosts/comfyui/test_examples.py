"""The example workflows in a running ComfyUI, with tiny-flux in the place of the real models: they show what they show
in `flux-kit run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_server import Server
from flux_kit.cli import session
from flux_kit.cli.run import with_settings
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.workflow import load_workflow
from flux_kit.tiny_flux.examples import STANDS
from flux_kit.tiny_flux.score import matches, read_picture
from PIL import Image

EXAMPLES = Path(__file__).parents[3] / "example_workflows"
STEPS = 12
SAMPLERS = ("Sampler", "Final")


@pytest.fixture(scope="module")
def prompt_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], dict[str, Any]]:
    """An example as an API prompt, tiny-flux in it; its pictures go into the input folder named."""
    host = StandaloneHost(Folders(models=[session.TINY_MODELS], output=tmp_path_factory.mktemp("out")), device="cpu",
                          dtype="fp32")

    def made(name: str, inputs: Path) -> dict[str, Any]:
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

    return made


@pytest.mark.parametrize("name", STANDS)
def test_an_example_shows_what_it_is_to_show(name: str, server: Server,
                                             prompt_of: Callable[[str, Path], dict[str, Any]]) -> None:
    outputs = server.run(prompt_of(name, server.base / "input"))
    saved = [picture for output in outputs.values() for picture in output.get("images", ())
             if picture["type"] == "output"]
    pictures = []
    for each in saved:
        with Image.open(server.path_of(each)) as opened:
            pictures.append(np.asarray(opened.convert("RGB")))
    assert pictures and all(np.ptp(picture) > 50 for picture in pictures)
    wanted = STANDS[name].shows
    if wanted is not None:
        assert any(matches(wanted, picture) for picture in pictures), [read_picture(picture) for picture in pictures]
