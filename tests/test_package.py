"""The package as users get it: metadata, wheel, and an installation that works from any folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs", "demo_output")
SHOWN = ("tiny_flux/models", "example_workflows", "web", "locales")
PACKAGE_BYTES = 45_000_000  # of which tiny-flux may be 40 million
PROMPT = "a large red circle on the left on a blue background"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run([str(part) for part in command], cwd=cwd, env={**keep, **environment}, text=True,
                          capture_output=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no `build/` of an earlier build can put deleted files into it."""
    source, out = tmp_path_factory.mktemp("source") / "My-Pack", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=NOT_SOURCE)
    built = run(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--no-index",
                "--quiet", "--wheel-dir", out, cwd=out)
    assert built.returncode == 0, built.stderr
    return next(out.glob("flux_kit-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with `flux-kit[standalone]` installed, not editable; returns its folder of programs.

    Third-party packages are lent by the environment the tests run in: a `.pth` line puts its folder on the path behind
    the fresh one's own, and leaves its `.pth` files (the editable install of this checkout) unread.
    """
    venv = tmp_path_factory.mktemp("venv")
    made = run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    assert made.returncode == 0, made.stderr
    programs = venv / ("Scripts" if os.name == "nt" else "bin")
    python = programs / Path(sys.executable).name
    paths = sysconfig.get_paths(vars={"base": str(venv), "platbase": str(venv)})
    (Path(paths["purelib"]) / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index",
               f"{wheel}[standalone]", cwd=venv)
    assert done.returncode == 0, done.stderr
    return programs


def test_packages_listed_are_the_packages_there() -> None:
    """An editable install imports packages that the list lacks; the wheel would silently be without them."""
    tops = [folder for folder in ROOT.iterdir() if (folder / "__init__.py").is_file() and folder.name != "tests"]
    files = [file for top in tops for file in top.rglob("*.py")]
    there = {".".join(("flux_kit", *file.parent.relative_to(ROOT).parts)) for file in files}
    assert {"flux_kit", *there} == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_requirements_agree_and_never_name_torch() -> None:
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines == PYPROJECT["project"]["dependencies"]
    assert [line.split(">")[0] for line in lines] == ["gguf"]


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "numpy", "gguf", "PIL", "tokenizers")
    code = f"import sys, flux_kit; print([m for m in {heavy} if m in sys.modules])"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_wheel_holds_code_data_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = ("cli", "engine", "hosts", "nodes", "tiny_flux")
    code = {f"flux_kit/{p.relative_to(ROOT).as_posix()}" for folder in folders for p in (ROOT / folder).rglob("*.py")}
    data = {f"flux_kit/{p.relative_to(ROOT).as_posix()}" for folder in SHOWN for p in (ROOT / folder).rglob("*")
            if p.is_file()}
    assert {*code, *data} - names == set()
    assert any(name.endswith(".safetensors") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    stray = ("flux_kit/tests", "flux_kit/benchmarks", "flux_kit/tiny_flux/runs")
    assert [name for name in names if name.startswith(stray) or not name.startswith("flux_kit")] == []


def test_installed_generates_and_runs_elsewhere(installed: Path, tmp_path: Path) -> None:
    version = run(installed / "python", "-c", "import flux_kit, importlib.metadata as m;"
                  "print(flux_kit.__file__); print(m.version('flux-kit'))", cwd=tmp_path)
    where, number = version.stdout.split()
    assert Path(where).is_relative_to(installed.parent) and number == PYPROJECT["project"]["version"]

    done = run(installed / "flux-kit", "generate", PROMPT, "--steps", "2", "-o", "out.png", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] and [Path(image).name for image in answer["images"]] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")

    shutil.copy(ROOT / "example_workflows" / "hello_tiny_flux.json", tmp_path / "hello.json")
    done = run(installed / "flux-kit", "run", "hello.json", "--out", tmp_path / "made", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    images = json.loads(done.stdout)["images"]
    assert images and all((tmp_path / image).read_bytes().startswith(b"\x89PNG") for image in images)


def test_version_is_the_distribution_s() -> None:
    assert importlib.metadata.version("flux-kit") == PYPROJECT["project"]["version"]


def sources() -> list[Path]:
    """Every file of the checkout that is not made by tools."""
    skipped = NOT_SOURCE(str(ROOT), [entry.name for entry in ROOT.iterdir()])
    tops = [entry for entry in ROOT.iterdir() if entry.name not in skipped]
    files = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    return [path for path in files if "__pycache__" not in path.parts]


def test_what_the_registry_s_package_holds() -> None:
    """.comfyignore has the syntax of .gitignore: without a leading slash a name means every folder of that name."""
    pathspec = pytest.importorskip("pathspec", reason="pathspec reads .comfyignore; make setup installs it")
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    files = {path.relative_to(ROOT).as_posix(): path for path in sources()}
    kept = {name: path for name, path in files.items() if not ignored.match_file(name)}
    left_out = ("tests/", "docs/", "benchmarks/", "tiny_flux/runs/", "tiny_flux/train_")
    needed = {name for name in files if name.startswith(SHOWN) or (name.endswith(".py") and
                                                                   not name.startswith(left_out))}
    assert needed - set(kept) == set()
    assert [name for name in kept if name.startswith(left_out)] == []
    assert sum(path.stat().st_size for path in kept.values()) < PACKAGE_BYTES


def test_registry_metadata() -> None:
    """What docs.comfy.org/registry/specifications asks for."""
    project, comfy = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9._-]{0,99}", project["name"]) and "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and project["requires-python"] and project["license"] == "Apache-2.0"
    assert {"Repository", "Documentation", "Issues"} <= set(project["urls"])
    assert all(url.startswith("https://") for url in project["urls"].values())
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert re.fullmatch(r"(?:(?:>=|<)\d+\.\d+\.\d+,?)+", comfy["requires-comfyui"])
    assert (ROOT / comfy["Icon"].split("/HEAD/")[1]).is_file()
    registry = [name for name in project["classifiers"] if name.startswith(("Operating System ::", "Environment ::"))]
    assert "Operating System :: OS Independent" in registry
    known = {f"GPU :: {name}" for name in ("NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal")}
    assert {name.removeprefix("Environment :: ") for name in registry if name.startswith("Env")} <= known


FOREIGN = {  # what comfy-test does not allow anywhere in a pack, and what to use instead
    r"\.cuda\s*\(|\.to\s*\(\s*(?:torch\.device\s*\(\s*)?[\"']cuda": "the host's device",
    r"torch\.(?:cuda\.)?(?:amp\.)?autocast\s*\(": "an explicit dtype",
    r"(?<![\w.])(?:torch\.)?nn\.(?:Linear|Conv[123]d|ConvTranspose[12]d|LayerNorm|GroupNorm|Embedding)\s*\(": "ops",
}


def test_sources_suit_the_linters_of_comfyui() -> None:
    for path in (path for path in sources() if path.suffix == ".py"):
        text = path.read_text(encoding="utf-8")
        assert text.encode("cp1252", "replace").decode("cp1252") == text, \
            f"{path}: write characters outside cp1252 as \\u escapes; tools on Windows read sources so"
        for pattern, instead in FOREIGN.items():
            lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
            found = [line for line in lines if re.search(pattern, line)]
            assert not found, f"{path}: {found[0].strip()!r}; use {instead}"


def test_ids_of_the_pack_agree() -> None:
    """Translations name the pack by its folder, which installers make from the project's name."""
    texts = json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))
    name = PYPROJECT["project"]["name"]
    assert texts["templateWorkflows"]["category"] == {name: PYPROJECT["tool"]["comfy"]["DisplayName"]}


def test_scripts_keep_out_of_the_shared_page() -> None:
    """ComfyUI's page belongs to all packs: no listeners on the document, nothing put into it, names of our own."""
    for path in (path for path in sources() if path.suffix == ".js"):
        text = path.read_text(encoding="utf-8")
        shared = re.search(r"document\.(?:(?:body|head|documentElement)\.)?(?:append|prepend|insert|addEventListener)|"
                           r"adoptedStyleSheets|innerHTML|document\.cookie", text)
        assert shared is None, f"{path}: {shared[0]}"
        assert all(name.startswith("fluxkit.") for name in re.findall(r'registerExtension\(\{\s*name: "([^"]*)"', text))
