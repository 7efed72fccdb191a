"""Signals of a batched tower whose tokens were reduced before, and those that a policy has inside it, against explicit
attention in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_prompts import FamilyPrompt, prefill
from recording import Recording
from torch import Tensor
from tower_plans import Planned, PlannedStep, Steps
from tower_reference import TowerReference, TowerRun
from tower_runs import MERGE, TOWERS, left_behind, reference_of, token_patches, tower_batch, tower_model

import vlmprune
from vlmprune.core import signals as s
from vlmprune.core.attention import AttentionMap
from vlmprune.core.context import Context

STEPS: Steps = (PlannedStep(0, ragged=True), PlannedStep(2, "before", "prune", ragged=True))
BLOCKS = (0, 1, 2, 3)
"""Block 0 attends to all tokens, block 1 behind the first step, 2 and 3 behind both."""
CLS = ("llava", "llava_next", "internvl")


def record(name: str, prompt: FamilyPrompt, signals: tuple[s.Signal, ...]) -> Context:
    """What a policy behind the encoder is given."""
    model, last = tower_model(name), Recording(wanted=signals)
    with vlmprune.applied(model, [Planned(steps=STEPS), last]):
        prefill(model, prompt)
    return last.tape.last


class Expected:
    """Values of the reference's tokens as those of patches and of the LLM's tokens."""

    def __init__(self, name: str, prompt: FamilyPrompt) -> None:
        self.name, self.prompt = name, prompt
        self.reference: TowerReference = reference_of(name, prompt, STEPS)
        [self.run] = self.reference.runs
        self.left = left_behind(name, prompt, self.reference)
        self.made_of = token_patches(name, prompt)

    def patches(self, block: int, values: Callable[[TowerRun, int], Tensor], leaving: bool = False) -> Tensor:
        """``[V, P, ...]``: a patch has the value of its token, a dropped one 0.

        Args:
            values: per view ``[T, ...]`` over the reference's tokens in the block's attention (or behind the block).
        """
        groups = (self.run.groups if leaving else self.run.entering)[block]
        found = []
        for number, view in enumerate(self.run.views):
            own = values(self.run, number)[self.reference.first :]
            spread = own.new_zeros(view.order.numel(), *own.shape[1:])
            for unit in view.order.tolist():
                for side, patch in enumerate(unit):
                    group = groups[number][patch]
                    if group >= 0:
                        spread[patch] = own[group * len(unit) + side]
            found.append(spread)
        return torch.stack(found)

    def tokens(self, patches: Tensor) -> Tensor:
        """``[I, N, ...]``: means over what each token that is left stands for, newlines 0."""
        rows = []
        for groups, made_of in zip(self.left.groups, self.made_of, strict=True):
            each = []
            for group in groups:
                members = [
                    sum((w * patches[view, p] for (view, p), w in made_of[i].items()), patches.new_zeros(()))
                    for i in group
                ]
                each.append(sum(members[1:], members[0]) / len(members) + torch.zeros_like(patches[0, 0]))
            rows.append(torch.stack(each))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def mass(self, block: int, number: int, reduce: str) -> Tensor:
        """``[T]`` attention received by a view's tokens over all of its rows."""
        weights = self.run.attention[block][number][2].mean(0)
        return weights.sum(0) if reduce == "sum" else weights.mean(0)

    def weighted_mass(self, block: int, weights: Tensor | None, reduce: str) -> Tensor:
        """``[V, P]``: rows of patches only; the weights of a token's patches add up, none count its row once."""
        found = []
        for number, view in enumerate(self.run.views):
            matrix = self.run.attention[block][number][2].mean(0)[self.reference.first :, self.reference.first :]
            rows = matrix.new_ones(len(matrix))
            if weights is not None:
                rows = matrix.new_zeros(len(matrix))
                for unit in view.order.tolist():
                    for side, patch in enumerate(unit):
                        group = self.run.entering[block][number][patch]
                        if group >= 0:
                            rows[group * len(unit) + side] += weights[number, patch]
            received = rows @ matrix
            found.append(received if reduce == "sum" else received / rows.sum())
        prefix = torch.zeros(self.reference.first, dtype=torch.float64)
        return self.patches(block, lambda run, number: torch.cat([prefix, found[number]]))


def close(got: Tensor, wish: Tensor, tolerance: float = 2e-6) -> bool:
    """Scores are float32."""
    scale = max(1.0, float(wish.abs().max()))
    return got.shape == wish.shape and bool((got.double() - wish).abs().max() <= tolerance * scale)


@pytest.mark.parametrize("name", TOWERS)
def test_signals_behind_reductions(name: str) -> None:
    prompt = tower_batch(name)
    expected = Expected(name, prompt)
    found: list[s.Signal] = [s.PreProjector()]
    for block in BLOCKS:
        found += [s.ColumnMass("vision", block), s.ColumnMass("vision", block, "sum"), s.Keys("vision", block)]
        found += [s.QK("vision", block), s.Hidden("vision", block, "in"), s.Hidden("vision", block, "out")]
        found += [s.ClsRow(block), s.ClsLogits(block)] if name in CLS else []
    context = record(name, prompt, tuple(found))
    assert context.lengths == tuple(map(len, expected.left.groups))
    for block in BLOCKS:
        wish: dict[s.Signal, Tensor] = {
            s.Keys("vision", block): expected.patches(
                block, lambda run, v, b=block: run.attention[b][v][1].transpose(0, 1).flatten(1)
            ),
            s.Hidden("vision", block, "out"): expected.patches(block, lambda run, v, b=block: run.short[b][v], True),
        }
        if block != 2:  # pruned before it, so that what enters is not what left block 1
            before = block - 1
            if before >= 0:
                wish[s.Hidden("vision", block, "in")] = expected.patches(
                    before, lambda run, v, b=before: run.short[b][v], True
                )
        for reduce in ("mean", "sum"):
            mass = s.ColumnMass("vision", block, reduce)  # type: ignore[arg-type]
            wish[mass] = expected.patches(block, lambda run, v, b=block, r=reduce: expected.mass(b, v, r))
        if name in CLS:
            wish[s.ClsRow(block)] = expected.patches(block, lambda run, v, b=block: run.attention[b][v][2].mean(0)[0])
            wish[s.ClsLogits(block)] = expected.patches(block, lambda run, v, b=block: cls_logits(run, b, v))
        for signal, value in wish.items():
            assert close(context.signal(signal), expected.tokens(value)), signal
        for place, got in enumerate(context.signal(s.QK("vision", block))):
            pairs = expected.patches(block, lambda run, v, b=block, i=place: run.attention[b][v][i].transpose(0, 1))
            assert close(got, pairs.transpose(1, 2), 1e-9)
    other = expected.patches(1, lambda run, v: expected.mass(1, v, "sum"))
    assert not close(context.signal(s.ColumnMass("vision", 3, "sum")), expected.tokens(other))


def cls_logits(run: TowerRun, block: int, view: int) -> Tensor:
    query, key, _ = run.attention[block][view]
    return (query[:, :1] @ key.transpose(1, 2)).mean(0)[0] * query.shape[-1] ** -0.5


@pytest.mark.parametrize("name", TOWERS)
def test_the_projectors_input_behind_reductions(name: str) -> None:
    prompt = tower_batch(name)
    expected = Expected(name, prompt)
    got = record(name, prompt, (s.PreProjector(),)).signal(s.PreProjector())
    [run] = expected.reference.runs
    first = expected.reference.first
    states = run.last if name in (*MERGE, "paligemma") else run.hidden[2 if name in ("llava", "llava_next") else 3]
    patches = states[:, first:]
    if name == "internvl":  # is given the features of a token's patches side by side
        joined = torch.stack([patches[v, view.order].flatten(1) for v, view in enumerate(run.views)])
        units = [[joined[v, u] for u in range(joined.shape[1])] for v in range(len(joined))]
        flat = [unit for view in units for unit in view]
        starts = [sum(map(len, expected.made_of[:i])) for i in range(len(expected.made_of))]
        rows = [
            torch.stack([flat[start + group[0]] for group in groups])
            for start, groups in zip(starts, expected.left.groups, strict=True)
        ]
        assert close(got, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), 1e-9)
        return
    assert close(got, expected.tokens(patches), 1e-9)


@pytest.mark.parametrize("name", TOWERS)
def test_the_attention_map_behind_reductions(name: str) -> None:
    prompt = tower_batch(name)
    expected = Expected(name, prompt)
    context = record(name, prompt, tuple(s.Attention(block) for block in BLOCKS))
    generator = torch.Generator().manual_seed(8)
    for block in BLOCKS:
        given: AttentionMap = context.signal(s.Attention(block))
        shape = (len(expected.run.views), expected.run.views[0].order.numel())
        weights = torch.rand(shape, generator=generator, dtype=torch.float64)
        for rows in (None, weights, torch.where(weights > 0.5, weights, 0)):
            for reduce in ("mean", "sum"):
                assert close(given.column_mass(rows, reduce), expected.weighted_mass(block, rows, reduce))  # type: ignore[arg-type]
        assert not close(given.column_mass(weights), expected.weighted_mass(block, None, "mean"))


INSIDE: Steps = (PlannedStep(0, ragged=True), PlannedStep(2, "before", "prune"))
"""The steps read the attention of blocks 0 and 1."""


@pytest.mark.parametrize("name", TOWERS)
def test_signals_inside_the_tower(name: str) -> None:
    """Keys of a token's patches side by side; attention between tokens as means of rows and sums of columns."""
    prompt, model = tower_batch(name), tower_model(name)
    reference = reference_of(name, prompt, INSIDE)
    [run] = reference.runs
    kinds: list[Any] = [s.KeyMean, s.HeadAttention]
    wanted = [kind(block) for block in (0, 1) for kind in kinds] + [s.Keys("vision", block) for block in (0, 1)]
    policy = Planned(steps=INSIDE, signals=tuple(wanted))
    with vlmprune.applied(model, policy):
        prefill(model, prompt)
    first, unit = reference.first, MERGE.get(name, 1) ** 2
    assert [context.prefix for context in policy.tape.contexts] == [first] * 2
    for block, context in enumerate(policy.tape.contexts):
        for number in range(context.n_items):
            _, key, weights = run.attention[block][number]
            n = context.lengths[number]
            assert len(weights[0]) == first + (n - first) * unit
            for signal, value in ((s.KeyMean(block), key.mean(0)), (s.Keys("vision", block), key.transpose(0, 1))):
                value = value.flatten(1)
                wish = torch.cat([value[:first].repeat(1, unit), value[first:].reshape(n - first, -1)])
                assert close(context.signal(signal)[number, :n], wish, 1e-9)
        check_votes(context, reference, block, unit)


def check_votes(context: Context, reference: TowerReference, block: int, unit: int) -> None:
    """Rounds of votes along a block's attention, with and without tokens that are out."""
    generator = torch.Generator().manual_seed(3)
    start = torch.rand(context.valid.shape, generator=generator, dtype=torch.float64)
    alive = context.valid & (torch.rand(context.valid.shape, generator=generator) > 0.3)
    alive[:, : context.prefix + 1] = True
    given = context.signal(s.HeadAttention(block))
    for rounds in (1, 3):
        free, some = given.pagerank(rounds, start * context.valid), given.pagerank(rounds, start, alive)
        for item, n in enumerate(context.lengths):
            weights = reference.runs[0].attention[block][item][2]
            seen = seen_patches(reference, context, item, unit)
            every = torch.ones(n, dtype=torch.bool)
            assert close(free[item, :, :n], votes(weights, start[item, :n], every, seen, unit, context.prefix, rounds))
            wish = votes(weights, start[item, :n], alive[item, :n], seen, unit, context.prefix, rounds)
            assert close(some[item, :, :n], wish)


def seen_patches(reference: TowerReference, context: Context, item: int, unit: int) -> Tensor:
    """``[n, unit]`` bool: patches that are no padding; pinned tokens are the first to hold some."""
    view = reference.runs[0].views[item]
    whole = torch.ones(context.lengths[item], unit, dtype=torch.bool)
    if context.pinned is None:
        return whole
    padded = ~view.seen.all(1)  # these stayed as they were
    assert int(context.pinned[item].sum()) == int(padded.sum())
    whole[context.pinned[item, : len(whole)]] = view.seen[padded]
    return whole


def votes(weights: Tensor, start: Tensor, alive: Tensor, seen: Tensor, unit: int, prefix: int, rounds: int) -> Tensor:
    """``[H, n]`` by the matrix between tokens, from attention ``[H, T, T]`` between patches."""
    there = (seen & alive[:, None])[prefix:].flatten()
    there = torch.cat([alive[:prefix], there])
    matrix = weights * (there[:, None] & there)
    matrix = matrix / matrix.sum(2, keepdim=True).clamp_min(1e-300)
    owner = torch.cat([torch.arange(prefix), torch.arange(prefix, len(start)).repeat_interleave(unit)])
    to_token = torch.nn.functional.one_hot(owner, len(start)).double()
    rows = to_token * there[:, None]
    rows = rows / rows.sum(0).clamp_min(1)
    between = rows.T @ matrix @ to_token  # rows: means, columns: sums
    scores = (start * (rows.sum(0) > 0)).expand(len(weights), -1)
    for _ in range(rounds):
        scores = torch.einsum("hn,hnm->hm", scores, between)
    return scores
