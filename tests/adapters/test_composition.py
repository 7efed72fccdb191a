"""Several policies on one model: signals, carried values and sizes follow the tokens that are left."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep, MeanGroups
from llava_prompts import N, make_prompt, pick_tokens, prefill, small_llava
from recording import Recording, Tape

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.context import Context
from vlmprune.core.errors import ActiveError
from vlmprune.core.selection import Selection
from vlmprune.core.sites import Site

FORMS = [
    pytest.param((1, 1, 1), False, id="batch"),
    pytest.param((2, 0, 1), True, id="left-padded"),
]
WANTED = (s.ColumnMass("vision", 1), s.Keys("vision", 2), s.PreProjector(), s.Projected(), s.QK("vision", 1))


@dataclass(frozen=True)
class Carrying(FixedKeep):
    """Like the base, and hands on a value per token: its own number, counted through the whole batch."""

    def select(self, context: Context) -> Selection:
        numbers = torch.arange(context.n_items * context.width).view(context.n_items, -1).float()
        return replace(super().select(context), carry={"number": numbers, "pair": torch.stack([numbers, -numbers], -1)})


@dataclass(frozen=True)
class Sized(MeanGroups):
    """Merges pairs and hands on how many tokens each group stands for."""

    tape: Tape = field(default_factory=Tape, compare=False)

    def select(self, context: Context) -> Selection:
        self.tape.contexts.append(context)
        sizes = context.sizes if context.sizes is not None else context.valid.float()
        return replace(super().select(context), carry={"sizes": sizes})


def last(model: Any, prompt: Any, policies: list[Any]) -> Context:
    with vlmprune.applied(model, policies):
        prefill(model, prompt)
    return policies[-1].tape.last


@pytest.mark.parametrize(("images", "padded"), FORMS)
def test_signals_of_the_tower_follow_an_earlier_pruning(images: tuple[int, ...], padded: bool) -> None:
    model, prompt = small_llava(), make_prompt(images, padded)
    kept = pick_tokens([N] * sum(images), ragged=True)
    full = last(model, prompt, [Recording(wanted=WANTED)])
    after = last(model, prompt, [FixedKeep(kept=kept), Recording(wanted=WANTED)])
    assert after.lengths == tuple(len(tokens) for tokens in kept)
    for item, tokens in enumerate(kept):
        for signal in WANTED[:-1]:
            assert torch.equal(after.signal(signal)[item, : len(tokens)], full.signal(signal)[item, list(tokens)])
    query, key = after.signal(WANTED[-1])  # the whole attention, whatever is left
    assert torch.equal(query, full.signal(WANTED[-1])[0]) and torch.equal(key, full.signal(WANTED[-1])[1])


def test_signals_of_the_tower_follow_an_earlier_merging() -> None:
    model, prompt = small_llava(), make_prompt((1, 1))
    full = last(model, prompt, [Recording(wanted=WANTED[:4])])
    after = last(model, prompt, [MeanGroups(size=4), Recording(wanted=WANTED[:4])])
    for signal in WANTED[:4]:
        expected = full.signal(signal).unflatten(1, (4, 4)).mean(2)
        assert torch.allclose(after.signal(signal), expected, atol=1e-5)


@pytest.mark.parametrize("site", [Site.POST_ENCODER, Site.DECODER_LAYER, Site.KV_CACHE])
@pytest.mark.parametrize(("images", "padded"), FORMS)
def test_carried_values_reach_every_later_site(images: tuple[int, ...], padded: bool, site: Site) -> None:
    model, prompt = small_llava(), make_prompt(images, padded)
    kept = pick_tokens([N] * sum(images), ragged=True)
    layer = None if site == Site.POST_ENCODER else 3
    policies: list[Any] = [Carrying(kept=kept)]
    left = [list(tokens) for tokens in kept]
    if site != Site.POST_ENCODER:  # a cut in between drops the first token of every sample
        widths = _per_row(images, [len(tokens) for tokens in kept])
        second = tuple(tuple(range(1, width)) for width in widths if width)
        policies.append(FixedKeep(kept=second, site=Site.DECODER_LAYER, layer=2))
        firsts = [sum(images[:row]) for row, count in enumerate(images) if count]
        left = [tokens[1:] if item in firsts else tokens for item, tokens in enumerate(left)]
    policies.append(Recording(site=site, layer=layer))
    with vlmprune.applied(model, policies):
        prefill(model, prompt, use_cache=True)
    context = policies[-1].tape.last
    numbers = [[item * N + token for token in tokens] for item, tokens in enumerate(left)]
    if site != Site.POST_ENCODER:
        numbers = _joined(images, numbers)
    for item, expected in enumerate(numbers):
        got = context.carry["number"][item, context.valid[item]]
        assert got.tolist() == expected
        pair = context.carry["pair"][item, context.valid[item]]
        assert pair.tolist() == [[n, -n] for n in expected]


def _per_row(images: tuple[int, ...], counts: list[int]) -> list[int]:
    items = iter(counts)
    return [sum(next(items) for _ in range(n)) for n in images]


def _joined(images: tuple[int, ...], rows: list[list[int]]) -> list[list[int]]:
    items = iter(rows)
    return [sum((next(items) for _ in range(n)), []) for n in images if n]


def test_sizes_add_up_over_merges() -> None:
    model, prompt = small_llava(), make_prompt((1, 1), True)
    policies = [
        Sized(),
        Sized(),
        Sized(site=Site.DECODER_LAYER, layer=2),
        Recording(site=Site.DECODER_LAYER, layer=3),
    ]
    context = last(model, prompt, policies)
    assert policies[0].tape.last.sizes is None
    assert policies[1].tape.last.sizes.tolist() == [[2.0] * 8] * 2
    assert policies[2].tape.last.sizes.tolist() == [[4.0] * 4] * 2
    assert context.sizes.tolist() == [[8.0] * 2] * 2
    assert context.lengths == (2, 2)


def test_a_post_encoder_policy_followed_by_a_decoder_policy() -> None:
    """By names and budgets, as the one line takes them."""
    model, prompt = small_llava(), make_prompt((1, 1), True)
    with vlmprune.applied(model, ["hiprune", vlmprune.ToDRE(keep=1.0, tau=2.0, check_layers=1)], keep=[0.5, None]) as h:
        prefill(model, prompt, use_cache=True)
        assert h.last.kept_tokens_per_layer == ((8, 8), (8, 8), (0, 0), (0, 0))
        assert [record.policy for record in h.last.sites] == ["hiprune", "todre"]


def test_dropping_everything_after_the_encoder() -> None:
    """Text alone is left; later decoder sites have nothing to decide."""
    model, prompt = small_llava(), make_prompt((1, 2), True)
    later = Recording(site=Site.DECODER_LAYER, layer=2)
    with vlmprune.applied(model, [FixedKeep(kept=((),) * 3, positions="compact"), later]) as handle:
        got = prefill(model, prompt, use_cache=True).logits
        assert handle.last.kept_tokens == (0, 0)
        assert not later.tape.contexts
    for row in range(2):
        alone = prompt.row(row)
        text = alone.ids[alone.ids != model.config.image_token_index][None]
        with torch.no_grad():
            expected = model(input_ids=text).logits[0]
        stay = prompt.real[row] & (prompt.ids[row] != model.config.image_token_index)
        assert torch.allclose(got[row][stay], expected, atol=1e-5)


@pytest.mark.parametrize("part", ["base", "decoder"])
@pytest.mark.parametrize("outer_first", [True, False])
def test_a_part_of_a_pruned_model_cannot_be_pruned_again(part: str, outer_first: bool) -> None:
    model = small_llava()
    inner, spans = (model.model, None) if part == "base" else (model.model.language_model, [[(3, N)]])
    calls = [
        lambda: vlmprune.apply(model, "uniform", keep=0.5),
        lambda: vlmprune.apply(inner, "uniform", keep=0.5, spans=spans),
    ]
    first, second = calls if outer_first else calls[::-1]
    handle = first()
    with pytest.raises(ActiveError, match=r"pruned already.*handle\.remove\(\)"):
        second()
    handle.remove()
    second().remove()
    assert not any("_vlmprune" in module.__dict__ for module in model.modules())


def test_the_base_model_alone() -> None:
    """``LlavaModel``, without a language-model head."""
    model, prompt = small_llava(), make_prompt((1, 1), True)
    with vlmprune.applied(model, "hiprune", keep=0.5):
        expected = prefill(model, prompt).logits
    with vlmprune.applied(model.model, "hiprune", keep=0.5) as handle:
        hidden = prefill(model.model, prompt).last_hidden_state
        assert torch.equal(model.lm_head(hidden), expected)
        assert handle.last.kept_tokens == (8, 8)
