"""Model files that are replaced, written over or cut off: loaded anew between runs, refused by name during one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import Budget
from family import Family
from flux_kit.cli import session
from flux_kit.engine.errors import FileChanged
from flux_kit.hosts import use
from flux_kit.hosts.standalone.executor import Executor
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.memory import Residence
from safetensors.torch import load_file, save_file

NAMES = {"dev": "d.safetensors", "t5": "t.safetensors", "clip_l": "c.safetensors", "vae": "v.safetensors"}
FOLDERS = {"dev": "diffusion_models", "t5": "text_encoders", "clip_l": "text_encoders", "vae": "vae"}
PROMPT: dict[str, Any] = {
    "1": {"class_type": "FluxKitLoadFlux", "inputs": {"model": NAMES["dev"], "clip_l": NAMES["clip_l"],
                                                      "t5": NAMES["t5"], "vae": NAMES["vae"]}},
    "2": {"class_type": "FluxKitEncodePrompt", "inputs": {"clip": ["1", 1], "prompt": "a red circle", "t5_prompt": "",
                                                          "guidance": 3.5, "t5_length": "auto"}},
    "3": {"class_type": "FluxKitEmptyLatent", "inputs": {"aspect": "custom", "megapixels": 1.0, "width": 32,
                                                         "height": 32, "batch_size": 1}},
    "4": {"class_type": "FluxKitSampler", "inputs": {
        "model": ["1", 0], "positive": ["2", 0], "latent": ["3", 0], "seed": 1, "steps": 2, "cfg": 1.0,
        "solver": "euler", "schedule": "simple", "denoise": 1.0, "denoise_meaning": "keep steps (ComfyUI)",
        "cfg_start": 0.0, "cfg_end": 1.0}},
    "5": {"class_type": "FluxKitDecode", "inputs": {"latent": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "FluxKitSave", "inputs": {"images": ["5", 0], "filename_prefix": "x"}},
}


@pytest.fixture
def files(family: Family, tmp_path: Path) -> Path:
    return family.write(tmp_path / "models", NAMES)


@pytest.fixture
def runner(files: Path, tmp_path: Path, host: StandaloneHost) -> tuple[StandaloneHost, Executor]:
    """`host` is asked for so that the current host is put back afterwards."""
    made = StandaloneHost(Folders(models=[files], output=tmp_path / "out"), device="cpu")
    use(made)
    return made, session.executor(made, session.node_classes())


def path_of(files: Path, part: str) -> Path:
    return files / FOLDERS[part] / NAMES[part]


def replace_file(path: Path) -> None:
    """Another file of the same size and time takes the place, as downloads and `git checkout` do it."""
    status = path.stat()
    tensors = {name: tensor.flip(0) if tensor.ndim > 1 else tensor.clone() for name, tensor in load_file(path).items()}
    beside = path.with_suffix(".new")
    with open(path, "rb") as file:
        head = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(head)).get("__metadata__")
    save_file(tensors, beside, metadata=metadata)
    os.utime(beside, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(beside, path)


def rewrite_file(path: Path) -> None:
    """A last digit changes in place: same inode, same size."""
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        low = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([low ^ 1]))


def cut_file(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def written(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize(("part", "change"), [*((part, replace_file) for part in NAMES), ("dev", rewrite_file)])
def test_changed_between_runs_is_loaded_anew(runner: tuple[StandaloneHost, Executor], files: Path, part: str,
                                             change: Callable[[Path], None]) -> None:
    """Replaced with size and time as before, too: the inode tells. What does not come from the file is kept."""
    _, executor = runner
    first = executor.run(PROMPT)
    assert executor.run(PROMPT).executed == []
    change(path_of(files, part))
    second = executor.run(PROMPT)
    assert {"1", "4", "5", "6"} <= set(second.executed) and "3" in second.cached
    if change is replace_file:
        assert not torch.equal(first.outputs["5"][0][0], second.outputs["5"][0][0])


@pytest.mark.parametrize(("part", "node", "change", "what"), [
    ("dev", "4", cut_file, "was cut off"), ("vae", "5", cut_file, "was cut off"), ("t5", "2", cut_file, "was cut off"),
    ("t5", "4", replace_file, "was replaced"), ("clip_l", "5", rewrite_file, "was changed"),
    ("vae", "6", os.remove, "was removed")])
def test_changed_during_a_run_throws_the_result_away(runner: tuple[StandaloneHost, Executor], files: Path,
                                                     tmp_path: Path, part: str, node: str, what: str,
                                                     change: Callable[[Path], None]) -> None:
    """`node` is the one before which the file changes; a mapped file that is cut off must not end the process."""
    _, executor = runner
    executor._on_node = lambda id_, *_: change(path_of(files, part)) if id_ == node else None  # type: ignore[assignment]
    with pytest.raises(FileChanged, match=f"{NAMES[part]}.*{what}"):
        executor.run(PROMPT)
    assert written(tmp_path) == []
    assert executor._cache == {}, "nothing made in this run may be taken from the cache by the next"


@pytest.mark.parametrize("change", [cut_file, rewrite_file, replace_file])
@pytest.mark.parametrize("streamed", [False, True])
def test_changed_in_the_middle_of_sampling(runner: tuple[StandaloneHost, Executor], files: Path, tmp_path: Path,
                                           change: Callable[[Path], None], streamed: bool) -> None:
    """Before every block the file is looked at: a cut-off one is noticed before its missing pages are touched."""
    host, executor = runner
    if streamed:
        host.residence = Residence(Budget(1 << 30), "stream")
    steps: list[int] = []

    def bar(total: int) -> Callable[..., None]:
        def report(value: int, preview: Any = None) -> None:
            steps.append(value)
            change(path_of(files, "dev"))
        return report

    host._progress_bar = bar
    with pytest.raises(FileChanged, match=NAMES["dev"]):
        executor.run(PROMPT)
    assert steps == [1] and written(tmp_path) == []


def test_objects_of_an_earlier_file_are_refused(runner: tuple[StandaloneHost, Executor], files: Path) -> None:
    host, _ = runner
    vae = host.load_vae(path_of(files, "vae"))
    latent = {"samples": torch.zeros(1, 16, 4, 4)}
    host.decode(vae, latent)
    replace_file(path_of(files, "vae"))
    with pytest.raises(FileChanged, match="was replaced"):
        host.decode(vae, latent)
    host.decode(host.load_vae(path_of(files, "vae")), latent)


def test_a_shard_beside_an_index_counts(files: Path, tmp_path: Path) -> None:
    from flux_kit.hosts.fingerprint import fingerprint
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    shutil.copy(path_of(files, "vae"), tmp_path / "model-00001-of-00001.safetensors")
    before = fingerprint(index)
    assert fingerprint(index) == before
    rewrite_file(tmp_path / "model-00001-of-00001.safetensors")
    assert fingerprint(index) != before
