"""Weighted PageRank and the fusion of heads, against the plain-loop oracle, eigenvectors and golden vectors.

Golden kind `reference` of `zero_tprune.npz` -> PageRank on the whole attention (`out/wpr_full`), on the survivors,
its head filter, and the matching of the similarity stage, each from the case's own intermediate values.
"""

from __future__ import annotations

import math

import golden_io
import numpy as np
import pytest
import torch
from golden_io import Case

from vlmprune.kernels.bipartite import bipartite_match
from vlmprune.kernels.column_mass import column_mass
from vlmprune.kernels.pagerank import fuse_heads, pagerank

CASES = [case for case in golden_io.cases(golden_io.GOLDEN_DIR / "zero_tprune.npz") if case.kind == "reference"]
golden = pytest.mark.parametrize("case", CASES, ids=str)


def attention_of(batch: int, heads: int, n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(batch, heads, n, n, generator=generator).mul(2).softmax(-1)


def boosted_start(alive: torch.Tensor, case: Case) -> torch.Tensor:
    """Ones on the living tokens, the class token sqrt(N) times as much, mean 1."""
    start = alive.float()
    if case.integer("class_token") and case.integer("cls_boost"):
        start[..., 0] = math.sqrt(int(alive.sum()))
    return start * alive.sum() / start.sum()


@golden
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_golden_scores(case: Case, backend: str) -> None:
    attention = torch.from_numpy(case.inputs["attn"])[None]
    start = boosted_start(torch.ones(attention.shape[2], dtype=torch.bool), case)
    scores = pagerank(attention, case.integer("iters"), start=start, backend=backend)
    torch.testing.assert_close(scores[0], torch.from_numpy(case.outputs["wpr_full"]), atol=1e-5, rtol=1e-5)


@golden
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_golden_survivors_and_heads(case: Case, backend: str) -> None:
    attention = torch.from_numpy(case.inputs["attn"])[None]
    survivors = torch.from_numpy(case.outputs["s_survivors"]).long()
    alive = torch.zeros(1, attention.shape[2], dtype=torch.bool)
    alive[0, survivors] = True
    patches = torch.arange(attention.shape[2]) >= case.integer("class_token")
    limits = (float(case.params["v_min"]), float(case.params["v_max"]))
    before = pagerank(attention, 1, start=boosted_start(torch.ones_like(alive[0]), case), backend=backend)
    importance = fuse_heads(before, *limits, counted=patches[None]).importance
    torch.testing.assert_close(importance[0], torch.from_numpy(case.outputs["importance_pre"]), atol=1e-5, rtol=1e-5)
    start = boosted_start(alive[0], case)
    scores = pagerank(attention, case.integer("iters"), start=start, alive=alive, backend=backend)
    fused = fuse_heads(scores, *limits, counted=alive & patches)
    torch.testing.assert_close(
        fused.importance[0, survivors], torch.from_numpy(case.outputs["importance"]), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(fused.variance[0], torch.from_numpy(case.outputs["head_var"]), atol=1e-5, rtol=1e-4)
    assert torch.equal(fused.kept[0], torch.from_numpy(case.outputs["head_kept"]).bool())
    assert not scores[0, :, ~alive[0]].any()


@golden
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_golden_similar_tokens(case: Case, backend: str) -> None:
    """Given halves by importance: the A tokens most similar to a B token are those to drop, best first."""
    keys = torch.from_numpy(case.inputs["keys"]).permute(1, 0, 2).flatten(1)[None]  # [1, N, H * d]
    first = case.integer("class_token")
    importance = torch.from_numpy(case.outputs["importance_pre"])[first:]
    order = importance.argsort(descending=True, stable=True) + first
    n, less = len(order), len(order) // 2
    a, b = ((order[n - less :], order[: n - less]), (order[:less], order[less:]), (order[1::2], order[0::2]))[
        case.integer("partition")
    ]
    match = bipartite_match(keys, case.integer("s_prune"), split=(a, b), backend=backend)
    dropped = match.merged_tokens()[0].nonzero()[:, 0].tolist()
    assert dropped == sorted(case.outputs["s_dropped"].tolist())
    ranked = match.scores[0].argsort(descending=True, stable=True)[: len(dropped)]
    assert a[ranked].tolist() == case.outputs["s_dropped"].tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 18])
@pytest.mark.parametrize("damping", [0.0, 0.15])
@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_the_oracle(n: int, damping: float, masked: bool, generator: torch.Generator) -> None:
    attention = attention_of(2, 3, n, generator)
    alive = torch.rand(2, n, generator=generator) < 0.6 if masked else None
    start = torch.rand(2, 3, n, generator=generator)
    for iters in (0, 1, 7):
        arguments = {"start": start, "alive": alive, "damping": damping}
        got = pagerank(attention, iters, **arguments)
        want = pagerank(attention.double(), iters, backend="reference", **arguments)
        assert got.dtype == torch.float32 and want.dtype == torch.float64
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        kept = start if alive is None else start * alive[:, None]
        torch.testing.assert_close(got.sum(2), kept.sum(2), atol=1e-5, rtol=1e-5)


def test_one_round_is_the_column_sum(generator: torch.Generator) -> None:
    attention = attention_of(2, 2, 9, generator)
    torch.testing.assert_close(pagerank(attention, 1), attention.sum(2))
    per_token = torch.rand(9, generator=generator)
    by_hand = (attention * per_token[:, None]).sum(2)
    torch.testing.assert_close(pagerank(attention, 1, start=per_token), by_hand)
    torch.testing.assert_close(pagerank(attention, 1, start=per_token.expand(2, 9)), by_hand)


def test_many_rounds_reach_the_left_eigenvector(generator: torch.Generator) -> None:
    attention = torch.randn(1, 1, 12, 12, generator=generator).double().softmax(-1)
    scores = pagerank(attention, 500)[0, 0].numpy()
    values, vectors = np.linalg.eig(attention[0, 0].numpy().T)
    vector = vectors[:, np.abs(values - 1).argmin()].real
    np.testing.assert_allclose(scores, vector * 12 / vector.sum(), atol=1e-9)


def test_taken_out_tokens_equal_a_smaller_graph(generator: torch.Generator) -> None:
    attention = attention_of(1, 2, 15, generator)
    alive = torch.rand(1, 15, generator=generator) < 0.6
    index = alive[0].nonzero()[:, 0]
    part = attention[:, :, index][..., index]
    want = pagerank(part / part.sum(-1, keepdim=True), 4)
    attention[:, :, ~alive[0]] = torch.nan  # rows of padding may hold anything
    got = pagerank(attention, 4, alive=alive)
    torch.testing.assert_close(got[..., index], want, atol=1e-5, rtol=1e-5)
    assert not got[..., ~alive[0]].any()
    assert not pagerank(attention, 2, alive=torch.zeros_like(alive)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_the_matrix(dtype: torch.dtype, generator: torch.Generator) -> None:
    q = torch.randn(2, 4, 21, 8, generator=generator).to(dtype)
    k = torch.randn(2, 2, 21, 8, generator=generator).to(dtype)
    alive = torch.rand(2, 21, generator=generator) < 0.7
    dense = (q.double() @ k.double().repeat_interleave(2, 1).mT * 8**-0.5).softmax(-1)
    for mask in (None, alive):
        want = pagerank(dense, 5, alive=mask, damping=0.1)
        for chunk_bytes in (1 << 20, 4 * 4 * 21 * 21, 2 * 4 * 21 * 21, 1500):  # all, a sample, its half, some rows
            for tolerance in (None, 0.0):
                options = {"alive": mask, "damping": 0.1, "chunk_bytes": chunk_bytes, "tolerance": tolerance}
                got = pagerank(None, 5, qk=(q, k), **options)
                torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
        oracle = pagerank(None, 5, qk=(q, k), alive=mask, damping=0.1, backend="reference")
        torch.testing.assert_close(oracle.double(), want, atol=1e-5, rtol=1e-5)
    assert pagerank(None, 2, qk=(q[:0], k[:0])).shape == (0, 4, 21)
    assert pagerank(None, 2, qk=(q[:, :0], k)).shape == (2, 0, 21)
    assert not pagerank(None, 2, qk=(q, k), alive=torch.zeros_like(alive)).any()
    once = pagerank(None, 1, qk=(q, k), scale=0.2)
    torch.testing.assert_close(once, column_mass(q, k, scale=0.2, reduce="sum", per_head=True))


def test_tolerance_stops_each_sample_by_itself(generator: torch.Generator) -> None:
    attention = attention_of(2, 2, 10, generator)
    attention[0] = 0.1  # settled after one round
    got = pagerank(attention, 400, tolerance=1e-3)
    for b in range(2):
        torch.testing.assert_close(got[b : b + 1], pagerank(attention[b : b + 1], 400, tolerance=1e-3))
    want = pagerank(attention, 400, tolerance=1e-3, backend="reference")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[1], pagerank(attention, 400)[1], atol=1e-7), "it did stop early"


def test_a_stopped_sample_stays_stopped() -> None:
    """Its next round would move a score by more than the tolerance again, while another sample still runs."""
    swap, ring = torch.zeros(2, 7, 7)
    swap[[0, 1, 2, 3, 4, 5, 6], [1, 0, 3, 2, 5, 4, 6]] = 1.0  # never settles
    ring[[1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3]] = 1.0  # three tokens to three others, these to one,
    ring[0, 4:] = 1 / 3  # and back: changes of 0.1, then of 0.3
    start = torch.tensor([[3, 1, 1, 1, 1.1, 1.1, 1.1], [1, 2, 1, 2, 1, 2, 1]])
    got = pagerank(torch.stack([ring, swap])[:, None], 7, start=start, tolerance=0.2)
    torch.testing.assert_close(got[0, 0], torch.tensor([3, 1.1, 1.1, 1.1, 1, 1, 1]))
    assert got[1, 0].tolist() == [2, 1, 2, 1, 2, 1, 1], "seven rounds"


def test_half_precision_is_summed_in_float32(generator: torch.Generator) -> None:
    attention = attention_of(1, 2, 40, generator).half()
    got = pagerank(attention, 6)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), pagerank(attention.double(), 6), atol=1e-5, rtol=1e-5)


def test_fusion_of_heads() -> None:
    """Variances 0, 0.25 and 4 by hand; the filter keeps the second, then none, which keeps all."""
    scores = torch.tensor([[[1.0, 1, 1, 1], [0.5, 1.5, 0.5, 1.5], [0.0, 4, 0, 4]]])
    fused = fuse_heads(scores, 0.01, 0.7)
    assert fused.variance.tolist() == [[0.0, 0.25, 4.0]] and fused.kept.tolist() == [[False, True, False]]
    assert torch.equal(fused.importance, scores[:, 1])
    everything = fuse_heads(scores, 0.3, 0.7)
    assert everything.kept.all()
    torch.testing.assert_close(everything.importance, scores.square().mean(1).sqrt())
    counted = torch.tensor([[False, True, False, True]])
    assert fuse_heads(scores, 0.0, 0.0, counted).variance.tolist() == [[0.0, 0.0, 0.0]]
    assert fuse_heads(scores.double()).importance.dtype == torch.float64


def test_bad_arguments() -> None:
    square, wide = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4)
    for arguments, message in (
        ({"attention": None}, "either"),
        ({"attention": square, "qk": (wide, wide)}, "either"),
        ({"attention": wide}, "attention must be"),
        ({"attention": None, "qk": (torch.ones(1, 2, 2, 4), wide)}, "as many queries"),
        ({"attention": square, "damping": 1.5}, "damping"),
        ({"attention": square, "start": torch.ones(4)}, "start"),
        ({"attention": square, "alive": torch.ones(1, 4, dtype=torch.bool)}, "alive"),
    ):
        with pytest.raises(ValueError, match=message):
            pagerank(iters=1, **arguments)
    with pytest.raises(ValueError, match="iters"):
        pagerank(square, -1)
    with pytest.raises(ValueError, match="scores"):
        fuse_heads(torch.ones(2, 3))
