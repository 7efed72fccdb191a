"""What the tests of reductions inside the towers of all families share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from eager_reference import EagerReference, encoder_views
from family_prompts import FamilyPrompt
from family_runs import DEPTH, NEWLINES, PLAIN, batch, family_model
from llava_prompts import small_llava
from prompt_parts import VIDEO
from token_influence import influences
from torch import Tensor, nn
from tower_plans import PlannedStep, Steps
from tower_reference import TowerReference, unit_patches

from vlmprune.embedded.random_models import llava
from vlmprune.embedded.random_models import tokens as t

SIGLIP = "llava_siglip"
TOWERS = (*PLAIN, SIGLIP)
"""Families whose tower works on a batch of views of one size; LLaVA-1.5 also with a tower without CLS."""
MERGE = {"internvl": 2, "idefics3": 2, "smolvlm": 2, "gemma3": 2}
"""Side of the squares of patches that make a token."""
FEATURE_BLOCK = {"llava": 2, "llava_next": 2}
"""The block that feeds the projector, where it is not the last one (3)."""
LARGE = ((20, 44), (24, 24), (60, 40))
"""Image sizes of which LLaVA-OneVision interpolates the third."""

PLANS: dict[str, Steps] = {
    "merge": (PlannedStep(1),),
    "prune": (PlannedStep(1, "before", "prune"),),
    "ragged": (
        PlannedStep(0, ragged=True),
        PlannedStep(1, "before", "prune", ragged=True),
        PlannedStep(2, kind="shuffle"),
    ),
    "no-bias": (PlannedStep(0, size_bias=False), PlannedStep(2, "before", "merge", ragged=True, size_bias=False)),
}


@cache
def tower_model(name: str, dtype: torch.dtype = torch.float64, implementation: str = "sdpa") -> nn.Module:
    """A model that tests share: every one of them leaves it as it was."""
    if name != SIGLIP:
        return family_model(name, dtype, implementation)
    sizes = {"image_size": llava.TILE, "patch_size": llava.PATCH, "vocab_size": t.VOCAB_SIZE}
    return small_llava("siglip", **sizes, dtype=dtype, attn_implementation=implementation)


def tower_batch(name: str, images: tuple[int, ...] = (2, 1, 0), **arguments: Any) -> FamilyPrompt:
    """Prompts with images of different sizes; LLaVA-OneVision interpolates one where it stands alone."""
    sizes = {"sizes": LARGE} if name in NEWLINES else {}
    return batch("llava" if name == SIGLIP else name, images, **{**sizes, **arguments})


def feature_block(name: str) -> int:
    """The block whose output feeds the projector."""
    return FEATURE_BLOCK.get(name, DEPTH - 1)


def reference_of(name: str, prompt: FamilyPrompt, steps: Steps) -> TowerReference:
    """The model's tower over the prompt's images with planned reductions."""
    return TowerReference(tower_model(name), prompt, steps, MERGE.get(name, 1))


@dataclass(frozen=True)
class Left:
    """What a reduced tower leaves for the LLM.

    Attributes:
        kept: per image in prompt order the tokens that stay.
        groups: per image, for each of them, the tokens that it stands for.
    """

    kept: list[list[int]]
    groups: list[list[list[int]]]

    def of_row(self, prompt: FamilyPrompt, row: int) -> list[list[list[int]]]:
        """The groups of the images of one row."""
        first = sum(prompt.images[:row])
        return self.groups[first : first + prompt.images[row]]


def left_behind(name: str, prompt: FamilyPrompt, reference: TowerReference) -> Left:
    """Tokens of one group are one; those that blend several groups stay alone, those with a dropped patch go; a
    newline stays with its row."""
    block = feature_block(name)
    views = [reference.runs[run].groups[block][number] for run, number in views_of(prompt)]
    parts = [part for row in prompt.rows for part in row.parts]
    members = token_patches(name, prompt)
    kept, groups = [], []
    for part, tokens in zip(parts, members, strict=True):
        first: dict[Any, list[int]] = {}
        for token, patches in enumerate(tokens):
            found = {(view, views[view][patch]) for view, patch in patches}
            if patches and all(group >= 0 for _, group in found):
                first.setdefault(next(iter(found)) if len(found) == 1 else token, []).append(token)
        stay = {group[0]: group for group in first.values()}
        for start, newline in rows_of(part.newlines, part.grids):
            if any(start <= token < newline for token in stay):
                stay[newline] = [newline]
        kept.append(sorted(stay))
        groups.append([stay[token] for token in sorted(stay)])
    return Left(kept, groups)


def rows_of(newlines: tuple[int, ...], grids: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """First token and newline of every row of an image that ends with one."""
    if not newlines:
        return []
    start = newlines[0] - grids[-1][1] if len(newlines) == grids[-1][0] else 0
    return list(zip([start, *(newline + 1 for newline in newlines[:-1])], newlines, strict=True))


def views_of(prompt: FamilyPrompt) -> list[tuple[int, int]]:
    """Run of the tower, and place in it, of every encoder view in prompt order; images are encoded before videos."""
    parts = [part for row in prompt.rows for part in row.parts]
    stills = any(VIDEO not in part.kinds for part in parts)
    counts, found = [0, 0], []
    for part in parts:
        run = int(VIDEO in part.kinds and stills)
        for _ in range(encoder_views(part)):
            found.append((run, counts[run]))
            counts[run] += 1
    return found


def token_patches(name: str, prompt: FamilyPrompt) -> list[list[list[tuple[int, int]]]]:
    """Per image and token the patches (view in prompt order, number) that it is made of; none for newlines."""
    lengths = [len(part.places) for row in prompt.rows for part in row.parts]
    if name in NEWLINES:
        return _by_image(_influenced(prompt), lengths)
    side = tower_model(name).config.vision_config
    size, patch = (x if isinstance(x, int) else x[0] for x in (side.image_size, side.patch_size))
    units = unit_patches(size // patch, MERGE.get(name, 1)).tolist()
    every = [[(view, patch) for patch in unit] for view in range(len(views_of(prompt))) for unit in units]
    return _by_image(every, lengths)


def _by_image(tokens: list[Any], lengths: list[int]) -> list[list[Any]]:
    assert len(tokens) == sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _influenced(prompt: FamilyPrompt) -> list[list[tuple[int, int]]]:
    model = family_model(prompt.family)
    reference = EagerReference(family_model(prompt.family, torch.float64, "eager"), prompt)
    per_view: list[Tensor] = influences(model, prompt, reference)
    found: list[list[tuple[int, int]]] = [[] for _ in range(len(per_view[0]))]
    for view, influence in enumerate(per_view):
        for token, patch in influence.nonzero().tolist():
            found[token].append((view, patch))
    return found
