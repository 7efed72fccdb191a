"""Calibration: what a policy measures on a model once, and the artefact that results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Calibrator(Protocol):
    """A pure search or measurement, driven by ``vlmprune.calibrate``.

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
