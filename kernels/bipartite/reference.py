"""Slow float64 version of matching and merging in plain NumPy loops, for tests."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vlmprune.kernels.bipartite.types import BipartiteMatch, Problem
from vlmprune.kernels.kcenter.types import MIN_NORM


def run(problem: Problem) -> BipartiteMatch:
    """Match every sample of a batch, one after the other."""
    batch, n, n_a = problem.batch, problem.n, problem.a_index.shape[1]
    group = np.full((batch, n), -1)
    scores, partner = np.full((batch, n_a), -np.inf), np.full((batch, n_a), -1)
    merged = np.zeros((batch, n_a), dtype=bool)
    counts = np.zeros(batch, dtype=np.int64)
    kept = np.zeros((batch, n - problem.width), dtype=np.int64)
    sources, into = np.zeros((2, batch, problem.width), dtype=np.int64)
    for b in range(batch):
        tokens = (problem.a_index[b].tolist(), problem.b_index[b].tolist())
        free = (problem.a_free[b].tolist(), problem.b_free[b].tolist())
        scores[b], partner[b] = best_pairs(_numpy(problem.metric[b]), tokens, free)
        ranking = _ranking(scores[b], partner[b])
        limit = problem.width if problem.limit is None else min(problem.width, int(problem.limit[b]))
        bound = problem.threshold
        bound = float(bound[b]) if isinstance(bound, Tensor) else bound
        away = [a for a in ranking if partner[b, a] >= 0][:limit]
        away = [a for a in away if bound is None or scores[b, a] > bound]
        merged[b, away] = True
        valid = [True] * n if problem.valid is None else problem.valid[b].tolist()
        goes_to = {tokens[0][a]: tokens[1][partner[b, a]] for a in away}
        outputs = _outputs(problem, tokens, ranking, goes_to, valid)
        counts[b] = len(outputs)
        if problem.fixed:
            kept[b], sources[b] = outputs, [tokens[0][a] for a in away]
            into[b] = [outputs.index(goes_to[token]) for token in sources[b]]
        for token in range(n):
            if valid[token]:
                group[b, token] = outputs.index(goes_to.get(token, token))

    def back(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(problem.device, dtype)

    return BipartiteMatch(
        back(group, torch.int64),
        n - problem.width if problem.exact else n,
        back(counts, torch.int64),
        back(scores, problem.dtype),
        back(partner, torch.int64),
        back(merged, torch.bool),
        problem.a_index,
        problem.b_index,
        *(back(pairs, torch.int64) if problem.fixed else None for pairs in (kept, sources, into)),
    )


def best_pairs(
    metric: np.ndarray, tokens: tuple[list[int], list[int]], free: tuple[list[bool], list[bool]]
) -> tuple[list[float], list[int]]:
    """Best cosine and partner slot of every A slot; -inf and -1 where there is none."""
    with np.errstate(invalid="ignore"):  # infinite rows become NaN
        units = [row / max(math.sqrt(float(row @ row)), MIN_NORM) for row in metric]
    scores, partners = [], []
    for a, may in zip(tokens[0], free[0], strict=True):
        best, at = -math.inf, -1
        for slot, (b, open_slot) in enumerate(zip(tokens[1], free[1], strict=True)):
            if not may or not open_slot:
                continue
            cosine = float(units[a] @ units[b])
            twins = np.array_equal(units[a], units[b]) and metric[a] @ metric[a] >= MIN_NORM**2
            if twins or cosine > 1:
                cosine = 1.0
            if at < 0 or cosine > best or (math.isnan(best) and not math.isnan(cosine)):
                best, at = cosine, slot
        scores.append(best)
        partners.append(at)
    return scores, partners


def merge(x: Tensor, group_id: Tensor, n_out: int, mode: str, weights: Tensor | None) -> Tensor:
    """``[B, n_out, ...]`` of groups of tokens, in float64 inside."""
    values = _numpy(x)
    weight = np.ones(group_id.shape) if weights is None else _numpy(weights)
    result = np.zeros((len(values), n_out, *values.shape[2:]))
    for b in range(len(values)):
        for g in range(n_out):
            members = [i for i, group in enumerate(group_id[b].tolist()) if group == g]
            if not members:
                continue
            if mode == "prune":
                result[b, g] = values[b, members[0]]
            elif mode == "amax":
                result[b, g] = values[b, members].max(0)
            else:
                factor = weight[b, members] if mode == "wavg" else np.ones(len(members))
                total = sum(w * values[b, i] for w, i in zip(factor, members, strict=True))
                result[b, g] = total if mode == "sum" else total / factor.sum() if factor.sum() else 0.0
    return torch.from_numpy(result).to(x.device, x.dtype)


def _ranking(scores: np.ndarray, partner: np.ndarray) -> list[int]:
    """A slots, best first: numbers, then NaN, then those without a partner."""

    def key(a: int) -> tuple[int, float, int]:
        if partner[a] < 0:
            return 2, 0.0, a
        return (1, 0.0, a) if math.isnan(scores[a]) else (0, -scores[a], a)

    return sorted(range(len(scores)), key=key)


def _outputs(
    problem: Problem,
    tokens: tuple[list[int], list[int]],
    ranking: list[int],
    goes_to: dict[int, int],
    valid: list[bool],
) -> list[int]:
    """The tokens that stay, in the order of the outputs."""
    if not goes_to:
        chosen = list(range(problem.n))
    elif problem.order == "original":
        first: dict[int, int] = {}
        for token in range(problem.n):
            first.setdefault(goes_to.get(token, token), token)
        chosen = sorted(first, key=lambda token: first[token])
    else:
        front = [t for t in range(problem.n) if t < problem.protect or t not in (*tokens[0], *tokens[1])]
        slots = ranking if problem.order == "tome" and problem.protect == 0 else range(len(tokens[0]))
        rest = [tokens[0][a] for a in slots] + tokens[1]
        chosen = front + [t for t in rest if t not in front and t >= 0]
    return [t for t in chosen if t not in goes_to and valid[t]]


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
