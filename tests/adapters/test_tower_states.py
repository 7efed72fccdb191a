"""States inside a tower whose tokens are reduced, and what stays bit for bit as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from eager_reference import blocks_of, find, tower_of
from family_prompts import FamilyPrompt, prefill
from family_runs import VERSION, assert_close
from imitated_flash import flash_imitated
from model_state import model_state
from torch import Tensor, nn
from tower_plans import Planned, PlannedStep
from tower_reference import TowerReference, tower_replaced
from tower_runs import MERGE, PLANS, TOWERS, feature_block, reference_of, tower_batch, tower_model

import vlmprune
from vlmprune.adapters.tower_tokens import with_key_bias
from vlmprune.embedded.random_models import random_vlm
from vlmprune.embedded.random_models import tokens as t

KEEP = (PlannedStep(0, kind="keep"), PlannedStep(1, "before", "own"), PlannedStep(2, "middle", "own"))
"""Nothing is reduced, but everything goes the way of what is."""
PATHS = ("sdpa", "eager", "flash")
PADDED = ("idefics3", "smolvlm")
"""Families whose images may be smaller than a view."""


@contextmanager
def attending(name: str, path: str, dtype: torch.dtype = torch.float32) -> Iterator[nn.Module]:
    """The model with an attention implementation."""
    if path == "flash" and name in (*PADDED, "paligemma") and VERSION < (5, 0):
        pytest.skip("transformers 4 gives flash attention 4-D masks here")
    if path == "flash":
        with flash_imitated(copy.deepcopy(tower_model(name, dtype))) as model:
            yield model
    else:
        yield tower_model(name, dtype, path)


def generated(model: nn.Module, prompt: FamilyPrompt) -> Tensor:
    words = [t.IMAGE_TOKEN_ID, t.VIDEO_TOKEN_ID, t.START_ID]
    with torch.no_grad():
        return model.generate(**prompt.inputs, max_new_tokens=4, do_sample=False, suppress_tokens=words)


@pytest.mark.filterwarnings("ignore:.*nothing was reduced")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", TOWERS)
def test_keeping_all_tokens_changes_no_bit(name: str, path: str) -> None:
    prompt = tower_batch(name, dtype=torch.float32)
    with attending(name, path) as model:
        dense, ids = prefill(model, prompt).logits, generated(model, prompt)
        before = model_state(model)
        with vlmprune.applied(model, Planned(steps=KEEP)) as handle:
            assert torch.equal(prefill(model, prompt).logits, dense)
            assert torch.equal(generated(model, prompt), ids)
            assert len(handle.last.tower_sites) == len(KEEP)
        assert model_state(model) == before
        assert torch.equal(prefill(model, prompt).logits, dense)


@pytest.mark.parametrize("path", ["eager", "flash"])
@pytest.mark.parametrize("name", TOWERS)
def test_every_attention_computes_what_sdpa_computes(name: str, path: str) -> None:
    """What flash attention makes of the padding of an image is its own affair."""
    sizes = {"sizes": ((24, 48), (24, 24))} if path == "flash" and name in PADDED else {}
    prompt, policy = tower_batch(name, dtype=torch.float32, **sizes), Planned(steps=PLANS["ragged"])
    model = tower_model(name, torch.float32)
    with vlmprune.applied(model, policy):
        expected = features(model, prompt)
    with attending(name, path) as model:
        dense = features(model, prompt)
        with vlmprune.applied(model, policy):
            got = features(model, prompt)
        assert torch.equal(features(model, prompt), dense)
    assert_close(got, expected, torch.float32)
    assert (got - dense).abs().max() > 1e-2


@contextmanager
def noted_output(name: str, model: nn.Module) -> Iterator[list[Any]]:
    """What the tower returns, with all hidden states where the model lets it."""
    tower, outputs = tower_of(model), []
    hook = tower.register_forward_hook(lambda module, args, output: outputs.append(output))
    before, tower.config.output_hidden_states = getattr(tower.config, "output_hidden_states", False), True
    try:
        yield outputs
    finally:
        tower.config.output_hidden_states = before
        hook.remove()


@pytest.mark.parametrize("name", TOWERS)
def test_hidden_states_that_the_model_notes(name: str) -> None:
    """Each as long as the tokens behind its block, or in full length where the projector needs that."""
    model, prompt = tower_model(name), tower_batch(name)
    last = feature_block(name)
    steps = (PlannedStep(0), PlannedStep(last - 1, "before", "prune"), PlannedStep(last))
    reference = reference_of(name, prompt, steps)
    with noted_output(name, model) as outputs:
        prefill(model, prompt)
    with vlmprune.applied(model, Planned(steps=steps)), noted_output(name, model) as reduced:
        prefill(model, prompt)
    [dense], [output], [run] = outputs, reduced, reference.runs
    whole = name in MERGE  # its projector mixes patches, so that its tower returns all of them
    wanted = run.hidden if whole else [torch.stack(states) for states in run.short]
    assert len(output.hidden_states) == len(dense.hidden_states)
    some = 0
    for got, wish, full in zip(output.hidden_states[1:], wanted, dense.hidden_states[1:], strict=True):
        if full is not None:  # transformers 5.23 notes the one that is read
            assert_close(got, wish)
            assert (got.shape == full.shape) == whole
            some += 1
    assert some in (1, len(wanted))
    assert torch.equal(output.hidden_states[0], dense.hidden_states[0]) if some > 1 else True
    if whole:
        assert_close(output.last_hidden_state, run.last)


def test_a_first_block_that_is_given_fewer_tokens() -> None:
    """What entered the tower is noted in full length, too."""
    prompt, steps = tower_batch("idefics3"), (PlannedStep(0, "before"),)
    model, reference = tower_model("idefics3"), reference_of("idefics3", prompt, steps)
    with vlmprune.applied(model, Planned(steps=steps)), noted_output("idefics3", model) as outputs:
        prefill(model, prompt)
    [output], [run] = outputs, reference.runs
    assert {states.shape for states in output.hidden_states} == {run.last.shape}
    assert_close(output.hidden_states[1], run.hidden[0])


@pytest.mark.parametrize("name", TOWERS)
def test_pruned_patches_are_as_if_nobody_saw_them(name: str) -> None:
    """The dense tower whose later blocks hide the dropped patches from all others."""
    model, prompt, block = tower_model(name), tower_batch(name), 1
    steps = (PlannedStep(block, "before", "prune", ragged=True),)
    reference = reference_of(name, prompt, steps)
    with noted_output(name, model) as outputs, vlmprune.applied(model, Planned(steps=steps)):
        prefill(model, prompt)
    with noted_output(name, model) as masked, unseen(model, reference, block):
        prefill(model, prompt)
    [got], [wish], [run] = outputs, masked, reference.runs
    last = feature_block(name) + 1
    for view, groups in enumerate(run.groups[last - 1]):
        kept = [patch for patch, group in enumerate(groups) if group >= 0]
        first = reference.first
        expected = wish.hidden_states[last][view, first:][kept]
        if name in MERGE:
            assert_close(got.hidden_states[last][view, first:][kept], expected)
            assert not got.hidden_states[last][view, first:][[g < 0 for g in groups]].any()
        else:
            assert_close(got.hidden_states[last][view, first : first + len(kept)], expected)


@contextmanager
def unseen(model: nn.Module, reference: TowerReference, block: int) -> Iterator[None]:
    """Hide dropped patches from all queries in ``block`` and later ones."""
    [run] = reference.runs
    dropped = torch.tensor(run.groups[-1]) < 0
    dropped = torch.cat([torch.zeros(len(dropped), reference.first, dtype=torch.bool), dropped], 1)
    hidden = torch.zeros(dropped.shape, dtype=torch.float64).masked_fill(dropped, -torch.inf)[:, None, None]

    def hide(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("attention_mask")
        if given is not None and given.dtype == torch.bool:
            given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, -torch.inf)
        return args, {**kwargs, "attention_mask": hidden if given is None else hidden + given}

    modules = [find(part, "self_attn", "attention") for part in list(blocks_of(model))[block:]]
    hooks = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_a_copy_reduces_by_itself(name: str) -> None:
    model, prompt = copy.deepcopy(tower_model(name)), tower_batch(name)
    dense = prefill(model, prompt).logits
    handle = vlmprune.apply(model, Planned(steps=PLANS["merge"]))
    reduced = prefill(model, prompt).logits
    report = handle.last
    twin = copy.deepcopy(model)
    assert torch.equal(prefill(twin, prompt).logits, reduced) and handle.last is report
    handle.remove()
    assert torch.equal(prefill(model, prompt).logits, dense)
    assert torch.equal(prefill(twin, prompt).logits, reduced)
    assert len(twin._vlmprune.last.tower_sites) == 1


@pytest.mark.parametrize("path", ["sdpa", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_half_precision(name: str, dtype: torch.dtype, path: str) -> None:
    """As near to float32 as half precision allows; without the sizes it would be farther away."""
    policies = [Planned(steps=PLANS["ragged"]), Planned(steps=tuple(no_bias(step) for step in PLANS["ragged"]))]
    found = []
    for policy in policies:
        with vlmprune.applied(tower_model(name, torch.float32), policy):
            found.append(features(tower_model(name, torch.float32), tower_batch(name, dtype=torch.float32)))
    with attending(name, path, dtype) as model, vlmprune.applied(model, policies[0]):
        half = features(model, tower_batch(name, dtype=dtype)).float()
    near, far = ((half - wish).square().mean() for wish in found)
    assert half.isfinite().all() and near < far / 10


def no_bias(step: PlannedStep) -> PlannedStep:
    return PlannedStep(step.block, step.place, step.kind, step.ragged, size_bias=False)


def features(model: nn.Module, prompt: FamilyPrompt) -> Tensor:
    """What the projector of a model returns for the prompt's images."""
    outputs: list[Tensor] = []
    projector = find(model.model, "multi_modal_projector", "connector")
    hook = projector.register_forward_hook(lambda module, args, output: outputs.append(output))
    prefill(model, prompt)
    hook.remove()
    return outputs[0]


def test_features_of_an_earlier_block_of_internvl() -> None:
    """Read from the noted hidden states, not from the last one."""
    model, prompt = random_vlm("internvl", dtype=torch.float64), tower_batch("internvl")
    model.config.vision_feature_layer = -2
    reference = TowerReference(model, prompt, PLANS["ragged"], merge=2)
    with tower_replaced(model, reference):
        expected = features(model, prompt)
    with vlmprune.applied(model, Planned(steps=PLANS["ragged"])) as handle:
        assert_close(features(model, prompt), expected)
        assert handle.info.feature_block == 2
    assert (features(model, prompt) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llava", "internvl", "idefics3"])
def test_gradients_flow_through_a_reduced_tower(name: str) -> None:
    """The derivative along a random direction of all weights of the tower, by differences."""
    model, prompt = copy.deepcopy(tower_model(name)), tower_batch(name, (1, 1))
    weights = list(tower_of(model).parameters())
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    projector, outputs = find(model.model, "multi_modal_projector", "connector"), []
    projector.register_forward_hook(lambda module, args, output: outputs.append(output))
    with vlmprune.applied(model, Planned(steps=PLANS["ragged"])):
        model(**prompt.inputs)
        grads = torch.autograd.grad(outputs.pop().square().sum(), weights, allow_unused=True)
        found = sum((g * d).sum() for g, d in zip(grads, direction, strict=True) if g is not None)
        sides = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                for weight, change in zip(weights, direction, strict=True):
                    weight += step * change
                model(**prompt.inputs)
                sides.append(outputs.pop().square().sum())
    assert torch.isclose(found, (sides[0] - sides[1]) / 2e-6, rtol=1e-5)
    assert found.abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_as_features_of_queries_and_keys(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 3, 5, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    sizes = torch.randint(1, 400, (2, 5), generator=generator)
    bias = sizes.to(torch.promote_types(dtype, torch.float32)).log()
    bias[0, 3] = -torch.inf
    scale = 0.17
    longer, wider = with_key_bias(query, key, bias, scale)
    scores = longer.double() @ wider.double().transpose(2, 3) * scale
    expected = query.double() @ key.double().transpose(2, 3) * scale + bias.double()[:, None, None]
    assert torch.allclose(scores.softmax(-1), expected.softmax(-1), rtol=1e-3 if dtype.itemsize == 2 else 1e-5)
    assert (scores.softmax(-1)[0, :, :, 3] == 0).all()
