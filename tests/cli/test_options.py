"""Policies from the command line: budgets, and parameters that stand in their place."""

from __future__ import annotations

from typing import Any

import pytest

from vlmprune.cli.contract import require_reduction
from vlmprune.cli.options import DEFAULT_KEEP, build_policy
from vlmprune.core.errors import InputError


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tome", {"r": 4}), ("zero_tprune", {"preset": "deit_s"}), ("zero_tprune", {"keep_rates": [0.5], "layers": [2]})],
)
def test_parameters_in_place_of_a_budget(name: str, parameters: dict[str, Any]) -> None:
    policy = build_policy(name, None, parameters)
    assert policy.budget.is_all and require_reduction(policy) is policy
    with pytest.raises(InputError, match="say how much"):
        build_policy(name, "0.5", parameters)


def test_the_default_budget() -> None:
    assert build_policy("tome").keep == float(DEFAULT_KEEP)
    assert build_policy("tome", None, {"order": "original"}, default="7").keep == 7
    with pytest.raises(InputError, match="keeps every token"):
        require_reduction(build_policy("tome", "1.0"))


def test_parameters_of_a_composition() -> None:
    policy = build_policy("tome+hiprune", "0.5,0.44", {"tome.first_blocks": 1, "hiprune.alpha": 0.2})
    tome, hiprune = policy.leaves()
    assert (tome.first_blocks, tome.budget.share, hiprune.alpha, hiprune.budget.share) == (1, 0.5, 0.2, 0.44)
    for key, hint in (("first_blocks", "tome.first_blocks"), ("todre.tau", "tome.tau")):
        with pytest.raises(InputError, match=f"names no member of tome.hiprune; .* such as {hint}"):
            build_policy("tome+hiprune", "0.5,0.44", {key: 1})
    with pytest.raises(InputError, match="one keep per policy"):
        build_policy("tome+hiprune", "0.5", {"tome.first_blocks": 1})
