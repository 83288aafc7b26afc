"""The table of modulations against the same model without one, bit for bit."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.layers import ROWS
from flux_kit.engine.models.modulation import Inputs, ModulationTable, lent, modulation_modules
from flux_kit.engine.models.ops import PLAIN
from flux_kit.engine.quant import FORMATS
from flux_kit.engine.quant.ops import Linear as PackedLinear
from flux_kit.engine.sampling import Denoiser, make_sigmas, sample
from flux_kit.engine.sampling.latents import image_ids, text_ids
from flux_kit.engine.specs import FLUX_DEV, FluxSpec
from gguf_files import quantise
from torch import Tensor, autocast, nn

SPEC = FluxSpec(hidden_size=128, num_heads=1, depth=2, depth_single_blocks=3, context_in_dim=32, vec_in_dim=48)
ROOM = 100.0  # the layers are tiny, so a table of their size holds next to nothing
Kept = dict[str, Any]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def model(dtype: torch.dtype = torch.float32, spec: FluxSpec = SPEC) -> Flux:
    torch.manual_seed(0)
    return Flux(spec).eval().requires_grad_(False).to(dtype)


def with_table(flux: Flux, **options: Any) -> tuple[Flux, ModulationTable]:
    """A copy with the same weights and a table; the oracle is `flux` itself."""
    twin = copy.deepcopy(flux)
    return twin, ModulationTable(twin, **{"share": ROOM, **options})


def inputs(sigma: float | tuple[float, ...] = 0.7, guidance: float | tuple[float, ...] | None = 3.5, y: int = 1,
           batch: int = 1, dtype: torch.dtype = torch.float32) -> Kept:
    """Keywords of a pass; `y` is the seed of the pooled text."""
    noise = torch.Generator().manual_seed(4)

    def row(value: float | tuple[float, ...]) -> Tensor:
        return torch.tensor(value if isinstance(value, tuple) else (value,) * batch)

    return {"img": torch.randn(batch, 6, 64, generator=noise).to(dtype), "img_ids": image_ids(batch, 4, 6),
            "txt": torch.randn(batch, 5, 32, generator=noise).to(dtype), "txt_ids": text_ids(batch, 5),
            "timesteps": row(sigma), "guidance": None if guidance is None else row(guidance),
            "y": torch.randn(batch, 48, generator=torch.Generator().manual_seed(y)).to(dtype)}


def of(kept: Kept) -> Inputs:
    return kept["timesteps"], kept["y"], kept["guidance"]


def forbidden(flux: Flux) -> Callable[[], None]:
    """Makes every modulating layer refuse to compute; what it gives back takes that off again."""
    def refuse(*_: Any) -> None:
        raise AssertionError("computed from its weights")

    classes = {type(layer) for _, layer in modulation_modules(flux)}
    held = {kind: kind.forward for kind in classes}
    layers = {id(layer) for _, layer in modulation_modules(flux)}
    for kind, forward in held.items():
        def guarded(self: Any, x: Tensor, forward: Any = forward) -> Any:
            return refuse() if id(self) in layers else forward(self, x)
        kind.forward = guarded  # type: ignore[method-assign,assignment]

    def undo() -> None:
        for kind, forward in held.items():
            kind.forward = forward  # type: ignore[method-assign]
    return undo


def same(flux: Flux, oracle: Flux, **changes: Any) -> bool:
    return torch.equal(flux(**inputs(**changes)), oracle(**inputs(**changes)))


# ------------------------------------------------------------------------------------------------------- what it is

def test_it_stands_for_more_than_a_quarter_of_the_published_weights() -> None:
    with torch.device("meta"):
        flux = Flux(FLUX_DEV)
    layers = modulation_modules(flux)
    assert len(layers) == 6 + 2 * 19 + 38 + 1
    assert all(flux.get_submodule(name) is layer for name, layer in layers)
    replaced = sum(p.numel() for _, layer in layers for p in layer.parameters())
    share = replaced / sum(p.numel() for p in flux.parameters())
    assert 0.27 < share < 0.28


def test_names_are_those_of_the_layers_that_see_no_token() -> None:
    """Oracle: hooks on every linear layer; those that are called with a matrix and not with tokens."""
    flux = model()
    seen: set[str] = set()

    def watch(name: str) -> Any:
        return lambda layer, args: seen.add(name) if args[0].ndim == 2 else None

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in flux.named_modules()
               if isinstance(layer, nn.Linear)]
    flux(**inputs())
    assert {name for name, _ in modulation_modules(flux)} == seen
    assert [handle.remove() for handle in handles]


# -------------------------------------------------------------------------------------------------- hits are exact

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_hit_is_what_the_layers_give_bit_for_bit_and_reads_no_weight(dtype: torch.dtype, batch: int) -> None:
    oracle = model(dtype)
    flux, table = with_table(oracle)
    runs = [{"sigma": sigma, "batch": batch, "dtype": dtype, "y": y} for sigma in (1.0, 0.61, 0.2) for y in (1, 2)]
    table.prepare([of(inputs(**run)) for run in runs], dtype)
    assert table.computed == len(table) == 6
    undo = forbidden(flux)
    try:
        found = [flux(**inputs(**run)) for run in runs]
    finally:
        undo()
    assert all(torch.equal(out, oracle(**inputs(**run))) for out, run in zip(found, runs, strict=True))
    assert table.found == 6 and table.computed == 6


def test_what_is_not_prepared_is_computed_once_and_then_found() -> None:
    oracle = model()
    flux, table = with_table(oracle)
    for _ in range(3):
        assert same(flux, oracle)
    assert (table.computed, table.found) == (1, 2)


def test_without_guidance_and_in_models_that_embed_none() -> None:
    for spec in (SPEC, replace(SPEC, guidance_embed=False)):
        oracle = model(spec=spec)
        flux, table = with_table(oracle)
        assert same(flux, oracle, guidance=None) and same(flux, oracle, guidance=None)
        assert table.found == 1


def test_packed_layers_too() -> None:
    oracle = model()
    for block in oracle.single_blocks:
        plain = block.modulation.lin
        packed = PackedLinear(plain.in_features, plain.out_features, format=FORMATS["Q8_0"])
        packed.weight.data = torch.from_numpy(quantise(plain.weight, "Q8_0").copy())
        packed.bias = plain.bias
        block.modulation.lin = packed
    flux, table = with_table(oracle)
    assert same(flux, oracle) and same(flux, oracle) and table.found == 1


# ------------------------------------------------------------------------------------------------- misses compute

def changed_batch(flux: Flux) -> Kept:
    return {"batch": 2}


def other_time(flux: Flux) -> Kept:
    return {"sigma": 0.33}


def other_guidance(flux: Flux) -> Kept:
    return {"guidance": 1.0}


def other_text(flux: Flux) -> Kept:
    return {"y": 2}


def mixed_batch(flux: Flux) -> Kept:
    return {"sigma": (0.7, 0.7), "guidance": (3.5, 1.0), "batch": 2}


def mixed_times(flux: Flux) -> Kept:
    return {"sigma": (0.7, 0.4), "batch": 2}


@pytest.mark.parametrize("case", [changed_batch, other_time, other_guidance, other_text, mixed_batch, mixed_times])
def test_another_input_is_another_entry(case: Callable[[Flux], Kept]) -> None:
    oracle = model()
    flux, table = with_table(oracle)
    assert same(flux, oracle)
    assert same(flux, oracle, **case(flux)) and same(flux, oracle, **case(flux))
    assert (table.computed, table.found) == (2, 1)
    assert not torch.equal(oracle(**inputs())[0], oracle(**inputs(**case(flux)))[0]) or case is changed_batch


def test_one_row_and_the_same_row_in_a_batch_are_not_taken_for_each_other() -> None:
    """At the published width their last bits differ on a CPU: a table by rows could not be exact."""
    layer = PLAIN.Linear(3072, 512)
    row = torch.randn(1, 3072)
    alone, batch = layer(row), layer(row.expand(3, -1).contiguous())
    spec = replace(SPEC, hidden_size=384, num_heads=3, depth=1, depth_single_blocks=1)
    oracle = model(spec=spec)
    flux, table = with_table(oracle)
    assert same(flux, oracle, batch=1) and same(flux, oracle, batch=3) and table.computed == 2
    assert torch.allclose(alone, batch[:1], atol=1e-5)


# weights that change: each is done to the model with the table and to the oracle

def replaced_weight(flux: Flux) -> None:
    lin = flux.double_blocks[0].img_mod.lin
    lin.weight = nn.Parameter(lin.weight * 1.5, requires_grad=False)


def replaced_data(flux: Flux) -> None:
    lin = flux.double_blocks[0].img_mod.lin
    lin.weight.data = lin.weight.data * 1.5


def written_in_place(flux: Flux) -> None:
    flux.single_blocks[1].modulation.lin.weight.mul_(1.5)


def written_behind_torchs_back(flux: Flux) -> None:
    """As merging a LoRA does by `.data`, which torch's count of versions does not tell."""
    flux.single_blocks[1].modulation.lin.weight.data += 0.1


def changed_bias(flux: Flux) -> None:
    flux.final_layer.adaLN_modulation[1].bias.data += 1


def changed_embedder(flux: Flux) -> None:
    flux.vector_in.in_layer.weight.data += 0.1


def loaded_anew(flux: Flux) -> None:
    flux.load_state_dict({name: tensor * 1.25 for name, tensor in flux.state_dict().items()})


def assigned_anew(flux: Flux) -> None:
    flux.load_state_dict({name: tensor * 1.25 for name, tensor in flux.state_dict().items()}, assign=True)


def swapped_blocks(flux: Flux) -> None:
    flux.double_blocks[0], flux.double_blocks[1] = flux.double_blocks[1], flux.double_blocks[0]
    flux.single_blocks[0], flux.single_blocks[2] = flux.single_blocks[2], flux.single_blocks[0]


def new_block(flux: Flux) -> None:
    block = copy.deepcopy(flux.single_blocks[0])
    block.modulation.lin.weight.data += 0.1
    flux.single_blocks[0] = block


class LoraLinear(nn.Module):
    """What adapter libraries put in the place of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.strength = layer, 0.5
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        self.strength += 0.25  # and may change it from call to call
        out: Tensor = self.layer(x) * self.strength
        return out


def adapter_in_its_place(flux: Flux) -> None:
    flux.double_blocks[0].txt_mod.lin = LoraLinear(flux.double_blocks[0].txt_mod.lin)


def adapter_on_an_embedder(flux: Flux) -> None:
    flux.time_in.out_layer = LoraLinear(flux.time_in.out_layer)


def hook_on_a_layer(flux: Flux) -> None:
    flux.double_blocks[0].txt_mod.lin.register_forward_hook(lambda layer, args, out: out * 1.5)


def hook_on_a_modulation(flux: Flux) -> None:
    flux.double_blocks[0].txt_mod.register_forward_pre_hook(lambda layer, args: (args[0] * 1.5,))


def forward_of_an_instance(flux: Flux) -> None:
    lin = flux.single_blocks[0].modulation.lin
    lin.forward = lambda x: F.linear(x, lin.weight, lin.bias) + 0.5  # type: ignore[method-assign]


def modulation_of_another_pack(flux: Flux) -> None:
    class Other(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, vec: Tensor) -> Any:
            return self.inner(vec * 1.5)

    flux.double_blocks[0].img_mod = Other(flux.double_blocks[0].img_mod)
    flux.final_layer.adaLN_modulation = Other(flux.final_layer.adaLN_modulation)


def vec_of_another_pack(flux: Flux) -> None:
    original = Flux.vec.__get__(flux)
    flux.vec = lambda *args: original(*args) * 1.5  # type: ignore[method-assign]


CHANGES = [replaced_weight, replaced_data, written_in_place, written_behind_torchs_back, changed_bias,
           changed_embedder, loaded_anew, assigned_anew, swapped_blocks, new_block, adapter_in_its_place,
           adapter_on_an_embedder, hook_on_a_layer, hook_on_a_modulation, forward_of_an_instance,
           modulation_of_another_pack, vec_of_another_pack]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_after_a_change_of_the_model_the_table_gives_what_the_model_gives(change: Callable[[Flux], None],
                                                                          inference: bool) -> None:
    with torch.inference_mode() if inference else torch.no_grad():
        oracle = model()
        flux, _ = with_table(oracle)
        assert same(flux, oracle) and same(flux, oracle)
        before = oracle(**inputs())
        change(flux)
        change(oracle)
        for _ in range(3):
            assert same(flux, oracle)
        assert not torch.equal(oracle(**inputs()), before)


# -------------------------------------------------------------------------------- blocks that others call or replace

def rewritten(self: Flux, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
              guidance: Tensor, **_: Any) -> Tensor:
    """A forward as packs put it in place of ours: BFL's arguments, one block left out, a modulation read directly."""
    vec = self.vec(timesteps, y, guidance, img.dtype)
    img, txt = self.img_in(img), self.txt_in(txt)
    pe = self.positions(txt_ids, img_ids)
    first, _second = self.double_blocks[0].img_mod(vec)
    img = img * (1 + first.scale)
    for block in self.double_blocks:
        img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
    x = self.single_blocks[0](torch.cat((txt, img), 1), vec=vec, pe=pe)
    out: Tensor = self.final_layer(x[:, txt.shape[1]:], vec)
    return out


def test_a_forward_of_another_pack_computes_from_the_weights() -> None:
    oracle = model()
    flux, _ = with_table(oracle)
    assert same(flux, oracle)
    for each in (flux, oracle):
        each.forward_orig = rewritten.__get__(each)  # type: ignore[method-assign]
    assert same(flux, oracle) and same(flux, oracle, sigma=0.2)


class Round:
    """Hooks of a host that hand blocks on as they were called, or with something else."""

    def __init__(self, change: Callable[[Kept], Kept] = dict, swap: dict[int, nn.Module] | None = None) -> None:
        self.change, self.swap, self.options = change, swap or {}, {"block_index": 0}
        self.left: list[Any] = []

    def before(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        return tokens

    def double(self, index: int, block: Any, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, mask: Any) -> Any:
        args = self.change({"vec": vec, "pe": pe, "transformer_options": self.options})
        out = block(img=img, txt=txt, **args)
        self.left.append(ROWS in self.options)
        return out

    def single(self, index: int, block: Any, x: Tensor, txt_tokens: int, vec: Tensor, pe: Tensor, mask: Any) -> Any:
        out: Tensor = self.swap.get(index, block)(x, **self.change({"vec": vec, "pe": pe,
                                                                   "transformer_options": self.options}))
        return out


def writes_into_vec(args: Kept) -> Kept:
    args["vec"].mul_(1.01)
    return args


@pytest.mark.parametrize("change", [
    dict, lambda args: {**args, "vec": args["vec"] * 1.5}, lambda args: {**args, "vec": args["vec"].clone()},
    lambda args: {**args, "transformer_options": None}, lambda args: {"vec": args["vec"], "pe": args["pe"]},
    lambda args: {**args, "transformer_options": dict(args["transformer_options"])}, writes_into_vec,
], ids=["as they are", "vec changed", "vec copied", "options None", "no options", "options copied", "vec written"])
@pytest.mark.parametrize("inference", [False, True])
def test_blocks_called_by_other_packs(change: Callable[[Kept], Kept], inference: bool) -> None:
    with torch.inference_mode() if inference else torch.no_grad():
        oracle = model()
        flux, table = with_table(oracle)
        for sigma in (0.7, 0.3, 0.7, 0.7):
            hooks = Round(change)
            mine = flux.forward_orig(**inputs(sigma), hooks=hooks)  # type: ignore[arg-type]
            assert torch.equal(mine, oracle.forward_orig(**inputs(sigma), hooks=Round(change)))  # type: ignore[arg-type]
            assert not any(hooks.left)  # rows of one block do not stay for what is called next
        assert table.found == 2


def test_another_block_called_in_the_place_of_one_does_not_get_its_rows() -> None:
    oracle = model()
    flux, _ = with_table(oracle)

    def run(each: Flux) -> Tensor:
        return each.forward_orig(**inputs(), hooks=Round(swap={0: each.single_blocks[2]}))  # type: ignore[arg-type]

    assert torch.equal(run(flux), run(oracle)) and torch.equal(run(flux), run(oracle))


def test_options_of_one_block_do_not_serve_another() -> None:
    """Some packs keep the options that they saw at one block and call others with them."""
    flux, table = with_table(model())
    entry = table.at(flux, of(inputs()), torch.float32)
    assert entry is not None
    pe = flux.positions(text_ids(1, 5), image_ids(1, 4, 6))
    x = torch.randn(1, 11, 128)
    for source in (flux.single_blocks[0], flux.double_blocks[0], flux.final_layer):
        options = {ROWS: entry.of(source)}
        assert options[ROWS] is not None
        target = flux.single_blocks[1]
        assert torch.equal(target(x.clone(), entry.vec, pe, transformer_options=options),
                           target(x.clone(), entry.vec, pe))
        double = flux.double_blocks[1]
        for mine, theirs in zip(double(x[:, 5:], x[:, :5], entry.vec, pe, transformer_options=options),
                                double(x[:, 5:], x[:, :5], entry.vec, pe), strict=True):
            assert torch.equal(mine, theirs)


# ------------------------------------------------------------------------------------------- when it does not answer

def test_with_gradients_it_stands_aside() -> None:
    oracle = model()
    flux, table = with_table(oracle)
    assert same(flux, oracle)
    with torch.enable_grad():
        flux.requires_grad_(True)
        flux(**inputs()).sum().backward()
    gradient = flux.double_blocks[0].img_mod.lin.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0 and table.found == 0


def test_under_autocast_it_stands_aside() -> None:
    oracle = model()
    flux, table = with_table(oracle)
    assert same(flux, oracle)
    with autocast("cpu", torch.bfloat16):
        assert same(flux, oracle)
    assert (table.computed, table.found) == (1, 0) and same(flux, oracle)


def test_entries_of_inference_mode_are_not_used_outside() -> None:
    oracle = model()
    flux, table = with_table(oracle)
    with torch.inference_mode():
        assert same(flux, oracle)
    assert same(flux, oracle) and table.computed == 2


def test_detached_and_copied_models_have_no_table() -> None:
    oracle = model()
    flux, table = with_table(oracle)
    assert same(flux, oracle) and copy.deepcopy(flux).modulations is None
    shallow = copy.copy(flux)
    shallow._modules = dict(shallow._modules)
    shallow.double_blocks = copy.deepcopy(flux.double_blocks)
    shallow.double_blocks[0].img_mod.lin.weight.data += 1
    assert not torch.equal(shallow(**inputs()), flux(**inputs()))
    table.detach()
    assert flux.modulations is None and len(table) == 0 and same(flux, oracle)


def test_saving_sees_every_weight_and_no_row() -> None:
    oracle = model()
    flux, _ = with_table(oracle)
    assert same(flux, oracle)
    mine, theirs = flux.state_dict(), oracle.state_dict()
    assert list(mine) == list(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_table_keeps_no_model_alive() -> None:
    flux, table = with_table(model())
    flux(**inputs())
    alive, weight = weakref.ref(flux), weakref.ref(flux.double_blocks[0].img_mod.lin.weight)
    gc.disable()
    try:
        del flux
        assert alive() is None and weight() is None
    finally:
        gc.enable()
    table.prepare([of(inputs())], torch.float32)


# -------------------------------------------------------------------------------------------------- size and memory

def test_it_stays_within_its_share_and_gives_up_the_oldest() -> None:
    oracle = model()
    weights = sum(p.nbytes for _, layer in modulation_modules(oracle) for p in layer.parameters())
    flux, table = with_table(oracle, share=0.05)
    levels = [level / 20 for level in range(1, 21)]
    for level in levels:
        assert same(flux, oracle, sigma=level)
        assert table.nbytes <= 0.05 * weights
    assert 1 < len(table) < 20
    computed = table.computed
    assert same(flux, oracle, sigma=levels[-1]) and table.computed == computed
    assert same(flux, oracle, sigma=levels[0]) and table.computed == computed + 1


def test_a_table_too_small_for_one_entry_still_computes() -> None:
    oracle = model()
    flux, table = with_table(oracle, share=1e-6)
    table.prepare([of(inputs())], torch.float32)
    assert same(flux, oracle) and len(table) == 0 and table.nbytes == 0


class Budget:
    """Counts what is lent: which layers, and how many at once."""

    def __init__(self, table: ModulationTable) -> None:
        self.lent: list[list[nn.Module]] = []
        original = table.lend

        def lend(layers: Any, device: torch.device) -> Any:
            self.lent.append(list(layers))
            return original(layers, device)

        table.lend = lend  # type: ignore[method-assign]


def test_preparing_takes_each_layer_once_and_one_modulation_at_a_time() -> None:
    flux, table = with_table(model())
    budget = Budget(table)
    table.prepare([of(inputs(level / 8, y=y)) for level in range(1, 9) for y in (1, 2)], torch.float32)
    taken = [layer for layers in budget.lent for layer in layers]
    assert len(taken) == len(set(map(id, taken))) == len(modulation_modules(flux)) and table.computed == 16
    assert [len(layers) for layers in budget.lent[1:]] == [1] * (len(taken) - 6)
    table.prepare([of(inputs(level / 8, y=1)) for level in range(1, 9)], torch.float32)
    assert len(budget.lent) == 1 + len(taken) - 6


def test_lent_layers_get_their_own_parameters_back() -> None:
    layer = PLAIN.Linear(8, 4).requires_grad_(False)
    before, held = layer.weight.clone(), layer.weight
    with pytest.raises(RuntimeError, match="stop"), lent([layer], torch.device("meta")):
        assert layer.weight.device.type == "meta"
        raise RuntimeError("stop")
    assert layer.weight is held and torch.equal(layer.weight, before)


# ------------------------------------------------------------------------------------------------------- in the loop

def conditioning(seed: int, guidance: float) -> Any:
    noise = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 5, 32, generator=noise), {"pooled_output": torch.randn(1, 48, generator=noise),
                                                      "guidance": guidance}]]


@pytest.mark.parametrize("solver", ["euler", "heun", "uni_pc", "euler_ancestral"])
def test_a_whole_run_prepared_ahead(solver: str) -> None:
    oracle = model()
    flux, table = with_table(oracle)
    sigmas = make_sigmas("simple", 4)
    run: Kept = {"seed": 3, "solver": solver}

    def denoiser(each: Flux) -> Denoiser:
        return Denoiser(each, conditioning(1, 3.5), conditioning(2, 1.0), cfg=2.0, cfg_window=(0.3, 0.95))

    mine = denoiser(flux)
    latents = torch.zeros(2, 16, 4, 6)
    with torch.enable_grad():  # as where a host calls it
        mine.prepare(latents, sigmas)
    guided = sum(0.3 <= level <= 0.95 for level in sigmas[:-1].tolist())
    assert table.computed == 4 + guided and 0 < guided < 4
    out = sample(mine, latents, sigmas, **run)
    assert torch.equal(out, sample(denoiser(oracle), latents, sigmas, **run))
    again = table.computed
    assert again == 4 + guided or solver == "uni_pc"  # which asks at sigmas of its own too
    assert torch.equal(sample(denoiser(flux), latents, sigmas, **run), out) and table.computed == again


def test_prompts_that_start_and_end_are_prepared_where_they_act() -> None:
    oracle = model()
    flux, table = with_table(oracle)
    prompts = [[cond, {**options, "start_percent": start, "end_percent": end}] for (cond, options), start, end in (
        (conditioning(1, 3.5)[0], 0.0, 0.4), (conditioning(2, 3.5)[0], 0.3, 1.0))]
    sigmas, latents = make_sigmas("simple", 5), torch.zeros(1, 16, 4, 6)
    mine = Denoiser(flux, prompts)
    mine.prepare(latents, sigmas)
    computed = table.computed
    assert torch.equal(sample(mine, latents, sigmas), sample(Denoiser(oracle, prompts), latents, sigmas))
    assert table.computed == computed


def test_a_denoiser_without_a_table_has_nothing_to_prepare() -> None:
    Denoiser(model(), conditioning(1, 3.5)).prepare(torch.zeros(1, 16, 4, 6), make_sigmas("simple", 2))


# -------------------------------------------------------------------------------------------------------- compilation

def compiled_runs(flux: Flux, levels: tuple[float, ...]) -> tuple[list[Tensor], list[int]]:
    """Outputs with every block compiled, and the products with weights in each graph that this took."""
    products: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        products.append(sum(node.target is F.linear for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    for group in (flux.double_blocks, flux.single_blocks):
        for i, block in enumerate(group):
            group[i] = torch.compile(block, backend=backend)
    outs = [flux(**inputs(level)) for level in levels]
    torch._dynamo.reset()
    return outs, products


def test_compiled_blocks_take_rows_and_are_not_compiled_again_because_of_them() -> None:
    oracle = model()
    levels = (0.9, 0.7, 0.5, 0.3, 0.9, 0.5)
    flux, table = with_table(oracle)
    table.prepare([of(inputs(level)) for level in levels[:3]], torch.float32)
    mine, with_it = compiled_runs(flux, levels)
    plain, without_it = compiled_runs(copy.deepcopy(oracle), levels)
    assert len(with_it) == len(without_it) and max(without_it) - max(with_it) == 2  # img_mod and txt_mod
    assert table.found == 5 and all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_a_model_compiled_as_a_whole_computes_itself() -> None:
    oracle = model(spec=replace(SPEC, depth=1, depth_single_blocks=1))
    flux, table = with_table(oracle)
    torch._dynamo.reset()
    mine, plain = (torch.compile(each, backend="eager")(**inputs()) for each in (flux, oracle))
    torch._dynamo.reset()
    assert torch.equal(mine, plain) and table.computed == 0
