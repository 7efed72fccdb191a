"""Families whose images are tiles of equal size, each with a fixed number of tokens and no newline features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from vlmprune.adapters.family import Encoded
from vlmprune.adapters.layout import ImageShape, Kind
from vlmprune.adapters.vision_family import VisionFamily, pool_cells
from vlmprune.core.context import View

Runs = list[tuple[int, int]]
"""Start and length of each unbroken run of placeholders in a row."""


class TiledFamily(VisionFamily):
    """An image is one tile, or several and a thumbnail; ``merge x merge`` patches make a token."""

    @property
    @abstractmethod
    def side(self) -> int:
        """Patches along a side of a tile."""

    @property
    @abstractmethod
    def merge(self) -> int:
        """Patches along a side of a token."""

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile."""
        return (self.side // self.merge) ** 2

    def images_of_row(self, row: int, runs: Runs, kwargs: Mapping[str, Any]) -> list[int]:
        """Tiles of each image of a row, in order; by default a run of placeholders is an image."""
        return [-(-length // self.tile_tokens) for _, length in runs]

    def shapes(
        self, kwargs: Mapping[str, Any], masks: Mapping[Kind, np.ndarray], encoded: Encoded
    ) -> dict[Kind, list[ImageShape]]:
        mask = masks["image"]
        repeats = 1
        if "image" in encoded and encoded["image"].n_views:  # rows may be repeated since
            repeats = max(1, int(mask.sum()) // (encoded["image"].n_views * self.tile_tokens))
        counts = [
            count
            for row in range(0, len(mask), repeats)
            for count in self.images_of_row(row, placeholder_runs(mask[row]), kwargs)
        ]
        return {"image": [self._shape(count) for count in counts]}

    def _shape(self, tiles: int) -> ImageShape:
        side, size = self.side // self.merge, self.tile_tokens
        if tiles == 1:
            return ImageShape(size, (View(side, side),))
        kinds = ["tile"] * (tiles - 1) + ["thumbnail"]
        views = tuple(View(side, side, i * size, kind) for i, kind in enumerate(kinds))  # type: ignore[arg-type]
        return ImageShape(tiles * size, views, encoded=tiles)

    def pack(self, shape: ImageShape, values: Tensor, newline: float) -> Tensor:
        if values.shape[2] == self.tile_tokens:  # the projector's input stands for tokens already
            return values.flatten(1, 2)
        return pool_cells(values, self.side, self.merge).flatten(1, 2)


def placeholder_runs(row: np.ndarray) -> Runs:
    """Start and length of the runs of True in ``row [L]``."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
    return [(int(start), int(stop - start)) for start, stop in edges.reshape(-1, 2)]
