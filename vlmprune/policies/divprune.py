"""DivPrune: a set of tokens in which no two are alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from vlmprune.core.bases import SingleSitePolicy
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Projected, Signal
from vlmprune.kernels.kcenter import greedy_select
from vlmprune.kernels.kcenter.rows import unit_rows
from vlmprune.kernels.precision import compute_dtype, precise_matmul

# Similarities computed at once while the first token is sought.
BLOCK_VALUES = 1 << 24


@register("divprune")
@dataclass(frozen=True)
class DivPrune(SingleSitePolicy):
    """Keep tokens that are far from one another: each pick is the farthest from those before.

    Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175,
    CVPR 2025. Official code: CC BY-NC 4.0.

    Acts before the LLM on the projected features, with the cosine distance. The first token is the one whose
    nearest neighbour is farthest away; then, one by one, the token with the largest distance to its nearest
    kept one (the greedy answer to the paper's max-min diversity problem). All views of an image, and all
    frames of a video, form one set with one budget. Independent of the text.

    Args:
        keep: K = round(share * N), halves to the even side, at least 1; or a number of tokens per image. The
            paper keeps 0.098 (56 of 576).
        newline: what newline tokens of any-resolution images are: ``"compete"``, candidates like all others
            as in the official code (they are equal vectors, so one of them is kept and rarely a second), or
            ``"protect"``, all kept outside the budget.

    Deviations from the official code: exactly K distinct tokens are kept, where it may take one of several
    equal tokens again and then feeds it twice; each image of a prompt has its own set; ties go to the lowest
    index; a zero row has distance 1 to every other.

    Cost: ``2 N^2 D`` FLOPs for the first token and ``2 K N D`` for the others, in blocks of bounded memory.

    Example:
        >>> DivPrune(keep=0.098).budget.count(576, DivPrune.rounding)
        56
    """

    meta = PolicyMeta(
        title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        arxiv="2503.02175",
        venue="CVPR 2025",
        code_licence="CC BY-NC 4.0",
    )
    rounding = "round"
    newlines = "compete"

    newline: Literal["compete", "protect"] = "compete"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.newline not in ("compete", "protect"):
            raise InputError(f"newline={self.newline!r} is unknown; give 'compete' or 'protect'.")

    def signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        return (Projected(),)

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float | None:
        if info.text_hidden is None or n_kept in (0, n_tokens):
            return None
        return float((2 * n_tokens + 2 * n_kept + 3) * n_tokens * info.text_hidden)

    def order(self, context: Context) -> Tensor:
        """Tokens ``[I, K]`` in the order in which they are picked, -1 fill; protected newlines are not among them."""
        context = self._protected(context)
        features, candidates = context.signal(Projected()), context.candidates
        picked = greedy_select(
            features,
            list(context.counts(self.rounding)),
            metric="cosine",
            objective="min_max",
            start="score",
            start_score=isolation(features, candidates),
            valid=candidates,
        )
        return picked.indices

    def decide(self, context: Context) -> Selection:
        context = self._protected(context)
        chosen = Selection.from_order(self.order(context), context.width, context.counts(self.rounding))
        if self.newline == "compete" or not any(context.newlines):
            return chosen
        assert context.pinned is not None and chosen.kept is not None and chosen.counts is not None
        place = torch.where(chosen.kept < 0, context.width, chosen.kept)
        mask = torch.nn.functional.pad(context.pinned, (0, 1)).scatter(1, place, True)[:, :-1]
        counts = tuple(n + len(rows) for n, rows in zip(chosen.counts, context.newlines, strict=True))
        return Selection.from_mask(mask, counts)

    def _protected(self, context: Context) -> Context:
        """The context whose newline tokens are no candidates, where they are protected."""
        if self.newline == "compete" or not any(context.newlines):
            return context
        pinned = torch.zeros(context.valid.shape, dtype=torch.bool)
        for item, rows in enumerate(context.newlines):
            pinned[item, [newline.place for newline in rows]] = True
        return replace(context, pinned=pinned.to(context.device, non_blocking=True))


def isolation(features: Tensor, valid: Tensor) -> Tensor:
    """Cosine distance of every token to its nearest other one.

    Args:
        features: ``[I, N, D]``.
        valid: ``[I, N]`` bool, tokens that count.

    Returns:
        ``[I, N]`` in float32 or wider; infinite for a token that is alone.
    """
    points = unit_rows(features.to(compute_dtype(features)))
    items, n, _ = points.shape
    block = max(1, BLOCK_VALUES // max(1, items * n))
    nearest = []
    for start in range(0, n, block):
        similarity = precise_matmul(points[:, start : start + block], points.mT)  # [I, block, N]
        itself = torch.arange(start, start + similarity.shape[1], device=points.device)
        similarity.scatter_(2, itself.expand(items, -1)[..., None], -torch.inf)
        nearest.append(similarity.masked_fill(~valid[:, None], -torch.inf).argmax(2))
    index = torch.cat(nearest, 1)
    # Taken again pair by pair, so that two tokens that are each other's nearest get equal distances.
    neighbour = points.gather(1, index[..., None].expand_as(points))
    distance = 1 - (points * neighbour).sum(-1)
    same = (points == neighbour).all(-1) & (points != 0).any(-1)
    distance = distance.masked_fill(same, 0.0).clamp_min(0.0)
    alone = valid.sum(1, keepdim=True) < 2
    return distance.masked_fill(alone, torch.inf)
