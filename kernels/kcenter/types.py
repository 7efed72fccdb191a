"""What goes into a greedy selection and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["cosine", "l2"]
Objective = Literal["min_max", "max_sum"]
Route = Literal["auto", "gram", "features"]
StartRule = Literal["center_far", "medoid", "score"]
Kind = Literal["cosine", "l2", "distance", "similarity"]

# Norms of cosine features are at least this.
MIN_NORM = 1e-12


@dataclass(frozen=True)
class KCenterResult:
    """Result of :func:`~vlmprune.kernels.kcenter.greedy_select`.

    Attributes:
        indices: int64 ``[B, K]`` in selection order, -1 where no token was left.
        radius: ``[B, K]``, state of each pick when it was picked; -1 in empty slots. ``min_max``: its
            distance to the tokens picked before, +inf for the first. ``max_sum``: its summed similarity.
        min_distance: ``[B, N]``, final state of every token: distance to the nearest picked or preselected
            token (+inf if there is none), or for ``max_sum`` the summed similarity to them.
    """

    indices: Tensor
    radius: Tensor
    min_distance: Tensor


@dataclass(frozen=True)
class Problem:
    """Checked arguments of one call.

    Attributes:
        kind: metric of ``features``, or what ``matrix`` holds.
        features: ``[B, N, d]`` or None.
        matrix: ``[B, N, N]`` or None; row j holds the values between j and every token.
        width: output slots K.
        counts: int64 ``[B]`` picks per sample, None if all have K.
        valid: bool ``[B, N]``, None if all tokens are.
        preselected: int64 ``[B, P]`` (-1 fill, valid tokens only), None if there are none.
        weight: ``[B, N]``, multiplies the distance in the argmax.
        dtype: of the computation, float32 or float64.
    """

    kind: Kind
    objective: Objective
    features: Tensor | None
    matrix: Tensor | None
    width: int
    counts: Tensor | None
    valid: Tensor | None
    preselected: Tensor | None
    weight: Tensor | None
    dtype: torch.dtype

    @property
    def source(self) -> Tensor:
        """Whichever of features and matrix is given."""
        source = self.matrix if self.features is None else self.features
        assert source is not None
        return source

    @property
    def batch(self) -> int:
        return self.source.shape[0]

    @property
    def n(self) -> int:
        return self.source.shape[1]

    @property
    def device(self) -> torch.device:
        return self.source.device

    def available(self) -> Tensor:
        """bool ``[B, N]``: valid and not preselected. A new tensor."""
        if self.valid is None:
            mask = torch.ones(self.batch, self.n, dtype=torch.bool, device=self.device)
        else:
            mask = self.valid.clone()
        if self.preselected is not None:
            taken = torch.zeros(self.batch, self.n + 1, dtype=torch.bool, device=self.device)
            place = torch.where(self.preselected < 0, self.n, self.preselected)
            mask &= ~taken.scatter(1, place, True)[:, : self.n]
        return mask

    def part(self, start: int, stop: int) -> Problem:
        """The samples ``start:stop``."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Problem(
            self.kind,
            self.objective,
            cut(self.features),
            cut(self.matrix),
            self.width,
            cut(self.counts),
            cut(self.valid),
            cut(self.preselected),
            cut(self.weight),
            self.dtype,
        )
