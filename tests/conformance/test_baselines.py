"""The baselines against independent reference values.

Golden kind -> settings:
- `reference`: `Uniform(keep=budget)`, `Grid(keep=budget)`, `GridPool(keep=budget)`.
- `downsample`: `Downsample(factor=D)` and the processor's rounding (`smart_resize`).
"""

from __future__ import annotations

import contexts
import numpy as np
import pytest
import torch
from golden_io import Case
from PIL import Image

from vlmprune.core.context import Context
from vlmprune.core.geometry import smart_resize, visual_tokens
from vlmprune.core.signals import Projected
from vlmprune.policies.downsample import Downsample
from vlmprune.policies.grid import Grid, grid_shape
from vlmprune.policies.grid_pool import GridPool
from vlmprune.policies.uniform import Uniform

# Shares as they are usually written, and the factors they stand for.
SHARES = {0.25: 2, 0.1111: 3, 0.0625: 4, 0.04: 5, 0.01: 10}


def context_of(case: Case) -> Context:
    grid = contexts.image(case.integer("grid_h"), case.integer("grid_w"))
    signals = {Projected(): [torch.from_numpy(case.inputs["features"])]}
    return contexts.post_encoder([grid], case.integer("budget"), signals)


@pytest.mark.golden("baselines", "reference")
def test_uniform(case: Case) -> None:
    selection = Uniform(keep=case.integer("budget")).select(context_of(case))
    assert contexts.kept_tokens(selection) == [case.outputs["uniform_indices"].tolist()]


@pytest.mark.golden("baselines", "reference")
def test_grid(case: Case) -> None:
    selection = Grid(keep=case.integer("budget")).select(context_of(case))
    assert contexts.kept_tokens(selection) == [case.outputs["grid_indices"].tolist()]


@pytest.mark.golden("baselines", "reference")
def test_grid_pool(case: Case) -> None:
    context = context_of(case)
    shape = grid_shape(case.integer("grid_h"), case.integer("grid_w"), case.integer("budget"))
    assert list(shape) == case.outputs["pool_shape"].tolist()
    selection = GridPool(keep=case.integer("budget")).select(context)
    features = context.signal(Projected())
    pooled = selection.apply(features, features=True)[0].numpy()
    np.testing.assert_allclose(pooled, case.outputs["pooled"], rtol=1e-5, atol=1e-6)
    # The weights that pictures and lineage use say the same.
    by_sources = selection.source_map().apply(features)[0].numpy()
    np.testing.assert_allclose(by_sources, case.outputs["pooled"], rtol=1e-5, atol=1e-6)
    assert selection.anchors().tolist() == [case.outputs["grid_indices"].tolist()]


@pytest.mark.golden("baselines", "downsample")
def test_downsample_sizes(case: Case) -> None:
    limits = {name: case.integer(name) for name in ("factor", "min_pixels", "max_pixels")}
    for row, (width, height, factor) in enumerate(case.inputs["size_and_ratio"].tolist()):
        small_width, small_height = Downsample(factor=factor).size(width, height)
        assert [small_width, small_height] == case.outputs["downsampled_size"][row].tolist()
        model_height, model_width = smart_resize(small_height, small_width, **limits)
        assert [model_width, model_height] == case.outputs["model_size"][row].tolist()
        assert visual_tokens(small_height, small_width, **limits) == case.outputs["visual_tokens"][row]


@pytest.mark.golden("baselines", "downsample")
def test_downsample_resizes_images(case: Case) -> None:
    sizes = case.outputs["downsampled_size"].tolist()
    width, height, factor = case.inputs["size_and_ratio"].tolist()[0]
    image = Image.effect_noise((width, height), 60).convert("RGB")
    small = Downsample(factor=factor).resize(image)
    assert list(small.size) == sizes[0]
    reference = image if factor == 1 else image.resize(tuple(sizes[0]), Image.Resampling.BICUBIC)
    assert small.tobytes() == reference.tobytes()


@pytest.mark.golden("baselines", "downsample")
def test_shares_mean_the_factors_of_the_paper(case: Case) -> None:
    assert {Downsample(keep=share).divisor for share in SHARES} == set(SHARES.values())
    for factor in set(case.inputs["size_and_ratio"][:, 2].tolist()):
        assert Downsample(keep=1 / factor**2).divisor == factor
