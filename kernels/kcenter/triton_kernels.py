"""Triton kernels of greedy selection. Imported only when Triton is used."""

# Kernel parameters are pointers and scalars of the Triton language, which has no annotations for them.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# What the matrix holds. Gram kinds are turned into distances row by row.
COSINE_GRAM: tl.constexpr = tl.constexpr(0)
L2_GRAM: tl.constexpr = tl.constexpr(1)
DISTANCE: tl.constexpr = tl.constexpr(2)
SIMILARITY: tl.constexpr = tl.constexpr(3)


@triton.jit
def gram_kernel(x, out, n, d, stride_b, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One tile of ``out[b] = x[b] @ x[b].T`` with float32 accumulation and no TF32."""
    sample = tl.program_id(2).to(tl.int64)
    left = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    right = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    base = x + sample * stride_b
    a = base + left.to(tl.int64)[:, None] * stride_n + channel[None, :] * stride_d
    b = base + right.to(tl.int64)[None, :] * stride_n + channel[:, None] * stride_d
    total = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        inside = channel < d - start
        rows = tl.load(a, mask=(left < n)[:, None] & inside[None, :], other=0.0)
        columns = tl.load(b, mask=inside[:, None] & (right < n)[None, :], other=0.0)
        total = tl.dot(rows, columns, total, input_precision="ieee")
        a += BLOCK_D * stride_d
        b += BLOCK_D * stride_d
    place = out + sample * n * n + left.to(tl.int64)[:, None] * n + right[None, :]
    tl.store(place, total, mask=(left < n)[:, None] & (right < n)[None, :])


@triton.jit
def direct_l2_kernel(x, out, n, d, stride_b, stride_n, stride_d, BLOCK_N: tl.constexpr):
    """One tile of squared distances summed from differences, for few channels."""
    sample = tl.program_id(2).to(tl.int64)
    left = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    right = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = x + sample * stride_b
    total = tl.zeros((BLOCK_N, BLOCK_N), dtype=tl.float32)
    for channel in range(d):
        a = tl.load(base + left.to(tl.int64) * stride_n + channel * stride_d, mask=left < n, other=0.0)
        b = tl.load(base + right.to(tl.int64) * stride_n + channel * stride_d, mask=right < n, other=0.0)
        difference = a.to(tl.float32)[:, None] - b.to(tl.float32)[None, :]
        total += difference * difference
    place = out + sample * n * n + left.to(tl.int64)[:, None] * n + right[None, :]
    tl.store(place, total, mask=(left < n)[:, None] & (right < n)[None, :])


@triton.jit
def _pick_value(values, hit):
    """The value of the single lane where ``hit`` is true."""
    return tl.sum(tl.where(hit, values, 0.0), axis=0)


@triton.jit
def _update(state, row, hit, same, square, KIND: tl.constexpr, MAX_SUM: tl.constexpr):
    """State after the token of lane ``hit`` was taken; ``row`` is its matrix row.

    ``same`` marks its copies, itself included, for COSINE_GRAM; ``square`` holds squared norms, for both Gram
    kinds. Copies read the same entries of the matrix, so their squared distance comes out as exactly 0.
    """
    if KIND == 0:  # COSINE_GRAM
        norm = tl.sqrt(square)
        clamped = tl.maximum(norm, 1e-12)
        similarity = row / clamped / _pick_value(clamped, hit)
        share = tl.minimum(norm / 1e-12, 1.0)
        # A row has cosine 1 to itself, 0 if it is zero, NaN if it is not finite.
        similarity = tl.where(same, share * share + 0.0 * square, similarity)
        distance = tl.where(similarity > 1.0, 0.0, 1.0 - similarity)
    elif KIND == 1:  # L2_GRAM
        square += 0.0 * square  # NaN instead of infinity
        distance = square + _pick_value(square, hit) - 2.0 * row
        distance = tl.where(distance < 0.0, 0.0, distance)
        similarity = 1.0 - distance
    elif KIND == 2:  # DISTANCE
        distance = row
        similarity = 1.0 - row
    else:
        distance = 1.0 - row
        similarity = row
    if MAX_SUM:
        updated = state + similarity
    else:
        # Written so that NaN spreads: tl.minimum would drop it.
        updated = tl.where((distance < state) | (distance != distance), distance, state)
    return updated


@triton.jit
def select_kernel(
    matrix,  # [B, N, N] with strides
    available,  # uint8 [B, N]: valid and not preselected
    weight,  # float32 [B, N], read if HAS_WEIGHT
    copies,  # int64 [B, N]: first equal row, read for Gram kinds
    preselected,  # int64 [B, P], -1 for an empty slot
    first,  # int64 [B], -1 for the ordinary rule
    counts,  # int64 [B]
    indices,  # int64 [B, width], filled with -1
    radius,  # float32 [B, width], filled with -1
    final,  # float32 [B, N]
    n,
    n_preselected,
    width,
    stride_b,
    stride_row,
    stride_column,
    KIND: tl.constexpr,
    MAX_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All rounds of one sample in one program; the state of every token stays in registers."""
    sample = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    inside = token < n
    base = matrix + sample * stride_b
    copy = token.to(tl.int64)
    if KIND < 2:
        # Copies share one row and one column of the matrix, so that rounding cannot tell them apart.
        copy = tl.load(copies + sample * n + token, mask=inside, other=0)
    column = copy * stride_column
    free = tl.load(available + sample * n + token, mask=inside, other=0) != 0
    square = tl.zeros((BLOCK,), dtype=tl.float32)
    if KIND < 2:
        square = tl.load(base + copy * stride_row + column, mask=inside, other=1.0)
    factor = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_WEIGHT:
        factor = tl.load(weight + sample * n + token, mask=inside, other=1.0)
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if not MAX_SUM:
        state += float("inf")

    for slot in range(n_preselected):
        j = tl.load(preselected + sample * n_preselected + slot)
        hit = token == tl.maximum(j, 0)
        source = tl.sum(tl.where(hit, copy, 0), axis=0)
        row = tl.load(base + source * stride_row + column, mask=inside, other=0.0)
        updated = _update(state, row.to(tl.float32), hit, copy == source, square, KIND, MAX_SUM)
        state = tl.where(j >= 0, updated, state)

    rounds = tl.minimum(tl.load(counts + sample), tl.sum(free.to(tl.int32), axis=0).to(tl.int64))
    rounds = tl.minimum(rounds, width)
    given = tl.load(first + sample)
    for step in range(rounds):
        if MAX_SUM:
            score = 0.0 - state
        elif HAS_WEIGHT:
            score = state * factor
        else:
            score = state
        # Order-preserving integer of the score in the upper half of a key, the index below it, so that
        # one maximum gives the best score and, on ties, the lowest index. NaN is below every number.
        score = tl.where(score == 0.0, 0.0, score)  # -0.0 becomes +0.0
        bits = score.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 2147483647)
        bits = tl.where(score != score, -2147483647, bits)
        bits = tl.where(free, bits, -2147483647 - 1)
        key = (bits.to(tl.int64) << 32) | (2147483647 - token).to(tl.int64)
        best = tl.max(key, axis=0)
        j = 2147483647 - (best & 2147483647)
        j = tl.where((step == 0) & (given >= 0), given, j)
        hit = token == j
        tl.store(indices + sample * width + step, j)
        tl.store(radius + sample * width + step, _pick_value(state, hit))
        free = free & (token != j)
        source = tl.sum(tl.where(hit, copy, 0), axis=0)
        row = tl.load(base + source * stride_row + column, mask=inside, other=0.0)
        state = _update(state, row.to(tl.float32), hit, copy == source, square, KIND, MAX_SUM)
    tl.store(final + sample * n + token, state, mask=inside)
