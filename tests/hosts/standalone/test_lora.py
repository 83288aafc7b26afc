"""LoRAs in the standalone host: on the weights while a model runs, never before or after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from compare import relative
from family import Family
from family_fixtures import TINY_NAMES, samples
from flux_kit import hosts
from flux_kit.engine.adapters import Entry, Options, Row, attach, read_lora
from flux_kit.engine.adapters.attach import MARK
from flux_kit.engine.adapters.stack import parse_points, with_blocks, with_region, with_schedule
from flux_kit.engine.errors import BadInput, BadModelFile, FluxKitError, Interrupted, MissingFile, NotFinite
from flux_kit.engine.sampling import FlowTable
from flux_kit.hosts.loras import Files, share_of
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost

SAME = 2e-6
GOOD = ("kohya", "peft", "lokr", "xlabs", "fal", "swapped", "bias", "dora", "oft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Family().write(tmp_path_factory.mktemp("models"), TINY_NAMES)
    lora_files.write(made / "loras")
    return made


def make(folder: Path, tmp_path: Path, **options: Any) -> StandaloneHost:
    host = StandaloneHost(Folders(models=[folder], output=tmp_path), device="cpu", **options)
    hosts.use(host)
    return host


@pytest.fixture
def host(folder: Path, tmp_path: Path) -> Any:
    before = hosts._current
    yield make(folder, tmp_path)
    hosts._current = before


def model_of(host: StandaloneHost) -> Any:
    return host.load_model(host.resolve_file("diffusion_models", TINY_NAMES["dev"]))


def clip_of(host: StandaloneHost) -> Any:
    return host.load_text_encoders([host.resolve_file("text_encoders", TINY_NAMES[part]) for part in ("clip_l", "t5")])


def prompt() -> Any:
    torch.manual_seed(3)
    return [[torch.randn(1, 16, 64), {"pooled_output": torch.randn(1, 64)}]]


def drawn(host: StandaloneHost, model: Any, conditioning: Any = None, **options: Any) -> torch.Tensor:
    out: torch.Tensor = host.sample(model, conditioning or prompt(), None, host.empty_latent(64, 48), seed=2, steps=4,
                                    **options)["samples"]
    return out


def rows(name: str, strength: float = 0.7, **more: Any) -> list[Row]:
    return [Row(f"{name}.safetensors", strength, strength, **more)]


@pytest.mark.parametrize("name", GOOD)
def test_each_format_changes_the_picture_and_leaves_no_trace(host: StandaloneHost, folder: Path, name: str) -> None:
    """Against the same file attached by hand, in the other way."""
    model = model_of(host)
    base, before = drawn(host, model), {key: value.clone() for key, value in model.flux.state_dict().items()}
    made, _, report = host.with_loras(model, None, rows(name))
    mine = drawn(host, made)
    with_side = drawn(host, host.with_loras(model, None, rows(name), mode="side")[0])
    by_hand = attach(model.flux, [Entry(read_lora(folder / "loras" / f"{name}.safetensors"), 0.7)], mode="side")
    expected = drawn(host, model)
    by_hand.detach()
    assert relative(mine, expected) <= SAME and relative(with_side, expected) <= SAME
    assert relative(mine, base) > 1e-3 and f"{name}.safetensors" in report
    assert torch.equal(drawn(host, model), base) and MARK not in vars(model.flux)
    assert all(torch.equal(value, before[key]) for key, value in model.flux.state_dict().items())


def test_streamed_weights_give_the_same(folder: Path, tmp_path: Path, host: StandaloneHost) -> None:
    whole = {name: drawn(host, host.with_loras(model_of(host), None, rows(name))[0])
             for name in ("kohya", "lokr", "bias")}
    streaming = make(folder, tmp_path, memory="stream")
    for name, expected in whole.items():
        for mode in ("auto", "merge"):
            made, _, report = streaming.with_loras(model_of(streaming), None, rows(name), mode=mode)
            assert relative(drawn(streaming, made), expected) <= SAME, (name, mode)
        assert "side path" in report


def test_packed_weights_give_the_same_as_unpacked(folder: Path, tmp_path: Path, host: StandaloneHost) -> None:
    from gguf_files import quantise, unpack, write_gguf
    from safetensors.torch import load_file, save_file
    state = load_file(folder / "diffusion_models" / TINY_NAMES["dev"])
    packed = {name: tensor.ndim == 2 and tensor.shape[1] % 32 == 0 for name, tensor in state.items()}
    write_gguf(tmp_path / "q.gguf", {name: (quantise(tensor, "Q8_0"), "Q8_0") if packed[name] else tensor.float()
                                     for name, tensor in state.items()}, "flux")
    save_file({name: unpack(quantise(tensor, "Q8_0"), "Q8_0") if packed[name] else tensor.float()
               for name, tensor in state.items()}, tmp_path / "plain.safetensors")
    for name in ("kohya", "lokr"):
        outs = []
        for file in ("q.gguf", "plain.safetensors"):
            model = host.load_model(tmp_path / file)
            made, _, report = host.with_loras(model, None, rows(name))
            outs.append(drawn(host, made))
            assert ("by side path" in report) == (file == "q.gguf")
        assert relative(*outs) <= 1e-4 and relative(outs[0], drawn(host, host.load_model(tmp_path / "q.gguf"))) > 1e-3


def test_text_encoders(host: StandaloneHost) -> None:
    model, clip = model_of(host), clip_of(host)
    base = host.encode_prompt(clip, "a red circle")[0]
    _, made, report = host.with_loras(model, clip, rows("text"))
    changed = host.encode_prompt(made, "a red circle")[0]
    again = host.encode_prompt(clip, "a red circle")[0]
    assert relative(changed[0], base[0]) > 1e-4
    assert relative(changed[1]["pooled_output"], base[1]["pooled_output"]) > 1e-4
    assert torch.equal(again[0], base[0]) and torch.equal(again[1]["pooled_output"], base[1]["pooled_output"])
    assert "on CLIP-L" in report and "on T5" in report
    told = host.with_loras(model, None, rows("text"))[2]
    assert "2 text encoder layers have no effect: no CLIP is connected" in told
    assert made is not clip and not clip.loras and len(made.loras) == 1


def test_stacks_add_up_whatever_their_order(host: StandaloneHost) -> None:
    model = model_of(host)
    both = drawn(host, host.with_loras(model, None, [*rows("kohya"), *rows("peft")])[0])
    first = host.with_loras(model, None, rows("peft"))[0]
    assert relative(drawn(host, host.with_loras(first, None, rows("kohya"))[0]), both) <= SAME
    assert len(first.loras) == 1
    twice, _, report = host.with_loras(model, None, [*rows("kohya", 0.3), *rows("kohya", 0.4)])
    assert relative(drawn(host, twice), drawn(host, host.with_loras(model, None, rows("kohya"))[0])) <= SAME
    assert "more than once" in report


def test_a_row_that_is_off_reads_nothing(host: StandaloneHost) -> None:
    made, _, report = host.with_loras(model_of(host), None, [Row("nowhere.safetensors", 0.0, 0.0), Row("None")])
    assert report == "" and not made.loras


def test_ranges_curves_and_blocks(host: StandaloneHost) -> None:
    model = model_of(host)
    base, whole = drawn(host, model), drawn(host, host.with_loras(model, None, rows("kohya"))[0])

    def off(given: Any) -> tuple[float, float]:
        out = drawn(host, host.with_loras(model, None, given)[0])
        return relative(out, base), relative(out, whole)

    assert off(with_schedule(rows("kohya"), 0, 1, parse_points("0: 1")))[1] <= SAME
    assert off(rows("kohya", start=1.0))[0] == 0
    first, second = off(rows("kohya", end=0.5)), off(rows("kohya", start=0.5))
    assert min(*first, *second) > 1e-3 and first != second
    assert off(with_blocks(rows("kohya"), "all = 1"))[1] == 0
    assert off(with_blocks(rows("kohya"), "all = 0"))[0] == 0
    half = drawn(host, host.with_loras(model, None, rows("kohya", 0.35))[0])
    curve = drawn(host, host.with_loras(model, None, with_schedule(rows("kohya"), 0, 1, parse_points("0: 0.5")))[0])
    assert relative(curve, half) <= SAME
    assert off(with_blocks(rows("kohya"), "single = 0"))[1] > 1e-3


def test_a_range_follows_the_steps(host: StandaloneHost) -> None:
    """With the simple schedule half of the run is half of the steps: the first ones with the LoRA, the others without,
    as two samplers in a row do it."""
    model = model_of(host)
    with_lora = host.with_loras(model, None, rows("kohya"))[0]
    from flux_kit.hosts.standalone.objects import Guider, Noise, schedule_sigmas
    sigmas = schedule_sigmas(model, "simple", 4)
    latent = host.empty_latent(64, 48)
    ranged = host.with_loras(model, None, rows("kohya", end=0.5))[0]
    ours = host.run_sampler(Guider(ranged, prompt()), Noise(2), "euler", sigmas, latent).latent
    first = host.run_sampler(Guider(with_lora, prompt()), Noise(2), "euler", sigmas[:3], latent).latent
    expected = host.run_sampler(Guider(model, prompt()), Noise(None), "euler", sigmas[2:], first).latent
    assert relative(ours["samples"], expected["samples"]) <= 1e-5


@pytest.mark.parametrize("mu", [None, 0.5, 1.15])
def test_share_of_the_run_undoes_the_shift(mu: float | None) -> None:
    table = FlowTable(mu, 10_000)
    for share in (0.0, 0.05, 0.5, 0.95):
        assert abs(share_of(float(table.sigma(torch.tensor(1 - share))), mu) - share) < 1e-5
    assert share_of(0.0, mu) == 1


def test_regions(host: StandaloneHost) -> None:
    model = model_of(host)
    base, whole = drawn(host, model), drawn(host, host.with_loras(model, None, rows("kohya"))[0])

    def made(mask: torch.Tensor, background: float, text: float) -> torch.Tensor:
        return drawn(host, host.with_loras(model, None, with_region(rows("kohya"), mask, 0, background, text))[0])

    assert relative(made(torch.ones(8, 8), 0.0, 1.0), whole) <= SAME
    assert relative(made(torch.zeros(8, 8), 1.0, 1.0), whole) <= SAME
    assert torch.equal(made(torch.zeros(8, 8), 0.0, 0.0), base)
    left = (torch.arange(64) < 32).float().expand(48, 64)
    change = (made(left, 0.0, 0.0) - base).abs().mean(dim=(0, 1, 2))
    assert float(change[:4].mean()) > 1.5 * float(change[4:].mean()) > 0
    two = [*with_region(rows("kohya"), left, 0, 0.0, 0.0), *with_region(rows("kohya"), 1 - left, 0, 0.0, 0.0)]
    both = drawn(host, host.with_loras(model, None, two)[0])
    one = made(torch.ones(8, 8), 0.0, 0.0)
    assert relative(both, one) <= 1e-5


BAD = {"bad sdxl": (BadModelFile, "SDXL"), "bad sd3": (BadModelFile, "SD3"), "bad flux2": (BadModelFile, "FLUX.2"),
       "bad halves": (BadModelFile, "half of a pair"), "bad ranks": (BadModelFile, "ranks differ"),
       "bad nan": (NotFinite, "NaN"), "bad empty": (BadModelFile, "no tensors"),
       "bad cut": (BadModelFile, "incomplete"),
       "bad checkpoint": (BadModelFile, "not a LoRA"), "bad unknown": (BadModelFile, "no layer known here")}
IN_PART = {"bad halves": "left out", "bad ranks": "left out", "bad unknown": "1 unknown"}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(host: StandaloneHost, name: str) -> None:
    model = model_of(host)
    base = drawn(host, model)
    kind, says = BAD[name]
    with pytest.raises(kind, match=says) as caught:
        host.with_loras(model, clip_of(host), [*rows("kohya"), *rows(name)])
    assert f"{name}.safetensors" in str(caught.value)
    made, _, report = host.with_loras(model, None, rows(name), strict=False)
    if name in IN_PART:
        assert IN_PART[name] in report and relative(drawn(host, made), base) > 1e-3
    else:
        assert "NOT APPLIED" in report and says in report and torch.equal(drawn(host, made), base)
    assert not model.loras and torch.equal(drawn(host, model), base)


def test_a_missing_file_is_named_with_near_ones(host: StandaloneHost) -> None:
    with pytest.raises(MissingFile, match=r"kohia\.safetensors.*near: kohya\.safetensors"):
        host.with_loras(model_of(host), None, rows("kohia"))
    report = host.with_loras(model_of(host), None, rows("kohia"), strict=False)[2]
    assert "NOT APPLIED" in report and "near: kohya.safetensors" in report


def test_a_control_lora_wants_its_picture(host: StandaloneHost) -> None:
    made, _, report = host.with_loras(model_of(host), None, rows("control"))
    assert "needs its control picture" in report
    with pytest.raises(BadInput, match=r"control\.safetensors is a control LoRA"):
        drawn(host, made)
    assert MARK not in vars(made.flux) and made.flux.spec.in_channels == 64


def test_a_run_that_fails_leaves_the_model_as_it_was(host: StandaloneHost) -> None:
    model = model_of(host)
    base = drawn(host, model)
    made = host.with_loras(model, None, rows("kohya"))[0]
    host.interrupt()
    with pytest.raises(Interrupted):
        drawn(host, made)
    assert MARK not in vars(model.flux) and torch.equal(drawn(host, model), base)


def test_files_are_parsed_once_until_they_change(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(folder / "loras" / "kohya.safetensors", tmp_path / "a.safetensors"))
    files = Files()
    first = files.read(path, Options())
    assert files.read(path, Options()) is first and files.reads == 1
    os.utime(path, ns=(1, 1))
    assert files.read(path, Options()) is not first and files.reads == 2
    assert all(tensor.untyped_storage().resizable() for one in first.adapters for tensor in one.factors.values())
    small = Files(limit=1)
    small.read(path, Options())
    small.read(folder / "loras" / "peft.safetensors", Options())
    assert len(small) == 1


def test_core_s_loaders(run_prompt: Callable[..., Any]) -> None:
    nodes: dict[str, Any] = {
        "load": ("FluxKitLoadFlux", {"model": TINY_NAMES["dev"], "clip_l": TINY_NAMES["clip_l"],
                                     "t5": TINY_NAMES["t5"], "vae": TINY_NAMES["vae"]}),
        "both": ("LoraLoader", {"model": ["load", 0], "clip": ["load", 1], "lora_name": "text.safetensors",
                                "strength_model": 1.0, "strength_clip": 1.0}),
        "one": ("LoraLoaderModelOnly", {"model": ["both", 0], "lora_name": "kohya.safetensors", "strength_model": 0.7}),
        "pos": ("CLIPTextEncode", {"clip": ["both", 1], "text": "a red circle"}),
        "plain": ("CLIPTextEncode", {"clip": ["load", 1], "text": "a red circle"}),
        "empty": ("EmptySD3LatentImage", {"width": 64, "height": 48, "batch_size": 1})}
    for name, model in (("with", ["one", 0]), ("without", ["load", 0])):
        nodes[name] = ("KSampler", {
            "model": model, "positive": ["pos", 0], "negative": ["pos", 0], "latent_image": ["empty", 0], "seed": 1,
            "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0})
    result = run_prompt(nodes, keep="with without pos plain")
    assert relative(samples(result, "with"), samples(result, "without")) > 1e-3
    assert not torch.equal(result.outputs["pos"][0][0][0][0], result.outputs["plain"][0][0][0][0])
    nodes["one"][1]["lora_name"] = "bad sdxl.safetensors"
    with pytest.raises(FluxKitError, match="SDXL"):
        run_prompt(nodes, keep="with")
