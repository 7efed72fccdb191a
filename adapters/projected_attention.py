"""Queries and keys of an attention that keeps them to itself, projected again from its input where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from vlmprune.adapters.tower_tokens import BlockAttention


@dataclass(frozen=True, eq=False)
class Projection:
    """A projection to heads: ``weight [H * d, D]``, ``bias [H * d]`` or None, and a norm over ``d`` or None."""

    weight: Tensor
    bias: Tensor | None
    heads: int
    norm: Any = None

    def of(self, states: Tensor) -> Tensor:
        """``[V, H, T, d]``."""
        values = linear(states, self.weight, self.bias).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return values if self.norm is None else self.norm(values)

    def mean_of(self, states: Tensor) -> Tensor:
        """``[V, T, d]``, mean over heads; without a norm the weights are averaged first, which costs 1 / H."""
        if self.norm is not None:
            return self.of(states).mean(1)
        weight = self.weight.unflatten(0, (self.heads, -1)).mean(0)
        bias = None if self.bias is None else self.bias.unflatten(0, (self.heads, -1)).mean(0)
        return linear(states, weight, bias)


def norm_of(module: nn.Module) -> nn.Module | None:
    """A norm of queries or keys, None where there is none."""
    return None if isinstance(module, nn.Identity) else module


class ProjectedAttention(BlockAttention):
    """See the module.

    Args:
        states: the attention's input ``[V, T, D]``.
        query, key: its projections.
        scale: of the products.
        rotate: turns queries and keys ``[V, H, T, d]``; None where they stay.
        per_head: it turns the heads by different angles.
    """

    def __init__(
        self,
        states: Tensor,
        query: Projection,
        key: Projection,
        scale: float,
        rotate: Callable[[Tensor], Tensor] | None = None,
        per_head: bool = False,
    ) -> None:
        self._states = states.detach()
        self._query, self._key = query, key
        self._scale = scale
        self._rotate, self._per_head = rotate, per_head

    @torch.no_grad()
    def key_mean(self) -> Tensor:
        if self._rotate is None:
            return self._key.mean_of(self._states)
        if self._per_head:
            return self._turned(self._key).mean(1)
        return self._rotate(self._key.mean_of(self._states)[:, None])[:, 0]

    @torch.no_grad()
    def keys(self) -> Tensor:
        return self._turned(self._key).transpose(1, 2).flatten(2)

    @torch.no_grad()
    def query_key(self) -> tuple[Tensor, Tensor, float]:
        query, key = self._turned(self._query), self._turned(self._key)
        return query, key.repeat_interleave(query.shape[1] // key.shape[1], 1), self._scale

    def _turned(self, projection: Projection) -> Tensor:
        values = projection.of(self._states)
        return values if self._rotate is None else self._rotate(values)
