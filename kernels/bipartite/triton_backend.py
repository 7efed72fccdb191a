"""Matching and merging in Triton: one kernel each for the best partners, the ranking, and the merge."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bipartite.types import Problem
from vlmprune.kernels.gather import MergeMode
from vlmprune.kernels.ordering import pack_keys


def best_partners(problem: Problem) -> tuple[Tensor, Tensor]:
    """As :func:`vlmprune.kernels.bipartite.torch_backend.best_partners`; partner -1 where no B slot may receive."""
    import triton

    from vlmprune.kernels.bipartite import triton_kernels as kernels

    x = problem.metric
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        x = x.float()  # Triton's interpreter multiplies bfloat16 numbers as if they were integers
    a_index, b_index = problem.a_index.contiguous(), problem.b_index.contiguous()
    n_a, n_b = a_index.shape[1], b_index.shape[1]
    scores = torch.empty(problem.batch, n_a, dtype=torch.float32, device=x.device)
    partners = torch.empty(problem.batch, n_a, dtype=torch.int64, device=x.device)
    block = 64
    with torch.cuda.device_of(x):
        kernels.match_kernel[(triton.cdiv(n_a, block), problem.batch)](
            x,
            a_index,
            b_index,
            problem.b_free.to(torch.uint8),
            scores,
            partners,
            n_a,
            n_b,
            x.shape[2],
            *x.stride(),
            BLOCK_A=block,
            BLOCK_B=block,
            BLOCK_D=32 if x.dtype == torch.float32 else 64,
            enable_fp_fusion=True,
        )
    return scores, partners


def ranks(scores: Tensor, free: Tensor) -> Tensor:
    """As :func:`vlmprune.kernels.bipartite.torch_backend.ranks`."""
    import triton

    from vlmprune.kernels.bipartite import triton_kernels as kernels

    keys = pack_keys(scores, free)
    batch, n = keys.shape
    result = torch.empty_like(keys)
    block = 64
    with torch.cuda.device_of(keys):
        kernels.rank_kernel[(triton.cdiv(n, block), batch)](keys, result, n, BLOCK=block)
    return result


def merge(x: Tensor, group_id: Tensor, n_out: int, mode: MergeMode, weight: Tensor | None) -> Tensor:
    """As :func:`vlmprune.kernels.gather.segment_merge` for the modes sum, mean, wavg and amax."""
    import triton

    from vlmprune.kernels.arguments import require
    from vlmprune.kernels.bipartite import triton_kernels as kernels

    require(group_id < n_out, f"group_id holds an id that is not below n_groups = {n_out}.")
    source = x.flatten(2) if x.ndim > 2 else x[..., None]
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        source = source.float()  # see best_partners
    batch, n, d = source.shape
    group = torch.where(group_id < 0, n_out, group_id)
    ordered, members = group.sort(dim=1, stable=True)
    ids = torch.arange(n_out + 1, device=x.device).expand(batch, n_out + 1).contiguous()
    starts = torch.searchsorted(ordered, ids)
    out = torch.empty(batch, n_out, d, dtype=source.dtype, device=x.device)
    weights = out if weight is None else weight.float().contiguous()  # unused if None
    kind = {"sum": kernels.SUM, "amax": kernels.AMAX}.get(mode, kernels.MEAN)
    block = min(1024, triton.next_power_of_2(d))
    if out.numel():
        with torch.cuda.device_of(x):
            kernels.merge_kernel[(n_out, triton.cdiv(d, block), batch)](
                source,
                weights,
                members,
                starts,
                out,
                n,
                n_out,
                d,
                *source.stride(),
                MODE=kind.value,
                HAS_WEIGHT=weight is not None,
                BLOCK_D=block,
            )
    return out.to(x.dtype).reshape(batch, n_out, *x.shape[2:])
