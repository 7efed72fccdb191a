"""The policy contract: budgets, positions, dispatch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from vlmprune.core.budget import Budget
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy, PolicyMeta
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site

INFO = ModelInfo("llava", "LlavaModel", text_depth=32, vision_depth=24, feature_block=22, tokens_per_image=576)
MROPE = dataclasses.replace(INFO, mrope=True)


@dataclass(frozen=True)
class Plain(Policy):
    meta = PolicyMeta("Plain")

    def select_post_encoder(self, context: Context) -> Selection:
        return Selection.drop_all(context.valid)


@dataclass(frozen=True)
class TakesFlops(Plain):
    takes_flops = True


@pytest.mark.parametrize("keep", [0, 1.5, True, "x", []])
def test_a_bad_budget_is_refused_at_once(keep: Any) -> None:
    with pytest.raises(BudgetError):
        Plain(keep=keep)


def test_positions() -> None:
    with pytest.raises(InputError, match="'shuffle' is unknown.*'auto', 'keep', 'compact' or 'virtual'"):
        Plain(positions="shuffle")  # type: ignore[arg-type]
    assert Plain().resolve_positions(INFO) == "compact"
    assert Plain().resolve_positions(INFO, "keep") == "keep"
    assert Plain().resolve_positions(MROPE) == "keep"
    assert Plain(positions="compact").resolve_positions(MROPE) == "compact"
    assert Plain(positions="keep").resolve_positions(INFO) == "keep"


def test_policies_are_frozen_values() -> None:
    assert Plain(keep=[0.5, 8]) == Plain(keep=(0.5, 8))
    assert hash(Plain(keep=[0.5, [8, 0.25]])) == hash(Plain(keep=(0.5, (8, 0.25))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plain().keep = 0.5  # type: ignore[misc]


def test_select_dispatches_to_the_site() -> None:
    valid = torch.ones(1, 3, dtype=torch.bool)
    here = Context(Site.POST_ENCODER, INFO, Budget.parse(0.5), (3,), valid)
    assert Plain().select(here).out_counts() == (0,)
    with pytest.raises(NotImplementedError, match="Plain requested kv_cache"):
        Plain().select(dataclasses.replace(here, site=Site.KV_CACHE))
    with pytest.raises(NotImplementedError, match=r"Plain must implement requests\(\)"):
        Plain().requests(INFO)


def test_defaults() -> None:
    policy = Plain()
    assert policy.leaves() == (policy,)
    assert not policy.reduces(INFO) and Plain(keep=0.5).reduces(INFO) and Plain(keep=576).reduces(INFO)
    assert not policy.is_random(INFO) and not policy.needs_processor()
    assert policy.calibration(INFO) is None and policy.selection_flops(INFO, 5, 3) is None


@pytest.mark.parametrize("keep", [577, [0.5, 1000], [0.5, [577, 3]]])
def test_more_tokens_than_the_model_has(keep: Any) -> None:
    with pytest.raises(BudgetError, match="LlavaModel has 576 visual tokens.*at most 576"):
        Plain(keep=keep).check_count(INFO)
    Plain(keep=keep).check_count(dataclasses.replace(INFO, tokens_per_image=None))


@pytest.mark.parametrize("keep", [576, 0.5, 1.0, [576, 0.5]])
def test_budgets_that_fit(keep: Any) -> None:
    Plain(keep=keep).check_count(INFO)


@pytest.mark.parametrize("keep", ["flops:0.4", [0.5, "flops:0.4"], [0.5, [3, "flops:1.0"]]])
def test_flop_shares_need_a_policy_that_takes_them(keep: Any) -> None:
    with pytest.raises(BudgetError, match="takes a share or a number of tokens, not keep="):
        Plain(keep=keep).check_count(INFO)
    TakesFlops(keep=keep).check_count(INFO)
