"""Where the images of a batch of prompts stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlmprune.core.context import View
from vlmprune.core.errors import InputError
from vlmprune.core.views import Newline

Kind = Literal["image", "video"]


@dataclass(frozen=True)
class ImageShape:
    """How an image (or video) becomes tokens of the LLM.

    Attributes:
        length: its tokens.
        views: grids of tokens inside it.
        newlines: its separator tokens.
        encoded: encoder views that it is made of.
        geometry: what the family needs to pack patches into tokens; hashable.
    """

    length: int
    views: tuple[View, ...] = ()
    newlines: tuple[Newline, ...] = ()
    encoded: int = 1
    geometry: Any = None


@dataclass(frozen=True, eq=False)
class PromptImage:
    """One image of the batch.

    Attributes:
        sample, index: its row, and its place among the images there.
        positions: where its tokens stand.
        shape: how they came about.
        kind: ``image`` or ``video``: which run of the encoder made it.
        source: its place among the images of that run.
        first: its first view in that run.
    """

    sample: int
    index: int
    positions: tuple[int, ...]
    shape: ImageShape = field(default_factory=lambda: ImageShape(0))
    kind: Kind = "image"
    source: int = 0
    first: int = 0

    @property
    def views(self) -> tuple[View, ...]:
        """Grids of tokens inside the image."""
        return self.shape.views


@dataclass(frozen=True, eq=False)
class PromptLayout:
    """The images of a batch, known on the host before the forward.

    Attributes:
        rows, length: batch size and padded prompt length.
        images: all images, row by row.
        real: tokens per row that are not padding.
        mask: 2-D padding mask of the prompt ``[B, L]``, None without one.
    """

    rows: int
    length: int
    images: tuple[PromptImage, ...]
    real: tuple[int, ...]
    mask: Tensor | None = None

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


def make_layout(rows: int, length: int, images: Sequence[PromptImage], attention_mask: Tensor | None) -> PromptLayout:
    """A layout of images in any order within their rows, numbered by where they start."""
    ordered = sorted(images, key=lambda image: (image.sample, image.positions[0]))
    counts = [0] * rows
    numbered = []
    for image in ordered:
        index = counts[image.sample]
        counts[image.sample] += 1
        numbered.append(
            PromptImage(
                image.sample, index, image.positions, image.shape, image.kind, source=image.source, first=image.first
            )
        )
    flat = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    mask = attention_mask[:, -length:] if flat and attention_mask is not None else None
    real = (length,) * rows if mask is None else tuple((mask != 0).sum(1).tolist())
    return PromptLayout(rows, length, tuple(numbered), real, mask)


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
            images.append(PromptImage(row, index, tuple(range(start, end)), ImageShape(count)))
    return make_layout(rows, length, images, attention_mask)


def from_placeholders(
    masks: Mapping[Kind, np.ndarray], shapes: Mapping[Kind, Sequence[ImageShape]], attention_mask: Tensor | None
) -> PromptLayout:
    """Layout of prompts whose images are encoded in the order in which they stand there.

    Rows may be repeated after encoding (beams, several returned sequences): each run of equal rows then shares its
    images.

    Args:
        masks: per kind ``[B, L]`` bool on the host, True at placeholders.
        shapes: per kind the encoded images.

    Raises:
        InputError: placeholders and images do not fit together.
    """
    images: list[PromptImage] = []
    for kind, mask in masks.items():
        images += _place(kind, mask, shapes.get(kind, ()))
    rows, length = next(iter(masks.values())).shape
    return make_layout(rows, length, images, attention_mask)


def _place(kind: Kind, mask: np.ndarray, shapes: Sequence[ImageShape]) -> list[PromptImage]:
    total, expected = int(mask.sum()), sum(shape.length for shape in shapes)
    if not total and not expected:
        return []
    _check_whole(kind, mask, shapes)
    if not total or not expected or total % expected or len(mask) % (total // expected):
        raise InputError(
            f"The prompt has {total} {kind} placeholder tokens, but its {len(shapes)} {kind}s make {expected}; build "
            "the prompt with the model's processor, and leave out prefill_chunk_size."
        )
    repeats = total // expected
    images: list[PromptImage] = []
    start = (0, 0)  # image and view with which the current run of equal rows starts
    for row, places in enumerate(mask):
        source, first = start
        positions = np.flatnonzero(places).tolist()
        while positions:
            if source >= len(shapes) or len(positions) < shapes[source].length:
                raise InputError(
                    f"Row {row} has {int(places.sum())} {kind} placeholder tokens, which are no whole number of its "
                    f"{kind}s; build the prompt with the model's processor."
                )
            shape = shapes[source]
            own, positions = tuple(positions[: shape.length]), positions[shape.length :]
            images.append(PromptImage(row, 0, own, shape, kind, source, first))
            source, first = source + 1, first + shape.encoded
        if row % repeats == repeats - 1:
            start = (source, first)
    return images


def _check_whole(kind: Kind, mask: np.ndarray, shapes: Sequence[ImageShape]) -> None:
    """Refuse a row whose placeholders are no whole number of images, where all have one length."""
    sizes = {shape.length for shape in shapes}
    if len(sizes) != 1:
        return
    [size] = sizes
    for row, count in enumerate(mask.sum(1).tolist()):
        if count % size:
            raise InputError(
                f"Row {row} has {count} {kind} placeholder tokens, which is no multiple of the {size} tokens of a "
                f"{kind}; build the prompt with the model's processor, and leave out prefill_chunk_size."
            )


def row_ids(images: Sequence[PromptImage], width: int) -> tuple[np.ndarray, np.ndarray]:
    """``[I, N]`` newline row of each token (-1 for none) and which tokens are newlines."""
    rows = np.full((len(images), width), -1, dtype=np.int64)
    newline = np.zeros((len(images), width), dtype=bool)
    for i, image in enumerate(images):
        for row, mark in enumerate(image.shape.newlines):
            rows[i, mark.start : mark.place + 1] = row
            newline[i, mark.place] = True
    return rows, newline
