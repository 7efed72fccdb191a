"""The search: inside its bounds, reproducible, resumable, and better than its random start."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping

import pytest

from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.search import BayesianSearch

BOUNDS = {"x": (-1.0, 3.0), "y": (0.0, 50.0)}


def valley(point: Mapping[str, float]) -> float:
    """A quadratic with its maximum 0 at x = 1.2, y = 20."""
    return -((point["x"] - 1.2) ** 2) - ((point["y"] - 20) / 25) ** 2


def run(search: BayesianSearch, stop: int | None = None) -> BayesianSearch:
    while (stop is None or len(search.history) < stop) and (point := search.propose()) is not None:
        search.update(point, valley(point))
    return search


def test_points_lie_inside_and_approach_the_maximum() -> None:
    search = run(BayesianSearch(BOUNDS, calls=16, seed=3, initial=6))
    assert len(search.history) == 16 and search.propose() is None
    for point, _ in search.history:
        assert all(low <= point[name] <= high for name, (low, high) in BOUNDS.items())
    values = [value for _, value in search.history]
    assert max(values) > -0.01 and max(values[:6]) < max(values)
    assert search.best == values.index(max(values))


def test_the_same_seed_gives_the_same_points_and_another_others() -> None:
    first, again = (run(BayesianSearch(BOUNDS, calls=9, seed=1, initial=6)) for _ in range(2))
    assert first.history == again.history
    assert run(BayesianSearch(BOUNDS, calls=2, seed=2)).history != first.history[:2]


def test_a_resumed_search_goes_on_as_if_it_had_never_stopped() -> None:
    whole = run(BayesianSearch(BOUNDS, calls=10, seed=0, initial=6))
    for stop in (3, 8):
        part = run(BayesianSearch(BOUNDS, calls=10, seed=0, initial=6), stop)
        rest = BayesianSearch(BOUNDS, calls=10, seed=0, initial=6)
        for point, value in part.history:
            rest.update(point, value)
        assert run(rest).history == whole.history


@pytest.mark.parametrize(("calls", "initial"), [(50, 27), (300, 27), (10, 6), (1, 1)])
def test_random_points_at_the_start(calls: int, initial: int) -> None:
    assert BayesianSearch(BOUNDS, calls).initial == initial


def test_the_loggers_level_is_left_as_it_was() -> None:
    logger = logging.getLogger("optuna")
    before = logger.level
    run(BayesianSearch({"x": (-1.0, 3.0), "y": (20.0, 20.0)}, calls=4, initial=2))
    assert logger.level == before


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="nothing to search"):
        BayesianSearch({}, 5)
    with pytest.raises(InputError, match="nothing to search"):
        BayesianSearch({"x": (2.0, 1.0)}, 5)
    with pytest.raises(InputError, match="calls=0"):
        BayesianSearch(BOUNDS, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="needs optuna.*pip install"):
        BayesianSearch(BOUNDS, 5)
