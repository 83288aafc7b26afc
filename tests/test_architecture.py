"""The architecture as tables: who may import whom, and what a file may look like. Read with `ast`, nothing is run."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# unit -> units it may import besides itself; the longest unit that a module's name starts with decides.
MAY_IMPORT: dict[str, set[str]] = {
    "": {"hosts", "hosts.comfyui", "nodes"},
    "cli": {"nodes", "hosts", "hosts.standalone", "engine"},
    "nodes": {"hosts", "engine"},
    "hosts": {"engine"},
    "hosts.standalone": {"hosts", "engine"},
    "hosts.comfyui": {"hosts", "engine"},
    "tiny_flux": {"engine", "hosts", "hosts.standalone"},
    "engine": set(),
    "engine.errors": set(),
    "engine.specs": set(),
    "engine.quant": {"engine.errors", "engine.specs"},
    "engine.conditioning": {"engine.errors", "engine.specs"},
    "engine.models": {"engine.errors", "engine.specs"},
    "engine.weights": {"engine.errors", "engine.specs", "engine.models", "engine.quant"},
    "engine.text": {"engine.errors", "engine.specs", "engine.models", "engine.weights"},
    "engine.adapters": {"engine.errors", "engine.specs", "engine.weights", "engine.quant"},
    "engine.convert": {"engine.errors", "engine.specs", "engine.weights", "engine.adapters", "engine.quant",
                       "engine.text"},
    "engine.sampling": {"engine.errors", "engine.specs", "engine.conditioning", "engine.models"},
    "engine.memory": {"engine.errors", "engine.specs", "engine.models", "engine.quant"},
}

# `if TYPE_CHECKING` only: nodes are typed against the stand-in, and take the host's own at run time.
MAY_TYPE = {("nodes", "hosts.standalone")}

# package -> units that may import it. What is not listed, nor in the standard library, is imported by nobody.
THIRD_PARTY: dict[str, set[str]] = {
    "torch": {"engine", "hosts", "nodes", "cli", "tiny_flux"},
    "numpy": {"engine", "hosts", "cli", "tiny_flux"},
    "tokenizers": {"engine.text", "tiny_flux"},
    "scipy": {"engine.conditioning", "engine.sampling", "hosts.standalone", "tiny_flux"},
    "gguf": {"engine.quant", "engine.weights", "engine.convert"},
    "triton": {"engine.quant"},
    "safetensors": {"engine.convert", "tiny_flux"},
    "kornia": {"hosts.standalone"},
    "PIL": {"hosts.standalone", "hosts.comfyui", "cli", "tiny_flux"},
    "yaml": {"hosts.standalone"},
    "transformers": {"hosts"},  # optional: depth maps alone, and only when one is asked for
    "tqdm": {"hosts.standalone", "cli"},
    "comfy": {"hosts.comfyui"},
    "comfy_api": {"hosts.comfyui"},
    "comfy_execution": {"hosts.comfyui"},
    "folder_paths": {"hosts.comfyui"},
    "latent_preview": {"hosts.comfyui"},
    "server": {"hosts.comfyui"},
}


class Import(NamedTuple):
    module: str     # the importer, dotted, without the package's own name: "engine.models.flux"
    target: str     # "engine.specs" (own) or "torch" (foreign)
    own: bool
    typing: bool    # under `if TYPE_CHECKING`
    line: int

    def __str__(self) -> str:
        return f"{self.module or '__init__'}:{self.line} imports {self.target}"


def sources() -> dict[str, Path]:
    """Dotted module name -> file, for everything that is part of the package."""
    tops = [ROOT / "__init__.py", *(folder for folder in ROOT.iterdir() if (folder / "__init__.py").is_file())]
    files = [path for top in tops for path in ([top] if top.is_file() else sorted(top.rglob("*.py")))]
    return {dotted(path): path for path in files if "tests" not in path.relative_to(ROOT).parts}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def type_checking_lines(tree: ast.Module) -> set[int]:
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {line for node in tests for child in node.body for line in range(child.lineno, (child.end_lineno or 0) + 1)}


def imports_of(module: str, path: Path, modules: set[str]) -> list[Import]:
    """Every import statement in the file, those inside functions too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = type_checking_lines(tree)
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(module, alias.name, False, node.lineno in typing, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(Import(module, node.module or "", False, node.lineno in typing, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1]
            base = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                target = ".".join([*base, alias.name])
                target = target if target in modules else ".".join(base)
                found.append(Import(module, target, True, node.lineno in typing, node.lineno))
    return found


def unit_of(module: str) -> str:
    candidates = [unit for unit in MAY_IMPORT if unit == "" or module == unit or module.startswith(unit + ".")]
    return max(candidates, key=len)


def allowed(item: Import) -> bool:
    unit = unit_of(item.module)
    if item.own:
        target = unit_of(item.target)
        if target == unit or (item.typing and (unit, target) in MAY_TYPE):
            return True
        whole_engine = "engine" in MAY_IMPORT[unit] and target.startswith("engine.")
        return whole_engine or target in MAY_IMPORT[unit]
    top = item.target.split(".")[0]
    if top in sys.stdlib_module_names:
        return True
    return any(unit == user or unit.startswith(user + ".") for user in THIRD_PARTY.get(top, set()))


SOURCES = sources()
PARSED = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}
TALKS = ("cli", "tiny_flux")


def test_imports_follow_the_arrows() -> None:
    every = [item for module, path in SOURCES.items() for item in imports_of(module, path, set(SOURCES))]
    assert len(every) > 20, "the walk found next to nothing: it looks in the wrong place"
    assert [str(item) for item in every if not allowed(item)] == []


@pytest.mark.parametrize(("module", "code", "verdict"), [
    ("engine.models.flux", "from ..specs import FluxSpec", True),
    ("engine.models.flux", "def f():\n    from ..weights import load", False),
    ("engine.models.flux", "from .. import weights", False),
    ("engine.sampling.sigmas", "from ..models.flux import Flux", True),
    ("engine.errors", "import numpy", True),
    ("engine.models.flux", "import diffusers", False),
    ("engine.models.flux", "import flux_kit.engine", False),
    ("nodes.api", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..hosts.standalone import io", True),
    ("nodes.api", "from ..hosts.standalone import io", False),
    ("nodes.load", "import comfy.sd", False),
    ("hosts.comfyui.host", "import comfy.sd", True),
    ("hosts.standalone.host", "from ...nodes import load", False),
    ("cli.run", "from ..hosts.comfyui import host", False),
])
def test_the_table_judges_known_cases(tmp_path: Path, module: str, code: str, verdict: bool) -> None:
    file = tmp_path / "case.py"
    file.write_text(code)
    names = {*SOURCES, "engine.weights", "hosts.standalone", "hosts.standalone.io", "hosts.comfyui", "nodes"}
    assert all(allowed(item) for item in imports_of(module, file, names)) is verdict


def test_files_and_functions_stay_short() -> None:
    files = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.values()}
    functions = {f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
                 for module, tree in PARSED.items() for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert {name: n for name, n in files.items() if n > MAX_FILE_LINES} == {}
    assert {name: n for name, n in functions.items() if n > MAX_FUNCTION_LINES} == {}


def test_only_the_command_line_prints() -> None:
    prints = [f"{module}:{node.lineno}" for module, tree in PARSED.items() if not module.startswith(TALKS)
              for node in ast.walk(tree)
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert prints == []


def test_nothing_catches_everything() -> None:
    broad = {"Exception", "BaseException"}
    caught = [f"{module}:{node.lineno}" for module, tree in PARSED.items() for node in ast.walk(tree)
              if isinstance(node, ast.ExceptHandler)
              and (node.type is None or any(isinstance(n, ast.Name) and n.id in broad for n in ast.walk(node.type)))]
    assert caught == []


def test_importing_a_module_does_nothing() -> None:
    """No call stands alone at the top level of a module."""
    loose = [f"{module}:{node.lineno}" for module, tree in PARSED.items() for node in tree.body
             if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not module.startswith(TALKS)]
    assert loose == []


def test_models_create_parameters_through_ops_alone() -> None:
    """A host's layers can only take the place of ours if `ops` is the one source of parameters."""
    makers = {"Linear", "Conv1d", "Conv2d", "Embedding", "LayerNorm", "GroupNorm", "RMSNorm", "Parameter", "Buffer",
              "MultiheadAttention", "Bilinear", "BatchNorm2d"}
    registers = {"register_parameter", "register_buffer"}
    found = []
    for module, tree in PARSED.items():
        if not module.startswith("engine.models") or module == "engine.models.ops":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                owner, _, name = ast.unparse(node.func).rpartition(".")
                if name in registers or (name in makers and owner != "ops"):
                    found.append(f"{module}:{node.lineno} {owner}.{name}")
    assert found == []


def test_arrows_name_real_places() -> None:
    """A row of the table for a package that was renamed would allow nothing and forbid nothing."""
    names = ("quant", "conditioning", "adapters", "convert", "memory")
    later = {"hosts.comfyui", *(f"engine.{name}" for name in names)}
    units = {unit for unit in MAY_IMPORT if unit} - later
    assert {unit for unit in units if unit not in SOURCES} == set()
