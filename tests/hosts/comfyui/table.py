"""Prints which core nodes work on Flux Kit's objects, as a Markdown table with a column for each ComfyUI.

    COMFYUI_PATH=CHECKOUT[:CHECKOUT...] [COMFYUI_PYTHON=PYTHON[:PYTHON...]] pytest --table tests/hosts/comfyui

runs the tests named here and no others. `ok 2e-07` gives the largest relative difference from the oracle of the row.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROWS = "test_core_nodes.py::test_core_node"
MORE = {  # test -> what the row is called; `{}` stands for the test's own parameter
    "test_core_nodes.py::test_a_saved_model_loads_again": "ModelSave",
    "test_variants.py::test_a_variant_in_the_server": "KSampler on {}, with its conditioning node",
    "test_variants.py::test_a_control_lora_with_its_picture": "LoraLoader, BFL's control LoRA",
    "test_variants.py::test_references_at_time_zero_are_refused": "references, index_timestep_zero: refused",
    "test_inside.py::test_control_nets_act_as_on_core_s_network": "ControlNetApplyAdvanced",
    "test_inside.py::test_progress_and_previews": "previews and progress",
    "test_inside.py::test_after_an_accident_the_same_run_gives_the_same": "after {}: the same again",
    "test_server.py::test_interrupted_and_run_again": "interrupt by the server",
    "test_server.py::test_core_s_loader_and_ours_agree": "core's UNETLoader as oracle, {}",
    "test_vision.py::test_redux_gives_the_same_latent_in_both_hosts": "StyleModelApply, {}",
    "test_templates.py::test_a_template_gives_core_s_latents": "template {}",
    "test_packs.py::test_a_pack_does_to_ours_what_it_does_to_core_s": "stand-in pack {}",
}


def version_of(checkout: Path) -> str:
    """As the checkout says itself."""
    file = checkout / "comfyui_version.py"
    found = re.search(r'"([^"]+)"', file.read_text()) if file.is_file() else None
    return checkout.name if found is None else found[1]


def row_of(nodeid: str) -> tuple[str, str] | None:
    """(host, row) of a test, None if it is no part of the table."""
    where, _, parameters = nodeid.rstrip("]").partition("[")
    test = "::".join(where.rpartition("/")[2].split("::")[:2])
    host, _, name = parameters.partition("-")
    if test == ROWS:
        return host, name
    return (host, MORE[test].format(name)) if test in MORE else None


class Table:
    """A plugin of pytest that keeps the table's tests and prints it in the end."""

    def __init__(self, hosts: dict[str, str]) -> None:
        self.hosts = hosts
        self.rows: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        rest = [item for item in items if row_of(item.nodeid) is None]
        items[:] = [item for item in items if row_of(item.nodeid) is not None]
        config.hook.pytest_deselected(items=rest)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = row_of(report.nodeid)
        if found is not None and (report.when == "call" or report.outcome != "passed"):
            self.rows[found[1]][found[0]] = told(report)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line("| core node | " + " | ".join(self.hosts.values()) + " |")
        terminalreporter.write_line("|---" * (len(self.hosts) + 1) + "|")
        for name, cells in self.rows.items():
            terminalreporter.write_line(f"| {name} | " + " | ".join(cells.get(host, "") for host in self.hosts) + " |")


def told(report: pytest.TestReport) -> str:
    """One cell: ok with the largest difference measured, or why not."""
    if report.outcome == "passed":
        off = [value for key, value in report.user_properties if key == "off"]
        return f"ok {max(off):.0e}" if off else "ok"
    if report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        return reason.removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(report.longrepr) if crash is None else crash.message
    return "**fails**: " + message.splitlines()[0].replace("|", "/")[:120]
