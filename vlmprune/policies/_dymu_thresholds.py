"""Finding DyMU's thresholds: the similarity at which the merges of a batch end, averaged over batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.measured import Measured, RunningMean, TokenCount, read_measured
from vlmprune.core.records import SiteRecord

if TYPE_CHECKING:
    from vlmprune.policies.dymu import DyMU

NO_MERGING = 1.0
"""A threshold that no cosine exceeds."""

Thresholds = float | tuple[float, ...] | None


def checked_thresholds(given: Thresholds) -> Thresholds:
    """Thresholds, a list as a tuple.

    Raises:
        InputError: one is no cosine, or the list is empty.
    """
    if given is None:
        return None
    if isinstance(given, (tuple, list)):
        given = tuple(float(value) for value in given)
    values = given if isinstance(given, tuple) else (given,)
    if not values or not all(-1 <= value <= 1 for value in values):
        raise InputError(f"thresholds={given} are out of range; a cosine lies in [-1, 1].")
    return given


def load_thresholds(policy: DyMU) -> Measured | None:
    """What the policy's artefact holds, None without one, or where all tokens stay.

    Raises:
        InputError: it was made for other settings, or the policy has thresholds already.
    """
    if policy.artefact is None:
        return None
    object.__setattr__(policy, "artefact", str(policy.artefact))
    if policy.thresholds is not None:
        raise InputError("thresholds and artefact both give thresholds; leave one of them out.")
    if policy.budget.is_all:
        return None
    found = read_measured(str(policy.artefact))
    mine = {name: getattr(policy, name) for name in ("schedule", "max_r_ratio", "compat")}
    found.check_policy(policy.name, {"keep": policy.budget.describe(), **mine})
    return found


class ThresholdMeans:
    """A :class:`~vlmprune.core.calibration.Measurement` of one threshold per block.

    Args:
        policy: with the budget to reach.
        info: the model.
        tolerance: standard error of every mean at which it ends. least: batches that it takes at least.
    """

    def __init__(self, policy: DyMU, info: ModelInfo, tolerance: float, least: int) -> None:
        self.means: list[RunningMean] = []
        self._wanted, self._info = policy, info
        self._tolerance, self._least = tolerance, least

    @property
    def policy(self) -> DyMU:
        """Merges the best pairs of every batch, without unmerging."""
        return replace(self._wanted, mode="batch", unmerge=False)

    @property
    def converged(self) -> bool:
        """True if every block has batches enough and its standard error is small."""
        errors = [mean.standard_error for mean in self.means if mean.count >= self._least]
        return 0 < len(errors) == len(self.means) and all(e is not None and e < self._tolerance for e in errors)

    def update(self, records: Sequence[SiteRecord]) -> None:
        """Take in one threshold for each block that the schedule does not leave out."""
        known = {mean.layer: mean for mean in self.means}
        for record in records:
            scores, layer = record.selection.scores, record.layer or 0
            if scores is not None:
                known.setdefault(layer, RunningMean(layer=layer)).add(batch_threshold(record, scores))
        self.means = sorted(known.values(), key=lambda mean: mean.layer)

    def result(self) -> DyMU:
        """The policy with the thresholds so far, without unmerging."""
        blocks = self._info.vision_layer(-1) + 1
        return replace(self._wanted, thresholds=block_thresholds(self.means, blocks), unmerge=False)

    def count(self, records: Sequence[SiteRecord]) -> TokenCount:
        """See :meth:`vlmprune.core.calibration.Measurement.count`; ``samples`` stays 0."""
        first = [max(0, length - self._info.prefix_tokens) for length in records[0].tokens_in]
        entered, budget = sum(first), self._wanted.budget
        removed = sum(sum(record.tokens_in) - sum(record.tokens_out) for record in records)
        wanted = sum(map(budget.count, first))
        if budget.share is not None and self._info.full_attention_blocks is not None:
            wanted = round(budget.share * entered)  # rounded down in every window it would be too few
        return TokenCount(entered=entered, left=entered - removed, wanted=wanted)


def batch_threshold(record: SiteRecord, scores: Tensor) -> float:
    """Similarity of the best pair of a batch that did not merge, at least 0 (the last pair's where all merged)."""
    rows = scores[:, 0::2].flatten().sort(descending=True).values
    merged = sum(record.tokens_in) - sum(record.tokens_out)
    return max(0.0, float(rows[min(merged, len(rows) - 1)]))


def block_thresholds(means: Sequence[RunningMean], blocks: int) -> tuple[float, ...]:
    """One threshold per block; blocks that were not measured never merge."""
    found = {mean.layer: mean.mean for mean in means}
    return tuple(min(NO_MERGING, found.get(block, NO_MERGING)) for block in range(blocks))
