"""Greedy k-center (farthest-point) and max-sum selection."""

from vlmprune.kernels.kcenter.select import greedy_select
from vlmprune.kernels.kcenter.types import KCenterResult

__all__ = ["KCenterResult", "greedy_select"]
