"""Random, uniform, grid, pooled and downsampled tokens."""

from __future__ import annotations

import io
import math
from typing import Any

import contexts
import numpy as np
import pytest
import torch
from PIL import Image

from vlmprune.core.errors import BudgetError, InputError, SignalError
from vlmprune.core.geometry import smart_resize, visual_tokens
from vlmprune.core.info import ModelInfo
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Projected
from vlmprune.core.sites import Site
from vlmprune.core.views import View
from vlmprune.policies.downsample import Downsample
from vlmprune.policies.grid import Grid, grid_shape
from vlmprune.policies.grid_pool import GridPool
from vlmprune.policies.random import RandomTokens
from vlmprune.policies.uniform import Uniform, uniform_places


def draw(keep: Any, seed: int, views: Any = None) -> list[int]:
    context = contexts.post_encoder([views or contexts.image(4, 5)], keep, seeds=(seed,))
    return contexts.kept_tokens(RandomTokens(keep=keep).select(context))[0]


def test_random_inclusion_is_uniform() -> None:
    """Marginal inclusion K / N = 0.3: with 2000 draws its standard deviation is 0.0102."""
    counts = np.zeros(20)
    for seed in range(2000):
        counts[draw(6, seed)] += 1
    assert counts.sum() == 6 * 2000
    assert np.abs(counts / 2000 - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 2000)
    assert draw(6, 1) == draw(6, 1) != draw(6, 2)


def test_random_shares_the_budget_among_views() -> None:
    kept = draw(18, 5, contexts.any_resolution(3, 4, 2))
    assert [sum(token // 12 == view for token in kept) for view in range(3)] == [6, 6, 6]


def test_random_needs_seeds() -> None:
    assert RandomTokens().is_random(contexts.LLAVA)
    with pytest.raises(SignalError, match="is_random"):
        RandomTokens(keep=3).select(contexts.post_encoder([contexts.image(2, 3)], 3))


def test_uniform_places_by_the_formula() -> None:
    for n in range(1, 60):
        for count in range(1, n + 1):
            places = uniform_places(n, count)
            assert places == [int((i + 0.5) * n / count) for i in range(count)]
            assert len(set(places)) == count


def test_uniform_shares_by_size() -> None:
    views = (View(4, 4, 0, "thumbnail"), View(2, 4, 16, "tile"))
    selection = Uniform(keep=6).select(contexts.post_encoder([views], 6))
    assert contexts.kept_tokens(selection) == [[2, 6, 10, 14, 18, 22]]


def test_grids_stay_within_the_budget() -> None:
    for height in range(1, 14):
        for width in range(1, 14):
            for count in range(1, height * width + 1):
                rows, columns = grid_shape(height, width, count)
                assert 1 <= rows <= height and 1 <= columns <= width
                assert rows * columns <= count or count * width < height
            assert grid_shape(height, width, height * width) == (height, width)


def test_grid_reports_what_it_keeps() -> None:
    selection = Grid(keep=192).select(contexts.post_encoder([contexts.image(24, 24)], 192))
    assert selection.out_counts() == (14 * 13,)


def pooled(keep: Any, views: Any, features: list[torch.Tensor]) -> tuple[Selection, torch.Tensor]:
    context = contexts.post_encoder(views, keep, {Projected(): features})
    selection = GridPool(keep=keep).select(context)
    return selection, selection.apply(context.signal(Projected()), features=True)


def test_pooling_a_constant_map_is_constant() -> None:
    for count in (1, 5, 12, 30):
        selection, out = pooled(count, [contexts.image(5, 7)], [torch.full((35, 4), 0.7)])
        torch.testing.assert_close(out[selection.out_valid()], torch.full((selection.out_counts()[0], 4), 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooling_to_the_same_grid_is_the_identity(dtype: torch.dtype) -> None:
    features = torch.randn(35, 4).to(dtype)
    selection, out = pooled(35, [contexts.image(5, 7)], [features])
    assert torch.equal(out[0], features)
    assert torch.equal(selection.source_map().weights[0], torch.eye(35))


def test_pooling_against_a_loop() -> None:
    """Ragged items, several views: every output is the mean of its sources, which tile its own view."""
    views = [contexts.any_resolution(4, 6, 1), contexts.image(5, 3)]
    features = [torch.randn(48, 3), torch.randn(15, 3)]
    selection, out = pooled(0.3, views, features)
    assert selection.out_counts() == (12, 3)  # 7 per view make 2 x 3, 4 make 3 x 1
    shapes = [[grid_shape(4, 6, 7)] * 2, [grid_shape(5, 3, 4)]]
    for item, (item_views, item_shapes) in enumerate(zip(views, shapes, strict=True)):
        expected = []
        for view, (rows, columns) in zip(item_views, item_shapes, strict=True):
            grid = features[item][view.start : view.start + view.length].reshape(view.height, view.width, 3)
            for r in range(rows):
                top, bottom = r * view.height // rows, math.ceil((r + 1) * view.height / rows)
                for c in range(columns):
                    left, right = c * view.width // columns, math.ceil((c + 1) * view.width / columns)
                    expected.append(grid[top:bottom, left:right].reshape(-1, 3).mean(0))
        torch.testing.assert_close(out[item, : len(expected)], torch.stack(expected))
        assert out[item, len(expected) :].eq(0).all()
    weights = selection.source_map().weights
    torch.testing.assert_close(weights.sum(-1), selection.out_valid().float())
    assert weights[0, 6:12, :24].eq(0).all()


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_downsample_halves() -> None:
    image = picture()
    small = Downsample(keep=0.25).resize(image)
    assert small.size == (20, 15)
    assert small.tobytes() == image.resize((20, 15), Image.Resampling.BICUBIC).tobytes()
    assert Downsample(factor=100.0).resize(image).size == (1, 1)
    assert Downsample(keep=1.0).resize(image) is image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_downsample_takes_every_mode(mode: str) -> None:
    assert Downsample(factor=2, jpeg=True).resize(picture(mode)).size == (20, 15)
    colours = Downsample(factor=2).resize(picture(mode)).convert("RGB")
    nearest = picture(mode).convert("RGB").resize((20, 15), Image.Resampling.NEAREST)
    assert colours.tobytes() != nearest.tobytes()


def test_downsample_through_jpeg() -> None:
    image = picture()
    stored = io.BytesIO()
    image.save(stored, format="JPEG")
    assert Downsample(jpeg=True).resize(image).tobytes() == Image.open(stored).tobytes()


def test_downsample_settings() -> None:
    policy = Downsample(keep=0.25)
    assert policy.needs_processor()
    assert [request.site for request in policy.requests(contexts.QWEN)] == [Site.IMAGE]
    assert Downsample(factor=2).reduces(contexts.QWEN) and not Downsample().reduces(contexts.QWEN)
    assert Downsample(keep=0.5).divisor == pytest.approx(math.sqrt(2))
    for wrong in ({"keep": 64}, {"keep": "flops:0.4"}, {"keep": [0.5, 0.5]}):
        with pytest.raises(BudgetError, match="share"):
            Downsample(**wrong)
    for wrong in ({"factor": 0.5}, {"factor": float("nan")}, {"factor": 2, "keep": 0.25}):
        with pytest.raises(InputError, match="factor"):
            Downsample(**wrong)
    with pytest.raises(NotImplementedError, match="resize"):
        policy.select(contexts.post_encoder([contexts.image(2, 2)], 0.25))


def test_smart_resize_properties() -> None:
    limits = {"factor": 28, "min_pixels": 3136, "max_pixels": 2408448}
    for width, height in ((1, 1), (30, 5000), (28, 28), (5000, 4000), (640, 427), (56, 10)):
        rows, columns = smart_resize(height, width, **limits)
        assert rows % 28 == columns % 28 == 0 and 3136 <= rows * columns <= 2408448
        assert visual_tokens(height, width, **limits) == rows * columns // 784
    with pytest.raises(InputError, match="too long"):
        smart_resize(1, 201, **limits)
    with pytest.raises(InputError, match="empty"):
        smart_resize(0, 20, **limits)


def test_jpeg_alone_acts_too() -> None:
    info = ModelInfo("llava", "LlavaForConditionalGeneration")
    assert Downsample(jpeg=True).reduces(info)
    assert not Downsample().reduces(info)
