"""Token importance by weighted PageRank on the attention graph."""

from vlmprune.kernels.pagerank.heads import HeadFusion, fuse_heads
from vlmprune.kernels.pagerank.power import pagerank

__all__ = ["HeadFusion", "fuse_heads", "pagerank"]
