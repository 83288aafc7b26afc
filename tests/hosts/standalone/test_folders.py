"""Model folders, names from workflows, extra_model_paths.yaml, and that nothing leaves the folders."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import yaml
from flux_kit.engine.errors import BadInput, FluxKitError, MissingFile
from flux_kit.hosts.names import OWN, check_name
from flux_kit.hosts.standalone.extra_paths import read_extra_paths
from flux_kit.hosts.standalone.folders import KINDS, Folders, inside
from hypothesis import given, settings
from hypothesis import strategies as st


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


@pytest.fixture
def models(tmp_path):
    for name in ("diffusion_models/flux1-dev.safetensors", "diffusion_models/FLUX/Krea.safetensors",
                 "diffusion_models/notes.txt", "diffusion_models/.cache/hidden.safetensors", "unet/old-Q4_K.gguf",
                 "unet/flux1-dev.safetensors", "text_encoders/clip_l.safetensors", "clip/t5.sft",
                 "vae/a/ae.safetensors", "vae/b/AE.safetensors", "checkpoints/old.ckpt", "loras/x.safetensors"):
        touch(tmp_path / "models" / name)
    return tmp_path / "models"


def test_listing_joins_the_folders_of_a_kind(models):
    folders = Folders(models=[models])
    assert folders.list_files("diffusion_models") == ["FLUX/Krea.safetensors", "flux1-dev.safetensors", "old-Q4_K.gguf"]
    assert folders.list_files("unet") == folders.list_files("diffusion_models")
    assert folders.list_files("clip") == ["clip_l.safetensors", "t5.sft"]
    assert folders.list_files("checkpoints") == [], "pickles are not offered"
    assert folders.list_files("clip_vision") == []
    assert folders.roots("vae") == [models / "vae"]
    with pytest.raises(BadInput, match="unknown kind of file hypernetworks"):
        folders.list_files("hypernetworks")


def test_exact_names_win_and_the_first_folder_wins(models, caplog):
    folders = Folders(models=[models])
    assert folders.resolve_file("unet", "flux1-dev.safetensors") == models / "diffusion_models/flux1-dev.safetensors"
    assert folders.resolve_file("diffusion_models", "FLUX\\Krea.safetensors") == (
        models / "diffusion_models/FLUX/Krea.safetensors")
    assert folders.resolve_file("checkpoints", "old.ckpt").name == "old.ckpt", "found, for the loader to refuse"
    assert not caplog.records


@pytest.mark.parametrize("name", ["krea.safetensors", "other/KREA.safetensors", "C:\\models\\flux\\Krea.SafeTensors",
                                  "../../Krea.safetensors"])
def test_the_only_file_of_the_base_name_is_taken_and_told(models, caplog, name):
    caplog.set_level(logging.WARNING)
    folders = Folders(models=[models])
    found = folders.resolve_file("diffusion_models", name)
    assert found == models / "diffusion_models/FLUX/Krea.safetensors"
    folders.resolve_file("diffusion_models", name)
    assert caplog.text.count("took 'FLUX/Krea.safetensors'") == 1


def test_none_or_several_are_errors_with_near_matches(models):
    folders = Folders(models=[models])
    with pytest.raises(MissingFile, match=r"several files could be meant: a/ae\.safetensors, b/AE\.safetensors"):
        folders.resolve_file("vae", "ae.safetensors")
    assert folders.resolve_file("vae", "b/AE.safetensors") == models / "vae/b/AE.safetensors"
    with pytest.raises(MissingFile, match=r"'flux1-dve.safetensors' .*\(near: flux1-dev.safetensors.*diffusion_models"):
        folders.resolve_file("diffusion_models", "flux1-dve.safetensors")
    with pytest.raises(MissingFile, match="given by --models"):
        Folders().resolve_file("vae", "ae.safetensors")


def test_a_file_of_another_kind_is_named_by_where_it_lies(models):
    """A text encoder in the slot of the transformer: "not there" would send the user looking for a file they have."""
    folders = Folders(models=[models])
    with pytest.raises(MissingFile, match=r"'T5\.sft' lies in text_encoders, where this slot does not") as raised:
        folders.resolve_file("diffusion_models", "T5.sft")
    assert f"move it into {models / 'diffusion_models'}" in str(raised.value)


def test_new_files_and_folders_are_seen(models):
    folders = Folders(models=[models])
    assert "new/file.sft" not in folders.list_files("loras")
    touch(models / "loras/new/file.sft")
    assert folders.list_files("loras") == ["new/file.sft", "x.safetensors"]
    touch(models / "loras/new/second.sft")
    assert "new/second.sft" in folders.list_files("loras")
    touch(models / "clip_vision/v.safetensors")
    assert folders.list_files("clip_vision") == ["v.safetensors"]
    (models / "loras/x.safetensors").unlink()
    assert "x.safetensors" not in folders.list_files("loras")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_in_model_folders_are_followed_and_loops_end(models, tmp_path):
    touch(tmp_path / "other disk/big.safetensors")
    (models / "vae/disk").symlink_to(tmp_path / "other disk")
    (models / "vae/loop").symlink_to(models / "vae")
    (models / "vae/gone.safetensors").symlink_to(tmp_path / "nowhere")
    assert Folders(models=[models]).resolve_file("vae", "big.safetensors") == models / "vae/disk/big.safetensors"


def test_a_comfyui_folder_is_recognised_with_its_extra_paths(tmp_path):
    comfy, extra = tmp_path / "ComfyUI", tmp_path / "extra"
    touch(comfy / "models/vae/ae.safetensors")
    touch(extra / "VAE/other.safetensors")
    (comfy / "extra_model_paths.yaml").write_text("a111:\n    base_path: ../extra\n    vae: VAE\n")
    assert Folders(models=[comfy]).list_files("vae") == ["ae.safetensors", "other.safetensors"]


EXAMPLE = """
# Rename this to extra_model_paths.yaml
comfyui:   # the other one
     base_path: {base}/  # where
     # is_default: true
     is_default: true
     checkpoints: models/checkpoints/
     text_encoders: |
          models/text_encoders/
          models/clip/  # legacy

     "unet": 'models/with # hash'
     diffusion_models: |-
       a b/c
other:
    loras: relative/loras
    embeddings:
"""


def test_extra_paths_as_in_comfyui(tmp_path):
    base = tmp_path / "base folder"
    file = tmp_path / "paths" / "extra.yaml"
    file.parent.mkdir()
    file.write_text(EXAMPLE.format(base=base))
    assert read_extra_paths(file) == [
        ("checkpoints", base / "models/checkpoints", True), ("text_encoders", base / "models/text_encoders", True),
        ("text_encoders", base / "models/clip/  # legacy", True), ("unet", base / "models/with # hash", True),
        ("diffusion_models", base / "a b/c", True), ("loras", tmp_path / "paths/relative/loras", False)]
    touch(base / "a b/c/one.sft")
    touch(base / "models/with # hash/one.sft")
    touch(tmp_path / "models/diffusion_models/one.sft")
    folders = Folders(models=[tmp_path / "models"], extra=[file])
    assert not folders.resolve_file("unet", "one.sft").is_relative_to(tmp_path / "models"), "is_default goes first"


def test_home_and_variables_in_base_path(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "w"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "x.yaml"
    file.write_text("a:\n  base_path: $WEIGHTS\n  vae: v\nb:\n  base_path: ~/m\n  vae: v\n")
    found = [path for _, path, _ in read_extra_paths(file)]
    assert found[0] == tmp_path / "w/v"
    if os.name == "posix":
        assert found[1] == tmp_path / "home/m/v"


NAMES = st.text(alphabet="abcXYZ019 _-./", min_size=1, max_size=12).map(str.strip).filter(
    lambda text: text and text[0] not in "-./" and yaml.safe_load(f"k: {text}")["k"] == text)
KEYS = st.sampled_from(["vae", "unet", "loras", "clip", "checkpoints"])


SECTION = st.dictionaries(KEYS, st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "x.yaml"


@settings(max_examples=50)
@given(sections=st.dictionaries(st.sampled_from(["one", "two"]), SECTION, min_size=1, max_size=2))
def test_extra_paths_agree_with_a_yaml_library(scratch, sections):
    lines = []
    for section, entries in sections.items():
        lines.append(f"{section}:")
        for kind, paths in entries.items():
            lines += [f"  {kind}: {paths[0]}"] if len(paths) == 1 else [f"  {kind}: |", *(f"    {p}" for p in paths)]
    text = "\n".join(lines) + "\n"
    file = scratch
    file.write_text(text)
    expected = [(kind, Path(os.path.normpath(file.parent / line))) for conf in yaml.safe_load(text).values()
                for kind, value in conf.items() for line in value.split("\n") if line]
    assert [(kind, path) for kind, path, _ in read_extra_paths(file)] == expected


@pytest.mark.parametrize(("text", "said"), [
    ("a: [1, 2]\n", "line 1: 'a' must be a section"), ("a:\n\tvae: x\n", "line 2: indented by a tab"),
    ("  vae: x\n", "line 1: 'vae' stands outside any section"), ("a:\n  - x\n", "line 2: expected 'name: path'"),
    ("a:\n  vae x\n", "line 2: expected 'name: path', found 'vae x'"),
])
def test_broken_extra_paths(tmp_path, text, said):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=f"x.yaml, {said}"):
        read_extra_paths(file)
    with pytest.raises(MissingFile, match="no such file"):
        read_extra_paths(tmp_path / "none.yaml")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_extra_paths(file)


HOSTILE = ["../x.png", "a/../../x.png", "..", "/etc/passwd", "//server/share/x", "\\\\server\\share\\x.png",
           "..\\x.png",
           "C:\\x.png", "C:x.png", "c:/x.png", "x.png:stream", "file:///etc/passwd", "a\0.png", "a\n.png", "", " ", ".",
           "./", "CON", "nul.png", "a/LPT1.txt", "com¹.png", "aux .png", "conin$", "a./x.png", "a /x.png", "x.png.",
           "x.png ", "\ud800.png", "~/../x", "a" * 300, "a/" * 600 + "x", "\x7f.png", "/", "\\", "é" * 200]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_everywhere(name, tmp_path):
    touch(tmp_path / "x.png")
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(BadInput, match="file name") as caught:
        inside(root, name)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()
    folders = Folders(input=[root], output=root)
    for place in ("", " [input]", " [output]", " [temp]"):
        with pytest.raises(FluxKitError):
            folders.resolve_file("input", name + place)
    with pytest.raises(MissingFile):
        folders.resolve_file("vae", name)


@given(st.text(max_size=30))
def test_what_is_allowed_stays_inside(name):
    try:
        parts = check_name(name)
    except BadInput:
        return
    root = "/some/root"
    assert os.path.normpath(os.path.join(root, *parts)).startswith(root + "/")
    import ntpath
    joined = ntpath.normpath(ntpath.join("D:\\some\\root", *parts))
    assert joined.startswith("D:\\some\\root\\")
    assert ntpath.splitdrive(joined)[0] == "D:"


@pytest.mark.parametrize("name", ["x.png", "a b/ü x.png", "%2e%2e/x", "...x", "a..b.png", "console.png", "~x",
                                  "\u202etxt.png"])
def test_ordinary_names_are_allowed(name, tmp_path):
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_that_leave_the_picture_folder_are_refused(tmp_path):
    secret = touch(tmp_path / "secret.png")
    root = tmp_path / "input"
    root.mkdir()
    (root / "out.png").symlink_to(secret)
    (root / "dir").symlink_to(tmp_path)
    (root / "own.png").symlink_to(touch(root / "real.png"))
    folders = Folders(input=[root])
    for name in ("out.png", "dir/secret.png", "dir/new/x.png"):
        with pytest.raises(BadInput, match="is a link that leaves"):
            folders.resolve_file("input", name)
    assert folders.resolve_file("input", "own.png") == root / "own.png"


def test_pictures_are_found_in_their_folders_only(tmp_path):
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    touch(one / "a.png"), touch(two / "a.png"), touch(two / "sub/b.JPG"), touch(out / "o.png"), touch(one / "c.txt")
    folders = Folders(input=[one, two], output=out)
    assert folders.list_files("input") == ["a.png"]
    assert folders.resolve_file("input", "a.png") == one / "a.png"
    assert folders.resolve_file("input", "sub\\b.JPG") == two / "sub/b.JPG"
    assert folders.resolve_file("input", "a.png [input]") == one / "a.png"
    assert folders.resolve_file("input", "o.png [output]") == out / "o.png"
    with pytest.raises(MissingFile, match=r"picture 'a.pgn' is not in .*one, .*two; near: a.png"):
        folders.resolve_file("input", "a.pgn")
    with pytest.raises(MissingFile, match="no temp folder is there"):
        folders.resolve_file("input", "o.png [temp]")
    with pytest.raises(MissingFile, match="--input"):
        Folders().resolve_file("input", "a.png")


def test_advice_names_no_folder_of_the_pack(tmp_path):
    (tmp_path / "loras").mkdir()
    folders = Folders(models=[tmp_path, OWN / "models"])
    for kind in KINDS:
        with pytest.raises(MissingFile, match="Put it into") as error:
            folders.resolve_file(kind, "absent.safetensors")
        assert str(OWN) not in str(error.value) and str(tmp_path / KINDS[kind][0]) in str(error.value)
    with pytest.raises(MissingFile, match="given by --models"):
        Folders(models=[OWN / "models"]).resolve_file("vae", "absent.safetensors")
