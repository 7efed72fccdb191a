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
from vlmprune.adapters.tower_tokens import EXTRA, BlockAttention, HiddenKeys, with_key_bias


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
        adds_masks: its eager attention adds masks to the scores.
    """

    def __init__(self, attention: nn.Module, adds_masks: bool = True) -> None:
        self._attention = attention
        self._adds_masks = adds_masks

    def install(self, reducer: TowerReducer, block: int, hooks: HookStack) -> None:
        tap.install_compute(self._attention, partial(self._compute, reducer, block), hooks)

    def bias(self, reducer: TowerReducer) -> Tensor | None:
        """``[V, T]`` to add to the scores of keys, None for nothing."""
        return reducer.key_bias()

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
        bias = self.bias(reducer)
        if bias is None:
            if reducer.tokens is not None and reducer.tokens.changed:
                mask = None  # the model's own is over all tokens; padding would have given a bias
            return attend(module, query, key, value, mask, scaling=scaling, **kwargs)
        hidden = None if reducer.tokens is None else reducer.tokens.hidden_keys()
        given = (module, query, key, value, bias)
        return attend_biased(attend, *given, scaling, hidden=hidden, adds_masks=self._adds_masks, **kwargs)


def attend_biased(
    attend: tap.Attend,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scaling: float | None = None,
    *,
    hidden: HiddenKeys | None = None,
    adds_masks: bool = True,
    **kwargs: Any,
) -> Any:
    """What ``attend`` returns if ``bias [V, T]`` is added to the scores of the keys, in place of any mask.

    It goes in as a mask; where attention takes none that is added (flash attention, some eager ones), as further
    features of queries and keys.

    Args:
        hidden: which keys have a bias of -inf, and the others' bias; flash attention takes them as its mask.
        adds_masks: eager attention adds masks to the scores.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    config = tap.original_config(module)
    added = bias.to(query.dtype)[:, None, None]
    flash = tap.is_flash(config)
    if not flash and (adds_masks or config._attn_implementation not in (None, "eager")):
        return attend(module, query, key, value, added, scaling=scaling, **kwargs)
    told = (query, key, added)
    mask = None
    if flash and hidden is not None:
        mask = hidden.valid
        if hidden.bias is None:
            return attend(module, query, key, value, mask, scaling=scaling, recorded=told, **kwargs)
        bias = hidden.bias
    query, key = with_key_bias(query, key, bias, scale)
    value = pad(value, (0, EXTRA))
    output, *rest = attend(module, query, key, value, mask, scaling=scale, recorded=told, **kwargs)
    return (output[..., :-EXTRA], *rest)
