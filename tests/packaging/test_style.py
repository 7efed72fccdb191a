"""Files stay short: one subject each."""

from __future__ import annotations

from pathlib import Path

LIMITS = (("vlmprune/core", 200), ("vlmprune/policies", 250), ("", 300))
FOLDERS = ("vlmprune", "kernels", "adapters", "evaluation", "demos")


def test_files_are_short(repo_root: Path) -> None:
    too_long = []
    for folder in FOLDERS:
        for path in (repo_root / folder).rglob("*.py"):
            relative = path.relative_to(repo_root).as_posix()
            limit = next(lines for prefix, lines in LIMITS if relative.startswith(prefix))
            lines = len(path.read_text().splitlines())
            if lines > limit:
                too_long.append(f"{relative}: {lines} lines, at most {limit}")
    assert not too_long, "\n".join(too_long)
