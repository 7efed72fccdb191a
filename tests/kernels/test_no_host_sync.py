"""Nothing reads a number back from the GPU where the arguments allow it.

Fake tensors stand for CUDA tensors: they have a device and a shape but no data, so every read of a value
raises. This runs the CUDA branches without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vlmprune.kernels.bipartite import bipartite_match, merge_groups, merge_pairs
from vlmprune.kernels.column_mass import attention_rows, column_mass, group_mass
from vlmprune.kernels.gather import gather_tokens, ordered_groups, pack_indices, segment_merge
from vlmprune.kernels.kcenter import greedy_select
from vlmprune.kernels.ordering import stable_topk
from vlmprune.kernels.pagerank import fuse_heads, pagerank
from vlmprune.kernels.virtual_attention import virtual_attention

B, N = 2, 80


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with FakeTensorMode():
        yield torch.device("cuda")


def test_reads_are_noticed(cuda: torch.device) -> None:
    with pytest.raises(DataDependentOutputException):
        pack_indices(torch.ones(B, N, dtype=torch.bool, device=cuda))  # no width: must read the counts


@pytest.mark.parametrize("route", ["gram", "features"])
@pytest.mark.parametrize(("metric", "channels"), [("cosine", 40), ("l2", 40), ("l2", 6)])
def test_selection(route: str, metric: str, channels: int, cuda: torch.device) -> None:
    x = torch.empty(B, N, channels, device=cuda, dtype=torch.half)
    valid = torch.ones(B, N, device=cuda, dtype=torch.bool)
    options = {"metric": metric, "valid": valid, "backend": "torch", "route": route}
    result = greedy_select(x, 3, start=2, **options)
    assert result.indices.shape == (B, 3) and result.indices.device.type == "cuda"
    ragged = torch.ones(B, device=cuda, dtype=torch.long)
    before = torch.zeros(B, 2, device=cuda, dtype=torch.long)
    assert greedy_select(x, ragged, k_max=5, start="medoid", preselected=before, **options).radius.shape == (
        B,
        5,
    )
    by_score = {"start": "score", "start_score": x[..., 0], "weight": x[..., 1]}
    assert greedy_select(x, ragged, preselected=valid, **by_score, **options).indices.shape == (B, N)


def test_order_and_gather(cuda: torch.device) -> None:
    scores = torch.empty(B, N, device=cuda)
    valid = torch.ones(B, N, device=cuda, dtype=torch.bool)
    counts = torch.ones(B, device=cuda, dtype=torch.int32)
    index = stable_topk(scores, counts, valid, k_max=9, order="index")
    assert index.shape == (B, 9) and stable_topk(scores.double(), 4).shape == (B, 4)
    assert gather_tokens(torch.empty(B, N, 7, device=cuda), index).shape == (B, 9, 7)
    packed, filled = pack_indices(valid, side="left", width=N)
    assert packed.shape == filled.shape == (B, N)
    for mode in ("prune", "mean", "wavg", "sum", "amax"):
        merged = segment_merge(scores[..., None].half(), packed, N, mode=mode, weights=scores)
        assert merged.shape == (B, N, 1) and merged.dtype == torch.half


def test_attention(cuda: torch.device) -> None:
    q = torch.empty(B, 4, N, 8, device=cuda, dtype=torch.bfloat16)
    k = torch.empty(B, 2, N, 8, device=cuda, dtype=torch.bfloat16)
    ids = torch.zeros(N, device=cuda, dtype=torch.long)
    masking = {
        "causal": True,
        "key_valid": torch.ones(B, N, device=cuda, dtype=torch.bool),
        "cu_seqlens": torch.zeros(4, device=cuda, dtype=torch.int32),
    }
    rows = torch.zeros(B, 3, device=cuda, dtype=torch.long)
    assert column_mass(q, k, rows=rows, chunk_bytes=5000, **masking).shape == (B, N)
    assert attention_rows(q, k, ids[:5], **masking).shape == (B, 4, 5, N)
    assert group_mass(q, k, ids, ids, n_query_groups=2, n_key_groups=3, **masking).shape == (B, 2, 3)


def test_matching_and_merging(cuda: torch.device) -> None:
    metric = torch.empty(B, N, 16, device=cuda, dtype=torch.half)
    valid = torch.ones(B, N, device=cuda, dtype=torch.bool)
    counts = torch.ones(B, device=cuda, dtype=torch.long)
    halves = (torch.zeros(30, device=cuda, dtype=torch.long), torch.ones(B, 31, device=cuda, dtype=torch.long))
    for arguments, n_out in (
        ({"r": 7, "protect": 1}, N - 7),
        ({"r": counts, "valid": valid, "protected": valid}, N),
        ({"threshold": torch.zeros(B, device=cuda), "split": halves, "order": "original"}, N),
    ):
        match = bipartite_match(metric, backend="torch", **arguments)
        assert match.n_out == n_out and match.group_id.shape == match.merged_tokens().shape == (B, N)
        merged = merge_groups(metric, match.group_id, match.n_out, size=metric[..., 0], backend="torch")
        assert merged.shape == (B, n_out, 16) and merged.dtype == torch.half


@pytest.mark.parametrize("order", ["tome", "position", "original"])
def test_pairs(order: str, cuda: torch.device) -> None:
    metric, size = (torch.empty(B, N, *rest, device=cuda) for rest in ((16,), ()))
    match = bipartite_match(metric, 7, protect=1, order=order, backend="torch")
    assert match.kept.shape == (B, N - 7) and match.sources.shape == match.into.shape == (B, 7)
    x = torch.empty(B, N, 24, device=cuda, dtype=torch.half)
    merged, total = merge_pairs(x, match.kept, match.sources, match.into, size, backend="torch")
    assert merged.shape == (B, N - 7, 24) and merged.dtype == torch.half and total.shape == (B, N - 7)


def test_pagerank(cuda: torch.device) -> None:
    attention = torch.empty(B, 4, N, N, device=cuda, dtype=torch.bfloat16)
    q, k = (torch.empty(B, heads, N, 8, device=cuda, dtype=torch.half) for heads in (4, 2))
    alive = torch.ones(B, N, device=cuda, dtype=torch.bool)
    for scores in (
        pagerank(attention, 3, alive=alive, damping=0.1, start=attention[0, 0, 0]),
        pagerank(None, 2, qk=(q, k), alive=alive, chunk_bytes=5000),
    ):
        assert scores.shape == (B, 4, N) and scores.dtype == torch.float32
        assert fuse_heads(scores, counted=alive).importance.shape == (B, N)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_selection_on_a_gpu() -> None:
    x, valid = torch.randn(B, N, 16, device="cuda"), torch.ones(B, N, dtype=torch.bool, device="cuda")
    want = greedy_select(x, 7, valid=valid, backend="triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = greedy_select(x, 7, valid=valid, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.indices, want.indices)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_matching_on_a_gpu() -> None:
    x, valid = torch.randn(B, N, 16, device="cuda"), torch.ones(B, N, dtype=torch.bool, device="cuda")

    def run() -> tuple[torch.Tensor, ...]:
        match = bipartite_match(x, 9, valid=valid, backend="triton")
        merged = merge_groups(x, match.group_id, match.n_out, size=x[..., 0], backend="triton")
        fixed = bipartite_match(x, 9, protect=1, backend="triton")
        pairs = merge_pairs(x, fixed.kept, fixed.sources, fixed.into, x[..., 0].abs(), backend="triton")
        return match.group_id, merged, fixed.group_id, *pairs

    want = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, got, want))


def test_places(cuda: torch.device) -> None:
    q = torch.empty(B, 4, 30, 8, device=cuda, dtype=torch.bfloat16)
    k = torch.empty(B, 2, 30, 8, device=cuda, dtype=torch.bfloat16)
    mapping = torch.zeros(B, N, device=cuda, dtype=torch.long)
    tables = [torch.empty(N, 8, device=cuda, dtype=torch.bfloat16) for _ in range(2)]
    assert virtual_attention(q, k, k, mapping, *tables, backend="torch").shape == (B, 4, 30, 8)
    assert ordered_groups(mapping, 30).shape == (B, N)
