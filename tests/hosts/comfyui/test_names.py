"""Names of files as workflows of other people have them, in a running ComfyUI and in `flux-kit run` alike."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from comfy_server import Failed, Server
from flux_kit.cli import main
from PIL import Image
from prompts import Prompt, core, flux_kit, node

SHIPPED = Path(__file__).parents[3] / "tiny_flux" / "models"
MODEL, T5 = "diffusion_models/tiny-flux-dev.safetensors", "text_encoders/tiny-t5.safetensors"
CLIP_L, VAE = "text_encoders/tiny-clip_l.safetensors", "vae/tiny-ae.safetensors"
PLACED = {  # place below the base folder -> which file lies there; `elsewhere` by extra_model_paths.yaml
    "models/diffusion_models/shelf/flux1-tale.safetensors": MODEL,
    "models/diffusion_models/one/twice.safetensors": MODEL, "models/diffusion_models/two/twice.safetensors": MODEL,
    "models/unet/from-the-old-folder.safetensors": MODEL, "models/clip/t5-of-old.safetensors": T5,
    "elsewhere/unets/shared/flux1-shared.safetensors": MODEL, "elsewhere/more/t5-shared.safetensors": T5,
    "elsewhere/encoders/clip-shared.safetensors": CLIP_L, "elsewhere/autoencoders/ae-shared.safetensors": VAE}
DAMAGED = "elsewhere/unets/damaged.gguf"


@pytest.fixture(scope="module")
def base(server: Server) -> Path:
    for place, name in PLACED.items():
        (server.base / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SHIPPED / name, server.base / place)
    (server.base / DAMAGED).write_bytes(b"GGUF" + bytes(20))
    return server.base


class Outcome(NamedTuple):
    pictures: list[Path]
    message: str
    """Empty unless it was refused or failed."""
    said: str
    """What a user could read meanwhile."""


Run = Callable[[Prompt], Outcome]


@pytest.fixture
def in_comfyui(server: Server, base: Path) -> Run:
    def run(prompt: Prompt) -> Outcome:
        before = len(server.log.read_text())
        try:
            outputs = server.run(prompt)
        except Failed as failed:
            return Outcome([], str(failed), server.log.read_text()[before:])
        images = [server.path_of(image) for told in outputs.values() for image in told.get("images", [])]
        return Outcome(images, "", server.log.read_text()[before:])

    return run


@pytest.fixture
def in_flux_kit_run(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(prompt: Prompt) -> Outcome:
        (tmp_path / "prompt.json").write_text(json.dumps({key: entry for key, entry in prompt.items()
                                                          if entry["class_type"] != "SaveLatent"}))
        capsys.readouterr()
        code = main(["run", str(tmp_path / "prompt.json"), "--models", str(base), "--out", str(tmp_path / "out"),
                     "--dtype", "fp32", "--device", "cpu", "--json"])
        printed = capsys.readouterr()
        answer = json.loads(printed.out)
        assert code == (0 if answer["ok"] else 1)
        if answer["ok"]:
            return Outcome([Path(path) for path in answer["images"]], "", printed.err)
        return Outcome([], answer["error"]["message"], printed.err)

    return run


def named(**names: Any) -> Prompt:
    prompt = flux_kit(steps=1)
    prompt["load"]["inputs"] |= names
    return prompt


TAKEN = {  # name in the workflow -> what is taken for it; empty: the name is exact and nothing is said
    "slashes, case and folder": ({"model": "FLUX\\Tiny-Flux-dev.SAFETENSORS"}, "tiny-flux-dev.safetensors"),
    "only the slashes": ({"model": "shelf\\flux1-tale.safetensors"}, ""),
    "without its folder": ({"model": "Flux1-Tale.safetensors"}, "shelf/flux1-tale.safetensors"),
    "of another folder": ({"model": "flux/dev/flux1-tale.safetensors"}, "shelf/flux1-tale.safetensors"),
    "the older folders": ({"model": "from-the-old-folder.safetensors", "t5": "t5-of-old.safetensors"}, ""),
    "extra_model_paths.yaml": ({"model": "shared/flux1-shared.safetensors", "clip_l": "clip-shared.safetensors",
                                "t5": "t5-shared.safetensors", "vae": "ae-shared.safetensors"}, ""),
    "extra_model_paths.yaml, other case": ({"vae": "FLUX/AE-Shared.safetensors"}, "ae-shared.safetensors"),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_name_that_means_one_file_is_taken(in_comfyui: Run, in_flux_kit_run: Run, server: Server, case: str) -> None:
    names, taken = TAKEN[case]
    server.forget()
    found = [run(named(**names)) for run in (in_comfyui, in_flux_kit_run)]
    assert [outcome.message for outcome in found] == ["", ""]
    first, second = (np.array(Image.open(outcome.pictures[0]), dtype=np.int16) for outcome in found)
    assert first.shape == (112, 128, 3) and np.abs(first - second).max() <= 1
    if taken:
        assert f"took '{taken}'" in found[1].said
        assert f"took '{taken}'" in server.log.read_text()  # once in the life of a process
    else:
        assert not any("took '" in outcome.said for outcome in found)


REFUSED = {
    "nowhere": ({"model": "flux1-fill.safetensors"}, r"flux1-fill.safetensors' is in none of the folders.*Put it into "
                                                     r".*diffusion_models"),
    "nowhere, a text encoder": ({"t5": "t5xxl_fp8.safetensors"}, r"t5xxl_fp8.*Put it into .*text_encoders"),
    "near another": ({"vae": "ae-sharde.safetensors"}, r"near: .*ae-shared.safetensors"),
    "means two": ({"model": "twice.safetensors"},
                  r"several files could be meant: one/twice.safetensors, two/twice.safetensors"),
    "of another kind": ({"model": "tiny-clip_l.safetensors"},
                        r"'tiny-clip_l.safetensors' lies in text_encoders, where this slot does not look"),
    "leaves the folders": ({"model": "../../../../etc/passwd"}, r"passwd' is in none of the folders"),
    "empty": ({"vae": ""}, r"vae: '' is in none of the folders"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_any_other_name_is_refused_before_the_run(in_comfyui: Run, in_flux_kit_run: Run, base: Path, case: str) -> None:
    names, message = REFUSED[case]
    for run in (in_comfyui, in_flux_kit_run):
        outcome = run(named(**names))
        assert re.search(message, outcome.message), outcome.message
        assert outcome.pictures == [] and "tiny_flux" not in outcome.message
    told = json.loads(in_comfyui(named(**names)).message)["node_errors"]["load"]["errors"]
    assert {error["type"] for error in told} == {"custom_validation_failed"}  # told once for every widget of the node
    if "Put it" in message:  # the folder named is one that the host looks into
        place = re.search(r"Put it into (\S+)", told[0]["details"])
        assert place is not None and Path(place[1]).parent == base / "models"


def test_a_damaged_file_is_named_when_it_is_opened(in_comfyui: Run, in_flux_kit_run: Run) -> None:
    for run in (in_comfyui, in_flux_kit_run):
        assert "damaged.gguf" in run(named(model="damaged.gguf")).message


@pytest.mark.parametrize("name", ["shelf/flux1-tale.safetensors", "FLUX\\Flux1-Tale.safetensors"])
def test_linked_names_are_legal_and_resolved_when_run(in_comfyui: Run, server: Server, name: str) -> None:
    prompt = {**named(model=["name", 0]), "name": node("StandInAnyText", text=name)}
    linked = in_comfyui(prompt)
    assert linked.message == ""
    plain = in_comfyui(named(model="shelf/flux1-tale.safetensors"))
    first, second = (np.array(Image.open(outcome.pictures[0])) for outcome in (linked, plain))
    assert (first == second).all()


def test_a_linked_name_of_no_file_fails_where_it_is_used(server: Server, base: Path) -> None:
    prompt = {**named(model=["name", 0]), "name": node("StandInAnyText", text="flux1-fill.safetensors")}
    with pytest.raises(Failed, match=r"flux1-fill.safetensors' is in none of the folders.*Put it into") as failed:
        server.run(prompt)
    assert failed.value.node == "FluxKitLoadFlux" and failed.value.kind.endswith("MissingFile")


def test_a_text_cannot_be_linked_to_a_file_widget(in_comfyui: Run, in_flux_kit_run: Run) -> None:
    """The hosts' own rule for sockets of different types, the same in both."""
    prompt = {**named(model=["name", 0]), "name": node("PrimitiveString", value="tiny-flux-dev.safetensors")}
    for run in (in_comfyui, in_flux_kit_run):
        assert "STRING" in run(prompt).message and "COMBO" in run(prompt).message


def test_files_come_change_and_go_while_the_server_runs(in_comfyui: Run, in_flux_kit_run: Run, base: Path) -> None:
    place = base / "elsewhere" / "unets" / "new" / "flux1-late.safetensors"
    prompt = named(model="late/Flux1-Late.safetensors")
    assert "is in none of the folders" in in_comfyui(prompt).message
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(SHIPPED / MODEL, place)
    dev = [np.array(Image.open(run(prompt).pictures[0])) for run in (in_comfyui, in_flux_kit_run)]
    shutil.copy(SHIPPED / MODEL.replace("dev", "schnell"), place)
    schnell = [np.array(Image.open(run(prompt).pictures[0])) for run in (in_comfyui, in_flux_kit_run)]
    for here, there in zip(dev, schnell, strict=True):
        assert (here != there).any(), "the old file's result was shown"
    place.unlink()
    assert "is in none of the folders" in in_comfyui(prompt).message


def options(info: dict[str, Any], kind: str, name: str) -> list[str]:
    """Choices of a combo, in the older and the newer form of /object_info."""
    spec = info[kind]["input"]["required"][name]
    return list(spec[0]) if isinstance(spec[0], list) else list(spec[1]["options"])


def test_lists_hold_the_files_of_all_folders(server: Server, base: Path) -> None:
    """`.gguf` in ours alone: core's loaders cannot read it."""
    info = server.call("/object_info")
    ours, theirs = options(info, "FluxKitLoadTransformer", "model"), options(info, "UNETLoader", "unet_name")
    for name in ("shared/flux1-shared.safetensors", "shelf/flux1-tale.safetensors", "from-the-old-folder.safetensors"):
        assert name in ours and name in theirs
    assert "damaged.gguf" in ours and "damaged.gguf" not in theirs
    assert "damaged.gguf" not in options(info, "FluxKitLoadVAE", "vae")
    assert "t5-shared.safetensors" in options(info, "FluxKitLoadTextEncoders", "t5")


def test_core_s_loaders_by_names_of_others_in_flux_kit_run(in_flux_kit_run: Run) -> None:
    """ComfyUI's own loaders refuse what is not in their lists; the equivalents here take it."""
    prompt = core(steps=1)
    prompt["load"] = node("UNETLoader", unet_name="FLUX\\Flux1-Tale.safetensors", weight_dtype="default")
    prompt["encoders"] = node("DualCLIPLoader", clip_name1="x/CLIP-shared.safetensors",
                              clip_name2="t5-shared.safetensors", type="flux")
    prompt["vae"] = node("VAELoader", vae_name="AE-shared.safetensors")
    prompt["text"]["inputs"]["clip"], prompt["decode"]["inputs"]["vae"] = ["encoders", 0], ["vae", 0]
    outcome = in_flux_kit_run(prompt)
    assert outcome.message == "" and "took 'shelf/flux1-tale.safetensors'" in outcome.said
