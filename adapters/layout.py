"""Where the images of a batch of prompts stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmprune.core.context import View
from vlmprune.core.errors import InputError


@dataclass(frozen=True, eq=False)
class PromptImage:
    """One image of the batch: row ``sample``, its ``index`` there, and where its tokens stand."""

    sample: int
    index: int
    positions: tuple[int, ...]
    views: tuple[View, ...] = ()


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """The images of a batch, known on the host before the forward.

    Attributes:
        rows, length: batch size and padded prompt length.
        images: all images, row by row.
        real: tokens per row that are not padding.
    """

    rows: int
    length: int
    images: tuple[PromptImage, ...]
    real: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per image."""
        return tuple(len(image.positions) for image in self.images)

    @property
    def samples(self) -> tuple[int, ...]:
        """Row of each image."""
        return tuple(image.sample for image in self.images)

    def visual_per_row(self) -> list[int]:
        """Visual tokens per row."""
        counts = [0] * self.rows
        for image in self.images:
            counts[image.sample] += len(image.positions)
        return counts

    def text_after_images(self) -> int:
        """Last places of the prompt that hold no visual token in any row."""
        return self.length - 1 - max(image.positions[-1] for image in self.images)

    def positions(self, device: torch.device) -> Tensor:
        """``[I, N]`` places of each image's tokens in its row, padded with the last one."""
        width = max(self.lengths)
        table = [
            list(image.positions) + [image.positions[-1]] * (width - len(image.positions)) for image in self.images
        ]
        return torch.tensor(table, device=device)

    def valid(self, device: torch.device) -> Tensor:
        """``[I, N]`` bool: not padding."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(max(self.lengths), device=device) < lengths[:, None]

    def image_id(self, device: torch.device) -> Tensor:
        """``[B, L]`` place of the image in its row for visual tokens, -1 elsewhere."""
        table = np.full((self.rows, self.length), -1, dtype=np.int64)
        for image in self.images:
            table[image.sample, list(image.positions)] = image.index
        return torch.from_numpy(table).to(device)


def real_tokens(attention_mask: Tensor | None, rows: int, length: int) -> tuple[int, ...]:
    """Tokens per row that are not padding, by a 2-D mask (other forms count everything)."""
    if attention_mask is None or not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return (length,) * rows
    return tuple((attention_mask[:, -length:] != 0).sum(1).tolist())


def from_spans(
    spans: Sequence[Sequence[tuple[int, int]]], rows: int, length: int, attention_mask: Tensor | None
) -> PromptLayout:
    """Layout of a bare decoder's prompt: per row, ``(start, length)`` of each image.

    Raises:
        InputError: rows or ranges do not fit the prompt, or spans overlap.
    """
    if len(spans) not in (1, rows):
        raise InputError(f"spans has {len(spans)} rows, but the batch has {rows}; give one list of spans per row.")
    if len(spans) != rows:
        spans = [spans[0]] * rows
    images = []
    for row, row_spans in enumerate(spans):
        end = 0
        for index, (start, count) in enumerate(row_spans):
            if start < end or count < 1 or start + count > length:
                raise InputError(
                    f"Span ({start}, {count}) of row {row} does not fit a prompt of {length} tokens; spans are "
                    "(start, length), ascending and disjoint."
                )
            end = start + count
            images.append(PromptImage(row, index, tuple(range(start, end))))
    return PromptLayout(rows, length, tuple(images), real_tokens(attention_mask, rows, length))


def from_placeholders(
    mask: Tensor, tokens_per_image: int, views: tuple[View, ...], attention_mask: Tensor | None
) -> PromptLayout:
    """Layout of prompts whose images all have the same number of tokens.

    Args:
        mask: ``[B, L]`` bool, True at placeholders (read once on the host).

    Raises:
        InputError: a row's placeholders are no whole number of images.
    """
    host = mask.cpu().numpy()
    images = []
    for row, places in enumerate(host):
        positions = np.flatnonzero(places)
        if len(positions) % tokens_per_image:
            raise InputError(
                f"Row {row} has {len(positions)} image placeholder tokens, which is no multiple of the "
                f"{tokens_per_image} tokens of an image; build the prompt with the model's processor, and leave out "
                "prefill_chunk_size."
            )
        for index, part in enumerate(positions.reshape(-1, tokens_per_image)):
            images.append(PromptImage(row, index, tuple(part.tolist()), views))
    rows, length = host.shape
    return PromptLayout(rows, length, tuple(images), real_tokens(attention_mask, rows, length))
