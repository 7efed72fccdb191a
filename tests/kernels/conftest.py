"""Float64 checks shared by the kernel tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch


def distance_matrix(x: torch.Tensor, metric: str) -> np.ndarray:
    """``[N, N]`` distances of the specification in float64; for ``"similarity"`` cosines, not clamped."""
    points = x.double().numpy()
    if metric == "l2":
        return ((points[:, None] - points[None]) ** 2).sum(-1)
    units = points / np.maximum(np.linalg.norm(points, axis=-1, keepdims=True), 1e-12)
    cosine = units @ units.T
    return cosine if metric == "similarity" else np.maximum(0.0, 1.0 - cosine)


def replay(
    result: object,
    distance: np.ndarray,
    expected_count: int,
    *,
    sample: int = 0,
    weight: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    preselected: tuple[int, ...] = (),
    max_sum: bool = False,
    tolerance: float = 2e-6,
) -> None:
    """Follow the picks in float64 and assert that each was the best one left, up to rounding."""
    indices = result.indices[sample].tolist()
    radius = result.radius[sample].double().numpy()
    picks = [i for i in indices if i >= 0]
    assert indices == picks + [-1] * (len(indices) - len(picks)), "empty slots stand at the end"
    assert len(set(picks)) == len(picks) == expected_count
    n = len(distance)
    free = np.ones(n, bool) if valid is None else valid.copy()
    slack = tolerance * max(1.0, float(np.abs(distance).max(initial=0.0))) * (len(picks) if max_sum else 1)
    state = np.zeros(n) if max_sum else np.full(n, np.inf)
    for j in preselected:
        state = state + distance[j] if max_sum else np.minimum(state, distance[j])
        free[j] = False
    for step, j in enumerate(picks):
        assert free[j]
        if step or preselected:
            score = -state if max_sum else state if weight is None else state * weight
            assert score[j] >= score[free].max() - slack, f"pick {step}"
        np.testing.assert_allclose(radius[step], state[j], atol=slack, rtol=0)
        state = state + distance[j] if max_sum else np.minimum(state, distance[j])
        free[j] = False
    np.testing.assert_allclose(result.min_distance[sample].double().numpy(), state, atol=slack, rtol=0)
    assert (radius[len(picks) :] == -1).all()


@pytest.fixture(scope="session")
def check_greedy() -> Callable[..., None]:
    """See :func:`replay`."""
    return replay


@pytest.fixture(scope="session")
def distances() -> Callable[[torch.Tensor, str], np.ndarray]:
    """See :func:`distance_matrix`."""
    return distance_matrix


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20250)
