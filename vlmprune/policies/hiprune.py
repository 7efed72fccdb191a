"""HiPrune: anchors and their neighbours from a middle block, registers from a deep one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.core.bases import SetPolicy
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.signals import ColumnMass, Signal
from vlmprune.core.views import ViewGroup, on_device, split_equal
from vlmprune.kernels.ordering import stable_topk

# The paper's object layers as shares of depth: blocks 9 of 24 (CLIP ViT-L) and 16 of 32 (Qwen2.5-VL), from 1.
CLIP_OBJECT_SHARE = 9 / 24
QWEN_OBJECT_SHARE = 16 / 32


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(SetPolicy):
    """Keep what a middle vision block looks at, the neighbours of that, and what a deep block looks at.

    Paper: "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
    arXiv 2508.00553, AAAI 2026 student abstract. Official code: MIT licence.

    Acts once per view after the vision encoder. A pure selection, independent of the text. Needs the
    attention that each token receives (``ColumnMass``, mean over heads) in two vision blocks, not the CLS
    row.

    With K tokens per view: ``k_a = round(K alpha / 5)`` anchors have the highest object score; their four
    neighbours in the flat order (buffers) join them; the rest up to K (registers) have the highest deep
    score. Exactly K stay.

    Args:
        keep: K = round(share * N) per view (half to even), or a number N' of tokens per image, of which each
            of the n views of an any-resolution image gets ``int(N' / n)`` as in the paper (what a small view
            cannot take goes to the others; with fewer tokens than views the first views get one each).
        alpha: share of the budget for anchors and buffers (alpha, 0.1), in [0, 1].
        object_layer: 0-based block of the object score (the paper's l, which counts from 1), or a share of
            depth. None: the paper's block, carried over as a share of depth: the 9th of 24 (0-based 8), on
            Qwen models (multi-axis positions) the 16th of 32; on a shallow tower at most the block before the
            deep one.
        deep_layer: 0-based block of the deep score; -1 is the block whose output feeds the projector.
        buffer: ``"code"`` takes the flat neighbours i-1, i+1, i-W, i+W clamped to the grid, as the official
            code does: the left neighbour of column 0 is the end of the row above. ``"grid"`` takes true
            neighbours only.
        compat: ``"official"`` excludes anchors and buffers from the registers by subtracting 1 from their
            deep score. With the sums of Qwen models (above 1) such a token may be chosen twice, so that fewer
            than K stay.

    Deviations from the official code: registers exclude anchors and buffers strictly (switch ``compat``);
    when anchors and buffers alone exceed K, anchors come first, then the buffers of the strongest anchor
    (left, right, up, down), and so on, where the official code fails; ties go to the lowest index; an
    any-resolution image keeps the model's layout. Every frame or temporal slice of a video counts as a view.

    Cost per view: two column masses, ``4 H T^2 d_head`` FLOPs each, in O(T) memory; selection O(N log N).

    Example:
        >>> HiPrune(keep=192, alpha=0.1).n_anchors(192)
        4
    """

    meta = PolicyMeta(
        title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
        arxiv="2508.00553",
        venue="AAAI 2026 student abstract",
        code_licence="MIT",
    )
    rounding = "round"

    alpha: float = 0.1
    object_layer: int | float | None = None
    deep_layer: int | float = -1
    buffer: Literal["code", "grid"] = "code"
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha} is out of range; give the share for anchors and buffers in [0, 1].")
        if self.buffer not in ("code", "grid"):
            raise InputError(f"buffer={self.buffer!r} is unknown; give 'code' or 'grid'.")
        if self.compat not in (None, "official"):
            raise InputError(f"compat={self.compat!r} is unknown; give 'official' or None.")

    def signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        return self.score_signals(info)

    def score_signals(self, info: ModelInfo) -> tuple[ColumnMass, ColumnMass]:
        """The signals of the object and the deep score."""
        qwen = info.mrope
        deep = info.vision_layer(self.deep_layer)
        if self.object_layer is not None:
            middle = info.vision_layer(self.object_layer)
        else:
            middle = info.vision_layer(QWEN_OBJECT_SHARE if qwen else CLIP_OBJECT_SHARE)
            middle = min(middle, max(0, deep - 1))
        reduce: Literal["mean", "sum"] = "sum" if qwen else "mean"
        return ColumnMass("vision", middle, reduce), ColumnMass("vision", deep, reduce)

    def reduces(self, info: ModelInfo) -> bool:
        return self.compat == "official" or super().reduces(info)

    @property
    def exact(self) -> bool:
        return self.compat is None

    def view_counts(self, context: Context) -> tuple[tuple[int, ...], ...]:
        rows = []
        for item in range(context.n_items):
            budget, lengths = context.item_budget(item), [view.length for view in context.item_views(item)]
            if budget.tokens is None:
                rows.append(tuple(budget.count(n, self.rounding) for n in lengths))
                continue
            n_views, total = len(lengths), min(budget.tokens, sum(lengths))
            if n_views <= total < sum(lengths):
                total -= total % n_views  # int(N' / n) per view
            rows.append(tuple(split_equal(total, lengths)))
        return tuple(rows)

    def shown_scores(self, context: Context) -> Tensor:
        return context.signal(self.score_signals(context.info)[1])

    def n_anchors(self, count: int) -> int:
        """Anchors among ``count`` kept tokens."""
        return round(count * self.alpha / 5)

    def pick(self, context: Context, group: ViewGroup) -> Tensor:
        signals = self.score_signals(context.info)
        middle, deep = (group.gather(context.signal(signal)).float() for signal in signals)  # [V, n]
        views, n = deep.shape
        anchors = stable_topk(middle, self.n_anchors(group.count))  # [V, k_a]
        # Anchors and buffers by priority; n stands for none.
        wanted = torch.cat([anchors, self._buffers(anchors, group)], 1)
        last = wanted.shape[1]
        priority = torch.arange(last, device=deep.device).expand(views, last)
        first = priority.new_full((views, n + 1), last).scatter_reduce(1, wanted, priority, "amin")[:, :n]
        chosen = first < last  # the set U of anchors and buffers
        # Rank of every token: U by priority, then all others by deep score.
        rank = torch.where(chosen, first, last + _ranks(deep))
        kept = rank.topk(group.count, dim=1, largest=False).indices
        return kept if self.compat is None else self._official(kept, chosen, deep)

    def _buffers(self, anchors: Tensor, group: ViewGroup) -> Tensor:
        """Neighbours ``[V, 4 k_a]``: left, right, up and down of the first anchor, then of the second, ..."""
        n, width = group.height * group.width, group.width
        step = on_device([-1, 1, -width, width], anchors.device)
        neighbours = anchors[..., None] + step  # [V, k_a, 4]
        if self.buffer == "code":
            return neighbours.clamp(0, n - 1).flatten(1)
        column = (anchors % width)[..., None]
        inside = (neighbours >= 0) & (neighbours < n)
        inside &= torch.cat([column > 0, column < width - 1, inside[..., 2:]], -1)
        return torch.where(inside, neighbours, n).flatten(1)

    def _official(self, strict: Tensor, chosen: Tensor, deep: Tensor) -> Tensor:
        """The official code's union, which may hold fewer than K tokens; -1 fill. ``strict`` where U exceeds
        K."""
        count, n = strict.shape[1], deep.shape[1]
        n_chosen = chosen.sum(1, keepdim=True)
        union = chosen | (_ranks(deep - chosen.float()) < count - n_chosen)
        index = torch.arange(n, device=deep.device)
        kept = torch.where(union, index, n).sort(1).values[:, :count]
        return torch.where(n_chosen > count, strict, torch.where(kept == n, -1, kept))


def _ranks(scores: Tensor) -> Tensor:
    """Place of every token ``[V, n]`` in the order of falling scores, lowest index first on ties."""
    order = stable_topk(scores, scores.shape[1])
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
