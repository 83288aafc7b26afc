"""What a client of the websocket is told while Flux Kit's sampler runs: progress, previews, pictures, interruption."""

from __future__ import annotations

import io
import json
import select
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_server import RUN_TIMEOUT, Host, Server
from PIL import Image
from prompts import Prompt, flux_kit

websocket = pytest.importorskip("websocket", reason="websocket-client is not installed (extra test)")

ROOT = Path(__file__).parents[3]
PREVIEW_IMAGE, JPEG = 1, 1  # of ComfyUI's protocol: kind of the message, format of the picture in it
ENDS = ("execution_success", "execution_error", "execution_interrupted")
Event = tuple[str, dict[str, Any]]


class Client:
    """A listener of one server. Its messages are `(type, data)`; of a preview `("preview", {"image": bytes})`."""

    def __init__(self, server: Server) -> None:
        self.server, self.id = server, uuid.uuid4().hex
        self.socket = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={self.id}",
                                                  timeout=RUN_TIMEOUT)

    def submit(self, prompt: Prompt) -> str:
        answer = self.server.call("/prompt", {"prompt": prompt, "client_id": self.id})
        assert not answer["node_errors"]
        return str(answer["prompt_id"])

    def next(self) -> Event:
        message = self.socket.recv()
        if isinstance(message, str):
            parsed = json.loads(message)
            return parsed["type"], parsed["data"]
        kind, image_format = struct.unpack(">II", message[:8])
        assert (kind, image_format) == (PREVIEW_IMAGE, JPEG)
        return "preview", {"image": message[8:]}

    def until_the_end(self, prompt_id: str) -> Iterator[Event]:
        """All messages up to the end of a prompt, that one included."""
        while True:
            kind, data = self.next()
            yield kind, data
            if kind in ENDS and data["prompt_id"] == prompt_id:
                return

    def waiting(self) -> Iterator[Event]:
        """The messages that have come already."""
        while select.select([self.socket.sock], [], [], 0)[0]:
            yield self.next()


@pytest.fixture(scope="module")
def previewing(comfy: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, because previews are switched on when it starts."""
    base = tmp_path_factory.mktemp("previewing")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "flux-kit").symlink_to(ROOT, target_is_directory=True)
    started = Server(comfy, base, "--preview-method", "latent2rgb")
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.fixture
def client(previewing: Server) -> Iterator[Client]:
    opened = Client(previewing)
    yield opened
    opened.socket.close()


def steps_told(events: list[Event]) -> list[tuple[int, int]]:
    return [(data["value"], data["max"]) for kind, data in events if kind == "progress" and data["node"] == "sampler"]


@pytest.mark.parametrize("solver", ["euler", "heun"])  # heun asks the model twice a step
def test_every_step_is_told_and_shown(client: Client, solver: str) -> None:
    steps = 6
    prompt_id = client.submit(flux_kit(seed=3, steps=steps, solver=solver))
    events = list(client.until_the_end(prompt_id))
    assert events[-1][0] == "execution_success"
    assert steps_told(events) == [(step, steps) for step in range(1, steps + 1)]

    previews = [Image.open(io.BytesIO(data["image"])) for kind, data in events if kind == "preview"]
    assert len(previews) == steps and {preview.format for preview in previews} == {"JPEG"}
    width, height = previews[0].size
    assert width * 7 == pytest.approx(height * 8, abs=8)  # the picture's own 128 x 112
    first, last = (np.asarray(preview, dtype=np.float32) for preview in (previews[0], previews[-1]))
    assert last.std() > 1 and np.abs(first - last).mean() > 1, "the previews do not show the picture come about"


def test_the_saved_picture_is_told(client: Client) -> None:
    prompt_id = client.submit(flux_kit(seed=4))
    events = list(client.until_the_end(prompt_id))
    (saved,) = [data["output"]["images"] for kind, data in events if kind == "executed" and data["node"] == "save"]
    assert saved == client.server.result(prompt_id)["save"]["images"]
    assert len(saved) == 1 and saved[0]["type"] == "output" and saved[0]["subfolder"] == "pictures"
    with Image.open(client.server.path_of(saved[0])) as picture:
        assert picture.size == (128, 112) and np.asarray(picture).std() > 10
    order = [data["node"] for kind, data in events if kind == "executing" and data["node"]]
    assert order.index("sampler") < order.index("decode") < order.index("save")


def test_interrupted_within_a_step_and_the_next_prompt_runs(client: Client) -> None:
    prompt = flux_kit(seed=5, steps=5000)
    prompt["size"]["inputs"] |= {"width": 512, "height": 512}
    prompt_id = client.submit(prompt)
    while (event := client.next())[0] != "progress" or event[1]["value"] < 3:
        assert event[0] not in ENDS, event
    client.server.call("/interrupt", {})
    list(client.waiting())  # steps done before the server had the wish
    events = list(client.until_the_end(prompt_id))
    assert len(steps_told(events)) <= 1
    assert events[-1][0] == "execution_interrupted" and events[-1][1]["node_id"] == "sampler"
    assert not any(kind == "executed" for kind, _ in events)

    after = list(client.until_the_end(client.submit(flux_kit(seed=6))))
    assert after[-1][0] == "execution_success" and [step for step, _ in steps_told(after)] == [1, 2, 3, 4]
