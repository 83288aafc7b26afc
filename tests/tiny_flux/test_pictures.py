"""What the shipped tiny-flux draws, judged by pixels, through the command line, workflows and the engine.

The full score (500 cases, several guidances, lengths and sizes) is `python -m flux_kit.tiny_flux.score`; these are
samples of it with fixed seeds. The floors guard what the shipped weights reach today, with room for the luck of a small
sample (docs/log.md has the whole score). Raise the floors with the weights. Lowered once: 256 x 256, by 0.05, when
tiny-flux-dev learned to follow T5 alone, which Redux needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from flux_kit.cli import main
from flux_kit.engine.adapters import Entry, attach, read_lora
from flux_kit.tiny_flux.formats import pictures_of
from flux_kit.tiny_flux.loras import EFFECTS, LORAS, Effect, base, cross_cases, plain_cases, share
from flux_kit.tiny_flux.scenes import HELD_OUT_SCENES, Scene
from flux_kit.tiny_flux.score import Case, Studio, held_out_cases, matches, read_picture, round_trip_psnr, score
from PIL import Image

DEV_FLOOR, SCHNELL_FLOOR, PADDING_FLOOR = 0.9, 0.85, 0.8
LORA_FLOOR, SUM_FLOOR = 0.75, 0.6
SIZE_FLOORS = {(96, 96): 0.65, (192, 128): 0.85, (128, 256): 0.85, (256, 256): 0.8}
EXAMPLES = Path(__file__).parents[2] / "example_workflows"
MODELS = Path(__file__).parents[2] / "tiny_flux" / "models"


@pytest.fixture(scope="module")
def dev() -> Studio:
    return Studio("dev")


@pytest.fixture(scope="module")
def schnell() -> Studio:
    return Studio("schnell")


def picture(path: str | Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def test_files_are_complete() -> None:
    files = {path.relative_to(MODELS).as_posix() for path in MODELS.rglob("*.safetensors")}
    assert files >= {
        "diffusion_models/tiny-flux-dev.safetensors", "diffusion_models/tiny-flux-schnell.safetensors",
        "text_encoders/tiny-t5.safetensors", "text_encoders/tiny-clip_l.safetensors", "vae/tiny-ae.safetensors",
        *(f"loras/{effect.file}" for effect in EFFECTS.values())}


def test_the_autoencoder_keeps_held_out_scenes(dev: Studio) -> None:
    assert round_trip_psnr(dev.autoencoder, HELD_OUT_SCENES[::14]) >= 30


@pytest.mark.parametrize("guidance", [2.5, 3.5, 5.0])
def test_dev_draws_what_is_asked(dev: Studio, guidance: float) -> None:
    assert score(dev, held_out_cases(40, seed=int(guidance * 10)), guidance=guidance, batch=20) >= DEV_FLOOR


def test_schnell_draws_what_is_asked_in_four_steps(schnell: Studio) -> None:
    assert score(schnell, held_out_cases(40), batch=20) >= SCHNELL_FLOOR


@pytest.mark.parametrize("size", SIZE_FLOORS)
def test_other_sizes_follow_the_prompt(dev: Studio, size: tuple[int, int]) -> None:
    """At 96 x 96 a small figure is three latent cells wide: right in 73 of 100, so that 16 would tell little."""
    cases = held_out_cases(48 if size == (96, 96) else 16, seed=3)
    assert score(dev, cases, size=size, batch=16) >= SIZE_FLOORS[size]


def test_longer_padding_changes_little(dev: Studio) -> None:
    assert score(dev, held_out_cases(16, seed=4), t5_length=512, batch=16) >= PADDING_FLOOR


def test_low_guidance_strays(dev: Studio) -> None:
    """Guidance means something: at 1 half of the training captions told of another picture."""
    cases = [Case(case.scene, case.prompt) for case in held_out_cases(40, seed=5)]
    assert score(dev, cases, guidance=1.0, batch=20) < score(dev, cases, guidance=3.5, batch=20)


def test_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, preview = tmp_path / "out.png", tmp_path / "preview.png"
    assert main(["generate", "a large red circle on the left on a blue background", "-o", str(out), "--json",
                 "--preview", str(preview)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] and answer["images"] == [str(out)] and answer["seed"] == 0
    assert matches(Scene("large", "red", "circle", "left", "blue"), picture(out))
    # the last preview is the picture an eighth of the size, four times enlarged, roughly in its colours
    small = picture(preview).astype(float)
    assert small.shape == (64, 64, 3) and not list(tmp_path.glob("*.part"))
    assert small[30:34, 14:20, 0].mean() > 120 > small[30:34, 14:20, 2].mean() + 30
    assert small[8:14, 50:60, 2].mean() > 120 > small[8:14, 50:60, 0].mean() + 30


def test_the_picture_carries_its_workflow(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(EXAMPLES / "hello_tiny_flux.json"), "--out", "first", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["images"][0]
    assert read_picture(picture(first)).scene is not None
    assert main(["run", first, "--out", "again", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["images"][0]
    assert np.array_equal(picture(first), picture(again))
    with Image.open(first) as opened:
        assert {"prompt", "workflow"} <= set(opened.text)
        seed = next(f"{node}.seed" for node, at in json.loads(opened.text["prompt"]).items() if "seed" in at["inputs"])
    assert main(["run", first, "--out", "other", "--set", f"{seed}=99", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)["images"][0]
    assert not np.array_equal(picture(first), picture(other))
    with Image.open(other) as opened:  # the drawn workflow would tell the old seed
        assert "workflow" not in opened.text and '"seed": 99' in opened.text["prompt"].replace('"99"', "99")


def test_negative_prompt_and_cfg(tmp_path: Path) -> None:
    """True CFG at 2 against another colour still draws the prompt."""
    out = tmp_path / "out.png"
    assert main(["generate", "a small green square at the top on a white background", "--negative",
                 "a small red square at the top on a white background", "--cfg", "1.5", "-o", str(out)]) == 0
    assert matches(Scene("small", "green", "square", "top", "white"), picture(out))


def test_a_lora_teaches_a_shape(dev: Studio) -> None:
    """tiny-lora-cross: crosses of colours and places it never saw together; none without it, and the rest stays."""
    effect, cases = EFFECTS["cross"], cross_cases(16, seed=6)
    assert share(dev, effect, cases, 1.0)[0] >= 0.85
    assert share(dev, effect, cases[:8], 0.0)[0] == 0
    assert share(dev, effect, held_out_cases(16, seed=7), 1.0)[0] >= 0.8


def test_a_lora_shifts_colours(dev: Studio) -> None:
    """tiny-lora-opposite: what the prompt says, in the colours across the wheel; the base's own without it."""
    effect, cases = EFFECTS["opposite"], plain_cases(16, seed=8)
    shifted, own = share(dev, effect, cases, 1.0)
    assert shifted >= LORA_FLOOR and own == 0
    shifted, own = share(dev, effect, cases[:8], 0.0)
    assert shifted == 0 and own >= LORA_FLOOR


@pytest.mark.parametrize("kind", ["fp16", "Q4_K_S"])
def test_the_sum_of_two_loras_does_both(kind: str, tmp_path: Path) -> None:
    """Crosses in opposite colours; the merged file and the two in a stack give the same, on packed weights too."""
    studio, cases = Studio("dev"), cross_cases(8, seed=9)
    studio.flux = base(kind, tmp_path)
    assert share(studio, EFFECTS["both"], cases, 1.0)[0] >= SUM_FLOOR
    merged, stacked = (painted(studio, cases[:2], [EFFECTS[name] for name in names])
                       for names in (("both",), ("opposite", "cross")))
    assert np.abs(np.int16(merged) - np.int16(stacked)).max() <= 2


def painted(studio: Studio, cases: Sequence[Case], effects: Sequence[Effect]) -> np.ndarray:
    attached = attach(studio.flux, [Entry(read_lora(LORAS / effect.file)) for effect in effects], mode="side")
    try:
        return np.stack(pictures_of(studio, cases))
    finally:
        attached.detach()
