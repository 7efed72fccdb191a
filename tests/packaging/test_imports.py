"""Which module may import which, read from the source, imports inside functions included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDERS = {
    "vlmprune": "vlmprune",
    "kernels": "vlmprune.kernels",
    "adapters": "vlmprune.adapters",
    "evaluation": "vlmprune.evaluation",
    "demos": "vlmprune.demos",
}
MAPPED = ("kernels", "adapters", "evaluation", "demos")

# A module imports from its own layer and from layers above it in this table.
LAYERS = (
    ("vlmprune._version",),
    ("vlmprune.kernels",),
    ("vlmprune.core",),
    ("vlmprune.policies",),
    ("vlmprune.adapters",),
    (
        "vlmprune.api",
        "vlmprune.calibration",
        "vlmprune.embedded",
        "vlmprune.group_picture",
        "vlmprune.loading",
        "vlmprune.measurement",
        "vlmprune.plot",
        "vlmprune.provenance",
    ),
    ("vlmprune.evaluation",),
    ("vlmprune.demos",),
    ("vlmprune.cli",),
)
MODEL_LIBRARIES = {"gradio", "lmms_eval", "open_clip", "timm", "torchvision", "transformers"}
NO_MODEL_LIBRARY = ("vlmprune.kernels", "vlmprune.core", "vlmprune.policies")
ROOT = Path(__file__).resolve().parents[2]


def public_names() -> dict[str, str]:
    """The table of lazy names in vlmprune/__init__.py: name -> module."""
    tree = ast.parse((ROOT / "vlmprune" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC":
            return ast.literal_eval(node.value)
    raise AssertionError("vlmprune/__init__.py has no table _PUBLIC")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if any(within(module, name) for name in names):
            return number
    raise AssertionError(f"{module} stands in no layer: add it to LAYERS in {Path(__file__).name}")


def imported(module: str, is_package: bool, source: str) -> Iterator[str]:
    """Absolute names of all modules that `source` imports; `from a import b` counts as `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What in `source` breaks the import order, one sentence each."""
    found, names = [], public_names()
    for target in imported(module, is_package, source):
        root, _, rest = target.partition(".")
        if root in MAPPED:
            found.append(f"{module} imports the bare name {root}; write vlmprune.{root}")
        if root in MODEL_LIBRARIES and any(within(module, package) for package in NO_MODEL_LIBRARY):
            found.append(f"{module} imports {root}")
        if root != "vlmprune" or not any(within(module, name) for names in LAYERS for name in names):
            continue
        first = rest.partition(".")[0]
        if first in ("", "__version__"):  # the package alone: says nothing about which name is used
            if not rest and layer(module) < layer("vlmprune.evaluation"):
                found.append(f"{module} imports vlmprune itself; name the module")
            continue
        if first[:1].isupper() or first in names:  # resolved by vlmprune/__init__.py
            target = names.get(first, "vlmprune.policies")
        if layer(target) > layer(module):
            found.append(f"{module} imports {target}, which stands to the right of it")
        if within(module, "vlmprune.kernels") and not within(target, "vlmprune.kernels"):
            found.append(f"{module} imports {target}; kernels import nothing of ours")
        if within(module, "vlmprune.adapters") and within(target, "vlmprune.policies"):
            found.append(f"{module} imports {target}; adapters know no particular policy")
    return found


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join([FOLDERS[folder], *parts])


def test_import_order() -> None:
    found, files = [], sources()
    for path in files:
        if path != ROOT / "vlmprune" / "__init__.py":  # resolves names of every layer, on demand
            found += violations(module_name(path), path.read_text(), path.name == "__init__.py")
    assert not found, "\n".join(found)
    assert {path.relative_to(ROOT).parts[0] for path in files} == set(FOLDERS)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vlmprune.kernels.a", "from vlmprune.core import budget"),
        ("vlmprune.kernels.a", "from vlmprune import __version__, _version"),
        ("vlmprune.core.a", "def f():\n    import vlmprune.policies.hiprune"),
        ("vlmprune.core.a", "from vlmprune import apply"),
        ("vlmprune.core.a", "from vlmprune import HiPrune"),
        ("vlmprune.core.a", "import importlib\nimportlib.import_module('vlmprune.policies')"),
        ("vlmprune.core.a", "from ..adapters import llava"),
        ("vlmprune.core.a", "import vlmprune"),
        ("vlmprune.policies.a", "def f():\n    from transformers import LlamaModel"),
        ("vlmprune.adapters.a", "from vlmprune.policies.hiprune import HiPrune"),
        ("vlmprune.embedded.a", "from vlmprune.evaluation.tasks import scenes"),
        ("vlmprune.evaluation.a", "from kernels import kcenter"),
        ("vlmprune.evaluation.a", "from vlmprune import demos"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vlmprune.kernels.a", "import torch\nfrom vlmprune.kernels.b import c"),
        ("vlmprune.policies.a", "from vlmprune.core.budget import Budget\nfrom .base import x"),
        ("vlmprune.adapters.a", "from transformers import LlamaModel\nfrom vlmprune.core import policy"),
        ("vlmprune.plot", "from vlmprune.api import Handle"),
        ("vlmprune.cli", "import vlmprune\nfrom vlmprune import apply, HiPrune, demos"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert not violations(module, source)


def test_a_module_outside_the_table_is_found() -> None:
    with pytest.raises(AssertionError, match="no layer"):
        violations("vlmprune.core.a", "import vlmprune.unheard_of")


def test_no_file_uses_a_bare_folder_name() -> None:
    files = [*sources(), *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.py")]
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported("", False, path.read_text())
        if name.partition(".")[0] in MAPPED
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_are_no_packages_of_their_own(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_folders_do_not_shadow_the_standard_library() -> None:
    assert not {path.stem for path in ROOT.iterdir()} & set(sys.stdlib_module_names)
