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
# Bits of the float32 behind 1: an equal row comes before one whose cosine was rounded to 1.
ABOVE_ONE: tl.constexpr = tl.constexpr(0x3F800001)


@triton.jit
def _row_hash(values, channel, axis: tl.constexpr):
    """int64 hash of rows of a tile, summed along ``axis``; equal rows have equal ones. Zeros add nothing."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True).to(tl.int64) * 1640531527
    bits = bits ^ (bits >> 29)
    mixed = (channel + 1).to(tl.int64) * 1640531527
    mixed = (mixed ^ (mixed >> 15)) * 2146121005
    mixed = (mixed ^ (mixed >> 32)) * 1274126177
    mixed = (mixed ^ (mixed >> 29)) | 1
    return tl.sum(bits * (mixed[None, :] if axis == 1 else mixed[:, None]), axis=axis)


@triton.jit
def match_kernel(
    metric,  # [B, N, c] with strides
    a_index,  # int64 [B, Na], -1 for an empty slot; not read if PLAIN
    b_index,  # int64 [B, Nb], likewise
    a_free,  # uint8 [B, Na], not read if PLAIN
    b_free,  # uint8 [B, Nb], likewise
    scores,  # float32 [B, Na]
    partners,  # int64 [B, Na]
    n_a,
    n_b,
    d,
    first_a,  # first slots behind the front, if PLAIN
    first_b,
    stride_b,
    stride_n,
    stride_d,
    PLAIN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Best cosine and partner of one tile of A slots; the similarities never leave the program.

    PLAIN: A slots are even positions, B slots odd ones. All tiles are full, so that every cosine is summed in the same
    order: equal rows get equal cosines. The one to an equal row, told by its hash, is 1 and comes first.
    """
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    channel = tl.arange(0, BLOCK_D)
    base = metric + sample * stride_b
    if PLAIN:
        token = tl.where(row < n_a, 2 * row, -1).to(tl.int64)
        may = (row >= first_a) & (row < n_a)
    else:
        token = tl.load(a_index + sample * n_a + row, mask=row < n_a, other=-1)
        may = tl.load(a_free + sample * n_a + row, mask=row < n_a, other=0) != 0
    a_inside = token >= 0
    a_base = base + tl.maximum(token, 0) * stride_n
    a_square = tl.zeros((BLOCK_A,), dtype=tl.float32)
    a_hash = tl.zeros((BLOCK_A,), dtype=tl.int64)
    for first in range(0, d, BLOCK_D):
        inside = channel < d - first
        place = (first + channel).to(tl.int64) * stride_d
        a = tl.load(a_base[:, None] + place[None, :], mask=a_inside[:, None] & inside[None, :], other=0.0)
        a = a.to(tl.float32)
        a_square += tl.sum(a * a, axis=1)
        a_hash += _row_hash(a, first + channel, 1)
    a_norm = tl.sqrt(a_square)
    certain = (a_norm >= 1e-12) & (a_norm < float("inf"))  # a shorter row has a smaller cosine to itself
    a_norm = tl.maximum(a_norm, 1e-12)
    # Order-preserving integer of the score in the upper half of a key, the slot below it, so that one
    # maximum gives the best score and, on ties, the lowest slot. The smallest key stands for no partner.
    best = tl.full((BLOCK_A,), -9223372036854775807, dtype=tl.int64)
    for start in range(0, n_b, BLOCK_B):
        slot = start + tl.arange(0, BLOCK_B)
        if PLAIN:
            target = tl.where(slot < n_b, 2 * slot + 1, -1).to(tl.int64)
            free = (slot >= first_b) & (slot < n_b)
        else:
            target = tl.load(b_index + sample * n_b + slot, mask=slot < n_b, other=-1)
            free = tl.load(b_free + sample * n_b + slot, mask=slot < n_b, other=0) != 0
        b_inside = target >= 0
        b_base = base + tl.maximum(target, 0) * stride_n
        total = tl.zeros((BLOCK_A, BLOCK_B), dtype=tl.float32)
        b_square = tl.zeros((BLOCK_B,), dtype=tl.float32)
        b_hash = tl.zeros((BLOCK_B,), dtype=tl.int64)
        for first in range(0, d, BLOCK_D):
            inside = channel < d - first
            place = (first + channel).to(tl.int64) * stride_d
            a = tl.load(a_base[:, None] + place[None, :], mask=a_inside[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_base[None, :] + place[:, None], mask=b_inside[None, :] & inside[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
            b = b.to(tl.float32)
            b_square += tl.sum(b * b, axis=0)
            b_hash += _row_hash(b, first + channel, 0)
        b_norm = tl.maximum(tl.sqrt(b_square), 1e-12)
        score = total / a_norm[:, None] / b_norm[None, :]
        score = tl.where(score == 0.0, 0.0, score)  # -0.0 becomes +0.0
        twin = (a_hash[:, None] == b_hash[None, :]) & certain[:, None]
        score = tl.where(score > 1.0, 1.0, score)
        bits = tl.where(twin, ABOVE_ONE, score.to(tl.int32, bitcast=True))
        bits = bits ^ ((bits >> 31) & 2147483647)
        bits = tl.where(score != score, -2147483647, bits)
        bits = tl.where(free[None, :], bits, -2147483647 - 1)
        key = (bits.to(tl.int64) << 32) | (2147483647 - slot).to(tl.int64)[None, :]
        best = tl.maximum(best, tl.max(key, axis=1))
    bits = (best >> 32).to(tl.int32)
    found = (bits != -2147483647 - 1) & may
    bits = bits ^ ((bits >> 31) & 2147483647)
    bits = tl.where(bits == ABOVE_ONE, ABOVE_ONE - 1, bits)
    score = tl.where(found, bits.to(tl.float32, bitcast=True), float("-inf"))
    tl.store(scores + sample * n_a + row, score, mask=row < n_a)
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
