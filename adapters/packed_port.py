"""Attention of packed towers, read and biased through its tap, segment by segment or in one call for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters import tap
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.tap_port import TappedAttention, attend_biased
from vlmprune.adapters.tower_reduction import AttentionPort, TowerReducer
from vlmprune.adapters.tower_tokens import BlockAttention


@dataclass(eq=False)
class SegmentCalls(BlockAttention):
    """The products of one block over the packed sequence, ``V`` being 1, in as many calls as the model made."""

    calls: list[TappedAttention] = field(default_factory=list)

    def key_mean(self) -> Tensor:
        return self._whole("key").mean(1)

    def keys(self) -> Tensor:
        return self._whole("key").transpose(1, 2).flatten(2)

    def query_key(self) -> tuple[Tensor, Tensor, float]:
        return self._whole("query"), self._whole("key"), self.calls[0].scale

    def _whole(self, name: str) -> Tensor:
        """``[1, H, N, d]``."""
        return torch.cat([getattr(call, name) for call in self.calls], 2)


class PackedPort(AttentionPort):
    """See :class:`AttentionPort`; each call of the attention function gets its own part of the bias.

    Where attention takes no packed segments, a tower calls it for one segment after the other: the parts are counted
    from the lengths of the calls.

    Args:
        attention: the attention module of a block.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._done = 0
        self._calls = SegmentCalls()

    def install(self, reducer: TowerReducer, block: int, hooks: HookStack) -> None:
        hooks.before(self._attention, self._start)
        hooks.after(self._attention, self._stop, always=True)
        tap.install_compute(self._attention, partial(self._compute, reducer, block), hooks)

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._done = 0
        self._calls = SegmentCalls()

    def _stop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._calls = SegmentCalls()

    def _compute(
        self,
        reducer: TowerReducer,
        block: int,
        attend: tap.Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        first, self._done = self._done, self._done + query.shape[2]
        if reducer.wants(block):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            self._calls.calls.append(TappedAttention(query.detach(), key.detach(), scale))
            reducer.attended(block, self._calls)
        bias = reducer.key_bias()
        if bias is None:
            return attend(module, query, key, value, mask, scaling=scaling, **kwargs)
        bias = bias[:, first : self._done]
        return attend_biased(attend, module, query, key, value, bias, scaling=scaling, **kwargs)
