from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from vlmprune.evaluation.statistics import paired_bootstrap, wilson


@pytest.mark.parametrize(("right", "n"), [(1, 10), (5, 10), (9, 10), (137, 200), (3, 2000)])
def test_wilson_bounds_invert_the_score_test(right: int, n: int) -> None:
    """At a bound p the observed share is exactly 1.96 standard errors of p away."""
    z = NormalDist().inv_cdf(0.975)
    for bound in wilson(right, n):
        assert abs(right / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


@pytest.mark.parametrize("n", [1, 20, 5000])
def test_wilson_at_the_ends(n: int) -> None:
    z = NormalDist().inv_cdf(0.975)
    assert wilson(0, n) == (0.0, pytest.approx(z * z / (n + z * z)))
    assert wilson(n, n) == (pytest.approx(n / (n + z * z)), 1.0)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_nonsense(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="share"):
        wilson(right, n)


def test_bootstrap_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(3)
    first, second = (rng.random(800) < 0.8).astype(float), (rng.random(800) < 0.7).astype(float)
    mean, low, high = paired_bootstrap(first, second, [str(i) for i in range(800)])
    difference = first - second
    error = difference.std(ddof=1) / math.sqrt(800)
    assert mean == pytest.approx(difference.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_bootstrap_is_paired_and_seeded() -> None:
    rng = np.random.default_rng(0)
    first = (rng.random(100) < 0.5).astype(float)
    names = [str(i) for i in range(100)]
    assert paired_bootstrap(first, first, names) == (0.0, 0.0, 0.0)
    other = rng.permutation(first)
    assert paired_bootstrap(first, other, names, seed=1) == paired_bootstrap(first, other, names, seed=1)
    assert paired_bootstrap(first, other, names, seed=1) != paired_bootstrap(first, other, names, seed=2)


def test_bootstrap_draws_whole_images() -> None:
    """Ten copies of every question tell nothing new, so the interval must not shrink."""
    rng = np.random.default_rng(5)
    first, second = (rng.random(60) < 0.7).astype(float), (rng.random(60) < 0.5).astype(float)
    names = [str(i) for i in range(60)]
    once = paired_bootstrap(first, second, names)
    copies = paired_bootstrap(first.repeat(10), second.repeat(10), np.repeat(names, 10).tolist())
    assert copies == pytest.approx(once)


def test_bootstrap_of_one_image_has_no_interval() -> None:
    assert paired_bootstrap([1.0, 0.0], [0.0, 0.0], ["a", "a"]) == (0.5, None, None)
    with pytest.raises(ValueError, match="equally many"):
        paired_bootstrap([1.0], [], [])
