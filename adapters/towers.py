"""How vision towers hold their patches, and what is kept of their attention."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vlmprune.adapters.tower_tokens import TowerTokens
from vlmprune.core import signals as s


@dataclass(frozen=True)
class AttentionCall:
    """One product of queries ``[B, H, T, d]`` and keys in a tower block.

    ``lengths`` are the segments of a packed call (variable-length attention), None where there is but one; ``tokens``
    the tower's tokens at that moment, None while all are there.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float
    lengths: tuple[int, ...] | None = None
    tokens: TowerTokens | None = None

    def behind(self, tokens: TowerTokens) -> AttentionCall:
        """This call as one of reduced ``tokens``."""
        return replace(self, tokens=copy.copy(tokens))

    @property
    def options(self) -> dict[str, Any]:
        """Scale and mask as the kernels take them; flash attention has 2-D masks of keys."""
        if self.mask is not None and self.mask.ndim == 2:
            return {"scale": self.scale, "key_valid": self.mask.bool()}
        mask = self.mask
        if mask is not None:  # one row for all queries
            mask = mask.expand(-1, -1, self.query.shape[2], -1)
        return {"scale": self.scale, "mask": mask}


class TowerRun(ABC):
    """One run of a tower over ``n_views`` views."""

    n_views: int
    patches_per_view: int

    @abstractmethod
    def patches(self, states: Tensor, tokens: TowerTokens | None = None) -> Tensor:
        """Values of patches ``[V, P, ...]`` out of a tensor in the tower's own order.

        Args:
            states: of all tokens, or of those that are left.
            tokens: those that are left, None while all are there; dropped patches get zeros.
        """

    @property
    def patch_valid(self) -> Tensor | None:
        """``[V, P]`` bool, None where every view has as many patches."""
        return None

    def masked(self, values: Tensor) -> Tensor:
        """Values of patches ``[V, P, ...]`` with zeros at the padding of smaller views."""
        valid = self.patch_valid
        return values if valid is None else values * valid.view(*valid.shape, *[1] * (values.ndim - 2))

    @abstractmethod
    def tokens(self) -> TowerTokens:
        """The tower's tokens at the start of the run, for policies that reduce them."""

    @abstractmethod
    def attention(self, signal: s.Signal, calls: list[AttentionCall]) -> Any:
        """A signal of a block out of its attention calls."""

    @abstractmethod
    def pixels(self) -> Tensor:
        """The tower's input per patch, ``[V, P, C, h, w]``; the padding of smaller views holds anything."""

    @abstractmethod
    def contents(self) -> list[Tensor]:
        """The input of every view, for digests."""

    @abstractmethod
    def drop_input(self) -> None:
        """Let go of the tower's input, which may be large: ``pixels`` and ``contents`` are gone."""


class Tower(ABC):
    """How a tower holds its patches."""

    @abstractmethod
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TowerRun:
        """The run that a call of the tower starts."""
