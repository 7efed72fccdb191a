"""Every registered policy runs on every family, keeps what its budget says, and treats each row by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import FAMILIES, VIDEO, batch, family_model
from policy_matrix import CASES
from prompt_parts import Part
from torch import nn

import vlmprune
from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry
from vlmprune.core.report import Report
from vlmprune.core.sites import Site

ACTING = [case for case in CASES if case.values[0] != "downsample"]  # acts on images, before the model
EXACT = ("divprune", "random", "uniform")
"""Policies that keep exactly what the budget says of each image's tokens."""


class Normalisation:
    """What a processor says about pixels."""

    def __init__(self) -> None:
        self.image_processor = self
        self.image_mean, self.image_std, self.rescale_factor = [0.5] * 3, [0.5] * 3, 1 / 255


def run(model: nn.Module, policy: Policy, prompt: FamilyPrompt) -> Report:
    with vlmprune.applied(model, policy, processor=Normalisation()) as handle:
        out = prefill(model, prompt)
        assert torch.isfinite(out.logits[:, -1]).all()
        assert handle.last is not None
        return handle.last


def kept(report: Report, row: int, prompt: FamilyPrompt) -> list[Any]:
    """What is left of each image of a row: in every layer which tokens stand for which."""
    depth = range(report.text_depth)
    return [[report.groups(row, image, layer) for layer in depth] for image in range(prompt.images[row])]


@pytest.mark.parametrize(("name", "parameters"), ACTING)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_keep_what_they_keep_alone(family: str, name: str, parameters: dict[str, Any]) -> None:
    model, prompt = family_model(family), batch(family, (2, 1, 0))
    policy = registry.create(name, **parameters)
    report = run(model, policy, prompt)
    for row in (0, 1):
        alone = prompt.row(row)
        assert kept(report, row, prompt) == kept(run(model, policy, alone), 0, alone)
    check_budget(policy, report, prompt)


@pytest.mark.parametrize(("name", "parameters"), ACTING)
@pytest.mark.parametrize("family", VIDEO)
def test_videos(family: str, name: str, parameters: dict[str, Any]) -> None:
    model, prompt = family_model(family), batch(family, (1, 0, 1), video=True)
    policy = registry.create(name, **parameters)
    report = run(model, policy, prompt)
    alone = prompt.row(2)
    assert kept(report, 2, prompt) == kept(run(model, policy, alone), 0, alone)
    check_budget(policy, report, prompt)


def check_budget(policy: Policy, report: Report, prompt: FamilyPrompt) -> None:
    """As many tokens as the budget says after the encoder, never more anywhere, and fewer than there were."""
    pooled = prompt.family == "llava_onevision" and report.tower_sites  # a video's tokens may blend merged patches
    fewer = [(r.tokens_out, r.tokens_in) for r in report.tower_sites] if pooled else []
    assert any(sum(out) < sum(n) for out, n in [(report.kept_tokens, report.visual_tokens), *fewer])
    assert all(0 <= out <= n for out, n in zip(report.kept_tokens, report.visual_tokens, strict=True))
    if policy.basis != "site":  # of all stages together
        return
    if report.sites[0].site != Site.POST_ENCODER:
        for row, n in enumerate(report.visual_tokens):
            assert report.kept_tokens[row] <= sum(budget_of(policy, part, n) for part in prompt.rows[row].parts)
        return
    for row, parts in enumerate(row.parts for row in prompt.rows):
        for image, part in enumerate(parts):
            left = report.groups(row, image, layer=0)
            apart = policy.newlines == "rows" or getattr(policy, "newline", None) == "protect"
            newlines = set(part.newlines) if apart else set()
            count = sum(1 for group in left if not set(group) <= newlines)
            most = budget_of(policy, part, len(part.places) - len(newlines))
            assert 0 < count <= most
            assert count == most or policy.name not in EXACT


def budget_of(policy: Policy, part: Part, n: int) -> int:
    """The most tokens that may stay of an image with ``n``; shares are rounded per image or, by some, per view."""
    budget = policy.budget
    rounding = getattr(policy, "rounding", "floor")
    if policy.name in EXACT or budget.tokens is not None:
        return budget.count(n, rounding)
    return math.ceil((budget.share or 1.0) * n) + len(part.grids)
