"""ToMe: tokens of a vision tower that resemble each other become one, a few in every block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal

from torch import Tensor

from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.signals import KeyMean
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.policies import _merging as merging
from vlmprune.policies import _tower_schedule as schedules
from vlmprune.policies._tome_ablations import match_kth, match_random
from vlmprune.policies._tower_schedule import Taken


@register("tome")
@dataclass(frozen=True)
class ToMe(Policy):
    """Merge the most similar pairs of tokens in every block of the vision tower.

    Paper: "Token Merging: Your ViT But Faster", arXiv 2210.09461, ICLR 2023. Official code: CC BY-NC 4.0.

    Acts in the middle of the tower's blocks, between attention and MLP, on every view by itself; independent of the
    text. Needs the keys of the block's own attention, mean over heads (``KeyMean``). Tokens at even positions look for
    the most similar one at odd positions, by cosine; the r best pairs become their mean, weighted by the tokens that
    each stands for. Later attention adds ``log(size)`` to the scores of a merged token's key. CLS, distillation and
    register tokens neither merge nor move. A block merges at most half of its other tokens.

    Args:
        keep: share of a view's tokens that is left at the tower's exit, ``int(share * N)`` without CLS and the like (in
            a tower with windows of each window, at least one), or a number of tokens per view, or ``"flops:0.6"``, a
            share of the FLOPs of the tower's blocks. It is solved for the most even schedule over the blocks that feed
            the projector, a remainder on the first ones; where late blocks would have to merge more than half, the
            earlier ones merge more. In place of ``r``.
        first_blocks: with ``keep``, only so many blocks from the first on merge; None: all that feed the projector.
            Fewer save more time for the same ``keep`` and lose more: they merge more pairs that differ.
        r: tokens merged per block of a view (r): one number, or a list with one number per block, zeros where it ends.
            ``(r, inflect)`` with a float sets both. In a tower that attends in windows, r is per window.
        inflect: tilts one number r over the blocks: -1 falls from ``2 r`` to 0, 1 rises from 0 to ``2 r``.
        prop_attn: proportional attention: add ``log(size)`` to the keys' scores. The authors turn it off for MAE
            models that were not trained with merging.
        order: ``"tome"``: tokens left at even positions first, then those at odd ones, which decides the next block's
            halves and is part of the method; ``"original"`` keeps the order of the view and merges other pairs.
        matching: ``"bipartite"``, or one of two ablations of the official code: ``"random"`` draws the r tokens that
            merge; ``"kth"`` merges in each block with a positive r all but the last of every ``k`` tokens into their
            best partners, and drops the ``N mod k`` tokens behind the last group.
        k: stride of ``"kth"``, from 2.
        seed: global seed of ``"random"``.

    Deviations from the official code: similarities are compared in float32; equal ones go to the lowest index; padding
    and pinned tokens take part in nothing; LayerScale and norms of queries and keys stay in place (the official
    patch leaves them out); ``"kth"`` and ``"random"`` leave CLS and the like alone. A token of several patches (2 x 2
    mergers) is matched by the keys of all of them. ``keep`` is ours.

    Cost per block: ``N^2 d_head / 2`` FLOPs for the similarities, O(N D) for the mean.

    Example:
        >>> ToMe(r=(16, -1.0)).schedule(4), ToMe(r=[8, 7]).schedule(4)
        ((32, 21, 10, 0), (8, 7, 0, 0))
    """

    meta = PolicyMeta(
        title="Token Merging: Your ViT But Faster",
        arxiv="2210.09461",
        venue="ICLR 2023",
        code_licence="CC BY-NC 4.0",
    )
    basis = "final"
    takes_flops = True
    instead_of_keep = ("r",)

    first_blocks: int | None = None
    r: int | tuple[int, ...] | tuple[int, float] | None = None
    inflect: float = 0.0
    prop_attn: bool = True
    order: Literal["tome", "original"] = "tome"
    matching: Literal["bipartite", "kth", "random"] = "bipartite"
    k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read_r()
        if not -1 <= self.inflect <= 1 or (self.inflect and not isinstance(self.r, int)):
            raise InputError(f"inflect={self.inflect} tilts a single r; give a number in [-1, 1] beside one r.")
        if self.order not in ("tome", "original"):
            raise InputError(f"order={self.order!r} is unknown; give 'tome' or 'original'.")
        if self.matching not in ("bipartite", "kth", "random"):
            raise InputError(f"matching={self.matching!r} is unknown; give 'bipartite', 'kth' or 'random'.")
        first = self.first_blocks
        if first is not None and (type(first) is not int or first < 1 or self.r is not None):
            raise InputError(f"first_blocks={first} goes with keep, not with r, and is a whole number from 1.")
        if (self.k is not None) != (self.matching == "kth") or (self.k is not None and self.k < 2):
            raise InputError(
                f"k={self.k} does not fit matching={self.matching!r}; 'kth' needs a k from 2, others none."
            )
        if self.matching == "kth" and self.r is None:
            raise InputError("matching='kth' needs r: it merges in the blocks whose r is positive, such as r=[1].")
        if self.budget.parts is not None:
            raise BudgetError(
                f"tome takes one budget for all blocks and views, not {self.budget}; for numbers per block "
                "give r as a list."
            )

    def _read_r(self) -> None:
        """Check ``r`` and split ``(r, inflect)``."""
        r = self.r
        if r is None:
            return
        if not self.budget.is_all:
            raise InputError(f"r={r} and {self.budget} both say how much is merged; give one of them.")
        if isinstance(r, (tuple, list)) and len(r) == 2 and isinstance(r[1], float) and not self.inflect:
            object.__setattr__(self, "inflect", r[1])
            r = r[0]
        numbers = r if isinstance(r, (tuple, list)) else (r,)
        if not numbers or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 0 for n in numbers):
            raise InputError(
                f"r={r} is no schedule; give tokens per block as one number, a list of numbers from 0, or "
                "(r, inflect) with a float in [-1, 1]."
            )
        object.__setattr__(self, "r", int(r) if isinstance(r, Integral) else tuple(int(n) for n in numbers))

    def schedule(self, blocks: int) -> Taken:
        """What ``r`` asks of each of a tower's blocks, zeros without ``r``."""
        return schedules.tome_schedule(0 if self.r is None else self.r, blocks, self.inflect)  # type: ignore[arg-type]

    def reduces(self, info: ModelInfo) -> bool:
        if self.r is None:
            return super().reduces(info)
        return self.r > 0 if isinstance(self.r, int) else any(self.r)

    def is_random(self, info: ModelInfo) -> bool:
        return self.matching == "random"

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        if not self.reduces(info):
            return ()
        positions = self.resolve_positions(info)
        return tuple(
            SiteRequest(
                Site.VISION_BLOCK, block, (KeyMean(block),), positions, place="middle", size_bias=self.prop_attn
            )
            for block in self.blocks(info)
        )

    def blocks(self, info: ModelInfo) -> tuple[int, ...]:
        """The blocks that merge; none behind the one that feeds the projector."""
        n = schedules.fixed_tokens(info)
        if self.r is not None:
            taken = self.schedule(info.vision_depth or 0)[: info.vision_layer(-1) + 1]
        elif n is not None:
            taken = self.plan(info, self.budget, n)
        else:
            return tuple(range(self._merging(info)))
        return tuple(block for block, number in enumerate(taken) if number > 0)

    def _merging(self, info: ModelInfo) -> int:
        """Blocks over which a budget is spread."""
        feeding = info.vision_layer(-1) + 1
        return feeding if self.first_blocks is None else min(self.first_blocks, feeding)

    def plan(self, info: ModelInfo, budget: Budget, n: int) -> Taken:
        """The schedule that a budget means for ``n`` tokens, over the blocks that merge."""
        blocks = self._merging(info)
        if budget.flops is not None:
            return schedules.spread_to_flops(budget.flops, info, blocks, n)
        return schedules.spread_to(budget.count(n), blocks, n)

    def shortfall(self, info: ModelInfo, budget: Budget, n: int) -> str | None:
        """What keeps a budget from being met on ``n`` tokens, None if nothing does."""
        taken = self.plan(info, budget, n)
        left = n - sum(taken)
        if budget.flops is not None:
            share = schedules.merged_flops(info, taken, n) / schedules.merged_flops(info, (), n)
            if share <= budget.flops:
                return None
            least = f"cost {share:.3f} of the dense tower's FLOPs"
        elif left <= budget.count(n):
            return None
        else:
            least = f"leave {left} of {n} tokens"
        blocks = "the one block" if len(taken) == 1 else f"{len(taken)} blocks"
        more = "" if self.first_blocks is None else f" (first_blocks={self.first_blocks} leaves the others out)"
        return f"{budget} is out of reach: {blocks} of {info.model_class} that merge half each {least}{more}"

    def check_count(self, info: ModelInfo) -> None:
        """See :meth:`vlmprune.core.policy.Policy.check_count`; also refuses budgets that no schedule reaches."""
        super().check_count(info)
        if self.r is not None or self.budget.is_all:
            return
        schedules.check_windows(self.budget, info)
        if self.budget.flops is not None:
            schedules.merged_flops(info, (), 1)  # the sizes must be known
        n = schedules.fixed_tokens(info)
        reason = None if n is None else self.shortfall(info, self.budget, n)
        if reason is not None:
            raise BudgetError(f"{reason}; ask for more than that, or reduce the tokens behind the encoder as well.")

    def wanted(self, context: Context) -> tuple[int, ...]:
        """Tokens that the schedule takes from each item in this block."""
        info, block = context.info, context.layer or 0
        if self.r is not None:
            return (self.schedule(info.vision_depth or 0)[block],) * context.n_items
        entered = merging.free_entered(context)
        taken = {n: self.plan(info, context.budget, n)[block] for n in set(entered)}
        return tuple(taken[n] for n in entered)

    def select_vision_block(self, context: Context) -> Selection:
        """Merge in one block."""
        free = merging.free_lengths(context)
        taken = tuple(min(r, n // 2) for r, n in zip(self.wanted(context), free, strict=True))
        if not any(taken):
            return self._noted(context, Selection.keep_all(context.valid, context.lengths))
        metric: Tensor = context.signal(KeyMean(context.layer or 0))
        if self.matching == "kth":
            match, taken = match_kth(context, metric, self.k or 2, self.order)
        elif self.matching == "random":
            match = match_random(context, metric, taken, self.order)
        else:
            match = merging.match_halves(context, metric, taken, order=self.order)
        if context.pinned is None:
            counts = tuple(n - gone for n, gone in zip(context.lengths, taken, strict=True))
        else:
            counts = tuple(match.counts.tolist())  # which tokens are pinned only the device knows
        return self._noted(context, merging.merge_selection(context, match, counts))

    def _noted(self, context: Context, selection: Selection) -> Selection:
        """The last block says which budgets were out of reach."""
        if self.r is not None or context.layer != self._merging(context.info) - 1:
            return selection
        return replace(selection, notes=merging.reach_notes(context, self.name, self.shortfall, selection.out_counts()))

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float | None:
        """Mean and norm of the keys, cosines of the two halves, and the merged features."""
        if info.vision_hidden is None or info.vision_heads is None:
            return None
        width = info.vision_hidden * info.merge_unit
        channels = width // info.vision_heads
        cosines = 2 * (n_tokens - n_tokens // 2) * (n_tokens // 2) * channels
        return float(n_tokens * (3 * width + 3 * channels) + cosines) if n_kept < n_tokens else 0.0
