"""The wheel, an editable install and a checkout that is not installed all import every part.

Each way is built from a copy of the sources, without network and without pip, and imported in a new process
whose current folder is elsewhere (the checkout: its root). Importing transformers takes most of the time, so
only the wheel's modules are all executed; the other ways find all of them, and execute the kernels.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

FOLDERS = ("vlmprune", "kernels", "adapters", "evaluation", "demos")
TOP_FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
OPTIONAL = {"gradio", "lmms_eval"}  # slow to import and not always installed

BUILD = """
import json, sys
from setuptools import build_meta
kind, folder, mode = sys.argv[1:]
settings = {"editable_mode": mode} if mode else None
print(json.dumps(getattr(build_meta, f"build_{kind}")(folder, settings)))
"""

IMPORT = """
import importlib, importlib.util, json, site, sys
modules, light, extra = json.loads(sys.argv[1])
if extra:
    # The environment may hold an editable install of its own, whose finder would answer first.
    own = [name for name in sys.modules if name.startswith("__editable___vlmprune")]
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", None) not in own]
    for name in own:
        del sys.modules[name]
    sys.path.insert(0, extra)
    site.addsitedir(extra)
found = {name: importlib.util.find_spec(name) for name in modules}
for name in light:
    importlib.import_module(name)
import vlmprune
print(json.dumps({name: spec.origin if spec else None for name, spec in found.items()}))
"""


def run(code: str, *args: str, cwd: Path, path: str = "") -> Any:
    path = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkout(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no build leaves anything in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for folder in FOLDERS:
        shutil.copytree(repo_root / folder, copy / folder, ignore=ignore)
    for name in TOP_FILES:
        shutil.copy(repo_root / name, copy / name)
    return copy


def package_files(root: Path) -> dict[str, Path]:
    """Path inside the wheel -> path below `root`, for every file of the five folders."""
    files = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            relative = path.relative_to(root)
            if path.is_file() and "__pycache__" not in relative.parts:
                files[str(relative if folder == "vlmprune" else "vlmprune" / relative)] = relative
    return files


def modules_of(root: Path) -> tuple[list[str], list[str]]:
    """All modules, and those that need no optional library to be imported."""
    modules, light = [], []
    for target, path in package_files(root).items():
        if not target.endswith(".py") or path.stem == "__main__":
            continue
        name = target.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        modules.append(name)
        if not top_level_imports((root / path).read_text()) & OPTIONAL:
            light.append(name)
    return modules, light


def top_level_imports(source: str) -> set[str]:
    nodes = ast.parse(source).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def check_imports(checkout: Path, origin: Path, cwd: Path, path: str = "", extra: str = "", load: bool = False) -> None:
    """Every module is found below `origin`; the folders (with `load`: all modules) can be imported."""
    modules, light = modules_of(checkout)
    for folder in FOLDERS[1:]:
        assert any(name.startswith(f"vlmprune.{folder}.") for name in light), f"{folder}/ has no module"
    if not load:
        kernels = [name for name in light if name.startswith("vlmprune.kernels.")]
        light = [*kernels, *(f"vlmprune.{folder}" for folder in FOLDERS[1:])]
    origins = run(IMPORT, json.dumps([modules, light, extra]), cwd=cwd, path=path)
    strays = {name: file for name, file in origins.items() if not file or not file.startswith(str(origin))}
    assert not strays


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return folder / run(BUILD, "wheel", str(folder), "", cwd=checkout)


def test_wheel_holds_every_file_and_nothing_else(checkout: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    expected = set(package_files(checkout))
    content = {name for name in names if ".dist-info/" not in name}
    assert content == expected, (sorted(expected - content), sorted(content - expected))
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel: Path) -> None:
    import vlmprune

    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(info).decode())
        entry_points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
        names = set(archive.namelist())
    assert (metadata["Name"], metadata["Version"]) == ("vlmprune", vlmprune.__version__)
    for line in ("vlmprune = vlmprune.cli:main", "vlmprune = vlmprune.evaluation.lmms_plugin:manifests"):
        assert line in entry_points
        module = line.split(" = ")[1].partition(":")[0].replace(".", "/")
        assert names & {f"{module}.py", f"{module}/__init__.py"}, module


def test_wheel_imports(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    check_imports(checkout, origin=target, cwd=elsewhere, path=str(target), load=True)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_install_imports(checkout: Path, tmp_path: Path, mode: str) -> None:
    """The editable wheel is unpacked as pip does; its .pth file then points at the sources."""
    folder, site = tmp_path / "wheel", tmp_path / "site"
    folder.mkdir()
    name = run(BUILD, "editable", str(folder), mode, cwd=checkout)
    with zipfile.ZipFile(folder / name) as archive:
        archive.extractall(site)
    check_imports(checkout, origin=checkout, cwd=tmp_path, extra=str(site))


def test_checkout_imports_without_install(checkout: Path) -> None:
    check_imports(checkout, origin=checkout, cwd=checkout)
