"""The official templates of Fill, Canny, Depth, Redux, Kontext and USO, on tiny-flux under the file names they ask for:
they paint what they are asked, or stop before the run and say what for.

Prompts and pictures are what tiny-flux knows, 128 x 128. What the nodes do is compared with core's in
tests/hosts/comfyui.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flux_kit.cli import main, session
from flux_kit.hosts.standalone import core_conditioning
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.tiny_flux.score import matches, read_picture
from PIL import Image
from templates import CASES, DEPTH, TEMPLATES, prompt_of, write_models

AS_THEY_ARE = [name for name in CASES if name != DEPTH]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-flux as a models folder, and the input pictures, under the names that the templates ask for."""
    base = tmp_path_factory.mktemp("base")
    write_models(base / "models")
    (base / "input").mkdir()
    for case in CASES.values():
        case.write_inputs(base / "input")
    return base


def run(name: str, folder: Path, out: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> dict[str, Any]:
    flags = [flag for setting in settings for flag in ("--set", setting)]
    code = main(["run", str(TEMPLATES / f"{name}.json"), "--models", str(folder / "models"), "--input",
                 str(folder / "input"), "--out", str(out), "--json", *flags])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (0 if told["ok"] else 1)
    return told


def check(name: str, *paths: str | Path) -> None:
    """One of the pictures is what the template was asked for; others show what went in, in the same size."""
    case, pictures = CASES[name], []
    for path in paths:
        with Image.open(path) as opened:
            pictures.append(np.asarray(opened.convert("RGB")))
    assert {picture.shape[1::-1] for picture in pictures} == {case.size}
    assert sum(matches(case.shows, picture) for picture in pictures) == 1, [read_picture(each) for each in pictures]


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_a_template_paints_what_it_is_asked(name: str, folder: Path, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    monkeypatch.setattr(core_conditioning, "KONTEXT_SIZES", [(128, 128)])  # tiny-flux is not trained on a megapixel
    told = run(name, folder, tmp_path, capsys, *CASES[name].settings)
    assert told["ok"], told
    check(name, *told["images"])


@pytest.mark.parametrize(("name", "words"), [
    ("flux_depth_lora_example", ["LotusConditioning (node 150:41:96; for Lotus, a depth model", "Structure Map"]),
    ("flux1_dev_uso_reference_image_gen", ["ModelPatchLoader (node 112:39; for the projector of USO"])])
def test_a_template_stops_for_models_of_another_kind(name: str, words: list[str], folder: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    told = run(name, folder, tmp_path, capsys)
    assert not told["ok"] and told["error"]["type"] == "BadWorkflow"
    assert all(word in told["error"]["message"] for word in words) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "transformer"), [
    ("flux_fill_inpaint_example", "flux1-fill-dev"), ("flux_canny_model_example", "flux1-canny-dev"),
    ("flux_kontext_dev_basic", "flux1-dev-kontext_fp8_scaled")])
def test_a_template_names_the_files_that_are_missing(name: str, transformer: str, folder: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models").mkdir()
    shutil.copytree(folder / "input", tmp_path / "input")
    told = run(name, tmp_path, tmp_path / "out", capsys)
    assert not told["ok"] and "ae.safetensors" in told["error"]["message"]
    assert transformer in told["error"]["message"] and not (tmp_path / "out").exists()


def test_the_depth_template_runs_with_another_map(folder: Path, tmp_path: Path) -> None:
    """Without Lotus: the picture is its own depth map. A control LoRA on dev in fp8."""
    host = StandaloneHost(Folders(models=[folder / "models"], input=[folder / "input"], output=tmp_path), device="cpu")
    session.hosts.use(host)
    nodes = session.node_classes()
    Executor(nodes).run(prompt_of(DEPTH, nodes))
    check(DEPTH, *host.saved)
