"""Attention of timm's blocks: read from its projection, biased through its mask."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.batched_tokens import BatchedTokens
from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.projected_attention import ProjectedAttention, Projection, norm_of
from vlmprune.adapters.tower_reduction import AttentionPort, TowerReducer
from vlmprune.adapters.tower_tokens import BlockAttention
from vlmprune.adapters.vit_run import as_mask
from vlmprune.kernels.gather import first_members

Normed = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class QkvAttention(BlockAttention):
    """Out of one projection ``qkv [V, T, 3 * H * d]``."""

    qkv: Tensor
    attention: nn.Module

    def _heads(self, part: int, norm: Normed) -> Tensor:
        """``[V, T, H, d]``: queries are part 0, keys part 1."""
        head_dim = self.attention.head_dim
        return norm(self.qkv.unflatten(2, (3, -1, head_dim))[:, :, part])

    @torch.no_grad()
    def key_mean(self) -> Tensor:
        return self._heads(1, self.attention.k_norm).mean(2)

    @torch.no_grad()
    def keys(self) -> Tensor:
        return self._heads(1, self.attention.k_norm).flatten(2)

    @torch.no_grad()
    def query_key(self) -> tuple[Tensor, Tensor, float]:
        query, key = self._heads(0, self.attention.q_norm), self._heads(1, self.attention.k_norm)
        return query.transpose(1, 2), key.transpose(1, 2), self.attention.scale


class MaskPort(AttentionPort):
    """See :class:`AttentionPort`; for an attention that takes ``attn_mask``, which is added to its scores.

    Args:
        attention: called with states ``[V, T, D]``.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def install(self, reducer: TowerReducer, block: int, hooks: HookStack) -> None:
        hooks.before(self.attention, partial(self._before, reducer, block))

    def _before(
        self, reducer: TowerReducer, block: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.read(reducer, block, args[0], kwargs)
        bias = reducer.key_bias()
        return None if bias is None else (args, {**kwargs, "attn_mask": as_mask(bias, args[0].dtype)})

    def read(self, reducer: TowerReducer, block: int, states: Tensor, kwargs: dict[str, Any]) -> None:
        """Hand over what is about to be multiplied, where that is known from the attention's input."""


class QkvPort(MaskPort):
    """For ``timm.layers.Attention``."""

    def install(self, reducer: TowerReducer, block: int, hooks: HookStack) -> None:
        super().install(reducer, block, hooks)
        hooks.after(self.attention.qkv, partial(self._projected, reducer, block))

    def _projected(
        self,
        reducer: TowerReducer,
        block: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        if reducer.wants(block):
            reducer.attended(block, QkvAttention(output.detach(), self.attention))


class RotaryPort(MaskPort):
    """For ``EvaAttention`` and ``AttentionRope``, which turn queries and keys by ``rope``."""

    def read(self, reducer: TowerReducer, block: int, states: Tensor, kwargs: dict[str, Any]) -> None:
        if not reducer.wants(block):
            return
        module, rope = self.attention, kwargs.get("rope")
        rotate = None if rope is None else partial(_rotate, module, rope)
        query, key = _projections(module)
        reducer.attended(
            block,
            ProjectedAttention(states, query, key, module.scale, rotate, per_head=rope is not None and _per_head(rope)),
        )


def _projections(module: nn.Module) -> tuple[Projection, Projection]:
    """Queries and keys of a module with one projection for both and the values, or one for each."""
    norms = norm_of(module.q_norm), norm_of(module.k_norm)
    heads = module.num_heads
    kv_heads = getattr(module, "num_kv_heads", heads)
    if module.qkv is None:
        parts = [(module.q_proj.weight, module.q_proj.bias), (module.k_proj.weight, module.k_proj.bias)]
    else:
        weights = module.qkv.weight.chunk(3)
        biases = (None,) * 3 if module.qkv.bias is None else module.qkv.bias.chunk(3)
        if getattr(module, "q_bias", None) is not None:
            biases = (module.q_bias, module.k_bias, module.v_bias)
        parts = [(weights[0], biases[0]), (weights[1], biases[1])]
    return (
        Projection(*parts[0], heads, norms[0]),
        Projection(*parts[1], kv_heads, norms[1]),
    )


def _per_head(rope: Tensor) -> bool:
    """True if the heads turn by different angles: ``[H, N, C]`` or ``[V, H, N, C]``."""
    return rope.ndim > 2 and rope.shape[-3] > 1


def _rotate(module: nn.Module, rope: Tensor, values: Tensor) -> Tensor:
    """Queries or keys ``[V, H, T, d]`` turned as the module does it."""
    turn = sys.modules[type(module).__module__].apply_rot_embed_cat
    prefix = module.num_prefix_tokens
    half = {"half": True} if getattr(module, "rotate_half", False) else {}
    turned = turn(values[:, :, prefix:], rope, **half)
    return torch.cat([values[:, :, :prefix], turned.to(values.dtype)], 2)


class RotaryTokens(BatchedTokens):
    """Tokens whose rotary tables follow them: one that stands for several has the place of the first."""

    def block_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        rope = kwargs.get("rope")
        if rope is None or self.map.group is None:
            return kwargs
        first = first_members(self.map.group, self.map.width)[:, self.prefix :]  # [V, N]
        return {**kwargs, "rope": _rows(rope, (first - self.prefix).clamp_min(0))}


def _rows(rope: Tensor, index: Tensor) -> Tensor:
    """``[V, 1 or H, N, C]``: rows ``index [V, N]`` of tables ``[N0, C]``, ``[H, N0, C]`` or ``[V, 1 or H, N0, C]``."""
    if rope.ndim == 2:
        return rope[index][:, None]
    if rope.ndim == 3:
        return rope[:, index].transpose(0, 1)
    return rope.gather(2, index[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3]))
