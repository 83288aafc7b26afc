"""Draws the thumbnails of the example workflows, example_workflows/*.jpg, which ComfyUI's template browser shows.

    python -P docs/tools/thumbnails.py [EXAMPLE ...]

Each is what the workflow really draws, with tiny-flux in the place of the real models (`tiny_flux/examples.py`). With
`--sheet FILE` all go on one contact sheet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from flux_kit.cli import main as flux_kit
from flux_kit.tiny_flux.examples import STANDS
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "example_workflows"
SIDE, QUALITY = 512, 90
COLUMNS, CELL, LINE = 4, 200, 20  # of the sheet, pixels


def draw(name: str) -> Image.Image:
    """The last picture that an example saves."""
    stand = STANDS[name]
    flags = [flag for setting in stand.all_settings() for flag in ("--set", setting)]
    with tempfile.TemporaryDirectory() as inputs, tempfile.TemporaryDirectory() as out:
        stand.write_inputs(Path(inputs))
        code = flux_kit(["run", str(EXAMPLES / f"{name}.json"), "--out", out, "--input", inputs, "--device", "cpu",
                         "--dtype", "fp32", *flags])
        if code:
            sys.exit(code)
        with Image.open(max(Path(out).rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)) as picture:
            return picture.convert("RGB")


def sheet(pictures: dict[str, Image.Image]) -> Image.Image:
    """All inputs and results, one example a cell."""
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * 2 * CELL, rows * (CELL + LINE)), "white")
    pen = ImageDraw.Draw(page)
    for i, (name, picture) in enumerate(pictures.items()):
        x, y = i % COLUMNS * 2 * CELL, i // COLUMNS * (CELL + LINE)
        pen.text((x + 4, y + 4), name.replace("_", " "), fill="black")
        given = [each.draw().convert("RGBA") for each in STANDS[name].inputs.values()]
        for place, shown in enumerate([*given, picture][-2:] if len(given) < 2 else [joined(given), picture]):
            cell = shown.copy()
            cell.thumbnail((CELL - 8, CELL - 8))
            page.paste(cell, (x + place * CELL + 4, y + LINE), cell if cell.mode == "RGBA" else None)
    return page


def joined(pictures: list[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (sum(each.width for each in pictures), max(each.height for each in pictures)), "white")
    for i, each in enumerate(pictures):
        page.paste(each.convert("RGB"), (sum(before.width for before in pictures[:i]), 0))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="*", help="default: all")
    parser.add_argument("--sheet", type=Path, help="a contact sheet to write as well")
    arguments = parser.parse_args()
    pictures = {name: draw(name) for name in arguments.examples or STANDS}
    for name, picture in pictures.items():
        scale = SIDE / max(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        path = EXAMPLES / f"{name}.jpg"
        picture.resize(size, Image.Resampling.LANCZOS).save(path, quality=QUALITY, optimize=True)
        print(f"wrote {path.relative_to(ROOT).as_posix()}")
    if arguments.sheet:
        sheet(pictures).save(arguments.sheet)


if __name__ == "__main__":
    main()
