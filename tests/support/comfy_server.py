"""A ComfyUI server started for a test, and prompts sent to it by its HTTP interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

START_TIMEOUT, RUN_TIMEOUT = 300, 300


@dataclass(frozen=True)
class Host:
    path: Path
    python: str


class Failed(Exception):
    """A prompt that ended in an error; `.node` and `.kind` say where and of what class."""

    def __init__(self, message: str, node: str = "", kind: str = "") -> None:
        super().__init__(message)
        self.node, self.kind = node, kind


def environment() -> dict[str, str]:
    """Few threads; and no path of this test run, where `flux_kit` would be found under its own name."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}


class Server:
    def __init__(self, host: Host, base: Path, *arguments: str) -> None:
        self.base, self.log, self.said_at_start = base, base / "server.log", ""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [host.python, str(host.path / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
                   "--base-directory", str(base), "--disable-auto-launch", "--database-url", "sqlite:///:memory:",
                   *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=host.path, env=environment(), stdout=log, stderr=log)

    def wait(self) -> None:
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                self.call("/system_stats")
                self.said_at_start = self.log.read_text()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.3)
        raise AssertionError(f"the server did not start in {START_TIMEOUT} s: {self.log.read_text()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def call(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body,
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def forget(self) -> None:
        """Drop all cached results and loaded models, so that the next prompt is computed anew."""
        self.call("/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.5)  # the worker does so when it next wakes

    def submit(self, prompt: dict[str, Any]) -> str:
        """Id of a queued prompt. Failed if the server refuses it."""
        try:
            answer = self.call("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as error:
            raise Failed(error.read().decode(), kind="refused") from None
        if answer["node_errors"]:  # a part of the prompt runs all the same
            raise Failed(json.dumps(answer["node_errors"]), kind="refused")
        return str(answer["prompt_id"])

    def result(self, prompt_id: str) -> dict[str, Any]:
        """Outputs by node of a prompt once it has ended."""
        end = time.monotonic() + RUN_TIMEOUT
        while time.monotonic() < end:
            entry = self.call(f"/history/{prompt_id}").get(prompt_id)
            if entry is None:
                time.sleep(0.1)
                continue
            for event, told in entry["status"]["messages"]:
                if event == "execution_error":
                    raise Failed(told["exception_message"], told["node_type"], told["exception_type"])
                if event == "execution_interrupted":
                    raise Failed("interrupted", told.get("node_type", ""), event)
            outputs: dict[str, Any] = entry["outputs"]
            return outputs
        raise AssertionError(f"no result in {RUN_TIMEOUT} s: {self.log.read_text()[-4000:]}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        return self.result(self.submit(prompt))

    def latents(self, prompt: dict[str, Any]) -> dict[str, Tensor]:
        """What the SaveLatent nodes of a prompt saved, by node id."""
        outputs = self.run(prompt)
        return {node: load_file(self.path_of(told["latents"][0]))["latent_tensor"]
                for node, told in outputs.items() if "latents" in told}

    def path_of(self, saved: dict[str, str]) -> Path:
        return self.base / saved["type"] / saved["subfolder"] / saved["filename"]
