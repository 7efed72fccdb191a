"""Tokens that a policy makes itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Synthetic:
    """Tokens that did not exist before.

    Attributes:
        features: ``[I, S, D]``.
        sources: ``[I, S, N]`` weights of the input tokens they stand for; rows sum to 1, padding rows to 0.
        place: ``[I, S]`` input token whose place and position they take, -1 for padding.
    """

    features: Tensor
    sources: Tensor
    place: Tensor

    def merge_order(self, kept: Tensor, n_in: int) -> tuple[Tensor, Tensor]:
        """Order of kept and new tokens by the place that they take, kept ones first where it is the same.

        Args:
            kept: int64 ``[I, K]``, -1 for padding.
            n_in: number of input tokens ``N``.

        Returns:
            Two ``[I, K + S]``, -1 for padding at the end: the place of each output among the inputs, and its
            number in the row of kept and then new tokens.
        """
        place = torch.cat([kept, self.place], 1)
        ordered = torch.where(place < 0, n_in, place).sort(dim=1, stable=True)
        empty = ordered.values == n_in
        return ordered.values.masked_fill(empty, -1), ordered.indices.masked_fill(empty, -1)
