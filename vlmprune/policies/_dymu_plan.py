"""DyMU's schedules for a budget: how many tokens each block of a tower takes away."""

from __future__ import annotations

from vlmprune.core.budget import Budget
from vlmprune.core.info import ModelInfo
from vlmprune.policies import _tower_schedule as schedules
from vlmprune.policies._tower_schedule import Schedule, Taken


def plan(kind: Schedule, official: bool, info: ModelInfo, budget: Budget, n: int) -> Taken:
    """Tokens that each block takes from a view of ``n`` tokens, so that ``budget`` is left at the tower's exit.

    Args:
        kind: shape of the schedule.
        official: count all blocks of the tower, also those behind the one that feeds the projector, and take in no
            block more because others cannot.
        info: the model. budget: a share or a number. n: free tokens of the view.
    """
    count, blocks = budget.count(n), info.vision_layer(-1) + 1
    if official:
        return schedules.dymu_schedule(kind, n - count, info.vision_depth or blocks)
    if kind == "constant":
        return schedules.spread_to(count, blocks, n)
    return schedules.dymu_schedule(kind, n - count, blocks)


def shortfall(kind: Schedule, info: ModelInfo, budget: Budget, n: int) -> str | None:
    """What keeps a budget from being met on a view of ``n`` tokens, None if nothing does."""
    left = n - sum(schedules.capped(plan(kind, False, info, budget, n), n))
    if left <= budget.count(n):
        return None
    return f"{budget} is out of reach: blocks that merge at most half each leave {left} of {n} tokens"


def fixed_tokens(info: ModelInfo) -> int | None:
    """Tokens of every view as it enters the tower, None where pictures or windows differ."""
    return schedules.view_tokens(info) if info.full_attention_blocks is None else None
