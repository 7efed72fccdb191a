"""Items of different lengths as one sequence or as a padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from vlmprune.kernels.gather import gather_tokens


@dataclass(frozen=True)
class Packing:
    """Items of different lengths, one behind the other or as the rows of a padded batch.

    Args:
        lengths: tokens per item.
        width: of the padded rows, at least the longest item.
        device: of the tokens.
    """

    lengths: tuple[int, ...]
    width: int
    device: torch.device

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each item starts in the sequence, and where the last one ends."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def _full(self) -> bool:
        return all(length == self.width for length in self.lengths)

    @cached_property
    def _slots(self) -> np.ndarray:
        """``[I, width]`` bool: not padding."""
        return np.arange(self.width) < np.asarray(self.lengths)[:, None]

    @cached_property
    def _places(self) -> Tensor:
        """``[1, I * width]`` place in the sequence, -1 for padding."""
        places = np.where(self._slots, np.asarray(self.starts[:-1])[:, None] + np.arange(self.width), -1)
        return torch.from_numpy(places.reshape(1, -1)).to(self.device, non_blocking=True)

    @cached_property
    def _rows(self) -> Tensor:
        """``[M]`` place of each token among the padded ones."""
        return torch.from_numpy(np.flatnonzero(self._slots)).to(self.device, non_blocking=True)

    def pad(self, values: Tensor) -> Tensor:
        """``[I, width, ...]`` from ``[M, ...]``, zeros behind shorter items."""
        if not self._full:
            values = gather_tokens(values[None], self._places)[0]
        return values.reshape(len(self.lengths), self.width, *values.shape[1:])

    @property
    def padding(self) -> float:
        """Share of the padded batch that is padding."""
        return 1 - self.starts[-1] / max(1, len(self.lengths) * self.width)

    def pack(self, values: Tensor) -> Tensor:
        """``[M, ...]`` from ``[I, width, ...]``."""
        flat = values.flatten(0, 1)
        return flat if self._full else flat[self._rows]
