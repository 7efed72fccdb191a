"""TransPrune's stages, counts and scores, against plain float64 arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import contexts
import numpy as np
import pytest
import torch

from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.signals import ModuleTransition, ProbeAttention, Signal
from vlmprune.core.sites import Site
from vlmprune.core.transition import Transition
from vlmprune.policies.transprune import TransPrune

PLAIN = TransPrune(keep=0.5)
TEXT = 5  # text tokens in front of the image tokens


def signals(policy: TransPrune, layer: int, lengths: list[int], seed: int = 0) -> dict[Signal, Any]:
    """Random values for the stage before ``layer`` of LLaVA-1.5-7B; item ``i``'s depend on ``seed + i`` only.

    In every recorded sequence ``TEXT`` tokens stand in front of the image tokens, and padding in front of these.
    """
    given: dict[Signal, Any] = {}
    width = max(lengths)
    for number, signal in enumerate(policy.stage_signals(contexts.LLAVA, layer)):
        if isinstance(signal, ProbeAttention):
            rows = torch.zeros(len(lengths), 4, width)  # a filling row in front of every other item
            for item, n in enumerate(lengths):
                empty = (seed + item) % 2
                rows[item, empty:, :n] = draw(seed + item, number, 4 - empty, n)
            given[signal] = rows
            continue
        total = TEXT + width
        ratio, cosine = torch.full((len(lengths), total), 9.0), torch.full((len(lengths), total), -0.9)
        valid = torch.zeros(len(lengths), total, dtype=torch.bool)
        place = torch.zeros(len(lengths), width, dtype=torch.long)
        for item, n in enumerate(lengths):
            start = width - n
            valid[item, start:] = True
            ratio[item, start:], cosine[item, start:] = draw(seed + item, number, 2, TEXT + n) * torch.tensor(
                [[3], [1]]
            )
            cosine[item, start:] = 2 * cosine[item, start:] - 1
            place[item, :n] = torch.arange(start + TEXT, total)
        given[signal] = Transition(ratio, cosine, valid, place)
    return given


def draw(item: int, number: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1000 * item + number))


def stage(policy: TransPrune, layer: int, lengths: list[int], entered: Any = None, seed: int = 0) -> Context:
    here = contexts.decoder(lengths, layer, signals(policy, layer, lengths, seed), keep=policy.keep)
    return replace(here, image_lengths=entered or tuple((n,) for n in lengths))


def expected_scores(policy: TransPrune, context: Context, item: int) -> np.ndarray:
    """The specification's algorithm for one sample, written out plainly."""
    n = context.lengths[item]
    moved, looked_at = np.zeros(n), np.zeros(n)
    for signal, value in context.signals.items():
        if isinstance(signal, ProbeAttention):
            rows = value[item, :, :n].double().numpy()
            looked_at = rows[rows.sum(1) > 0].mean(0)
            continue
        ratio, cosine = (part[item][value.valid[item]].double().numpy() for part in value[:2])
        weight = np.exp(1 - (np.abs(cosine) if policy.direction == "abs" else cosine))
        moved += (ratio * weight / weight.sum())[TEXT:]
    moved, looked_at = moved / (moved.sum() + 1e-8), looked_at / (looked_at.sum() + 1e-8)
    if not policy.use_iga:
        return moved
    return 2 * policy.alpha * moved + 2 * (1 - policy.alpha) * looked_at


@pytest.mark.parametrize(
    "policy",
    [
        PLAIN,
        replace(PLAIN, alpha=0.2),
        replace(PLAIN, direction="abs"),
        replace(PLAIN, use_iga=False),
        replace(PLAIN, accumulate=(2, 8)),
        replace(PLAIN, accumulate=(11,)),
    ],
    ids=["plain", "alpha", "abs", "ttv-only", "two-layers", "late"],
)
@pytest.mark.parametrize("layer", [7, 9, 12])
def test_scores_and_selection(policy: TransPrune, layer: int) -> None:
    lengths = [12, 20, 1]
    context = stage(policy, layer, lengths)
    index = (7, 9, 12).index(layer)
    scores, selection = policy.stage_scores(context, index), policy.select(context)
    for item, n in enumerate(lengths):
        expected = expected_scores(policy, context, item)
        assert np.allclose(scores[item, :n].numpy(), expected, rtol=1e-5, atol=1e-7)
        count = max(1, int(n * (13 / 14, 11 / 14, 0.5)[index]))
        assert contexts.kept_tokens(selection)[item] == sorted(np.argsort(-expected, kind="stable")[:count].tolist())
        assert not scores[item, n:].any()


def test_a_batch_gives_what_single_samples_give() -> None:
    lengths = [12, 20, 3]
    together = PLAIN.select(stage(PLAIN, 9, lengths))
    for item, n in enumerate(lengths):
        single = PLAIN.select(stage(PLAIN, 9, [n], seed=item))
        assert contexts.kept_tokens(single) == [contexts.kept_tokens(together)[item]]


def test_scaling_the_transitions_changes_nothing() -> None:
    context = stage(PLAIN, 12, [14])
    scaled = {
        signal: value._replace(ratio=7 * value.ratio) if isinstance(value, Transition) else value
        for signal, value in context.signals.items()
    }
    assert torch.allclose(PLAIN.stage_scores(context, 2), PLAIN.stage_scores(replace(context, signals=scaled), 2))


def test_nothing_recorded_leaves_the_attention_only() -> None:
    policy = TransPrune(keep=0.5, layers=(3,), accumulate=(5,))
    [request] = policy.requests(contexts.LLAVA)
    assert request.signals == (ProbeAttention(3, "text_after"),)
    context = stage(policy, 3, [9])
    rows = context.signal(request.signals[0])[0]
    assert torch.allclose(policy.stage_scores(context, 0)[0], rows.mean(0) / rows.mean(0).sum())


def test_the_papers_requests() -> None:
    """Layers 7, 9 and 12, and 7 to 12, counted from 1."""
    requests = TransPrune(keep=0.125).requests(contexts.LLAVA)
    assert [(r.site, r.layer, r.positions) for r in requests] == [
        (Site.DECODER_LAYER, layer, "compact") for layer in (7, 9, 12)
    ]
    for request, last in zip(requests, (6, 8, 11), strict=True):
        recorded = [(layer, module) for layer in range(6, last + 1) for module in ("attn", "mlp")]
        assert request.signals == (
            *(ModuleTransition(layer, module) for layer, module in recorded),
            ProbeAttention(request.layer, "text_after"),
        )


@pytest.mark.parametrize(
    ("depth", "stages", "recorded"),
    [
        (40, (9, 11, 15), range(8, 15)),
        (28, (6, 8, 11), range(5, 11)),
        (6, (1, 2, 3), (0, 1, 2)),
        (4, (1, 2, 3), (0, 1, 2)),
    ],
)
def test_depths(depth: int, stages: tuple[int, ...], recorded: Any) -> None:
    info, policy = replace(contexts.LLAVA, text_depth=depth), TransPrune(keep=0.2)
    assert policy.stage_layers(info) == stages
    assert policy.recorded_layers(info) == tuple(recorded)


@pytest.mark.parametrize("share", [0.05, 0.125, 0.3, 0.999])
def test_shares_of_the_stages(share: float) -> None:
    """Straight lines from the paper's ratios at 0.125 to all tokens at 1."""
    policy = TransPrune(keep=share)
    for number, paper in enumerate((0.875, 0.625, 0.125)):
        line = paper + (1 - paper) * (share - 0.125) / 0.875
        assert policy.stage_share(number, share) == pytest.approx(line, abs=1e-6)


@pytest.mark.parametrize("n", [576, 17, 3, 1])
def test_counts_of_a_share(n: int) -> None:
    for share in (0.125, 0.06, 0.5):
        policy = TransPrune(keep=share)
        left = n
        for number, layer in enumerate((7, 9, 12)):
            context = stage(policy, layer, [left], ((n,),))
            [left] = policy.select(context).counts
            assert left == min(context.lengths[0], max(1, int(n * policy.stage_share(number, share))))
    assert [int(576 * r) for r in (0.875, 0.625, 0.125)] == [504, 360, 72]


def test_counts_of_tokens_and_lists() -> None:
    """A number is per image of the sample; shares are of what entered the decoder, not of what is left."""
    entered = ((16, 16), (16,), (4,))
    tokens = TransPrune(keep=8)
    for layer, counts in [(7, (29, 14, 4)), (9, (25, 12, 4)), (12, (16, 8, 4))]:
        assert tokens.stage_counts(stage(tokens, layer, [32, 16, 4], entered), (7, 9, 12).index(layer)) == counts
    listed = TransPrune(keep=(0.5, 3, 0.06), layers=(2, 5, 8))
    for number, counts in enumerate([(16, 8, 2), (6, 3, 3), (1, 0, 0)]):
        context = stage(listed, (2, 5, 8)[number], [32, 16, 4], entered)
        assert listed.stage_counts(context, number) == counts
        assert listed.select(context).out_counts() == counts
    after = stage(listed, 5, [2, 2, 2], entered)  # another policy has cut in between
    assert listed.stage_counts(after, 1) == (2, 2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, "layers is empty"),
        ({"alpha": 1.5}, "alpha=1.5 is out of range"),
        ({"direction": "paper"}, "direction='paper' is unknown"),
        ({"keep": 0.5, "layers": (2, 5)}, "are 2; give a list with one share per stage"),
        ({"keep": (0.5, 0.2)}, "2 entries for 3 stages"),
        ({"keep": (0.5, 0.6, 0.2)}, "rises"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, BudgetError), match=message):
        TransPrune(**settings)


@pytest.mark.parametrize(
    ("settings", "depth", "message"),
    [
        ({"layers": (0.2, 0.21), "keep": (0.5, 0.2)}, 10, "do not increase"),
        ({"layers": (0, 5), "keep": (0.5, 0.2)}, 32, "from 1 to 31"),
        ({"accumulate": (5, 5)}, 32, "accumulate=.* do not increase"),
        ({"accumulate": (40,)}, 32, "out of range"),
        ({}, 3, "3 decoder layers, too few for 3 stages"),
    ],
)
def test_settings_that_do_not_fit_a_model(settings: dict[str, Any], depth: int, message: str) -> None:
    policy, info = TransPrune(**{"keep": 0.3, **settings}), replace(contexts.LLAVA, text_depth=depth)
    with pytest.raises(InputError, match=message):
        policy.requests(info)


def test_variation_of_extreme_values() -> None:
    """Cosines of -1 and 1 and large ratios stay finite, and weights sum to 1 over the valid tokens."""
    ratio, cosine = torch.tensor([[1e6, 1.0, 0.0, 5.0]]), torch.tensor([[-1.0, 1.0, 0.0, math.nan]])
    valid = torch.tensor([[True, True, True, False]])
    got = PLAIN.variation(ratio, cosine, valid)
    weight = np.exp(1 - np.array([-1.0, 1.0, 0.0]))
    assert np.allclose(got[0, :3].numpy(), ratio[0, :3].numpy() * weight / weight.sum(), rtol=1e-5)
    assert got[0, 3] == 0
