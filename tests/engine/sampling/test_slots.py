"""Pictures beside the latents, as the denoiser hands them to the transformer.

Oracle: diffusers' transformer with the same weights, given what diffusers' own pipelines for Fill, Control and Kontext
make of the same latents and masks; their functions of packing are used as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import relative
from diffusers import FluxFillPipeline, FluxKontextPipeline, FluxPipeline
from flux_kit.engine.adapters import Entry, attach, read_lora
from flux_kit.engine.conditioning.attention import beside_references
from flux_kit.engine.errors import BadInput, NotFinite
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.models.modulation import ModulationTable
from flux_kit.engine.sampling import Denoiser, make_sigmas, process_in, reference_tokens
from flux_kit.engine.sampling.slots import positions
from flux_kit.engine.specs import FluxSpec
from oracles import State, flux_oracle, loaded, on_meta, random_state
from safetensors.torch import save_file
from torch import Tensor

SAME = 1e-5
TINY = FluxSpec(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1, context_in_dim=64, vec_in_dim=64)
FULL = FluxSpec(depth=1, depth_single_blocks=1)
CHANNELS = {"fill": 384, "control": 128, "kontext": 64}
H, W = 6, 8
SIGMA = torch.tensor([0.6, 0.6])
DRAW = torch.Generator().manual_seed(3)
AE = SimpleNamespace(config=SimpleNamespace(shift_factor=0.1159, scaling_factor=0.3611))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAW)


X = random(2, 16, H, W)
PICTURE = random(1, 16, H, W)
REFERENCE = random(1, 16, 4, 10)
SOFT = torch.rand(2, 1, 8 * H, 8 * W, generator=DRAW)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def states() -> dict[FluxSpec, State]:
    """Weights with the widest `img_in`; narrower models take its first columns."""
    return {spec: random_state(on_meta(Flux, replace(spec, in_channels=384))) for spec in (TINY, FULL)}


def narrowed(state: State, channels: int) -> State:
    return {**state, "img_in.weight": state["img_in.weight"][:, :channels].contiguous()}


def prompt_for(spec: FluxSpec, seed: int = 1, length: int = 20, **options: Any) -> list[list[Any]]:
    draw = torch.Generator().manual_seed(seed)
    cond = torch.randn(1, length, spec.context_in_dim, generator=draw)
    return [[cond, {"pooled_output": torch.randn(1, spec.vec_in_dim, generator=draw), "guidance": 30.0, **options}]]


def given(kind: str) -> dict[str, Any]:
    return {"fill": {"concat_latent_image": PICTURE, "concat_mask": SOFT}, "control": {"concat_latent_image": PICTURE},
            "kontext": {"reference_latents": [REFERENCE]}}[kind]


def pack(latents: Tensor) -> Tensor:
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def by_diffusers(spec: FluxSpec, state: State, kind: str, prompt: list[list[Any]]) -> Tensor:
    """Denoised latents of X by diffusers' transformer and packing."""
    img, ids = pack(X), FluxPipeline._prepare_latent_image_ids(2, H // 2, W // 2, "cpu", torch.float32)
    if kind == "fill":
        self = SimpleNamespace(vae=AE, vae_scale_factor=8, _pack_latents=FluxPipeline._pack_latents)
        mask, picture = FluxFillPipeline.prepare_mask_latents(
            self, SOFT, PICTURE, 2, 16, 1, 8 * H, 8 * W, torch.float32, "cpu", None)
        img = torch.cat((img, picture, mask), dim=2)
    elif kind == "control":
        img = torch.cat((img, pack(((PICTURE - 0.1159) * 0.3611).expand(2, -1, -1, -1))), dim=2)
    else:
        more = FluxKontextPipeline._prepare_latent_image_ids(2, 2, 5, "cpu", torch.float32)
        more[..., 0] = 1
        ids = torch.cat((ids, more))
        img = torch.cat((img, pack(((REFERENCE - 0.1159) * 0.3611).expand(2, -1, -1, -1))), dim=1)
    (cond, values), = prompt
    velocity = flux_oracle(spec, state)(
        hidden_states=img, encoder_hidden_states=cond.expand(2, -1, -1), timestep=SIGMA,
        pooled_projections=values["pooled_output"].expand(2, -1), img_ids=ids, txt_ids=torch.zeros(cond.shape[1], 3),
        guidance=torch.full((2,), values["guidance"]), return_dict=False)[0][:, :H * W // 4]
    unpacked: Tensor = FluxPipeline._unpack_latents(velocity, 8 * H, 8 * W, 8)
    return X - 0.6 * unpacked


@pytest.mark.parametrize(("size", "kind"), [
    (TINY, "fill"), (TINY, "control"), (TINY, "kontext"), (FULL, "fill"), (FULL, "control")],
    ids=["tiny fill", "tiny control", "tiny kontext", "published width, fill", "published width, control"])
def test_equals_diffusers(states: dict[FluxSpec, State], size: FluxSpec, kind: str) -> None:
    spec = replace(size, in_channels=CHANNELS[kind])
    state = narrowed(states[size], spec.in_channels)
    prompt = prompt_for(spec, **given(kind))
    ours = Denoiser(loaded(on_meta(Flux, spec), state), prompt)(X, SIGMA)
    assert relative(ours - X, by_diffusers(spec, state, kind, prompt) - X) <= SAME


@pytest.fixture(scope="module")
def models(states: dict[FluxSpec, State]) -> dict[str, Flux]:
    found = {}
    for kind, channels in CHANNELS.items():
        flux = loaded(on_meta(Flux, replace(TINY, in_channels=channels)), narrowed(states[TINY], channels))
        assert isinstance(flux, Flux)
        found[kind] = flux
    return found


# -- channels

def test_a_packed_conditioning_stands_for_picture_and_mask(models: dict[str, Flux]) -> None:
    """'noise_concat', in the model's scale, as core's model takes it first."""
    mask = SOFT.reshape(2, H, 8, W, 8).permute(0, 2, 4, 1, 3).reshape(2, 64, H, W)
    ready = torch.cat((process_in(PICTURE).expand(2, -1, -1, -1), mask), dim=1)
    ours = Denoiser(models["fill"], prompt_for(TINY, noise_concat=ready))(X, SIGMA)
    assert torch.equal(ours, Denoiser(models["fill"], prompt_for(TINY, **given("fill")))(X, SIGMA))
    with pytest.raises(BadInput, match=r"noise_concat.*64 x 48.*96 x 48"):
        Denoiser(models["fill"], prompt_for(TINY, noise_concat=ready))(random(2, 16, H, 12), SIGMA)


def test_one_for_all_or_one_for_each(models: dict[str, Flux]) -> None:
    pictures, masks = random(3, 16, H, W), torch.rand(3, 1, 8 * H, 8 * W, generator=DRAW)
    x, sigma = random(3, 16, H, W), torch.full((3,), 0.5)
    whole = Denoiser(models["fill"], prompt_for(TINY, concat_latent_image=pictures, concat_mask=masks))(x, sigma)
    for i in range(3):
        one = prompt_for(TINY, concat_latent_image=pictures[i:i + 1], concat_mask=masks[i:i + 1])
        assert relative(Denoiser(models["fill"], one)(x[i:i + 1], sigma[:1]), whole[i:i + 1]) <= SAME
    for options, words in (({"concat_latent_image": pictures, "concat_mask": masks[:1]}, "picture is a batch of 3"),
                           ({"concat_latent_image": PICTURE, "concat_mask": masks}, "mask is a batch of 3")):
        with pytest.raises(BadInput, match=f"{words}, the latent to sample a batch of 2"):
            Denoiser(models["fill"], prompt_for(TINY, **options))(X, SIGMA)


def test_masks_of_other_shapes_mean_the_same(models: dict[str, Flux]) -> None:
    half = torch.ones(8 * H, 8 * W)
    half[:, :4 * W] = 0

    def run(mask: Tensor) -> Tensor:
        return Denoiser(models["fill"], prompt_for(TINY, concat_latent_image=PICTURE, concat_mask=mask))(X, SIGMA)

    expected = run(half[None, None])
    for mask in (half, half[None], half[None, None].expand(1, 3, -1, -1), half.half()):
        assert torch.equal(run(mask), expected)
    coarse = torch.nn.functional.interpolate(half[None, None, ::8, ::8], size=(8 * H, 8 * W), mode="bilinear")
    assert torch.equal(run(half[::8, ::8]), run(coarse))  # as many numbers as latent pixels


def test_a_picture_of_the_same_aspect_is_stretched_and_told(models: dict[str, Flux], caplog: Any) -> None:
    picture = random(1, 16, 2 * H, 2 * W)
    with caplog.at_level(logging.WARNING):
        found = Denoiser(models["control"], prompt_for(TINY, concat_latent_image=picture))(X, SIGMA)
    assert "128 x 96 pixels and is stretched to 64 x 48" in caplog.text
    small = torch.nn.functional.interpolate(picture, size=(H, W), mode="bilinear")
    expected = Denoiser(models["control"], prompt_for(TINY, concat_latent_image=small))(X, SIGMA)
    assert relative(found, expected) <= 1e-6


@pytest.mark.parametrize("options", [
    {"concat_latent_image": random(1, 16, H, 12), "concat_mask": SOFT},
    {"concat_latent_image": PICTURE, "concat_mask": torch.ones(1, 1, 64, 40)}])
def test_another_aspect_is_refused(models: dict[str, Flux], options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"(picture is 96 x 48|mask is 40 x 64) pixels.* 64 x 48.*another aspect"):
        Denoiser(models["fill"], prompt_for(TINY, **options))(X, SIGMA)


def test_half_a_token_at_the_edge_is_told(models: dict[str, Flux], caplog: Any) -> None:
    x = random(1, 16, 5, 8)
    picture, mask = random(1, 16, 5, 8), torch.rand(1, 1, 40, 64, generator=DRAW)

    def wide(latents: Tensor, rows: int) -> Tensor:
        return torch.cat((latents, latents[..., :rows, :]), dim=-2)

    with caplog.at_level(logging.WARNING):
        odd = Denoiser(models["fill"], prompt_for(TINY, concat_latent_image=picture, concat_mask=mask))(x, SIGMA[:1])
    assert "sampled at 64 x 40 pixels, no multiple of 16" in caplog.text
    even = Denoiser(models["fill"], prompt_for(TINY, concat_latent_image=wide(picture, 1), concat_mask=wide(mask, 8)))(
        wide(x, 1), SIGMA[:1])
    assert relative(odd, even[..., :5, :]) <= 1e-6


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("fill", {}, "'fill' model, which needs a picture with a mask.*no 'concat_latent_image' and no 'concat_mask'.*"
                 "FluxKitFill.*InpaintModelConditioning"),
    ("fill", {"concat_latent_image": PICTURE}, "and the positive conditioning has no 'concat_mask'. Put"),
    ("fill", {"concat_mask": SOFT}, "has no 'concat_latent_image'. Put"),
    ("control", {}, "'control' model, which needs its control picture.*FluxKitStructure.*InstructPixToPix"),
    ("control", {"concat_mask": SOFT}, "needs its control picture"),
    ("control", {"concat_latent_image": PICTURE, "reference_latents": [REFERENCE]}, "reference pictures.*'control'"),
    ("fill", {**given("fill"), "reference_latents": [REFERENCE]}, "reference pictures.*FLUX.1 Kontext"),
    ("control", {"concat_latent_image": PICTURE[:, :4]}, r"\(1, 4, 6, 8\).*16"),
    ("control", {"concat_latent_image": PICTURE[0]}, r"\(16, 6, 8\).*16"),
    ("control", {"concat_latent_image": "a picture"}, "is str"),
    ("control", {"noise_concat": PICTURE[:, :8]}, "noise_concat is .1, 8, 6, 8."),
    ("fill", {"concat_latent_image": PICTURE, "concat_mask": torch.ones(8)}, r"mask is \(8,\)"),
    ("fill", {"concat_latent_image": PICTURE, "concat_mask": 1.0}, "mask is float")])
def test_what_a_model_needs_is_asked_for(models: dict[str, Flux], kind: str, options: dict[str, Any], words: str
                                         ) -> None:
    with pytest.raises(BadInput, match=words):
        Denoiser(models[kind], prompt_for(TINY, **options))
    whole = prompt_for(TINY, **given(kind))
    with pytest.raises(BadInput, match=words.replace("positive", "negative")):
        Denoiser(models[kind], whole, prompt_for(TINY, **options), cfg=2.0)
    Denoiser(models[kind], whole, prompt_for(TINY, **options), cfg=1.0)  # not run, so not read


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("control", {"concat_latent_image": PICTURE * math.nan}, "picture holds NaN"),
    ("control", {"noise_concat": PICTURE / 0}, "noise_concat holds NaN or inf"),
    ("fill", {"concat_latent_image": PICTURE, "concat_mask": SOFT * math.nan}, "mask holds NaN"),
    ("kontext", {"reference_latents": [REFERENCE, REFERENCE * math.nan]}, "reference 2 holds NaN")])
def test_nan_is_named(models: dict[str, Flux], kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(NotFinite, match=f"positive conditioning's {words}"):
        Denoiser(models[kind], prompt_for(TINY, **options))


@pytest.mark.parametrize(("kind", "options", "words"), [
    ("kontext", {"concat_latent_image": PICTURE, "concat_mask": SOFT, "noise_concat": PICTURE},
     "concat_latent_image, concat_mask, noise_concat ignored"),
    ("control", {"concat_latent_image": PICTURE, "concat_mask": SOFT}, "concat_mask ignored")])
def test_what_a_model_has_no_input_for_is_told(models: dict[str, Flux], kind: str, options: dict[str, Any], words: str,
                                               caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        found = Denoiser(models[kind], prompt_for(TINY, **options))(X, SIGMA)
    assert words in caplog.text
    plain = {} if kind == "kontext" else given(kind)
    assert torch.equal(found, Denoiser(models[kind], prompt_for(TINY, **plain))(X, SIGMA))


def test_each_prompt_has_its_own_slots(models: dict[str, Flux]) -> None:
    first, second = (prompt_for(TINY, seed, concat_latent_image=random(1, 16, H, W)) for seed in (1, 2))
    c, u = (Denoiser(models["control"], one)(X, SIGMA) for one in (first, second))
    torch.testing.assert_close(Denoiser(models["control"], first, second, cfg=3.0)(X, SIGMA), u + (c - u) * 3)
    torch.testing.assert_close(Denoiser(models["control"], [*first, *second])(X, SIGMA), (c + u) / 2)
    kept, dropped = prompt_for(TINY, 1, reference_latents=[REFERENCE]), prompt_for(TINY, 2)
    c, u = (Denoiser(models["kontext"], one)(X, SIGMA) for one in (kept, dropped))
    torch.testing.assert_close(Denoiser(models["kontext"], kept, dropped, cfg=3.0)(X, SIGMA), u + (c - u) * 3)


def test_a_control_lora_takes_the_picture_in(models: dict[str, Flux], states: dict[FluxSpec, State], tmp_path: Any
                                             ) -> None:
    """BFL's kind: `img_in` padded with zeros to 128 inputs, and a low-rank change of it. Oracle: a model of 128."""
    down, up = random(4, 128) * 0.1, random(128, 4) * 0.1
    save_file({"img_in.lora_A.weight": down, "img_in.lora_B.weight": up}, tmp_path / "control.safetensors")
    weight = torch.cat((models["kontext"].img_in.weight, torch.zeros(128, 64)), dim=1) + 0.85 * up @ down
    spec = replace(TINY, in_channels=128)
    wide = loaded(on_meta(Flux, spec), {**states[TINY], "img_in.weight": weight})
    prompt = prompt_for(TINY, concat_latent_image=PICTURE)
    made = attach(models["kontext"], [Entry(read_lora(tmp_path / "control.safetensors"), 0.85)])
    try:
        found = Denoiser(models["kontext"], prompt)(X, SIGMA)
        with pytest.raises(BadInput, match="'control' model"):
            Denoiser(models["kontext"], prompt_for(TINY))
    finally:
        made.detach()
    assert relative(found - X, Denoiser(wide, prompt)(X, SIGMA) - X) <= SAME


# -- image tokens

def plain_ids(plane: int, rows: int, columns: int, top: int = 0, left: int = 0) -> list[tuple[float, float, float]]:
    return [(plane, top + row, left + column) for row in range(rows) for column in range(columns)]


@pytest.mark.parametrize(("method", "references", "expected"), [
    ("offset", [(8, 8)], [(1, 4, 4, 0, 0)]),                            # BFL's only one
    ("offset", [(8, 4), (8, 4)], [(1, 4, 2, 0, 0), (1, 4, 2, 0, 2)]),   # upright: beside each other
    ("offset", [(4, 8), (4, 8)], [(1, 2, 4, 0, 0), (1, 2, 4, 2, 0)]),   # lying: below each other
    ("offset", [(8, 4), (8, 4), (4, 8)], [(1, 4, 2, 0, 0), (1, 4, 2, 0, 2), (1, 2, 4, 4, 0)]),
    ("offset", [(8, 8), (8, 8)], [(1, 4, 4, 0, 0), (1, 4, 4, 4, 0)]),   # both the same size: below
    ("index", [(8, 4), (4, 4)], [(1, 4, 2, 0, 0), (2, 2, 2, 0, 0)]),
    ("uxo", [(8, 4), (4, 4)], [(0, 4, 2, 3, 4), (0, 2, 2, 7, 6)])])
def test_positions(method: str, references: list[tuple[int, int]], expected: list[tuple[int, ...]]) -> None:
    first, *rest = positions(2, (H, W), references, method)
    assert [tuple(row) for row in first[1].tolist()] == plain_ids(0, 3, 4)
    assert [[tuple(row) for row in one[0].tolist()] for one in rest] == [plain_ids(*place) for place in expected]
    assert all(one.dtype == torch.float32 and torch.equal(one[0], one[1]) for one in rest)


def test_two_references_lie_as_if_they_were_stitched(models: dict[str, Flux]) -> None:
    left, right = random(1, 16, 8, 4), random(1, 16, 8, 4)
    apart = prompt_for(TINY, reference_latents=[left, right])
    joined = prompt_for(TINY, reference_latents=[torch.cat((left, right), dim=-1)])
    a, b = (Denoiser(models["kontext"], one)(X, SIGMA) for one in (apart, joined))
    assert relative(a - X, b - X) <= SAME
    assert reference_tokens(apart[0][1]) == reference_tokens(joined[0][1]) == 16


def test_methods_differ_and_unknown_ones_are_refused(models: dict[str, Flux]) -> None:
    two = [REFERENCE, random(1, 16, 4, 4)]
    found = [Denoiser(models["kontext"], prompt_for(TINY, reference_latents=two, reference_latents_method=method))(
        X, SIGMA) for method in ("offset", "index", "uxo")]
    found.append(Denoiser(models["kontext"], prompt_for(TINY))(X, SIGMA))
    assert min(relative(a, b) for i, a in enumerate(found) for b in found[:i]) > 1e-4
    default = Denoiser(models["kontext"], prompt_for(TINY, reference_latents=two))(X, SIGMA)
    assert torch.equal(default, found[0])
    for method in ("index_timestep_zero", "stitched"):
        with pytest.raises(BadInput, match=f"'{method}'.*choose offset, index, uxo"):
            Denoiser(models["kontext"], prompt_for(TINY, reference_latents=two, reference_latents_method=method))
    unused = prompt_for(TINY, reference_latents=[], reference_latents_method="index_timestep_zero")
    assert torch.equal(Denoiser(models["kontext"], unused)(X, SIGMA), found[3])


@pytest.mark.parametrize(("references", "words"), [
    (REFERENCE, "is Tensor, expected a list"), ([REFERENCE[0]], "reference 1 is"), ([None], "reference 1 is NoneType"),
    ([REFERENCE, REFERENCE[:, :4]], "reference 2 is .1, 4")])
def test_references_that_are_none_are_refused(models: dict[str, Flux], references: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Denoiser(models["kontext"], prompt_for(TINY, reference_latents=references))


def test_references_of_a_batch(models: dict[str, Flux]) -> None:
    both = random(2, 16, 4, 6)
    whole = Denoiser(models["kontext"], prompt_for(TINY, reference_latents=[both, REFERENCE]))(X, SIGMA)
    for i in range(2):
        one = Denoiser(models["kontext"], prompt_for(TINY, reference_latents=[both[i:i + 1], REFERENCE]))
        assert relative(one(X[i:i + 1], SIGMA[:1]), whole[i:i + 1]) <= SAME
    with pytest.raises(BadInput, match="reference is a batch of 2, the latent to sample a batch of 1"):
        Denoiser(models["kontext"], prompt_for(TINY, reference_latents=[both]))(X[:1], SIGMA[:1])


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_table_of_modulations_changes_nothing(models: dict[str, Flux], kind: str) -> None:
    prompt = prompt_for(TINY, **given(kind))
    plain = Denoiser(models[kind], prompt)(X, SIGMA)
    table = ModulationTable(models[kind])
    try:
        denoiser = Denoiser(models[kind], prompt)
        sigmas = torch.cat((SIGMA[:1], make_sigmas("simple", 3)[1:]))
        denoiser.prepare(X, sigmas)
        computed = table.computed
        assert computed == len(sigmas) - 1 and relative(denoiser(X, SIGMA), plain) <= 1e-6
        assert table.computed == computed and table.found > 0
    finally:
        table.detach()


# -- text

def hiding(text: int, more: int, image: int) -> Tensor:
    """Nobody but themselves sees the last `more` of the text tokens."""
    mask = torch.zeros(text + more + image, text + more + image)
    mask[:text, text:text + more] = -math.inf
    mask[text + more:, text:text + more] = -math.inf
    return mask


@pytest.mark.parametrize(("grid", "covered"), [((1, 1), 0), ((3, 4), 0), ((2, 2), 0), ((3, 4), 10), ((1, 1), 10)])
def test_a_mask_hides_text_from_references_too(models: dict[str, Flux], grid: tuple[int, int], covered: int) -> None:
    """Else it would come in through them. `covered`: the mask has rows for the 10 reference tokens itself."""
    plain = prompt_for(TINY, reference_latents=[REFERENCE])
    text = torch.cat((plain[0][0], random(1, 7, 64)), dim=1)
    mask = hiding(20, 7, math.prod(grid) + covered)
    masked = [[text, {**plain[0][1], "attention_mask": mask, "attention_mask_img_shape": grid}]]
    expected = Denoiser(models["kontext"], plain)(X, SIGMA)
    assert relative(Denoiser(models["kontext"], [[text, plain[0][1]]])(X, SIGMA), expected) > 1e-3
    assert relative(Denoiser(models["kontext"], masked)(X, SIGMA), expected) <= 1e-6
    short = [[text, {**masked[0][1], "attention_mask": mask[:-1, :-1]}]]
    with pytest.raises(BadInput, match=r"sides of \d+, or \d+ with the references"):
        Denoiser(models["kontext"], short)


def test_references_are_masked_as_the_places_where_they_lie() -> None:
    """A mask over a ramp on the picture's grid continues over references of other grids; bools stay bools."""
    grid, references, text = (2, 4), [(2, 4), (1, 2)], 3
    bias = random(2, 1, text + 8, text + 8)
    found = beside_references(bias, grid, references)
    assert found.shape == (2, 1, text + 18, text + 18)
    assert torch.equal(found[..., :text + 8, :text + 8], bias)
    same = [*range(text), *range(text, text + 8), *range(text, text + 8)]
    assert torch.equal(found[..., :text + 16, :text + 16], bias[..., same, :][..., same])
    wide = bias[..., :text, text:].unflatten(-1, grid).mean(-2)  # (.., text, 4): two rows to one
    pairs = wide.unflatten(-1, (2, 2)).mean(-1)
    torch.testing.assert_close(found[..., :text, -2:], pairs)
    hidden = beside_references(bias > 0, grid, references[:1])
    assert hidden.dtype == torch.bool
    assert torch.equal(hidden, (bias > 0)[..., same, :][..., same])
    assert beside_references(bias, grid, []) is bias
