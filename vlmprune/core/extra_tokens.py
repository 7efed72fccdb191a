"""Selections to which the framework adds tokens of its own (newlines)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.core.selection import Selection


def with_tokens(selection: Selection, extra: Tensor) -> Selection:
    """A selection with the tokens ``extra [I, N]`` (bool) kept as they are besides; a device sync.

    A merge must have left them out; they stand where they stood among the groups' first members.
    """
    if selection.group_id is not None:
        return _beside_groups(selection, selection.group_id, extra)
    assert selection.kept is not None
    mask = extra.new_zeros(extra.shape[0], selection.n_in + 1)
    mask.scatter_(1, torch.where(selection.kept < 0, selection.n_in, selection.kept), True)
    wider = Selection.from_mask(mask[:, :-1] | extra)
    counts = wider.out_counts()
    if selection.synthetic is not None:
        added = (selection.synthetic.place >= 0).sum(1).tolist()
        counts = tuple(n + new for n, new in zip(counts, added, strict=True))
    return replace(selection, kept=wider.kept, counts=counts)


def _beside_groups(selection: Selection, group_id: Tensor, extra: Tensor) -> Selection:
    """Groups in the order of their first members, ``extra`` as groups of one."""
    place = torch.arange(selection.n_in, device=extra.device).expand_as(group_id)
    members = torch.where(group_id < 0, -1, selection.anchors().gather(1, group_id.clamp_min(0)))
    first = torch.where(extra, place, members)  # [I, N] first member of each token's group
    opens = first == place
    rank = opens.long().cumsum(1) - 1
    group = torch.where(first < 0, -1, rank.gather(1, first.clamp_min(0)))
    counts = tuple(opens.sum(1).tolist())
    return replace(selection, group_id=group, n_out=max(counts, default=0), counts=counts, pairs=None)
