"""Images and videos as the processors of LLaVA, LLaVA-NeXT and LLaVA-OneVision write them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from prompt_parts import IMAGE, VIDEO, Draw, Part, Size, cat
from torch import Tensor

from vlmprune.embedded.random_models import llava
from vlmprune.embedded.random_models import tokens as t

SIDE = llava.TILE // llava.PATCH
FRAMES = 3


def llava_image(draw: Draw, size: Size, alone: bool) -> Part:
    """One view; ``size`` is resized away."""
    pixels = draw.pixels(1, 3, llava.TILE, llava.TILE)
    return _part({"pixel_values": pixels}, ((SIDE, SIDE),), (False,))


def next_image(draw: Draw, size: Size, alone: bool) -> Part:
    """The whole image, then its tiles without what padding made of them, a newline behind each row."""
    rows, columns = _tiles(size, llava.NEXT_PINPOINTS)
    grid = unpadded(size, rows * SIDE, columns * SIDE)
    return _anyres(draw, size, 1 + rows * columns, ((SIDE, SIDE), grid), (False, True))


def onevision_image(draw: Draw, size: Size, alone: bool) -> Part:
    """As in LLaVA-NeXT, shrunk where that is too much; one view and a newline if it has company."""
    if not alone:
        part = _anyres(draw, size, 1, ((SIDE, SIDE),), (False,))
        return Part([*part.ids, t.IMAGE_TOKEN_ID], [*part.kinds, IMAGE], part.tensors, part.grids, (SIDE**2,))
    rows, columns = _tiles(size, llava.ONEVISION_PINPOINTS)
    grid = unpadded(size, rows * SIDE, columns * SIDE)
    ratio = math.sqrt(grid[0] * grid[1] / (llava.ONEVISION_TILES * SIDE**2))
    if ratio > 1.1:
        grid = (int(grid[0] // ratio), int(grid[1] // ratio))
    return _anyres(draw, size, 1 + rows * columns, ((SIDE, SIDE), grid), (False, True))


def onevision_video(draw: Draw, size: Size) -> Part:
    """Frames pooled to half their side (rounded up), one newline behind the last."""
    side = math.ceil(SIDE / 2)
    count = FRAMES * side**2
    pixels = draw.pixels(1, FRAMES, 3, llava.TILE, llava.TILE)
    ids, kinds = [t.VIDEO_TOKEN_ID] * (count + 1), [VIDEO] * (count + 1)
    return Part(ids, kinds, {"pixel_values_videos": pixels}, ((side, side),) * FRAMES, (count,))


def collate(rows: list[list[Part]]) -> dict[str, Tensor]:
    """Images with fewer tiles are filled up with zeros."""
    most = max(
        (part.tensors["pixel_values"].shape[1] for row in rows for part in row if IMAGE in part.kinds), default=0
    )
    return cat([[_filled(part, most) for part in row] for row in rows])


def _filled(part: Part, most: int) -> Part:
    if IMAGE not in part.kinds:
        return part
    pixels = part.tensors["pixel_values"]
    pixels = torch.cat([pixels, pixels.new_zeros(1, most - pixels.shape[1], *pixels.shape[2:])], 1)
    return replace(part, tensors={**part.tensors, "pixel_values": pixels})


def onevision_collate(rows: list[list[Part]]) -> dict[str, Tensor]:
    """Also says how many images each sample with images has."""
    counts = [sum(IMAGE in part.kinds for part in row) for row in rows]
    found = [count for count in counts if count]
    return {**collate(rows), **({"batch_num_images": torch.tensor(found)} if found else {})}


def unpadded(size: Size, rows: int, columns: int) -> tuple[int, int]:
    """Grid that is left of ``rows x columns`` tokens when an image of ``size`` has been centred in it."""
    height, width = size
    if width / height > columns / rows:
        return rows - 2 * ((rows - int(round(height * columns / width, 7))) // 2), columns
    return rows, columns - 2 * ((columns - int(round(width * rows / height, 7))) // 2)


def _tiles(size: Size, pinpoints: list[list[int]]) -> tuple[int, int]:
    """Rows and columns of tiles of the canvas on which most of the image's pixels survive; the smallest such."""
    height, width = size

    def fit(canvas: list[int]) -> tuple[int, int]:
        scale = min(canvas[0] / height, canvas[1] / width)
        used = min(int(height * scale) * int(width * scale), height * width)
        return used, used - canvas[0] * canvas[1]

    best = max(pinpoints, key=fit)
    return best[0] // llava.TILE, best[1] // llava.TILE


def _anyres(draw: Draw, size: Size, tiles: int, grids: tuple[tuple[int, int], ...], newlines: tuple[bool, ...]) -> Part:
    tensors = {
        "pixel_values": draw.pixels(1, tiles, 3, llava.TILE, llava.TILE),
        "image_sizes": torch.tensor([list(size)]),
    }
    return _part(tensors, grids, newlines)


def _part(tensors: dict[str, Tensor], grids: tuple[tuple[int, int], ...], newlines: tuple[bool, ...]) -> Part:
    count, breaks = 0, []
    for (rows, columns), newline in zip(grids, newlines, strict=True):
        for _ in range(rows):
            count += columns
            if newline:
                breaks.append(count)
                count += 1
    return Part([t.IMAGE_TOKEN_ID] * count, [IMAGE] * count, tensors, grids, tuple(breaks))
