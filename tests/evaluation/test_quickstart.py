from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmprune.evaluation.quickstart import overview, quickstart
from vlmprune.evaluation.schema import read_results, read_samples


@pytest.mark.slow
def test_the_main_job(tmp_path: Path) -> None:
    shown: list[str] = []
    done = quickstart(tmp_path / "demo", limit=8, images=2, measure_time=False, progress=False, show=shown.append)
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"report.md", "results.json", "samples.jsonl", "overlay-1.png", "overlay-2.png"}
    cells = {(row.policy, row.keep) for row in read_results(tmp_path / "demo").rows}
    assert cells == {("dense", 1.0)} | {
        (policy, keep) for policy in ("hiprune", "todre", "random") for keep in (0.22, 0.11)
    }
    assert len(read_samples(tmp_path / "demo")) == 8 * len(cells)
    report = (tmp_path / "demo" / "report.md").read_text()
    assert report == done.report
    assert all(part.strip() in report for part in shown[1:-1])
    answers = [line for line in report.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(answers) == 8 and all(line.count("|") == 11 for line in answers)
    with Image.open(tmp_path / "demo" / "overlay-1.png") as picture:
        assert picture.width > 1000 and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 1000


def test_overview_puts_the_image_first_in_every_row() -> None:
    colours: list[Any] = ["red", "green", "blue", "yellow"]
    panels = [(colour, Image.new("RGB", (30, 20), colour)) for colour in colours]
    sheet = overview(panels, columns=3, side=50)
    assert sheet.size == (8 + 3 * 58, 8 + 2 * 76)
    centres = [[sheet.getpixel((33 + 58 * x, 51 + 76 * y)) for x in range(3)] for y in range(2)]
    red, green, blue, yellow, white = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255)
    assert centres == [[red, green, blue], [red, yellow, white]]
