"""Checks of arguments that several primitives share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Counts = int | Sequence[int] | Tensor


def require(condition: Tensor, message: str) -> None:
    """Raise if any element of a bool tensor is False.

    On CUDA the check is a device-side assertion: no synchronisation, the error shows at a later call.

    Raises:
        ValueError: the condition does not hold (CPU and other synchronous devices).
    """
    if condition.device.type == "cuda":
        torch._assert_async(condition.all(), message)
    elif not bool(condition.all()):
        raise ValueError(message)


def check_mask(mask: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
    """A bool mask of exactly ``shape``, or None.

    Raises:
        ValueError: other shape or dtype.
    """
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
        raise ValueError(f"{name} must be a bool tensor of shape {shape}, got {mask.dtype} {tuple(mask.shape)}.")
    return mask


def check_values(values: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
    """A tensor of numbers of exactly ``shape``, or None.

    Raises:
        ValueError: other shape.
    """
    if values is not None and tuple(values.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(values.shape)}.")
    return values


def token_counts(k: Counts, batch: int, n: int, k_max: int | None, device: torch.device) -> tuple[int, Tensor | None]:
    """Width of the output and, where samples differ, the count per sample.

    Args:
        k: one count for all samples, a sequence of ``batch`` counts, or an int tensor ``[batch]``.
        batch: number of samples.
        n: number of tokens.
        k_max: output width; needed only with a tensor ``k`` (default then ``n``: its values stay on the
            device). With a sequence the default is its largest value.
        device: device of the counts returned.

    Returns:
        ``(width, counts)``; ``counts`` is None if every sample has ``width``, else int64 ``[batch]``.

    Raises:
        TypeError: ``k`` is not an integer, a sequence of integers or an integer tensor.
        ValueError: wrong number of counts, a count above ``k_max``, or ``k_max`` given with an int ``k``.
    """
    if isinstance(k, Tensor):
        if k.is_floating_point() or k.dtype == torch.bool:
            raise TypeError(f"k must count tokens, got a tensor of {k.dtype}. Turn shares into counts first.")
        if k.ndim == 0:
            k = k.expand(batch)
        if tuple(k.shape) != (batch,):
            raise ValueError(f"k must have shape ({batch},), one count per sample, got {tuple(k.shape)}.")
        width = n if k_max is None else max(0, k_max)
        counts = k.to(device=device, dtype=torch.int64)
        if k_max is not None:
            require(counts <= width, f"A count in k is above k_max = {k_max}.")
        return width, counts
    if isinstance(k, int) and not isinstance(k, bool):
        if k_max is not None and k_max != k:
            raise ValueError(f"k_max = {k_max} belongs to one k per sample; here k = {k} for all.")
        return max(0, k), None
    if isinstance(k, bool | float) or not all(isinstance(c, int) and not isinstance(c, bool) for c in k):
        raise TypeError(f"k must be an int, a sequence of ints or an int tensor, got {k!r}.")
    if len(k) != batch:
        raise ValueError(f"k holds {len(k)} counts for {batch} samples.")
    width = max([0, *k]) if k_max is None else max(0, k_max)
    if any(c > width for c in k):
        raise ValueError(f"k = {list(k)} holds a count above k_max = {k_max}.")
    if all(max(0, c) == width for c in k):
        return width, None
    return width, torch.tensor(k, dtype=torch.int64, device=device)
