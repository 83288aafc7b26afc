"""A standalone host for nodes that write into the models folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import lora_files
from flux_kit import hosts
from flux_kit.cli import session
from flux_kit.hosts.standalone.executor import Executor, Result
from flux_kit.hosts.standalone.folders import Folders
from flux_kit.hosts.standalone.host import StandaloneHost
from prompts import Nodes, prompt_of


class Bench:
    """The current host, on a models folder of its own and on tiny-flux's. `steps`: (value, total) of all progress."""

    def __init__(self, models: Path, base: Path) -> None:
        self.models = Path(shutil.copytree(models, base / "models"))
        self.loras = lora_files.write(self.models / "loras")
        self.steps: list[tuple[int, int]] = []
        self.host = StandaloneHost(Folders(models=[self.models, session.TINY_MODELS], output=base), device="cpu",
                                   progress_bar=lambda total: lambda value, _: self.steps.append((value, total)))
        hosts.use(self.host)

    def run(self, nodes: Nodes) -> Result:
        executor = Executor(session.node_classes(), check_interrupt=self.host.check_interrupt)
        return executor.run(prompt_of(nodes))

    def files(self) -> set[str]:
        """All that lies in the models folder."""
        return {path.relative_to(self.models).as_posix() for path in self.models.rglob("*") if path.is_file()}

    def percent(self) -> list[int]:
        """What a progress bar that ends at 100 was told, in its order."""
        return [value for value, total in self.steps if total == 100]

    def stop_at(self, percent: int) -> None:
        """The next run is interrupted there."""
        self.host._progress_bar = lambda total: lambda value, _: self.host.interrupt() if value >= percent else None
