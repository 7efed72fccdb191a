"""What every policy that acts inside the vision tower promises. Settings come from the policy matrix."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace
from typing import Any

import contexts
import pytest
import torch
from policy_matrix import CASES
from torch import Tensor

from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry
from vlmprune.core.selection import Selection
from vlmprune.core.signals import HeadAttention
from vlmprune.core.sites import Site, SiteRequest

# Free tokens of views of different sizes in one batch.
VIEWS = (36, 25, 7, 16)
SEEDS = (11, 22, 33, 44)
INFOS = [
    pytest.param(contexts.LLAVA, id="cls"),
    pytest.param(contexts.QWEN, id="none"),
    pytest.param(replace(contexts.LLAVA, prefix_tokens=2), id="distilled"),
    pytest.param(replace(contexts.LLAVA, prefix_tokens=5), id="registers"),
]


def tower_requests(policy: Policy, info: ModelInfo) -> list[SiteRequest]:
    return [request for request in policy.requests(info) if request.site == Site.VISION_BLOCK]


TOWER_CASES = [
    case for case in CASES if tower_requests(registry.create(case.values[0], **case.values[1]), contexts.LLAVA)
]


def inside(policy: Policy, info: ModelInfo, request: SiteRequest, items: tuple[int, ...] = (0, 1, 2, 3)) -> Context:
    """A batch of some of `VIEWS`, where nothing has been reduced; the values of an item do not depend on the others."""
    lengths = [VIEWS[item] + info.prefix_tokens for item in items]
    seeds = tuple(SEEDS[item] for item in items)
    signals = contexts.tower_signals(request.signals, lengths, seeds)
    drawn = seeds if policy.is_random(info) else None
    return contexts.vision_block(lengths, request.layer or 0, signals, info, policy.keep, seeds=drawn)


def groups(selection: Selection) -> list[list[list[int]]]:
    """Per item its outputs as lists of the tokens in them."""
    weights = selection.source_map().weights
    return [[row.nonzero()[:, 0].tolist() for row in item if row.any()] for item in weights]


def first_requests(policy: Policy, info: ModelInfo) -> list[SiteRequest]:
    return tower_requests(policy, info)[:2] + tower_requests(policy, info)[-1:]


@pytest.mark.parametrize("name", ["_tower_schedule", "_zero_tprune_plan"])
def test_examples_of_the_arithmetic(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"vlmprune.policies.{name}"))
    assert result.attempted and not result.failed


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("name", "parameters"), TOWER_CASES)
def test_requests_stay_below_the_projector(name: str, parameters: dict[str, Any], info: ModelInfo) -> None:
    requests = tower_requests(registry.create(name, **parameters), info)
    layers = [request.layer or 0 for request in requests]
    assert layers == sorted(set(layers)) and 0 <= layers[0] and layers[-1] <= (info.feature_block or 0)
    for request in requests:
        own = (request.layer or 0) - (request.place == "before")
        assert request.signals and all(signal.layer == own for signal in request.signals)  # type: ignore[attr-defined]


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("name", "parameters"), TOWER_CASES)
def test_outputs_are_whole_and_the_prefix_stays(name: str, parameters: dict[str, Any], info: ModelInfo) -> None:
    """Every output holds tokens, none of them twice, none of them padding, and the prefix is as it was."""
    policy = registry.create(name, **parameters)
    reduced = 0
    for request in first_requests(policy, info):
        context = inside(policy, info, request)
        selection = policy.select(context)
        assert selection.counts is not None and torch.equal(
            selection.out_valid().sum(1), torch.tensor(selection.counts)
        )
        features = torch.randn(*context.valid.shape, 3)
        for item, (outputs, n) in enumerate(zip(groups(selection), context.lengths, strict=True)):
            members = [token for output in outputs for token in output]
            assert len(outputs) == selection.counts[item] > info.prefix_tokens
            assert len(set(members)) == len(members) and set(members) <= set(range(n))
            assert outputs[: context.prefix] == [[token] for token in range(context.prefix)]
            if selection.is_pruning:
                assert members == sorted(members)
            else:
                assert set(members) == set(range(n))
            reduced += n - len(outputs)
        prefix = slice(0, context.prefix)
        assert torch.equal(selection.apply(features)[:, prefix], features[:, prefix])
    assert reduced > 0


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("name", "parameters"), TOWER_CASES)
def test_a_batch_gives_what_single_views_give(name: str, parameters: dict[str, Any], info: ModelInfo) -> None:
    policy = registry.create(name, **parameters)
    for request in first_requests(policy, info):
        for order in ((0, 1, 2, 3), (3, 1, 0, 2), (0, 0)):
            batch = groups(policy.select(inside(policy, info, request, order)))
            for place, item in enumerate(order):
                assert batch[place] == groups(policy.select(inside(policy, info, request, (item,))))[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "parameters"), TOWER_CASES)
def test_signals_of_any_precision(name: str, parameters: dict[str, Any], dtype: torch.dtype) -> None:
    """The result is that of the same values in float32."""
    policy = registry.create(name, **parameters)
    for request in first_requests(policy, contexts.LLAVA):
        context = inside(policy, contexts.LLAVA, request)
        narrow = {s: v.clamp(-100, 100).to(dtype) for s, v in context.signals.items() if isinstance(v, Tensor)}
        low = replace(context, signals={**context.signals, **narrow})
        wide = replace(context, signals={**context.signals, **{s: v.float() for s, v in narrow.items()}})
        assert groups(policy.select(low)) == groups(policy.select(wide))


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("name", "parameters"), TOWER_CASES)
def test_pinned_tokens_stay_alone(name: str, parameters: dict[str, Any], info: ModelInfo) -> None:
    policy = registry.create(name, **parameters)
    for request in first_requests(policy, info):
        context = inside(policy, info, request)
        pinned = (
            context.valid & (torch.arange(context.width) >= context.prefix) & (torch.arange(context.width) % 3 == 1)
        )
        selection = policy.select(replace(context, pinned=pinned))
        for outputs, row, count in zip(groups(selection), pinned, selection.out_counts(), strict=True):
            assert len(outputs) == count
            assert all([token] in outputs for token in row.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize(("name", "parameters"), [case for case in TOWER_CASES if "keep" in case.values[1]])
def test_keeping_all_keeps_all_in_order(name: str, parameters: dict[str, Any], info: ModelInfo) -> None:
    policy = registry.create(name, **parameters)
    assert not registry.create(name, **{**parameters, "keep": 1.0}).requests(info)
    for request in first_requests(policy, info):
        context = inside(policy, info, request)
        for keep in (1.0, max(VIEWS)):
            everything = policy.select(replace(context, budget=Budget.parse(keep)))
            assert everything.out_counts() == context.lengths
            features = torch.randn(*context.valid.shape, 2)
            assert torch.equal(everything.apply(features)[context.valid], features[context.valid])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("items", [(0, 0), (0, 1)], ids=["equal", "ragged"])
@pytest.mark.parametrize(("name", "parameters"), TOWER_CASES)
def test_a_known_budget_needs_no_synchronisation(name: str, parameters: dict[str, Any], items: tuple[int, ...]) -> None:
    policy = registry.create(name, **parameters)
    for request in first_requests(policy, contexts.LLAVA):
        context = inside(policy, contexts.LLAVA, request, items)
        on_gpu = replace(
            context,
            valid=context.valid.cuda(),
            signals={
                signal: replace(value, matrix=value.matrix.cuda())
                if isinstance(signal, HeadAttention)
                else value.cuda()
                for signal, value in context.signals.items()
            },
        )
        policy.select(on_gpu)  # loads kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            selection = policy.select(on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(selection.anchors().cpu(), policy.select(context).anchors())
