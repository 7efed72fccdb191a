"""Zero-TPrune: tokens of a vision tower are ranked by PageRank on its attention, similar ones go first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from vlmprune.core.attention import AttentionHeads
from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.signals import HeadAttention, KeyMean, Keys, Signal
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.kernels.ordering import stable_topk
from vlmprune.kernels.pagerank import HeadFusion
from vlmprune.policies import _tower_schedule as schedules
from vlmprune.policies import _zero_tprune_plan as plans
from vlmprune.policies._merging import free_entered, free_lengths, host_counts, padding_mask, reach_notes
from vlmprune.policies._zero_tprune_importance import free_tokens, fuse, marked, start_scores
from vlmprune.policies._zero_tprune_plan import Counts, Stages
from vlmprune.policies._zero_tprune_settings import check_settings, each
from vlmprune.policies._zero_tprune_similarity import Metric, Partition, most_similar


@register("zero_tprune")
@dataclass(frozen=True)
class ZeroTPrune(Policy):
    """Drop tokens between blocks of the vision tower: similar ones, then those that the attention votes down.

    Paper: "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained
    Transformers", arXiv 2305.17328, CVPR 2024. The official code could not be read; this follows the paper.

    Acts before some blocks of the tower (the paper: after the block before it), on every view by itself; independent
    of the text. Needs that block's attention per head as a graph (``HeadAttention``) and its keys (``Keys``). A round
    of PageRank gives every token the attention that it gets, each row weighted by its token's score. Importance is the
    root mean square over the heads whose variance lies in a range. One round ranks the tokens (I'); the S-stage removes
    those of the less important half that most resemble one of the other half; the I-stage ranks the rest by more
    rounds on the attention among them, rows renormalised, and keeps the best. CLS, distillation and register tokens
    stay, the others in their order.

    Args:
        keep: share of a view's tokens that is left at the tower's exit, ``int(share * N)`` without CLS and the like, or
            a number of tokens per view, or ``"flops:0.6"``, a share of the FLOPs of the tower's blocks. It is
            solved for one keep rate common to all pruning layers but the first and last, where only the S-stage acts.
        preset: ``"deit_s"``: the paper's keep rates for DeiT-S, as far as they are known: 1, 0.9, 0.8, 0.7, 1.
        keep_rates: share of the tokens that each I-stage keeps, ``max(1, int(rate * n))``, in place of ``keep``: one
            for each pruning layer, or a number for all; 1 leaves the S-stage alone.
        s_prune: tokens that each S-stage removes, at most half of those there: a number, or one for each pruning
            layer. None: 5 % of the tokens that entered, the paper's 10 of 196. Fewer where ``keep`` asks for less.
        layers: 0-based blocks before which tokens are pruned (the paper: after the k-th block, counted from 1), or
            shares of the depth. None: the paper's 1, 3, 6, 9 and 11 of 12, at the same share of the depth elsewhere,
            at most the block that feeds the projector; those that fall together on a shallow tower are one.
        iters: rounds of each I-stage, a number or one for each pruning layer. None: 30 in the first quarter of the
            depth, 1 in the last, else 5.
        v_min: smallest variance of a head's scores (mean 1) over the tokens but CLS and the like that counts.
        v_max: largest one. Where no head passes, all count.
        cls_boost: CLS starts with ``sqrt(N)`` times the score of another token; False is "Zero-TPrune-uni".
        partition: halves of the S-stage by rank: ``"seq_u"``, the less important half (A) looks for partners in the
            more important one (B); ``"seq_i"``, the reverse; ``"alternate"``, A is every second; ``"random"``;
            ``"none"``, every token looks at all others.
        features: what is compared: ``"concat"``, the keys of all heads side by side, or ``"mean"`` over heads.
        metric: ``"cosine"``, or of the paper's ablation ``"dot"``, ``"euclidean"``, ``"manhattan"``.
        fusion: ``"rms"`` over heads, their plain ``"mean"``, or ``"scores"``: PageRank on the softmax of the heads'
            mean scores over ``tau``, as in the authors' early prototype (with ``tau=0.5, iters=5, cls_boost=False,
            s_prune=0`` and keep rates).
        tau: temperature of ``fusion="scores"``.
        seed: global seed of the random partition.

    Our decisions where the paper says nothing: scores have mean 1, for only then the published range of variances
    makes sense; rows of removed tokens are taken out; default layers, rates and rounds come from a secondary source;
    equal scores go to the lowest index; a token of several patches has the mean of their keys.

    Cost per pruning layer: ``2 H N^2`` FLOPs per round, or ``2 N^2 D`` where the attention is recomputed; ``N^2 D / 2``
    for the similarities.

    Example:
        >>> ZeroTPrune(preset="deit_s").rates(5)
        (1.0, 0.9, 0.8, 0.7, 1.0)
    """

    meta = PolicyMeta(
        title="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained "
        "Transformers",
        arxiv="2305.17328",
        venue="CVPR 2024",
        code_licence="not known",
    )
    basis = "final"
    takes_flops = True
    instead_of_keep = ("preset", "keep_rates")

    preset: Literal["deit_s"] | None = None
    keep_rates: float | tuple[float, ...] | None = None
    s_prune: int | tuple[int, ...] | None = None
    layers: tuple[int | float, ...] | None = None
    iters: int | tuple[int, ...] | None = None
    v_min: float = 0.01
    v_max: float = 0.7
    cls_boost: bool = True
    partition: Partition = "seq_u"
    features: Literal["concat", "mean"] = "concat"
    metric: Metric = "cosine"
    fusion: Literal["rms", "mean", "scores"] = "rms"
    tau: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep_rates", "s_prune", "layers", "iters"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        check_settings(vars(self), self.budget)

    @property
    def _given_rates(self) -> float | tuple[float, ...] | None:
        return plans.DEIT_S_RATES if self.preset else self.keep_rates

    @property
    def _rated(self) -> bool:
        """True if the settings name keep rates, False if ``keep`` decides."""
        return self._given_rates is not None

    def rates(self, number: int) -> tuple[float, ...]:
        """The given keep rates of so many pruning layers, 1 where none are given."""
        given = self._given_rates
        return plans.for_each(1.0 if given is None else given, number, "keep_rates")

    def stages(self, info: ModelInfo) -> Stages:
        """The pruning layers of a model, checked against the settings."""
        stages = plans.stages_of(self.layers, self.iters, info)
        self.rates(len(stages.layers))
        plans.for_each(self.s_prune or 0, len(stages.layers), "s_prune")
        return stages

    def plan(self, info: ModelInfo, budget: Budget, n: int) -> Counts:
        """Per pruning layer what goes as similar and how many are left, of ``n`` tokens that enter."""
        stages = self.stages(info)
        wanted = plans.similar_count(n) if self.s_prune is None else self.s_prune
        similar = plans.for_each(wanted, len(stages.layers), "s_prune")
        if self._rated:
            return plans.at_rates(n, self.rates(len(similar)), similar)
        if budget.flops is not None:
            return plans.to_flops(info, budget.flops, n, stages, similar)
        return plans.to_count(n, budget.count(n), stages.cuts, similar)

    @property
    def _finds_similar(self) -> bool:
        """True if some S-stage may remove tokens."""
        return self.s_prune is None or any(each(self.s_prune))

    def reduces(self, info: ModelInfo) -> bool:
        given = self._given_rates
        if given is None:
            return super().reduces(info)
        return self._finds_similar or min(each(given)) < 1

    def is_random(self, info: ModelInfo) -> bool:
        return self.partition == "random" and self._finds_similar

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        positions = self.resolve_positions(info)
        layers = self.stages(info).layers if self.reduces(info) else ()
        return tuple(SiteRequest(Site.VISION_BLOCK, layer, self._signals(layer), positions) for layer in layers)

    def _signals(self, layer: int) -> tuple[Signal, ...]:
        heads = HeadAttention(layer - 1)
        return (heads, self._features(layer)) if self._finds_similar else (heads,)

    def _features(self, layer: int) -> Signal:
        return Keys("vision", layer - 1) if self.features == "concat" else KeyMean(layer - 1)

    def check_count(self, info: ModelInfo) -> None:
        """See :meth:`vlmprune.core.policy.Policy.check_count`; also refuses FLOPs that no keep rate reaches."""
        super().check_count(info)
        schedules.check_windows(self.budget, info)
        n = schedules.fixed_tokens(info)
        reason = None if self._rated or self.budget.is_all else self.shortfall(info, self.budget, n or 1)
        if n is not None and reason is not None:
            raise BudgetError(f"{reason}; ask for more than that, or begin to prune in earlier layers.")

    def shortfall(self, info: ModelInfo, budget: Budget, n: int) -> str | None:
        """What keeps a share of the FLOPs from being met on ``n`` tokens, None if nothing does."""
        return plans.flops_missed(info, budget, n, self.stages(info), self.plan(info, budget, n))

    def head_scores(self, context: Context, iters: int, alive: Tensor | None = None) -> Tensor:
        """PageRank scores of every head, ``[I, H, N]``; rows and columns of tokens not ``alive`` are taken out."""
        heads: AttentionHeads = context.signal(HeadAttention((context.layer or 0) - 1))
        if self.fusion == "scores":
            heads = heads.mean_scores(self.tau)
        start = start_scores(context, context.valid if alive is None else alive, self.cls_boost)
        return heads.pagerank(iters, start, alive)

    def importance(self, context: Context, iters: int, alive: Tensor | None = None) -> HeadFusion:
        """Importance ``[I, N]`` after some rounds, with the heads that count and their variances."""
        scores = self.head_scores(context, iters, alive)
        alive = context.valid if alive is None else alive
        return fuse(context, scores, alive, self.v_min, self.v_max, self.fusion == "mean")

    def similar(self, context: Context, importance: Tensor, n: Sequence[int], remove: Sequence[int]) -> Tensor:
        """What the S-stage removes, ``[I, R]``, most similar first, -1 fill.

        Args:
            importance: ``[I, N]`` that ranks the tokens (I').
            n: tokens of each item that take part.
            remove: how many of them go.
        """
        ranked = stable_topk(importance, max(n), free_tokens(context))
        features = context.signal(self._features(context.layer or 0))
        return most_similar(context, features, ranked, n, remove, self.partition, self.metric)

    def select_vision_block(self, context: Context) -> Selection:
        """One pruning layer: I', S-stage, I-stage."""
        free = free_tokens(context)
        n = free_lengths(context) if context.pinned is None else tuple(free.sum(1).tolist())
        stages = self.stages(context.info)
        stage, last = stages.layers.index(context.layer or 0), len(stages.layers) - 1
        remove, keep = zip(*self._counts(context, stage, n), strict=True)
        alive, scores = padding_mask(context), None
        if any(remove):
            scores = self.importance(context, 1, alive).importance
            alive = context.valid & ~marked(self.similar(context, scores, n, remove), context.width)
        left = context.valid if alive is None else alive
        if any(k < now - gone for k, now, gone in zip(keep, n, remove, strict=True)):
            scores = self.importance(context, stages.iters[stage], alive).importance
            best = stable_topk(scores, host_counts(keep, context.device), free & left)
            left = marked(best, context.width) | (context.valid & ~free)
        counts = tuple(length - now + k for length, now, k in zip(context.lengths, n, keep, strict=True))
        selection = Selection.from_mask(left, counts, scores)
        last_chosen = stage == last and not self._rated
        notes = reach_notes(context, self.name, self.shortfall, counts) if last_chosen else ()
        return replace(selection, notes=notes)

    def _counts(self, context: Context, stage: int, n: Sequence[int]) -> Counts:
        """What the S-stage removes and the I-stage leaves of the ``n`` tokens of each item that may go."""
        entered, counts = free_entered(context), []
        plan = {number: self.plan(context.info, context.budget, number) for number in set(entered)}
        for now, there, number in zip(n, free_lengths(context), entered, strict=True):
            planned = plan[number]
            removed, kept = min(planned[stage][0], now // 2), planned[stage][1] - (there - now)
            if self._rated:  # a share of what is there, which need not be what the plan expects
                kept = plans.at_rates(now, self.rates(len(planned))[stage : stage + 1], (removed,))[0][1]
            counts.append((removed, min(now - removed, max(min(1, now), kept))))
        return tuple(counts)
