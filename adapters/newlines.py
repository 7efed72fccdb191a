"""Newline tokens of any-resolution images: kept with each row that still has tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.adapters.layout import PromptImage, row_ids
from vlmprune.core.extra_tokens import with_tokens
from vlmprune.core.selection import Selection
from vlmprune.core.views import View


@dataclass(frozen=True, eq=False)
class NewlineTokens:
    """The newlines among a batch of images' tokens.

    Attributes:
        row: ``[I, N]`` row of the image that a token belongs to, newlines included; -1 outside all rows.
        mask: ``[I, N]`` bool, the newlines.
    """

    row: Tensor
    mask: Tensor

    @classmethod
    def of(cls, images: Sequence[PromptImage], device: torch.device) -> NewlineTokens | None:
        """The newlines of a prompt's images, None where there are none."""
        if not any(image.shape.newlines for image in images):
            return None
        row, mask = row_ids(images, max(len(image.positions) for image in images))
        return cls(torch.from_numpy(row).to(device), torch.from_numpy(mask).to(device))

    def keep_rows(self, selection: Selection) -> Selection:
        """A selection among the other tokens, with the newline of every row in which a token is left."""
        anchors = selection.anchors()
        rows = torch.where(anchors < 0, -1, self.row.gather(1, anchors.clamp_min(0)))
        alive = self.row.new_zeros(self.row.shape[0], int(self.row.max()) + 2, dtype=torch.bool)
        alive.scatter_(1, rows + 1, True)  # column 0 takes tokens outside all rows
        alive[:, 0] = False
        return with_tokens(selection, self.mask & alive.gather(1, self.row + 1))

    def after(self, selection: Selection) -> NewlineTokens:
        """The newlines among what a selection left."""
        anchors = selection.anchors()
        there, place = anchors >= 0, anchors.clamp_min(0)
        return NewlineTokens(torch.where(there, self.row.gather(1, place), -1), there & self.mask.gather(1, place))

    def cells(self, lengths: Sequence[int]) -> tuple[tuple[View, ...], ...]:
        """Per image one view of all tokens that are no newlines; a device sync."""
        views = []
        for length, newline in zip(lengths, self.mask.tolist(), strict=True):
            index = tuple(i for i in range(length) if not newline[i])
            views.append((View(1, len(index), index=index),))
        return tuple(views)
