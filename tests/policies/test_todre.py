"""ToDRE's two stages: brute force, properties, layers and thresholds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import contexts
import numpy as np
import pytest
import torch

from vlmprune.core.errors import InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.signals import ClsRow, GroupMass, Projected
from vlmprune.core.sites import Site
from vlmprune.policies.todre import ToDRE, mass_shares

CLS = ClsRow(contexts.LLAVA.feature_block)


def order(policy: ToDRE, features: torch.Tensor, attention: torch.Tensor, views: Any = None) -> list[int]:
    views = contexts.image(1, len(features)) if views is None else views
    context = contexts.post_encoder([views], policy.keep, {Projected(): [features], CLS: [attention]})
    return policy.order(context)[0].tolist()


@pytest.mark.parametrize("variant", ["max_sum", "k_center"])
def test_greedy_picks_by_brute_force(variant: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        features = torch.randn(8, 5, generator=generator)
        attention = torch.rand(8, generator=generator)
        picked = order(ToDRE(keep=8, variant=variant), features, attention)
        unit = features.double().numpy()
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        similarity = unit @ unit.T
        assert picked[0] == attention.argmax()
        for step in range(1, 8):
            chosen = picked[:step]
            rest = [i for i in range(8) if i not in chosen]
            cost = similarity[:, chosen].sum(1) if variant == "max_sum" else similarity[:, chosen].max(1)
            assert picked[step] == min(rest, key=lambda i: cost[i])


def test_scaling_rows_changes_nothing() -> None:
    features, attention = torch.randn(40, 12), torch.rand(40)
    scaled = features * (0.1 + 10 * torch.rand(40, 1))
    policy = ToDRE(keep=15)
    assert order(policy, scaled, attention) == order(policy, features, attention)


def test_permuting_tokens_permutes_the_result() -> None:
    features, attention = torch.randn(40, 12), torch.rand(40)
    shuffle = torch.randperm(40)
    policy = ToDRE(keep=15)
    permuted = order(policy, features[shuffle], attention[shuffle])
    assert shuffle[permuted].tolist() == order(policy, features, attention)


def test_a_duplicate_of_the_pivot_is_not_second() -> None:
    features = torch.randn(10, 6)
    features[7] = features[2]
    attention = torch.zeros(10)
    attention[2] = 1.0
    for variant in ("max_sum", "k_center"):
        picked = order(ToDRE(keep=10, variant=variant), features, attention)
        assert picked[0] == 2 and picked[1] != 7 and sorted(picked) == list(range(10))


def test_ties_go_to_the_lowest_index() -> None:
    assert order(ToDRE(keep=4), torch.ones(6, 3), torch.ones(6)) == [0, 1, 2, 3]


@pytest.mark.parametrize("n", [1, 2, 9])
def test_counts(n: int) -> None:
    for share in (0.01, 0.3, 0.999):
        picked = order(ToDRE(keep=share), torch.randn(n, 4), torch.rand(n))
        assert len(set(picked)) == max(1, int(share * n))


def test_only_the_thumbnail_gives_the_pivot() -> None:
    views = contexts.any_resolution(3, 3, 2)
    features, attention = torch.randn(27, 6), torch.arange(27.0)
    assert order(ToDRE(keep=5), features, attention, views)[0] == 8
    video = contexts.frames(3, 3, 3)
    assert order(ToDRE(keep=5), features, attention, video)[0] == 26
    seeds = [
        ToDRE(keep=5, pivot="random").order(
            contexts.post_encoder([views], 5, {Projected(): [features]}, seeds=(seed,))
        )[0, 0]
        for seed in range(200)
    ]
    assert set(map(int, seeds)) == set(range(9))


def test_center_and_farthest_pivots() -> None:
    features = torch.randn(30, 8)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    distance = (unit - unit.mean(0)).norm(dim=1)
    for pivot, expected in (("center", distance.argmin()), ("farthest", distance.argmax())):
        assert order(ToDRE(keep=3, pivot=pivot), features, torch.zeros(30))[0] == expected


def test_pivot_by_model() -> None:
    llava, qwen = contexts.LLAVA, contexts.QWEN
    policy = ToDRE(keep=0.2, tau=0)
    assert policy.requests(llava)[0].signals == (Projected(), CLS)
    assert not policy.is_random(llava)
    assert policy.requests(qwen)[0].signals == (Projected(),)
    assert policy.is_random(qwen)
    assert not ToDRE(keep=0.2, pivot="center").is_random(qwen)
    assert not ToDRE(keep=1.0).is_random(qwen)
    with pytest.raises(InputError, match="lacks.*pivot='random'"):
        ToDRE(keep=0.2, pivot="cls").requests(qwen)


def sites(policy: ToDRE, info: ModelInfo = contexts.LLAVA) -> list[tuple[Site, int | None]]:
    return [(request.site, request.layer) for request in policy.requests(info)]


def test_which_stages_act() -> None:
    stage1, stage2 = (Site.POST_ENCODER, None), (Site.DECODER_LAYER, 28)
    assert sites(ToDRE(keep=0.1)) == [stage1, stage2]
    assert sites(ToDRE(keep=0.1, tau=0.0)) == [stage1]
    assert sites(ToDRE(keep=1.0, tau=0.1)) == [stage2]
    assert sites(ToDRE()) == sites(ToDRE(keep=1.0)) == []
    assert ToDRE(keep=1.0, tau=0.1).reduces(contexts.LLAVA)
    assert not ToDRE(keep=1.0, tau=0.0).reduces(contexts.LLAVA)
    assert ToDRE(keep=0.1).threshold == 0.10
    positions = [request.positions for request in ToDRE(keep=0.1).requests(contexts.LLAVA)]
    assert positions == ["compact", "keep"]


@pytest.mark.parametrize(
    ("check_layers", "depth", "checked"),
    [
        (7 / 8, 32, (27,)),  # layer 28 counted from 1
        (7 / 8, 28, (23,)),  # floor(24.5) = 24
        (7 / 8, 9, (6,)),
        (7 / 8, 6, (4,)),
        (7 / 8, 2, (0,)),
        (0.7, 10, (6,)),
        (0.01, 32, (0,)),
        ((0.5, 5 / 8, 6 / 8), 32, (15, 19, 23)),
        (5, 8, (5,)),
        ((1, 0.5, -2), 8, (1, 3, 6)),
    ],
)
def test_checked_layers(check_layers: Any, depth: int, checked: tuple[int, ...]) -> None:
    info = replace(contexts.LLAVA, text_depth=depth)
    policy = ToDRE(keep=1.0, tau=0.1, check_layers=check_layers)
    assert policy.checked_layers(info) == checked
    for request, layer in zip(policy.requests(info), checked, strict=True):
        assert (request.layer, request.signals) == (layer + 1, (GroupMass(layer),))


@pytest.mark.parametrize(
    ("check_layers", "depth", "message"),
    [
        (1.0, 8, "earlier check_layers"),
        (-1, 8, "earlier check_layers"),
        (7 / 8, 1, "earlier check_layers"),
        ((0.5, 0.51), 8, "do not increase"),
        ((4, 2), 8, "do not increase"),
        (8, 8, "out of range"),
        (1.5, 8, "share"),
    ],
)
def test_layers_that_do_not_fit(check_layers: Any, depth: int, message: str) -> None:
    info = replace(contexts.LLAVA, text_depth=depth)
    with pytest.raises(InputError, match=message):
        ToDRE(keep=0.5, check_layers=check_layers).requests(info)


def stage2(policy: ToDRE, mass: list[list[list[float]]], lengths: list[int]) -> list[list[int]]:
    context = contexts.decoder(lengths, 4, {GroupMass(3): torch.tensor(mass)})
    return contexts.kept_tokens(policy.select(context))


def test_decisions_are_per_sample() -> None:
    """Shares of text rows on visual columns: 0.05, 0.5, 0.05; of visual rows on text columns: 0, 0, 0.3."""
    low, high = [2.0, 7.5, 0.5], [1.0, 4.0, 5.0]
    mass = [[low, [3.0, 0.0, 2.0]], [high, [3.0, 0.0, 2.0]], [low, [2.0, 1.5, 1.5]]]
    policy = ToDRE(keep=1.0, tau=0.1)
    assert stage2(policy, mass, [5, 3, 2]) == [[], [0, 1, 2], [0, 1]]
    everything = [list(range(5)), list(range(3)), list(range(2))]
    assert stage2(replace(policy, tau=0.0), mass, [5, 3, 2]) == everything
    assert stage2(replace(policy, tau=1.01), mass, [5, 3, 2]) == [[], [], []]
    t2v, v2t = mass_shares(torch.tensor(mass))
    torch.testing.assert_close(t2v, torch.tensor([0.05, 0.5, 0.05]))
    torch.testing.assert_close(v2t, torch.tensor([0.0, 0.0, 0.3]))


def test_the_threshold_is_strict_and_rows_must_exist() -> None:
    policy = ToDRE(keep=1.0, tau=0.5)
    assert stage2(policy, [[[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]], [2]) == [[0, 1]]
    assert stage2(policy, [[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]], [2]) == [[0, 1]]


def test_flops_are_those_of_stage_1() -> None:
    assert ToDRE().selection_flops(contexts.LLAVA, 100, 10) == 23 * 100 * contexts.WIDTH
    assert ToDRE().selection_flops(contexts.LLAVA, 100, 0) is None


@pytest.mark.parametrize(
    "wrong",
    [{"tau": -0.1}, {"tau": float("nan")}, {"variant": "min"}, {"pivot": "first"}, {"check_layers": ()}],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ToDRE(keep=0.5, **wrong)
