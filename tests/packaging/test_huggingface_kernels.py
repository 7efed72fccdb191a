"""The checkout never hides Hugging Face's package `kernels`, which transformers imports by that name."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Stands for the real package: transformers imports many names from it, and each is this class here.
STUB = """
class Meta(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls()

class Anything(metaclass=Meta):
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else None
    def __or__(self, other): return self

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything
"""

REPORT = """
import json, sys
import transformers
from transformers import LlavaForConditionalGeneration
from transformers.utils import is_kernels_available
used = "kernels" in sys.modules
try:
    import kernels
    file = getattr(kernels, "__file__", None)
except ModuleNotFoundError:
    file = None
import vlmprune.kernels
print(json.dumps({"class": LlavaForConditionalGeneration.__name__, "available": bool(is_kernels_available()),
    "used": used, "file": file, "ours": list(vlmprune.kernels.__path__)}))
"""


def report_from_root(repo_root: Path, *first: Path) -> dict[str, Any]:
    """Import transformers in a new process whose current folder is the checkout's root."""
    path = os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, "-c", REPORT],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def accepted_version() -> str:
    """A version of kernels that the installed transformers accepts (the oldest supported one takes any)."""
    file = importlib.metadata.distribution("transformers").locate_file("transformers/utils/import_utils.py")
    found = re.search(r'^KERNELS_MIN_VERSION = "([^"]+)"', Path(str(file)).read_text(), re.MULTILINE)
    return found[1] if found else "0.9.0"


def has_kernels() -> bool:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(has_kernels(), reason="Hugging Face's kernels is installed in this environment")
def test_without_huggingface_kernels(repo_root: Path) -> None:
    report = report_from_root(repo_root)
    assert report["class"] == "LlavaForConditionalGeneration"
    assert report["file"] is None
    assert not report["available"]
    assert report["ours"] == [str(repo_root / "kernels")]


def test_with_huggingface_kernels(repo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STUB)
    version = accepted_version()
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    report = report_from_root(repo_root, tmp_path)
    assert report["class"] == "LlavaForConditionalGeneration"
    assert report["file"] == str(tmp_path / "kernels" / "__init__.py")
    assert report["available"] and report["used"]
    assert report["ours"] == [str(repo_root / "kernels")]
