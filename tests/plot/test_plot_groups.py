"""The patch merging picture: mean colours of groups, lines between them, black where patches were dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from plotted import noise, report_of
from torch import nn

import vlmprune
from vlmprune.core.errors import InputError
from vlmprune.core.selection import Selection
from vlmprune.core.views import View
from vlmprune.group_picture import draw_groups, plot_groups


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_groups_have_their_mean_colour() -> None:
    image = noise(96, 96)
    groups = [[0, 5, 15], [1], [2, 3]]
    drawn = pixels(draw_groups(image, (4, 4), groups, line=None))
    given = pixels(image).reshape(4, 24, 4, 24, 3).swapaxes(1, 2).reshape(16, 24 * 24, 3)
    cells = drawn.reshape(4, 24, 4, 24, 3).swapaxes(1, 2).reshape(16, 24 * 24, 3)
    for group in groups:
        mean = np.round(given[group].reshape(-1, 3).mean(0))
        assert all((cells[token] == mean).all() for token in group)
    for token in set(range(16)) - {0, 5, 15, 1, 2, 3}:
        assert (cells[token] == 0).all()


def test_lines_stand_between_groups_only() -> None:
    """A line is as wide as a 16th of a cell, before the change; there is none inside a group or around the picture."""
    image, red = Image.new("RGB", (64, 64), (10, 20, 30)), (255, 0, 0)
    drawn = pixels(draw_groups(image, (2, 2), [[0, 1], [2], [3]], line=red))
    line = (drawn == red).all(2)
    wanted = np.zeros((64, 64), dtype=bool)
    wanted[30:32] = True
    wanted[32:, 30:32] = True
    assert (line == wanted).all()
    assert (drawn[~wanted] == (10, 20, 30)).all()


def test_small_pictures_are_enlarged() -> None:
    drawn = draw_groups(noise(8, 12), (6, 4), [[0]], min_cell=10)
    assert drawn.size == (40, 60)


def test_from_a_report() -> None:
    group = torch.tensor([[0, 0, 1, 1] * 4, [0] * 8 + [1] * 7 + [-1]])
    report, image = report_of(Selection.merge(group, 2), (0, 1)), noise(96, 96)
    wanted = draw_groups(image, (4, 4), [[i for i in range(16) if group[1, i] == g] for g in (0, 1)])
    assert np.array_equal(pixels(plot_groups(image, report, sample=1)), pixels(wanted))
    assert np.array_equal(pixels(vlmprune.plot_groups(image, report, 1)), pixels(wanted))


def test_a_wide_picture_is_drawn_whole_where_the_grid_is_as_wide() -> None:
    report = report_of(Selection.merge(torch.zeros(1, 8, dtype=torch.long), 1), (0,), View(2, 4))
    assert plot_groups(noise(192, 96), report).size == (192, 96)
    assert plot_groups(noise(192, 97), report).size == (97, 97)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no report"):
        plot_groups(noise(32, 32), None)
    with pytest.raises(InputError, match="Token 16 lies outside"):
        draw_groups(noise(32, 32), (4, 4), [[16]])
    with pytest.raises(InputError, match="does not fit"):
        draw_groups(noise(32, 32), (33, 4), [])


@torch.no_grad()
def test_of_a_vision_transformer() -> None:
    """Left half and right half of a picture: patches merge within a half, so the picture stays as it is."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2, pos_embed="none"
    ).eval()
    image = Image.new("RGB", (32, 32), (200, 30, 30))
    image.paste((30, 30, 200), (16, 0, 32, 32))
    pixels_in = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255
    with vlmprune.applied(model, "tome", r=6) as handle:
        model(pixels_in)
        assert handle.last.kept_tokens == (10,)
        drawn = vlmprune.plot_groups(image, handle.last, line=None)
        shown = pixels(drawn.resize((32, 32), Image.Resampling.NEAREST))
        assert np.abs(shown - pixels(image)).max() <= 2  # enlarging mixes a little over the edge
        assert vlmprune.plot_selection(image, handle.last).size == drawn.size
