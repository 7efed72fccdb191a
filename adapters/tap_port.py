"""Attention of transformers' towers, read and biased through its tap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from vlmprune.adapters import tap
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.tower_reduction import AttentionPort, TowerReducer
from vlmprune.adapters.tower_tokens import EXTRA, BlockAttention, with_key_bias


@dataclass(frozen=True, eq=False)
class TappedAttention(BlockAttention):
    """Queries and keys ``[V, H, T, d]`` as the attention function got them."""

    query: Tensor
    key: Tensor
    scale: float

    def key_mean(self) -> Tensor:
        return self.key.mean(1)

    def keys(self) -> Tensor:
        return self.key.transpose(1, 2).flatten(2)

    def query_key(self) -> tuple[Tensor, Tensor, float]:
        return self.query, self.key, self.scale


class TapPort(AttentionPort):
    """See :class:`AttentionPort`; for batches of views ``[V, H, T, d]``.

    Args:
        attention: a module that calls one of transformers' attention functions.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention

    def install(self, reducer: TowerReducer, block: int, hooks: HookStack) -> None:
        tap.install_compute(self._attention, partial(self._compute, reducer, block), hooks)

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
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if reducer.wants(block):
            reducer.attended(block, TappedAttention(query.detach(), key.detach(), scale))
        bias = reducer.key_bias()
        if bias is None:
            return attend(module, query, key, value, mask, scaling=scaling, **kwargs)
        return attend_biased(attend, module, query, key, value, bias, scaling=scaling, **kwargs)


def attend_biased(
    attend: tap.Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> Any:
    """What ``attend`` returns if ``bias [V, T]`` is added to the scores of the keys, as a mask or, for flash attention,
    as further features of queries and keys."""
    if not tap.is_flash(tap.original_config(module)):
        mask = bias.to(query.dtype)[:, None, None]
        return attend(module, query, key, value, mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = with_key_bias(query, key, bias, scale)
    output, *rest = attend(module, query, key, pad(value, (0, EXTRA)), None, scaling=scale, **kwargs)
    return (output[..., :-EXTRA], *rest)
