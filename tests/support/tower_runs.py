"""What the tests of reductions inside the towers of all families share."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from eager_reference import encoder_views
from family_prompts import FamilyPrompt, prefill
from family_runs import DEPTH, NEWLINES, PLAIN, batch, family_model
from llava_prompts import small_llava
from masked_reference import decoder_layers
from prompt_parts import VIDEO
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
        shares: per image, how much of each of them was not dropped.
    """

    kept: list[list[int]]
    groups: list[list[list[int]]]
    shares: list[list[float]]

    def scales(self, prompt: FamilyPrompt) -> Tensor:
        """``[B, L]`` what the features of the tokens that stay are divided by."""
        scale, images = (
            torch.ones(prompt.real.shape, dtype=torch.float64),
            iter(zip(self.kept, self.shares, strict=True)),
        )
        for row, places in enumerate(prompt.places()):
            for tokens in places:
                kept, shares = next(images)
                scale[row, [tokens[token] for token in kept]] = torch.tensor(shares, dtype=torch.float64)
        return scale

    def of_row(self, prompt: FamilyPrompt, row: int) -> list[list[list[int]]]:
        """The groups of the images of one row."""
        first = sum(prompt.images[:row])
        return self.groups[first : first + prompt.images[row]]


def left_behind(name: str, prompt: FamilyPrompt, reference: TowerReference) -> Left:
    """Tokens of one group are one; those that blend several groups stay alone, unless more than half of them was
    dropped; a newline stays with its row."""
    block = feature_block(name)
    views = [reference.runs[run].groups[block][number] for run, number in views_of(prompt)]
    parts = [part for row in prompt.rows for part in row.parts]
    kept, groups, shares = [], [], []
    for part, tokens in zip(parts, token_patches(name, prompt), strict=True):
        first: dict[Any, list[int]] = {}
        share = [1.0] * len(tokens)
        for token, patches in enumerate(tokens):
            weight: dict[Any, float] = defaultdict(float)
            for (view, patch), part_of in patches.items():
                weight[view, views[view][patch]] += part_of
            share[token] = 1 - sum(part_of for (_, group), part_of in weight.items() if group < 0) if patches else 0
            if share[token] >= 0.5 - 1e-9:
                first.setdefault(next(iter(weight)) if len(weight) == 1 else token, []).append(token)
        stay = {group[0]: group for group in first.values()}
        for start, newline in rows_of(part.newlines, part.grids):
            if any(start <= token < newline for token in stay):
                stay[newline], share[newline] = [newline], 1.0
        kept.append(sorted(stay))
        groups.append([stay[token] for token in sorted(stay)])
        shares.append([share[token] for token in sorted(stay)])
    return Left(kept, groups, shares)


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


Weights = dict[tuple[int, int], float]
"""Patches (view in prompt order, number) of which a token is made, and how much of it each is."""


def token_patches(name: str, prompt: FamilyPrompt) -> list[list[Weights]]:
    """Per image and token the patches that it is made of; none for newlines."""
    lengths = [len(part.places) for row in prompt.rows for part in row.parts]
    if name in NEWLINES:
        return _by_image(_packed(prompt), lengths)
    side = tower_model(name).config.vision_config
    size, patch = (x if isinstance(x, int) else x[0] for x in (side.image_size, side.patch_size))
    units = unit_patches(size // patch, MERGE.get(name, 1)).tolist()
    views = range(len(views_of(prompt)))
    return _by_image([{(view, p): 1 / len(unit) for p in unit} for view in views for unit in units], lengths)


def _by_image(tokens: list[Any], lengths: list[int]) -> list[list[Any]]:
    assert len(tokens) == sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _packed(prompt: FamilyPrompt) -> list[Weights]:
    """What the model's own packing makes of the projector's output, by giving it one patch after the other."""
    model, views = family_model(prompt.family), views_of(prompt)
    width = model.config.text_config.hidden_size
    shapes = [(len(run.views), len(run.groups[0][0])) for run in TowerReference(model, prompt, ()).runs]
    nothing = embedded(model, prompt, [torch.zeros(*shape, width, dtype=torch.float64) for shape in shapes])
    found: list[Weights] = [{} for _ in range(len(nothing))]
    order = {place: view for view, place in enumerate(views)}
    patches = [(run, view, p) for run, (n, length) in enumerate(shapes) for view in range(n) for p in range(length)]
    for start in range(0, len(patches), width):
        some = patches[start : start + width]
        given = [torch.zeros(*shape, width, dtype=torch.float64) for shape in shapes]
        for channel, (run, view, patch) in enumerate(some):
            given[run][view, patch, channel] = 1.0
        made = embedded(model, prompt, given) - nothing
        for token, channel in (made.abs() > 1e-9).nonzero().tolist():
            run, view, patch = some[channel]
            found[token][order[run, view], patch] = float(made[token, channel])
    return found


def embedded(model: nn.Module, prompt: FamilyPrompt, projected: list[Tensor]) -> Tensor:
    """``[tokens, D]`` embeddings of all visual tokens in prompt order, if the projector returns ``projected``."""
    outputs, got = iter(projected), []
    hooks = [
        model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: next(outputs)),
        decoder_layers(model)[0].register_forward_pre_hook(
            lambda m, a, k: got.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        ),
    ]
    prefill(model, prompt)
    for hook in hooks:
        hook.remove()
    places = [(row, place) for row, images in enumerate(prompt.places()) for image in images for place in image]
    rows, columns = zip(*places, strict=True)
    return got[0][list(rows), list(columns)]
