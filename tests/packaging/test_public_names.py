"""`import vlmprune` is quick and light, and its public names are the ones that it promises."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vlmprune

MEASURE = """
import json, sys, time
start = time.perf_counter()
import vlmprune
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_import_is_quick_and_loads_no_library(repo_root: Path) -> None:
    best = float("inf")
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", MEASURE], cwd=repo_root, capture_output=True, text=True, check=True)
        seconds, modules = json.loads(run.stdout)
        assert not {"torch", "numpy", "transformers", "timm"} & set(modules)
        best = min(best, seconds)
    assert best < 0.3


def test_all_public_names_resolve() -> None:
    missing = [name for name in vlmprune.__all__ if getattr(vlmprune, name, None) is None]
    assert not missing
    assert set(vlmprune.__all__) <= set(dir(vlmprune))


def test_tables_of_names_agree(repo_root: Path) -> None:
    tree = ast.parse((repo_root / "vlmprune" / "__init__.py").read_text())
    typed = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            imports = [item for item in node.body if isinstance(item, ast.ImportFrom)]
            typed = {alias.name: item.module for item in imports for alias in item.names}
    assert typed == vlmprune._PUBLIC
    assert set(vlmprune.__all__) == {*typed, "__version__"}


def test_policy_classes_are_public_names() -> None:
    from vlmprune.core.policy import Policy

    assert issubclass(vlmprune.HiPrune, Policy)
    assert vlmprune.HiPrune is sys.modules[vlmprune.HiPrune.__module__].HiPrune


@pytest.mark.parametrize("name", ["no_such_name", "NoSuchPolicy"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(vlmprune, name)


def test_the_version_has_one_source(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "vlmprune._version.__version__"}
    assert f'__version__ = "{vlmprune.__version__}"' in (repo_root / "vlmprune" / "_version.py").read_text()


def test_constraints_are_plain_pins(repo_root: Path) -> None:
    lines = (repo_root / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator and name and version and not set("/:@ ") & set(line), line
