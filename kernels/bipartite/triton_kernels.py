"""Triton kernels of matching and merging. Imported only when Triton is used."""

# Kernel parameters are pointers and scalars of the Triton language, which has no annotations for them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# How group members are combined.
SUM: tl.constexpr = tl.constexpr(0)
MEAN: tl.constexpr = tl.constexpr(1)
AMAX: tl.constexpr = tl.constexpr(2)


@triton.jit
def match_kernel(
    metric,  # [B, N, c] with strides
    a_index,  # int64 [B, Na], -1 for an empty slot
    b_index,  # int64 [B, Nb], likewise
    b_free,  # uint8 [B, Nb]
    scores,  # float32 [B, Na]
    partners,  # int64 [B, Na]
    n_a,
    n_b,
    d,
    stride_b,
    stride_n,
    stride_d,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best cosine and partner of one tile of A slots; the similarities never leave the program."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    channel = tl.arange(0, BLOCK_D)
    base = metric + sample * stride_b
    token = tl.load(a_index + sample * n_a + row, mask=row < n_a, other=-1)
    a_inside = token >= 0
    a_base = base + tl.maximum(token, 0) * stride_n
    # Order-preserving integer of the score in the upper half of a key, the slot below it, so that one
    # maximum gives the best score and, on ties, the lowest slot. The smallest key stands for no partner.
    best = tl.full((BLOCK_A,), -9223372036854775807, dtype=tl.int64)
    for start in range(0, n_b, BLOCK_B):
        slot = start + tl.arange(0, BLOCK_B)
        target = tl.load(b_index + sample * n_b + slot, mask=slot < n_b, other=-1)
        free = tl.load(b_free + sample * n_b + slot, mask=slot < n_b, other=0) != 0
        b_inside = target >= 0
        b_base = base + tl.maximum(target, 0) * stride_n
        total = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
        a_square = tl.zeros((BLOCK_A,), dtype=tl.float32)
        b_square = tl.zeros((BLOCK_B,), dtype=tl.float32)
        for first in range(0, d, BLOCK_D):
            inside = channel < d - first
            place = (first + channel).to(tl.int64) * stride_d
            a = tl.load(a_base[:, None] + place[None, :], mask=a_inside[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_base[None, :] + place[:, None], mask=b_inside[None, :] & inside[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            a_square += tl.sum(wide_a * wide_a, axis=1)
            b_square += tl.sum(wide_b * wide_b, axis=0)
        a_norm = tl.maximum(tl.sqrt(a_square), 1e-12)
        b_norm = tl.maximum(tl.sqrt(b_square), 1e-12)
        score = total / a_norm[:, None] / b_norm[None, :]
        score = tl.where(score == 0.0, 0.0, score)  # -0.0 becomes +0.0
        bits = score.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 2147483647)
        bits = tl.where(score != score, -2147483647, bits)
        bits = tl.where(free[None, :], bits, -2147483647 - 1)
        key = (bits.to(tl.int64) << 32) | (2147483647 - slot).to(tl.int64)[None, :]
        best = tl.maximum(best, tl.max(key, axis=1))
    bits = (best >> 32).to(tl.int32)
    found = bits != -2147483647 - 1
    bits = bits ^ ((bits >> 31) & 2147483647)
    tl.store(scores + sample * n_a + row, bits.to(tl.float32, bitcast=True), mask=row < n_a)
    partner = tl.where(found, 2147483647 - (best & 2147483647), -1)
    tl.store(partners + sample * n_a + row, partner, mask=row < n_a)


@triton.jit
def rank_kernel(keys, ranks, n, BLOCK: tl.constexpr):
    """How many keys of the sample are larger than each key of one tile; all keys differ."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(keys + sample * n + row, mask=row < n, other=0)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, n, BLOCK):
        other = start + tl.arange(0, BLOCK)
        key = tl.load(keys + sample * n + other, mask=other < n, other=0)
        larger = (key[None, :] > own[:, None]) & (other < n)[None, :]
        before += tl.sum(larger.to(tl.int32), axis=1)
    tl.store(ranks + sample * n + row, before.to(tl.int64), mask=row < n)


@triton.jit
def merge_kernel(
    x,  # [B, N, d] with strides
    weight,  # float32 [B, N], read if HAS_WEIGHT
    members,  # int64 [B, N]: tokens in the order of their groups
    starts,  # int64 [B, G + 1]: where the members of each group begin
    out,  # [B, G, d]
    n,
    n_groups,
    d,
    stride_b,
    stride_n,
    stride_d,
    MODE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One output and one block of channels; members are added in ascending order, without atomics."""
    group = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(starts + sample * (n_groups + 1) + group)
    stop = tl.load(starts + sample * (n_groups + 1) + group + 1)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    mass = 0.0
    for place in range(first, stop):
        token = tl.load(members + sample * n + place)
        source = x + sample * stride_b + token * stride_n + channel.to(tl.int64) * stride_d
        value = tl.load(source, mask=channel < d, other=0.0).to(tl.float32)
        if MODE == 2:  # AMAX; written so that NaN spreads: tl.maximum would drop it
            total = tl.where((place == first) | (value > total) | (value != value), value, total)
        elif HAS_WEIGHT:
            factor = tl.load(weight + sample * n + token)
            total += value * factor
            mass += factor
        else:
            total += value
            mass += 1.0
    if MODE == 1:  # MEAN
        total = tl.where(mass == 0.0, 0.0, total / tl.where(mass == 0.0, 1.0, mass))
    target = out + (sample * n_groups + group) * d + channel
    tl.store(target, total, mask=channel < d)
