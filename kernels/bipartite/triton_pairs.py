"""Triton kernels for a fixed number of merges. Imported only when Triton is used."""

# Kernel parameters are pointers and scalars of the Triton language, which has no annotations for them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select_kernel(
    scores,  # float32 [B, Na]
    partners,  # int64 [B, Na]
    kept,  # int64 [B, N - width]
    sources,  # int64 [B, width]
    into,  # int64 [B, width]
    group,  # int64 [B, N]
    merged,  # uint8 [B, Na]
    n,
    n_a,
    n_b,
    width,
    protect,
    BY_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """All of one sample: ranks its free A slots, and says where every token goes.

    Halves are even and odd positions; outputs are the front, the A tokens left (BY_RANK: best first, else ascending),
    then all B tokens.
    """
    sample = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    first_a = (protect + 1) // 2
    n_out = n - width
    free = (slot >= first_a) & (slot < n_a)
    score = tl.load(scores + sample * n_a + slot, mask=free, other=float("-inf"))
    score = tl.where(score != score, float("-inf"), score)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, n_a, CHUNK):
        other = start + tl.arange(0, CHUNK)
        present = (other >= first_a) & (other < n_a)
        value = tl.load(scores + sample * n_a + other, mask=present, other=float("-inf"))
        value = tl.where(value != value, float("-inf"), value)
        before = (value[None, :] > score[:, None]) | (
            (value[None, :] == score[:, None]) & (other[None, :] < slot[:, None])
        )
        rank += tl.sum((before & present[None, :]).to(tl.int32), axis=1)
    goes = free & (rank < width)
    left = free & (rank >= width)
    place = rank - width if BY_RANK else tl.cumsum(left.to(tl.int32), 0) - 1
    partner = tl.load(partners + sample * n_a + slot, mask=goes, other=0)
    target = n_out - n_b + partner
    output = tl.where(left, protect + place, 2 * slot)  # the front stays where it is
    tl.store(sources + sample * width + rank, (2 * slot).to(tl.int64), mask=goes)
    tl.store(into + sample * width + rank, target, mask=goes)
    tl.store(kept + sample * n_out + output, (2 * slot).to(tl.int64), mask=(slot < n_a) & ~goes)
    tl.store(group + sample * n + 2 * slot, tl.where(goes, target, output.to(tl.int64)), mask=slot < n_a)
    tl.store(merged + sample * n_a + slot, goes.to(tl.uint8), mask=slot < n_a)
    output = tl.where(slot < protect // 2, 2 * slot + 1, n_out - n_b + slot)
    tl.store(kept + sample * n_out + output, (2 * slot + 1).to(tl.int64), mask=slot < n_b)
    tl.store(group + sample * n + 2 * slot + 1, output.to(tl.int64), mask=slot < n_b)


@triton.jit
def pair_kernel(
    x,  # [B, N, d] with strides
    size,  # float32 [B, N], read if HAS_SIZE
    kept,  # int64 [B, M]
    sources,  # int64 [B, r]
    into,  # int64 [B, r]
    out,  # [B, M, d]
    totals,  # float32 [B, M]
    n,
    n_out,
    r,
    d,
    stride_b,
    stride_n,
    stride_d,
    HAS_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One output and one block of channels; most outputs receive nothing and are copied."""
    slot = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    base = x + sample * stride_b + channel.to(tl.int64) * stride_d
    token = tl.load(kept + sample * n_out + slot)
    value = tl.load(base + token * stride_n, mask=channel < d, other=0.0)
    mass = tl.load(size + sample * n + token) if HAS_SIZE else 1.0
    result = value.to(tl.float32)
    each = tl.arange(0, BLOCK_R)
    goes = tl.load(into + sample * r + each, mask=each < r, other=-1)
    if tl.sum((goes == slot).to(tl.int32), axis=0) > 0:
        result = result * mass
        for place in range(r):
            if tl.load(into + sample * r + place) == slot:
                other = tl.load(sources + sample * r + place)
                factor = tl.load(size + sample * n + other) if HAS_SIZE else 1.0
                more = tl.load(base + other * stride_n, mask=channel < d, other=0.0)
                result += more.to(tl.float32) * factor
                mass += factor
        result = result / mass
    target = out + (sample * n_out + slot) * d + channel
    tl.store(target, result, mask=channel < d)
    if tl.program_id(1) == 0:
        tl.store(totals + sample * n_out + slot, mass)
