"""Composition and budgets shared by the images of a sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import contexts
import pytest
import torch

from vlmprune.core import config
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.registry import registry
from vlmprune.core.signals import Projected
from vlmprune.core.sites import Site
from vlmprune.core.views import split_count, split_equal
from vlmprune.policies.compose import Compose
from vlmprune.policies.downsample import Downsample
from vlmprune.policies.grid import Grid
from vlmprune.policies.hiprune import HiPrune
from vlmprune.policies.per_image_budget import PerImageBudget
from vlmprune.policies.random import RandomTokens
from vlmprune.policies.todre import ToDRE
from vlmprune.policies.uniform import Uniform

IMAGES = (contexts.image(4, 4), contexts.image(2, 4), contexts.image(4, 6))


def test_compose_asks_for_what_its_members_ask_for() -> None:
    members = (HiPrune(keep=0.5), ToDRE(keep=1.0, tau=0.1))
    policy = Compose(members)
    assert policy.leaves() == members
    assert policy.requests(contexts.LLAVA) == tuple(r for m in members for r in m.requests(contexts.LLAVA))
    assert policy.reduces(contexts.LLAVA) and not policy.needs_processor()
    assert not policy.is_random(contexts.LLAVA)
    assert Compose((Uniform(), RandomTokens())).is_random(contexts.LLAVA)
    assert not Compose((Uniform(), Grid())).reduces(contexts.LLAVA)
    assert Compose((Uniform(), Downsample())).needs_processor()
    nested = Compose((Compose(members), Uniform(keep=3)))
    assert nested.leaves() == (*members, Uniform(keep=3))
    with pytest.raises(NotImplementedError, match="leaves"):
        policy.select(contexts.post_encoder([IMAGES[0]], 0.5))
    with pytest.raises(BudgetError, match="576"):
        Compose((Uniform(), Grid(keep=600))).check_count(replace(contexts.LLAVA, tokens_per_image=576))


def test_compose_from_a_list() -> None:
    policy = config.resolve(["hiprune", Grid()], keep=[0.5, None])
    assert policy == Compose((HiPrune(keep=0.5), Grid()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies": ()}, "at least one"),
        ({"policies": (Uniform(),), "keep": 0.5}, "every member"),
        ({"policies": (Uniform(),), "positions": "keep"}, "members"),
    ],
)
def test_compose_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Compose(**settings)


@pytest.mark.parametrize(
    "policy",
    [
        Compose((HiPrune(keep=0.5, alpha=0.2), ToDRE(keep=1.0, tau=0.1, check_layers=(0.5, 0.75)))),
        Compose((Uniform(keep=5),)),
        Compose((PerImageBudget(HiPrune(buffer="grid"), keep=20), Grid(keep=4))),
        PerImageBudget(ToDRE(pivot="center"), keep=[0.5, 8], split="equal"),
    ],
)
def test_wrappers_survive_files(policy: Any, tmp_path: Path) -> None:
    for name in ("policy.json", "policy.yaml"):
        config.dump(policy, tmp_path / name)
        assert config.load(tmp_path / name) == policy


def sample_of(policy: PerImageBudget, sample: tuple[int, ...], images: Any = IMAGES, **fields: Any) -> Any:
    signals = {}
    if any(r.signals for r in policy.requests(contexts.LLAVA)):
        signals = contexts.random_signals(policy, images)
    return contexts.post_encoder(images, policy.keep, signals, sample=sample, **fields)


@pytest.mark.parametrize(
    ("keep", "split", "expected"),
    [
        (12, "proportional", (4, 2, 6)),
        (0.25, "proportional", (4, 2, 6)),
        (13, "proportional", (4, 2, 7)),  # 4.33, 2.17, 6.5
        (30, "equal", (11, 8, 11)),  # the second image has only 8
        (31, "equal", (12, 8, 11)),
        (2, "equal", (1, 1, 0)),
        (1.0, "equal", (16, 8, 24)),
        ([2, 0.5, 1.0], "proportional", (2, 4, 24)),
    ],
)
def test_one_sample(keep: Any, split: Any, expected: tuple[int, ...]) -> None:
    policy = PerImageBudget(Uniform(), keep=keep, split=split)
    assert policy.select(sample_of(policy, (0, 0, 0))).out_counts() == expected


def test_several_samples_in_a_batch() -> None:
    """Every sample has the whole budget, in whatever order its images stand."""
    policy = PerImageBudget(Uniform(), keep=12)
    assert policy.select(sample_of(policy, (0, 0, 1))).out_counts() == (8, 4, 12)
    assert policy.select(sample_of(policy, (0, 1, 0))).out_counts() == (5, 8, 7)  # 4.8 and 7.2
    by_image = PerImageBudget(Uniform(), keep=[3, 5])
    assert by_image.select(sample_of(by_image, (0, 0, 1))).out_counts() == (3, 5, 3)
    with pytest.raises(BudgetError, match="entry 3"):
        by_image.select(sample_of(by_image, (0, 0, 0)))


@pytest.mark.parametrize("inner", [HiPrune(alpha=0.5), ToDRE(), RandomTokens(), Grid()])
def test_an_image_is_pruned_as_if_it_were_alone(inner: Any) -> None:
    policy = PerImageBudget(inner, keep=12)
    seeds = (5, 6, 7) if policy.is_random(contexts.LLAVA) else None
    context = sample_of(policy, (0, 0, 0), seeds=seeds)
    kept = contexts.kept_tokens(policy.select(context))
    for item, count in enumerate((4, 2, 6)):
        alone = contexts.post_encoder(
            [IMAGES[item]],
            count,
            {s: [rows[item, : context.lengths[item]]] for s, rows in context.signals.items()},
            seeds=seeds and seeds[item : item + 1],
        )
        assert kept[item] == contexts.kept_tokens(inner.select(alone))[0]


def test_wrapped_policy_keeps_its_settings() -> None:
    policy = PerImageBudget("hiprune", keep=0.5, positions="keep")
    assert policy.inner == HiPrune(keep=0.5, positions="keep")
    assert policy.requests(contexts.LLAVA) == HiPrune(keep=0.5, positions="keep").requests(contexts.LLAVA)
    assert policy.leaves() == (policy,)
    assert PerImageBudget(RandomTokens(seed=4)).seed == 4
    assert PerImageBudget(Uniform()).seed is None
    assert not PerImageBudget(ToDRE()).reduces(contexts.LLAVA)
    assert [r.site for r in PerImageBudget(ToDRE(), keep=0.5).requests(contexts.LLAVA)] == [
        Site.POST_ENCODER,
        Site.DECODER_LAYER,
    ]
    info = replace(contexts.LLAVA, tokens_per_image=576)
    PerImageBudget(Uniform(), keep=1000).check_count(info)  # per sample, which may have two images
    with pytest.raises(BudgetError, match="576"):
        PerImageBudget(Uniform(), keep=[600, 3]).check_count(info)


def test_stage_2_of_a_wrapped_policy() -> None:
    policy = PerImageBudget(ToDRE(tau=0.1, check_layers=3), keep=0.5)
    [_, request] = policy.requests(contexts.LLAVA)
    mass = torch.tensor([[[9.0, 0.9, 0.1], [1.0, 0.0, 1.0]]])
    context = contexts.decoder([6], request.layer, {request.signals[0]: mass})
    assert policy.select(context).out_counts() == (0,)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"policy": Compose((Uniform(), Grid()))}, InputError, "not a composition"),
        ({"policy": "unifrom"}, InputError, "Did you mean 'uniform'"),
        ({"policy": Uniform(), "split": "by_size"}, InputError, "split='by_size'"),
        ({"policy": Uniform(), "keep": "flops:0.5"}, BudgetError, "flops"),
    ],
)
def test_per_image_refusals(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PerImageBudget(**settings)


def test_per_image_needs_a_policy_after_the_encoder() -> None:
    with pytest.raises(InputError, match="after the encoder"):
        PerImageBudget(Downsample(), keep=0.25).requests(contexts.LLAVA)


def test_wrappers_are_listed_only_on_request() -> None:
    assert {"compose", "per_image_budget"} <= set(registry.available(wrappers=True))
    assert not {"compose", "per_image_budget"} & set(registry.available())


def test_splits_add_up_and_fit() -> None:
    for count in range(0, 40):
        for lengths in ([16, 8, 24], [1, 1, 1], [5], [0, 3, 9]):
            total = min(count, sum(lengths))
            for split in (split_count, split_equal):
                shares = split(total, lengths)
                assert sum(shares) == total
                assert all(share <= length for share, length in zip(shares, lengths, strict=True))


def test_a_second_policy_sees_items_without_grid() -> None:
    """Behind another selection the grid is gone: a policy sees one row of tokens."""
    features = torch.randn(10, 4)
    context = contexts.post_encoder([contexts.image(2, 5)], 4, {Projected(): [features]})
    later = replace(context, views=((),))
    assert contexts.kept_tokens(Uniform(keep=4).select(later)) == [[1, 3, 6, 8]]
    assert later.counts() == (4,)
