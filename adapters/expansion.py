"""Virtual unmerging, what is remembered of it: the places at which each token stands in the decoder's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.adapters.tokens import LayerTokens, change_shared

Tables = tuple[Tensor, ...]
"""Cosines and sines, each ``[..., 1 or B, T, d]``."""
Key = tuple[str, int]
"""Type of layer and numbering of the positions, for which all layers take the same tables."""


@dataclass(frozen=True, eq=False)
class Expansion:
    """Where the tokens of a run of layers stand in their attention.

    Attributes:
        places: ``[B, m]`` prompt places that take part.
        mapping: ``[B, m]`` token of the run at each of them, -1 for padding and fillers.
        whole: all places of the prompt take part, padding included, so that masks and tables of the model itself fit;
            known on the host.
        numbering: how often positions were closed up before this run.
    """

    places: LayerTokens
    mapping: Tensor
    whole: bool
    numbering: int = 0

    def rows(self, index: Tensor) -> Expansion:
        """The same for other batch rows."""
        index = index.to(self.mapping.device)
        return replace(self, places=self.places.rows(index), mapping=self.mapping[index])

    def without_last(self, count: int) -> Expansion:
        """The same without the last ``count`` places."""
        m = self.places.length - count
        return replace(self, places=self.places.without_last(count), mapping=self.mapping[:, :m])

    def with_new(self, tokens: int, new: int) -> Tensor:
        """``[B, m + new]`` with places for ``new`` tokens that are stored behind the run's ``tokens``."""
        later = torch.arange(tokens, tokens + new, device=self.mapping.device)
        return torch.cat([self.mapping, later.expand(self.mapping.shape[0], -1)], 1)

    def tables(self, tables: Tables, new: int = 0) -> Tables:
        """Rows of a sequence's rotary tables for the places, and for its last ``new`` tokens."""
        if self.whole:
            return tables
        index = self.places.index
        if new:
            total = tables[0].shape[-2]
            index = torch.cat([index, torch.arange(total - new, total, device=index.device).expand(len(index), -1)], 1)
        return tuple(table_rows(part, index) for part in tables)


@dataclass
class VirtualPrompt:
    """What a cache of merged keys without rotary embedding needs, so that they are attended to as if unmerged.

    Attributes:
        whole: all places of the prompt.
        layers: where the stored tokens of each decoder layer stand.
        tables: rotary tables of the whole sequence so far.
    """

    whole: LayerTokens
    layers: list[Expansion]
    tables: dict[Key, Tables]

    def select_rows(self, index: Tensor) -> None:
        """Follow a change of batch rows; tables that all rows share stay."""
        self.whole = self.whole.rows(index)
        change_shared(self.layers, lambda expansion: expansion.rows(index))
        for key, tables in self.tables.items():
            self.tables[key] = tuple(
                part if part.shape[-3] == 1 else part.index_select(-3, index.to(part.device)) for part in tables
            )

    def cut_tail(self, count: int) -> None:
        """Forget the last ``count`` tokens of the prompt."""
        self.whole = self.whole.without_last(count)
        change_shared(self.layers, lambda expansion: expansion.without_last(count))

    def extend(self, key: Key, new: Tables, past: int) -> Tables:
        """Tables of the sequence of ``past`` tokens and the ``new`` ones behind it; remembered."""
        joined = []
        for old, part in zip(self.tables[key], new, strict=True):
            batch = max(old.shape[-3], part.shape[-3])
            both = [old[..., :past, :].to(part.device), part]
            joined.append(torch.cat([x.expand(*x.shape[:-3], batch, *x.shape[-2:]) for x in both], -2))
        self.tables[key] = tuple(joined)
        return self.tables[key]


def table_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index [B, n]`` of a rotary table ``[..., 1 or B, L, d]``."""
    index = index.to(table.device)
    table = table.expand(*table.shape[:-3], index.shape[0], *table.shape[-2:])
    return table.gather(-2, index[..., None].expand(*table.shape[:-2], index.shape[1], table.shape[-1]))
