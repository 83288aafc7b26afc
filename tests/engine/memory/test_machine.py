"""What is free, from the tables that Linux and its containers keep."""

from __future__ import annotations

from pathlib import Path

import pytest
from flux_kit.engine.memory.machine import _container_free, _linux_free


@pytest.mark.parametrize(("text", "without", "with_swap"), [
    ("MemTotal:  100 kB\nMemAvailable:  60 kB\nSwapFree:  30 kB\n", 60 << 10, 90 << 10),
    ("MemTotal:  100 kB\nMemAvailable:  60 kB\n", 60 << 10, None),
    ("MemTotal:  100 kB\nMemFree:  60 kB\n", None, None),
])
def test_of_a_machine(tmp_path: Path, text: str, without: int | None, with_swap: int | None) -> None:
    table = tmp_path / "meminfo"
    table.write_text(text, encoding="ascii")
    assert (_linux_free(False, table), _linux_free(True, table)) == (without, with_swap)
    assert _linux_free(False, tmp_path / "none") is None


def container(folder: Path, **files: object) -> Path:
    for name, value in files.items():
        (folder / name.replace("_", ".")).write_text(f"{value}\n", encoding="ascii")
    return folder


def test_of_a_container(tmp_path: Path) -> None:
    folder = container(tmp_path, memory_max=1000, memory_current=700,
                       memory_stat="anon 400\ninactive_file 200\nactive_file 100")
    assert _container_free(False, folder) == 600
    assert _container_free(True, folder) is None                    # it says nothing of swap
    container(folder, memory_swap_max=500, memory_swap_current=100)
    assert (_container_free(False, folder), _container_free(True, folder)) == (600, 1000)
    container(folder, memory_swap_max="max")
    assert _container_free(True, folder) is None                    # the machine's own bound holds
    container(folder, memory_max="max")
    assert _container_free(False, folder) is None
    assert _container_free(False, tmp_path / "none") is None
