"""LoRAs inside ComfyUI, ours beside core's loader: files written here, applied in a process of the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_files
import pytest
from alone import tiny_host
from comfy_inside import Inside, inside_of
from comfy_server import Failed, Host, Server
from compare import relative
from flux_kit.engine.adapters import Row, read_lora
from flux_kit.engine.quant import FORMATS
from gguf_files import quantise, write_gguf
from prompts import TEXT, Prompt, core, core_loader, node
from safetensors.torch import load_file
from torch import Tensor

SAME = 1e-5
HALF = 0.03  # bf16: merged weights and side paths round in other places
ROOT = Path(__file__).parents[3]
ROUNDED = 0.03  # the host rounds merged 8-bit weights at random
CHECKS = ("lora_apply", "lora_dialects", "lora_partial_load", "lora_steps_and_places", "lora_text", "lora_refused",
          "lora_order", "lora_reads_weights", "lora_reads_scaled_weights")


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    stored: dict[str, Any] = {}
    for name, tensor in load_file(ROOT / "tiny_flux/models/diffusion_models/tiny-flux-dev.safetensors").items():
        kinds = [kind for kind in ("Q4_K", "Q5_1") if tensor.ndim == 2 and tensor.shape[1] % FORMATS[kind].block == 0]
        stored[name] = (quantise(tensor, kinds[0]), kinds[0]) if kinds else tensor.float()
    write_gguf(folder / "flux-k.gguf", stored, "flux")
    lora_files.write(folder / "loras")
    return folder


@pytest.fixture(scope="session")
def inside(comfy: Host, lora_folder: Path) -> Inside:
    return inside_of(comfy, *CHECKS, FLUX_KIT_LORAS=str(lora_folder))


def test_applied_as_core_s_loader_does(inside: Inside) -> None:
    found = inside("lora_apply")
    assert len(found) == 12
    for name, case in found.items():
        half = "bf16" in name
        assert case["off"] <= (HALF if half else SAME) and case["beside"] <= (HALF if half else SAME), name
        assert case["changed"] > 10 * case["beside"] and case["changed"] > 1e-3, name
        assert case["base"], f"{name} stayed on the model"


def test_dialects_that_core_does_not_read(inside: Inside) -> None:
    found = inside("lora_dialects")
    assert {"xlabs", "fal", "swapped", "bias", "dora", "oft"} <= set(found)
    for name, case in found.items():
        assert case["off"] <= SAME and case["changed"] > 1e-3 and case["base"], name


def test_partly_loaded_gives_the_same(inside: Inside) -> None:
    found = inside("lora_partial_load")
    assert len(found) == 8
    for name, case in found.items():
        assert case["off"] <= (HALF if "bf16" in name else SAME), name
        assert case["share"] < 0.5, f"{name}: everything was loaded, so nothing was tested"


def test_steps_and_places(inside: Inside) -> None:
    found = inside("lora_steps_and_places")
    assert set(found) == {"ours", "packed", "core's", "ours in bf16"}
    for kind, case in found.items():
        same = HALF if "bf16" in kind else SAME
        for name in ("always", "everywhere"):
            assert case[name][1] <= same, (kind, name)
        for name in ("never", "nowhere"):
            assert case[name][0] == 0, (kind, name)
        for name in ("first half", "left"):
            assert min(case[name]) > 1e-3, (kind, name)
        assert all(off <= same for off in case["stacks"].values()), (kind, case["stacks"])
        assert case["base"] and case["hooks"] == case["more"] == 0, kind


def test_order_of_rows_and_nodes(inside: Inside) -> None:
    found = inside("lora_order")
    assert found["later"] <= SAME and found["earlier"] > 1e-3
    assert found["shift"] <= SAME and found["ranged"] > 1e-3


def test_what_depends_on_weights_that_others_change(inside: Inside) -> None:
    found = inside("lora_reads_weights")
    assert len(found) == 8
    for name, case in found.items():
        same = HALF if "bf16" in name else SAME
        assert case["loaded"] <= same and case["streamed"] <= same, (name, case)
        assert case["changed"] > 0.03, name


def test_what_depends_on_scaled_8_bit_weights(inside: Inside) -> None:
    found = inside("lora_reads_scaled_weights")
    assert found["off"] <= ROUNDED < found["changed"]
    assert found["shares"][1] == pytest.approx(found["shares"][0], rel=0.02)


def test_text_encoders(inside: Inside) -> None:
    found = inside("lora_text")
    assert max(found["off"]) <= SAME and min(found["changed"]) > 1e-4 and found["base"]
    assert "on CLIP-L: 1" in found["report"] and "on T5: 1" in found["report"]
    assert "no CLIP is connected" in found["without clip"]


def test_bad_files_leave_the_model_alone(inside: Inside) -> None:
    found = inside("lora_refused")
    bad = {name: case for name, case in found.items() if name.startswith("bad")}
    assert set(bad) == {*lora_files.bad(), "bad cut"}
    for name, case in bad.items():
        assert f"{name}.safetensors" in case["said"] and case["patches"] == case["base"] == 0, name
        told = "left out" if name in ("bad halves", "bad ranks") else "unknown" if "unknown" in name else "NOT APPLIED"
        assert told in case["warned"], name


def test_a_missing_file_and_the_same_file_twice(inside: Inside) -> None:
    found = inside("lora_refused")
    assert "kohia.safetensors" in found["missing"] and "near: kohya.safetensors" in found["missing"]
    assert "tiny_flux" not in found["missing"]
    assert "this CLIP is of another model (SD3ClipModel)" in found["other clip"]
    twice = found["twice"]
    assert twice["off"] <= SAME and "stands more than once: its strengths add" in twice["told"] and not twice["patches"]


def test_what_is_told(inside: Inside) -> None:
    found = inside("lora_refused")
    assert "5 by side path" in found["reports"]["packed"]
    assert all("5 by the host" in found["reports"][kind] for kind in ("ours", "core's", "ours in bf16"))


def test_control_loras(inside: Inside) -> None:
    found = inside("lora_refused")
    assert "control.safetensors is a control LoRA" in found["no picture"]
    assert found["control"]["off"] <= SAME and found["control"]["base"] > 1e-3


ROWS = [{"lora": "kohya.safetensors", "model": 0.7}, {"lora": "text.safetensors"}]


def with_stack(prompt: Prompt, *between: tuple[str, dict[str, Any]]) -> Prompt:
    """The prompt with a stack of two LoRAs, our nodes behind it, and Apply LoRAs on its model and text encoders."""
    made, last = {"stack": node("FluxKitLoraStack", rows=json.dumps(ROWS))}, ["stack", 1]
    for kind, inputs in between:
        made[kind] = node(kind, loras=last, **inputs)
        last = [kind, 0]
    made["apply"] = node("FluxKitLoraApply", model=["load", 0], clip=["load", 1], loras=last, mode="auto",
                         on_problem="strict")
    return {**rewired(prompt, "apply", "apply"), **made}


def with_core(prompt: Prompt) -> Prompt:
    files = (("one", "kohya.safetensors", 0.7, "load"), ("two", "text.safetensors", 1.0, "one"))
    chain = {name: node("LoraLoader", model=[before, 0], clip=[before, 1], lora_name=file, strength_model=strength,
                        strength_clip=strength) for name, file, strength, before in files}
    return {**rewired(prompt, "two", "two"), **chain}


def rewired(prompt: Prompt, model: str, clip: str) -> Prompt:
    places = {("load", 0): [model, 0], ("load", 1): [clip, 1]}
    return {name: {**entry, "inputs": {key: places.get(tuple(value), value) if isinstance(value, list) else value
                                       for key, value in entry["inputs"].items()}} for name, entry in prompt.items()}


@pytest.fixture
def serving(server: Server) -> Server:
    lora_files.write(server.base / "models" / "loras")
    return server


def test_nodes_by_the_server(serving: Server, tmp_path: Path) -> None:
    """Our nodes against core's loader, and against the standalone host, by the picture's latents."""
    plain = serving.latents(core())["latent"]
    ours, theirs = (serving.latents(made(core()))["latent"] for made in (with_stack, with_core))
    assert relative(ours, theirs) <= SAME and relative(ours, plain) > 1e-3
    host = tiny_host(tmp_path, serving.base / "models")
    text = [host.resolve_file("text_encoders", f"tiny-{role}.safetensors") for role in ("clip_l", "t5")]
    loaded = (host.load_model(host.resolve_file("diffusion_models", "tiny-flux-dev.safetensors")),
              host.load_text_encoders(text))

    def alone(*rows: Row) -> Tensor:
        model, clip, _ = host.with_loras(*loaded, rows)
        out: Tensor = host.sample(model, host.encode_prompt(clip, TEXT, guidance=3.5), None,
                                  host.empty_latent(128, 112), seed=21, steps=4, schedule="simple")["samples"]
        return out

    first = Row("kohya.safetensors", 0.7, 0.7)
    only_model = with_stack(core())
    only_model["stack"]["inputs"]["rows"] = json.dumps(ROWS[:1])
    assert relative(serving.latents(only_model)["latent"], alone(first)) <= SAME
    # the host merges into text encoders as they are stored, fp16, and rounds them once more
    assert relative(ours, alone(first, Row("text.safetensors"))) <= 1e-4


def test_on_a_model_that_core_loaded(serving: Server, core_can_load: bool) -> None:
    if not core_can_load:
        pytest.skip("core's loader does not take tiny-flux here")
    ours, theirs = (serving.latents(core_loader(made(core())))["latent"] for made in (with_stack, with_core))
    beside = core_loader(with_stack(core()))
    beside["apply"]["inputs"]["mode"] = "side path"
    assert relative(ours, theirs) <= SAME and relative(serving.latents(beside)["latent"], theirs) <= SAME


def test_every_node_by_the_server(serving: Server) -> None:
    shaped = with_stack(core(), ("FluxKitLoraBlockWeights", {"blocks": "all = 1"}),
                        ("FluxKitLoraSchedule", {"start": 0.0, "end": 1.0, "curve": "0: 1"}),
                        ("FluxKitLoraRegion", {"mask": ["mask", 0], "feather": 0, "background": 1.0, "text": 1.0}),
                        ("FluxKitLoraSweep", {"strengths": "0.7", "row": 1}))
    shaped |= {"mask": node("SolidMask", value=1.0, width=64, height=64),
               "info": node("FluxKitLoraInspect", lora="kohya.safetensors", model=["load", 0])}
    outputs = serving.run(shaped)
    assert "format kohya" in outputs["info"]["text"][0]
    saved = load_file(serving.path_of(outputs["latent"]["latents"][0]))["latent_tensor"]
    assert relative(saved, serving.latents(with_core(core()))["latent"]) <= SAME


def test_a_file_that_save_lora_wrote(serving: Server) -> None:
    """Two LoRAs written as one, applied by our nodes, by core's loader, and read by the standalone host."""
    target = serving.base / "models" / "loras" / "both.safetensors"
    target.unlink(missing_ok=True)
    save = {"stack": node("FluxKitLoraStack", rows=json.dumps(ROWS)),
            "save": node("FluxKitLoraSave", loras=["stack", 1], name="both", layout="kohya", rank=0, dtype="fp32",
                         base="none")}
    (report,) = serving.run(save)["save"]["text"]
    assert "0.7 x kohya.safetensors + text.safetensors" in report and lora_files.worst_error(report) <= 1e-4
    assert {adapter.destination.role for adapter in read_lora(target).adapters} == {"transformer", "clip_l", "t5"}
    two, one = with_stack(core()), with_stack(core())
    one["stack"]["inputs"]["rows"] = json.dumps([{"lora": "both.safetensors"}])
    loader = {**rewired(core(), "one", "one"), "one": node("LoraLoader", model=["load", 0], clip=["load", 1],
                                                           lora_name="both.safetensors", strength_model=1.0,
                                                           strength_clip=1.0)}
    expected = serving.latents(two)["latent"]
    assert relative(serving.latents(one)["latent"], expected) <= 1e-4  # text encoders are merged into as fp16
    assert relative(serving.latents(loader)["latent"], expected) <= 1e-4
    again = {**save, "save": {**save["save"], "inputs": {**save["save"]["inputs"], "dtype": "fp16"}}}
    with pytest.raises(Failed, match="already") as caught:
        serving.run(again)
    assert caught.value.node == "FluxKitLoraSave"


def test_a_bad_file_is_told_by_the_node(serving: Server) -> None:
    prompt = with_stack(core())
    prompt["stack"]["inputs"]["rows"] = json.dumps([{"lora": "bad sdxl.safetensors"}])
    with pytest.raises(Failed, match="SDXL") as caught:
        serving.run(prompt)
    assert caught.value.node == "FluxKitLoraApply"
