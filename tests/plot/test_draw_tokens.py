"""Drawing a set of tokens over a view: which pixels change, and how."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlmprune.core.errors import InputError
from vlmprune.plot import draw_tokens, group_colours


def noise(width: int = 96, height: int = 48, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 250, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cell(picture: Image.Image, index: int, grid: tuple[int, int], inset: int = 0) -> np.ndarray:
    """Pixels of one token, found from the grid alone."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    y, x = index // grid[1] * height, index % grid[1] * width
    return pixels[y + inset : y + height - inset, x + inset : x + width - inset]


def test_dropped_tokens_are_dimmed_and_kept_ones_stay() -> None:
    image, grid = noise(), (2, 4)
    drawn = draw_tokens(image, grid, kept=[1, 6])
    assert drawn.size == image.size
    for token in range(8):
        inset = 1 if token in (1, 6) else 0
        before = cell(image, token, grid, inset).astype(float)
        wanted = before if token in (1, 6) else np.round(0.25 * before)
        np.testing.assert_array_equal(cell(drawn, token, grid, inset), wanted)


def test_kept_tokens_have_a_thin_white_outline() -> None:
    drawn = cell(draw_tokens(noise(), (2, 4), kept=[1, 2]), 1, (2, 4))
    edge = np.ones(drawn.shape[:2], dtype=bool)
    edge[1:-1, 1:-1] = False
    assert (drawn[edge] == 255).all()
    assert (drawn[~edge] < 255).all()  # the noise has no 255


def test_nothing_and_everything_kept() -> None:
    image = noise()
    none, every = draw_tokens(image, (2, 4), []), draw_tokens(image, (2, 4), range(8))
    np.testing.assert_array_equal(np.asarray(none), np.round(np.asarray(image) * 0.25))
    inside = cell(every, 5, (2, 4), 1)
    np.testing.assert_array_equal(inside, cell(image, 5, (2, 4), 1))


def test_dim_sets_the_brightness() -> None:
    image = noise()
    np.testing.assert_array_equal(np.asarray(draw_tokens(image, (2, 4), [], dim=1)), np.asarray(image))
    assert not np.asarray(draw_tokens(image, (2, 4), [], dim=0)).any()


def test_small_views_are_enlarged_by_a_whole_number() -> None:
    drawn = draw_tokens(noise(28, 28), (14, 14), [0], min_cell=24)
    assert drawn.size == (28 * 12, 28 * 12)
    assert draw_tokens(noise(28, 28), (14, 14), [0], min_cell=1).size == (28, 28)


def test_every_pixel_belongs_to_the_right_token_where_the_grid_does_not_divide_the_view() -> None:
    image = Image.new("RGB", (100, 70), (200, 200, 200))
    grid = (3, 7)
    drawn = np.asarray(draw_tokens(image, grid, kept=[8], min_cell=1))
    lit = np.argwhere((drawn > 100).all(-1))
    rows, columns = lit[:, 0] * grid[0] // 70, lit[:, 1] * grid[1] // 100
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(1, 1)}
    assert len(lit) == sum(y * 3 // 70 == 1 for y in range(70)) * sum(x * 7 // 100 == 1 for x in range(100))


def test_a_group_has_one_outline_in_its_own_colour() -> None:
    image, grid = noise(), (2, 4)
    groups = [[0, 1, 4], [3, 7], [6]]
    drawn = draw_tokens(image, grid, kept=[0, 1, 3, 4, 6, 7], groups=groups)
    first, second = group_colours(2)
    left, right = cell(drawn, 0, grid), cell(drawn, 1, grid)
    assert (left[:, 0] == first).all() and (left[0] == first).all()
    # No line between two members of a group; one between member and stranger.
    np.testing.assert_array_equal(left[1:-1, -1], cell(image, 0, grid)[1:-1, -1])
    assert (right[1:, -1] == first).all() and (right[-1] == first).all()
    assert (cell(drawn, 3, grid)[0] == second).all() and (cell(drawn, 7, grid)[-1] == second).all()
    assert (cell(drawn, 6, grid)[0] == 255).all()  # a group of one is an ordinary token
    dropped = np.round(cell(image, 2, grid).astype(float) * 0.25)
    np.testing.assert_array_equal(cell(drawn, 2, grid), dropped)


def test_group_colours_are_distinct() -> None:
    colours = group_colours(120)
    assert len(set(colours)) == 120
    assert (255, 255, 255) not in colours


def test_scores_colour_the_outlines_from_dark_to_bright() -> None:
    scores = [0.0, 5.0, 1.0, 3.0, 9.0, 9.0, 9.0, 9.0]
    drawn = draw_tokens(noise(), (2, 4), kept=[0, 1, 2, 3], scores=scores)
    shade = [cell(drawn, token, (2, 4))[0].astype(int) @ [299, 587, 114] // 1000 for token in range(4)]
    assert all(len(set(row.tolist())) == 1 for row in shade)
    lightness = [int(row[0]) for row in shade]
    assert lightness[0] < lightness[2] < lightness[3] < lightness[1]


def test_equal_and_infinite_scores_can_be_drawn() -> None:
    equal = draw_tokens(noise(), (2, 4), [0, 1], scores=[1.0] * 8)
    assert (cell(equal, 0, (2, 4))[0] == cell(equal, 1, (2, 4))[0]).all()
    low, middle, high = [
        cell(draw_tokens(noise(), (2, 4), [0, 1, 2], scores=s), i, (2, 4))[0, 0]
        for i, s in enumerate(
            [
                [float("-inf"), 2.0, 3.0] + [0.0] * 5,
                [0.0, 1.0, 2.0] + [0.0] * 5,
                [0.0, 1.0, float("inf")] + [0.0] * 5,
            ]
        )
    ]
    assert low.sum() < middle.sum() < high.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kept": [8]}, "Token 8 lies outside"),
        ({"kept": [-1]}, "Token -1 lies outside"),
        ({"kept": [], "groups": [[0, 9]]}, "Token 9"),
        ({"kept": [], "dim": 1.5}, "dim=1.5"),
        ({"kept": [], "dim": float("nan")}, "dim=nan"),
        ({"kept": [], "scores": [0.1]}, "1 scores for 8 tokens"),
        ({"kept": [], "grid": (0, 4)}, "does not fit"),
        ({"kept": [], "grid": (49, 4)}, "does not fit"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_tokens(noise(), **{"grid": (2, 4), **arguments})
