"""Triton selection against PyTorch and the oracle. Run by `test_kcenter_triton.py`, in Triton's interpreter
mode where there is no GPU; not collected by itself."""

from __future__ import annotations

import pytest
import torch
from golden_io import Case

from vlmprune.kernels.backend import use_backend
from vlmprune.kernels.kcenter import KCenterResult, greedy_select, triton_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def triton_select(x: torch.Tensor | None, k: object, **arguments: object) -> KCenterResult:
    """Run in Triton on the test device and bring the result to the CPU."""

    def move(value: object) -> object:
        return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    moved = {name: move(value) for name, value in arguments.items()}
    got = greedy_select(move(x), move(k), backend="triton", **moved)
    return KCenterResult(got.indices.cpu(), got.radius.cpu(), got.min_distance.cpu())


def same(got: KCenterResult, want: KCenterResult, tolerance: float) -> None:
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.radius, want.radius, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got.min_distance, want.min_distance, atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem that Triton takes must not end up in PyTorch unnoticed."""
    accepts = triton_backend.supports

    def supports(*arguments: object) -> bool:
        assert accepts(*arguments), "fell back to PyTorch"
        return True

    monkeypatch.setattr(triton_backend, "supports", supports)


@pytest.mark.golden("kernels", "kcenter")
def test_golden(case: Case) -> None:
    got = triton_select(
        torch.from_numpy(case.inputs["x"])[None],
        case.integer("k"),
        metric=("cosine", "l2")[case.integer("metric")],
        start=case.integer("start"),
        valid=torch.from_numpy(case.inputs["valid"])[None].bool(),
        preselected=torch.from_numpy(case.params["preselected"]).long(),
    )
    assert torch.equal(got.indices[0], torch.from_numpy(case.outputs["indices"]).long())
    radius = got.radius[0].nan_to_num(posinf=-2.0)
    torch.testing.assert_close(radius, torch.from_numpy(case.outputs["radius"]), atol=1e-5, rtol=1e-5)
    want = torch.from_numpy(case.outputs["min_dist"])
    torch.testing.assert_close(got.min_distance[0], want, atol=1e-5, rtol=1e-5)


# Around one tile of the kernels (64 and 32 tokens) and one block of the selection kernel.
@pytest.mark.parametrize(
    ("metric", "channels", "n"),
    [("cosine", 20, n) for n in (1, 2, 3, 63, 64, 65)]
    + [("l2", 3, n) for n in (1, 2, 3, 31, 32, 33)]
    + [("l2", 40, n) for n in (1, 2, 65)],
)
def test_sizes_and_counts(metric: str, channels: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(4, n, channels, generator=generator)
    counts = torch.tensor([0, 1, min(n, 20), n + 3 if n < 40 else 9])
    arguments = {"metric": metric, "start": torch.tensor([n - 1, 0, n // 2, 0])}
    got = triton_select(x, counts, k_max=n + 3, **arguments)
    same(got, greedy_select(x, counts, k_max=n + 3, backend="torch", **arguments), 2e-5)
    same(got, greedy_select(x, counts, k_max=n + 3, backend="reference", **arguments), 2e-5)


@pytest.mark.parametrize("objective", ["min_max", "max_sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_and_types(objective: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    x = (torch.randn(40, 3, 70, generator=generator) + 0.5).to(dtype).transpose(0, 1)[..., ::2]
    valid = torch.rand(3, 40, generator=generator) < 0.7
    valid[2] = False
    arguments = {
        "objective": objective,
        "valid": valid,
        "start": "medoid",
        "preselected": torch.tensor([[-1, -1, -1], [4, -1, 11], [0, 1, 2]]),
    }
    if objective == "min_max":
        arguments["weight"] = torch.rand(3, 40, generator=generator)
    got = triton_select(x, 20, **arguments)
    same(got, greedy_select(x, 20, backend="torch", **arguments), 1e-5)
    assert (got.indices[2] == -1).all() and (got.indices[1] >= 0).sum() == 20


@pytest.mark.parametrize("kind", ["distance", "similarity"])
@pytest.mark.parametrize("objective", ["min_max", "max_sum"])
def test_matrices(kind: str, objective: str) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randint(-4, 5, (2, 19, 38), generator=generator).to(torch.bfloat16)[..., ::2]
    arguments = {kind: matrix, "objective": objective, "preselected": [3], "valid": torch.ones(2, 19) > 0}
    got = triton_select(None, 21, **arguments)
    same(got, greedy_select(None, 21, backend="torch", **arguments), 0.0)
    same(got, greedy_select(None, 21, backend="reference", **arguments), 0.0)


def test_negative_zero_ties_with_zero() -> None:
    distance = torch.tensor([[[0.0, -0.0, 0.0, 0.0]] * 4])
    assert triton_select(None, 4, distance=distance).indices.tolist() == [[0, 1, 2, 3]]
    assert triton_select(None, 4, similarity=-distance, objective="max_sum").indices.tolist() == [[0, 1, 2, 3]]


def test_ties_take_the_lowest_index() -> None:
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(9, 24, generator=generator)
    x = points[torch.randint(0, 9, (1, 37), generator=generator)]
    for metric, part in (("cosine", x), ("l2", x[..., :4]), ("cosine", x.half()), ("l2", x.tile(1, 1, 2))):
        got = triton_select(part, 40, metric=metric)
        same(got, greedy_select(part, 40, metric=metric, backend="torch"), 1e-5)
        same(got, greedy_select(part, 40, metric=metric, backend="reference"), 1e-5)


def test_rows_that_are_not_finite() -> None:
    x = torch.randn(1, 11, 6, generator=torch.Generator().manual_seed(1))
    x[0, 2], x[0, 8, 3] = torch.nan, torch.inf
    for metric, part in (("cosine", x), ("l2", x), ("l2", x.tile(1, 1, 6))):
        order = triton_select(part, 11, metric=metric).indices[0].tolist()
        assert sorted(order) == list(range(11)) and order[-2:] == [2, 8]


def test_memory_cap_splits_the_batch() -> None:
    x = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(2))
    want = triton_select(x, 6)
    same(triton_select(x, 6, memory_cap=4 * 16 * 16), want, 0.0)


def test_forced_by_context() -> None:
    x = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(4), device="cpu").to(DEVICE)
    with use_backend("triton"):
        got = greedy_select(x, 5)
    assert torch.equal(got.indices, greedy_select(x, 5, backend="torch").indices)


def test_larger_problems_run_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(6))
    want = greedy_select(x, 6, backend="torch")
    same(triton_select(x, 6, memory_cap=4 * 12 * 12 - 1), want, 1e-6)
    assert triton_select(x.double(), 6).radius.dtype == torch.float64
    monkeypatch.setattr(triton_backend, "MAX_TOKENS", 11)
    same(triton_select(x, 6), want, 1e-6)
