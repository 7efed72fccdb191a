"""One run of an image model whose blocks reduce its tokens, as what stands behind the blocks sees it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.hooks import HookStack
from vlmprune.adapters.tower_tokens import TokenMap, TowerTokens


@dataclass(frozen=True, eq=False)
class HandedOut:
    """The output of a block in full length, ``full [V, T0, D]``, in place of ``short``."""

    block: int
    full: Tensor
    short: Tensor
    map: TokenMap


class VitRun:
    """The tokens of the run under way, or of the last one: a head may be called later than the blocks.

    Args:
        restore_length: features that leave the model have their full length.

    Attributes:
        tokens: as they are now; None before the first run.
        taken: blocks whose outputs the caller takes, each to be handed out in full length.
        noted: makes hidden states that the model noted on the way what they have to be; see
            :meth:`~vlmprune.adapters.tower_reduction.TowerReducer.noted`.
    """

    def __init__(self, restore_length: bool) -> None:
        self.restore_length = restore_length
        self.tokens: TowerTokens | None = None
        self.taken: frozenset[int] = frozenset()
        self.noted: Callable[[Sequence[Tensor | None], bool], tuple[Tensor | None, ...]] | None = None
        self._handed: list[HandedOut] = []
        self._normed: HandedOut | None = None
        self._restored: weakref.ref[Tensor] | None = None

    def begin(self, tokens: TowerTokens) -> None:
        """The blocks start."""
        self.tokens = tokens
        self._restored = None

    def end(self) -> None:
        """The call that ran the blocks is over, or failed."""
        self.taken = frozenset()
        self._handed.clear()
        self._normed = None

    def forget(self) -> None:
        """Let go of the last run."""
        self.tokens = None

    @property
    def changed(self) -> bool:
        """Something was reduced."""
        return self.tokens is not None and self.tokens.changed

    @property
    def map(self) -> TokenMap:
        """Where every token that entered went."""
        assert self.tokens is not None
        return self.tokens.map

    def full(self, states: Tensor) -> Tensor:
        """Features that leave the model: ``[V, T0, ...]`` out of ``[V, N, ...]``; a merged token's are copied to its
        members, those of dropped tokens are 0. Without ``restore_length`` as they are."""
        if not self.changed or not self.restore_length or states.shape[1] != self.map.width:
            return states
        return self.mark(self.map.restore(states))

    def mark(self, restored: Tensor) -> Tensor:
        """Remember features as the last run's in full length, so that a head leaves out what was dropped."""
        self._restored = weakref.ref(restored)
        return restored

    def weights(self, states: Tensor) -> Tensor | None:
        """How many tokens each one of the last run's features stands for, ``[V, N]``; None where all count alike.

        Args:
            states: ``[V, N, D]``; in full length they must be the very tensor that left the model.
        """
        if not self.changed or states.ndim != 3 or states.shape[0] != len(self.map.lengths):
            return None
        if self._restored is not None and self._restored() is states:
            return None if self.map.group is None else (self.map.group >= 0).float()
        if states.shape[1] != self.map.width:
            return None
        if self.map.sizes is not None:
            return self.map.sizes.float()
        return None if self.map.full else self.map.valid(states.device).float()

    def hand_out(self, block: int, short: Tensor) -> Tensor | None:
        """The output of a block as its caller takes it, None where that is the output itself."""
        if block not in self.taken or not self.changed or self.map.group is None:
            return None
        handed = HandedOut(block, self.map.restore(short), short, self.map)
        self._handed.append(handed)
        return handed.full

    def follow_norm(self, norm: nn.Module, hooks: HookStack) -> None:
        """Let a norm work on the tokens that are left where it is given an output in full length."""
        hooks.before(norm, self._norm_in)
        hooks.after(norm, self._norm_out)

    def _norm_in(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._normed = self.handed(args[0])
        return None if self._normed is None else ((self._normed.short, *args[1:]), kwargs)

    def _norm_out(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        handed, self._normed = self._normed, None
        return None if handed is None else self.mark(handed.map.restore(output))

    def handed(self, states: Tensor) -> HandedOut | None:
        """What was handed out as ``states``, if anything."""
        for handed in reversed(self._handed):
            if handed.full is states:
                return handed
        return None


def weighted_mean(states: Tensor, weights: Tensor) -> Tensor:
    """Mean ``[V, D]`` of ``states [V, N, D]``, each token as often as ``weights [V, N]`` say."""
    wide = torch.promote_types(states.dtype, torch.float32)
    weights = weights.to(wide)
    share = weights / weights.sum(1, keepdim=True).clamp_min(1)
    return (share[:, None] @ states.to(wide))[:, 0].to(states.dtype)


def present_max(states: Tensor, weights: Tensor) -> Tensor:
    """Largest values ``[V, D]`` among the tokens of ``states [V, N, D]`` that stand for any."""
    return states.masked_fill((weights == 0)[..., None], -torch.inf).amax(1)


def size_bias(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores of keys that each stand for ``weights [V, N]`` tokens; -inf for those of none."""
    return weights.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)


def as_mask(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias of keys ``[V, T]`` as a mask ``[V, 1, 1, T]`` for fused attention."""
    return bias.to(dtype)[:, None, None]
