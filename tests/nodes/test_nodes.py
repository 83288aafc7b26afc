"""Our nodes: what is public for ever, what every node owes its user, and that they do what core's nodes do."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_fixtures import samples
from flux_kit.engine.errors import BadInput, FluxKitError, MissingFile, NotFinite
from flux_kit.hosts.standalone.host import StandaloneHost
from flux_kit.hosts.standalone.io import WidgetInput
from prompts import LOAD, SAMPLE, sampler

ROOT = Path(__file__).parents[2]
FROZEN = ROOT / "tests" / "data" / "nodes.json"
SOURCES = sorted((ROOT / "nodes").glob("*.py"))


@pytest.fixture
def schemas(host: StandaloneHost) -> list[Any]:
    from flux_kit.nodes import NODES
    return [node.GET_SCHEMA() for node in NODES]


def public(schema: Any) -> dict[str, Any]:
    """What saved workflows rely on."""
    return {
        "category": schema.category,
        "inputs": [[spec.id, spec.io_type, "widget" if isinstance(spec, WidgetInput) else "socket",
                    "optional" if spec.optional else "required"] for spec in schema.inputs],
        "widgets": [name for spec in schema.inputs if isinstance(spec, WidgetInput) for name in (
            [spec.id, "control_after_generate"] if getattr(spec, "control_after_generate", None) else [spec.id])],
        "outputs": [[output.id, output.io_type] for output in schema.outputs]}


def test_ids_sockets_and_widget_order_stay(schemas: list[Any]) -> None:
    """Public for ever: a change of this file is a change to every workflow people saved. Widgets are only appended."""
    found = {schema.node_id: public(schema) for schema in schemas}
    assert found == json.loads(FROZEN.read_text(encoding="utf-8"))


def test_everything_is_explained(schemas: list[Any]) -> None:
    for schema in schemas:
        assert schema.category.startswith("Flux Kit/") and schema.display_name and len(schema.description) > 20
        for entry in (*schema.inputs, *schema.outputs):
            assert entry.tooltip, f"{schema.node_id}.{entry.id} has no tooltip"


def test_nodes_are_short_and_do_no_arithmetic() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                assert (node.end_lineno or 0) - node.lineno < 40, f"{node.name} is longer than 40 lines"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {name.split(".")[0] for name in names} & {"torch", "numpy", "comfy", "comfy_api"}


def test_an_older_host_is_not_given_keywords_it_lacks(host: StandaloneHost, monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_kit.nodes import api
    monkeypatch.setattr(api, "_SCHEMA_KEYWORDS", frozenset({"node_id", "category"}))
    schema = api.Schema(node_id="X", category="Y", search_aliases=["z"])
    assert schema.node_id == "X" and schema.search_aliases is None


def test_our_chain_gives_core_s_picture(run_prompt: Any) -> None:
    core = {"model": ["load", 0], "positive": ["pos", 0], "negative": ["pos", 0], "latent_image": ["empty", 0],
            "seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    result = run_prompt({
        **LOAD, "ours": sampler(), "core": ("KSampler", core),
        "d": ("FluxKitDecode", {"latent": ["ours", 0], "vae": ["load", 2]}),
        "cd": ("VAEDecode", {"samples": ["core", 0], "vae": ["load", 2]})}, "d cd")
    assert torch.equal(result.outputs["d"][0][0], result.outputs["cd"][0][0])
    assert result.outputs["empty"][1:] == [[48], [32]]


def test_single_loaders_and_all_in_one_files_give_the_same_parts(run_prompt: Any) -> None:
    everything, inside = "flux1-schnell-fp8.safetensors", "from the model file"
    result = run_prompt({
        "empty": LOAD["empty"],
        "one": ("FluxKitLoadFlux", {"model": everything, "clip_l": inside, "t5": inside, "vae": inside}),
        "m": ("FluxKitLoadTransformer", {"model": "flux1-schnell.safetensors"}),
        "c": ("FluxKitLoadTextEncoders", {"clip_l": "clip_l.safetensors", "t5": "t5xxl_fp16.safetensors"}),
        "v": ("FluxKitLoadVAE", {"vae": everything}),
        "p1": ("FluxKitEncodePrompt", {**LOAD["pos"][1], "clip": ["one", 1]}),
        "p2": ("FluxKitEncodePrompt", {**LOAD["pos"][1], "clip": ["c", 0]}),
        "k1": sampler(schedule="bfl", model=["one", 0], positive=["p1", 0]),
        "k2": sampler(schedule="bfl", model=["m", 0], positive=["p2", 0]),
        "d1": ("FluxKitDecode", {"latent": ["k1", 0], "vae": ["one", 2]}),
        "d2": ("FluxKitDecode", {"latent": ["k2", 0], "vae": ["v", 0]})}, "d1 d2")
    assert torch.equal(result.outputs["d1"][0][0], result.outputs["d2"][0][0])


def test_prompts_of_both_encoders_and_exact_length(run_prompt: Any) -> None:
    base = LOAD["pos"][1]
    result = run_prompt({**LOAD, "two": ("FluxKitEncodePrompt", {**base, "t5_prompt": "blue"}),
                         "t5": ("FluxKitEncodePrompt", {**base, "prompt": "blue", "t5_length": "128",
                                                        "guidance": 2.0})}, "pos two t5")
    (one, v1), (two, v2), (three, v3) = (result.outputs[name][0][0][0] for name in ("pos", "two", "t5"))
    assert torch.equal(v1["pooled_output"], v2["pooled_output"]) and not torch.equal(one, two)
    assert three.shape == (1, 128, 64) and two.shape == (1, 256, 64)
    assert not torch.equal(v1["pooled_output"], v3["pooled_output"])
    assert (v1["guidance"], v3["guidance"]) == (3.5, 2.0)


def test_both_meanings_of_denoise(run_prompt: Any, host: StandaloneHost) -> None:
    steps: list[int] = []
    host._progress_bar = lambda total: steps.append(total) or (lambda value, preview=None: None)  # type: ignore[func-returns-value]
    for meaning, count in (("keep steps (ComfyUI)", 4), ("skip steps (diffusers)", 2)):
        run_prompt({**LOAD, "k": sampler(denoise=0.5, denoise_meaning=meaning)}, "k")
        assert steps.pop() == count


def test_a_cfg_window_limits_where_the_negative_prompt_acts(run_prompt: Any) -> None:
    def guided(**changes: Any) -> tuple[str, dict[str, Any]]:
        return sampler(negative=["neg", 0], cfg=4.0, **changes)

    result = run_prompt({
        **LOAD, "neg": ("FluxKitEncodePrompt", {**LOAD["pos"][1], "prompt": "blue"}),
        "off": sampler(), "never": guided(cfg_start=0.5, cfg_end=0.5), "always": guided(),
        "early": guided(cfg_end=0.5)}, "off never always early")
    off, never, always, early = (samples(result, name) for name in ("off", "never", "always", "early"))
    assert torch.equal(off, never)
    assert not torch.allclose(off, early, atol=1e-3) and not torch.allclose(always, early, atol=1e-3)


def test_an_item_taken_out_of_a_batch_keeps_its_noise(run_prompt: Any, host: StandaloneHost) -> None:
    loaded = run_prompt(LOAD, "load pos").outputs
    model, positive = loaded["load"][0][0], loaded["pos"][0][0]
    whole = host.sample(model, positive, None, host.empty_latent(48, 32, 3), seed=7, steps=2)
    item = host.sample(model, positive, None, {**host.empty_latent(48, 32), "batch_index": [2]}, seed=7, steps=2)
    assert item["batch_index"] == [2]
    assert torch.allclose(whole["samples"][2:], item["samples"], atol=1e-5)
    assert not torch.allclose(whole["samples"][:1], item["samples"], atol=1e-1)


def test_encode_with_a_mask_repaints_only_there(run_prompt: Any, host: StandaloneHost) -> None:
    import numpy as np
    from PIL import Image
    picture = np.random.default_rng(1).integers(0, 255, (32, 48, 4), dtype=np.uint8)
    picture[:, :24, 3], picture[:, 24:, 3] = 255, 0
    Image.fromarray(picture).save(host.folders.roots("input")[0] / "p.png")
    result = run_prompt({
        **LOAD, "image": ("LoadImage", {"image": "p.png"}),
        "enc": ("FluxKitEncode", {"image": ["image", 0], "vae": ["load", 2], "mask": ["image", 1]}),
        "k": sampler(latent=["enc", 0])}, "k")
    before, after = samples(result, "enc"), samples(result, "k")
    assert torch.allclose(before[..., :2], after[..., :2], atol=1e-4)
    assert not torch.allclose(before[..., 4:], after[..., 4:], atol=1e-1)


def test_what_is_cut_off_a_prompt_is_told_once(nodes: dict[str, Any], run_prompt: Any,
                                               caplog: pytest.LogCaptureFixture) -> None:
    clip = run_prompt(LOAD, "load").outputs["load"][1][0]
    nodes["FluxKitEncodePrompt"](clip=clip, prompt="circle " * 300, t5_prompt="", guidance=3.5, t5_length="128")
    assert len([record for record in caplog.records if "cut off" in record.getMessage()]) == 1


@pytest.mark.parametrize(("size", "mask", "words"), [
    ((32, 48), None, None), ((32, 48), (32, 48), None), ((32, 48), (64, 96), None),
    ((35, 49), None, "image: 49 x 35 is cut to 48 x 32"), ((40, 48), None, "48 x 40 is no multiple of 16"),
    ((32, 48), (64, 64), "64 x 64, another aspect"), ((32, 48), (0, 64), "empty: a sampler will change nothing")])
def test_encode_tells_what_is_odd_about_picture_and_mask(nodes: dict[str, Any], vae: Any, size: tuple[int, int],
                                                         mask: tuple[int, int] | None, words: str | None,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    image = torch.rand(1, *size, 3)
    cover = None if mask is None else torch.ones(1, *mask) if mask[0] else torch.zeros(1, 64, 64)
    (latent,) = nodes["FluxKitEncode"](image=image, vae=vae, mask=cover)
    told = [record.getMessage() for record in caplog.records]
    assert latent["samples"].shape[-2:] == (size[0] // 8, size[1] // 8)
    assert (told == []) if words is None else (len(told) == 1 and words in told[0])


def test_encode_refuses_nan_and_clamps_its_mask(nodes: dict[str, Any], vae: Any) -> None:
    image, mask = torch.rand(1, 32, 48, 3), torch.full((1, 32, 48), 255.0)
    (latent,) = nodes["FluxKitEncode"](image=image, vae=vae, mask=mask)
    assert torch.equal(latent["noise_mask"], torch.ones(1, 1, 32, 48))
    for given in ({"image": image * float("nan"), "mask": mask}, {"image": image, "mask": mask * float("nan")}):
        with pytest.raises(NotFinite, match="holds NaN"):
            nodes["FluxKitEncode"](vae=vae, **given)


@pytest.mark.parametrize(("changes", "words"), [
    ({"width": 1000}, "992 and 1008"), ({"height": 8}, "16 ... 16384"), ({"aspect": "7:5"}, "16:9"),
    ({"megapixels": 100.0}, "0.01 to 64"), ({"batch_size": 65}, "1 to 64")])
def test_bad_sizes_are_refused_before_the_run(run_prompt: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        run_prompt({"bad": ("FluxKitEmptyLatent", {**LOAD["empty"][1], **changes})}, "bad")
    assert caught.value.node == "bad"


def test_a_linked_size_is_checked_when_it_arrives(run_prompt: Any) -> None:
    linked = {**LOAD["empty"][1], "width": ["w", 0]}
    nodes = {"w": ("PrimitiveInt", {"value": 1000}), "e": ("FluxKitEmptyLatent", linked)}
    with pytest.raises(BadInput, match="992 and 1008"):
        run_prompt(nodes, "e")
    nodes["w"] = ("PrimitiveInt", {"value": 64})
    assert samples(run_prompt(nodes, "e"), "e").shape == (1, 16, 4, 8)


@pytest.mark.parametrize(("node", "inputs", "words"), [
    ("FluxKitLoadTransformer", {"model": "flux1-dex.safetensors"}, "flux1-dev.safetensors"),
    ("FluxKitLoadVAE", {"vae": "../diffusion_models/none.safetensors"}, "none.safetensors"),
    ("FluxKitLoadFlux", {**LOAD["load"][1], "t5": "nothing"}, "text_encoders"),
    ("FluxKitSampler", {**SAMPLE, "solver": "magic"}, "euler"),
    ("FluxKitSampler", {**SAMPLE, "seed": 2**64}, "18446744073709551615"),
    ("FluxKitSampler", {**SAMPLE, "denoise": 1.5}, "0.0 to 1.0"),
])
def test_bad_widgets_name_what_is_allowed(run_prompt: Any, node: str, inputs: dict[str, Any], words: str) -> None:
    with pytest.raises((BadInput, MissingFile), match=words):
        run_prompt({**LOAD, "bad": (node, inputs)}, "bad")


def test_cfg_without_a_negative_prompt_is_refused(run_prompt: Any) -> None:
    with pytest.raises(FluxKitError, match="negative"):
        run_prompt({**LOAD, "k": sampler(cfg=3.0)}, "k")


def test_nan_in_the_middle_of_a_run_stops_it(run_prompt: Any, host: StandaloneHost) -> None:
    from flux_kit.engine.errors import NotFinite
    model = host.load_model(host.resolve_file("diffusion_models", "flux1-dev.safetensors"))
    weight = model.flux.final_layer.linear.weight
    kept = weight.clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    try:
        with pytest.raises(NotFinite, match="step 1 of 4"):
            run_prompt({**LOAD, "k": sampler(seed=5)}, "k")
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_changed_model_file_is_loaded_anew(run_prompt: Any, models: Path) -> None:
    import os
    nodes = {"v": ("FluxKitLoadVAE", {"vae": "ae.safetensors"}), "c": ("VAELoader", {"vae_name": "ae.safetensors"})}
    assert set(run_prompt(nodes, "v c").executed) >= {"v", "c"}
    assert {"v", "c"} <= set(run_prompt(nodes, "v c").cached)
    path = models / "vae" / "ae.safetensors"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))
    assert {"v", "c"} <= set(run_prompt(nodes, "v c").executed)
