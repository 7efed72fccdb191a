"""Batches of prompts for the random-weight models of all families, and runs over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
import transformers
from prompt_parts import TEXT, Draw, Part, Size
from prompt_runs import Prompt, decode, prefill
from prompt_styles import STYLES
from torch import Tensor, nn

from vlmprune.embedded.random_models import tokens as t

__all__ = ["FamilyPrompt", "Row", "decode", "make_family_prompt", "prefill"]

MAJOR = int(transformers.__version__.split(".")[0])


@dataclass(frozen=True)
class Row:
    """One prompt: ids and kinds of its tokens, its images and videos, and where each of them starts."""

    ids: list[int]
    kinds: list[int]
    parts: list[Part]
    starts: list[int]


@dataclass(frozen=True)
class FamilyPrompt(Prompt):
    """A left-padded batch of prompts in the shape that the family's processor gives."""

    family: str
    rows: tuple[Row, ...]

    @property
    def images(self) -> tuple[int, ...]:
        """Images and videos per row."""
        return tuple(len(row.parts) for row in self.rows)

    @property
    def ids(self) -> Tensor:
        """``[B, L]`` prompt tokens."""
        return self._padded([row.ids for row in self.rows], t.PAD_ID)

    @property
    def real(self) -> Tensor:
        """``[B, L]`` True at tokens that are not padding."""
        return self._padded([[1] * len(row.ids) for row in self.rows]).bool()

    @property
    def kinds(self) -> Tensor:
        """``[B, L]`` 0 for text, 1 for an image's placeholder, 2 for a video's."""
        return self._padded([row.kinds for row in self.rows], TEXT)

    @property
    def vision(self) -> dict[str, Tensor]:
        """Pixels and what describes them; empty without images."""
        return STYLES[self.family].collate([row.parts for row in self.rows]) if sum(self.images) else {}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model and of ``generate``."""
        given = {"input_ids": self.ids, "attention_mask": self.real.long(), **self.vision}
        name = STYLES[self.family].type_ids
        if name == "mm_token_type_ids" and MAJOR >= 5:
            given[name] = self.kinds
        elif name == "token_type_ids" and self.family == "gemma3":
            given[name] = self.kinds
        elif name == "token_type_ids" and MAJOR >= 5:
            given[name] = torch.zeros_like(self.kinds)
        return given

    def places(self) -> list[list[list[int]]]:
        """Per row and image or video, where its placeholders stand in the padded prompt."""
        return [
            [
                [self.length - len(row.ids) + start + i for i in part.places]
                for part, start in zip(row.parts, row.starts, strict=True)
            ]
            for row in self.rows
        ]

    def row(self, index: int) -> FamilyPrompt:
        """One row by itself, without its padding."""
        return FamilyPrompt(self.family, (self.rows[index],))

    def position_ids(self, model: nn.Module) -> Tensor:
        """``[B, L]``; for Qwen ``[4, B, L]``: text, time, height, width (without the first row for Qwen3-VL before
        transformers 5)."""
        if self.family == "paligemma":
            return self.positions + 1
        if not self.family.startswith("qwen"):
            return self.positions
        inputs = self.inputs
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "attention_mask")
        given = {name: inputs[name] for name in names if name in inputs}
        vision, _ = model.model.get_rope_index(self.ids, **given)
        return vision if MAJOR < 5 and self.family == "qwen3_vl" else torch.cat([self.positions[None], vision])

    def repainted(self, row: int) -> FamilyPrompt:
        """The same prompts, with other pixels in one row."""
        parts = [
            replace(part, tensors={n: -x if n.startswith("pixel_values") else x for n, x in part.tensors.items()})
            for part in self.rows[row].parts
        ]
        rows = list(self.rows)
        rows[row] = replace(rows[row], parts=parts)
        return replace(self, rows=tuple(rows))

    def _padded(self, values: list[list[int]], fill: int = 0) -> Tensor:
        longest = max(len(row) for row in values)
        return torch.tensor([[fill] * (longest - len(row)) + row for row in values])


def make_family_prompt(
    family: str,
    images: tuple[int, ...] = (1,),
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    video: bool = False,
    sizes: tuple[Size, ...] | None = None,
    between: int = 3,
) -> FamilyPrompt:
    """Row ``b`` holds ``images[b]`` images, followed by text (PaliGemma: before all text).

    Args:
        family: one of ``STYLES``.
        images: images per row.
        padded: rows also differ in the text before the first image.
        dtype: dtype of the pixels.
        seed: seed of text and pixels.
        video: the last image of each row that has one is a video instead.
        sizes: height and width in pixels of the images of all rows, repeated if there are fewer; None means sizes
            that differ from image to image, where the family's processor keeps them.
        between: text tokens between two images; 0 lets them stand side by side.
    """
    style = STYLES[family]
    draw = Draw(torch.Generator().manual_seed(seed), dtype)
    sides = list(islice(cycle(sizes or style.sizes), sum(images)))
    rows = []
    for index, count in enumerate(images):
        given, sides = sides[:count], sides[count:]
        still = max(0, count - video)
        parts = [style.image(draw, size, still == 1) for size in given[:still]]
        if video and count:
            assert style.video is not None, f"{family} takes no video"
            parts.append(style.video(draw, given[-1]))
        gap = 0 if style.images_first else between
        rows.append(_row(style.images_first, parts, 2 * index * padded, gap, draw.generator))
    return FamilyPrompt(family, tuple(rows))


def _row(images_first: bool, parts: list[Part], more: int, gap: int, generator: torch.Generator) -> Row:
    def text(count: int) -> list[int]:
        return torch.randint(t.FIRST_TEXT, t.LAST_TEXT + 1, (count,), generator=generator).tolist()

    opening = [t.BOS_ID, *text(2 + more)]
    ids = [] if images_first else opening
    kinds, starts = [TEXT] * len(ids), []
    for part in parts:
        space = text(gap) if starts else []
        starts.append(len(ids) + len(space))
        ids, kinds = ids + space + part.ids, kinds + [TEXT] * len(space) + part.kinds
    closing = [*(opening if images_first else []), *text(4)]
    return Row(ids + closing, kinds + [TEXT] * len(closing), parts, starts)
