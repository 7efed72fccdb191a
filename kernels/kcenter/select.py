"""The public function: checks, start rule, choice of the implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.kernels.arguments import Counts, check_mask, check_values, require, token_counts
from vlmprune.kernels.backend import Backend, choose_backend
from vlmprune.kernels.kcenter import torch_backend
from vlmprune.kernels.kcenter.start import first_pick
from vlmprune.kernels.kcenter.types import KCenterResult, Kind, Metric, Objective, Problem, Route, StartRule
from vlmprune.kernels.precision import compute_dtype

# Bytes that a Gram matrix [B, N, N] may take before distances are computed from the features per pick.
MEMORY_CAP = 2 << 30


@torch.no_grad()
def greedy_select(
    x: Tensor | None,
    k: Counts,
    *,
    metric: Metric = "cosine",
    objective: Objective = "min_max",
    start: int | Tensor | StartRule = 0,
    start_score: Tensor | None = None,
    valid: Tensor | None = None,
    preselected: Tensor | Sequence[int] | None = None,
    weight: Tensor | None = None,
    distance: Tensor | None = None,
    similarity: Tensor | None = None,
    k_max: int | None = None,
    route: Route = "auto",
    memory_cap: int = MEMORY_CAP,
    backend: Backend | None = None,
) -> KCenterResult:
    """Pick k tokens per sample one by one, each the farthest from those picked before.

    ``min_max`` is the greedy k-center rule (farthest-first traversal, Gonzalez 1985; DivPrune, arXiv
    2503.02175): the next token has the largest distance to its nearest picked token. ``max_sum`` is greedy
    max-sum diversification (ToDRE, arXiv 2505.18757, algorithm 1): the next token has the smallest sum of
    similarities to all picked tokens. Lowest index wins ties, no token is picked twice, NaN distances come
    last. Equal feature rows have distance zero to each other and equal distances to all others.

    Args:
        x: features ``[B, N, d]``, or None with ``distance`` or ``similarity``.
        k: picks per sample: an int, a sequence of B ints, or an int tensor ``[B]`` (not read on the host).
        metric: ``"cosine"`` (``max(0, 1 - cos)``, norms at least 1e-12) or ``"l2"`` (squared distance).
        objective: ``"min_max"`` or ``"max_sum"`` (cosine or a matrix, no weight).
        start: first pick, for samples without preselected tokens: an index for all samples, an int tensor
            ``[B]``, ``"score"`` (largest ``start_score``), ``"center_far"`` (farthest from the mean of the
            valid tokens; of their unit vectors under cosine), or ``"medoid"`` (closest to it). With a matrix
            the last two compare mean distances to the valid tokens, which is the same order.
        start_score: ``[B, N]``, for ``start="score"``.
        valid: bool ``[B, N]``; other tokens are never picked.
        preselected: tokens that count as picked before but are not returned: indices for all samples, an
            int tensor ``[P]`` or ``[B, P]`` (-1 fill), or a bool mask ``[B, N]``. Padding among them is
            ignored.
        weight: ``[B, N]``, multiplies each token's distance in the comparison (ZOO-Prune).
        distance: ``[B, N, N]`` given instead of ``x``; row j is used once j is picked.
        similarity: ``[B, N, N]`` given instead of ``x``; its distance is ``1 - similarity``, not clamped.
        k_max: output width for a tensor ``k``; default N.
        route: ``"gram"`` computes all distances first, ``"features"`` those of each pick; both give the
            same selection up to float32 rounding.
        memory_cap: bytes a Gram matrix may take; larger batches are split or take the features route.
        backend: ``"torch"``, ``"triton"`` (features in float32 or narrower and matrices, up to 4096
            tokens; larger problems run in PyTorch) or ``"reference"`` (slow, float64).

    Returns:
        A :class:`KCenterResult`; values are float32 (float64 for float64 input).

    Raises:
        ValueError: an invalid start (on CUDA a device-side assertion, no synchronisation), an unknown
            option, or shapes that do not fit.
        TypeError: ``k`` is no count.
        BackendError: a forced backend cannot run.
    """
    problem = _check(x, k, k_max, metric, objective, valid, preselected, weight, distance, similarity)
    if route not in ("auto", "gram", "features"):
        raise ValueError(f"Unknown route {route!r}; choose auto, gram or features.")
    choice = choose_backend("k-center", backend, problem.device, ("reference", "torch", "triton"))
    if choice == "reference":
        from vlmprune.kernels.kcenter import reference

        return reference.run(problem, start, start_score)
    if problem.n == 0 or problem.batch == 0:
        return _nothing(problem)
    first = first_pick(problem, start, start_score)
    if choice == "triton":
        from vlmprune.kernels.kcenter import triton_backend

        if triton_backend.supports(problem, memory_cap):
            return triton_backend.run(problem, first, memory_cap)
    return torch_backend.run(problem, first, route, memory_cap)


def _check(
    x: Tensor | None,
    k: Counts,
    k_max: int | None,
    metric: str,
    objective: Objective,
    valid: Tensor | None,
    preselected: Tensor | Sequence[int] | None,
    weight: Tensor | None,
    distance: Tensor | None,
    similarity: Tensor | None,
) -> Problem:
    if objective not in ("min_max", "max_sum"):
        raise ValueError(f"Unknown objective {objective!r}; choose min_max or max_sum.")
    kind, source = _source(x, metric, distance, similarity)
    batch, n = source.shape[:2]
    if objective == "max_sum" and (kind == "l2" or weight is not None):
        raise ValueError("objective='max_sum' sums similarities: use metric='cosine' or a matrix, no weight.")
    width, counts = token_counts(k, batch, n, k_max, source.device)
    valid = check_mask(valid, (batch, n), "valid")
    return Problem(
        kind=kind,
        objective=objective,
        features=source if kind in ("cosine", "l2") else None,
        matrix=source if kind in ("distance", "similarity") else None,
        width=width,
        counts=counts,
        valid=valid,
        preselected=_preselected(preselected, valid, batch, n, source.device),
        weight=check_values(weight, (batch, n), "weight"),
        dtype=compute_dtype(source),
    )


def _source(x: Tensor | None, metric: str, distance: Tensor | None, similarity: Tensor | None) -> tuple[Kind, Tensor]:
    if sum(value is not None for value in (x, distance, similarity)) != 1:
        raise ValueError("Give exactly one of x, distance and similarity.")
    if x is not None:
        if metric not in ("cosine", "l2"):
            raise ValueError(f"Unknown metric {metric!r}; choose cosine or l2.")
        if x.ndim != 3 or not x.is_floating_point():
            raise ValueError(f"x must be a float tensor [B, N, d], got {x.dtype} {tuple(x.shape)}.")
        return ("cosine" if metric == "cosine" else "l2"), x
    matrix = similarity if distance is None else distance
    assert matrix is not None
    name: Kind = "similarity" if distance is None else "distance"
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or not matrix.is_floating_point():
        raise ValueError(f"{name} must be a float tensor [B, N, N], got {matrix.dtype} {tuple(matrix.shape)}.")
    return name, matrix


def _preselected(
    given: Tensor | Sequence[int] | None, valid: Tensor | None, batch: int, n: int, device: torch.device
) -> Tensor | None:
    """int64 ``[B, P]`` with -1 for empty slots and padding, or None."""
    if given is None:
        return None
    if not isinstance(given, Tensor):
        outside = [i for i in given if not 0 <= i < n]
        if outside:
            raise ValueError(f"preselected holds {outside}, outside 0..{n - 1}.")
        given = torch.tensor(list(given), dtype=torch.int64, device=device)
    is_mask = given.dtype == torch.bool
    if is_mask:
        check_mask(given, (batch, n), "preselected")
        given = torch.where(given, torch.arange(n, device=given.device), -1)
    elif given.is_floating_point() or given.ndim not in (1, 2):
        raise ValueError(f"preselected must hold indices [P] or [B, P], or be a bool mask [{batch}, {n}].")
    index = given.to(device=device, dtype=torch.int64)
    index = index.expand(batch, -1) if index.ndim == 1 else index
    if index.shape[0] != batch:
        raise ValueError(f"preselected must have {batch} rows, got {index.shape[0]}.")
    if index.shape[1] == 0 or n == 0:
        return None
    require(index < n, f"preselected holds an index above {n - 1}.")
    index = index.clamp(-1, n - 1)
    if valid is not None:
        index = torch.where(valid.gather(1, index.clamp_min(0)), index, -1)
    if not is_mask:
        repeated = (index[:, :, None] == index[:, None]).tril(-1).any(-1)
        index = torch.where(repeated, -1, index)
    return index


def _nothing(problem: Problem) -> KCenterResult:
    """Result for a batch without samples or tokens."""
    shape = (problem.batch, problem.width)
    return KCenterResult(
        torch.full(shape, -1, dtype=torch.int64, device=problem.device),
        torch.full(shape, -1.0, dtype=problem.dtype, device=problem.device),
        torch.zeros(problem.batch, problem.n, dtype=problem.dtype, device=problem.device),
    )
