"""FastV's counts, layers, scores and rankings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import contexts
import pytest
import torch

from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.signals import AttentionRows, ColumnMass
from vlmprune.core.sites import Site
from vlmprune.policies.fastv import FastV


def context(policy: FastV, rows: list[torch.Tensor], images: list[tuple[int, ...]], **fields: Any) -> Context:
    """Before the cut of LLaVA-1.5-7B; ``rows[i]`` are the scores of item ``i``, ``images[i]`` its images' lengths."""
    [request] = policy.requests(contexts.LLAVA)
    values = contexts.pad(rows)
    signals = {request.signals[0]: values if policy.score == "mean_all" else values[:, None]}
    here = contexts.decoder([len(row) for row in rows], request.layer, signals, keep=policy.keep)
    numbers = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in images]
    ids = contexts.pad(numbers, -1)
    return replace(here, **{"image_id": ids, "image_lengths": tuple(images), **fields})


def best(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))[:count])


@pytest.mark.parametrize(
    ("n", "share", "count"), [(17, 0.25, 4), (15, 0.4, 6), (25, 0.5, 12), (27, 0.5, 14), (10, 0.01, 1), (3, 0.9, 3)]
)
def test_counts_round_half_to_even(n: int, share: float, count: int) -> None:
    scores = torch.rand(n)
    policy = FastV(keep=share)
    assert contexts.kept_tokens(policy.select(context(policy, [scores], [(n,)]))) == [best(scores, count)]


@pytest.mark.parametrize("score", ["last", "mean_all"])
def test_a_ragged_batch(score: str) -> None:
    rows = [torch.rand(12), torch.rand(20), torch.rand(1)]
    policy = FastV(keep=0.5, score=score)
    here = context(policy, rows, [(12,), (8, 12), (1,)])
    selection = policy.select(here)
    assert contexts.kept_tokens(selection) == [best(rows[0], 6), best(rows[1], 10), [0]]
    assert selection.counts == (6, 10, 1)
    assert torch.equal(selection.scores[1], rows[1])


def test_a_number_of_tokens_is_per_image() -> None:
    rows = [torch.rand(12), torch.rand(20), torch.rand(3)]
    policy = FastV(keep=5)
    here = context(policy, rows, [(12,), (9, 8, 3), (3,)])
    assert contexts.kept_tokens(policy.select(here)) == [best(rows[0], 5), best(rows[1], 13), [0, 1, 2]]
    shorter = replace(here, image_lengths=((30,), (20, 20, 20), (3,)))  # an earlier cut left what there is
    assert policy.select(shorter).counts == (5, 15, 3)


@pytest.mark.parametrize("known", [True, False], ids=["host", "device"])
def test_one_ranking_per_image(known: bool) -> None:
    rows = [torch.rand(12), torch.rand(20)]
    images = [(12,), (9, 8, 3)]
    fields = {} if known else {"image_lengths": ((16,), (12, 12, 12))}
    for keep, counts in [(0.5, [[6], [4, 4, 2]]), (4, [[4], [4, 4, 3]]), ((0.25, 2, 1), [[3], [2, 2, 1]])]:
        policy = FastV(keep=keep, per_image=True)
        here = context(policy, rows, images, **fields)
        expected = []
        for scores, lengths, wanted in zip(rows, images, counts, strict=True):
            start, kept = 0, []
            for length, count in zip(lengths, wanted, strict=True):
                kept += [start + i for i in best(scores[start : start + length], count)]
                start += length
            expected.append(kept)
        selection = policy.select(here)
        assert contexts.kept_tokens(selection) == expected
        assert selection.counts == tuple(map(sum, counts))


def test_ties_go_to_the_lowest_index() -> None:
    policy = FastV(keep=3)
    assert contexts.kept_tokens(policy.select(context(policy, [torch.ones(7)], [(7,)]))) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("layer", "depth", "cut"), [(2 / 32, 32, 2), (2 / 32, 80, 5), (2 / 32, 4, 1), (3, 32, 3), (0.5, 6, 3), (-1, 6, 5)]
)
def test_layers(layer: int | float, depth: int, cut: int) -> None:
    info = replace(contexts.LLAVA, text_depth=depth)
    [request] = FastV(keep=0.5, layer=layer).requests(info)
    assert (request.site, request.layer, request.positions) == (Site.DECODER_LAYER, cut, "keep")
    assert request.signals == (AttentionRows("text", cut - 1, "last"),)
    [request] = FastV(keep=0.5, layer=layer, score="mean_all").requests(info)
    assert request.signals == (ColumnMass("text", cut - 1),)


@pytest.mark.parametrize("layer", [0, 32])
def test_layers_that_cannot_be(layer: int) -> None:
    with pytest.raises(InputError, match="from 1 to 31"):
        FastV(keep=0.5, layer=layer).requests(contexts.LLAVA)


def test_bad_settings() -> None:
    with pytest.raises(InputError, match="score='first' is unknown"):
        FastV(score="first")
    with pytest.raises(BudgetError, match="cuts once; give one, or per_image=True"):
        FastV(keep=(0.5, 0.3))
