"""Tokens that the framework adds to a selection stand where they stood, beside what was chosen."""

from __future__ import annotations

import torch

from vlmprune.core.extra_tokens import with_tokens
from vlmprune.core.selection import Selection
from vlmprune.core.synthetic import Synthetic

# Two items of 6 tokens; tokens 2 and 5 of the first, token 4 of the second are newlines to be kept.
EXTRA = torch.tensor([[False, False, True, False, False, True], [False, False, False, False, True, False]])
VALUES = torch.arange(12.0).view(2, 6, 1)


def test_beside_kept_tokens() -> None:
    chosen = Selection.from_mask(torch.tensor([[1, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0]]).bool(), (2, 1))
    wider = with_tokens(chosen, EXTRA)
    assert wider.counts == (4, 2)
    assert wider.kept.tolist() == [[0, 2, 4, 5], [3, 4, -1, -1]]


def test_a_token_that_was_chosen_is_not_doubled() -> None:
    chosen = Selection.from_mask(EXTRA, (2, 1))
    assert with_tokens(chosen, EXTRA).kept.tolist() == [[2, 5], [4, -1]]


def test_beside_new_tokens() -> None:
    """New tokens stand at places 1 and 3 of the first item and 0 of the second."""
    sources = torch.zeros(2, 2, 6)
    sources[0, 0, :2], sources[0, 1, 3:5], sources[1, 0, :4] = 0.5, 0.5, 0.25
    place = torch.tensor([[1, 3], [0, -1]])
    new = Synthetic(averages(sources), sources, place)
    nothing = torch.full((2, 0), -1, dtype=torch.long)
    chosen = Selection(6, nothing, (2, 1), synthetic=new)
    wider = with_tokens(chosen, EXTRA)
    assert wider.counts == (4, 2)
    assert wider.anchors().tolist() == [[1, 2, 3, 5], [0, 4, -1, -1]]
    assert wider.apply(VALUES, features=True)[..., 0].tolist() == [[0.5, 2.0, 3.5, 5.0], [7.5, 10.0, 0.0, 0.0]]


def averages(sources: torch.Tensor) -> torch.Tensor:
    """Features of tokens made of ``sources``."""
    return sources @ VALUES


def test_beside_groups() -> None:
    """Groups {0, 3} and {1, 4} of the first item, {0, 1, 2, 3} of the second; token 5 of the second is dropped."""
    group = torch.tensor([[0, 1, -1, 0, 1, -1], [0, 0, 0, 0, -1, -1]])
    wider = with_tokens(Selection.merge(group, 2, "mean", counts=(2, 1)), EXTRA)
    assert wider.counts == (4, 2) and wider.n_outputs == 4
    assert wider.anchors().tolist() == [[0, 1, 2, 5], [0, 4, -1, -1]]
    assert wider.apply(VALUES)[..., 0].tolist() == [[1.5, 2.5, 2.0, 5.0], [7.5, 10.0, 0.0, 0.0]]
