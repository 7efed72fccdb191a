"""What a policy returns: which tokens stay, which merge, and what replaces them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from vlmprune.core.pairs import Pairs
from vlmprune.core.source_map import SourceMap
from vlmprune.core.synthetic import Synthetic
from vlmprune.kernels.gather import compose_groups, first_members, gather_tokens, pack_indices, segment_merge

__all__ = ["Mode", "Selection", "Synthetic"]

Mode = Literal["prune", "mean", "wavg", "sum", "amax"]


@dataclass(frozen=True)
class Selection:
    """The result of one site.

    Exactly one of ``kept`` (prune) and ``group_id`` (merge) is set; ``kept`` may come with ``synthetic``.

    Attributes:
        n_in: padded number of input tokens ``N``.
        kept: ``[I, K]`` int64 kept tokens, ascending unless the policy's source orders otherwise; -1 fills.
        counts: outputs per item (synthetic ones too) where the host knows them; they avoid a device sync.
        group_id: ``[I, N]`` output that each token goes to, -1 for dropped.
        n_out: number of outputs of a merge, padding included.
        mode: how group members are combined (``wavg`` needs ``weights``).
        weights: ``[I, N]``, e.g. token sizes.
        pairs: a merge by ``mean`` or ``wavg`` as pairs too, where it is at hand.
        synthetic: new tokens.
        scores: ``[I, N]`` for pictures.
        carry: per-token values ``[I, N, ...]`` of the *input* tokens; this and later selections re-index it.
        virtual: ``[I, N]`` unique token behind every full position (virtual unmerging).
        notes: what the user should know, for the report's warnings.
    """

    n_in: int
    kept: Tensor | None = None
    counts: tuple[int, ...] | None = None
    group_id: Tensor | None = None
    n_out: int | None = None
    mode: Mode = "prune"
    weights: Tensor | None = None
    pairs: Pairs | None = None
    synthetic: Synthetic | None = None
    scores: Tensor | None = None
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    virtual: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.kept is None) == (self.group_id is None):
            raise ValueError("A Selection needs either kept indices or group ids.")
        if self.group_id is not None and (self.n_out is None or self.mode == "prune"):
            raise ValueError("A merging Selection needs n_out and a mode other than 'prune'.")
        if self.mode == "wavg" and self.weights is None:
            raise ValueError("mode='wavg' needs weights.")

    @classmethod
    def keep_all(cls, valid: Tensor, lengths: tuple[int, ...], scores: Tensor | None = None) -> Selection:
        """Keep every valid token."""
        return cls.from_mask(valid, lengths, scores=scores)

    @classmethod
    def drop_all(cls, valid: Tensor) -> Selection:
        """Drop every token."""
        kept = torch.full((valid.shape[0], 0), -1, dtype=torch.long, device=valid.device)
        return cls(valid.shape[1], kept, (0,) * valid.shape[0])

    @classmethod
    def from_mask(cls, keep: Tensor, counts: tuple[int, ...] | None = None, scores: Tensor | None = None) -> Selection:
        """Keep where ``keep [I, N]`` is True; ``counts`` (True entries per item) avoid a device sync."""
        if counts is None:
            counts = tuple(keep.sum(1).tolist())
        kept, filled = pack_indices(keep, side="right", width=max(counts, default=0))
        return cls(keep.shape[1], torch.where(filled, kept, -1), counts, scores=scores)

    @classmethod
    def from_order(
        cls, order: Tensor, n_in: int, counts: tuple[int, ...] | None = None, scores: Tensor | None = None
    ) -> Selection:
        """Keep the tokens of ``order [I, K]`` (selection order, -1 fill), sorted to original order."""
        ascending = torch.where(order < 0, n_in, order).sort(1).values
        return cls(n_in, torch.where(ascending == n_in, -1, ascending), counts, scores=scores)

    @classmethod
    def merge(
        cls,
        group_id: Tensor,
        n_out: int,
        mode: Mode = "mean",
        weights: Tensor | None = None,
        counts: tuple[int, ...] | None = None,
    ) -> Selection:
        """Merge tokens with equal ``group_id [I, N]`` (-1 drops); outputs stand in the order of the ids."""
        return cls(group_id.shape[1], None, counts, group_id, n_out, mode, weights)

    @property
    def n_outputs(self) -> int:
        """Padded number of outputs ``M``."""
        if self.kept is None:
            return int(self.n_out or 0)
        return self.kept.shape[1] + (self.synthetic.place.shape[1] if self.synthetic else 0)

    @property
    def is_pruning(self) -> bool:
        """True if tokens are only dropped: no feature changes."""
        return self.kept is not None and self.synthetic is None

    def anchors(self) -> Tensor:
        """``[I, M]`` input token whose place and position each output takes, -1 for padding."""
        if self.group_id is not None:
            return first_members(self.group_id, self.n_outputs)
        assert self.kept is not None
        return self.kept if self.synthetic is None else self.synthetic.merge_order(self.kept, self.n_in)[0]

    def out_valid(self) -> Tensor:
        """``[I, M]`` bool: outputs that are not padding."""
        return self.anchors() >= 0

    def out_counts(self) -> tuple[int, ...]:
        """Outputs per item; a device sync unless the host knows them."""
        if self.counts is not None:
            return self.counts
        return tuple(self.out_valid().sum(1).tolist())

    def apply(self, values: Tensor, features: bool = False) -> Tensor:
        """Outputs ``[I, M, ...]`` of per-token ``values [I, N, ...]``; padding is zero.

        Args:
            values: any tensor over the input tokens.
            features: ``values`` are the token features, so synthetic tokens bring their own.
        """
        if self.pairs is not None and self.mode in ("mean", "wavg"):
            return self.pairs.mean(values, self.weights if self.mode == "wavg" else None)
        if self.group_id is not None:
            return segment_merge(values, self.group_id, self.n_outputs, mode=self.mode, weights=self.weights)
        assert self.kept is not None
        kept = gather_tokens(values, self.kept)
        if self.synthetic is None:
            return kept
        new = self.synthetic.features if features else SourceMap(self.synthetic.sources).apply(values)
        order = self.synthetic.merge_order(self.kept, self.n_in)[1]
        return gather_tokens(torch.cat([kept, new.to(kept.dtype)], 1), order)

    def unmerge(self, outputs: Tensor) -> Tensor:
        """Per-input values ``[I, N, ...]`` from outputs ``[I, M, ...]``; zero where a token was dropped."""
        if self.group_id is not None:
            return gather_tokens(outputs, self.group_id)
        if self.synthetic is not None:
            return self.source_map().unmerge(outputs).to(outputs.dtype)
        assert self.kept is not None
        shape = (outputs.shape[0], self.n_in + 1, *outputs.shape[2:])
        place = torch.where(self.kept < 0, self.n_in, self.kept)
        place = place.reshape(*place.shape, *[1] * (outputs.ndim - 2)).expand_as(outputs)
        return outputs.new_zeros(shape).scatter(1, place, outputs)[:, : self.n_in]

    def compose(self, later: Selection) -> Selection:
        """One selection equal to this one followed by ``later``; scores and carry stay this one's.

        Two prunings compose, and two merges of equal mode ``sum``, ``amax`` or ``wavg`` (where ``later``
        weighs each token by the weights merged into it).

        Raises:
            ValueError: other selections, or ``later`` acts on another number of tokens.
        """
        if later.n_in != self.n_outputs:
            raise ValueError(f"The later selection acts on {later.n_in} tokens, not on {self.n_outputs}.")
        if self.is_pruning and later.is_pruning:
            assert self.kept is not None and later.kept is not None
            return replace(self, kept=gather_tokens(self.kept, later.kept, fill=-1), counts=later.counts)
        if self.group_id is not None and later.group_id is not None and self.mode == later.mode != "mean":
            group = compose_groups(self.group_id, later.group_id)
            return replace(self, group_id=group, n_out=later.n_outputs, counts=later.counts, pairs=None)
        raise ValueError("These selections compose only as source maps: a.source_map().compose(b.source_map()).")

    def source_map(self) -> SourceMap:
        """The dense source map ``[I, M, N]``; group members weigh equally unless the mode is ``wavg``."""
        if self.group_id is not None:
            weights = self.weights if self.mode == "wavg" else None
            return SourceMap.from_groups(self.group_id, self.n_outputs, weights)
        assert self.kept is not None
        kept = SourceMap.from_kept(self.kept, self.n_in)
        if self.synthetic is None:
            return kept
        rows = torch.cat([kept.weights, self.synthetic.sources.float()], 1)
        return SourceMap(gather_tokens(rows, self.synthetic.merge_order(self.kept, self.n_in)[1]))
