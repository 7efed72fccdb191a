"""Bipartite soft matching of tokens, and merging of the pairs found."""

from vlmprune.kernels.bipartite.match import bipartite_match
from vlmprune.kernels.bipartite.merge import merge_groups
from vlmprune.kernels.bipartite.pairs import merge_pairs
from vlmprune.kernels.bipartite.types import BipartiteMatch, Order

__all__ = ["BipartiteMatch", "Order", "bipartite_match", "merge_groups", "merge_pairs"]
