"""LoRAs on modulating layers and the table of their outputs: with a side path as without a table, bit for bit, and
computed once for each strength."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flux_kit.engine.adapters import Attachment, Entry, Mask, attach, read_lora
from flux_kit.engine.adapters.costs import side_bytes
from flux_kit.engine.adapters.sidepath import SidePath
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.modulation import ModulationTable, modulation_modules
from torch import Tensor, nn

H = 128
MOD, EMBED, LAST = "double_blocks_0_img_mod_lin", "time_in_out_layer", "final_layer_adaLN_modulation_1"
SINGLE, TOKENS = "single_blocks_1_modulation_lin", "single_blocks_0_linear1"
SIGMAS = (1.0, 0.6, 0.2)
Save = Callable[..., Path]


def pair(name: str, rows: int) -> dict[str, Tensor]:
    stem = f"lora_unet_{name}"
    return {f"{stem}.lora_down.weight": torch.randn(4, H) * 0.1, f"{stem}.lora_up.weight": torch.randn(rows, 4) * 0.1}


def files(save: Save) -> dict[str, Path]:
    torch.manual_seed(1)
    mod = f"lora_unet_{MOD}"
    return {name: save({key: value.contiguous() for key, value in tensors.items()}, name=f"{name}.safetensors")
            for name, tensors in {
                "pairs": {**pair(MOD, 6 * H), **pair(LAST, 2 * H), **pair(TOKENS, 7 * H)},
                "embedder": pair(EMBED, H), "single": pair(SINGLE, 3 * H), "tokens": pair(TOKENS, 7 * H),
                "oft": {f"{mod}.oft_blocks": torch.randn(96, 8, 8) * 0.1},
                "dora": {**pair(MOD, 6 * H), f"{mod}.dora_scale": torch.rand(6 * H, 1) + 0.5},
                "lokr": {f"{mod}.lokr_w1": torch.randn(8, 8), f"{mod}.lokr_w2": torch.randn(96, 16) * 0.1},
                "diff": {f"{mod}.diff": torch.randn(6 * H, H) * 0.1, f"{mod}.diff_b": torch.randn(6 * H)},
            }.items()}


def passes(flux: Flux, dtype: torch.dtype = torch.float32, batch: int = 1, made: Attachment | None = None
           ) -> list[Tensor]:
    noise = torch.Generator().manual_seed(2)
    img, txt = (torch.randn(batch, tokens, 64, generator=noise).to(dtype) for tokens in (6, 5))
    ids, y = torch.zeros(batch, 6, 3), torch.randn(batch, 64, generator=noise).to(dtype)
    found = []
    for sigma in SIGMAS:
        if made is not None:
            made.set_sigma(sigma)
        with torch.no_grad():
            found.append(flux(img, ids, txt, torch.zeros(batch, 5, 3), torch.full((batch,), sigma), y,
                              torch.full((batch,), 3.5)))
    return found


def without(flux: Flux, *args: object) -> list[Tensor]:
    """The oracle: the same model with its table away."""
    table, flux.modulations = flux.modulations, None
    try:
        return passes(flux, *args)  # type: ignore[arg-type]
    finally:
        flux.modulations = table


def calls(flux: Flux, run: Callable[[], object]) -> dict[str, int]:
    """How often each modulating layer computes while `run` runs."""
    count = {name: 0 for name, _ in modulation_modules(flux)}
    of = {id(layer): name for name, layer in modulation_modules(flux)}
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        if id(self) in of:
            count[of[id(self)]] += 1
        return forward(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", counted)
        run()
    return count


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.fixture()
def table(flux: Flux) -> ModulationTable:
    flux.to(torch.float32)
    return ModulationTable(flux, share=100.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["pairs", "embedder", "oft", "dora", "lokr", "diff"])
def test_a_fixed_side_path_is_in_the_table(flux: Flux, table: ModulationTable, save: Save, name: str,
                                           dtype: torch.dtype, batch: int) -> None:
    flux.to(dtype)
    base = passes(flux, dtype, batch)
    made = attach(flux, [Entry(read_lora(files(save)[name]), 0.7)], mode="side", dtype=dtype)
    oracle = without(flux, dtype, batch)
    count = calls(flux, lambda: passes(flux, dtype, batch))
    assert set(count.values()) == {len(SIGMAS)}  # the table was filled with the base's, and again
    found: list[list[Tensor]] = []
    for _ in range(2):
        assert set(calls(flux, lambda: found.append(passes(flux, dtype, batch))).values()) == {0}
        assert same(found[-1], oracle) and not same(oracle, base)
    made.detach()
    assert same(passes(flux, dtype, batch), base)


def test_a_change_of_strength_computes_once(flux: Flux, table: ModulationTable, save: Save) -> None:
    made = attach(flux, [Entry(read_lora(files(save)["pairs"]), 0.7)], mode="side", dtype=torch.float32)
    outs = []
    for strength in (0.7, 0.3, 0.3, 0.0, 0.7):
        made.set_strengths([strength])
        before = table.computed
        outs.append(passes(flux))
        assert same(outs[-1], without(flux))
        assert table.computed - before == (0 if len(outs) == 3 else len(SIGMAS))
    assert same(outs[0], outs[4]) and same(outs[1], outs[2]) and not same(outs[0], outs[1])


def test_a_region_counts_with_its_share(flux: Flux, table: ModulationTable, save: Save) -> None:
    made = attach(flux, [Entry(read_lora(files(save)["pairs"]), 0.7, masked=True)], mode="side", dtype=torch.float32)
    outs = []
    for share in (1.0, 0.25, 0.25):
        row = torch.full((1, 1), share)
        if len(outs) < 2:
            made.set_mask(Mask(row.expand(6, 1), row, row, row))
        before = table.computed
        outs.append(passes(flux))
        assert same(outs[-1], without(flux))
        assert table.computed - before == (0 if len(outs) == 3 else len(SIGMAS))
    assert not same(outs[0], outs[1])


def test_one_that_changes_from_step_to_step_computes_its_layers_at_each(flux: Flux, table: ModulationTable, save: Save
                                                                        ) -> None:
    """Those of a fixed LoRA in the same stack, and all others, still come from the table."""
    found = {name: read_lora(path) for name, path in files(save).items()}
    stack = [Entry(found["single"], 0.7, schedule=lambda sigma: sigma), Entry(found["pairs"], 0.5)]
    made = attach(flux, stack, mode="side", dtype=torch.float32)
    table.detach()
    oracle = passes(flux, made=made)
    table = ModulationTable(flux, share=100.0)
    assert same(passes(flux, made=made), oracle)
    outs: list[list[Tensor]] = []
    count = calls(flux, lambda: outs.append(passes(flux, made=made)))
    assert same(outs[0], oracle)
    assert {name for name, times in count.items() if times} == {"single_blocks.1.modulation.lin"}
    assert count["single_blocks.1.modulation.lin"] == len(SIGMAS)


def test_on_an_embedder_one_that_changes_leaves_nothing_to_the_table(flux: Flux, table: ModulationTable, save: Save
                                                                     ) -> None:
    lora = read_lora(files(save)["embedder"])
    made = attach(flux, [Entry(lora, 0.7, schedule=lambda sigma: sigma)], mode="side", dtype=torch.float32)
    oracle = []
    for sigma, out in zip(SIGMAS, passes(flux, made=made), strict=True):
        made.set_sigma(sigma)
        oracle.append(out)
        assert torch.equal(out, without(flux)[SIGMAS.index(sigma)])
    assert len(table) == 0 and not same(oracle, without(flux))


def test_what_stands_elsewhere_leaves_the_table_alone(flux: Flux, table: ModulationTable, save: Save) -> None:
    passes(flux)
    before = table.computed
    lora = read_lora(files(save)["tokens"])
    made = attach(flux, [Entry(lora, 0.7, schedule=lambda sigma: sigma)], mode="side", dtype=torch.float32)
    out = passes(flux, made=made)
    assert table.computed == before
    table.detach()
    assert same(passes(flux, made=made), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_told_before_they_are_taken(flux: Flux, save: Save, dtype: torch.dtype) -> None:
    flux.to(dtype)
    stack = [read_lora(path) for path in files(save).values()]
    told = side_bytes(flux, [adapter for lora in stack for adapter in lora.of("transformer")], dtype.itemsize)
    made = attach(flux, [Entry(lora) for lora in stack], mode="side", dtype=dtype)
    sides = [layer for layer in flux.modules() if isinstance(layer, SidePath)]
    assert told == pytest.approx(sum(tensor.nbytes for side in sides for tensor in side.buffers()), rel=0.2)
    made.detach()
