"""Slow float64 version of attention over places in plain NumPy loops, for tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mapping: Tensor,
    queries: Tensor,
    cos: Tensor,
    sin: Tensor,
    allowed: Tensor,
    scale: float,
) -> Tensor:
    """One query place after the other; arguments as checked by ``virtual_attention``."""
    batch, heads, n, width = q.shape
    groups = heads // k.shape[1]
    places, asked = _rows(mapping, batch), _rows(queries, batch)
    m, rows = places.shape[1], asked.shape[1]
    query, key, value = (x.detach().double().cpu().numpy() for x in (q, k, v))
    angles = [x.detach().double().cpu().expand(batch, m, width).numpy() for x in (cos, sin)]
    seen = allowed.cpu().expand(batch, heads, rows, m).numpy()
    out = np.zeros((batch, heads, n, width))
    for b in range(batch):
        counts = np.bincount(asked[b][asked[b] >= 0], minlength=n)
        cosine, sine = angles[0][b], angles[1][b]
        for h in range(heads):
            keys = np.stack([_turn(key[b, h // groups, places[b, j]], cosine[j], sine[j]) for j in range(m)])
            for r in range(rows):
                token, place = asked[b, r], m - rows + r
                if token < 0:
                    continue
                visible = seen[b, h, r].nonzero()[0]
                scores = keys[visible] @ _turn(query[b, h, token], cosine[place], sine[place]) * scale
                weight = np.exp(scores - scores.max())
                values = value[b, h // groups, places[b, visible]]
                out[b, h, token] += weight @ values / weight.sum() / counts[token]
    return torch.from_numpy(out).to(q.device, q.dtype)


def _turn(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    half = len(x) // 2
    return np.concatenate(
        [x[:half] * cosine[:half] - x[half:] * sine[:half], x[half:] * cosine[half:] + x[:half] * sine[half:]]
    )


def _rows(index: Tensor, batch: int) -> np.ndarray:
    return index.cpu().expand(batch, index.shape[-1]).numpy()
