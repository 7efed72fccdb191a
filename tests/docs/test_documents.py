"""README and docs say what the code does and what was measured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import vlmprune

ROOT = Path(__file__).parents[2]


def test_generated_tables_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_names_every_policy_and_shows_the_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in vlmprune.available():
        assert f"| `{name}` |" in text
    assert "](docs/overlay.png)" in text and (ROOT / "docs" / "overlay.png").is_file()


def test_links_point_to_files() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which does not exist"
