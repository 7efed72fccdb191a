"""Losses, logits and hidden states of pruned families stand where those of the dense model stand."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from family_runs import DEPTH, FAMILIES, VERSION, assert_close, batch, family_model, fixed_policy, masked
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import vlmprune

SITES = [pytest.param(None, id="post_encoder"), pytest.param(2, id="layer2")]


@dataclass(frozen=True)
class RightPadded(FamilyPrompt):
    """The same rows, padded on the right."""

    def places(self) -> list[list[list[int]]]:
        return [
            [[start + i for i in part.places] for part, start in zip(row.parts, row.starts, strict=True)]
            for row in self.rows
        ]

    def _padded(self, values: list[list[int]], fill: int = 0) -> Tensor:
        longest = max(len(row) for row in values)
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])


def labels_of(prompt: FamilyPrompt, dropped: Tensor) -> Tensor:
    """``[B, L]`` text tokens behind tokens that stay; -100 elsewhere."""
    usable = prompt.real & (prompt.kinds == 0)
    before = torch.cat([torch.zeros_like(usable[:, :1]), (prompt.real & ~dropped)[:, :-1]], 1)
    return prompt.ids.masked_fill(~(usable & before), -100)


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_on_text(family: str, where: int | None) -> None:
    model, prompt = family_model(family), batch(family)
    policy = fixed_policy(prompt, where)
    labels = labels_of(prompt, prompt.dropped(policy.kept, policy.site))
    with masked(model, prompt, policy):
        expected = prefill(model, prompt, labels=labels)
    with vlmprune.applied(model, policy):
        got = prefill(model, prompt, labels=labels)
    # Some models compute the loss in float32.
    assert torch.allclose(got.loss.double(), expected.loss.double(), rtol=1e-6)
    by_hand = cross_entropy(got.logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    assert torch.allclose(got.loss.double(), by_hand, rtol=1e-5)
    dense = prefill(model, prompt, labels=labels).loss
    assert (dense - expected.loss).abs() > 1e-3


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_log_likelihood_is_sliced_by_position(family: str, where: int | None) -> None:
    """The last three tokens of every row as a continuation, and the same with ``logits_to_keep``."""
    model, prompt = family_model(family), batch(family)
    policy = fixed_policy(prompt, where)

    def likelihood(logits: Tensor) -> Tensor:
        chosen = logits[:, -4:-1].log_softmax(-1)
        return chosen.gather(2, prompt.ids[:, -3:, None]).sum((1, 2))

    with masked(model, prompt, policy):
        expected = likelihood(prefill(model, prompt).logits)
    with vlmprune.applied(model, policy):
        full = prefill(model, prompt).logits
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:  # Qwen2-VL of transformers 4
            assert_close(likelihood(full), expected)
            return
        last = prefill(model, prompt, logits_to_keep=4).logits
        some = prefill(model, prompt, logits_to_keep=torch.tensor([0, prompt.length - 1])).logits
    assert_close(likelihood(full), expected)
    assert full.shape[:2] == prompt.ids.shape and last.shape[1] == 4
    assert_close(last, full[:, -4:])
    assert_close(some, full[:, [0, prompt.length - 1]])
    assert ((likelihood(prefill(model, prompt).logits) - expected).abs()[:2] > 1e-3).all()


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attentions_are_as_short_as_their_layers(family: str, where: int | None) -> None:
    model, prompt = family_model(family, torch.float32, "eager"), batch(family, dtype=torch.float32)
    policy = fixed_policy(prompt, where)
    stay = prompt.real & ~prompt.dropped(policy.kept, policy.site)
    short = int(stay.sum(1).max())
    with masked(model, prompt, policy):
        expected = prefill(model, prompt, output_hidden_states=True)
    dense = prefill(model, prompt, output_hidden_states=True, output_attentions=True)
    with vlmprune.applied(model, policy):
        out = prefill(model, prompt, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(dense.hidden_states) == DEPTH + 1
    lengths = [states.shape[1] for states in out.hidden_states]
    first = (where + 1) if where else 0  # what enters the layer of the cut is whole
    assert lengths[:first] == [prompt.length] * first
    assert lengths[first:-1] == [short] * (DEPTH - first)
    assert lengths[-1] in (short, prompt.length)
    if family == "qwen3_vl" and VERSION < (5, 0):  # adds visual features to the first layers' outputs in place
        first = max(first, 3)
    for states, wish in zip(out.hidden_states[first:-1], expected.hidden_states[first:-1], strict=True):
        for row, keep in enumerate(stay):
            assert_close(states[row][short - int(keep.sum()) :], wish[row][keep], torch.float32)
    sides = [attention.shape[-2:] for attention in out.attentions]
    assert sides == [(short, short) if layer >= (where or 0) else (prompt.length,) * 2 for layer in range(DEPTH)]
    assert out.logits.shape == dense.logits.shape
    assert all(
        a.shape == b.shape
        for a, b in zip(
            prefill(model, prompt, output_hidden_states=True).hidden_states, dense.hidden_states, strict=True
        )
    )


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding(family: str, where: int | None) -> None:
    model = family_model(family)
    prompt = RightPadded(family, batch(family).rows)
    policy = fixed_policy(prompt, where)
    stay = prompt.real & ~prompt.dropped(policy.kept, policy.site)
    assert not prompt.real[:, -1].all()
    with masked(model, prompt, policy):
        expected = prefill(model, prompt).logits
    with vlmprune.applied(model, policy):
        got = prefill(model, prompt).logits
    assert_close(got[stay], expected[stay])


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_mask_and_positions(family: str, where: int | None) -> None:
    """As much as a user may leave out."""
    model, prompt = family_model(family), batch(family, (1,), False)
    policy = fixed_policy(prompt, where)
    stay = ~prompt.dropped(policy.kept, policy.site)
    given = {name: value for name, value in prompt.inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        with masked(model, prompt, policy):
            expected = model(**given).logits
        with vlmprune.applied(model, policy):
            got = model(**given).logits
        assert_close(got[stay], expected[stay])
        assert (model(**given).logits[:, -1] - got[:, -1]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_as_in_the_masked_model(family: str) -> None:
    model, prompt = family_model(family), batch(family)
    policy = fixed_policy(prompt, 2)
    labels = labels_of(prompt, prompt.dropped(policy.kept, policy.site))
    found = []
    for context in (masked(model, prompt, policy), vlmprune.applied(model, policy)):
        with context:
            found.append(gradients(model, prompt, labels))
    dense = gradients(model, prompt, labels)
    assert found[0].keys() == found[1].keys() and len(dense) > 20
    scale = max(float(grad.abs().max()) for grad in dense.values())
    for name, wish in found[0].items():
        assert (found[1][name] - wish).abs().max() <= 1e-6 * scale, name
    assert max(float((dense[name] - wish).abs().max()) for name, wish in found[0].items()) > 1e-3 * scale


def gradients(model: nn.Module, prompt: FamilyPrompt, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the text loss."""
    model.zero_grad()
    model(**prompt.inputs, position_ids=prompt.position_ids(model), labels=labels).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_image_features_are_not_disturbed(family: str) -> None:
    model, prompt = family_model(family), batch(family)
    dense = prefill(model, prompt)
    with vlmprune.applied(model, "uniform", keep=0.5):
        pruned = prefill(model, prompt)
    one, two = (flat(getattr(out, "image_hidden_states", None)) for out in (dense, pruned))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one or family.startswith("qwen")


def flat(value: Any) -> list[Tensor]:
    value = getattr(value, "pooler_output", value)
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]
