"""On every family, keeping everything changes no bit, and ``remove`` gives the model back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import FAMILIES, VIDEO, batch, family_model, fixed_eviction, fixed_policy
from model_state import decoder_signals, generated, hooked, model_state
from recording import Recording
from torch import Tensor, nn

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.policy import Policy
from vlmprune.core.sites import Site
from vlmprune.embedded.random_models import random_vlm

KEEP_ALL: tuple[tuple[str, dict[str, Any]], ...] = (("uniform", {"keep": 1.0}), ("todre", {"keep": 1.0, "tau": None}))


def logits(model: nn.Module, prompt: FamilyPrompt) -> Tensor:
    return prefill(model, prompt).logits


def observers() -> tuple[Policy, ...]:
    """Policies that ask for every kind of signal and drop nothing."""
    wanted = (
        s.ColumnMass("vision", 0),
        s.QK("vision", 1),
        s.Attention(2),
        s.ClsRow(1, optional=True),
        s.Hidden("vision", 1, "in"),
        s.Hidden("vision", 1, "out"),
        s.PreProjector(),
    )
    return Recording(wanted=wanted), decoder_signals()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(family: str) -> None:
    model, prompt = family_model(family, torch.float32), batch(family, dtype=torch.float32, video=family in VIDEO)
    dense, dense_ids = logits(model, prompt), generated(model, prompt)
    visual = tuple(sum(map(len, images)) for images in prompt.places())
    for name, settings in KEEP_ALL:
        with vlmprune.applied(model, name, **settings) as handle:
            assert torch.equal(logits(model, prompt), dense)
            assert torch.equal(generated(model, prompt), dense_ids)
            assert handle.last.kept_tokens == handle.last.visual_tokens == visual


@pytest.mark.filterwarnings("error:.*nothing was reduced")
@pytest.mark.parametrize("family", FAMILIES)
def test_acting_policies_that_drop_nothing_change_no_bit(family: str) -> None:
    """A count of all tokens, and policies that only read signals, after the encoder and in the decoder."""
    model, prompt = family_model(family, torch.float32), batch(family, dtype=torch.float32)
    dense, dense_ids = logits(model, prompt), generated(model, prompt)
    for policy in (vlmprune.Uniform(keep=max(prompt.widths())), vlmprune.Compose(observers())):
        with vlmprune.applied(model, policy) as handle:
            assert torch.equal(logits(model, prompt), dense)
            assert torch.equal(generated(model, prompt), dense_ids)
            assert handle.last.kept_tokens == handle.last.visual_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_restores_the_model(family: str) -> None:
    model, prompt = random_vlm(family), batch(family, dtype=torch.float32)
    prefill(model, prompt, output_hidden_states=True)  # transformers' own hooks are there from now on
    dense, dense_ids, before = logits(model, prompt), generated(model, prompt), model_state(model)
    keys = list(model.state_dict())
    policy = vlmprune.Compose((*observers(), fixed_policy(prompt, 3), fixed_eviction_of_half(prompt)))
    handle = vlmprune.apply(model, policy)
    assert list(model.state_dict()) == keys
    during = model_state(model)
    ours = {
        key
        for name in before
        if before[name] != during[name]
        for table in during[name][1].values()
        for key in table
        if hooked(model.get_submodule(name), {key}) and key in handle._engine.hook_ids
    }
    assert ours == set(handle._engine.hook_ids)
    assert not torch.equal(logits(model, prompt), dense)
    generated(model, prompt)
    handle.remove()
    assert torch.equal(logits(model, prompt), dense)
    assert torch.equal(generated(model, prompt), dense_ids)
    assert model_state(model) == before
    assert "_vlmprune" not in model.__dict__


def fixed_eviction_of_half(prompt: FamilyPrompt) -> Policy:
    """Evictions after :func:`fixed_policy` at layer 3: only from layers before it."""
    policy = fixed_eviction(prompt)
    cut = fixed_policy(prompt, 3)
    last = tuple(tuple(range(len(kept))) for kept in cut.kept)
    return type(policy)(kept=(*policy.kept[:3], last))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_prunes_by_itself(family: str) -> None:
    model, prompt = random_vlm(family), batch(family, dtype=torch.float32)
    dense = logits(model, prompt)
    handle = vlmprune.apply(model, vlmprune.Compose((*observers(), fixed_policy(prompt, 3))))
    pruned = logits(model, prompt)
    assert not torch.equal(pruned, dense)
    twin = copy.deepcopy(model)
    report = handle.last
    assert torch.equal(logits(twin, prompt), pruned)
    assert handle.last is report and twin._vlmprune.last is not report
    handle.remove()
    assert torch.equal(logits(model, prompt), dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, prompt), pruned)
    twin._vlmprune.remove()
    assert torch.equal(logits(twin, prompt), dense)
    assert {record.site for record in report.sites} == {Site.POST_ENCODER, Site.DECODER_LAYER}


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_while_applied_saves_the_dense_model(family: str, tmp_path: Path) -> None:
    model, prompt = random_vlm(family), batch(family, dtype=torch.float32)
    model.save_pretrained(tmp_path / "before")
    with vlmprune.applied(model, vlmprune.Compose((*observers(), fixed_policy(prompt, 3)))):
        logits(model, prompt)
        model.save_pretrained(tmp_path / "applied")
    names = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "applied").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "applied" / name).read_bytes()
