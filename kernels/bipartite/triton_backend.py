"""Matching and merging in Triton: one kernel each for the best partners, the ranking or selection, and the merge."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bipartite.types import BipartiteMatch, Problem
from vlmprune.kernels.gather import MergeMode
from vlmprune.kernels.ordering import pack_keys

# Most A slots of a sample that one program ranks.
MOST_SLOTS = 2048


def best_partners(problem: Problem) -> tuple[Tensor, Tensor]:
    """Scores and partners as :func:`~vlmprune.kernels.bipartite.ties.settle` gives them."""
    import triton

    from vlmprune.kernels.bipartite import triton_kernels as kernels

    x = _multipliable(problem.metric)
    n_a, n_b = problem.a_index.shape[1], problem.b_index.shape[1]
    scores = torch.empty(problem.batch, n_a, dtype=torch.float32, device=x.device)
    partners = torch.empty(problem.batch, n_a, dtype=torch.int64, device=x.device)
    slots: tuple[Tensor, ...] = (partners,) * 4  # not read for default halves
    if not problem.plain:
        slots = (
            problem.a_index.contiguous(),
            problem.b_index.contiguous(),
            problem.a_free.to(torch.uint8).contiguous(),
            problem.b_free.to(torch.uint8).contiguous(),
        )
    block = 64
    with torch.cuda.device_of(x):
        kernels.match_kernel[(triton.cdiv(n_a, block), problem.batch)](
            x,
            *slots,
            scores,
            partners,
            n_a,
            n_b,
            x.shape[2],
            problem.first_a,
            problem.first_b,
            *x.stride(),
            PLAIN=problem.plain,
            BLOCK_A=block,
            BLOCK_B=block,
            BLOCK_D=32 if x.dtype == torch.float32 else 64,
            enable_fp_fusion=True,
        )
    return scores, partners


def can_select(problem: Problem) -> bool:
    """True for the problems that :func:`select` takes."""
    return problem.order != "original" and problem.width > 0 and problem.a_index.shape[1] <= MOST_SLOTS


def select(problem: Problem, scores: Tensor, partner: Tensor) -> BipartiteMatch:
    """As :func:`~vlmprune.kernels.bipartite.pairs.assemble_pairs`, in one kernel."""
    import triton

    from vlmprune.kernels.bipartite import triton_pairs as kernels

    batch, n, width = problem.batch, problem.n, problem.width
    n_a, n_b = problem.a_index.shape[1], problem.b_index.shape[1]
    kept, sources, into, group = (
        torch.empty(batch, columns, dtype=torch.int64, device=scores.device) for columns in (n - width, width, width, n)
    )
    merged = torch.empty(batch, n_a, dtype=torch.uint8, device=scores.device)
    block = max(16, triton.next_power_of_2(n_a))
    with torch.cuda.device_of(scores):
        kernels.select_kernel[(batch,)](
            scores,
            partner,
            kept,
            sources,
            into,
            group,
            merged,
            n,
            n_a,
            n_b,
            width,
            problem.protect,
            BY_RANK=problem.order == "tome" and problem.protect == 0,
            BLOCK=block,
            CHUNK=max(1, min(block, 8192 // block)),
        )
    counts = torch.full((batch,), n - width, dtype=torch.int64, device=scores.device)
    halves = (problem.a_index, problem.b_index)
    whole = (scores, partner, merged.view(torch.bool), *halves)
    return BipartiteMatch(group, n - width, counts, *whole, kept, sources, into)


def merge_pairs(x: Tensor, kept: Tensor, sources: Tensor, into: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`vlmprune.kernels.bipartite.merge_pairs`, for float32 or narrower without gradient."""
    import triton

    from vlmprune.kernels.bipartite import triton_pairs as kernels

    source = _multipliable(x.flatten(2) if x.ndim > 2 else x[..., None])
    batch, n, d = source.shape
    n_out, r = kept.shape[1], sources.shape[1]
    out = torch.empty(batch, n_out, d, dtype=source.dtype, device=x.device)
    total = torch.empty(batch, n_out, dtype=torch.float32, device=x.device)
    block = min(1024, triton.next_power_of_2(d))
    if out.numel():
        with torch.cuda.device_of(x):
            kernels.pair_kernel[(n_out, triton.cdiv(d, block), batch)](
                source,
                total if size is None else size.float().contiguous(),  # not read if None
                kept.contiguous(),
                sources.contiguous(),
                into.contiguous(),
                out,
                total,
                n,
                n_out,
                r,
                d,
                *source.stride(),
                HAS_SIZE=size is not None,
                BLOCK_R=triton.next_power_of_2(max(1, r)),
                BLOCK_D=block,
            )
    total = total if size is None else total.to(size.dtype)
    return out.to(x.dtype).reshape(batch, n_out, *x.shape[2:]), total


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
    source = _multipliable(x.flatten(2) if x.ndim > 2 else x[..., None])
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


def _multipliable(x: Tensor) -> Tensor:
    """Triton's interpreter multiplies bfloat16 numbers as if they were integers."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x
