"""Common shapes of policies, so that most policy files hold one idea and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.core.budget import Rounding
from vlmprune.core.context import Context, ViewGroup
from vlmprune.core.errors import InputError
from vlmprune.core.image_counts import sample_counts
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Signal
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.kernels.ordering import stable_topk


@dataclass(frozen=True)
class SingleSitePolicy(Policy):
    """Acts once, at ``site``, with the signals that :meth:`signals` names."""

    site: ClassVar[Site] = Site.POST_ENCODER
    rounding: ClassVar[Rounding] = "floor"

    def signals(self, info: ModelInfo) -> tuple[Signal, ...]:
        """What ``select`` needs on this model."""
        return ()

    def site_layer(self, info: ModelInfo) -> int | None:
        """Layer of the site, for sites that have one."""
        return None

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        positions = self.resolve_positions(info)
        return (SiteRequest(self.site, self.site_layer(info), self.signals(info), positions),)

    @abstractmethod
    def decide(self, context: Context) -> Selection:
        """Decide the one site."""

    def select(self, context: Context) -> Selection:
        return self.decide(context)


@dataclass(frozen=True)
class ScorePolicy(SingleSitePolicy):
    """Keeps the tokens with the highest score; ties go to the lowest index."""

    @abstractmethod
    def scores(self, context: Context) -> Tensor:
        """Float32 scores ``[I, N]``."""

    def decide(self, context: Context) -> Selection:
        scores = self.scores(context).float()
        return keep_highest(scores, context.candidates, context.counts(self.rounding))


@dataclass(frozen=True)
class SetPolicy(SingleSitePolicy):
    """Chooses a set per view; budgets, batches and several views are done here."""

    @abstractmethod
    def pick(self, context: Context, group: ViewGroup) -> Tensor:
        """Choose up to ``group.count`` (at least 1) tokens in each view of a group of equal grid and budget.

        Returns:
            int64 ``[V, K]`` indices into the view's tokens in any order, -1 fill.
        """

    def view_counts(self, context: Context) -> tuple[tuple[int, ...], ...]:
        """Tokens to keep per item and view."""
        return context.view_counts(context.counts(self.rounding))

    @property
    def exact(self) -> bool:
        """True if ``pick`` always returns ``group.count`` distinct tokens; it spares a device sync."""
        return True

    def shown_scores(self, context: Context) -> Tensor | None:
        """Scores ``[I, N]`` for pictures, if there are any."""
        return None

    def decide(self, context: Context) -> Selection:
        counts = [0] * context.n_items
        keep = context.valid.new_zeros(context.n_items, context.width + 1)  # the last column takes the fill
        for group in context.view_groups(self.view_counts(context)):
            if group.count == 0:
                continue
            chosen = self.pick(context, group)
            place = torch.where(chosen < 0, context.width, group.index.gather(1, chosen.clamp_min(0)))
            keep[group.item[:, None], place] = True
            for item, _ in group.places:
                counts[item] += chosen.shape[1]
        known = tuple(counts) if self.exact else None
        return Selection.from_mask(keep[:, :-1], known, scores=self.shown_scores(context))


@dataclass(frozen=True)
class MergePolicy(SingleSitePolicy):
    """Merges tokens; subclasses return a merging :class:`Selection`."""


@dataclass(frozen=True)
class StagedPolicy(Policy):
    """Acts before several decoder layers with one budget per stage.

    ``layers`` are 0-based indices or shares of the depth; shares that collapse to one layer are an error.
    """

    layers: tuple[int | float, ...] = ()

    def stage_layers(self, info: ModelInfo, minimum: int = 1) -> tuple[int, ...]:
        """The layers used on this model, strictly increasing.

        Raises:
            InputError: two stages fall on one layer.
        """
        layers = tuple(info.text_layer(layer, minimum) for layer in self.layers)
        if any(b <= a for a, b in zip(layers, layers[1:], strict=False)):
            raise InputError(
                f"Stages {self.layers} fall on layers {layers} of {info.model_class} ({info.text_depth} "
                "layers), which do not increase; give explicit layers or fewer stages."
            )
        return layers

    def stage_of(self, context: Context) -> int:
        """Which stage a context belongs to."""
        return self.stage_layers(context.info).index(context.layer or 0)

    @abstractmethod
    def stage_signals(self, info: ModelInfo, layer: int) -> tuple[Signal, ...]:
        """What the stage before ``layer`` needs."""

    @abstractmethod
    def stage_scores(self, context: Context, stage: int) -> Tensor:
        """Float32 scores ``[I, N]`` of stage ``stage``."""

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        positions = self.resolve_positions(info)
        return tuple(
            SiteRequest(Site.DECODER_LAYER, layer, self.stage_signals(info, layer), positions)
            for layer in self.stage_layers(info)
        )

    def select_decoder_layer(self, context: Context) -> Selection:
        """Keep the highest scores of the stage."""
        stage = self.stage_of(context)
        counts = sample_counts(context, context.budget.part(stage))
        return keep_highest(self.stage_scores(context, stage), context.valid, counts)


@dataclass(frozen=True)
class CachePolicy(Policy):
    """Evicts stored prompt tokens from the KV cache after the prefill, layer by layer."""

    @abstractmethod
    def cache_signals(self, info: ModelInfo, layer: int) -> tuple[Signal, ...]:
        """What the eviction of ``layer`` needs."""

    def requests(self, info: ModelInfo) -> tuple[SiteRequest, ...]:
        return tuple(
            SiteRequest(Site.KV_CACHE, layer, self.cache_signals(info, layer), "keep")
            for layer in range(info.text_depth or 0)
        )


def keep_highest(scores: Tensor, valid: Tensor, counts: tuple[int, ...]) -> Selection:
    """Keep the ``counts[i]`` highest scores of each item; lowest index wins ties.

    Args:
        scores, valid: ``[I, N]``.
        counts: tokens to keep per item.
    """
    width = max(counts, default=0)
    order = stable_topk(scores, width, valid=valid)
    if any(count != width for count in counts):
        rank = torch.arange(width, device=scores.device)
        order = torch.where(rank < torch.tensor(counts, device=scores.device)[:, None], order, -1)
    return Selection.from_order(order, scores.shape[1], counts, scores=scores)
