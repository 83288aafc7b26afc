"""The same picture however little memory the device has, proved on a device that refuses more than its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from budget import Budget
from family import Family
from flux_kit.engine.convert import quantize
from flux_kit.engine.errors import BadInput, NotEnoughMemory
from flux_kit.engine.memory import Placed, activations, weights_of
from flux_kit.engine.models.tiling import decode_tiled
from flux_kit.engine.quant import UnpackedCache
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.memory import Residence, is_out_of_memory

STEPS = 2
NAMES = {"dev": "d.safetensors", "t5": "t.safetensors", "clip_l": "c.safetensors", "vae": "v.safetensors"}


@pytest.fixture
def files(family: Family, tmp_path: Path) -> Path:
    """A models folder of its own, which a test may damage."""
    return family.write(tmp_path / "models", NAMES)


class Run:
    """One host on one models folder, with or without a budget."""

    def __init__(self, models: Path, budget: int | None = None, memory: str = "auto") -> None:
        self.folders = Folders(models=[models])
        self.host = StandaloneHost(self.folders, device="cpu", memory=memory)
        self.device = None
        self.lines: list[str] = []
        if budget is not None:
            self.device = Budget(budget)
            self.host.residence = Residence(self.device, memory, self.lines.append)

    def file(self, part: str) -> Path:
        kind = {"dev": "diffusion_models", "vae": "vae"}.get(part, "text_encoders")
        return self.host.resolve_file(kind, NAMES[part])

    def load(self) -> tuple[Any, Any, Any]:
        return (self.host.load_model(self.file("dev")),
                self.host.load_text_encoders([self.file("clip_l"), self.file("t5")]),
                self.host.load_vae(self.file("vae")))

    def picture(self, parts: tuple[Any, Any, Any]) -> torch.Tensor:
        model, clip, vae = parts
        with torch.inference_mode():  # as the executor runs nodes
            positive = self.host.encode_prompt(clip, "a (red:1.2) circle")
            latent = self.host.sample(model, positive, None, self.host.empty_latent(48, 32), seed=7, steps=STEPS)
            return self.host.decode(vae, latent)


def needs(parts: tuple[Any, Any, Any]) -> dict[str, int]:
    """Bytes of each stage with all its weights on the device, counted from the models that are there."""
    model, clip, vae = parts
    size = torch.float32.itemsize
    sizes = {"t5": clip.encoders.t5, "clip_l": clip.encoders.clip, "vae": vae.autoencoder}
    held = {role: sum(t.numel() * t.element_size() for t in module.parameters()) for role, module in sizes.items()}
    weights = weights_of(model.flux, "transformer", torch.float32)  # without modulations: those are scratch
    return {"encode": held["t5"] + held["clip_l"] + activations.text_bytes(clip.encoders.t5.spec, 256, size),
            "sample": weights.total + weights.scratch + activations.sample_bytes(model.flux.spec, 48, 32, 1, 256, size),
            "decode": held["vae"] + activations.decode_bytes(vae.autoencoder.spec, 48, 32, size)}


@pytest.fixture
def plain(files: Path) -> torch.Tensor:
    """The picture of an ordinary host, all on the CPU."""
    run = Run(files)
    return run.picture(run.load())


def test_whole_stages_fit_one_at_a_time(files: Path, plain: torch.Tensor) -> None:
    """Encoders leave before the transformer comes, it leaves before the decoder: the budget is that of the largest."""
    most = max(needs(Run(files).load()).values())
    run = Run(files, most + 64 * 1024)  # a little for the alignment of tensors
    parts = run.load()
    assert run.device is not None and run.device.held == 0, "loading takes nothing of the device"
    assert torch.equal(run.picture(parts), plain)
    assert run.device.peak <= run.device.nbytes and not any("stream" in line for line in run.lines)
    assert sum(needs(parts).values()) > run.device.nbytes, "the test shows nothing if all fits at once"


@pytest.mark.parametrize("memory", ["auto", "stream"])
def test_a_transformer_that_does_not_fit_streams(files: Path, memory: str) -> None:
    whole = Run(files)
    parts = whole.load()
    weights = weights_of(parts[0].flux, "transformer", torch.float32)
    budget = needs(parts)["sample"] - min(weights.blocks)
    run = Run(files, budget, memory)
    positive = whole.host.encode_prompt(parts[1], "x")
    same, made = (each.host.sample(each.host.load_model(each.file("dev")), positive, None,
                                   each.host.empty_latent(48, 32), seed=7, steps=STEPS) for each in (whole, run))
    assert torch.equal(made["samples"], same["samples"])
    assert run.device is not None and 0 < run.device.peak <= budget
    said = next(line for line in run.lines if line.startswith("sample"))
    assert "blocks stream" in said
    assert ("6 of 6" in said) == (memory == "stream")


def test_the_least_budget_streams_every_block_and_less_is_refused(files: Path, plain: torch.Tensor) -> None:
    parts = Run(files).load()
    weights = weights_of(parts[0].flux, "transformer", torch.float32)
    work = activations.sample_bytes(parts[0].flux.spec, 48, 32, 1, 256, 4)
    least = weights.rest + 2 * max(weights.blocks) + weights.scratch + work
    full = Run(files, 1 << 30)
    positive = full.host.encode_prompt(parts[1], "x")
    run = Run(files, least + 16 * 1024)
    model = run.host.load_model(run.file("dev"))
    latent = run.host.sample(model, positive, None, run.host.empty_latent(48, 32), seed=7, steps=STEPS)
    same = full.host.sample(parts[0], positive, None, full.host.empty_latent(48, 32), seed=7, steps=STEPS)
    assert torch.equal(latent["samples"], same["samples"]) and "6 of 6" in run.lines[-1]
    small = Run(files, least - 4096)
    with pytest.raises(NotEnoughMemory, match=r"sample: 0\.0 MiB of device memory are missing.*smaller") as caught:
        small.host.sample(small.host.load_model(small.file("dev")), positive, None, small.host.empty_latent(48, 32),
                          seed=7, steps=1)
    assert caught.value.missing is not None and 0 < caught.value.missing <= 4096
    assert small.device is not None and small.device.held == 0


def test_full_does_not_stream(files: Path) -> None:
    run = Run(files, needs(Run(files).load())["sample"] - 1000, "full")
    positive = Run(files).host.encode_prompt(run.load()[1], "x")
    with pytest.raises(NotEnoughMemory, match="--memory auto"):
        run.host.sample(run.load()[0], positive, None, run.host.empty_latent(48, 32), seed=7, steps=1)


def test_with_room_for_all_nothing_is_moved_twice(files: Path, plain: torch.Tensor) -> None:
    run = Run(files, 1 << 30)
    parts = run.load()
    assert torch.equal(run.picture(parts), plain)
    assert run.device is not None
    moves = len(run.device.taken)
    run.picture(parts)
    assert len(run.device.taken) == moves
    run.host.residence.leave()
    assert run.device.held == 0


def test_the_decoder_works_in_strips_when_it_must(files: Path) -> None:
    vae = Run(files).load()[2]
    latent = {"samples": torch.randn(1, 16, 40, 24, generator=torch.Generator().manual_seed(0))}
    weights = weights_of(vae.autoencoder, "vae", torch.float32).total
    strips = activations.strip_bytes(vae.autoencoder.spec, 192, 320, 4)
    run = Run(files, weights + strips + 64 * 1024)
    made = run.host.decode(run.host.load_vae(run.file("vae")), latent)
    assert "in strips" in run.lines[-1]
    assert torch.equal(made, Run(files).host.decode(vae, latent, tile_size=64))


def test_running_out_in_the_middle_moves_everything_off(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way in which torch and drivers say it; the same run works afterwards."""
    run = Run(files, 1 << 30)
    parts = run.load()
    positive = run.host.encode_prompt(parts[1], "x")
    run.host.residence.leave()
    homes = {name: tensor.data_ptr() for name, tensor in parts[0].flux.named_parameters()}
    block = parts[0].flux.single_blocks[1]
    for error in (torch.OutOfMemoryError("x"), RuntimeError("CUDA error: out of memory"), MemoryError(),
                  RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")):
        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        handle = block.register_forward_pre_hook(fail)
        with pytest.raises(NotEnoughMemory, match=r"--memory stream.*--memory cpu"):
            run.host.sample(parts[0], positive, None, run.host.empty_latent(48, 32), seed=7, steps=STEPS)
        handle.remove()
        assert run.device is not None and run.device.held == 0
        assert {name: tensor.data_ptr() for name, tensor in parts[0].flux.named_parameters()} == homes
    run.picture(parts)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_what_the_host_has_no_memory_for_is_refused_before_it_is_tried(files: Path, monkeypatch: pytest.MonkeyPatch
                                                                       ) -> None:
    """On a CPU nothing else would say it: the system ends a program that takes too much."""
    run = Run(files)
    model, clip, vae = run.load()
    positive, latent = run.host.encode_prompt(clip, "x"), run.host.empty_latent(48, 320)
    spec, image = vae.autoencoder.spec, torch.rand(1, 320, 48, 3)
    whole, strips = activations.decode_bytes(spec, 48, 320, 4), activations.strip_bytes(spec, 48, 320, 4)
    assert strips < whole
    picture = run.host.decode(vae, latent)
    told: list[bool] = []
    monkeypatch.setattr("flux_kit.hosts.standalone.host.decode_tiled", lambda *given, **more: (
        told.append(True), decode_tiled(*given, **more))[1])
    monkeypatch.setattr("flux_kit.hosts.standalone.memory.host_free", lambda swap=False: strips)
    assert torch.allclose(run.host.decode(vae, latent), picture, atol=1e-4) and told
    monkeypatch.setattr("flux_kit.hosts.standalone.memory.host_free", lambda swap=False: 1 << 40 if swap else 4096)
    assert torch.allclose(run.host.decode(vae, latent), picture, atol=1e-4)     # the system may swap
    monkeypatch.setattr("flux_kit.hosts.standalone.memory.host_free", lambda swap=False: 4096)
    for work in (lambda: run.host.decode(vae, latent), lambda: run.host.encode(vae, image),
                 lambda: run.host.encode_prompt(clip, "x"),
                 lambda: run.host.sample(model, positive, None, latent, seed=7, steps=STEPS)):
        with pytest.raises(NotEnoughMemory, match=r"MiB of host memory are missing.*smaller picture"):
            work()
    with run.host.residence.running("depth map", [], 1 << 30) as in_strips:     # a rough figure refuses nothing
        assert not in_strips


def test_unknown_mode(files: Path) -> None:
    with pytest.raises(BadInput, match="auto, full, stream, cpu"):
        Run(files, memory="some")


def test_a_model_that_does_not_leave_is_noticed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of `test_whole_stages_fit_one_at_a_time` holds no two stages at once."""
    run = Run(files, max(needs(Run(files).load()).values()) + 64 * 1024)
    monkeypatch.setattr(Placed, "leave", lambda _: None)
    try:
        run.picture(run.load())
    except (NotEnoughMemory, torch.OutOfMemoryError):
        return
    assert any("stream" in line for line in run.lines), "where too much stays, the next stage must feel it"


class Kept(UnpackedCache):
    """Remembers how much it held when it was let go of."""

    held: ClassVar[list[int]] = []

    def detach(self) -> None:
        if self.dtype is not None and self.nbytes:
            self.held.append(self.nbytes)
        super().detach()


def packed_run(files: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Run:
    monkeypatch.setattr(Kept, "held", [])
    monkeypatch.setattr("flux_kit.hosts.standalone.memory.UnpackedCache", Kept)
    kind = files / "diffusion_models"
    if not (kind / "q.gguf").exists():
        quantize(kind / NAMES["dev"], kind / "q.gguf", "Q8_0")
        (kind / NAMES["dev"]).unlink()
    monkeypatch.setitem(NAMES, "dev", "q.gguf")
    return Run(files, **options)


def test_memory_to_spare_holds_unpacked_weights_and_changes_nothing(files: Path, monkeypatch: pytest.MonkeyPatch
                                                                    ) -> None:
    run = packed_run(files, monkeypatch)
    parts = run.load()
    wanted = run.picture(parts)
    assert len(Kept.held) == 1 and Kept.held[0] > 100_000, "the transformer's, and no others"
    assert all(layer.cache is None for layer in parts[0].flux.modules() if hasattr(layer, "cache")), "given back"
    monkeypatch.setattr("flux_kit.hosts.standalone.memory.REPEATED", ())
    again = packed_run(files, monkeypatch)
    assert torch.equal(again.picture(again.load()), wanted) and not Kept.held


@pytest.mark.parametrize("memory", ["auto", "stream"])
def test_no_weight_is_held_unpacked_where_memory_is_short(files: Path, memory: str, monkeypatch: pytest.MonkeyPatch
                                                          ) -> None:
    plain = packed_run(files, monkeypatch)
    parts = plain.load()
    wanted = plain.picture(parts)
    budget = max(needs(parts).values()) if memory == "auto" else 1 << 40
    run = packed_run(files, monkeypatch, budget=budget, memory=memory)
    assert torch.equal(run.picture(run.load()), wanted)
    assert sum(Kept.held) <= budget // 2 if memory == "auto" else not Kept.held
