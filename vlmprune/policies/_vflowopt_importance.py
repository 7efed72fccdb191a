"""VFlowOpt's importance of a patch: what the much attended patches attend to, and how much the patch shows."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.core.attention import AttentionMap

LEVELS = 256
GREY_WEIGHT = 0.3333


def attending_patches(
    attention: AttentionMap, threshold: Tensor, patch_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The patches K whose received attention exceeds ``t`` times the mean; where none does, the one that gets most.

    Args:
        attention: of every encoder view, over ``P`` patches.
        threshold: ``[V]``, t of each view, at least 0.
        patch_valid: ``[V, P]`` bool, False for padding.

    Returns:
        K, ``[V, P]`` bool, and for each view whether no patch exceeded the threshold, ``[V]`` bool.
    """
    received = attention.column_mass(None if patch_valid is None else patch_valid.float())  # [V, P]
    real = torch.ones_like(received, dtype=torch.bool) if patch_valid is None else patch_valid
    received = received.masked_fill(~real, 0.0)
    mean = received.sum(1, keepdim=True) / real.sum(1, keepdim=True)
    chosen = real & (received > threshold[:, None].to(received) * mean)
    empty = ~chosen.any(1)
    most = received.masked_fill(~real, -1.0).argmax(1, keepdim=True)
    return chosen | torch.zeros_like(chosen).scatter(1, most, empty[:, None]), empty


def patch_entropy(pixels: Tensor) -> Tensor:
    """Entropy in bits of the grey levels of each patch.

    Args:
        pixels: ``[V, P, C, h, w]`` in 0..255, one channel (grey) or three (red, green, blue).

    Returns:
        ``[V, P]`` float32, 0 for a patch of one colour.
    """
    values = pixels.float().round()  # 8-bit pictures come back from the normalisation with rounding errors
    grey = values[:, :, 0] if values.shape[2] == 1 else GREY_WEIGHT * values[:, :, :3].sum(2)
    level = grey.round().clamp(0, LEVELS - 1).long().flatten(2)  # [V, P, h w]; round() takes halves to the even side
    counts = torch.zeros(*level.shape[:2], LEVELS, device=level.device)
    counts = counts.scatter_add(2, level, torch.ones(level.shape, device=level.device))
    share = counts / level.shape[2]
    return -(share * (share + 1e-10).log2()).sum(2) + 0.0


def with_entropy(importance: Tensor, pixels: Tensor, alpha: float, patch_valid: Tensor | None = None) -> Tensor:
    """Importance plus ``alpha`` times the softmax of the entropies over each view's patches, ``[V, P]``."""
    entropy = patch_entropy(pixels)
    if patch_valid is not None:
        entropy = entropy.masked_fill(~patch_valid, -torch.inf)
    return importance + alpha * entropy.softmax(1)
