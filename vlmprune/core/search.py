"""Black-box search: points asked one by one from a Gaussian process, reproducible and resumable."""

from __future__ import annotations

import importlib.util
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vlmprune.core.errors import InputError, UnsupportedError

INITIAL = 27
"""Random points before the model of the objective is used, of 50 calls."""
PAPER_CALLS = 50


class BayesianSearch:
    """Maximises an unknown function inside bounds.

    The first points are drawn uniformly, the others maximise the expected improvement under a Gaussian process
    (optuna's ``GPSampler``). What comes next depends on the seed and on the history only: a search whose history is
    given back by :meth:`update` goes on as if it had never stopped.

    Args:
        bounds: name -> (lowest, highest) of each parameter.
        calls: points in all.
        seed: of the random draws.
        initial: random points; None takes 27, or that share of fewer than 50 calls.

    Raises:
        InputError: no parameter, empty bounds, or no call.
        UnsupportedError: optuna is not installed.
    """

    def __init__(
        self, bounds: Mapping[str, tuple[float, float]], calls: int, seed: int = 0, initial: int | None = None
    ) -> None:
        if not bounds or any(low > high for low, high in bounds.values()):
            raise InputError(f"There is nothing to search in {dict(bounds)}; leave some parameter open.")
        if calls < 1:
            raise InputError(f"calls={calls} is out of range; give at least 1.")
        if importlib.util.find_spec("optuna") is None:
            raise UnsupportedError("The search needs optuna, which is not installed: pip install 'vlmprune[tune]'.")
        self.bounds = dict(bounds)
        self.calls = calls
        self.seed = seed
        self.initial = min(INITIAL, -(-calls * INITIAL // PAPER_CALLS)) if initial is None else initial
        self.history: list[tuple[dict[str, float], float]] = []

    def propose(self) -> dict[str, float] | None:
        """The next point, None once ``calls`` points are known."""
        number = len(self.history)
        if number >= self.calls:
            return None
        if number < self.initial:
            draw = random.Random(f"{self.seed}:{number}")
            return {name: draw.uniform(low, high) for name, (low, high) in self.bounds.items()}
        point = self._ask(number)
        return {name: min(max(point[name], low), high) for name, (low, high) in self.bounds.items()}

    def update(self, point: Mapping[str, float], value: float) -> None:
        """Take in the function's value at a point."""
        self.history.append(({name: float(point[name]) for name in self.bounds}, float(value)))

    @property
    def best(self) -> int | None:
        """Number of the best point, the first of equal ones; None before the first."""
        values = [value for _, value in self.history]
        return max(range(len(values)), key=values.__getitem__) if values else None

    def _ask(self, number: int) -> dict[str, Any]:
        """A point of the Gaussian process fitted to the history."""
        import optuna
        from optuna.distributions import FloatDistribution

        space = {name: FloatDistribution(low, high) for name, (low, high) in self.bounds.items()}
        with _quiet():
            # One sampler per point: its seed must not depend on what an interrupted run drew before.
            seed = random.Random(f"{self.seed}:{number}").getrandbits(31)
            sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=0, deterministic_objective=True)
            study = optuna.create_study(direction="maximize", sampler=sampler)
            for point, value in self.history:
                study.add_trial(optuna.trial.create_trial(params=point, distributions=space, value=value))
            return study.ask(fixed_distributions=space).params


@contextmanager
def _quiet() -> Iterator[None]:
    """Without optuna's notes; its settings are restored."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
