"""Weights that come and go: every kind of layer streams to the same numbers, and nothing is copied too early."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import Budget
from comfy_quant_files import packed
from family import DEV, Family
from flux_kit.engine.memory import Placed, part_weights, weights_of
from flux_kit.engine.memory.placing import CudaLane, PinnedCopies
from flux_kit.engine.models.modulation import ModulationTable
from flux_kit.engine.models.ops import PLAIN
from flux_kit.engine.weights import detect, load, open_checkpoint, to_diffusers
from gguf_files import quantise
from safetensors.torch import save_file

FORMATS = ("F32", "F8_E4M3", "Q8_0", "Q4_0")
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def transformers(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The miniature transformer in several types."""
    import gguf
    folder = tmp_path_factory.mktemp("types")
    found = {"F32": folder / "f32.safetensors", "F8_E4M3": folder / "fp8.safetensors"}
    save_file({name: tensor.float() for name, tensor in family.dev.items()}, found["F32"])
    save_file({name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
               for name, tensor in family.dev.items()}, found["F8_E4M3"])
    for type in ("Q8_0", "Q4_0"):
        found[type] = folder / f"{type}.gguf"
        writer = gguf.GGUFWriter(str(found[type]), "flux")
        for name, tensor in family.dev.items():
            if tensor.ndim == 2 and "_blocks." in name:
                writer.add_tensor(name, quantise(tensor, type), raw_dtype=gguf.GGMLQuantizationType[type])
            else:
                writer.add_tensor(name, tensor.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return found


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {"img": torch.randn(1, 12, 64, generator=made), "img_ids": torch.zeros(1, 12, 3),
            "txt": torch.randn(1, 5, DEV.context_in_dim, generator=made), "txt_ids": torch.zeros(1, 5, 3),
            "timesteps": torch.tensor([0.5]), "y": torch.randn(1, DEV.vec_in_dim, generator=made),
            "guidance": torch.tensor([3.5])}


@pytest.mark.parametrize("type", FORMATS)
def test_a_header_tells_what_loading_will_take(transformers: dict[str, Path], type: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with open_checkpoint(transformers[type]) as checkpoint:
            told = part_weights(checkpoint, detect(checkpoint).parts["transformer"], dtype)
            model = load(checkpoint, "transformer", dtype=dtype)
        ModulationTable(model)
        found = weights_of(model, "transformer", dtype)
        assert replace(told, made=0) == found
        assert told.total + told.home == sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        assert told.home and len(told.blocks) == DEV.depth + DEV.depth_single_blocks


def four_bit(state: State) -> State:
    """Matrices of the blocks as bitsandbytes keeps them, codes and scales without meaning."""
    found = {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or "blocks" not in name or tensor.shape[1] % 64:
            found[name] = tensor
            continue
        words = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": list(tensor.shape)}).encode()
        found |= {name: torch.zeros(tensor.numel() // 2, dtype=torch.uint8),
                  f"{name}.absmax": torch.ones(tensor.numel() // 64),
                  f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(words), dtype=torch.uint8)}
    return found


def fp8(state: State, scale: bool = False) -> State:
    found = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    scales = {name.replace(".weight", ".scale_weight"): torch.ones(()) for name, tensor in state.items()
              if scale and tensor.ndim == 2}
    return found | scales


def mixed(state: State) -> State:
    return {name: tensor.to(torch.float8_e4m3fn) if "to_q" in name else tensor for name, tensor in state.items()}


def comfy(kind: str) -> Callable[[State], State]:
    return lambda state: packed(state, lambda name: kind if "blocks" in name else None)[0]


PRECISIONS: dict[str, Callable[[State], State]] = {
    "bf16": lambda state: state, "fp8": fp8, "scaled fp8": lambda state: fp8(state, scale=True), "q in fp8": mixed,
    "NF4": four_bit, **{kind: comfy(kind) for kind in ("INT8", "MXFP8", "NVFP4_16", "NVFP4_16 with columns")}}


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PRECISIONS)
def test_a_header_tells_what_is_not_mapped(family: Family, tmp_path: Path, kind: str, dtype: torch.dtype, layout: str
                                           ) -> None:
    """Numbers that are cast, fused from several tensors or put together take host memory; all others do not."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in family.dev.items()}
    stored = PRECISIONS[kind](state if layout == "bfl" else to_diffusers(state, DEV))
    save_file(stored, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        told = part_weights(checkpoint, detect(checkpoint).parts["transformer"], dtype)
        model = load(checkpoint, "transformer", dtype=dtype)
        (file,) = checkpoint.files
        begin, size = file.view(0, 1).data_ptr(), file.identity[2]
        made = sum(tensor.nbytes for name, tensor in model.named_parameters()
                   if not begin <= tensor.data_ptr() < begin + size and "scale_weight" not in name)
    ModulationTable(model)
    assert told.made == made
    assert replace(told, made=0) == weights_of(model, "transformer", dtype)


@pytest.mark.parametrize("type", FORMATS)
@pytest.mark.parametrize("streamed", [(), (0,), (1, 4), tuple(range(6))])
def test_any_type_streams_to_the_same_numbers(transformers: dict[str, Path], type: str, streamed: tuple[int, ...]
                                              ) -> None:
    model = load(transformers[type], "transformer", dtype=torch.float32)
    before = dict(model.named_parameters())
    with torch.inference_mode():
        expected = [model(**inputs(seed)) for seed in range(2)]
        device = Budget(1 << 26)
        placed = Placed(model, "transformer", device, streamed)
        assert all(torch.equal(model(**inputs(seed)), want) for seed, want in enumerate(expected))
    placed.leave()
    assert device.held == 0
    after = dict(model.named_parameters())
    assert all(after[name] is tensor for name, tensor in before.items()) and len(after) == len(before)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.modules())


@pytest.mark.parametrize("type", FORMATS)
def test_modulations_stay_at_home(transformers: dict[str, Path], type: str) -> None:
    """With a table their weights take no room on the device, and are there whenever a block computes from them."""
    model = load(transformers[type], "transformer", dtype=torch.float32)
    whole = weights_of(model, "transformer", torch.float32).total
    layer = model.double_blocks[1].txt_mod.lin
    with torch.inference_mode():
        expected = model(**inputs())
        layer.bias.mul_(2)
        changed = model(**inputs())
        layer.bias.div_(2)
        ModulationTable(model)
        parts = weights_of(model, "transformer", torch.float32)
        device = Budget(1 << 26)
        placed = Placed(model, "transformer", device, (1, 4))
        there = device.held
        assert parts.total + parts.home == whole and device.peak == there < whole
        assert torch.equal(model(**inputs()), expected) and device.peak == there
        handle = layer.register_forward_hook(lambda module, args, out: out + module.bias)  # as a side path hangs on it
        assert torch.equal(model(**inputs()), changed) and device.peak > there == device.held
        handle.remove()
        model.modulations.detach()
        assert torch.equal(model(**inputs()), expected) and there == device.held
    placed.leave()
    assert device.held == 0


def test_a_device_too_small_leaves_the_model_as_it_was(transformers: dict[str, Path]) -> None:
    model = load(transformers["F32"], "transformer")
    before = dict(model.named_parameters())
    device = Budget(weights_of(model, "transformer", torch.float32).total // 2)
    with pytest.raises(torch.OutOfMemoryError):
        Placed(model, "transformer", device)
    assert device.held == 0 and all(dict(model.named_parameters())[name] is tensor for name, tensor in before.items())


def test_a_weight_that_cannot_be_copied_leaves_the_model_as_it_was() -> None:
    layer = PLAIN.Linear(4, 4).requires_grad_(False)
    layer.bias = torch.nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)  # has nothing to copy
    before = dict(layer.named_parameters())
    device = Budget(4096)
    with pytest.raises(NotImplementedError):
        Placed(layer, "vae", device)
    assert device.held == 0 and all(dict(layer.named_parameters())[name] is tensor for name, tensor in before.items())


class Machine:
    """CUDA's rules without CUDA: queues run on their own, the `eager` one as far ahead as events allow."""

    def __init__(self, eager: str) -> None:
        names = sorted(["compute", "copies"], key=lambda name: name != eager)
        self.queues: dict[str, list[Callable[[], bool]]] = {name: [] for name in names}
        self.into = "compute"

    def do(self, queue: str, work: Callable[[], None]) -> None:
        self.queues[queue].append(lambda: (work(), True)[1])

    def run_until(self, done: Callable[[], bool]) -> None:
        """Runs queues, each in its order, until `done`; a queue whose head cannot run stands still."""
        while not done():
            moved = False
            for queue in self.queues.values():
                if queue and queue[0]():
                    queue.pop(0)
                    moved = True
                    break
            assert moved or done(), "deadlock"

    # what CudaLane asks of torch.cuda
    def Stream(self, _: Any) -> Any:  # noqa: N802
        return Queue(self, "copies")

    def current_stream(self, _: Any) -> Any:
        return Queue(self, "compute")

    def Event(self) -> Any:  # noqa: N802
        return Event(self)

    def stream(self, queue: Any) -> Any:
        machine = self

        class Inside:
            def __enter__(self) -> None:
                machine.into = queue.name

            def __exit__(self, *_: object) -> None:
                machine.into = "compute"

        return Inside()


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.reached = machine, False

    def record(self, queue: Any) -> None:
        self.machine.do(queue.name, lambda: setattr(self, "reached", True))

    def synchronize(self) -> None:
        self.machine.run_until(lambda: self.reached)


class Queue:
    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def wait_event(self, event: Event) -> None:
        self.machine.queues[self.name].append(lambda: event.reached)


class Far(torch.Tensor):
    """A tensor of the device: copies into it happen when its queue gets there."""

    machine: Machine

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:  # type: ignore[override]
        assert non_blocking
        plain = self.as_subclass(torch.Tensor)
        self.machine.do(self.machine.into, lambda: plain.copy_(source) is None)
        return self


@pytest.mark.parametrize("eager", ["compute", "copies"])
@pytest.mark.parametrize("pinned", [False, True])
def test_copies_never_overtake_what_reads_their_buffer(pinned: bool, eager: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a pass in two slots, three passes: what each block sees is its own weights, whoever is slow."""
    machine = Machine(eager)
    Far.machine = machine
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    lane = CudaLane(torch.device("cpu"), machine, pin=lambda size: torch.empty(size, dtype=torch.uint8))
    slots = [torch.zeros(4).as_subclass(Far) for _ in range(2)]
    weights = [torch.full((4,), float(i)) for i in range(5)]
    seen: list[list[float]] = []
    for slot in range(2):
        lane.done(slot)
    held: dict[int, int] = {}

    def bring(place: int) -> None:
        if held.get(place % 2) != place:
            lane.copy(place % 2, [weights[place]], [slots[place % 2]])
            held[place % 2] = place

    for _ in range(3):
        for place in range(5):
            bring(place)
            lane.wait(place % 2)
            buffer = slots[place % 2].as_subclass(torch.Tensor)
            machine.do("compute", lambda buffer=buffer: seen.append(buffer.tolist()))
            following = (place + 1) % 5
            if following % 2 != place % 2:
                bring(following)
            lane.done(place % 2)
    lane.drain()
    machine.run_until(lambda: not machine.queues["compute"] and not machine.queues["copies"])
    assert seen == [[float(place)] * 4 for place in range(5)] * 3


def test_pinned_copies_fill_slabs() -> None:
    made: list[int] = []

    def pin(size: int) -> torch.Tensor:
        made.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    copies = PinnedCopies(pin, slab=1024)
    tensors = [torch.randn(60), torch.randn(30, 2).half(), torch.randn(500), torch.arange(3)]
    for tensor in (*tensors, *tensors):
        assert torch.equal(copies.of(tensor), tensor) and copies.of(tensor).dtype == tensor.dtype
    assert made == [1024, 2048, 1024]  # 256 + 256 of the first are taken, 2,048 fit in none, then a new one


def test_a_module_without_blocks_is_placed_whole() -> None:
    layer = PLAIN.Linear(4, 4).requires_grad_(False)
    device = Budget(4096)
    placed = Placed(layer, "vae", device)
    assert device.held >= 80 and layer(torch.ones(4)).isfinite().all()
    placed.leave()
    assert device.held == 0
