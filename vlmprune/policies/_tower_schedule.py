"""How many tokens each block of a vision tower takes away: the schedules of ToMe and DyMU, and budgets turned into one.

Counts leave the tower's prefix tokens (CLS, ...) out: n free tokens enter, and a block merges at most half of what it
gets. All of it is arithmetic on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

from vlmprune.core.budget import Budget
from vlmprune.core.errors import BudgetError
from vlmprune.core.flops import tower_flops
from vlmprune.core.info import ModelInfo

Schedule = Literal["constant", "linear", "reverse_linear"]
Taken = tuple[int, ...]
"""Tokens that each block takes away."""


def tome_schedule(r: int | Sequence[int], blocks: int, inflect: float = 0.0) -> Taken:
    """ToMe's schedule: ``r`` in every block, tilted by ``inflect``, or a list padded with zeros.

    Args:
        r: tokens per block, or one number per block; of a longer list the first ``blocks`` count.
        blocks: of the tower.
        inflect: with one ``r``: -1 falls from ``2 r`` to 0, 0 is constant, 1 rises from 0 to ``2 r``.

    Example:
        >>> tome_schedule(16, 4, -1.0), tome_schedule((8, 7), 4)
        ((32, 21, 10, 0), (8, 7, 0, 0))
    """
    if not isinstance(r, int):
        return (*r, *(0,) * blocks)[:blocks]
    low = int(r * (1 - inflect))
    high = 2 * r - low
    step = (high - low) / (blocks - 1) if blocks > 1 else 0.0
    return tuple(int(low + step * block) for block in range(blocks))


def spread(total: int, blocks: int) -> Taken:
    """``total`` over all blocks evenly, the remainder on the first ones."""
    each, more = divmod(total, blocks)
    return tuple(each + (block < more) for block in range(blocks))


def falling(total: int, blocks: int) -> Taken:
    """``total`` by DyMU's linear schedule: from twice the mean down by equal steps, the rest in one block, then 0."""
    first = 2 * total // blocks
    step = first / blocks
    taken: list[int] = []
    while len(taken) < blocks - 1 and sum(taken) + int(first - len(taken) * step) < total:
        taken.append(int(first - len(taken) * step))
    taken.append(total - sum(taken))
    return (*taken, *(0,) * (blocks - len(taken)))


def dymu_schedule(kind: Schedule, total: int, blocks: int) -> Taken:
    """``total`` tokens over the blocks by one of DyMU's schedules.

    Example:
        >>> [dymu_schedule(kind, 20, 6) for kind in ("constant", "linear", "reverse_linear")]
        [(4, 4, 3, 3, 3, 3), (6, 5, 4, 3, 2, 0), (0, 2, 3, 4, 5, 6)]
    """
    if kind == "constant":
        return spread(total, blocks)
    taken = falling(total, blocks)
    return taken if kind == "linear" else taken[::-1]


def capped(schedule: Sequence[int], n: int) -> Taken:
    """What a schedule really takes from ``n`` free tokens: at most half of those that reach a block."""
    taken = []
    for wanted in schedule:
        taken.append(max(0, min(wanted, n // 2)))
        n -= taken[-1]
    return tuple(taken)


@lru_cache(maxsize=256)
def spread_to(count: int, blocks: int, n: int) -> Taken:
    """The most even schedule that leaves ``count`` of ``n`` free tokens, or as few as the blocks can leave.

    Where late blocks have too few tokens to halve, the earlier ones take more.

    Example:
        >>> spread_to(40, 4, 100), spread_to(4, 4, 100), spread_to(4, 4, 1000)[-1]
        ((15, 15, 15, 15), (50, 25, 12, 6), 62)
    """
    return _least(lambda taken: n - sum(taken) <= count, blocks, n)


@lru_cache(maxsize=256)
def spread_to_flops(share: float, info: ModelInfo, blocks: int, n: int) -> Taken:
    """The most even schedule of merges in the middle of blocks whose tower costs at most ``share`` of the dense one,
    or as little as the blocks can.

    Raises:
        BudgetError: the sizes of the tower are not known.
    """
    limit = share * merged_flops(info, (), n)
    return _least(lambda taken: merged_flops(info, taken, n) <= limit, blocks, n)


def merged_flops(info: ModelInfo, taken: Sequence[int], n: int) -> float:
    """FLOPs of a tower in which each block merges so many tokens behind its attention."""
    left = [n]
    for number in taken:
        left.append(left[-1] - number)
    return view_flops(info, left[:-1] or left, left[1:] or left)


def view_flops(info: ModelInfo, attended: Sequence[int], passed: Sequence[int]) -> float:
    """FLOPs of the tower for one view, or one window, of so many free tokens in each block's attention and MLP.

    Later blocks work on what the last one named passes on. Tokens made of several patches count as these. Of a window,
    blocks that attend to whole views count with its share of that attention.

    Raises:
        BudgetError: the sizes of the tower are not known.
    """
    depth = info.vision_depth or 0
    pairs = [*zip(attended, passed, strict=True), *[(passed[-1], passed[-1])] * depth][:depth]
    patches = [[info.prefix_tokens + info.merge_unit * n for n in pair] for pair in pairs]
    found = tower_flops(info, [first for first, _ in patches], [second for _, second in patches])
    if found is None:
        raise BudgetError(
            f"The sizes of the vision tower of {info.model_class} are not known, so no schedule can be solved for a "
            "share of its FLOPs; give a share or a number of tokens."
        )
    whole = [pair[0] for block, pair in enumerate(patches) if block in (info.full_attention_blocks or ())]
    return found + 4 * (info.view_windows - 1) * (info.vision_hidden or 0) * sum(n * n for n in whole)


def view_tokens(info: ModelInfo) -> int | None:
    """Free tokens of a view as it enters the tower, where the config fixes the grid."""
    return None if info.grid is None or info.any_size else info.grid[0] * info.grid[1] // info.merge_unit


def fixed_tokens(info: ModelInfo) -> int | None:
    """Free tokens of every item as it enters the tower, None where pictures differ or windows split a view."""
    return view_tokens(info) if info.full_attention_blocks is None else None


def check_windows(budget: Budget, info: ModelInfo) -> None:
    """Refuse a number of tokens per view where a view's windows are reduced one by one."""
    if budget.tokens is not None and info.full_attention_blocks is not None:
        raise BudgetError(
            f"{info.model_class} attends in windows, each of which is reduced by itself; give a share, not {budget}."
        )


def _least(enough: Callable[[Taken], bool], blocks: int, n: int) -> Taken:
    """The capped even schedule with the smallest total that is enough, or the largest one.

    One more in one block takes one more token from the view or, where the caps bind, none: no count is left out.
    """
    low, high = 0, blocks * (n // 2)
    while low < high:
        middle = (low + high) // 2
        if enough(capped(spread(middle, blocks), n)):
            high = middle
        else:
            low = middle + 1
    return capped(spread(low, blocks), n)
