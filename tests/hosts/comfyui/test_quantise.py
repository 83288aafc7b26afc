"""The quantiser's node in a running ComfyUI."""

from __future__ import annotations

import json
import struct
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import pytest
import torch
from comfy_server import RUN_TIMEOUT, Failed, Server
from flux_kit.engine.adapters import read_lora
from flux_kit.engine.convert import quantize
from flux_kit.engine.convert.lora_files import Summand
from flux_kit.engine.models.flux import Flux
from flux_kit.engine.specs import FluxSpec
from safetensors.torch import save_file

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tiny_flux" / "models"
TEXT = 3  # of ComfyUI's protocol: a binary message that is a node's text


def prompt(**widgets: Any) -> dict[str, Any]:
    inputs = {"source": "diffusion_models/tiny-flux-dev.safetensors", "type": "Q4_0", "part": "auto", "name": "",
              "overwrite": False, **widgets}
    return {"q": {"class_type": "FluxKitQuantize", "inputs": inputs}}


@pytest.mark.parametrize(("source", "kind", "type", "made"), [
    ("tiny-flux-dev", "diffusion_models", "Q4_0", "tiny-flux-dev-Q4_0.gguf"),
    ("tiny-t5", "text_encoders", "fp8_scaled", "tiny-t5-fp8_scaled.safetensors")])
def test_the_file_lies_in_the_host_s_folder(server: Server, tmp_path: Path, source: str, kind: str, type: str,
                                            made: str) -> None:
    target = server.base / "models" / kind / made
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shown = server.run(prompt(source=f"{kind}/{source}.safetensors", type=type))
    (report,) = shown["q"]["text"]
    quantize(TINY / kind / f"{source}.safetensors", tmp_path / made, type)
    assert target.read_bytes() == (tmp_path / made).read_bytes() and str(target) in report
    assert not [path for path in target.parent.iterdir() if path.name.endswith(".part")]
    assert made in str(server.call("/object_info/FluxKitQuantize"))
    with pytest.raises(Failed, match="already"):
        server.run(prompt(source=f"{kind}/{source}.safetensors", type=type, name=made))
    target.unlink()


def test_loras_are_put_into_the_weights(server: Server, tmp_path: Path) -> None:
    loras = lora_files.write(server.base / "models" / "loras")
    target = server.base / "models" / "diffusion_models" / "tiny-flux-dev-Q4_0-lora.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    baked = prompt()
    baked["q"]["inputs"]["loras"] = ["stack", 1]
    rows = [{"lora": "peft.safetensors", "model": 2}]
    baked["stack"] = {"class_type": "FluxKitLoraStack", "inputs": {"rows": json.dumps(rows)}}
    (report,) = server.run(baked)["q"]["text"]
    quantize(TINY / "diffusion_models" / "tiny-flux-dev.safetensors", tmp_path / target.name, "Q4_0",
             loras=[Summand(read_lora(loras / "peft.safetensors"), 2.0)])
    assert target.read_bytes() == (tmp_path / target.name).read_bytes() and "peft.safetensors" in report
    target.unlink()


@pytest.mark.parametrize("name", ["../../../out", "/out"])
def test_no_name_leaves_the_folder(server: Server, name: str) -> None:
    before = sorted(path for path in server.base.rglob("*.gguf"))
    with pytest.raises(Failed, match="file name"):
        server.run(prompt(name=name))
    assert sorted(path for path in server.base.rglob("*.gguf")) == before


def listened(server: Server, prompt: dict[str, Any], on_progress: Callable[[int], None] = lambda _: None
             ) -> tuple[str, list[int], list[str]]:
    """How a prompt ended, the progress a client was told of, and the texts to show."""
    websocket = pytest.importorskip("websocket", reason="websocket-client is not installed (extra test)")
    client = uuid.uuid4().hex
    socket = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={client}", timeout=RUN_TIMEOUT)
    queued = server.call("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
    values: list[int] = []
    texts: list[str] = []
    while True:
        message = socket.recv()
        if isinstance(message, bytes):
            kind, length = struct.unpack(">II", message[:8])
            if kind == TEXT and message[8:8 + length] == b"q":
                texts.append(message[8 + length:].decode())
            continue
        event = json.loads(message)
        if event["type"] == "progress":
            assert event["data"]["max"] == 100
            values.append(event["data"]["value"])
            on_progress(values[-1])
        if event["type"].startswith("execution_") and event["data"].get("prompt_id") == queued and event["type"] in (
                "execution_success", "execution_error", "execution_interrupted"):
            socket.close()
            return event["type"], values, texts


def test_progress_and_the_report_reach_the_browser(server: Server) -> None:
    target = server.base / "models" / "diffusion_models" / "told.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    ended, values, texts = listened(server, prompt(name="told", type="Q8_0"))
    assert ended == "execution_success" and values == sorted(values) and values[-1] == 100
    assert len(values) > 1  # newer hosts send a few a second, and this file takes less
    assert len(texts) == 1 and str(target) in texts[0] and "relative error" in texts[0]
    target.unlink()


def test_interruption_leaves_nothing(server: Server) -> None:
    folder = server.base / "models" / "diffusion_models"
    folder.mkdir(parents=True, exist_ok=True)
    spec = FluxSpec(hidden_size=512, num_heads=4, depth=1, depth_single_blocks=12, context_in_dim=64, vec_in_dim=64)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Flux(spec).state_dict().items()}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, folder / "larger.safetensors")
    before = sorted(path.name for path in folder.iterdir())
    wanted = prompt(source="diffusion_models/larger.safetensors", type="Q2_K")
    ended, values, _ = listened(server, wanted, lambda value: server.call("/interrupt", {}) if value else None)
    assert ended == "execution_interrupted" and values[-1] < 100
    assert sorted(path.name for path in folder.iterdir()) == before
    (folder / "larger.safetensors").unlink()
