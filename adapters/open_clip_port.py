"""Attention of open_clip's blocks: projected again where it is read, biased through its masks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.projected_attention import ProjectedAttention, Projection, norm_of
from vlmprune.adapters.timm_port import MaskPort
from vlmprune.adapters.tower_reduction import AttentionPort, TowerReducer


class MultiheadPort(AttentionPort):
    """See :class:`AttentionPort`; for ``torch.nn.MultiheadAttention`` over ``[V, T, D]``.

    The bias goes in as a float ``key_padding_mask``, which PyTorch broadcasts over queries and hands to fused
    attention. Without gradients it keeps PyTorch's shortcut for inference, which takes no such mask, to the blocks
    in which nothing has been reduced.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self.attention = attention

    def install(self, reducer: TowerReducer, block: int, hooks: HookStack) -> None:
        hooks.before(self.attention, partial(self._before, reducer, block))

    def _before(
        self, reducer: TowerReducer, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if reducer.wants(block):
            reducer.attended(block, ProjectedAttention(args[0], *in_projections(module), module.head_dim**-0.5))
        bias = reducer.key_bias()
        return None if bias is None else (args, {**kwargs, "key_padding_mask": bias.to(args[0].dtype)})


class CustomPort(MaskPort):
    """For open_clip's own ``Attention``."""

    def read(self, reducer: TowerReducer, block: int, states: Tensor, kwargs: dict[str, Any]) -> None:
        if reducer.wants(block):
            module = self.attention
            query, key = in_projections(module, norm_of(module.ln_q), norm_of(module.ln_k))
            reducer.attended(block, ProjectedAttention(states, query, key, module.scale))


def in_projections(
    module: nn.Module, query_norm: nn.Module | None = None, key_norm: nn.Module | None = None
) -> tuple[Projection, Projection]:
    """Queries and keys of a module with ``in_proj_weight [3 * D, D]`` and ``in_proj_bias [3 * D]`` or None."""
    weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    return (
        Projection(weights[0], biases[0], module.num_heads, query_norm),
        Projection(weights[1], biases[1], module.num_heads, key_norm),
    )
