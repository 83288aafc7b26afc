"""PNG out with the workflow inside, PNG text back in, pictures in: whole files, bounded work, core's rounding."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_kit.engine.errors import BadInput, BadWorkflow, NotFinite
from flux_kit.hosts.standalone import io, png
from flux_kit.hosts.standalone.images import read_image
from flux_kit.hosts.standalone.png import expand_prefix, read_text, save_numbered, save_png, to_bytes
from flux_kit.hosts.standalone.workflow import load_workflow
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

GREY = torch.full((1, 8, 8, 3), 0.5)
META = {"prompt": {"1": {"class_type": "Größe", "inputs": {"x": [1, None]}}},
        "workflow": {"nodes": [], "\u2603": "\U0001f600"}}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


SIZE = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))


@given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3))
def test_rounding_is_cores(values):
    # ComfyUI: np.clip(255. * x, 0, 255).astype(np.uint8), which cuts off.
    expected = [int(min(max(np.float32(255.0) * np.float32(value), 0), 255)) for value in values]
    assert to_bytes(torch.tensor([[values]])).tolist() == [[expected]]


def test_text_and_pixels_arrive_in_pillow(tmp_path):
    image = torch.rand(5, 7, 3)
    save_png(image, tmp_path / "a.png", META)
    with Image.open(tmp_path / "a.png") as read:
        assert read.text == {"prompt": json.dumps(META["prompt"]), "workflow": json.dumps(META["workflow"])}
        assert (read.mode, read.size) == ("RGB", (7, 5))
        assert np.array_equal(np.asarray(read), to_bytes(image))
    assert read_text(tmp_path / "a.png", ("workflow",)) == {"workflow": json.dumps(META["workflow"])}
    assert b"tEXtprompt\0{" in (tmp_path / "a.png").read_bytes()


def test_numbering_goes_on_and_never_overwrites(tmp_path):
    saved = save_numbered(GREY.repeat(2, 1, 1, 1), tmp_path, "ComfyUI")
    assert saved == [{"filename": f"ComfyUI_0000{n}_.png", "subfolder": "", "type": "output"} for n in (1, 2)]
    (tmp_path / "ComfyUI_00007_.txt").write_text("counts too, as in core")
    (tmp_path / "ComfyUIX_00050_.png").write_text("does not")
    (tmp_path / "ComfyUI_b_00060_.png").write_text("does not")
    assert save_numbered(GREY, tmp_path, "ComfyUI")[0]["filename"] == "ComfyUI_00008_.png"
    assert save_numbered(GREY, tmp_path, "sub\\a/ComfyUI/")[0] == {
        "filename": "ComfyUI_00001_.png", "subfolder": "sub/a", "type": "output"}
    assert save_numbered(GREY.repeat(2, 1, 1, 1), tmp_path, "n%batch_num%", kind="temp")[1] == {
        "filename": "n1_00002_.png", "subfolder": "", "type": "temp"}
    assert save_numbered(GREY, tmp_path, "my. ")[0]["filename"] == "my. _00001_.png"


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "a/../../x", "C:\\x", "x\0", "CON/x", "a:b", "x" * 300])
def test_prefixes_cannot_leave(prefix, tmp_path):
    root = tmp_path / "out"
    root.mkdir()
    with pytest.raises(BadInput, match="file name"):
        save_numbered(GREY, root, prefix)
    assert files(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_linked_subfolder_cannot_leave(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/link").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="is a link that leaves"):
        save_numbered(GREY, tmp_path / "out", "link/x")


def test_prefix_tokens(monkeypatch):
    monkeypatch.setattr(time, "localtime", lambda: time.struct_time((2026, 3, 4, 5, 6, 7, 0, 0, 0)))
    assert expand_prefix("%year%-%month%-%day%_%hour%%minute%%second%_%width%x%height%_%x%", 64, 32) == (
        "2026-03-04_050607_64x32_%x%")
    assert expand_prefix("%date:yyyy-MM-dd%/%date:yy_M_d_hh:mm:s%/%date%", 1, 1) == (
        "2026-03-04/26_3_4_05-06-7/2026-03-04")
    assert expand_prefix("100% sure", 1, 1) == "100% sure"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_and_nothing_is_written(value, tmp_path):
    images = GREY.repeat(3, 1, 1, 1)
    images[2, 4, 4, 1] = value
    with pytest.raises(NotFinite, match="NaN or infinity; nothing was saved"):
        save_numbered(images, tmp_path, "sub/x")
    assert files(tmp_path) == []
    assert not (tmp_path / "sub").exists()


@pytest.mark.parametrize("shape", [(8, 8, 3), (0, 8, 8, 3), (1, 8, 8, 1), (1, 3, 8, 8)])
def test_wrong_shapes(shape, tmp_path):
    with pytest.raises(BadInput, match=r"must be .*found"):
        save_numbered(torch.zeros(shape), tmp_path, "x")


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_no_litter(step, tmp_path, monkeypatch):
    save_png(GREY[0], tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        save_png(GREY[0] * 2, tmp_path / "a.png")
    with pytest.raises(OSError, match="No space"):
        save_numbered(GREY, tmp_path, "b")
    assert files(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_many_savers_at_once_lose_nothing(tmp_path):
    made: list[str] = []

    def save(level: int) -> None:
        picture = torch.full((1, 1, 1, 3), level / 255)
        made.extend(save_numbered(picture, tmp_path, "x")[0]["filename"] for _ in range(10))

    threads = [threading.Thread(target=save, args=(level,)) for level in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 80
    assert files(tmp_path) == sorted(made)
    levels = [Image.open(tmp_path / name).getpixel((0, 0))[0] for name in made]
    assert sorted(levels) == sorted(list(range(8)) * 10)


@pytest.mark.skipif(sys.platform == "win32", reason="posix modes")
def test_pictures_get_the_users_mode(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    save_numbered(GREY, tmp_path, "x")
    assert (tmp_path / "x_00001_.png").stat().st_mode == plain.stat().st_mode


# -- texts back in

def test_all_kinds_of_text_chunks_as_pillow_writes_them(tmp_path):
    info = PngInfo()
    info.add_text("prompt", "plain é")
    info.add_text("packed", "z" * 1000, zip=True)
    info.add_itxt("workflow", '{"\u2603": 1}', zip=True)
    info.add_itxt("other", "\u2603", "en", "translated")
    Image.new("L", (1, 1)).save(tmp_path / "a.png", pnginfo=info)
    keys = ("prompt", "packed", "workflow", "other", "absent")
    assert read_text(tmp_path / "a.png", keys) == {
        "prompt": "plain é", "packed": "z" * 1000, "workflow": '{"\u2603": 1}', "other": "\u2603"}


@pytest.mark.parametrize(("data", "said"), [
    (b"GIF89a", "not a PNG"),
    (png.PNG_SIGNATURE, "cut off"),
    (png.PNG_SIGNATURE + SIZE, "cut off"),
    (png.PNG_SIGNATURE + SIZE + chunk(b"tEXt", b"workflow\0{}")[:-6], "goes beyond its end"),
    (png.PNG_SIGNATURE + b"\xff\xff\xff\xfftEXt", "goes beyond its end"),
    (png.PNG_SIGNATURE + chunk(b"tEXt", b"workflow\0{}")[:-1] + b"\0" + chunk(b"IEND", b""), "wrong checksum"),
    (png.PNG_SIGNATURE + chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * (16 * 2**20 + 1))), "more than 16 MB"),
    (png.PNG_SIGNATURE + chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(b"a" * (16 * 2**20 + 1))), "than 16 MB"),
    (png.PNG_SIGNATURE + chunk(b"zTXt", b"workflow\0\0nonsense"), "cannot be read"),
    (png.PNG_SIGNATURE + chunk(b"iTXt", b"workflow\0\0\0\0\0\xff\xff"), "cannot be read"),
    (png.PNG_SIGNATURE + chunk(b"tEXt", b"") * 100_001, "more than 100000 PNG chunks"),
])
def test_hostile_pngs(data, said, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(BadWorkflow, match=said) as caught:
        read_text(path, ("workflow",))
    assert caught.value.file == str(path)
    assert str(caught.value).startswith("x.png: ")


class Shown(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Shown", is_output_node=True, inputs=[io.Int.Input("seed")])


def test_a_saved_picture_is_a_workflow_again(tmp_path):
    nodes = {"Shown": Shown}
    ui = {"nodes": [{"id": 1, "type": "Shown", "widgets_values": [7, "fixed"]}], "links": []}
    (tmp_path / "w.json").write_text(json.dumps(ui))
    workflow = load_workflow(tmp_path / "w.json", nodes)
    prompt = {"1": {**workflow.prompt["1"], "inputs": {"seed": 8}}}
    save_png(GREY[0], tmp_path / "a.png", {"prompt": prompt, **workflow.extra_pnginfo})
    again = load_workflow(tmp_path / "a.png", nodes)
    assert again.prompt["1"]["inputs"] == {"seed": 8}, "the prompt is what ran"
    assert again.ui == ui
    save_png(GREY[0], tmp_path / "b.png", workflow.extra_pnginfo)
    assert load_workflow(tmp_path / "b.png", nodes).prompt == workflow.prompt
    save_png(GREY[0], tmp_path / "c.png")
    with pytest.raises(BadWorkflow, match=r"^c\.png: this PNG holds no workflow"):
        load_workflow(tmp_path / "c.png", nodes)
    save_png(GREY[0], tmp_path / "d.png", {"prompt": "text"})
    with pytest.raises(BadWorkflow, match=r"^d\.png: no workflow"):
        load_workflow(tmp_path / "d.png", nodes)


# -- pictures in

def test_pictures_and_masks_as_core_reads_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, mask = read_image(tmp_path / "a.png")
    assert torch.equal(image, torch.from_numpy(pixels[None, :, :, :3].astype(np.float32) / 255))
    assert torch.equal(mask, 1 - torch.from_numpy(pixels[None, :, :, 3].astype(np.float32) / 255))
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.png")
    image, mask = read_image(tmp_path / "b.png")
    assert image.shape == (1, 6, 9, 3)
    assert torch.equal(mask, torch.zeros(1, 64, 64))
    turned = Image.Exif()
    turned[0x0112] = 6  # stored rotated: 90 degrees clockwise makes it upright
    Image.fromarray(pixels[..., :3]).save(tmp_path / "c.png", exif=turned)
    assert torch.equal(read_image(tmp_path / "c.png")[0], image.rot90(-1, (1, 2)))


def test_too_large_too_many_or_no_picture(tmp_path):
    bomb = png.PNG_SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 13_300, 13_300, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(bomb + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    with pytest.raises(BadInput, match=r"bomb\.png: .*13300 x 13300.*64 megapixels"):
        read_image(tmp_path / "bomb.png")
    frames = [Image.new("RGB", (4, 4), (3 * n, 255 - 3 * n, 0)) for n in range(65)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(BadInput, match=r"long\.gif: 65 frames, at most 64"):
        read_image(tmp_path / "long.gif")
    frames[0].save(tmp_path / "short.gif", save_all=True, append_images=frames[1:4])
    assert read_image(tmp_path / "short.gif")[0].shape == (4, 4, 4, 3)
    save_png(torch.rand(50, 50, 3), tmp_path / "whole.png")
    cut = (tmp_path / "whole.png").read_bytes()[:2000]
    for name, data in (("cut.png", cut), ("text.png", b"hello"), ("no.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match=name):
            read_image(tmp_path / name)
