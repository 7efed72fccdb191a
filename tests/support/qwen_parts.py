"""Images and videos as the processors of Qwen2-VL, Qwen2.5-VL and Qwen3-VL write them."""

from __future__ import annotations

import torch
from prompt_parts import IMAGE, TEXT, VIDEO, Draw, Part, Size, framed
from torch import Tensor

from vlmprune.embedded.random_models import qwen
from vlmprune.embedded.random_models import tokens as t


def image(draw: Draw, size: Size, alone: bool) -> Part:
    """``<|vision_start|>``, one placeholder per 2 x 2 patches, ``<|vision_end|>``."""
    rows, columns = (side // qwen.PATCH for side in size)
    grid = (rows // qwen.MERGE, columns // qwen.MERGE)
    ids, kinds = framed(IMAGE, grid[0] * grid[1])
    tensors = {
        "pixel_values": _pixels(draw, rows * columns),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    return Part(ids, kinds, tensors, (grid,))


def video(draw: Draw, size: Size, timestamps: bool = False) -> Part:
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
        "pixel_values_videos": _pixels(draw, frames * rows * columns),
        "video_grid_thw": torch.tensor([[frames, rows, columns]]),
    }
    return Part(ids, kinds, tensors, (grid,) * frames)


def video_2_5(draw: Draw, size: Size) -> Part:
    """As Qwen2-VL, with the seconds that a temporal patch lasts."""
    part = video(draw, size)
    return Part(part.ids, part.kinds, {**part.tensors, "second_per_grid_ts": torch.tensor([1.0])}, part.grids)


def video_3(draw: Draw, size: Size) -> Part:
    """Each temporal patch by itself, behind its time."""
    return video(draw, size, timestamps=True)


def _pixels(draw: Draw, patches: int) -> Tensor:
    return draw.pixels(patches, 3 * qwen.TEMPORAL * qwen.PATCH**2)
