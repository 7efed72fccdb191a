"""Where Zero-TPrune prunes, and how many tokens each of its stages takes. All of it is arithmetic on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from vlmprune.core.budget import Budget
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.policies._tower_schedule import spread_to, view_flops

Number = TypeVar("Number", int, float)

PAPER_DEPTH = 12
PAPER_LAYERS = (1, 3, 6, 9, 11)
DEIT_S_RATES = (1.0, 0.9, 0.8, 0.7, 1.0)
SIMILAR_SHARE = 0.05
"""Of a view's tokens, what every S-stage removes where nothing else is said."""
ITERS = ((0.25, 30), (0.75, 5), (1.0, 1))
"""Share of the depth below which a layer takes so many rounds: 30, 5, 5, 1, 1 at the paper's layers."""

Counts = tuple[tuple[int, int], ...]
"""Per stage: tokens that the S-stage removes, tokens that the I-stage leaves."""


@dataclass(frozen=True)
class Stages:
    """Pruning layers of a model, in order.

    Attributes:
        layers: blocks before which they act, 0-based.
        iters: rounds of the I-stage.
        cuts: which of them have an I-stage whose share a budget decides.
    """

    layers: tuple[int, ...]
    iters: tuple[int, ...]
    cuts: tuple[bool, ...]


def stages_of(layers: Sequence[int | float] | None, iters: int | Sequence[int] | None, info: ModelInfo) -> Stages:
    """Resolve the pruning layers on a model.

    Args:
        layers: 0-based blocks before which tokens are pruned, or shares of the depth; None for the paper's, which
            fall together where a tower is shallow.
        iters: rounds of all or of each layer, None for the paper's by depth.
        info: the model.

    Raises:
        InputError: layers that do not increase or do not exist, or another number of rounds.
    """
    last, depth = info.vision_layer(-1), info.vision_depth or 0
    if last < 1:
        raise InputError(f"zero_tprune prunes between blocks, but only one block of {info.model_class} feeds the rest.")
    places = [k / PAPER_DEPTH for k in PAPER_LAYERS] if layers is None else layers
    found = tuple(_block(place, info, last) for place in places)
    if layers is None:
        inner = set(found[1:-1])
        found = tuple(dict.fromkeys(found))
        cuts = tuple(layer in inner for layer in found)
    else:
        cuts = tuple(len(found) < 3 or 0 < i < len(found) - 1 for i in range(len(found)))
    if any(b <= a for a, b in zip(found, found[1:], strict=False)):
        raise InputError(
            f"layers={layers} fall on blocks {found} of {info.model_class} ({depth} blocks), which do not increase; "
            "give explicit layers or fewer of them."
        )
    if iters is None:
        rounds = tuple(next(n for end, n in ITERS if layer / depth < end) for layer in found)
    else:
        rounds = for_each(iters, len(found), "iters")
    return Stages(found, rounds, cuts)


def _block(place: int | float, info: ModelInfo, last: int) -> int:
    """0-based block before which a layer acts."""
    if isinstance(place, float):
        return max(1, min(last, info.vision_layer(place) + 1))
    block = info.vision_layer(place)
    if block < 1:
        raise InputError(f"layers holds block {place}; nothing comes before block 0, give blocks from 1 to {last}.")
    return block


def for_each(values: Number | Sequence[Number], number: int, name: str) -> tuple[Number, ...]:
    """One value for each of ``number`` pruning layers.

    Raises:
        InputError: another number of values.
    """
    if isinstance(values, (int, float)):
        return (values,) * number
    if len(values) != number:
        raise InputError(f"{name} has {len(values)} entries for {number} pruning layers; give one for each.")
    return tuple(values)


def similar_count(n: int) -> int:
    """Tokens that an S-stage removes by default of a view that entered with ``n``."""
    return round(SIMILAR_SHARE * n)


def at_rates(n: int, rates: Sequence[float], similar: Sequence[int]) -> Counts:
    """What given keep rates and numbers of similar tokens leave of ``n`` tokens.

    Example:
        >>> [kept for _, kept in at_rates(196, DEIT_S_RATES, (10,) * 5)]
        [186, 158, 118, 75, 65]
    """
    counts = []
    for rate, wanted in zip(rates, similar, strict=True):
        removed = min(wanted, n // 2)
        n -= removed
        if rate < 1 and n:
            n = max(1, math.floor(rate * n))
        counts.append((removed, n))
    return tuple(counts)


@lru_cache(maxsize=256)
def to_count(n: int, count: int, cuts: tuple[bool, ...], similar: tuple[int, ...]) -> Counts:
    """What leaves ``count`` of ``n`` tokens: the stages that cut have one keep rate in common.

    Where the S-stages alone would remove more, they share what has to go, and nothing is cut.

    Example:
        >>> to_count(196, 65, (False, True, True, True, False), (10,) * 5)
        ((10, 186), (10, 140), (10, 104), (10, 75), (10, 65))
    """
    whole = (1.0,) * len(cuts)
    if at_rates(n, whole, similar)[-1][1] <= count:
        return at_rates(n, whole, spread_to(count, len(cuts), n))
    last = max(stage for stage, cut in enumerate(cuts) if cut)
    target = count
    for wanted in reversed(similar[last + 1 :]):
        target += min(wanted, target)  # a later S-stage takes at most half
    low, high = 0.0, 1.0
    for _ in range(40):
        rate = (low + high) / 2
        reached = at_rates(n, tuple(rate if cut else 1.0 for cut in cuts), similar)[last][1] >= target
        low, high = (low, rate) if reached else (rate, high)
    rates = tuple(high if cut else 1.0 for cut in cuts)
    before = at_rates(n, rates[:last], similar[:last])
    left = before[-1][1] if before else n
    removed = min(similar[last], left // 2)
    behind = at_rates(target, rates[last + 1 :], similar[last + 1 :])
    return (*before, (removed, target), *behind)


@lru_cache(maxsize=256)
def to_flops(info: ModelInfo, share: float, n: int, stages: Stages, similar: tuple[int, ...]) -> Counts:
    """The counts that leave most tokens and cost at most ``share`` of the dense tower, or that leave one token.

    Raises:
        BudgetError: the sizes of the tower are not known.
    """
    limit = share * pruned_flops(info, n, stages, ())
    low, high = 1, n + 1
    while high - low > 1:
        middle = (low + high) // 2
        cost = pruned_flops(info, n, stages, to_count(n, middle, stages.cuts, similar))
        low, high = (middle, high) if cost <= limit else (low, middle)
    return to_count(n, min(low, n), stages.cuts, similar)


def flops_missed(info: ModelInfo, budget: Budget, n: int, stages: Stages, counts: Counts) -> str | None:
    """Why a share of the FLOPs is not met by these counts, None if it is or none is asked for."""
    if budget.flops is None:
        return None
    share = pruned_flops(info, n, stages, counts) / pruned_flops(info, n, stages, ())
    if share <= budget.flops:
        return None
    return f"{budget} is out of reach: pruning before blocks {stages.layers} costs {share:.3f} of the dense tower"


def pruned_flops(info: ModelInfo, n: int, stages: Stages, counts: Counts) -> float:
    """FLOPs of a tower on a view of ``n`` tokens that is pruned before some blocks."""
    left, tokens = dict(zip(stages.layers, (kept for _, kept in counts), strict=False)), []
    for block in range(info.vision_depth or 0):
        n = left.get(block, n)
        tokens.append(n)
    return view_flops(info, tokens, tokens)
