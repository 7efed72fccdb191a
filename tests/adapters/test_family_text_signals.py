"""Signals of every family's decoder equal what a stock model with eager attention computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eager_reference import EagerReference
from family_prompts import FamilyPrompt, prefill
from family_runs import DEPTH, FAMILIES, VIDEO, batch, family_model, fixed_policy, masked
from recording import Recording
from torch import Tensor

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.policy import Policy
from vlmprune.core.sites import Site

CUT = 3
"""The recording policy acts before this layer."""
LAYERS = (0, 1, 2)
WHICH = ("last", "text_after")
NUMBERS = (2, 6, 9)
"""Rows that are asked for by number; all of them inside the shortest prompt."""


def wanted() -> tuple[s.Signal, ...]:
    found: list[s.Signal] = [s.FinalNorm(), s.Hidden("text", CUT, "in"), s.AttentionRows("text", 2, NUMBERS)]
    for layer in LAYERS:
        found += [s.GroupMass(layer), *[s.AttentionRows("text", layer, which) for which in WHICH]]
    return tuple(found)


def record(family: str, prompt: FamilyPrompt, implementation: str, *before: Policy) -> Context:
    policy = Recording(wanted=wanted(), site=Site.DECODER_LAYER, layer=CUT)
    model = family_model(family, torch.float32, implementation)
    with vlmprune.applied(model, [*before, policy]):
        prefill(model, prompt)
    context = policy.tape.last
    assert context.signal(s.FinalNorm()) is text_norm(model)
    return context


def text_norm(model: Any) -> Any:
    base = model.model
    return (base.text_model if hasattr(base, "text_model") else base.language_model).norm


class Decoder:
    """Definitions of the signals on a watched eager model; ``gone [B, L]`` was hidden from layer ``first`` on."""

    def __init__(self, family: str, prompt: FamilyPrompt, gone: Tensor, first: int, around: Any = None) -> None:
        self.prompt, self.gone, self.first = prompt, gone, first
        self.watched = EagerReference(family_model(family, torch.float32, "eager"), prompt, around)

    def left(self, layer: int, row: int) -> Tensor:
        """``[L]`` bool: tokens of a row that a layer works on."""
        real = self.prompt.real[row]
        return real & ~self.gone[row] if layer >= self.first else real

    def visual(self, row: int) -> Tensor:
        return self.prompt.kinds[row] > 0

    def attention(self, layer: int, row: int) -> Tensor:
        return self.watched.text[layer].weights[row].mean(0)

    def group_mass(self, layer: int, row: int) -> Tensor:
        left, visual = self.left(layer, row), self.visual(row)
        before = torch.arange(len(left)) < visual.nonzero()[0]
        groups = [left & before, left & ~visual & ~before, left & visual]
        attention = self.attention(layer, row)
        return torch.stack([torch.stack([attention[r][:, c].sum() for c in groups]) for r in groups[1:]])

    def rows(self, layer: int, row: int, which: Any) -> Tensor:
        left, visual = self.left(layer, row), self.visual(row)
        current = left.nonzero()[:, 0]
        if which == "last":
            chosen = current[-1:]
        elif which == "text_after":
            chosen = current[~visual[current] & (current > visual.nonzero()[0])]
        else:
            chosen = current[list(which)]
        return self.attention(layer, row)[chosen]


def close(got: Tensor, expected: Tensor) -> bool:
    scale = max(1.0, float(expected.abs().max()))
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=5e-6 * scale)


def check(context: Context, decoder: Decoder) -> None:
    assert context.sample == tuple(row for row, count in enumerate(decoder.prompt.images) if count)
    for item, row in enumerate(context.sample):
        stay = decoder.left(CUT - 1, row) & decoder.visual(row)
        n = int(stay.sum())
        assert context.lengths[item] == n == int(context.valid[item].sum())
        hidden = context.signal(s.Hidden("text", CUT, "in"))[item][:n]
        assert close(hidden, decoder.watched.text_entering[CUT][row][stay])
        order = decoder.left(CUT - 1, row).long().cumsum(0) - 1
        assert context.position[item][:n].tolist() == order[stay].tolist()
        for layer in LAYERS:
            assert close(context.signal(s.GroupMass(layer))[item], decoder.group_mass(layer, row)), layer
        asked = [(layer, which) for layer in LAYERS for which in WHICH] + [(2, NUMBERS)]
        for layer, which in asked:
            got = context.signal(s.AttentionRows("text", layer, which))[item]
            expected = decoder.rows(layer, row, which)[:, stay]
            assert close(got[len(got) - len(expected) :, :n], expected), (layer, which)
            assert not got[: len(got) - len(expected)].any() and not got[:, n:].any()
        assert not close(context.signal(s.GroupMass(2))[item], decoder.group_mass(0, row))
        other = decoder.rows(1, row, "last")[:, stay]
        assert not close(context.signal(s.AttentionRows("text", 2, "last"))[item][:, :n], other)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_signals_equal_eager_attention(family: str, implementation: str) -> None:
    prompt = batch(family, (2, 0, 1), dtype=torch.float32, video=family in VIDEO)
    decoder = Decoder(family, prompt, torch.zeros_like(prompt.real), DEPTH)
    check(record(family, prompt, implementation), decoder)


@pytest.mark.parametrize("where", [None, 2], ids=["post_encoder", "layer2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_earlier_cut(family: str, where: int | None) -> None:
    """Signals of layers before the cut are given over the survivors, too."""
    prompt = batch(family, dtype=torch.float32)
    policy = fixed_policy(prompt, where)
    gone = prompt.dropped(policy.kept, policy.site)
    around = masked(family_model(family, torch.float32, "eager"), prompt, policy)
    check(record(family, prompt, "sdpa", policy), Decoder(family, prompt, gone, where or 0, around))
