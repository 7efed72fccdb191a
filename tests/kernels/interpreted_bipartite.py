"""Triton matching and merging against PyTorch and the oracle. Run by `test_bipartite_triton.py`, in Triton's
interpreter mode where there is no GPU; not collected by itself."""

from __future__ import annotations

import pytest
import torch
from golden_io import Case

from vlmprune.kernels.backend import use_backend
from vlmprune.kernels.bipartite import BipartiteMatch, bipartite_match, merge_groups, merge_pairs, torch_backend
from vlmprune.kernels.bipartite import match as match_module
from vlmprune.kernels.bipartite import merge as merge_module
from vlmprune.kernels.bipartite import pairs as pairs_module
from vlmprune.kernels.gather import segment_merge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = ("group_id", "counts", "scores", "partner", "merged", "a_index", "b_index", "kept", "sources", "into")


def move(value: object, device: str = DEVICE) -> object:
    if isinstance(value, tuple):
        return tuple(move(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def triton_match(metric: torch.Tensor, *arguments: object, **named: object) -> BipartiteMatch:
    """Run in Triton on the test device and bring the result to the CPU."""
    moved = {name: move(value) for name, value in named.items()}
    got = bipartite_match(move(metric), *map(move, arguments), backend="triton", **moved)
    fields = {name: move(getattr(got, name), "cpu") for name in FIELDS}
    return BipartiteMatch(n_out=got.n_out, **fields)


def triton_merge(x: torch.Tensor, group: torch.Tensor, n_out: int, mode: str, size: object = None) -> torch.Tensor:
    return merge_groups(move(x), move(group), n_out, mode, move(size), backend="triton").cpu()


def triton_pairs(
    x: torch.Tensor, match: BipartiteMatch, size: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = map(move, (match.kept, match.sources, match.into, size))
    merged, total = merge_pairs(move(x), *pairs, backend="triton")
    return merged.cpu(), total.cpu()


def same(got: BipartiteMatch, want: BipartiteMatch) -> None:
    assert got.n_out == want.n_out
    for name in ("group_id", "counts", "partner", "merged", "kept", "sources", "into"):
        left, right = getattr(got, name), getattr(want, name)
        assert left is right is None or torch.equal(left, right), name
    torch.testing.assert_close(got.scores, want.scores, atol=2e-6, rtol=0, equal_nan=True)


def broken(*arguments: object, **named: object) -> None:
    """Stands for PyTorch's version where a case must not end up there unnoticed."""
    raise AssertionError("ran in PyTorch")


@pytest.mark.golden("tome", "reference")
def test_golden(case: Case) -> None:
    x = torch.from_numpy(case.inputs["x"])
    size = torch.from_numpy(case.inputs["size"])[..., 0] if "size" in case.inputs else None
    protect = case.integer("class_token") + case.integer("distill_token")
    match = triton_match(torch.from_numpy(case.inputs["metric"]), case.integer("r"), protect=protect)
    merged = triton_merge(x, match.group_id, match.n_out, "wavg", size)
    torch.testing.assert_close(merged, torch.from_numpy(case.outputs["x"]), atol=1e-5, rtol=0)


# Around one tile of the kernels: 64 tokens of each half, 32 or 64 channels.
@pytest.mark.parametrize(
    ("n", "channels", "dtype"),
    [(n, 33, torch.float32) for n in (1, 2, 3, 127, 128, 129, 130)]
    + [(131, 64, torch.float16), (131, 65, torch.float16), (66, 70, torch.bfloat16)],
)
def test_sizes_and_types(n: int, channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    metric = (torch.randn(n, 2, channels, generator=generator) + 0.2).to(dtype).transpose(0, 1)
    for arguments in ({"r": n // 3}, {"r": n + 5, "protect": 1}, {"threshold": 0.1, "order": "position"}):
        got = triton_match(metric, **arguments)
        same(got, bipartite_match(metric, backend="torch", **arguments))
        same(got, bipartite_match(metric, backend="reference", **arguments))


def test_masks_halves_and_limits() -> None:
    generator = torch.Generator().manual_seed(8)
    metric = torch.randn(3, 70, 20, generator=generator)
    arguments = {
        "r": torch.tensor([0, 4, 50]),
        "valid": torch.rand(3, 70, generator=generator) < 0.7,
        "protected": torch.rand(3, 70, generator=generator) < 0.2,
    }
    arguments["valid"][1] = False
    same(triton_match(metric, **arguments), bipartite_match(metric, **arguments))
    mixed = torch.stack([torch.randperm(70, generator=generator) for _ in range(3)])
    halves = (mixed[:, :31].clone(), mixed[:, 31:64].clone())
    halves[0][0, :4], halves[1][2, :] = -1, -1
    same(triton_match(metric, 9, split=halves), bipartite_match(metric, 9, split=halves))


def test_ties_take_the_lowest_index() -> None:
    generator = torch.Generator().manual_seed(5)
    for channels, kinds in ((24, 9), (40, 1)):
        base = torch.randn(kinds, channels, generator=generator)
        metric = base[torch.randint(0, kinds, (2, 75), generator=generator)]
        for part in (metric, metric.half()):
            got = triton_match(part, 20)
            same(got, bipartite_match(part, 20, backend="torch"))
            same(got, bipartite_match(part, 20, backend="reference"))


def test_equal_rows_tie() -> None:
    """As for PyTorch, which finds equal rows first; here equal rows have equal cosines, and 1 to each other."""
    generator = torch.Generator().manual_seed(11)
    for channels, kinds, n in ((7, 3, 70), (33, 5, 131)):
        base = torch.randn(kinds, channels, generator=generator)
        base[0, 0] = 0.0
        metric = base[torch.randint(0, kinds, (2, n), generator=generator)]
        metric[0, 1::2] = torch.randn(n // 2, channels, generator=generator)[torch.arange(n // 2) % 9]
        metric[..., 0] = torch.where(metric[..., 0] == 0, metric[..., 0] * metric[..., 1].sign(), metric[..., 0])
        blocked = torch.rand(2, n, generator=generator) < 0.2
        for arguments in ({}, {"protect": 2}, {"protected": blocked}):
            got = triton_match(metric, n // 4, **arguments)
            same(got, bipartite_match(metric, n // 4, backend="reference", **arguments))
    for _ in range(5):
        row = torch.randn(24, generator=generator)
        close = row.clone()
        close[3] *= 1 + 2.0**-12
        match = triton_match(torch.stack([row, close, row, close, close, row])[None], 3)
        assert match.partner.tolist() == [[2, 2, 0]] and match.scores.eq(1).all()


@pytest.mark.parametrize("order", ["tome", "position", "original"])
@pytest.mark.parametrize(("n", "protect"), [(9, 0), (32, 1), (33, 2), (131, 1), (4, 9)])
def test_pairs(n: int, protect: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if order != "original":
        monkeypatch.setattr(match_module, "assemble_pairs", nothing_merges)
    generator = torch.Generator().manual_seed(n)
    metric = torch.randn(3, n, 6, generator=generator)
    for r in (n // 4, 1000) if n < 100 else (n // 4,):
        got = triton_match(metric, r, protect=protect, order=order)
        same(got, bipartite_match(metric, r, protect=protect, order=order, backend="reference"))
        assert got.kept is not None and got.merged.dtype == torch.bool


def nothing_merges(problem: object, *rest: object) -> BipartiteMatch:
    """PyTorch's version, only where nothing merges: the kernel must not end up there unnoticed."""
    assert problem.width == 0
    return pairs_module.assemble_pairs(problem, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("trailing", [(), (7,), (2, 3)])
def test_merging_pairs(trailing: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(9)
    match = bipartite_match(torch.randn(2, 21, 2, generator=generator), 9, protect=1)
    assert match.into.sort().values.diff().eq(0).any(), "several tokens into one output"
    x = torch.randn(21, 2, *trailing, generator=generator).to(dtype).transpose(0, 1)
    size = torch.randint(1, 6, (2, 21), generator=generator).float()
    monkeypatch.setattr(pairs_module, "take_rows", broken)
    for weights in (size, size.double(), None):
        merged, total = triton_pairs(x, match, weights)
        want = merge_groups(x, match.group_id, match.n_out, size=weights, backend="reference")
        tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(merged, want, atol=tolerance, rtol=tolerance)
        mass = torch.ones(2, 21) if weights is None else weights
        assert torch.equal(total, segment_merge(mass, match.group_id, match.n_out, mode="sum"))
        assert torch.equal(merged[:, 0], x[:, 0])


def test_pairs_in_pytorch() -> None:
    """Gradients and float64 have no kernel."""
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(6))
    match = bipartite_match(x, 4)
    leaf = x.clone().to(DEVICE).requires_grad_()
    merged, total = merge_pairs(leaf, *map(move, (match.kept, match.sources, match.into)), backend="triton")
    (merged * total[..., None]).sum().backward()
    torch.testing.assert_close(leaf.grad, torch.ones_like(leaf))
    assert triton_pairs(x.double(), match, None)[0].dtype == torch.float64


def test_rows_that_are_not_finite() -> None:
    metric = torch.randn(1, 14, 6, generator=torch.Generator().manual_seed(1))
    metric[0, 2], metric[0, 5], metric[0, 8, 3] = torch.nan, torch.inf, torch.inf
    got = triton_match(metric, 5)
    same(got, bipartite_match(metric, 5))
    assert not got.merged[0, [1, 4]].any() and not (got.partner[0, [0, 2, 3, 5, 6]] == 2).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["wavg", "mean", "sum", "amax"])
def test_merging(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_module, "segment_merge", broken)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(11, 2, 3, 7, generator=generator).to(dtype).transpose(0, 1)
    group = torch.randint(-1, 6, (2, 11), generator=generator)
    group[1] = torch.where(group[1] == 4, -1, group[1])
    x[0, 1, 0, 0], group[0, 1] = torch.nan, 3
    size = torch.randint(0, 4, (2, 11), generator=generator).float()
    got = triton_merge(x, group, 8, mode, size)
    want = merge_groups(x, group, 8, mode, size, backend="reference")
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert not got[:, 6:].any() and got[0, 3, 0, 0].isnan()


def test_wide_features_and_no_tokens() -> None:
    x = torch.randn(1, 5, 1030, generator=torch.Generator().manual_seed(6))
    group = torch.tensor([[0, 1, 0, 1, 1]])
    want = torch.stack([x[:, [0, 2]].sum(1), x[:, [1, 3, 4]].sum(1)], 1)
    torch.testing.assert_close(triton_merge(x, group, 2, "sum"), want)
    assert triton_merge(x[:, :0], group[:, :0], 2, "mean").eq(0).all()


def test_what_runs_in_pytorch() -> None:
    """float64, gradients and `prune` have no kernel; the result is that of PyTorch."""
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(6))
    want = bipartite_match(x.double(), 4)
    same(triton_match(x.double(), 4), want)
    merged = triton_merge(x.double(), want.group_id, want.n_out, "sum")
    assert merged.dtype == torch.float64
    leaf = x.clone().to(DEVICE).requires_grad_()
    merge_groups(leaf, want.group_id.to(DEVICE), want.n_out, "sum", backend="triton").sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    kept = triton_merge(x, want.group_id, want.n_out, "prune")
    assert torch.equal(kept, merge_groups(x, want.group_id, want.n_out, "prune"))


def test_forced_by_context(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    want = bipartite_match(x, 3, backend="torch")

    monkeypatch.setattr(torch_backend, "best_partners", broken)
    monkeypatch.setattr(torch_backend, "ranks", broken)
    with use_backend("triton"):
        got = bipartite_match(x, 3)
    assert torch.equal(got.group_id, want.group_id)
