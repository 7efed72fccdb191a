"""Images as the processors of InternVL, Idefics3, SmolVLM, PaliGemma and Gemma 3 write them."""

from __future__ import annotations

import torch
from prompt_parts import IMAGE, TEXT, Draw, Part, Size, framed
from torch import Tensor

from vlmprune.embedded.random_models import gemma, tiled
from vlmprune.embedded.random_models import tokens as t


def internvl_image(draw: Draw, size: Size, alone: bool) -> Part:
    """``<img>``, the tokens of all tiles and then of the whole image (if there are several tiles), ``</img>``."""
    tiles = (size[0] // tiled.TILE) * (size[1] // tiled.TILE)
    views = tiles + 1 if tiles > 1 else 1
    ids, kinds = framed(IMAGE, views * tiled.SIDE**2)
    pixels = draw.pixels(views, 3, tiled.TILE, tiled.TILE)
    return Part(ids, kinds, {"pixel_values": pixels}, ((tiled.SIDE, tiled.SIDE),) * views)


def idefics_image(draw: Draw, size: Size, alone: bool) -> Part:
    """Tiles in reading order, each behind its row and column, then the whole image.

    An image that is smaller than a tile is not split; what it does not cover is padding.
    """
    rows, columns = size[0] // tiled.TILE, size[1] // tiled.TILE
    split = rows * columns > 1
    ids: list[int] = []
    for row in range(rows if split else 0):
        for column in range(columns):
            ids += [t.START_ID, t.ROW_COLUMN_ID + 4 * row + column, *[t.IMAGE_TOKEN_ID] * tiled.SIDE**2]
        ids.append(t.NEWLINE_ID)
    ids += [t.NEWLINE_ID] if split else []
    ids += [t.START_ID, t.GLOBAL_ID, *[t.IMAGE_TOKEN_ID] * tiled.SIDE**2, t.START_ID]
    kinds = [IMAGE if token == t.IMAGE_TOKEN_ID else TEXT for token in ids]
    views = rows * columns + 1 if split else 1
    mask = torch.zeros(views, tiled.TILE, tiled.TILE, dtype=torch.long)
    height, width = (tiled.TILE, tiled.TILE) if split else size
    mask[:, :height, :width] = 1
    pixels = draw.pixels(views, 3, tiled.TILE, tiled.TILE) * mask[:, None]
    tensors = {"pixel_values": pixels, "pixel_attention_mask": mask}
    return Part(ids, kinds, tensors, ((tiled.SIDE, tiled.SIDE),) * views)


def idefics_collate(rows: list[list[Part]]) -> dict[str, Tensor]:
    """``[B, V, ...]``: the views of each row, filled up with zeros."""
    joined = {}
    for name in ("pixel_values", "pixel_attention_mask"):
        some = next(part.tensors[name] for row in rows for part in row)
        views = [torch.cat([some[:0], *[part.tensors[name] for part in row]]) for row in rows]
        most = max(len(view) for view in views)
        joined[name] = torch.stack([torch.cat([v, v.new_zeros(most - len(v), *v.shape[1:])]) for v in views])
    return joined


def paligemma_image(draw: Draw, size: Size, alone: bool) -> Part:
    """The tokens of one view; the processor puts them before everything else."""
    count = gemma.SIDE**2
    pixels = draw.pixels(1, 3, gemma.IMAGE, gemma.IMAGE)
    grids = ((gemma.SIDE, gemma.SIDE),)
    return Part([t.IMAGE_TOKEN_ID] * count, [IMAGE] * count, {"pixel_values": pixels}, grids)


def gemma3_image(draw: Draw, size: Size, alone: bool) -> Part:
    """``\\n\\n<start_of_image>``, the tokens of one view, ``<end_of_image>\\n\\n``."""
    ids, kinds = framed(IMAGE, gemma.SIDE**2)
    pixels = draw.pixels(1, 3, gemma.IMAGE, gemma.IMAGE)
    ids, kinds = [t.NEWLINE_ID, *ids, t.NEWLINE_ID], [TEXT, *kinds, TEXT]
    return Part(ids, kinds, {"pixel_values": pixels}, ((gemma.SIDE, gemma.SIDE),))
