"""Streamed attention sums against dense float64 softmax attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels.backend import BackendError
from vlmprune.kernels.column_mass import attention_rows, column_mass, group_mass
from vlmprune.kernels.column_mass.masking import block_mask
from vlmprune.kernels.column_mass.queries import query_rows
from vlmprune.kernels.column_mass.stream import attention_blocks

B, H, N, D = 2, 4, 37, 8


def dense(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | float = 0.0, scale: float | None = None):
    """``[B, H, Nq, N]`` eager attention in float64; ``bias`` is added to the scores."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    return scores.softmax(-1).nan_to_num(0.0)


def causal_bias(n_queries: int, n_keys: int, offset: int) -> torch.Tensor:
    return torch.full((n_queries, n_keys), -torch.inf, dtype=torch.float64).triu(offset + 1)


def qk(generator: torch.Generator, n_queries: int = N, n_keys: int = N, key_heads: int = H):
    q = torch.randn(B, H, n_queries, D, generator=generator) * 2
    return q, torch.randn(B, key_heads, n_keys, D, generator=generator) * 2


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("chunk_bytes", [400, 3000, 1 << 25])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_shared_key_heads_and_chunks(key_heads: int, chunk_bytes: int, generator: torch.Generator) -> None:
    q, k = qk(generator, n_queries=21, key_heads=key_heads)
    want = dense(q, k)
    got = column_mass(q, k, chunk_bytes=chunk_bytes)
    close(got, want.mean((1, 2)))
    torch.testing.assert_close(got.sum(1), torch.ones(B))
    close(column_mass(q, k, per_head=True, reduce="sum", chunk_bytes=chunk_bytes), want.sum(2))
    close(attention_rows(q, k, range(3, 9), chunk_bytes=chunk_bytes), want[:, :, 3:9])
    close(column_mass(q, k, backend="reference"), want.mean((1, 2)))


def test_blocks_are_bounded(generator: torch.Generator) -> None:
    q, k = qk(generator, key_heads=2)
    for limit in (2 * N * 4, 5000, 40000):
        seen = torch.zeros(B, H, N, dtype=torch.long)
        for block in attention_blocks(q, k, query_rows(None, B, N, q.device), block_mask(q, k, {}), None, limit):
            assert block.probability.numel() * 4 <= limit
            seen[block.batch, block.heads, block.rows] += 1
        assert (seen == 1).all()


def masks(generator: torch.Generator, n_queries: int) -> dict[str, tuple[dict, torch.Tensor]]:
    """Masking arguments and the same as a bias for dense attention."""
    allowed = torch.rand(B, H, n_queries, N, generator=generator) < 0.7
    allowed[..., 5] = True
    additive = torch.randn(1, 1, n_queries, N, generator=generator)
    low = torch.where(allowed[:, :1], 0.0, torch.finfo(torch.float32).min)  # transformers' masks
    valid = torch.rand(B, N, generator=generator) < 0.6
    valid[:, 0] = True
    size = torch.rand(B, N, generator=generator).log()
    per_head = torch.randn(1, H, N, generator=generator)
    own = torch.randint(0, 3, (n_queries,), generator=generator)
    other = torch.randint(0, 3, (B, N), generator=generator)
    blocked = torch.tensor(-torch.inf, dtype=torch.float64)

    def bias(mask: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, 0.0, blocked)

    causal = causal_bias(n_queries, N, N - n_queries)
    same = own[:, None] == other[:, None, :]
    return {
        "bool": ({"mask": allowed}, bias(allowed)),
        "additive": ({"mask": additive}, additive.double()),
        "finfo.min": ({"mask": low}, bias(allowed[:, :1])),
        "half additive": ({"mask": additive.half()}, additive.half().double()),
        "causal": ({"causal": True}, causal),
        "causal offset": ({"causal": True, "causal_offset": -3}, causal_bias(n_queries, N, -3)),
        "padding": ({"key_valid": valid}, bias(valid)[:, None, None]),
        "key bias": ({"key_bias": size}, size[:, None, None].double()),
        "key bias per head": ({"key_bias": per_head}, per_head[:, :, None].double()),
        "segments": ({"segments": (own, other)}, bias(same)[:, None]),
        "all": (
            {"mask": allowed, "causal": True, "key_valid": valid, "key_bias": size},
            bias(allowed) + causal + bias(valid)[:, None, None] + size[:, None, None],
        ),
    }


MASKS = tuple(masks(torch.Generator(), N))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("n_queries", [N, 20])
def test_masks(name: str, n_queries: int, generator: torch.Generator) -> None:
    q, k = qk(generator, n_queries=n_queries, key_heads=2)
    arguments, bias = masks(generator, n_queries)[name]
    want = dense(q, k, bias)
    rows = torch.tensor([[0, 11, -1, 19], [7, 7, 3, -1]])
    picked = torch.stack([want[b][:, rows[b].clamp_min(0)] for b in range(B)])
    picked = picked * (rows >= 0)[:, None, :, None]
    for chunk_bytes, backend in ((2000, "torch"), (1 << 25, "torch"), (1, "reference")):
        options = {"chunk_bytes": chunk_bytes, "backend": backend}
        close(column_mass(q, k, **options, **arguments), want.mean((1, 2)))
        close(attention_rows(q, k, rows, **options, **arguments), picked)
        ordered = [18, 2, 5]
        close(attention_rows(q, k, ordered, **options, **arguments), want[:, :, ordered])
        close(attention_rows(q, k, torch.tensor(ordered), **options, **arguments), want[:, :, ordered])


@pytest.mark.parametrize("edges", [(0, 5, 6, 20, 37), (0, 37), (0, 10, 10, 30)])
def test_packed_segments(edges: tuple[int, ...], generator: torch.Generator) -> None:
    q, k = qk(generator)
    want = torch.zeros(B, H, N, N, dtype=torch.float64)
    for start, stop in itertools.pairwise(edges):
        if stop > start:
            want[:, :, start:stop, start:stop] = dense(q[:, :, start:stop], k[:, :, start:stop])
    tensor = torch.tensor(edges, dtype=torch.int32)
    for cu_seqlens, chunk_bytes in itertools.product((edges, tensor), (1, 5000, 1 << 25)):
        got = column_mass(q, k, cu_seqlens=cu_seqlens, reduce="sum", chunk_bytes=chunk_bytes)
        close(got, want.sum(2).mean(1), 1e-5)
    close(column_mass(q, k, cu_seqlens=edges, reduce="sum", backend="reference"), want.sum(2).mean(1), 1e-5)
    close(attention_rows(q, k, [30, 2], cu_seqlens=edges), want[:, :, [30, 2]])


def test_host_knowledge_saves_work(generator: torch.Generator) -> None:
    q, k = qk(generator)
    mask = block_mask(q, k, {"cu_seqlens": (0, 10, 20, N)})
    rows = query_rows(range(10, 20), B, N, q.device)
    assert [b.keys for b in attention_blocks(q, k, rows, mask, None, 1 << 25)] == [slice(10, 20)]
    mask = block_mask(q, k, {"causal": True})
    assert [b.keys for b in attention_blocks(q, k, rows, mask, None, 1 << 25)] == [slice(0, 20)]


def test_row_choices_and_weights(generator: torch.Generator) -> None:
    q, k = qk(generator)
    share = dense(q, k)
    close(column_mass(q, k, rows=36), share[:, :, 36].mean(1))
    close(column_mass(q, k, rows=range(0)), torch.zeros(B, N, dtype=torch.float64))
    close(column_mass(q, k, rows=range(1, 30, 7)), share[:, :, 1:30:7].mean((1, 2)))
    rows = torch.tensor([[3, 9, -1], [30, -1, -1]], dtype=torch.int32)
    want = torch.stack([share[0][:, [3, 9]].mean((0, 1)), share[1][:, 30].mean(0)])
    close(column_mass(q, k, rows=rows), want)
    weight = torch.rand(B, 3, generator=generator)
    mixed = torch.stack(
        [
            (share[0][:, [3, 9]] * weight[0, :2, None].double()).sum(1).mean(0) / weight[0, :2].sum().double(),
            share[1][:, 30].mean(0),
        ]
    )
    close(column_mass(q, k, rows=rows, row_weight=weight), mixed)
    seen = torch.rand(B, N, generator=generator) < 0.5
    want = (share * seen[:, None, :, None]).sum(2).mean(1)
    close(column_mass(q, k, row_weight=seen, reduce="sum"), want, 1e-5)
    close(column_mass(q, k, row_weight=seen), want / seen.sum(1, keepdim=True))
    close(column_mass(q, k, row_weight=torch.zeros(N)), torch.zeros(B, N, dtype=torch.float64))


def test_head_weight(generator: torch.Generator) -> None:
    q, k = qk(generator)
    weight = torch.rand(B, H, generator=generator)
    share = dense(q, k).mean(2)
    want = (share * weight[..., None].double()).sum(1) / weight.sum(1, keepdim=True).double()
    close(column_mass(q, k, head_weight=weight), want)
    one_head = torch.tensor([0.0, 0.0, 5.0, 0.0])
    close(column_mass(q, k, head_weight=one_head), share[:, 2])


def test_rows_without_keys_are_zero(generator: torch.Generator) -> None:
    q, k = qk(generator)
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[1] = False
    valid[0, :4] = False
    got = attention_rows(q, k, range(N), key_valid=valid, causal=True)
    assert not got[1].any() and not got[0, :, :4].any()
    torch.testing.assert_close(got[0, :, 4:].sum(-1), torch.ones(H, N - 4))
    mass = column_mass(q, k, key_valid=valid, causal=True)
    assert not mass[1].any()
    torch.testing.assert_close(mass[0].sum(), torch.tensor((N - 4) / N))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types(dtype: torch.dtype, generator: torch.Generator) -> None:
    q, k = (tensor.to(dtype) for tensor in qk(generator, key_heads=2))
    want = dense(q, k).mean((1, 2))
    got = column_mass(q, k)
    if dtype == torch.float64:
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, atol=1e-14, rtol=1e-12)
        assert attention_rows(q, k, 0).dtype == dtype
    else:
        close(got, want)  # the inputs are rounded, the computation is not


def test_group_mass(generator: torch.Generator) -> None:
    q, k = qk(generator, n_queries=25, key_heads=2)
    own = torch.randint(-1, 3, (B, 25), generator=generator)
    other = torch.randint(-1, 4, (B, N), generator=generator)
    weight = torch.rand(H, generator=generator)
    share = dense(q, k, causal_bias(25, N, N - 25))
    share = (share * (weight / weight.sum())[None, :, None, None].double()).sum(1)
    want = torch.zeros(B, 3, 4, dtype=torch.float64)
    for b, i, j in itertools.product(range(B), range(25), range(N)):
        if own[b, i] >= 0 and other[b, j] >= 0:
            want[b, own[b, i], other[b, j]] += share[b, i, j]
    arguments = {"n_query_groups": 3, "n_key_groups": 4, "causal": True, "head_weight": weight}
    for options in ({"chunk_bytes": 1}, {"chunk_bytes": 4000}, {}, {"backend": "reference"}):
        close(group_mass(q, k, own, other, **arguments, **options), want, 1e-5)
    rows = torch.tensor([[24, 3, -1], [0, 5, 6]])
    got = group_mass(q, k, torch.zeros(3, dtype=torch.long), other, rows=rows, **arguments)
    part = torch.stack([share[b][rows[b].clamp_min(0)] * (rows[b] >= 0)[:, None] for b in range(B)]).sum(1)
    for group in range(4):
        close(got[:, 0, group], (part * (other == group)).sum(1), 1e-5)
    assert not got[:, 1:].any()


def test_group_mass_sums_to_rows(generator: torch.Generator) -> None:
    q, k = qk(generator)
    groups = torch.arange(N) % 3
    got = group_mass(q, k, groups, groups, n_query_groups=3, n_key_groups=3)
    torch.testing.assert_close(got.sum(2), torch.bincount(groups).float().expand(B, 3))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (6, 3)]), st.integers(1, 9), st.integers(1, 9),
    st.integers(1, 400), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    batch: int, heads: tuple[int, int], n_queries: int, n_keys: int, chunk: int, causal: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], n_queries, 3, generator=generator)
    k = torch.randn(batch, heads[1], n_keys, 3, generator=generator)
    bias = causal_bias(n_queries, n_keys, n_keys - n_queries) if causal else 0.0
    want = dense(q, k, bias, scale=0.7).sum(2).mean(1)
    close(column_mass(q, k, scale=0.7, causal=causal, reduce="sum", chunk_bytes=chunk), want, 1e-5)


def test_batch_equals_loop_and_strides(generator: torch.Generator) -> None:
    base = torch.randn(N, B, 2 * H, D, generator=generator)
    q, k = base[:, :, :H].permute(1, 2, 0, 3), base[:, :, H::2].permute(1, 2, 0, 3)
    got = column_mass(q, k, causal=True)
    close(got, dense(q, k, causal_bias(N, N, 0)).mean((1, 2)))
    for b in range(B):
        alone = column_mass(q[b : b + 1].contiguous(), k[b : b + 1].contiguous(), causal=True)
        torch.testing.assert_close(alone[0], got[b], atol=1e-7, rtol=1e-6)
    for _ in range(5):
        assert torch.equal(column_mass(q, k, causal=True), got)


def test_autocast_has_no_effect(generator: torch.Generator) -> None:
    q, k = qk(generator)
    want = column_mass(q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(column_mass(q, k), want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": torch.zeros(1, 3, 5, 4)}, "H a multiple of Hk"),
        ({"q": torch.zeros(1, 2, 5, 3)}, r"\[B, Hk, N, d\]"),
        ({"k": torch.zeros(1, 2, 0, 4)}, "N at least 1"),
        ({"q": torch.zeros(1, 2, 5, 4, dtype=torch.long)}, "float tensors"),
        ({"reduce": "max"}, "reduce must be"),
        ({"per_head": True, "head_weight": torch.ones(2)}, "leave it out"),
        ({"head_weight": torch.ones(3)}, "head_weight must be"),
        ({"rows": [5]}, "outside 0..4"),
        ({"rows": -1}, "count rows from the start"),
        ({"rows": torch.tensor([-1])}, "outside 0..4"),
        ({"rows": torch.tensor([[5]])}, "outside -1..4"),
        ({"rows": torch.zeros(2, 1, dtype=torch.long)}, "rows has 2 samples, q has 1"),
        ({"rows": torch.tensor([0.0])}, "rows must be an int tensor"),
        ({"row_weight": torch.ones(4)}, "row_weight must be"),
        ({"mask": torch.ones(5, 6, dtype=torch.bool)}, "mask must be"),
        ({"key_valid": torch.ones(1, 5, dtype=torch.bool)}, "key_valid must be a bool tensor"),
        ({"key_bias": torch.ones(1, 5)}, "key_bias is for 5 keys, there are 6"),
        ({"causal_offset": 1}, "needs causal=True"),
        ({"cu_seqlens": (0, 5)}, "as many queries as keys, got 5 and 6"),
        ({"segments": (torch.zeros(5), torch.zeros(5))}, "key ids must be"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        column_mass(**{"q": torch.zeros(1, 2, 5, 4), "k": torch.zeros(1, 2, 6, 4), **arguments})


def test_bad_segments_and_groups() -> None:
    q = torch.zeros(1, 1, 4, 2)
    for edges in ((0, 3, 2), (1, 4), (0, 5)):
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            column_mass(q, q, cu_seqlens=edges)
    with pytest.raises(ValueError, match="not both"):
        column_mass(q, q, cu_seqlens=(0, 4), segments=(torch.zeros(4), torch.zeros(4)))
    with pytest.raises(TypeError, match="Unknown argument 'causl'; masking takes mask, causal"):
        column_mass(q, q, causl=True)
    sizes = {"n_query_groups": 1, "n_key_groups": 2}
    with pytest.raises(ValueError, match="query_groups holds an id that is not below 1"):
        group_mass(q, q, torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long), **sizes)
    with pytest.raises(ValueError, match="key_groups must be int"):
        group_mass(q, q, torch.zeros(4, dtype=torch.long), torch.zeros(3, dtype=torch.long), **sizes)
    with pytest.raises(BackendError, match="column mass has no 'triton' implementation"):
        column_mass(q, q, backend="triton")
