"""FastV: one cut after the first decoder layers, by the attention that image tokens receive there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.core.bases import ScorePolicy, keep_highest
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.image_counts import current_image_lengths, sample_counts
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.signals import AttentionRows, ColumnMass, Signal
from vlmprune.core.sites import Site


@register("fastv")
@dataclass(frozen=True)
class FastV(ScorePolicy):
    """Drop the image tokens to which the prompt's last token pays the least attention in an early decoder layer.

    Paper: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large
    Vision-Language Models", arXiv 2403.06764, ECCV 2024. Official code: no licence file.

    Acts once, before decoder layer K, at prefill. Needs one row of layer K-1's attention (mean over heads):
    that of the last token of the prompt, on the image tokens. Layers before K store keys and values of all
    tokens, later ones those of the survivors.

    Args:
        keep: share of the image tokens that stays from layer K on (1 - R), k = round(share * N), half to even
            and at least 1, or a number of tokens per image. N counts all image tokens of the prompt, crops
            and newline tokens too. Averaged over L layers (K N + (L - K) k) / L tokens stay.
        layer: K, the number of dense layers = the 0-based layer before which tokens are dropped, at least 1;
            or a share of the depth (nearest, at least 1). Default: the paper's 2 of 32 layers.
        score: ``"last"`` ranks by the last token's row, as all official code does; ``"mean_all"`` by the mean
            over all rows of the sequence (its own included), the criterion that the paper words.
        per_image: rank each image's tokens by themselves, each with its own budget (a list gives one entry
            per image); else one ranking over all image tokens of the prompt.

    Deviations from the official code, which serves one image in one prompt: batches, padding and several
    images are served; ties go to the lowest index; at least one token stays. Survivors, decoded and later
    tokens keep their original positions (``positions="compact"`` renumbers them).

    Cost: one attention row, ``2 H L d_head`` FLOPs for a prompt of L tokens; ``mean_all`` one layer's whole
    attention, ``2 H L^2 d_head``, in O(L) memory.

    Example:
        >>> FastV(keep=0.25).budget.count(17, "round"), FastV(keep=0.5).budget.count(25, "round")
        (4, 12)
    """

    meta = PolicyMeta(
        title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        arxiv="2403.06764",
        venue="ECCV 2024",
        code_licence="no licence file",
    )
    site = Site.DECODER_LAYER
    rounding = "round"
    default_positions = "keep"

    layer: int | float = 2 / 32
    score: Literal["last", "mean_all"] = "last"
    per_image: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("last", "mean_all"):
            raise InputError(f"score={self.score!r} is unknown; give 'last' or 'mean_all'.")
        if self.budget.parts is not None and not self.per_image:
            raise BudgetError(f"{self.budget} names several budgets, but FastV cuts once; give one, or per_image=True.")

    def site_layer(self, info: ModelInfo) -> int:
        return info.text_layer(self.layer, minimum=1)

    def signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        return (self._signal(self.site_layer(info)),)

    def scores(self, context: Context) -> Tensor:
        assert context.layer is not None
        value = context.signal(self._signal(context.layer)).float()
        return value if self.score == "mean_all" else value[:, 0]

    def decide(self, context: Context) -> Selection:
        scores = self.scores(context)
        if not self.per_image:
            return keep_highest(scores, context.valid, sample_counts(context, context.budget, self.rounding))
        return self._per_image(context, scores)

    def _per_image(self, context: Context, scores: Tensor) -> Selection:
        """One ranking per image."""
        assert context.image_id is not None
        lengths = current_image_lengths(context)
        keep = context.valid.new_zeros(context.n_items, context.width + 1)  # the last column takes the fill
        totals = [0] * context.n_items
        for image in range(max(map(len, lengths))):
            budget = context.budget.part(image)
            found = [row[image] if image < len(row) else 0 for row in lengths]
            counts = [budget.count(length, self.rounding) if length else 0 for length in found]
            chosen = keep_highest(scores, context.image_id == image, tuple(counts)).anchors()
            keep.scatter_(1, torch.where(chosen < 0, context.width, chosen), True)
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
        return Selection.from_mask(keep[:, :-1], tuple(totals), scores=scores)

    def _signal(self, layer: int) -> Signal:
        if self.score == "mean_all":
            return ColumnMass("text", layer - 1)
        return AttentionRows("text", layer - 1, "last")
