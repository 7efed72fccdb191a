"""Batches of prompts with images for random-weight LLaVA models, and runs over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fixed_policy import FixedKeep
from prompt_runs import Prompt, decode, prefill
from torch import Tensor, nn

from vlmprune.core.sites import Site
from vlmprune.embedded.tiny_configs import BOS_ID, IMAGE_TOKEN_ID, random_llava

__all__ = [
    "N",
    "LlavaPrompt",
    "StubProcessor",
    "decode",
    "fixed_keep",
    "make_prompt",
    "pick_tokens",
    "prefill",
    "small_llava",
]

N = 16  # visual tokens per image of `small_llava`


def small_llava(vision: str = "clip", text: str = "llama", **arguments: Any) -> nn.Module:
    """A LLaVA with 16 tokens per image, 4 tower blocks, 4 decoder layers and grouped-query attention."""
    sizes = {"vision_depth": 4, "text_layers": 4, "hidden": 32, "heads": 4, "kv_heads": 2}
    return random_llava(vision, text, **{**sizes, **arguments})


class StubProcessor:
    """Enough of a processor for policies that act on images, where a test gives pixels itself."""

    def __init__(self) -> None:
        self.image_processor = object()


@dataclass(frozen=True)
class LlavaPrompt(Prompt):
    """A left-padded batch of prompts; ``real`` marks tokens that are not padding."""

    ids: Tensor
    real: Tensor
    pixels: Tensor | None
    images: tuple[int, ...]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model."""
        given = {"input_ids": self.ids, "attention_mask": self.real.long()}
        return given if self.pixels is None else {**given, "pixel_values": self.pixels}

    def places(self) -> list[list[list[int]]]:
        """Per row and image, where its tokens stand."""
        rows = []
        for row in self.ids:
            found = (row == IMAGE_TOKEN_ID).nonzero()[:, 0].tolist()
            rows.append([found[i : i + N] for i in range(0, len(found), N)])
        return rows

    def row(self, index: int) -> LlavaPrompt:
        """One row by itself, without its padding."""
        first = sum(self.images[:index])
        count = self.images[index]
        start = int((~self.real[index]).sum())
        pixels = self.pixels[first : first + count] if self.pixels is not None and count else None
        ids = self.ids[index : index + 1, start:]
        return LlavaPrompt(ids, torch.ones_like(ids, dtype=torch.bool), pixels, (count,))


def make_prompt(
    images: tuple[int, ...] = (1,),
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    size: int = 32,
    tokens: int = N,
) -> LlavaPrompt:
    """Row ``b`` holds ``images[b]`` images, each followed by 3 text tokens.

    Args:
        images: images per row.
        padded: rows also differ in the text before the first image.
        seed: seed of text and pixels.
        size: side of the images in pixels.
        tokens: placeholders per image.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row, count in enumerate(images):
        start = torch.randint(8, 60, (3 + (2 * row if padded else 0),), generator=generator)
        start[0] = BOS_ID
        text = [start] if count else [start, torch.randint(8, 60, (4,), generator=generator)]
        for _ in range(count):
            text += [torch.full((tokens,), IMAGE_TOKEN_ID), torch.randint(8, 60, (3,), generator=generator)]
        rows.append(torch.cat(text))
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        real[i, length - len(row) :] = True
    total = sum(images)
    pixels = torch.randn(total, 3, size, size, generator=generator, dtype=torch.float64).to(dtype) if total else None
    return LlavaPrompt(ids, real, pixels, images)


def pick_tokens(widths: Sequence[int], ragged: bool = False, seed: int = 3) -> tuple[tuple[int, ...], ...]:
    """About half of ``widths[i]`` tokens for item ``i``, of differing share if ``ragged``."""
    generator = torch.Generator().manual_seed(seed)
    counts = [width // 2 - (i % 3 if ragged else 0) for i, width in enumerate(widths)]
    return tuple(
        tuple(sorted(torch.randperm(width, generator=generator)[:count].tolist()))
        for width, count in zip(widths, counts, strict=True)
    )


def fixed_keep(
    images: tuple[int, ...] = (1,), where: int | None = None, ragged: bool = False, positions: Any = "keep"
) -> FixedKeep:
    """A policy that keeps about half of the tokens of prompts with ``images``, after the encoder or before decoder
    layer ``where``."""
    widths = [N] * sum(images) if where is None else [N * n for n in images if n]
    site = Site.POST_ENCODER if where is None else Site.DECODER_LAYER
    return FixedKeep(kept=pick_tokens(widths, ragged), site=site, layer=where, positions=positions)
