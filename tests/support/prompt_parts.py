"""One image or video of a prompt, and what the makers of all families share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.embedded.random_models import tokens as t

TEXT, IMAGE, VIDEO = 0, 1, 2
"""Kinds of prompt tokens."""


@dataclass(frozen=True)
class Part:
    """One image or video of a prompt.

    Attributes:
        ids: its prompt tokens, with the tokens that frame it.
        kinds: per token `TEXT`, `IMAGE` or `VIDEO`; the latter two are placeholders.
        tensors: what the processor returns for it, by name.
        grids: `(rows, columns)` of its placeholders, one per view or frame in prompt order; newlines not counted.
        newlines: which of its placeholders (counted from 0) stand for the learned newline.
    """

    ids: list[int]
    kinds: list[int]
    tensors: dict[str, Tensor]
    grids: tuple[tuple[int, int], ...]
    newlines: tuple[int, ...] = ()

    @property
    def places(self) -> list[int]:
        """Where its placeholders stand among its own tokens."""
        return [i for i, kind in enumerate(self.kinds) if kind != TEXT]


@dataclass(frozen=True)
class Draw:
    """Random pixels of one prompt."""

    generator: torch.Generator
    dtype: torch.dtype

    def pixels(self, *shape: int) -> Tensor:
        """Normal noise, drawn in float64 so that all dtypes see the same image."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


Size = tuple[int, int]
"""Height and width in pixels."""


def framed(kind: int, count: int) -> tuple[list[int], list[int]]:
    """Ids and kinds of a start token, ``count`` placeholders and an end token."""
    token = t.IMAGE_TOKEN_ID if kind == IMAGE else t.VIDEO_TOKEN_ID
    return [t.START_ID, *[token] * count, t.END_ID], [TEXT, *[kind] * count, TEXT]


def cat(rows: list[list[Part]]) -> dict[str, Tensor]:
    """Tensors of all parts, one behind the other."""
    parts = [part for row in rows for part in row]
    names = sorted({name for part in parts for name in part.tensors})
    return {name: torch.cat([part.tensors[name] for part in parts if name in part.tensors]) for name in names}
