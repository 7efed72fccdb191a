"""Package list for setuptools; all other metadata stands in pyproject.toml.

Four top-level folders are sub-packages of `vlmprune`. Each of them, and each folder below them and below
`vlmprune/` that holds Python files, is a package, with or without an `__init__.py`.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
FOLDERS = {
    "vlmprune": "vlmprune",
    "vlmprune.kernels": "kernels",
    "vlmprune.adapters": "adapters",
    "vlmprune.evaluation": "evaluation",
    "vlmprune.demos": "demos",
}


def packages() -> list[str]:
    """Import names of all packages."""
    found = set()
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            found.add(".".join((package, *file.parent.relative_to(ROOT / folder).parts)))
    return sorted(found)


setup(packages=packages(), package_dir=FOLDERS)
