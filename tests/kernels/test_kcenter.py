"""Greedy k-center and max-sum selection in PyTorch, against float64 replays and the plain-loop oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels.kcenter import KCenterResult, greedy_select
from vlmprune.kernels.kcenter.duplicates import first_copies

ROUTES = ("gram", "features")
METRICS = ("cosine", "l2")


def same(a: KCenterResult, b: KCenterResult, tolerance: float = 0.0) -> None:
    assert torch.equal(a.indices, b.indices)
    for left, right in ((a.radius, b.radius), (a.min_distance, b.min_distance)):
        torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels", [5, 48])  # below and above the direct form of l2
def test_every_pick_is_the_farthest(
    metric: str,
    route: str,
    channels: int,
    dtype: torch.dtype,
    check_greedy: Callable,
    distances: Callable,
    generator: torch.Generator,
) -> None:
    x = (torch.randn(2, 70, channels, generator=generator) + 3).to(dtype)
    result = greedy_select(x, 40, metric=metric, start=3, route=route)
    assert result.radius.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for sample in range(2):
        check_greedy(result, distances(x[sample], metric), 40, sample=sample)
        assert result.indices[sample, 0] == 3 and result.radius[sample, 0] == torch.inf
    same(result, greedy_select(x, 40, metric=metric, start=3, backend="reference"), 3e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_max_sum(route: str, check_greedy: Callable, distances: Callable, generator: torch.Generator) -> None:
    x = torch.randn(2, 33, 12, generator=generator)
    arguments = {"objective": "max_sum", "start": 5, "preselected": torch.tensor([[-1, -1], [2, 7]])}
    result = greedy_select(x, 20, route=route, **arguments)
    assert result.indices[0, 0] == 5 and result.radius[0, 0] == 0
    for sample, before in ((0, ()), (1, (2, 7))):
        similarity = distances(x[sample], "similarity")
        check_greedy(result, similarity, 20, sample=sample, preselected=before, max_sum=True)
    same(result, greedy_select(x, 20, backend="reference", **arguments), 1e-5)


grid = st.integers(0, 2**31).flatmap(
    lambda seed: st.tuples(st.just(seed), st.integers(1, 14), st.integers(1, 3), st.integers(0, 16))
)


@settings(deadline=None, max_examples=60)
@given(grid, st.booleans(), st.booleans(), st.booleans())
def test_exact_on_integer_grids(shape: tuple[int, int, int, int], mask: bool, before: bool, weigh: bool) -> None:
    """Squared distances of small integers are exact, so every index must agree, ties included."""
    seed, n, channels, k = shape
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.integers(0, 3, (2, n, channels)), dtype=torch.float32)
    valid = torch.tensor(rng.random((2, n)) < 0.6) if mask else None
    arguments = {
        "metric": "l2",
        "valid": valid,
        "preselected": torch.tensor(rng.integers(-1, n, (2, 2))) if before else None,
        "weight": torch.tensor(2.0 ** rng.integers(-2, 3, (2, n)), dtype=torch.float32) if weigh else None,
        "start": "score",
        "start_score": torch.tensor(rng.integers(0, 3, (2, n))),
    }
    counts = [k, int(rng.integers(0, n + 2))]
    want = greedy_select(x, counts, backend="reference", **arguments)
    for route, ragged in itertools.product(ROUTES, (counts, torch.tensor(counts))):
        got = greedy_select(x, ragged, route=route, **arguments)
        width = min(got.indices.shape[1], want.indices.shape[1])
        assert torch.equal(got.indices[:, :width], want.indices[:, :width])
        assert torch.equal(got.radius[:, :width], want.radius[:, :width])
        assert (got.indices[:, width:] == -1).all()
        assert torch.equal(got.min_distance, want.min_distance)
    distance = (x[:, :, None] - x[:, None]).square().sum(-1)
    del arguments["metric"]
    same(greedy_select(None, counts, distance=distance, **arguments), want)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels", [7, 16, 31, 65, 130])
def test_copies_tie(metric: str, route: str, channels: int, generator: torch.Generator) -> None:
    """Matrix products round equal rows differently at these sizes; ties must not depend on that."""
    for n, kinds in ((6, 1), (11, 3), (33, 4), (63, 2), (127, 5)):
        base = torch.randn(1, kinds, channels, generator=generator)
        x = base[:, torch.randint(0, kinds, (n,), generator=generator)]
        result = greedy_select(x, n, metric=metric, route=route)
        order = result.indices[0].tolist()
        distinct = len(torch.unique(x[0], dim=0))
        heads = sorted({(x[0] == x[0, i]).all(-1).nonzero()[0].item() for i in range(n)})
        assert sorted(order[:distinct]) == heads, "one of each kind first, at its lowest index"
        assert order[distinct:] == sorted(set(range(n)) - set(heads)), "then the rest, in order"
        assert not result.radius[0, distinct:].any()
        assert not result.min_distance.any()


def test_zero_rows_are_at_distance_one() -> None:
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [-1.0, 0.0], [1e-13, 0.0]]])
    for route in ROUTES:
        result = greedy_select(x, 5, start=1, route=route)
        same(result, greedy_select(x, 5, start=1, backend="reference"), 1e-6)
        assert result.indices.tolist() == [[1, 3, 0, 2, 4]]


def test_all_equal_rows() -> None:
    x = torch.full((1, 37, 19), 0.3)
    for metric, route in itertools.product(METRICS, ROUTES):
        result = greedy_select(x, 40, metric=metric, route=route)
        assert result.indices[0].tolist() == [*range(37), -1, -1, -1]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_sizes(n: int, generator: torch.Generator) -> None:
    x = torch.randn(1, n, 4, generator=generator)
    for k, metric, route in itertools.product((-1, 0, 1, n, n + 3), METRICS, ROUTES):
        result = greedy_select(x, k, metric=metric, route=route)
        same(result, greedy_select(x, k, metric=metric, backend="reference"), 1e-5)
        assert result.indices.shape == (1, max(0, k))
        assert (result.indices >= 0).sum() == min(max(0, k), n)


def test_samples_without_tokens(generator: torch.Generator) -> None:
    x = torch.randn(3, 6, 4, generator=generator)
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[1] = False
    result = greedy_select(x, 2, valid=valid)
    assert (result.indices[1] == -1).all() and (result.radius[1] == -1).all()
    assert (result.indices[[0, 2]] >= 0).all()
    assert (result.min_distance[1] == torch.inf).all()
    for empty in (torch.zeros(2, 0, 4), torch.zeros(0, 5, 4)):
        result = greedy_select(empty, 3)
        assert result.indices.shape == (empty.shape[0], 3) and (result.indices == -1).all()


@pytest.mark.parametrize("route", ROUTES)
def test_batch_equals_loop(route: str, generator: torch.Generator) -> None:
    x = torch.randn(4, 50, 24, generator=generator)
    valid = torch.rand(4, 50, generator=generator) < 0.8
    valid[:, 0] = True
    weight = torch.rand(4, 50, generator=generator)
    counts = [0, 7, 60, 25]
    result = greedy_select(x, counts, valid=valid, weight=weight, route=route)
    for b, k in enumerate(counts):
        part = slice(b, b + 1)
        alone = greedy_select(x[part], k, valid=valid[part], weight=weight[part], route=route)
        assert result.indices[b, :k].tolist() == alone.indices[0].tolist()
        assert (result.indices[b, k:] == -1).all()
        torch.testing.assert_close(result.min_distance[part], alone.min_distance, atol=1e-6, rtol=0)
    small = greedy_select(x, counts, valid=valid, weight=weight, route=route, memory_cap=2 * 4 * 50 * 50)
    assert torch.equal(small.indices, result.indices)


def test_padding_changes_nothing(generator: torch.Generator) -> None:
    x = torch.randn(1, 20, 40, generator=generator)
    padded = torch.full((1, 31, 40), torch.nan)
    padded[:, 5:25] = x
    valid = torch.zeros(1, 31, dtype=torch.bool)
    valid[:, 5:25] = True
    for metric, route, start in itertools.product(METRICS, ROUTES, ("medoid", "center_far")):
        want = greedy_select(x, 9, metric=metric, route=route, start=start).indices
        got = greedy_select(padded, 9, metric=metric, route=route, start=start, valid=valid).indices
        assert torch.equal(got, want + 5)


def test_strided_input(generator: torch.Generator) -> None:
    base = torch.randn(30, 2, 16, generator=generator)
    view = base.transpose(0, 1)[..., ::2]
    for metric, route in itertools.product(METRICS, ROUTES):
        same(
            greedy_select(view, 12, metric=metric, route=route),
            greedy_select(view.contiguous(), 12, metric=metric, route=route),
        )


def test_start_rules(distances: Callable, generator: torch.Generator) -> None:
    x = torch.randn(2, 17, 6, generator=generator)
    valid = torch.rand(2, 17, generator=generator) < 0.7
    for metric in METRICS:
        near = greedy_select(x, 1, metric=metric, start="medoid", valid=valid).indices[:, 0]
        far = greedy_select(x, 1, metric=metric, start="center_far", valid=valid).indices[:, 0]
        for b in range(2):
            members = np.flatnonzero(valid[b])
            total = distances(x[b], metric)[np.ix_(members, members)].sum(1)
            assert near[b] == members[total.argmin()] and far[b] == members[total.argmax()]
    similarity = torch.stack([torch.tensor(distances(x[b], "similarity")) for b in range(2)])
    for rule in ("medoid", "center_far"):
        want = greedy_select(x, 4, start=rule, valid=valid).indices
        assert torch.equal(greedy_select(None, 4, similarity=similarity, start=rule, valid=valid).indices, want)
        assert torch.equal(greedy_select(None, 4, distance=1 - similarity, start=rule, valid=valid).indices, want)
    given_each = greedy_select(x, 3, start=torch.tensor([4, 9], dtype=torch.int32)).indices
    assert given_each[:, 0].tolist() == [4, 9]
    score = torch.tensor([[0.0, 2.0, 2.0, torch.nan] + [1.0] * 13]).repeat(2, 1)
    hidden = torch.ones(2, 17, dtype=torch.bool)
    hidden[1, 1] = False
    by_score = greedy_select(x, 2, start="score", start_score=score, valid=hidden).indices
    assert by_score[:, 0].tolist() == [1, 2]


def test_invalid_start_is_an_error(generator: torch.Generator) -> None:
    x = torch.randn(2, 5, 3, generator=generator)
    valid = torch.tensor([[True] * 5, [False, True, True, True, True]])
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match="valid"):
            greedy_select(x, 2, valid=valid, backend=backend)
        # Not needed where something is preselected, nothing is asked for, or nothing is there.
        result = greedy_select(x, 2, valid=valid, preselected=torch.tensor([[-1], [3]]), backend=backend)
        assert result.indices[0, 0] == 0 and 3 not in result.indices[1]
        assert (greedy_select(x, [2, 0], valid=valid, backend=backend).indices[1] == -1).all()
    for start in (5, -1, True, torch.tensor([0, 5]), torch.tensor([0, -1]), torch.tensor([0]), "middle"):
        with pytest.raises(ValueError, match="start"):
            greedy_select(x, 2, start=start)


def test_preselected_forms(check_greedy: Callable, distances: Callable, generator: torch.Generator) -> None:
    x = torch.randn(1, 24, 40, generator=generator)
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, [3, 9]] = True
    forms = ([3, 9, 3], torch.tensor([9, 3]), torch.tensor([[3, -1, 9, 9]]), mask)
    for metric, objective in (("cosine", "min_max"), ("l2", "min_max"), ("cosine", "max_sum")):
        results = [
            greedy_select(x, 8, metric=metric, objective=objective, preselected=form, route=route)
            for form in forms
            for route in ROUTES
        ]
        kind = "similarity" if objective == "max_sum" else metric
        for result in results:
            check_greedy(result, distances(x[0], kind), 8, preselected=(3, 9), max_sum=objective == "max_sum")
            assert torch.equal(result.indices, results[0].indices)
    # Padding among the preselected tokens is no token.
    valid = torch.ones(1, 24, dtype=torch.bool)
    valid[0, 3] = False
    result = greedy_select(x, 23, valid=valid, preselected=[3, 9])
    check_greedy(result, distances(x[0], "cosine"), 22, valid=valid[0].numpy(), preselected=(9,))


def test_weight(check_greedy: Callable, distances: Callable, generator: torch.Generator) -> None:
    x, weight = torch.randn(1, 30, 8, generator=generator), torch.rand(1, 30, generator=generator)
    weight[0, 4] = 0
    for route in ROUTES:
        result = greedy_select(x, 30, weight=weight, route=route, start=2)
        check_greedy(result, distances(x[0], "cosine"), 30, weight=weight[0].numpy())
        assert result.indices[0, -1] == 4


def test_similarity_matrix_is_not_clamped() -> None:
    similarity = torch.tensor([[[5.0, 3.0, 2.0], [3.0, 5.0, 1.0], [2.0, 1.0, 5.0]]])
    result = greedy_select(None, 3, similarity=similarity)
    assert result.indices.tolist() == [[0, 2, 1]]
    assert result.radius.tolist() == [[torch.inf, -1.0, -2.0]]
    summed = greedy_select(None, 3, similarity=similarity, objective="max_sum")
    assert summed.radius.tolist() == [[0.0, 2.0, 4.0]]


def test_permuting_and_scaling(generator: torch.Generator) -> None:
    x = torch.randn(1, 40, 16, generator=generator)
    order = torch.randperm(40, generator=generator)
    want = greedy_select(x, 15, start=int(order[0])).indices
    got = greedy_select(x[:, order], 15, start=0).indices
    assert torch.equal(order[got], want)
    scaled = x * (torch.rand(1, 40, 1, generator=generator) * 100 + 0.01)
    assert torch.equal(greedy_select(scaled, 15, start=int(order[0])).indices, want)


def test_rows_that_are_not_finite_come_last(generator: torch.Generator) -> None:
    for metric, route, channels in itertools.product(METRICS, ROUTES, (5, 40)):
        x = torch.randn(1, 12, channels, generator=generator)
        x[0, 4, 1], x[0, 7, 2] = torch.nan, torch.inf
        result = greedy_select(x, 12, metric=metric, route=route)
        assert sorted(result.indices[0].tolist()) == list(range(12))
        assert result.indices[0, -2:].tolist() == [4, 7]
        same(result, greedy_select(x, 12, metric=metric, backend="reference"), 1e-5)
        first = greedy_select(x, 12, metric=metric, route=route, start=4)
        assert first.indices[0].tolist() == [4, *(i for i in range(12) if i != 4)]
        assert greedy_select(x, 1, metric=metric, route=route, start="medoid").indices.item() not in (4, 7)


def test_runs_are_identical(generator: torch.Generator) -> None:
    x = torch.randn(3, 90, 33, generator=generator)
    for route in ROUTES:
        first = greedy_select(x, 40, route=route)
        for _ in range(5):
            same(greedy_select(x, 40, route=route), first)


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_has_no_effect(route: str, generator: torch.Generator) -> None:
    x = torch.randn(1, 80, 256, generator=generator) + 2
    want = greedy_select(x, 40, route=route)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(greedy_select(x, 40, route=route), want)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(-1, 1), min_size=3, max_size=3), min_size=1, max_size=20))
def test_first_copies(rows: list[list[int]]) -> None:
    want = [rows.index(row) for row in rows]
    values = torch.tensor([rows]).float()
    for points in (values, -values, values * 0.1, values.double(), values[..., :2], values.tile(1, 1, 9)):
        if points.shape[-1] == 2:
            want_here = [[row[:2] for row in rows].index(row[:2]) for row in rows]
        else:
            want_here = want
        assert first_copies(points)[0].tolist() == want_here


def test_sign_patterns_do_not_collide() -> None:
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=12)))[None]  # [1, 4096, 12]
    assert torch.equal(first_copies(signs)[0], torch.arange(4096))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"metric": "dot"}, ValueError, "Unknown metric 'dot'"),
        ({"objective": "sum"}, ValueError, "Unknown objective 'sum'"),
        ({"route": "fast"}, ValueError, "Unknown route 'fast'"),
        ({"metric": "l2", "objective": "max_sum"}, ValueError, "sums similarities"),
        ({"weight": torch.ones(1, 4), "objective": "max_sum"}, ValueError, "no weight"),
        ({"weight": torch.ones(4)}, ValueError, "weight must have shape"),
        ({"valid": torch.ones(1, 3, dtype=torch.bool)}, ValueError, "valid must be a bool"),
        ({"valid": torch.ones(1, 4)}, ValueError, "valid must be a bool"),
        ({"distance": torch.zeros(1, 4, 4)}, ValueError, "exactly one of"),
        ({"x": None}, ValueError, "exactly one of"),
        ({"x": torch.zeros(4, 2)}, ValueError, r"\[B, N, d\]"),
        ({"x": torch.zeros(1, 4, 2, dtype=torch.long)}, ValueError, "float tensor"),
        ({"x": None, "similarity": torch.zeros(1, 4, 3)}, ValueError, r"\[B, N, N\]"),
        ({"start": "score"}, ValueError, "belong together"),
        ({"start_score": torch.zeros(1, 4)}, ValueError, "belong together"),
        ({"start": "score", "start_score": torch.zeros(1, 3)}, ValueError, "start_score must have shape"),
        ({"preselected": [1, 4]}, ValueError, r"preselected holds \[4\]"),
        ({"preselected": torch.tensor([4])}, ValueError, "preselected holds an index above 3"),
        ({"preselected": torch.zeros(2, 1, dtype=torch.long)}, ValueError, "must have 1 rows"),
        ({"preselected": torch.zeros(1, 3, dtype=torch.bool)}, ValueError, "preselected must be a bool"),
        ({"k": 0.5}, TypeError, "k must be"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        greedy_select(**{"x": torch.eye(4)[None], "k": 2, **arguments})
