"""ToDRE: a diverse set of tokens before the LLM, then none at all once the text has stopped looking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.registry import register
from vlmprune.core.selection import Selection
from vlmprune.core.signals import ClsRow, GroupMass, Projected, Signal
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.kernels.kcenter import greedy_select
from vlmprune.kernels.ordering import stable_argmax

PAPER_TAU = 0.10
PIVOTS = ("auto", "cls", "random", "center", "farthest")
Layers = int | float | tuple[int | float, ...]


@register("todre")
@dataclass(frozen=True)
class ToDRE(Policy):
    """Keep a set of mutually dissimilar tokens, then drop them all where the text no longer looks at them.

    Paper: "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance" (version 2; the
    title of version 1 ends "... via Diversity and Task Awareness for Efficient Large Vision-Language
    Models"), arXiv 2505.18757, preprint. No official code.

    Stage 1 acts before the LLM on the projected features: from a pivot token on, greedily the token whose
    summed cosine to all chosen ones is smallest (algorithm 1). All views of an image form one set with one
    budget. Stage 2 acts inside the LLM after each check layer: with the attention mass (mean over heads) from
    text to visual tokens as a share of the text rows' mass (alpha_t2v), and the reverse (alpha_v2t), all
    visual tokens of a sample are dropped for the later layers if both shares are below tau. It decides per
    sample; the first success counts.

    Args:
        keep: stage 1's budget, k = max(1, int(share * N)) per image or a number of tokens; 1.0 turns stage 1
            off.
        tau: stage 2's threshold. None: the paper's 0.10, or off where ``keep=1.0``; 0 turns stage 2 off.
            ``ToDRE(keep=1.0, tau=0.1)`` is stage 2 only.
        check_layers: where stage 2 looks, one layer or several in order: a share s of the L decoder layers
            means layer floor(s L) counted from 1 (the paper's 7L/8), at least the first; an int is a 0-based
            layer index. Tokens are gone from the layer after it on.
        variant: ``"max_sum"`` (version 2), or ``"k_center"``, the farthest-first rule that version 1 names.
        pivot: first token: ``"cls"`` (largest attention from CLS; of an any-resolution image among the
            thumbnail's tokens), ``"random"`` (same candidates), ``"center"`` or ``"farthest"`` (nearest to,
            or farthest from, the mean of the unit feature vectors), or ``"auto"``: cls where the tower has
            one, else random.
        pivot_layer: vision block of the CLS row; -1 is the block that feeds the projector.
        seed: for a random pivot.

    Where the paper leaves things open: the CLS row is the ordinary softmax attention without its CLS column;
    "the vision encoder's last layer" is the block that feeds the projector (on LLaVA the second to last),
    because later blocks do not reach the LLM; kept tokens go to the LLM in original order; after stage 1
    positions are those of a shorter prompt (original ones on M-RoPE models), stage 2 renumbers nothing;
    earlier layers keep their keys and values of visual tokens.

    Cost: stage 1 ``2 k N D`` FLOPs; stage 2 one layer's attention rows, ``2 H (T + V) L d_head``.

    Example:
        >>> ToDRE(keep=0.1).threshold, ToDRE().threshold, ToDRE(keep=1.0, tau=0.05).threshold
        (0.1, None, 0.05)
    """

    meta = PolicyMeta(
        title="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance",
        arxiv="2505.18757",
    )

    tau: float | None = None
    check_layers: Layers = 7 / 8
    variant: Literal["max_sum", "k_center"] = "max_sum"
    pivot: Literal["auto", "cls", "random", "center", "farthest"] = "auto"
    pivot_layer: int | float = -1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not 0 <= self.tau < math.inf:
            raise InputError(f"tau={self.tau} is out of range; give a threshold of at least 0 (0.1), or None.")
        if self.variant not in ("max_sum", "k_center"):
            raise InputError(f"variant={self.variant!r} is unknown; give 'max_sum' or 'k_center'.")
        if self.pivot not in PIVOTS:
            raise InputError(f"pivot={self.pivot!r} is unknown; give one of {', '.join(PIVOTS)}.")
        if self._layers() == ():
            raise InputError("check_layers is empty; give a layer, or turn stage 2 off with tau=0.")

    @property
    def threshold(self) -> float | None:
        """The threshold of stage 2, None where stage 2 is off."""
        if self.tau is None:
            return None if self.budget.is_all else PAPER_TAU
        return self.tau or None

    def checked_layers(self, info: ModelInfo) -> tuple[int, ...]:
        """0-based decoder layers after which stage 2 decides.

        Raises:
            InputError: a layer does not exist or has no layer behind it, or the layers do not increase.
        """
        depth = info.text_depth
        layers = []
        for layer in self._layers():
            if isinstance(layer, float) and not 0 <= layer <= 1:
                raise InputError(f"check_layers={layer} is no share of depth; give one in (0, 1], or an integer layer.")
            if isinstance(layer, float) and depth is not None:
                layer = max(1, math.floor(round(layer * depth, 6))) - 1
            layers.append(info.text_layer(layer))
        if any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
            raise InputError(
                f"check_layers={self.check_layers} fall on layers {tuple(layers)} of {info.model_class} "
                f"({depth} layers), which do not increase; give fewer, or explicit layer numbers."
            )
        if layers[-1] + 1 == depth:
            raise InputError(
                f"ToDRE checks decoder layer {layers[-1]} (counted from 0), the last of {info.model_class}, "
                "so no layer is left to drop tokens from; give earlier check_layers, or turn stage 2 off "
                "with tau=0."
            )
        return tuple(layers)

    def resolved_pivot(self, info: ModelInfo) -> str:
        """The pivot rule on this model."""
        if self.pivot == "auto":
            return "cls" if info.has_cls else "random"
        return self.pivot

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        requests = []
        if not self.budget.is_all:
            positions = self.resolve_positions(info)
            requests.append(SiteRequest(Site.POST_ENCODER, None, self._stage1_signals(info), positions))
        if self.threshold is not None:
            positions = self.resolve_positions(info, "keep")
            for layer in self.checked_layers(info):
                requests.append(SiteRequest(Site.DECODER_LAYER, layer + 1, (GroupMass(layer),), positions))
        return tuple(requests)

    def reduces(self, info: ModelInfo) -> bool:
        return not self.budget.is_all or self.threshold is not None

    def is_random(self, info: ModelInfo) -> bool:
        return not self.budget.is_all and self.resolved_pivot(info) == "random"

    def selection_flops(self, info: ModelInfo, n_tokens: int, n_kept: int) -> float | None:
        """Stage 1's: unit vectors, and one product with all tokens per pick.

        None for stage 2, which keeps all or nothing and whose cost depends on the prompt.
        """
        if info.text_hidden is None or n_kept in (0, n_tokens):
            return None
        return float((2 * n_kept + 3) * n_tokens * info.text_hidden)

    def order(self, context: Context) -> Tensor:
        """Stage 1's tokens ``[I, K]`` in the order in which they are picked, -1 fill."""
        picked = greedy_select(
            context.signal(Projected()),
            list(context.counts()),
            metric="cosine",
            objective="max_sum" if self.variant == "max_sum" else "min_max",
            start=self._start(context),
            valid=context.candidates,
        )
        return picked.indices

    def select_post_encoder(self, context: Context) -> Selection:
        """Stage 1: the chosen tokens in original order."""
        return Selection.from_order(self.order(context), context.width, context.counts())

    def select_decoder_layer(self, context: Context) -> Selection:
        """Stage 2: all visual tokens of a sample, or none."""
        assert context.layer is not None
        t2v, v2t = mass_shares(context.signal(GroupMass(context.layer - 1)))
        tau = self.threshold or 0.0
        drop = (t2v < tau) & (v2t < tau)
        return Selection.from_mask(context.valid & ~drop[:, None])

    def _layers(self) -> tuple[int | float, ...]:
        return self.check_layers if isinstance(self.check_layers, tuple) else (self.check_layers,)

    def _stage1_signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        if self.resolved_pivot(info) != "cls":
            return (Projected(),)
        if not info.has_cls:
            raise InputError(
                f"pivot='cls' needs a CLS token, which the vision tower of {info.model_class} lacks; "
                "give pivot='random', 'center' or 'farthest'."
            )
        return (Projected(), ClsRow(info.vision_layer(self.pivot_layer)))

    def _start(self, context: Context) -> Tensor | Literal["medoid", "center_far"]:
        """First token ``[I]`` of each item, or the kernel's rule for it."""
        rule = self.resolved_pivot(context.info)
        if rule in ("center", "farthest"):
            return "medoid" if rule == "center" else "center_far"
        allowed = pivot_candidates(context)
        if rule == "cls":
            layer = context.info.vision_layer(self.pivot_layer)
            return stable_argmax(context.signal(ClsRow(layer)).float(), allowed)
        draws = torch.zeros(allowed.shape)
        for item, n in enumerate(context.lengths):
            draws[item, :n] = torch.rand(n, generator=context.item_generator(item))
        return stable_argmax(draws.to(context.device, non_blocking=True), allowed)


def pivot_candidates(context: Context) -> Tensor:
    """``[I, N]`` bool: the thumbnail's tokens of any-resolution images, all tokens elsewhere."""
    allowed = context.candidates.clone()
    for item, views in enumerate(context.views):
        thumbnails = [view.tokens(context.device) for view in views if view.kind == "thumbnail"]
        if thumbnails:
            inside = torch.zeros_like(allowed[item]).index_fill_(0, torch.cat(thumbnails), True)
            allowed[item] &= inside
    return allowed


def mass_shares(mass: Tensor) -> tuple[Tensor, Tensor]:
    """``(alpha_t2v, alpha_v2t)``, each ``[I]``, from group masses ``[I, 2, 3]``.

    Rows are text and visual, columns system, text and visual. Without such rows a share is NaN and below no
    threshold.
    """
    mass = mass.float() if mass.dtype != torch.float64 else mass
    total = mass.sum(-1)  # [I, 2]
    return mass[:, 0, 2] / total[:, 0], mass[:, 1, 1] / total[:, 1]
