"""VFlowOpt's recycling: pruned tokens of a grid cell become one token at the place of the most important of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.selection import Selection
from vlmprune.core.synthetic import Synthetic
from vlmprune.kernels.gather import first_members, gather_tokens, segment_merge
from vlmprune.kernels.ordering import stable_topk
from vlmprune.policies._vflowopt_settings import Settings


def first_cut(
    context: Context, features: Tensor, importance: Tensor, settings: Sequence[Settings | None]
) -> tuple[Selection, Tensor]:
    """Drop each image's least important tokens, and merge those of a grid cell into one where images are recycled.

    Args:
        context: after the encoder.
        features: ``[I, N, D]``. importance: ``[I, N]``.
        settings: of every item; None keeps all its tokens.

    Returns:
        The selection, and the importance as values ``[I, N]`` to be carried through it (see :func:`recycle`).
    """
    pooled, ids, n_cells = [], [], 0
    for item, (n, chosen) in enumerate(zip(context.lengths, settings, strict=True)):
        count = 0 if chosen is None else round(n * (1 - chosen.r1))
        cells = torch.full((context.width,), -1)
        if chosen is not None and recycles(context, item):
            side = cell_side(context, item, chosen.a)
            cells[:n], found = cell_ids(context, item, side)
            n_cells, count = max(n_cells, found), min(n, count + int(n / side**2))
        else:
            count = min(count, n - 1)
        pooled.append(count)
        ids.append(cells)
    counts = tuple(n - count for n, count in zip(context.lengths, pooled, strict=True))
    kept = stable_topk(importance, list(counts), context.valid, order="index")
    selection = Selection(context.width, kept, counts, scores=importance)
    if not n_cells:
        return selection, importance.double()
    place = torch.where(kept < 0, context.width, kept)
    pool = torch.nn.functional.pad(context.valid, (0, 1)).scatter(1, place, False)[:, :-1]
    cell = torch.where(pool, torch.stack(ids).to(context.device, non_blocking=True), -1)
    merged, carried = recycle(features, importance, cell, n_cells)
    added = (merged.place >= 0).sum(1).tolist()
    filled = (merged.place < 0).to(torch.int8).argsort(dim=1, stable=True)[:, : max(added)]  # cells with tokens first
    synthetic = Synthetic(*(gather_tokens(x, filled) for x in (merged.features, merged.sources, merged.place)))
    counts = tuple(n + more for n, more in zip(counts, added, strict=True))
    return replace(selection, synthetic=synthetic, counts=counts), carried


def recycles(context: Context, item: int) -> bool:
    """False for videos and for the one-view images of a prompt with several: there tokens are only dropped."""
    views = context.item_views(item)
    if all(view.kind == "frame" for view in views):
        return False
    several = sum(other == context.sample[item] for other in context.sample) > 1 if context.sample else False
    return not (several and len(views) == 1)


def cell_side(context: Context, item: int, a: float | None) -> float:
    """Side of a cell in tokens; None is half the longer side of the item's first view."""
    view = context.item_views(item)[0]
    return max(view.height, view.width) / 2 if a is None else a


def cell_ids(context: Context, item: int, side: float) -> tuple[Tensor, int]:
    """Cell of every token of an item, ``[n]`` int64 on the host, and the number of cells.

    A thumbnail, and every tile without newline tokens, has its own grid. Rows that end with newline tokens form one
    canvas, in which the newlines are its last column.
    """
    n, views = context.lengths[item], context.item_views(item)
    last = views[-1]
    # Tokens outside every view (a newline at the very end) stand in a row of their own below the last one.
    place = torch.tensor([len(views) - 1, last.height, 0]).repeat(n, 1)  # [n, 3]: grid, row, column
    for number, view in enumerate(views):
        tokens, index = view.tokens(), torch.arange(view.length)
        place[tokens] = torch.stack([torch.full_like(index, number), index // view.width, index % view.width], 1)
    newlines = sorted(context.newlines[item], key=lambda line: line.place) if context.newlines else []
    if len(newlines) > 1 or any(view.kind == "tile" for view in views):
        for row, newline in enumerate(newlines):
            index = torch.arange(newline.place + 1 - newline.start)
            line = torch.stack([torch.full_like(index, len(views)), torch.full_like(index, row), index], 1)
            place[newline.start : newline.place + 1] = line
    cell = torch.cat([place[:, :1], (place[:, 1:].double() / side).floor().long()], 1)
    unique, ids = cell.unique(dim=0, return_inverse=True)
    return ids, len(unique)


def recycle(features: Tensor, importance: Tensor, cell: Tensor, n_cells: int) -> tuple[Synthetic, Tensor]:
    """Merge the tokens of each cell, weighted by their importance.

    Args:
        features: ``[I, N, D]``. importance: ``[I, N]``.
        cell: ``[I, N]`` int64 cell of the tokens to merge, -1 for all others.
        n_cells: number of cells ``C``.

    Returns:
        One token per cell that has any, at the place of its most important member (the first of equal ones), and
        values ``[I, N]`` (float64) that give every token its importance when carried through the selection: a merged
        one keeps that of the member whose place it takes.
    """
    total = segment_merge(importance, cell, n_cells, "sum")
    members = segment_merge(torch.ones_like(importance), cell, n_cells, "sum")
    slot = cell.clamp_min(0)
    sums, counts = total.gather(1, slot), members.gather(1, slot)
    weight = torch.where(sums == 0, 1 / counts.clamp_min(1), importance / torch.where(sums == 0, 1.0, sums))
    weight = torch.where(cell < 0, 0.0, weight)  # [I, N], sums to 1 in each cell
    wide = features if features.dtype == torch.float64 else features.float()
    merged = segment_merge(wide * weight[..., None].to(wide.dtype), cell, n_cells, "sum")
    best = segment_merge(importance, cell, n_cells, "amax")  # [I, C]
    place = first_members(torch.where(importance == best.gather(1, slot), cell, -1), n_cells)
    sources = torch.zeros(*place.shape, importance.shape[1], device=importance.device)
    sources.scatter_(1, slot[:, None], weight[:, None].float())
    # A carried value is averaged with the same weights, whose sum is 1 only up to rounding.
    share = sources.double().sum(2).gather(1, slot)
    carried = torch.where(cell < 0, importance.double(), best.double().gather(1, slot) / share)
    return Synthetic(merged, sources, place), carried
