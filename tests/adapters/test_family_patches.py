"""From patches to tokens: ``context.to_tokens`` does to values what each model does to features."""

from __future__ import annotations

import pytest
import torch
from eager_reference import PACKED, EagerReference, blocks_of, encoder_views, padded, projector_of, tower_of
from family_prompts import FamilyPrompt, prefill
from family_runs import FAMILIES, NEWLINES, VIDEO, batch, family_model
from recording import Recording
from token_influence import influences
from torch import Tensor, nn

import vlmprune
from vlmprune.core.context import Context

LARGE = ((20, 44), (24, 24), (60, 40))
"""Image sizes of which LLaVA-OneVision interpolates the third."""
CASES = [
    pytest.param(family, video, id=family + "-video" * video)
    for family in FAMILIES
    for video in (False, True)
    if family in VIDEO or not video
]
LINEAR = [case for case in CASES if case.values[0].startswith("llava")]


def sized(family: str, video: bool) -> FamilyPrompt:
    """Images of different sizes; with ``video``, some are videos."""
    sizes = LARGE if family in NEWLINES else None
    return batch(family, (2, 0, 1) if not video else (2, 0, 2), video=video, sizes=sizes)


def context_of(family: str, prompt: FamilyPrompt) -> Context:
    policy = Recording()
    with vlmprune.applied(family_model(family), policy):
        prefill(family_model(family), prompt)
    return policy.tape.last


def is_newline(prompt: FamilyPrompt, width: int) -> Tensor:
    """``[I, N]`` bool, by what the processor wrote."""
    parts = [part for row in prompt.rows for part in row.parts]
    mask = torch.zeros(len(parts), width, dtype=torch.bool)
    for item, part in enumerate(parts):
        mask[item, list(part.newlines)] = True
    return mask


@pytest.mark.parametrize(("family", "video"), LINEAR)
def test_features_of_patches_become_what_the_model_merges(family: str, video: bool) -> None:
    """Unpadding, interpolation, pooling and the order of tiles, on the projector's own output."""
    model, prompt = family_model(family), sized(family, video)
    outputs: list[Tensor] = []
    hook = projector_of(model).register_forward_hook(lambda module, args, output: outputs.append(output))
    prefill(model, prompt)
    hook.remove()
    context = context_of(family, prompt)
    reference = EagerReference(family_model(family, torch.float64, "eager"), prompt)
    made = {id(run): output for run, output in zip(reference.runs, outputs, strict=True)}
    patches = torch.stack([made[id(run)][number] for run, number in reference.views])
    newline = is_newline(prompt, context.width)
    real = context.valid & ~newline
    got = context.to_tokens(patches, newline=7.0)
    assert torch.allclose(got[real], context.features[real], rtol=1e-9, atol=1e-12)
    assert (got[newline] == 7.0).all()
    assert newline.any() == (family in NEWLINES)
    if newline.any():
        assert (context.features[newline] == model.model.image_newline).all()
    assert not got[~context.valid].any()
    marks = torch.zeros_like(newline)
    for item, found in enumerate(context.newlines):
        marks[item, [mark.place for mark in found]] = True
    assert torch.equal(marks, newline)
    if family == "llava_onevision":
        cells = sum(view.length for view in context.views[-1 if not video else -2])
        assert cells < 9 * encoder_views(prompt.rows[2].parts[0])  # shrunk


@pytest.mark.parametrize(("family", "video"), CASES)
def test_each_token_is_made_of_the_patches_that_the_model_makes_it_of(family: str, video: bool) -> None:
    """The gradient of a token's embedding says which patches of the last block the model made it of."""
    model, prompt = family_model(family), sized(family, video)
    context = context_of(family, prompt)
    reference = EagerReference(family_model(family, torch.float64, "eager"), prompt)
    influence = padded(influences(model, prompt, reference), 1)  # [V, tokens, P]
    influence = influence.transpose(0, 1).flatten(1)  # [tokens, V * P]
    views, patches = len(reference.views), influence.shape[1] // len(reference.views)
    one_hot = torch.eye(views * patches, dtype=torch.float64).view(views, patches, -1)
    got = context.to_tokens(one_hot)[context.valid]
    assert got.shape == influence.shape
    assert torch.equal(got != 0, influence)
    newline = is_newline(prompt, context.width)[context.valid]
    assert torch.equal(influence.any(1), ~newline)
    if family != "llava_onevision":  # all but interpolation and bilinear pooling are means of patches
        mean = influence / influence.sum(1, keepdim=True).clamp_min(1)
        assert torch.allclose(got, mean.double(), atol=1e-12)
    assert torch.allclose(got.sum(1), (~newline).double(), atol=1e-6)


def test_the_towers_are_the_models_own() -> None:
    for family in FAMILIES:
        model = family_model(family)
        assert isinstance(tower_of(model), nn.Module) and len(blocks_of(model)) == 4
    assert set(PACKED) <= set(FAMILIES)
