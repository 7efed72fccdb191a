"""Pictures of images of any resolution: what is bright is what was kept, view by view."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from family_prompts import make_family_prompt, prefill
from fixed_policy import FixedKeep
from PIL import Image

import vlmprune
from vlmprune.core.errors import UnsupportedError
from vlmprune.core.report import Report
from vlmprune.embedded.random_models import random_vlm

GREY = Image.new("RGB", (240, 240), (200, 200, 200))


def report_of(family: str, kept: tuple[int, ...]) -> Report:
    model, prompt = random_vlm(family), make_family_prompt(family)
    with vlmprune.applied(model, FixedKeep(kept=(kept,))) as handle:
        prefill(model, prompt)
        return handle.last


def bright(picture: Image.Image, grid: tuple[int, int], left: int, width: int) -> list[bool]:
    """Whether the middle of each cell is bright."""
    pixels = np.asarray(picture)[:, left : left + width, 0]
    rows, columns = grid
    return [
        bool(pixels[int((r + 0.5) * pixels.shape[0] / rows), int((c + 0.5) * width / columns)] > 100)
        for r in range(rows)
        for c in range(columns)
    ]


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_thumbnail_and_canvas_stand_side_by_side(family: str) -> None:
    model = random_vlm(family)
    prompt = make_family_prompt(family)
    with vlmprune.applied(model, "random", keep=1.0) as handle:
        prefill(model, prompt)
        [image] = handle.last.images
    thumbnail, newlines = image.views[0], image.newlines
    rows, columns = len(newlines), newlines[0].place - newlines[0].start
    kept = (0, 3, newlines[0].start + 1, newlines[-1].start)
    picture = vlmprune.plot_selection(GREY, report_of(family, kept))
    width = (picture.width - 8) // 2
    first = bright(picture, (thumbnail.height, thumbnail.width), 0, width)
    assert [i for i, on in enumerate(first) if on] == [0, 3]
    second = bright(picture, (rows, columns), width + 8, width)
    assert [i for i, on in enumerate(second) if on] == [1, (rows - 1) * columns]


def test_tiles_that_are_not_put_together_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not put together.*draw_tokens"):
        vlmprune.plot_selection(GREY, report_of("internvl", (0, 1)))


def test_a_processor_that_only_resizes_keeps_the_whole_image() -> None:
    report = report_of("qwen2_5_vl", (1,))
    [view] = report.images[0].views
    processor = SimpleNamespace(image_processor=SimpleNamespace(merge_size=2))
    wide = Image.new("RGB", (300, 120), (200, 200, 200))
    picture = vlmprune.plot_selection(wide, report, processor=processor)
    assert picture.width / picture.height == pytest.approx(2.5, abs=0.05)
    on = bright(picture, (view.height, view.width), 0, picture.width)
    assert [i for i, cell in enumerate(on) if cell] == [1]
