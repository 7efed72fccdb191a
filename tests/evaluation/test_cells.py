from __future__ import annotations

from typing import Any

import pytest

from vlmprune.core import config
from vlmprune.core.info import ModelInfo
from vlmprune.evaluation.cells import (
    dense_cell,
    first_cells,
    policy_cell,
    random_budget,
    random_cell,
    text_only_cell,
)

INFO = ModelInfo(family="llava", model_class="Toy", text_depth=6, vision_depth=6, feature_block=4)


def names(policies: list[Any], text_only: bool = False, seeds: int = 1) -> list[tuple[str, Any, int | None]]:
    cells = first_cells(policies, INFO, text_only, range(seeds))
    return [(cell.name, cell.keep, cell.seed) for cell in cells]


def test_random_runs_once_per_budget_and_seed() -> None:
    policies = [config.resolve(name, keep=keep) for name in ("uniform", "grid") for keep in (0.25, 12)]
    assert names(policies, text_only=True, seeds=2) == [
        ("dense", 1.0, None),
        ("text_only", None, None),
        ("uniform", 0.25, None),
        ("uniform", 12, None),
        ("grid", 0.25, None),
        ("grid", 12, None),
        ("random", 0.25, 0),
        ("random", 0.25, 1),
        ("random", 12, 0),
        ("random", 12, 1),
    ]


def test_a_named_random_policy_is_not_run_twice() -> None:
    policies = [config.resolve("random", keep=0.5), config.resolve("random", keep=0.5, seed=4)]
    assert names(policies) == [("dense", 1.0, None), ("random", 0.5, 0), ("random", 0.5, 4)]


def test_compositions() -> None:
    cell = policy_cell(config.resolve(["uniform", "grid"], keep=[0.5, 10]), INFO)
    assert (cell.name, cell.keep) == ("uniform+grid", [0.5, 10])
    assert random_budget(cell, None) is None and random_budget(cell, 17.6) == 18
    assert random_budget(cell, 0.0) == 1


def test_budgets_for_random() -> None:
    assert random_budget(policy_cell(config.resolve("uniform", keep=0.3), INFO), 5.0) == 0.3
    assert random_budget(policy_cell(config.resolve("uniform", keep=7), INFO), 5.0) == 7
    # Cut inside the decoder: 7 are left at the end, 60.2 on average. Recycled tokens alone are no such case.
    inside = policy_cell(config.resolve("fastv", keep=7), INFO)
    assert random_budget(inside, 60.2, 7.0) == 60 and random_budget(inside, 7.2, 7.0) == 7
    # Windows leave one token each, 16 where 9.8 were asked for; 9 are near enough, and blurring drops none.
    tower = policy_cell(config.resolve("tome", keep=0.05), INFO)
    assert random_budget(tower, 16.0, 16.0, 196.0) == 16 and random_budget(tower, 9.0, 9.0, 196.0) == 0.05
    assert random_budget(policy_cell(config.resolve("downsample", keep=0.05), INFO), 196.0, 196.0, 196.0) == 0.05
    # Everything enters, but a threshold may still drop tokens in the decoder.
    assert random_budget(policy_cell(config.resolve("todre", keep=1.0, tau=0.1), INFO), 120.4) == 120
    assert random_budget(random_cell(1.0, 0, INFO), 9.0) == 1.0
    assert random_budget(dense_cell(), 196.0) is None and random_budget(text_only_cell(), None) is None


@pytest.mark.parametrize("seed", [0, 3])
def test_seeds_are_no_parameters(seed: int) -> None:
    cell = random_cell(0.3, seed, INFO)
    assert cell.seed == seed and cell.params == {}
    assert policy_cell(config.resolve("uniform", keep=0.3), INFO).seed is None
