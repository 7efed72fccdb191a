"""Attention of merged tokens as if they were unmerged (virtual unmerging)."""

from vlmprune.kernels.virtual_attention.attention import virtual_attention
from vlmprune.kernels.virtual_attention.places import expand, fold_mean, fold_sum

__all__ = ["expand", "fold_mean", "fold_sum", "virtual_attention"]
