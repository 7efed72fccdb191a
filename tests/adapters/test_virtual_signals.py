"""Signals of layers in which merged tokens stand at several places, and the policies that ask for them.

The reference is the eager attention of the dense model with averaged groups: what a merged token receives is what its
places receive together.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from eager_reference import EagerReference
from family_prompts import FamilyPrompt, prefill
from family_runs import FAMILIES, batch, family_model, forced_tokens, rollout
from fixed_policy import FixedGroups
from masked_reference import decoder_layers
from recording import Recording
from torch import Tensor, nn
from virtual_reference import Groups, group_places, pick_groups, unique, unmerged

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.sites import Site

CUT = 3
NUMBERS = (2, 5, 6)
"""Rows by their place among the merged tokens; some of them are merged ones."""
WHICH = ("last", "text_after", NUMBERS)


class Unmerged:
    """Definitions of the signals on a watched eager model with averaged groups."""

    def __init__(self, family: str, prompt: FamilyPrompt, groups: Groups) -> None:
        self.prompt, self.number = prompt, group_places(prompt, groups)
        self.there = unique(prompt, groups)
        self.model = family_model(family, torch.float32, "eager")
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.watched = EagerReference(self.model, prompt, self._around(groups))

    def _around(self, groups: Groups) -> Any:
        return Watched(unmerged(self.model, self.prompt, groups), decoder_layers(self.model), self.outputs)

    def visual(self, row: int) -> Tensor:
        return self.prompt.kinds[row] > 0

    def tokens(self, row: int) -> Tensor:
        """``[n]`` first places of the merged visual tokens."""
        return (self.there[row] & self.visual(row)).nonzero()[:, 0]

    def attention(self, layer: int, row: int) -> Tensor:
        """``[L, L]`` head mean over real places."""
        mean = self.watched.text[layer].weights[row].mean(0)
        return mean * self.prompt.real[row] * self.prompt.real[row][:, None]

    def received(self, values: Tensor, row: int) -> Tensor:
        """``[R, n]`` what merged visual tokens receive of ``values [R, L]``."""
        number = self.number[row]
        return torch.stack([values[:, number == place].sum(1) for place in self.tokens(row).tolist()], 1)

    def rows(self, layer: int, row: int, which: Any) -> Tensor:
        attention, visual = self.attention(layer, row), self.visual(row)
        places = self.prompt.real[row].nonzero()[:, 0]
        if which == "last":
            return attention[places[-1:]]
        if which == "text_after":
            return attention[places[~visual[places] & (places > visual.nonzero()[0])]]
        firsts = self.there[row].nonzero()[:, 0][list(which)]
        return torch.stack([attention[self.number[row] == first].mean(0) for first in firsts.tolist()])

    def group_mass(self, layer: int, row: int) -> Tensor:
        real, visual = self.prompt.real[row], self.visual(row)
        before = torch.arange(len(real)) < visual.nonzero()[0]
        groups = [real & before, real & ~visual & ~before, real & visual]
        attention = self.attention(layer, row)
        return torch.stack([torch.stack([attention[r][:, c].sum() for c in groups]) for r in groups[1:]])

    def transition(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Norm ratio and cosine of the attention module's output and input, for merged visual tokens."""
        before, after = (self.outputs[layer, name][row][self.tokens(row)] for name in ("input_layernorm", "self_attn"))
        return after.norm(dim=-1) / before.norm(dim=-1), torch.cosine_similarity(before, after, dim=-1)


class Watched:
    """The reference's context, and what norms and attention modules give inside it, behind its own hooks."""

    def __init__(self, context: Any, layers: Any, outputs: dict[tuple[int, str], Tensor]) -> None:
        self.context, self.layers, self.outputs = context, layers, outputs

    def __enter__(self) -> None:
        self.context.__enter__()
        self.hooks = [
            getattr(layer, name).register_forward_hook(partial(self._see, (i, name)))
            for i, layer in enumerate(self.layers)
            for name in ("input_layernorm", "self_attn")
        ]

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.context.__exit__(*error)

    def _see(self, key: tuple[int, str], module: nn.Module, args: Any, output: Any) -> None:
        self.outputs[key] = output[0] if isinstance(output, tuple) else output


def record(family: str, prompt: FamilyPrompt, groups: Groups, wanted: tuple[s.Signal, ...], kind: str) -> Context:
    policy = Recording(wanted=wanted, site=Site.DECODER_LAYER, layer=CUT)
    model = family_model(family, torch.float32, kind)
    with vlmprune.applied(model, [FixedGroups(kept=groups), policy]):
        prefill(model, prompt)
    return policy.tape.last


def close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_signals(family: str) -> None:
    prompt = batch(family, (2, 0, 1), dtype=torch.float32)
    groups = pick_groups(prompt.widths())
    asked = [*[s.AttentionRows("text", 1, which) for which in WHICH], s.ProbeAttention(CUT, "text_after")]
    masses = [s.ColumnMass("text", 2, "sum"), s.ColumnMass("text", 0, "mean")]
    wanted = (*asked, *masses, s.GroupMass(1), s.GroupMass(2), s.ModuleTransition(2, "attn"))
    context = record(family, prompt, groups, wanted, "eager" if family == "gemma3" else "sdpa")
    expected = Unmerged(family, prompt, groups)
    for item, row in enumerate(context.sample):
        n = context.lengths[item]
        assert n == len(expected.tokens(row))
        for signal in asked:
            got = context.signal(signal)[item]
            rows = expected.received(expected.rows(signal.layer, row, signal.rows), row)
            assert close(got[len(got) - len(rows) :, :n], rows), signal
            assert not got[: len(got) - len(rows)].any() and not got[:, n:].any()
        for signal in masses:
            total = expected.received(expected.attention(signal.layer, row).sum(0, keepdim=True), row)[0]
            share = 1 if signal.reduce == "sum" else int(prompt.real[row].sum())
            assert close(context.signal(signal)[item][:n], total / share), signal
        for layer in (1, 2):
            assert close(context.signal(s.GroupMass(layer))[item], expected.group_mass(layer, row)), layer
        if family != "gemma3":  # its attention has a norm behind it
            found = context.signal(s.ModuleTransition(2, "attn"))
            for got, wished in zip((found.ratio, found.cosine), expected.transition(2, row), strict=True):
                assert close(got[item][found.place[item][:n]], wished)


POLICIES = [
    pytest.param(vlmprune.FastV(keep=0.5, layer=2), id="fastv"),
    pytest.param(vlmprune.FastV(keep=0.5, layer=2, score="mean_all"), id="fastv-mean_all"),
    pytest.param(vlmprune.TransPrune(keep=(0.8, 0.5), layers=(2, 3)), id="transprune"),
    pytest.param(vlmprune.ToDRE(keep=1.0, tau=2.0, check_layers=1), id="todre"),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_decoder_policies(family: str, policy: Any) -> None:
    """They cut merged tokens; decoding goes on from what they left."""
    model, prompt = family_model(family), batch(family, (2, 0, 1))
    groups = pick_groups(prompt.widths())
    with vlmprune.applied(model, [FixedGroups(kept=groups), policy]) as handle:
        logits, steps = rollout(model, prompt, forced_tokens(prompt))
        layers, last = handle.last.kept_tokens_per_layer, handle.last.lineage(0).groups()[0]
    visual = unique(prompt, groups) & (prompt.kinds > 0)
    assert layers[0] == tuple(visual.sum(1).tolist())
    assert all(after < before for after, before in zip(layers[-1], layers[0], strict=True) if before)
    assert torch.isfinite(logits[:, -1]).all() and torch.isfinite(steps).all()
    number, places = group_places(prompt, groups)[0], sum(prompt.places()[0], [])
    for group in last:  # whole groups
        assert len({int(number[places[token]]) for token in group}) == 1
        assert sum(int(number[place]) == int(number[places[group[0]]]) for place in places) == len(group)


def test_fastv_looks_at_all_places_of_a_token() -> None:
    prompt = batch("llava", (2, 1), dtype=torch.float32)
    groups = pick_groups(prompt.widths())
    expected = Unmerged("llava", prompt, groups)
    model = family_model("llava", torch.float32)
    with vlmprune.applied(model, [FixedGroups(kept=groups), vlmprune.FastV(keep=0.5, layer=2)]) as handle:
        prefill(model, prompt)
    for row in range(2):
        scores = expected.received(expected.rows(1, row, "last"), row)[0]
        count = handle.last.kept_tokens[row]
        firsts = expected.tokens(row)[scores.topk(count).indices.sort().values]
        places = sum(prompt.places()[row], [])
        kept = [group[0] for group in handle.last.lineage(row).groups()[0]]
        assert [places[token] for token in kept] == firsts.tolist()
