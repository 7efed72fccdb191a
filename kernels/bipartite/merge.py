"""One output per group of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.arguments import check_values
from vlmprune.kernels.backend import Backend, choose_backend
from vlmprune.kernels.gather import MergeMode, segment_merge


def merge_groups(
    x: Tensor,
    group_id: Tensor,
    n_out: int,
    mode: MergeMode = "wavg",
    size: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Merge tokens as :func:`vlmprune.kernels.gather.segment_merge` does, in one kernel on a GPU.

    Sizes after the merge are ``segment_merge(size, group_id, n_out, mode="sum")``.

    Args:
        x: ``[B, N, ...]``.
        group_id: int64 ``[B, N]``, -1 drops the token.
        n_out: number of outputs.
        mode: ``"wavg"`` (mean weighted by ``size``), ``"mean"``, ``"sum"``, ``"amax"`` or ``"prune"``.
        size: ``[B, N]``, original tokens behind each token; default all ones.
        backend: ``"torch"`` (differentiable in ``x``), ``"triton"`` (no gradient, float32 or narrower;
            others and ``"prune"`` run in PyTorch) or ``"reference"`` (slow, float64).

    Returns:
        ``[B, n_out, ...]`` in the dtype of ``x``; zeros for a group without tokens. Runs on one device give
        the same bits.

    Raises:
        ValueError: unknown mode, or shapes that do not fit.
        BackendError: a forced backend cannot run.
    """
    check_values(size, tuple(group_id.shape), "size")
    if mode == "wavg" and size is None:
        mode = "mean"
    choice = choose_backend("merging", backend, x.device, ("reference", "torch", "triton"))
    if choice == "triton" and _triton_can(x, group_id, mode):
        from vlmprune.kernels.bipartite import triton_backend

        return triton_backend.merge(x, group_id, n_out, mode, size if mode == "wavg" else None)
    if choice == "reference":
        from vlmprune.kernels.bipartite import reference

        return reference.merge(x, group_id, n_out, mode, size)
    return segment_merge(x, group_id, n_out, mode, size)


def triton_can_merge(x: Tensor) -> bool:
    """True for features that the kernels take: float32 or narrower, and no gradient is wanted."""
    small = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return small and x.ndim >= 2 and x.numel() > 0 and not (x.requires_grad and torch.is_grad_enabled())


def _triton_can(x: Tensor, group_id: Tensor, mode: MergeMode) -> bool:
    """True for calls that the kernel takes; the others, wrong ones too, go to PyTorch."""
    fits = x.ndim >= 2 and tuple(group_id.shape) == tuple(x.shape[:2])
    return fits and triton_can_merge(x) and mode in ("sum", "mean", "wavg", "amax")
