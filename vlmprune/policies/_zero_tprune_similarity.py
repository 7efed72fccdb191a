"""The S-stage of Zero-TPrune: two groups of tokens, and those of one that resemble some token of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.views import on_device
from vlmprune.kernels.bipartite import bipartite_match
from vlmprune.kernels.gather import gather_tokens
from vlmprune.kernels.ordering import stable_topk
from vlmprune.kernels.precision import precise_matmul
from vlmprune.policies._merging import block_generator, host_counts

Partition = Literal["seq_u", "seq_i", "alternate", "random", "none"]
Metric = Literal["cosine", "dot", "euclidean", "manhattan"]


def most_similar(
    context: Context,
    features: Tensor,
    ranked: Tensor,
    n: Sequence[int],
    remove: Sequence[int],
    partition: Partition,
    metric: Metric,
) -> Tensor:
    """The tokens of group A that most resemble a token of group B, ``[I, R]``, most similar first, -1 fill.

    Args:
        context: gives each item's generator for a random partition.
        features: ``[I, N, c]``.
        ranked: ``[I, N]`` tokens that take part, the most important first, -1 fill.
        n: how many of them each item has.
        remove: how many each item loses, at most half of them.
        partition: how ranks are divided; ``"none"`` compares every token with all others.
        metric: what resembles.
    """
    if partition == "none":
        group_a = ranked[:, : max(n)].flip(1)  # two that are nearest to each other tie: the less important one goes
        scores = best_similarity(features, group_a, group_a, metric, other=True)
    else:
        group_a, group_b = (_at_ranks(ranked, ranks) for ranks in divide(context, n, partition))
        if metric == "cosine":
            scores = bipartite_match(features, 0, split=(group_a, group_b)).scores
        else:
            scores = best_similarity(features, group_a, group_b, metric)
    slots = stable_topk(scores, host_counts(remove, scores.device), group_a >= 0)[:, : max(remove)]
    return gather_tokens(group_a, slots, fill=-1)


def divide(context: Context, n: Sequence[int], partition: Partition) -> tuple[list[list[int]], list[list[int]]]:
    """Ranks of group A and of group B, one row per item, or one row for all of them."""
    if partition == "random":
        rows = []
        for item, number in enumerate(n):
            order = torch.randperm(number, generator=block_generator(context, item)).tolist()
            rows.append((sorted(order[(number + 1) // 2 :]), sorted(order[: (number + 1) // 2])))
    else:
        same = len(set(n)) == 1
        rows = [_halves(number, partition) for number in (n[:1] if same else n)]
    return [a for a, _ in rows], [b for _, b in rows]


def _halves(n: int, partition: Partition) -> tuple[list[int], list[int]]:
    """Ranks of A, ``n // 2`` of them, and of B."""
    ranks = list(range(n))
    if partition == "seq_u":
        return ranks[(n + 1) // 2 :], ranks[: (n + 1) // 2]
    if partition == "seq_i":
        return ranks[: n // 2], ranks[n // 2 :]
    return ranks[1::2], ranks[0::2]


def _at_ranks(ranked: Tensor, ranks: Sequence[Sequence[int]]) -> Tensor:
    """Tokens ``[I, K]`` at ranks, -1 fill."""
    width = max(len(row) for row in ranks)
    index = on_device([[*row, *(-1,) * (width - len(row))] for row in ranks], ranked.device)
    return gather_tokens(ranked, index.expand(ranked.shape[0], -1), fill=-1)


def best_similarity(features: Tensor, group_a: Tensor, group_b: Tensor, metric: Metric, other: bool = False) -> Tensor:
    """Similarity ``[I, K]`` of each token of A with the nearest of B.

    Args:
        features: ``[I, N, c]``.
        group_a, group_b: tokens ``[I, K]``, ``[I, L]``, -1 fill.
        metric: cosine, product, or a distance, taken as negative.
        other: A and B are the same list, of which a token is not compared with itself.
    """
    values = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    if metric == "cosine":
        values = values / values.norm(dim=2, keepdim=True).clamp_min(1e-12)
    a, b = gather_tokens(values, group_a), gather_tokens(values, group_b)
    if metric in ("cosine", "dot"):
        near = precise_matmul(a, b.mT)
    else:  # not through products, which would not give 0 for equal tokens
        power = 2.0 if metric == "euclidean" else 1.0
        near = -torch.cdist(a, b, power, compute_mode="donot_use_mm_for_euclid_dist")
    near = near.masked_fill((group_b < 0)[:, None], -torch.inf)
    if other:
        near = (near + near.mT) / 2  # rounding must not tell the two of a pair apart
        near = near.masked_fill(torch.eye(near.shape[1], dtype=torch.bool, device=near.device), -torch.inf)
    return near.max(2).values
