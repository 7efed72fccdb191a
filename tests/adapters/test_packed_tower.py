"""Order and segments of packed towers, against transformers' own window index and an explicit matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmprune.adapters.packed_tower import PackedTower, SegmentedAttention, tower_order, windows
from vlmprune.embedded.random_models import random_vlm

GRIDS = [[(1, 4, 6)], [(1, 8, 4), (1, 6, 10)], [(2, 6, 6), (1, 2, 2)], [(3, 10, 4)]]


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_window_order_is_the_models(grids: list[tuple[int, int, int]]) -> None:
    model = random_vlm("qwen2_5_vl")
    tower, config = model.model.visual, model.config.vision_config
    window = config.window_size // config.spatial_merge_size // config.patch_size
    if hasattr(tower, "get_window_index"):
        index, ends = tower.get_window_index(torch.tensor(grids))
    else:
        from transformers.vision_utils import get_vision_window_index

        index, ends = get_vision_window_index(
            torch.tensor(grids),
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
    unit = config.spatial_merge_size**2
    order = tower_order(grids, config.spatial_merge_size, window)
    assert (order.reshape(-1, unit) == order.reshape(-1, unit)[:, :1] + np.arange(unit)).all()
    assert (order.reshape(-1, unit)[:, 0] // unit).tolist() == index.tolist()
    lengths, views = windows(grids, config.spatial_merge_size, window)
    assert [0, *np.cumsum(lengths) * unit] == torch.unique_consecutive(torch.as_tensor(ends)).tolist()
    slices = [height * width // unit for frames, height, width in grids for _ in range(frames)]
    assert np.bincount(views, lengths).tolist() == slices


def test_without_windows_patches_stand_in_raster_order() -> None:
    assert tower_order([(2, 4, 4), (1, 2, 4)], 2, None).tolist() == list(range(40))


@pytest.mark.parametrize("weighted", [False, True])
def test_segmented_attention_equals_the_block_diagonal_matrix(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = (4, 6, 4, 2)
    n, heads, width = sum(lengths), 2, 8
    query, key = (torch.randn(heads, n, width, generator=generator, dtype=torch.float64) for _ in range(2))
    # Two views of 10 and 6 patches, in another order than the tower's.
    order = torch.randperm(n, generator=generator)
    places, valid = torch.zeros(2, 10, dtype=torch.long), torch.zeros(2, 10, dtype=torch.bool)
    views = [order[order < 10], order[order >= 10]]
    for row, view in enumerate(views):
        places[row, : len(view)], valid[row, : len(view)] = view, True
    attention = SegmentedAttention(query, key, width**-0.5, lengths, places, valid)
    matrix = block_matrix(query, key, lengths)
    weight = torch.rand(2, 10, generator=generator, dtype=torch.float64) if weighted else None
    for row, view in enumerate(views):
        rows = matrix[view][:, view]
        given = torch.ones(len(view), dtype=torch.float64) if weight is None else weight[row, : len(view)]
        expected = given @ rows
        assert torch.allclose(attention.column_mass(weight, "sum")[row, : len(view)], expected)
        assert torch.allclose(attention.column_mass(weight)[row, : len(view)], expected / given.sum())
        one = attention.views(torch.tensor([row]))
        part = None if weight is None else weight[row : row + 1]
        assert torch.allclose(one.column_mass(part, "sum")[0, : len(view)], expected)
    assert not attention.column_mass(weight)[1, 6:].any()


def block_matrix(query: Tensor, key: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Softmax attention inside segments, mean over heads, zero between them."""
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return scores.masked_fill(segment[:, None] != segment, -torch.inf).softmax(-1).mean(0)


def test_patches_and_pixels_stand_in_raster_order() -> None:
    """A tower with windows hands over its states in window order; values come back view by view."""
    tower = PackedTower(merge=2, patch=3, frames=2, window=2)
    grids = [(2, 6, 6), (1, 4, 8)]
    total = sum(t * h * w for t, h, w in grids)
    raster = torch.arange(total, dtype=torch.float32)
    inputs = raster[:, None].expand(total, 2 * 3 * 3 * 3).contiguous()
    run = tower.run((inputs,), {"grid_thw": torch.tensor(grids)})
    states = raster[torch.from_numpy(tower_order(grids, 2, 2))][:, None]
    values = run.patches(states)[..., 0]
    assert run.n_views == 3 and run.patches_per_view == 36
    assert values[0].tolist() == list(range(36)) and values[1].tolist() == list(range(36, 72))
    assert values[2].tolist() == [*range(72, 104), 0, 0, 0, 0]
    assert run.patch_valid.sum(1).tolist() == [36, 36, 32]
    pixels = run.pixels()
    assert pixels.shape == (3, 36, 3, 6, 3) and pixels[1, 5].eq(41).all()
    assert [len(part) for part in run.contents()] == [36, 36, 32]
