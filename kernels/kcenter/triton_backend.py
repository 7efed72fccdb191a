"""Greedy selection in Triton: one kernel for all distances, one persistent program per sample."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from vlmprune.kernels.kcenter.duplicates import first_copies
from vlmprune.kernels.kcenter.rows import DIRECT_L2_CHANNELS, mark_not_finite, masked_mean, unit_rows
from vlmprune.kernels.kcenter.types import KCenterResult, Problem

# The state of all tokens of a sample lives in the registers of one program.
MAX_TOKENS = 4096

_log = logging.getLogger("vlmprune")


def supports(problem: Problem, memory_cap: int) -> bool:
    """True if the kernels can run the problem; PyTorch takes the others."""
    reasons = {
        f"more than {MAX_TOKENS} tokens": problem.n > MAX_TOKENS,
        "float64": problem.dtype == torch.float64,
        "memory_cap": problem.matrix is None and 4 * problem.n**2 > memory_cap,
    }
    for reason, applies in reasons.items():
        if applies:
            _log.debug("k-center runs in PyTorch, not Triton: %s", reason)
    return not any(reasons.values())


def run(problem: Problem, first: Tensor, memory_cap: int) -> KCenterResult:
    """Select on every sample; arguments as in :func:`vlmprune.kernels.kcenter.torch_backend.run`."""
    batch, n, width = problem.batch, problem.n, problem.width
    indices = torch.full((batch, width), -1, dtype=torch.int64, device=problem.device)
    radius = torch.full((batch, width), -1.0, dtype=torch.float32, device=problem.device)
    final = torch.empty(batch, n, dtype=torch.float32, device=problem.device)
    at_once = batch if problem.matrix is not None else max(1, memory_cap // (4 * n * n))
    for start in range(0, batch, at_once):
        stop = min(batch, start + at_once)
        out = (indices[start:stop], radius[start:stop], final[start:stop])
        with torch.cuda.device_of(final):
            _launch(problem.part(start, stop), first[start:stop], out)
    return KCenterResult(indices, radius, final)


def _launch(problem: Problem, first: Tensor, out: tuple[Tensor, Tensor, Tensor]) -> None:
    import triton

    from vlmprune.kernels.kcenter import triton_kernels as kernels

    matrix, kind, copies = _matrix(problem)
    counts = problem.counts
    if counts is None:
        counts = torch.full((problem.batch,), problem.width, dtype=torch.int64, device=problem.device)
    preselected = first.new_empty(problem.batch, 0) if problem.preselected is None else problem.preselected
    weight = out[2] if problem.weight is None else problem.weight.float().contiguous()  # unused if None
    block = triton.next_power_of_2(problem.n)
    kernels.select_kernel[(problem.batch,)](
        matrix,
        problem.available().to(torch.uint8),
        weight,
        copies,
        preselected.contiguous(),
        first.contiguous(),
        counts.contiguous(),
        *out,
        problem.n,
        preselected.shape[1],
        problem.width,
        *matrix.stride(),
        KIND=kind,
        MAX_SUM=problem.objective == "max_sum",
        HAS_WEIGHT=problem.weight is not None,
        BLOCK=block,
        num_warps=4 if block <= 1024 else block // 256,
        enable_fp_fusion=True,
    )


def _matrix(problem: Problem) -> tuple[Tensor, int, Tensor]:
    """Matrix that the selection kernel reads, what it holds, and the first copy of each row."""
    import triton

    from vlmprune.kernels.kcenter import triton_kernels as kernels

    if problem.matrix is not None:
        kind = kernels.DISTANCE if problem.kind == "distance" else kernels.SIMILARITY
        return problem.matrix, kind.value, problem.matrix  # a matrix has no copies to look for
    x = problem.source
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        x = x.float()  # Triton's interpreter multiplies bfloat16 numbers as if they were integers
    n, d = x.shape[1:]
    matrix = torch.empty(problem.batch, n, n, dtype=torch.float32, device=x.device)
    if problem.kind == "l2" and d <= DIRECT_L2_CHANNELS:
        x, block = mark_not_finite(x), 32
        tiles = triton.cdiv(n, block)
        kernels.direct_l2_kernel[(tiles, tiles, problem.batch)](
            x, matrix, n, d, *x.stride(), BLOCK_N=block, enable_fp_fusion=True
        )
        return matrix, kernels.DISTANCE.value, matrix
    if problem.kind == "l2":  # centred, for |x|^2 + |y|^2 - 2xy cancels
        x = x.float() - masked_mean(x.float(), problem.valid)
    copies = first_copies(unit_rows(x.float()) if problem.kind == "cosine" else x)
    block = 64
    tiles = triton.cdiv(n, block)
    kernels.gram_kernel[(tiles, tiles, problem.batch)](
        x,
        matrix,
        n,
        d,
        *x.stride(),
        BLOCK_N=block,
        BLOCK_D=32 if x.dtype == torch.float32 else 64,
        enable_fp_fusion=True,
    )
    return matrix, (kernels.COSINE_GRAM if problem.kind == "cosine" else kernels.L2_GRAM).value, copies
