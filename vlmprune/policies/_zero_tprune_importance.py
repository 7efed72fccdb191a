"""Scores of Zero-TPrune before the first round and behind the last one, and sets of tokens as masks."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.kernels.pagerank import HeadFusion, fuse_heads


def free_tokens(context: Context) -> Tensor:
    """bool ``[I, N]``: tokens that may be dropped."""
    return context.candidates & ~_prefix(context)


def start_scores(context: Context, alive: Tensor, boost: bool) -> Tensor:
    """``[I, N]`` scores of mean 1 over the tokens ``alive``, equal but for CLS, which ``boost`` gives ``sqrt(N)`` times
    as much."""
    start = alive.float()
    n = alive.sum(1)
    if boost and context.info.has_cls and context.prefix:
        start[:, 0] *= n.sqrt()
    return start * (n / start.sum(1).clamp_min(1))[:, None]


def fuse(context: Context, scores: Tensor, alive: Tensor, v_min: float, v_max: float, mean: bool) -> HeadFusion:
    """Importance from the scores of all heads ``[I, H, N]``, as root mean square or, an ablation, as ``mean``.

    The variance that decides whether a head counts is over the tokens alive but the prefix: one huge CLS score would
    reject most heads.
    """
    fused = fuse_heads(scores, v_min, v_max, alive & ~_prefix(context))
    if not mean:
        return fused
    total = scores.masked_fill(~fused.kept[..., None], 0.0).sum(1)
    return fused._replace(importance=total / fused.kept.sum(1, keepdim=True))


def marked(tokens: Tensor, width: int) -> Tensor:
    """bool ``[I, width]``: True at ``tokens [I, K]``, of which -1 is none."""
    mask = torch.zeros(tokens.shape[0], width + 1, dtype=torch.bool, device=tokens.device)
    return mask.scatter(1, torch.where(tokens < 0, width, tokens), True)[:, :width]


def _prefix(context: Context) -> Tensor:
    return torch.arange(context.width, device=context.device) < context.prefix
