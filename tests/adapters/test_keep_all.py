"""A policy that keeps everything changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llava_prompts import N, StubProcessor, make_prompt, small_llava
from model_state import generated, logits
from policy_matrix import CASES

import vlmprune
from vlmprune.core.registry import registry


def keep_everything(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """A case's parameters with a budget that keeps everything, without what would drop tokens all the same."""
    neutral = {"keep": 1.0}
    if name == "todre":
        neutral["tau"] = None
    if name == "dymu":
        neutral["thresholds"] = None
    if name == "vflowopt":
        neutral |= {"r1": None, "r2": None}
    neutral |= dict.fromkeys(set(registry.get(name).instead_of_keep) & set(parameters))
    if name == "tome":
        neutral["inflect"] = 0.0  # goes with r only
    if "factor" in parameters:
        neutral |= {"factor": 1.0, "jpeg": False}
    return parameters | neutral


@pytest.mark.parametrize("form", [((1, 1, 1), False), ((2, 0, 1), True)], ids=["batch", "mixed"])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_keeping_everything_changes_no_bit(name: str, parameters: dict[str, Any], form: Any) -> None:
    model, prompt = small_llava(), make_prompt(*form)
    dense, dense_ids = logits(model, prompt), generated(model, prompt)
    with vlmprune.applied(model, name, processor=StubProcessor(), **keep_everything(name, parameters)) as handle:
        assert torch.equal(logits(model, prompt), dense)
        assert torch.equal(generated(model, prompt), dense_ids)
        assert handle.last.kept_tokens == handle.last.visual_tokens == tuple(N * n for n in prompt.images)


@pytest.mark.filterwarnings("error:.*nothing was reduced")
@pytest.mark.parametrize("name", [n for n in vlmprune.available() if n != "downsample"])
def test_a_count_of_all_tokens_changes_no_bit(name: str) -> None:
    model, prompt = small_llava(), make_prompt((2, 1), True)
    dense = logits(model, prompt)
    settings = {"tau": 0.0} if name == "todre" else {}
    with vlmprune.applied(model, name, keep=N, **settings):
        assert torch.equal(logits(model, prompt)[prompt.real], dense[prompt.real])


def test_the_matrix_names_every_policy() -> None:
    assert {case.values[0] for case in CASES} == set(vlmprune.available())
