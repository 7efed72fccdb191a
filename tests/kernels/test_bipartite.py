"""Bipartite matching in PyTorch, against brute force in float64 and the plain-loop oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_rows import exact_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels.bipartite import BipartiteMatch, bipartite_match, merge_groups, torch_backend

ORDERS = ("tome", "position", "original")


def same(a: BipartiteMatch, b: BipartiteMatch) -> None:
    assert a.n_out == b.n_out
    for name in ("group_id", "counts", "partner", "merged", "a_index", "b_index"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.kept is None) == (b.kept is None)
    for name in ("kept", "sources", "into") if b.kept is not None else ():
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.scores, b.scores, atol=2e-6, rtol=0, equal_nan=True)


def brute_force(metric: torch.Tensor, r: int, protect: int) -> set[tuple[int, int]]:
    """(source, destination) of one sample in NumPy."""
    x = metric.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = x @ x.T
    n = len(x)
    pairs = []
    for a in range(0, n, 2):
        targets = [b for b in range(1, n, 2) if b >= protect]
        if a >= protect and targets:
            b = max(targets, key=lambda t: (cosine[a, t], -t))
            pairs.append((-cosine[a, b], a, b))
    return {(a, b) for _, a, b in sorted(pairs)[: min(r, (n - protect) // 2)]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("protect", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [6, 17, 40])
def test_pairs_are_the_best(n: int, protect: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    metric = torch.randn(3, n, 16, generator=generator).to(dtype)
    for r in (0, 1, n // 4, 1000):
        match = bipartite_match(metric, r, protect=protect)
        assert match.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        removed = min(r, max(0, n - protect) // 2)
        assert match.n_out == n - removed and match.counts.tolist() == [n - removed] * 3
        for b in range(3):
            slots = match.merged[b].nonzero()[:, 0]
            pairs = {(int(match.a_index[b, a]), int(match.b_index[b, match.partner[b, a]])) for a in slots}
            assert pairs == brute_force(metric[b], r, protect)
            assert sorted(set(match.group_id[b].tolist())) == list(range(match.n_out))
            for source, target in pairs:
                assert match.group_id[b, source] == match.group_id[b, target]
            assert match.merged_tokens()[b].nonzero()[:, 0].tolist() == sorted(source for source, _ in pairs)
        assert torch.equal(match.group_id[:, :protect], torch.arange(protect).expand(3, -1)), "the front stays"


shapes = st.tuples(st.integers(0, 2**31), st.integers(0, 13), st.integers(0, 4))


@settings(deadline=None, max_examples=80)
@given(shapes, st.sampled_from(ORDERS), st.booleans(), st.booleans(), st.integers(0, 3))
def test_equal_to_the_oracle(shape: tuple[int, int, int], order: str, padded: bool, masked: bool, limits: int) -> None:
    """Every integer output agrees, with many ties, zero rows, masks and ragged limits."""
    seed, n, protect = shape
    rng = np.random.default_rng(seed)
    bank = exact_rows()
    metric = bank[torch.tensor(rng.integers(0, len(bank), (3, n)), dtype=torch.long)]
    counts = rng.integers(-1, n + 2, 3).tolist()
    bounds = torch.tensor(rng.choice([-1.0, 0.0, 0.5, 0.75, 1.0], 3), dtype=torch.float32)
    options = (
        {"r": counts[0]},
        {"r": torch.tensor(counts), "threshold": 0.25},
        {"threshold": bounds},
        {"r": counts, "threshold": bounds},
    )[limits]
    arguments = {
        **options,
        "protect": protect,
        "order": order,
        "valid": torch.tensor(rng.random((3, n)) < 0.7) if padded else None,
        "protected": torch.tensor(rng.random((3, n)) < 0.3) if masked else None,
    }
    same(bipartite_match(metric, **arguments), bipartite_match(metric, backend="reference", **arguments))


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from(ORDERS), st.booleans())
def test_given_halves_equal_the_oracle(shape: tuple[int, int, int], order: str, padded: bool) -> None:
    seed, n, protect = shape
    rng = np.random.default_rng(seed)
    metric = exact_rows()[torch.tensor(rng.integers(0, 40, (2, n)), dtype=torch.long)]
    mixed = torch.tensor(np.stack([rng.permutation(n) for _ in range(2)]), dtype=torch.long)
    cut, end = sorted(rng.integers(0, n + 1, 2).tolist())
    a, b = mixed[:, :cut].clone(), mixed[:, cut:end].clone()
    a[0, : cut // 3], b[1, : (end - cut) // 3] = -1, -1
    valid = torch.tensor(rng.random((2, n)) < 0.8) if padded else None
    arguments = {"split": (a, b), "order": order, "protect": protect, "valid": valid, "threshold": -0.5}
    got = bipartite_match(metric, **arguments)
    same(got, bipartite_match(metric, backend="reference", **arguments))
    outside = sorted(set(range(n)) - set(a[0].tolist()) - set(b[0].tolist()))
    if not padded:
        assert not got.merged_tokens()[0, outside].any()


@pytest.mark.parametrize("channels", [7, 16, 31, 130])
def test_equal_rows_tie(channels: int, generator: torch.Generator) -> None:
    """Matrix products round equal rows differently at these sizes; ties must not depend on that."""
    for n, kinds in ((11, 3), (64, 4), (127, 5)):
        base = torch.randn(1, kinds, channels, generator=generator)
        metric = base[:, torch.randint(0, kinds, (n,), generator=generator)]
        for blocked in (None, torch.rand(1, n, generator=generator) < 0.3):
            got = bipartite_match(metric, n // 4, protected=blocked)
            same(got, bipartite_match(metric, n // 4, protected=blocked, backend="reference"))


@pytest.mark.parametrize("channels", [7, 16, 31, 130])
def test_equal_targets_tie(channels: int, generator: torch.Generator) -> None:
    """As above where no A row equals a B row; the lowest of the equal targets that may receive is the partner."""
    for n, kinds in ((21, 1), (65, 3), (127, 2), (301, 5)):
        metric = torch.randn(1, n, channels, generator=generator)
        base = torch.randn(kinds, channels, generator=generator)
        metric[0, 1::2] = base[torch.randint(0, kinds, (n // 2,), generator=generator)]
        blocked = torch.rand(1, n, generator=generator) < 0.2
        for mask in (None, blocked):
            got = bipartite_match(metric, n // 4, protected=mask)
            assert torch.equal(
                got.partner, bipartite_match(metric, n // 4, protected=mask, backend="reference").partner
            )


def test_an_equal_row_beats_a_close_one(generator: torch.Generator) -> None:
    """Rounded to float32 both cosines may come out as 1 or just above."""
    for _ in range(20):
        row = torch.randn(24, generator=generator)
        close = row.clone()
        close[3] *= 1 + 2.0**-12
        match = bipartite_match(torch.stack([row, close, row, close, close, row])[None], 3)
        assert match.partner.tolist() == [[2, 2, 0]] and match.scores.eq(1).all()


def test_all_equal_rows(generator: torch.Generator) -> None:
    metric = torch.full((1, 37, 19), 0.3)
    match = bipartite_match(metric, 5)
    assert match.merged[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert match.partner.tolist() == [[0] * 19] and (match.scores == 1).all()
    x = torch.randn(1, 1, 4, generator=generator).expand(1, 37, 4)
    merged = merge_groups(x, match.group_id, match.n_out)
    torch.testing.assert_close(merged, x[:, :32], atol=1e-6, rtol=0)


def test_rows_without_direction() -> None:
    """Zero rows have cosine 0 to all; rows with NaN or infinity are chosen last, and never by a threshold."""
    metric = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(3)) * 0.01 + 1.0
    metric[0, 4], metric[0, 6, 2], metric[0, 3] = 0.0, torch.inf, torch.nan
    for backend in ("torch", "reference"):
        match = bipartite_match(metric, 4, backend=backend)
        assert match.scores[0, 2] == 0 and match.scores[0, 3].isnan()
        assert not match.merged[0, 2:4].any() and match.merged.sum() == 4
        assert not (match.partner[0, [0, 1, 4, 5]] == 1).any()
        assert bipartite_match(metric, 6, backend=backend).n_out == 6
        assert bipartite_match(metric, threshold=-1.0, backend=backend).counts == 7


def test_threshold_is_strict_and_counts_differ() -> None:
    metric = torch.stack([exact_rows()[row] for row in ([0, 0, 23, 2, 1, 1], [0, 1, 0, 2, 4, 3])])
    scores = bipartite_match(metric, threshold=0.5).scores
    assert scores.tolist() == [[1.0, 0.5, 1.0], [0.0, 0.0, 0.0]]
    counts = {bound: bipartite_match(metric, threshold=bound).counts.tolist() for bound in (1.0, 0.5, 0.0, -0.5)}
    assert counts == {1.0: [6, 6], 0.5: [4, 6], 0.0: [3, 6], -0.5: [3, 3]}
    assert bipartite_match(metric, r=1, threshold=-0.5).counts.tolist() == [5, 5]
    each = bipartite_match(metric, threshold=torch.tensor([0.75, -0.5]))
    assert each.counts.tolist() == [4, 3] and each.n_out == 6
    unchanged = bipartite_match(metric, threshold=0.0).group_id[1]
    assert unchanged.tolist() == list(range(6)), "a sample that merges nothing keeps its order"


@pytest.mark.parametrize("order", ORDERS)
def test_batch_equals_single(order: str, generator: torch.Generator) -> None:
    metric = torch.randn(4, 31, 12, generator=generator)
    lengths = [31, 20, 7, 0]
    valid = torch.arange(31) < torch.tensor(lengths)[:, None]
    padded = metric.masked_fill(~valid[..., None], torch.nan)
    for options in ({"r": 6}, {"threshold": 0.2}, {"threshold": 0.1, "protect": 1}):
        match = bipartite_match(padded, order=order, valid=valid, **options)
        assert (match.group_id[~valid] == -1).all()
        for b, length in enumerate(lengths):
            alone = bipartite_match(metric[b : b + 1, :length], order=order, **options)
            assert torch.equal(match.group_id[b, :length], alone.group_id[0])
            assert match.counts[b] == alone.counts[0]


def test_order_of_outputs(generator: torch.Generator) -> None:
    metric = torch.randn(1, 12, 5, generator=generator)
    by_rank = bipartite_match(metric, 3)
    left = [a for a in by_rank.scores[0].argsort(descending=True).tolist() if not by_rank.merged[0, a]]
    first = {int(by_rank.group_id[0, 2 * a]): a for a in left}
    assert [first[g] for g in range(3)] == left, "by best cosine, descending"
    assert by_rank.group_id[0, 1::2].tolist() == [3, 4, 5, 6, 7, 8]
    position = bipartite_match(metric, 3, order="position").group_id[0]
    assert [int(position[2 * a]) for a in sorted(left)] == [0, 1, 2]
    original = bipartite_match(metric, 3, order="original").group_id
    firsts = [(original[0] == g).nonzero()[0].item() for g in range(9)]
    assert firsts == sorted(firsts)


def test_strided_input_and_small_blocks(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.randn(50, 2, 16, generator=generator)
    view = base.transpose(0, 1)[..., ::2]
    want = bipartite_match(view.contiguous(), 11)
    same(bipartite_match(view, 11), want)
    monkeypatch.setattr(torch_backend, "BLOCK_BYTES", 1)  # one row at a time
    same(bipartite_match(view, 11), want)


def test_permutations_move_the_pairs(generator: torch.Generator) -> None:
    metric = torch.randn(1, 20, 6, generator=generator)
    halves = (torch.arange(0, 9), torch.arange(9, 20))
    want = bipartite_match(metric, 4, split=halves).merged_tokens()
    mixed = torch.randperm(20, generator=generator)
    place = mixed.argsort()
    got = bipartite_match(metric[:, mixed], 4, split=tuple(place[half] for half in halves)).merged_tokens()
    assert torch.equal(got, want[:, mixed])


def test_repeated_runs_give_the_same_bits(generator: torch.Generator) -> None:
    metric = torch.randn(2, 129, 40, generator=generator)
    runs = [bipartite_match(metric, threshold=0.2) for _ in range(10)]
    merged = [merge_groups(metric, run.group_id, run.n_out) for run in runs]
    assert all(torch.equal(run.scores, runs[0].scores) for run in runs)
    assert all(torch.equal(run.group_id, runs[0].group_id) for run in runs)
    assert all(torch.equal(values, merged[0]) for values in merged)


def test_bad_arguments() -> None:
    metric = torch.randn(2, 6, 3)
    with pytest.raises(ValueError, match="give r, a threshold"):
        bipartite_match(metric)
    with pytest.raises(ValueError, match="order"):
        bipartite_match(metric, 1, order="rank")
    with pytest.raises(ValueError, match="twice"):
        bipartite_match(metric, 1, split=(torch.tensor([0, 1]), torch.tensor([1, 2])))
    with pytest.raises(ValueError, match="outside"):
        bipartite_match(metric, 1, split=(torch.tensor([0]), torch.tensor([6])))
    with pytest.raises(ValueError, match="threshold"):
        bipartite_match(metric, threshold=torch.zeros(3))
    with pytest.raises(ValueError, match="protect"):
        bipartite_match(metric, 1, protect=-1)
    with pytest.raises(TypeError):
        bipartite_match(metric, 0.5)
    with pytest.raises(ValueError, match="size"):
        merge_groups(metric, torch.zeros(2, 6, dtype=torch.long), 1, size=torch.ones(2, 5))
