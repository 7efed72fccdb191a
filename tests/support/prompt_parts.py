"""Images and videos as the processors of the families write them: prompt ids and tensors, from random pixels.

Everything here is computed from the sizes of images and from what the processors are documented to do; nothing asks a
model or an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.embedded.random_models import qwen
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
    """

    ids: list[int]
    kinds: list[int]
    tensors: dict[str, Tensor]
    grids: tuple[tuple[int, int], ...]

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


def qwen_image(draw: Draw, size: Size, alone: bool) -> Part:
    """``<|vision_start|>``, one placeholder per 2 x 2 patches, ``<|vision_end|>``."""
    rows, columns = (side // qwen.PATCH for side in size)
    grid = (rows // qwen.MERGE, columns // qwen.MERGE)
    ids, kinds = framed(IMAGE, grid[0] * grid[1])
    tensors = {
        "pixel_values": _qwen_pixels(draw, rows * columns),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    return Part(ids, kinds, tensors, (grid,))


def qwen_video(draw: Draw, size: Size, timestamps: bool = False) -> Part:
    """Three temporal patches (six frames). Qwen3-VL frames each of them and writes its time before it."""
    frames = 3
    rows, columns = (side // qwen.PATCH for side in size)
    grid = (rows // qwen.MERGE, columns // qwen.MERGE)
    ids: list[int] = []
    kinds: list[int] = []
    for frame in range(frames if timestamps else 1):
        text = [t.FIRST_TEXT + frame, t.FIRST_TEXT + 9] if timestamps else []
        block, kind = framed(VIDEO, grid[0] * grid[1] * (1 if timestamps else frames))
        ids, kinds = ids + text + block, kinds + [TEXT] * len(text) + kind
    tensors = {
        "pixel_values_videos": _qwen_pixels(draw, frames * rows * columns),
        "video_grid_thw": torch.tensor([[frames, rows, columns]]),
    }
    return Part(ids, kinds, tensors, (grid,) * frames)


def qwen2_5_video(draw: Draw, size: Size) -> Part:
    """As Qwen2-VL, with the seconds that a temporal patch lasts."""
    part = qwen_video(draw, size)
    return Part(part.ids, part.kinds, {**part.tensors, "second_per_grid_ts": torch.tensor([1.0])}, part.grids)


def qwen3_video(draw: Draw, size: Size) -> Part:
    """Each temporal patch by itself, behind its time."""
    return qwen_video(draw, size, timestamps=True)


def _qwen_pixels(draw: Draw, patches: int) -> Tensor:
    return draw.pixels(patches, 3 * qwen.TEMPORAL * qwen.PATCH**2)


def cat(rows: list[list[Part]]) -> dict[str, Tensor]:
    """Tensors of all parts, one behind the other."""
    parts = [part for row in rows for part in row]
    names = sorted({name for part in parts for name in part.tensors})
    return {name: torch.cat([part.tensors[name] for part in parts if name in part.tensors]) for name in names}


@dataclass(frozen=True)
class Style:
    """How a family writes prompts.

    Attributes:
        image: makes an image from its size; ``alone`` says whether it is its row's only image.
        sizes: sizes of images that are used where a test gives none, in turn.
        video: makes a video, where the family takes some.
        collate: joins the tensors of all rows.
        type_ids: name of the input that holds the kinds of the tokens, where there is one.
        images_first: True if images stand before bos.
    """

    image: Callable[[Draw, Size, bool], Part]
    sizes: tuple[Size, ...]
    video: Callable[[Draw, Size], Part] | None = None
    collate: Callable[[list[list[Part]]], dict[str, Tensor]] = cat
    type_ids: str | None = None
    images_first: bool = False


QWEN_SIZES = ((32, 40), (24, 40), (40, 24), (16, 48))
STYLES = {
    "qwen2_5_vl": Style(qwen_image, QWEN_SIZES, qwen2_5_video, type_ids="mm_token_type_ids"),
    "qwen2_vl": Style(qwen_image, QWEN_SIZES, qwen_video, type_ids="mm_token_type_ids"),
    "qwen3_vl": Style(qwen_image, QWEN_SIZES, qwen3_video, type_ids="mm_token_type_ids"),
}
