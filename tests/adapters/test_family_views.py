"""Views and newlines of every family: each cell once, in the grids that the processor wrote; newlines follow rows."""

from __future__ import annotations

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import FAMILIES, NEWLINES, VIDEO, batch, family_model
from prompt_parts import VIDEO as MOVING
from prompt_parts import Part
from recording import Recording

import vlmprune
from vlmprune.core.context import Context
from vlmprune.core.views import View

SIZES = ((20, 44), (24, 24), (60, 40), (30, 70))
"""For LLaVA-NeXT and OneVision: padded at the side, square, interpolated (OneVision), padded above."""
CASES = [
    pytest.param(family, images, video, id=f"{family}-{'-'.join(map(str, images))}{'-video' * video}")
    for family in FAMILIES
    for images, video in (((2, 0, 1), False), ((1, 1, 1), False), ((1, 2, 0), True))
    if family in VIDEO or not video
]


def prompt_of(family: str, images: tuple[int, ...], video: bool) -> FamilyPrompt:
    return batch(family, images, video=video, sizes=SIZES if family in NEWLINES else None)


def parts_of(prompt: FamilyPrompt) -> list[Part]:
    return [part for row in prompt.rows for part in row.parts]


def context_of(family: str, prompt: FamilyPrompt) -> Context:
    policy = Recording()
    with vlmprune.applied(family_model(family), policy):
        prefill(family_model(family), prompt)
    return policy.tape.last


def written_cells(part: Part) -> list[list[list[int]]]:
    """Per grid that the processor wrote, its rows of places; newlines left out."""
    free = iter(sorted(set(range(len(part.places))) - set(part.newlines)))
    return [[[next(free) for _ in range(columns)] for _ in range(rows)] for rows, columns in part.grids]


def cells(view: View) -> list[list[int]]:
    places = view.tokens().tolist()
    return [places[row * view.width : (row + 1) * view.width] for row in range(view.height)]


@pytest.mark.parametrize(("family", "images", "video"), CASES)
def test_views_cover_every_cell_once_in_its_place(family: str, images: tuple[int, ...], video: bool) -> None:
    prompt = prompt_of(family, images, video)
    context = context_of(family, prompt)
    for item, part in enumerate(parts_of(prompt)):
        views = context.views[item]
        places = [place for view in views for place in view.tokens().tolist()]
        assert sorted([*places, *part.newlines]) == list(range(context.lengths[item])) == list(range(len(part.places)))
        written = written_cells(part)
        if family != "llava_next" or len(part.grids) == 1:
            assert [cells(view) for view in views] == written
            continue
        assert cells(views[0]) == written[0]
        assert_tiles([cells(view) for view in views[1:]], written[1])


def assert_tiles(tiles: list[list[list[int]]], canvas: list[list[int]]) -> None:
    """The canvas cut into rectangles, in reading order of their upper left corners."""
    at = {place: (r, c) for r, row in enumerate(canvas) for c, place in enumerate(row)}
    corners = [at[tile[0][0]] for tile in tiles]
    assert corners == sorted(corners) and len(set(corners)) == len(corners)
    for (top, left), tile in zip(corners, tiles, strict=True):
        for r, row in enumerate(tile):
            assert [at[place] for place in row] == [(top + r, left + c) for c in range(len(row))]


@pytest.mark.parametrize(("family", "images", "video"), CASES)
def test_kinds_of_views(family: str, images: tuple[int, ...], video: bool) -> None:
    """The whole image comes first on LLaVA-NeXT and LLaVA-OneVision, last on InternVL, Idefics3 and SmolVLM."""
    prompt = prompt_of(family, images, video)
    context = context_of(family, prompt)
    seen = set()
    for item, part in enumerate(parts_of(prompt)):
        kinds = [view.kind for view in context.views[item]]
        if MOVING in part.kinds:
            assert kinds == ["frame"] * len(part.grids)
        elif len(kinds) == 1:
            assert kinds == ["image"]
        elif family in NEWLINES:
            assert kinds == ["thumbnail", *["tile"] * (len(kinds) - 1)]
        else:
            assert kinds == [*["tile"] * (len(kinds) - 1), "thumbnail"]
        seen.add(len(kinds) > 1)
    tiled = family in (*NEWLINES, "internvl", "idefics3", "smolvlm")
    assert (True in seen) == (tiled or video)


@pytest.mark.parametrize(
    ("family", "video"), [("llava_next", False), ("llava_onevision", False), ("llava_onevision", True)]
)
def test_a_newline_stays_with_every_row_that_keeps_a_token(family: str, video: bool) -> None:
    prompt = prompt_of(family, (1, 2, 1), video)
    alive, dead = 0, 0
    for seed in range(4):
        with vlmprune.applied(family_model(family), "random", keep=0.12, seed=seed) as handle:
            prefill(family_model(family), prompt)
            for row, parts in enumerate(row.parts for row in prompt.rows):
                for index, part in enumerate(parts):
                    kept = set(handle.last.kept(row, index))
                    start = 0
                    if part.newlines and len(part.grids) > 1 and MOVING not in part.kinds:
                        start = part.grids[0][0] * part.grids[0][1]  # the thumbnail has no newlines
                    for place in part.newlines:
                        stays = any(token in kept for token in range(start, place))
                        assert (place in kept) == stays
                        alive, dead = alive + stays, dead + (not stays)
                        start = place + 1
    assert alive and dead


@pytest.mark.parametrize("family", NEWLINES)
def test_newlines_are_neither_counted_nor_chosen(family: str) -> None:
    prompt = prompt_of(family, (1, 2, 1), False)
    with vlmprune.applied(family_model(family), "uniform", keep=0.5) as handle:
        prefill(family_model(family), prompt)
        for row, parts in enumerate(row.parts for row in prompt.rows):
            for index, part in enumerate(parts):
                kept = [token for token in handle.last.kept(row, index) if token not in part.newlines]
                assert len(kept) == (len(part.places) - len(part.newlines)) // 2
    context = context_of(family, prompt)
    assert context.pinned is None and torch.equal(context.candidates, context.valid)  # here they compete
