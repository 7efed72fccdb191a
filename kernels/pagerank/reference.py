"""Slow float64 PageRank in plain NumPy loops, for tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def run(
    attention: Tensor | None,
    qk: tuple[Tensor, Tensor] | None,
    scale: float | None,
    iters: int,
    start: Tensor,
    alive: Tensor | None,
    damping: float,
    tolerance: float | None,
) -> Tensor:
    """Arguments as in :func:`vlmprune.kernels.pagerank.pagerank`, the start as ``[B, H, N]``."""
    begin = start.double().cpu().numpy()
    batch, heads, n = begin.shape
    matrix = _softmax(*qk, scale) if attention is None and qk is not None else _numpy(attention)
    living = np.ones((batch, n), bool) if alive is None else alive.cpu().numpy()
    result = begin.copy()
    for b in range(batch):
        members = np.flatnonzero(living[b])
        if not len(members):
            continue
        cut = [matrix[b, h][np.ix_(members, members)] for h in range(heads)]
        if alive is not None:
            cut = [_normalised(part) for part in cut]
        state = begin[b][:, members]
        first = state
        for _ in range(iters):
            new = np.zeros_like(state)
            for h in range(heads):
                for j in range(len(members)):
                    new[h] += state[h, j] * cut[h][j]
                new[h] = (1 - damping) * new[h] + damping * first[h].sum() / len(members)
            moved, state = np.abs(new - state).max(), new
            if tolerance is not None and moved < tolerance:
                break
        result[b][:, members] = state
    return torch.from_numpy(result).to(start.device, start.dtype)


def _normalised(matrix: np.ndarray) -> np.ndarray:
    total = matrix.sum(1, keepdims=True)
    return np.divide(matrix, total, out=np.zeros_like(matrix), where=total != 0)


def _softmax(q: Tensor, k: Tensor, scale: float | None) -> np.ndarray:
    """``[B, H, N, N]`` attention of all tokens."""
    queries, keys = _numpy(q), _numpy(k)
    keys = np.repeat(keys, queries.shape[1] // keys.shape[1], axis=1)
    score = np.einsum("bhid,bhjd->bhij", queries, keys) * (q.shape[3] ** -0.5 if scale is None else scale)
    share = np.exp(score - score.max(-1, keepdims=True))
    return share / share.sum(-1, keepdims=True)


def _numpy(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().double().cpu().numpy()
