"""Calibration: what a policy measures on a model once, and the artefact that results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from vlmprune.core.measured import RunningMean, TokenCount
    from vlmprune.core.policy import Policy
    from vlmprune.core.records import SiteRecord


@runtime_checkable
class Calibrator(Protocol):
    """A pure search, driven by ``vlmprune.calibrate``.

    The driver calls ``propose`` for the next settings to try (None when done), runs the model with them,
    hands what came out to ``update`` (``{"objective": float}``), and takes ``result``. What is proposed depends on the
    updates so far and the seed only, so that a run is resumed by updating a new calibrator with the old history.
    """

    def propose(self) -> Mapping[str, Any] | None:
        """The next settings to run, or None when the calibration is finished."""
        ...

    def update(self, settings: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Take in what a run with ``settings`` gave."""
        ...

    def result(self) -> Mapping[str, Any]:
        """``{"best": settings, "value": objective}`` of the best call so far, empty before the first."""
        ...


class Measurement(Protocol):
    """A pure measurement on batches of images, driven by ``vlmprune.measure``.

    The driver applies ``policy``, runs the tower on one batch after the other, hands the records of what happened
    inside it to ``update``, and ends when ``converged``. A run is resumed by putting back ``means``.
    """

    means: list[RunningMean]
    """What was measured so far, one per layer."""

    @property
    def policy(self) -> Policy:
        """What is applied while measuring."""
        ...

    @property
    def converged(self) -> bool:
        """True if further batches would hardly change the result."""
        ...

    def update(self, records: Sequence[SiteRecord]) -> None:
        """Take in the tower's records of one batch."""
        ...

    def result(self) -> Policy:
        """The policy with what was found."""
        ...

    def count(self, records: Sequence[SiteRecord]) -> TokenCount:
        """Tokens that one batch entered and left the tower with, and those that the budget asks for."""
        ...
