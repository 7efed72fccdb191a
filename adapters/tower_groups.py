"""What was reduced inside the tower while a call's images and videos were encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlmprune.adapters.encoded import Encoding
from vlmprune.adapters.layout import Kind
from vlmprune.adapters.tower_lineage import TowerOutcome
from vlmprune.core.errors import SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.records import SiteRecord
from vlmprune.core.sites import Positions


@dataclass(frozen=True, eq=False)
class TowerGroups:
    """What all runs of the tower did to the images of one call.

    Attributes:
        groups: ``[V, P]`` token behind every patch of all encoder views in LLM order, numbered per view.
        outcomes: of the runs.
    """

    groups: Tensor
    outcomes: tuple[TowerOutcome, ...]

    @property
    def records(self) -> tuple[SiteRecord, ...]:
        """All selections inside the tower."""
        return tuple(record for outcome in self.outcomes for record in outcome.records)

    @property
    def positions(self) -> Positions:
        """How the LLM numbers what is left."""
        return self.outcomes[0].positions

    @property
    def items(self) -> int:
        """Items of all runs."""
        return sum(len(outcome.tokens.entered) for outcome in self.outcomes)

    @property
    def attended(self) -> tuple[float, ...]:
        """Mean tokens per item in every block's attention."""
        return self._mean([outcome.attended for outcome in self.outcomes])

    @property
    def passed(self) -> tuple[float, ...]:
        """Mean tokens per item in every block's MLP."""
        return self._mean([outcome.passed for outcome in self.outcomes])

    def flops(self, info: ModelInfo) -> tuple[float | None, float | None]:
        """FLOPs of all runs, reduced and dense; None where those of one are not known."""
        reduced, dense = zip(*(outcome.flops(info) for outcome in self.outcomes), strict=True)
        return _sum(reduced), _sum(dense)

    def _mean(self, runs: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """Per block the mean over the items of all runs."""
        sizes = [len(outcome.tokens.entered) for outcome in self.outcomes]
        blocks = zip(*runs, strict=True)
        return tuple(sum(n * mean for n, mean in zip(sizes, means, strict=True)) / self.items for means in blocks)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def tower_groups(runs: Mapping[Kind, Encoding | None], ordered: Callable[[dict[Kind, Tensor]], Tensor]) -> TowerGroups:
    """What the encodings of a call did.

    Args:
        runs: per kind of its images the last encoding.
        ordered: brings values ``[V, P]`` of the views of each kind into LLM order.

    Raises:
        SignalError: some were encoded while no policy acted.
    """
    outcomes: dict[Kind, TowerOutcome] = {}
    groups: dict[Kind, Tensor] = {}
    for kind, encoding in runs.items():
        if encoding is None or encoding.tower is None or encoding.run is None:
            raise SignalError(
                "The images were encoded before the policy was applied, so nothing was reduced inside the tower. "
                "Apply first, then encode."
            )
        outcomes[kind] = encoding.tower
        found = encoding.tower.tokens.groups()
        if found is None:
            raise SignalError("No block of the tower ran through its hooks, so nothing was reduced inside it.")
        groups[kind] = found
    return TowerGroups(ordered(groups), tuple(outcomes.values()))
