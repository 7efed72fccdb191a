"""Intervals: Wilson for a share, paired bootstrap over images for a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 2000
_CHUNK = 200  # resamples drawn at once, to bound memory


def wilson(right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927; 95 % with the default).

    Args:
        right: successes. n: trials, at least 1. z: normal quantile.

    Raises:
        ValueError: `n < 1` or `right` outside 0..n.
    """
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"a share needs n >= 1 and 0 <= right <= n, got right={right}, n={n}")
    share, square = right / n, z * z
    centre = (share + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    # The ends are exact where nothing or everything is right; rounding must not move them outside [0, 1].
    return (0.0 if right == 0 else max(0.0, centre - half)), (1.0 if right == n else min(1.0, centre + half))


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[str],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float | None, float | None]:
    """Mean difference `first - second` of paired values with a 95 % percentile interval.

    Whole clusters are drawn with replacement (here: an image with all its questions), since questions about
    one image share its kept tokens and are not independent.

    Args:
        first, second: values of the same questions in the same order.
        clusters: cluster of each question.
        seed: seed of the draws. resamples: number of draws.

    Returns:
        `(difference, low, high)`; the bounds are None with fewer than two clusters.

    Raises:
        ValueError: lengths differ or nothing is given.
    """
    if not len(first) == len(second) == len(clusters) or not len(first):
        raise ValueError(f"need equally many values, at least one: {len(first)}, {len(second)}, {len(clusters)}")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    mean = float(difference.mean())
    if len(names) < 2:
        return mean, None, None
    sums = np.bincount(cluster, weights=difference)
    sizes = np.bincount(cluster).astype(np.float64)
    rng = np.random.default_rng([seed, len(names)])
    means = np.empty(resamples)
    for start in range(0, resamples, _CHUNK):
        stop = min(start + _CHUNK, resamples)
        draws = rng.integers(len(names), size=(stop - start, len(names)))
        means[start:stop] = sums[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return mean, float(low), float(high)
