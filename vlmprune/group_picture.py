"""Pictures of what a policy merged: every group of patches in its mean colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlmprune.core.errors import InputError
from vlmprune.plot import MIN_CELL, WHITE, enlarged, panels, side_by_side

if TYPE_CHECKING:
    from vlmprune.core.report import Report


def plot_groups(
    image: Image.Image,
    report: Report | None,
    sample: int = 0,
    image_index: int = 0,
    line: tuple[int, int, int] | None = WHITE,
    processor: Any = None,
) -> Image.Image:
    """Draw which patches of an image were merged: those of a group share their mean colour, as the model shares their
    feature; dropped ones are black.

    Args:
        image: the picture that was given to the processor.
        report: ``handle.last``.
        sample: row of the batch. image_index: 0-based image of that sample.
        line: colour of the lines between groups, None for none.
        processor: as for :func:`vlmprune.plot_selection`.

    Returns:
        An RGB picture, enlarged by a whole number so that single patches can be seen. An any-resolution image is drawn
        twice, as thumbnail and as the canvas of its tiles.

    Raises:
        InputError: no forward yet, or no such sample or image.
        UnsupportedError: the image was cut into views whose places in it are not known.
    """
    drawn = []
    for shown, grid, cells in panels(image, report, sample, image_index, processor):
        assert report is not None
        groups = [[cells[token] for token in group if token in cells] for group in report.groups(sample, image_index)]
        drawn.append(draw_groups(shown, grid, groups, line))
    return side_by_side(drawn)


def draw_groups(
    image: Image.Image,
    grid: tuple[int, int],
    groups: Sequence[Sequence[int]],
    line: tuple[int, int, int] | None = WHITE,
    min_cell: int = MIN_CELL,
) -> Image.Image:
    """Fill groups of tokens of a view with their mean colour.

    Args:
        image: the view as the encoder saw it.
        grid: rows and columns of tokens; token ``i`` lies in row ``i // columns``.
        groups: the tokens of each, no token in two of them; all others are drawn black.
        line: colour of the lines between groups, None for none.
        min_cell: the picture is enlarged by a whole number until every side of a token has this many pixels.

    Raises:
        InputError: a token outside the grid, or a grid finer than the pixels.
    """
    height, width = grid
    if not (1 <= height <= image.height and 1 <= width <= image.width):
        raise InputError(f"A grid of {height} x {width} tokens does not fit {image.height} x {image.width} pixels.")
    labels = np.full(height * width, -1)
    for number, group in enumerate(groups):
        for token in group:
            if not 0 <= token < height * width:
                raise InputError(f"Token {token} lies outside the grid of {height * width} tokens.")
            labels[token] = number
    pixels, owner, cell = enlarged(image, grid, labels, min_cell)
    flat = owner.ravel() + 1  # 0 for what was dropped
    counts = np.bincount(flat, minlength=len(groups) + 1).clip(min=1)
    means = np.stack([np.bincount(flat, pixels[..., c].ravel(), len(groups) + 1) / counts for c in range(3)], 1)
    means[0] = 0
    filled = means[flat].reshape(pixels.shape)
    if line is not None:
        filled[_between(owner, max(1, cell // 16))] = line
    return Image.fromarray(np.round(filled).astype(np.uint8))


def _between(owner: np.ndarray, width: int) -> np.ndarray:
    """``[H, W]`` bool: the last ``width`` pixels before another label, to the right or below."""
    found = np.zeros_like(owner, dtype=bool)
    for step in range(1, width + 1):
        found[:, :-step] |= owner[:, :-step] != owner[:, step:]
        found[:-step] |= owner[:-step] != owner[step:]
    return found
