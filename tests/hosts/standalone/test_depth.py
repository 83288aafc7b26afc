"""Depth models in folders: a tiny random Depth Anything through transformers, and folders that are wrong."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_kit.engine.errors import BadModelFile, FluxKitError, MissingFile
from flux_kit.hosts import depth
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from scenes_8bit import soft_shapes

PREPARING = {"size": {"height": 518, "width": 518}, "ensure_multiple_of": 14, "keep_aspect_ratio": True, "resample": 3,
             "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def tiny(transformers: Any) -> Any:
    backbone = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True)
    torch.manual_seed(0)
    return transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8,
        head_hidden_size=8, patch_size=14)).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models")
    tiny(transformers).save_pretrained(folder / "depth" / "hub" / "tiny-depth")
    (folder / "depth" / "hub" / "tiny-depth" / "preprocessor_config.json").write_text(json.dumps(PREPARING))
    return folder


@pytest.fixture
def host(models: Path, tmp_path: Path) -> StandaloneHost:
    return StandaloneHost(Folders(models=[models], output=tmp_path), device="cpu")


def test_a_folder_is_listed_found_and_run(host: StandaloneHost) -> None:
    assert host.list_files("depth") == ["hub/tiny-depth"]
    folder = host.resolve_file("depth", "tiny-depth")
    image = soft_shapes(90, 140)
    found = host.nearness(folder, image, 140)
    import transformers
    wanted = depth.input_of(folder, depth.FAMILIES["depth_anything"], {})
    with torch.no_grad():
        answer = tiny(transformers)(pixel_values=wanted.pixels(image, 140)).predicted_depth
    assert found.shape == (1, 90, 140)
    torch.testing.assert_close(found, wanted.nearness(answer, 90, 140), atol=1e-5, rtol=1e-4)
    two = host.nearness(folder, torch.cat([image, 1 - image]), 140)
    torch.testing.assert_close(two[:1], found, atol=1e-5, rtol=1e-4)
    with pytest.raises(MissingFile, match="Put it into"):
        host.resolve_file("depth", "other")


def wrong(folder: Path, tmp_path: Path, **config: Any) -> Path:
    made = tmp_path / "wrong"
    shutil.copytree(folder, made)
    known = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**known, **config}))
    return made


def test_what_is_wrong_with_a_folder_is_said(host: StandaloneHost, tmp_path: Path) -> None:
    good, image = host.resolve_file("depth", "tiny-depth"), soft_shapes(28, 28)
    cases = {"model_type": (wrong(good, tmp_path / "a", model_type="bert"), r"depth_anything or dpt or zoedepth.*bert"),
             "backbone": (wrong(good, tmp_path / "b", backbone="some/repo", backbone_config=None), "downloaded")}
    for folder, said in cases.values():
        with pytest.raises(BadModelFile, match=said):
            host.nearness(folder, image, 140)
    bare = wrong(good, tmp_path / "c")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(MissingFile, match=r"preprocessor_config\.json is not there"):
        host.nearness(bare, image, 140)
    pickled = wrong(good, tmp_path / "d")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(MissingFile, match=r"no model\.safetensors"):
        host.nearness(pickled, image, 140)
    torn = wrong(good, tmp_path / "e")
    (torn / "config.json").write_text("{")
    with pytest.raises(BadModelFile, match="cannot be read"):
        host.nearness(torn, image, 140)
    more = wrong(good, tmp_path / "f", head_hidden_size=8, neck_hidden_sizes=[8, 8, 16, 24])
    with pytest.raises(BadModelFile):
        host.nearness(more, image, 140)


def test_without_transformers(host: StandaloneHost, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(FluxKitError, match=r"pip install transformers.*canny"):
        host.nearness(host.resolve_file("depth", "tiny-depth"), soft_shapes(28, 28), 140)
