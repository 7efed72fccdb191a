"""Pictures and reports to draw."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlmprune.core.report import ImageRecord, Report, SiteRecord
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site
from vlmprune.core.views import View

GRID = View(4, 4)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 250, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)


def report_of(selection: Selection, samples: tuple[int, ...], view: View = GRID) -> Report:
    """A report of one post-encoder site, one item per entry of `samples`."""
    places = [samples[:i].count(sample) for i, sample in enumerate(samples)]
    images = tuple(ImageRecord(s, place, view.length, (view,)) for s, place in zip(samples, places, strict=True))
    lengths = (view.length,) * len(samples)
    site = SiteRecord("test", Site.POST_ENCODER, None, "keep", samples, lengths, selection)
    return Report("Model", {"policy": "test"}, n_samples=max(samples) + 1, images=images, sites=[site])
