"""Artefacts of measurements: running means per layer that can be resumed, and how well they serve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vlmprune.core.artefact import Found, read_found


class RunningMean(BaseModel):
    """Mean of one value per batch in float64, by Welford's recurrence: exact however many batches there are.

    Attributes:
        layer: 0-based.
        count, mean: batches so far and their mean, 0 before the first.
        squares: sum of squared deviations from the mean.
        standard_error: of the mean, None before the second batch.
    """

    model_config = ConfigDict(extra="forbid")

    layer: int
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    standard_error: float | None = None

    def add(self, value: float) -> None:
        """Take in the value of one batch."""
        self.count += 1
        before = value - self.mean
        self.mean += before / self.count
        self.squares += before * (value - self.mean)
        if self.count > 1:
            self.standard_error = math.sqrt(self.squares / (self.count - 1) / self.count)


class TokenCount(BaseModel):
    """Tokens on inputs that took no part in the calibration, prefix tokens left out.

    Attributes:
        samples: inputs.
        entered, left, wanted: tokens that entered the tower, that were left at its exit, and that the budget asks for.
    """

    model_config = ConfigDict(extra="forbid")

    samples: int = 0
    entered: int = 0
    left: int = 0
    wanted: int = 0

    @property
    def deviation(self) -> float:
        """How far the tokens left are from those wanted, as a share of these; 0.05 is 5 % too many."""
        return self.left / self.wanted - 1 if self.wanted else math.nan


class Measured(Found):
    """What a measurement found.

    Attributes:
        values: one running mean per layer that was measured; a run is resumed from them.
        batches: batches so far. ``data`` is the digest of their inputs, in order.
        tolerance: standard error of the means at which the measurement ends.
        converged: every layer's standard error is below it.
        held_out: the check on other inputs, None where there were none.
    """

    format: Literal["vlmprune measurement"] = "vlmprune measurement"
    version: Literal[1] = 1
    values: list[RunningMean] = Field(default_factory=list)
    batches: int = 0
    tolerance: float
    converged: bool = False
    held_out: TokenCount | None = None

    @property
    def has_result(self) -> bool:
        """True after the first batch."""
        return bool(self.values)


def read_measured(path: str | Path) -> Measured:
    """Read what a measurement found.

    Raises:
        InputError: the file is missing or no artefact of a measurement.
    """
    return read_found(path, Measured)
