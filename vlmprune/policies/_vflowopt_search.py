"""The search for VFlowOpt's configuration at a given mean retention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.search import BayesianSearch
from vlmprune.core.signals import Pixels
from vlmprune.policies._vflowopt_settings import Parts, solve_r3

if TYPE_CHECKING:
    from vlmprune.policies.vflowopt import VFlowOpt

T_BOUNDS, A_BOUNDS, ALPHA_BOUNDS = (0.0, 50.0), (3.0, 24.0), (-1.0, 1.0)


def share_bounds(target: float, parts: Parts) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bounds of R1 and R2.

    The official ones for 25 % are R1 from 0.25 to 0.375 and R2 from 0.2 / 0.375 to 1, here in proportion to the
    target: R1 from T to 1.5 T, R2 from 0.8 T over the largest R1. R1 ends earlier where R3 would not stay positive.
    """
    first, second, _ = parts
    most = min(1.0, 1.5 * target, 0.97 * target * sum(parts) / (first + second))
    return (target, most), (0.8 * target / most, 1.0)


class VFlowSearch:
    """A :class:`~vlmprune.core.calibration.Calibrator`: proposes r1, r2, t, a and alpha, never r3.

    Args:
        policy: its given parameters are kept, the others searched; alpha is 0 on models that give no pixels.
        info: the model. calls, seed: see :class:`~vlmprune.core.search.BayesianSearch`.
    """

    def __init__(self, policy: VFlowOpt, info: ModelInfo, calls: int, seed: int) -> None:
        share = policy.budget.share
        if share is None or share >= 1:
            raise BudgetError(f"A calibration is for one mean retention below 1, a share, not for {policy.budget}.")
        if policy.r3 is not None:
            raise InputError("r3 follows from keep, r1 and r2; leave it out of a calibration.")
        if policy.artefact is not None:
            raise InputError("The policy loads an artefact already; calibrate without it.")
        self._share, self._parts = share, policy.parts(info)
        r1, r2 = share_bounds(share, self._parts)
        bounds = {"r1": r1, "r2": r2, "t": T_BOUNDS, "a": A_BOUNDS, "alpha": ALPHA_BOUNDS}
        self._fixed = {name: float(getattr(policy, name)) for name in bounds if getattr(policy, name) is not None}
        if Pixels not in info.signals:
            self._fixed.setdefault("alpha", 0.0)
        free = {name: limits for name, limits in bounds.items() if name not in self._fixed}
        self.search = BayesianSearch(free, calls, seed)

    def propose(self) -> Mapping[str, float] | None:
        """The next configuration, None when the calls are used up."""
        point = self.search.propose()
        return None if point is None else {**self._fixed, **point}

    def update(self, settings: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Take in ``measured["objective"]``, larger is better."""
        self.search.update(settings, measured["objective"])

    def result(self) -> Mapping[str, Any]:
        """``best`` with R3, and its ``value``; empty before the first call."""
        if self.search.best is None:
            return {}
        point, value = self.search.history[self.search.best]
        best = {**self._fixed, **point}
        r3, _ = solve_r3(self._share, best["r1"], best["r2"], self._parts)
        return {"best": {**best, "r3": r3}, "value": value}
