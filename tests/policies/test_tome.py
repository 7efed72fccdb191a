"""ToMe against a slow definition of its own, over whole towers, and at its limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import contexts
import numpy as np
import pytest
import torch
from torch import Tensor

from vlmprune.core import config
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError, SignalError
from vlmprune.core.flops import tower_flops
from vlmprune.core.info import ModelInfo
from vlmprune.core.selection import Selection
from vlmprune.core.signals import KeyMean
from vlmprune.policies.tome import ToMe

TOWER = replace(contexts.LLAVA, vision_depth=6, feature_block=4)
GRID = replace(TOWER, grid=(10, 10), tokens_per_image=100)


def context_of(metric: Tensor, block: int = 0, info: ModelInfo = TOWER, **fields: Any) -> Context:
    """Equal views with the given metric ``[I, N, c]``."""
    return contexts.vision_block([metric.shape[1]] * len(metric), block, {KeyMean(block): metric}, info, **fields)


def blocks(policy: ToMe, info: ModelInfo, lengths: list[int], seed: int = 0) -> Iterator[tuple[Context, Selection]]:
    """A tower's blocks one after the other on views of so many tokens: what each is given and what it makes of it.

    The metric is a projection of the tokens, which change by the merges alone.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, sizes, now = torch.randn(len(lengths), max(lengths), 8, generator=generator), None, tuple(lengths)
    for request in policy.requests(info):
        block = request.layer or 0
        metric = tokens @ torch.randn(8, 5, generator=generator)
        context = contexts.vision_block(
            now, block, {KeyMean(block): metric}, info, policy.keep, entered=tuple(lengths), sizes=sizes
        )
        selection = policy.select(context)
        yield context, selection
        sizes = summed(selection, torch.ones(context.valid.shape) if sizes is None else sizes)
        tokens, now = selection.apply(tokens), selection.out_counts()


def summed(selection: Selection, sizes: Tensor) -> Tensor:
    return (selection if selection.is_pruning else replace(selection, mode="sum")).apply(sizes)


def left(policy: ToMe, info: ModelInfo, lengths: list[int]) -> tuple[int, ...]:
    """Tokens of each view behind the tower's last merge."""
    counts = tuple(lengths)
    for _, selection in blocks(policy, info, lengths):
        counts = selection.out_counts()
    return counts


def slow_groups(metric: Tensor, r: int, prefix: int) -> list[list[int]]:
    """Tokens of every output of one view, by the definition: loops and float64, no ties."""
    unit = metric.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    n = len(unit)
    sources = [token for token in range(0, n, 2) if token >= prefix]
    targets = [token for token in range(1, n, 2) if token >= prefix]
    best = {a: max(targets, key=lambda b: unit[a] @ unit[b]) for a in sources}
    ranked = sorted(sources, key=lambda a: -(unit[a] @ unit[best[a]]))
    merged = ranked[: min(r, (n - prefix) // 2)]
    stay = ranked[len(merged) :] if prefix == 0 else sorted(ranked[len(merged) :])
    order = [*range(prefix), *stay, *targets]
    return [sorted([token, *(a for a in merged if best[a] == token)]) for token in order]


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(("n", "r"), [(2, 1), (3, 1), (3, 9), (8, 3), (17, 4), (24, 99), (31, 11)])
def test_it_merges_what_the_definition_merges(n: int, r: int, prefix: int) -> None:
    metric = torch.randn(3, n + prefix, 6, generator=torch.Generator().manual_seed(n + r))
    selection = ToMe(r=r).select(context_of(metric, info=replace(TOWER, prefix_tokens=prefix)))
    assert selection.counts == (n + prefix - min(r, n // 2),) * 3
    for row, ids in zip(metric, selection.group_id, strict=True):
        found = [(ids == group).nonzero()[:, 0].tolist() for group in range(selection.n_outputs)]
        assert found == slow_groups(row, r, prefix)


@pytest.mark.parametrize("policy", [ToMe(r=5), ToMe(keep=0.3), ToMe(r=3, order="original")])
def test_every_token_is_counted_once_in_every_block(policy: ToMe) -> None:
    lengths = [41, 18, 30]
    groups, last = None, None
    for context, selection in blocks(policy, TOWER, lengths):
        sizes = torch.ones(context.valid.shape) if context.sizes is None else context.sizes
        total = summed(selection, sizes)
        assert total.sum(1).tolist() == [float(n) for n in lengths]
        assert torch.equal(total > 0, selection.out_valid())
        last = selection.source_map() if last is None else last.compose(selection.source_map())
        groups = (last.weights > 0).sum(1)
    assert groups is not None
    assert groups.sum(1).tolist() == lengths and groups.max() == 1


def test_values_follow_their_groups() -> None:
    """Unmerging gives each group's weighted mean; pooling by size is as if nothing had been merged."""
    generator = torch.Generator().manual_seed(1)
    metric, x = torch.randn(2, 25, 6, generator=generator), torch.randn(2, 25, 7, generator=generator)
    sizes = torch.randint(1, 5, (2, 25), generator=generator).float()
    selection = ToMe(r=9).select(context_of(metric, sizes=sizes))
    out, total = selection.apply(x), summed(selection, sizes)
    pooled = (out * total[..., None]).sum(1) / total.sum(1, keepdim=True)
    torch.testing.assert_close(pooled, (x * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True))
    back = selection.unmerge(out)
    for item in range(2):
        for token in range(25):
            same = selection.group_id[item] == selection.group_id[item, token]
            weights = sizes[item, same]
            torch.testing.assert_close(back[item, token], (x[item, same] * weights[:, None]).sum(0) / weights.sum())


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_equal_tokens(value: float) -> None:
    """The first r tokens at even places go to the first one at an odd place; a norm of 0 gives no NaN."""
    metric = torch.full((1, 12, 4), value)
    selection = ToMe(r=3).select(context_of(metric, info=replace(TOWER, prefix_tokens=1)))
    assert selection.group_id.tolist() == [[0, 3, 3, 4, 3, 5, 3, 6, 1, 7, 2, 8]]
    x = torch.full((1, 12, 2), 0.3)
    assert torch.equal(selection.apply(x), torch.full((1, 9, 2), 0.3))
    assert summed(selection, torch.ones(1, 12)).tolist() == [[1, 1, 1, 4, 1, 1, 1, 1, 1]]


def test_half_precision_keys_and_features() -> None:
    generator = torch.Generator().manual_seed(2)
    metric = torch.randn(2, 30, 8, generator=generator).to(torch.bfloat16)
    selection = ToMe(r=6).select(context_of(metric))
    assert torch.equal(selection.group_id, ToMe(r=6).select(context_of(metric.float())).group_id)
    x = torch.randn(2, 30, 4, generator=generator).to(torch.bfloat16)
    assert selection.apply(x).dtype == torch.bfloat16 and selection.weights.dtype == torch.float32
    exact = replace(selection, weights=selection.weights.double()).apply(x.double())
    torch.testing.assert_close(selection.apply(x), exact.to(torch.bfloat16), atol=1e-2, rtol=1e-2)


def test_nothing_to_merge() -> None:
    assert not ToMe(r=0).reduces(TOWER) and not ToMe(r=[0, 0]).reduces(TOWER) and not ToMe().reduces(TOWER)
    assert ToMe(r=0).requests(TOWER) == ToMe().requests(TOWER) == ()
    one = ToMe(r=4).select(context_of(torch.randn(2, 2, 4)))  # a CLS token and one more
    assert one.is_pruning and one.kept.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("order", ["tome", "original"])
def test_order(order: Any) -> None:
    metric = torch.randn(1, 21, 6, generator=torch.Generator().manual_seed(3))
    selection = ToMe(r=5, order=order).select(context_of(metric))
    first = selection.anchors()[0].tolist()
    assert (first == sorted(first)) == (order == "original")
    assert selection.n_outputs == 16


# Budgets.


@pytest.mark.parametrize("lengths", [[101, 101], [101, 38, 6]])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.99, 1, 12, 60])
def test_a_budget_is_what_is_left(keep: Any, lengths: list[int]) -> None:
    policy = ToMe(keep=keep)
    counts = left(policy, TOWER, lengths)
    for n, count in zip(lengths, counts, strict=True):
        wanted = policy.budget.count(n - 1)
        least = n - 1
        for _ in range(5):  # blocks 0 to 4 merge at most half
            least -= least // 2
        assert count == 1 + max(wanted, least)


def test_a_budget_is_spread_evenly() -> None:
    assert ToMe(keep=0.5).plan(TOWER, ToMe(keep=0.5).budget, 100) == (10, 10, 10, 10, 10)
    assert ToMe(keep=47).plan(TOWER, ToMe(keep=47).budget, 100) == (11, 11, 11, 10, 10)
    requests = ToMe(keep=97).requests(GRID)
    assert [request.layer for request in requests] == [0, 1, 2]  # the others have nothing to do
    assert [request.layer for request in ToMe(keep=97).requests(TOWER)] == [0, 1, 2, 3, 4]


def test_a_budget_in_the_first_blocks() -> None:
    early = ToMe(keep=0.5, first_blocks=1)
    assert [request.layer for request in early.requests(GRID)] == [0]
    assert left(early, GRID, [101, 101]) == left(ToMe(keep=0.5), GRID, [101, 101]) == (51, 51)
    assert left(ToMe(keep=0.3, first_blocks=2), TOWER, [101, 38]) == (31, 12)
    assert left(ToMe(keep=0.3, first_blocks=9), TOWER, [101]) == (31,)  # the tower has five that feed the projector
    assert left(early, contexts.QWEN, [16, 6]) == (8, 3)
    with pytest.raises(BudgetError, match="the one block .* leave 50 of 100 tokens .first_blocks=1 leaves"):
        ToMe(keep=0.4, first_blocks=1).check_count(GRID)
    notes = [selection.notes for _, selection in blocks(ToMe(keep=0.2, first_blocks=2), TOWER, [101])]
    assert notes[0] == () and "leave 25 of 100" in notes[1][0]
    dense = tower_flops(GRID, [101] * 6, [101] * 6)
    flops = ToMe(keep="flops:0.7", first_blocks=2)
    tokens = [101, *np.cumsum([-number for number in flops.plan(GRID, flops.budget, 100)]) + 101]
    tokens += [tokens[-1]] * (7 - len(tokens))
    assert 0.69 < tower_flops(GRID, tokens[:-1], tokens[1:]) / dense <= 0.7


@pytest.mark.parametrize("share", [0.9, 0.75, 0.5, 0.35])
@pytest.mark.parametrize("info", [TOWER, replace(contexts.QWEN, vision_depth=8, feature_block=7)])
def test_flops_are_met_within_one_token(share: float, info: ModelInfo) -> None:
    n, unit, prefix = 100, info.merge_unit, info.prefix_tokens
    policy = ToMe(keep=f"flops:{share}")

    def cost(taken: tuple[int, ...]) -> float:
        tokens = [n]
        for number in (*taken, *(0,) * ((info.vision_depth or 0) - len(taken))):
            tokens.append(tokens[-1] - number)
        patches = [prefix + unit * number for number in tokens]
        return tower_flops(info, patches[:-1], patches[1:]) or 0.0

    taken = policy.plan(info, policy.budget, n)
    assert max(taken) - min(taken) <= 1 or taken[-1] < taken[0]  # even, unless half of the tokens is the limit
    dense = cost(())
    assert cost(taken) <= share * dense
    fewer = list(taken)
    fewer[max(block for block, number in enumerate(taken) if number == max(taken))] -= 1
    assert cost(tuple(fewer)) > share * dense
    counts = left(policy, info, [n + prefix])
    assert counts == (n + prefix - sum(taken),)


def test_budgets_out_of_reach() -> None:
    with pytest.raises(BudgetError, match="5 blocks .* merge half each leave 4 of 100 tokens; ask for more than that"):
        ToMe(keep=0.02).check_count(GRID)
    with pytest.raises(BudgetError, match=r"cost 0\.\d+ of the dense tower's FLOPs"):
        ToMe(keep="flops:0.05").check_count(GRID)
    with pytest.raises(BudgetError, match="100 visual tokens per image"):
        ToMe(keep=101).check_count(GRID)
    for policy in (ToMe(keep=0.04), ToMe(keep="flops:0.5"), ToMe(r=50), ToMe()):
        policy.check_count(GRID)
    ToMe(keep=0.02).check_count(TOWER)  # how many tokens there are is not known yet
    notes = [selection.notes for _, selection in blocks(ToMe(keep=0.02), TOWER, [101, 20])]
    assert notes[:-1] == [()] * 4
    assert len(notes[-1]) == 1 and "keep=0.02 is out of reach" in notes[-1][0] and "leave 4 of 100" in notes[-1][0]
    assert all(not selection.notes for _, selection in blocks(ToMe(keep=0.2), TOWER, [101, 20]))


def test_windows() -> None:
    with pytest.raises(BudgetError, match="attends in windows"):
        ToMe(keep=64).check_count(contexts.QWEN)
    for policy in (ToMe(keep=0.5), ToMe(r=1), ToMe(keep="flops:0.5")):
        policy.check_count(contexts.QWEN)
    whole, edge = left(ToMe(keep=0.5), contexts.QWEN, [16, 6])
    assert (whole, edge) == (8, 3)


def test_a_share_that_windows_miss_is_noted() -> None:
    for keep, missed in ((0.5, False), (0.33, False), (0.22, True), (0.05, True)):
        *_, (_, last) = blocks(ToMe(keep=keep), contexts.QWEN, [16] * 12 + [4])
        assert bool(last.notes) == missed, keep
    *_, (_, last) = blocks(ToMe(keep=0.05), contexts.QWEN, [16] * 12 + [4])
    assert "13 of 196 tokens are left where keep=0.05 asks for 10" in last.notes[0]
    *_, (_, other) = blocks(ToMe(keep=0.05), replace(contexts.QWEN, full_attention_blocks=None), [16] * 13)
    assert not other.notes


def test_flops_of_windows_count_attention_over_the_view() -> None:
    """A view of 16 windows whose blocks 1 and 3 attend to all of it."""
    info = replace(contexts.QWEN, vision_depth=4, feature_block=3, full_attention_blocks=(1, 3), view_windows=16.0)
    policy, n, windows = ToMe(keep="flops:0.6"), 16, 16

    def cost(taken: tuple[int, ...]) -> float:
        total, left = 0.0, n
        for block, number in enumerate(taken):
            attended, passed = 4 * left * windows, 4 * (left - number) * windows
            reach = attended if block in (1, 3) else 4 * left
            total += 8 * attended * info.vision_hidden**2 + 4 * attended * reach * info.vision_hidden
            total += (6 if info.vision_gated else 4) * passed * info.vision_hidden * info.vision_ffn
            left -= number
        return total

    taken = policy.plan(info, policy.budget, n)
    dense = cost((0,) * 4)
    fewer = list(taken)
    fewer[max(block for block, number in enumerate(taken) if number == max(taken))] -= 1
    assert cost(taken) <= 0.6 * dense < cost(tuple(fewer))
    assert policy.plan(replace(info, view_windows=1.0), policy.budget, n) != taken


def test_sizes_of_the_tower_must_be_known() -> None:
    unknown = replace(GRID, vision_hidden=None)
    with pytest.raises(BudgetError, match="sizes of the vision tower .* are not known"):
        ToMe(keep="flops:0.5").check_count(unknown)
    assert ToMe(r=4).selection_flops(unknown, 100, 96) is None
    with pytest.raises(InputError, match="has no vision tower"):
        ToMe(r=4).requests(replace(TOWER, vision_depth=None))


# Schedules and settings.


def test_r_counts_over_the_whole_tower() -> None:
    """The tilt runs over all blocks, but those behind the projector's do not merge."""
    policy = ToMe(r=(4, -1.0))
    assert policy.schedule(6) == (8, 6, 4, 3, 1, 0) and policy == ToMe(r=4, inflect=-1.0)
    assert [request.layer for request in policy.requests(TOWER)] == [0, 1, 2, 3, 4]
    assert left(policy, TOWER, [101, 60]) == (101 - 22, 60 - 22)
    assert left(ToMe(r=[7, 0, 5, 1, 1, 50]), TOWER, [101]) == (101 - 14,)
    assert [request.layer for request in ToMe(r=(7, 0, 5)).requests(TOWER)] == [0, 2]
    assert ToMe(r=3).schedule(1) == (3,) and ToMe(r=3, inflect=0.5).schedule(1) == (1,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": -1}, "r=-1 is no schedule"),
        ({"r": (8, -1)}, r"r=\(8, -1\) is no schedule"),
        ({"r": 2.5}, "is no schedule"),
        ({"r": True}, "is no schedule"),
        ({"r": ()}, "is no schedule"),
        ({"r": (8, 2.0)}, "inflect=2.0"),
        ({"r": (8, 7), "inflect": 0.5}, "inflect=0.5"),
        ({"inflect": 0.5}, "inflect=0.5"),
        ({"r": 8, "keep": 0.5}, "both say how much"),
        ({"keep": (0.5, 0.4)}, "one budget for all blocks"),
        ({"keep": 0.5, "first_blocks": 0}, "first_blocks=0 goes with keep"),
        ({"keep": 0.5, "first_blocks": 1.5}, "first_blocks=1.5"),
        ({"keep": 0.5, "first_blocks": True}, "first_blocks=True"),
        ({"r": 4, "first_blocks": 1}, "first_blocks=1 goes with keep, not with r"),
        ({"r": 1, "order": "spatial"}, "order='spatial' is unknown"),
        ({"r": 1, "matching": "best"}, "matching='best' is unknown"),
        ({"r": 1, "matching": "kth"}, "needs a k from 2"),
        ({"r": 1, "matching": "kth", "k": 1}, "needs a k from 2"),
        ({"r": 1, "k": 3}, "others none"),
        ({"keep": 0.5, "matching": "kth", "k": 3}, "needs r"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ToMe(**settings)


@pytest.mark.parametrize("r", [4, (8, 7), (8, 7, 0), (16, -0.5), np.int64(4), [3, 2]])
def test_r_survives_configs(r: Any) -> None:
    policy = ToMe(r=r)
    again = config.from_dict(config.to_dict(policy))
    assert again == policy and hash(again) == hash(policy)
    if not isinstance(r, np.generic):
        assert config.build("tome", {"r": list(r) if isinstance(r, tuple) else r}) == policy


def test_selection_flops() -> None:
    width, channels = contexts.WIDTH, contexts.WIDTH // contexts.HEADS
    flops = ToMe(r=4).selection_flops(contexts.LLAVA, 25, 21)
    assert flops == 25 * 3 * (width + channels) + 2 * 13 * 12 * channels
    assert ToMe(r=4).selection_flops(contexts.LLAVA, 25, 25) == 0.0


# Ablations.


def test_random_sources() -> None:
    metric = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(4))
    policy = ToMe(r=6, matching="random")
    selection = policy.select(context_of(metric, seeds=(7, 8)))
    again = policy.select(context_of(metric, seeds=(7, 8)))
    other = policy.select(context_of(metric, 1, seeds=(7, 8)))
    assert torch.equal(selection.group_id, again.group_id)
    assert not torch.equal(selection.group_id, other.group_id)  # every block draws anew
    unit = torch.nn.functional.normalize(metric.double(), dim=2)
    for item in range(2):
        ids = selection.group_id[item]
        anchors = {int(group): (ids == group).nonzero()[:, 0].tolist() for group in ids.unique()}
        assert selection.counts == (14, 14) and anchors[0] == [0]
        for tokens in (tokens for tokens in anchors.values() if len(tokens) > 1):
            # All but one of a group were drawn; each is nearest to that one among all that were not drawn.
            kept = [rest[0] for rest in anchors.values() if len(rest) == 1 and rest != [0]]
            assert any(
                all(unit[item, a] @ unit[item, b] >= (unit[item, kept] @ unit[item, a]).max() for a in tokens if a != b)
                for b in tokens
            )
    with pytest.raises(SignalError, match="is_random"):
        policy.select(context_of(metric))
    assert policy.is_random(TOWER) and not ToMe(r=6).is_random(TOWER)


def test_kth_groups_of_ragged_views() -> None:
    policy = ToMe(r=[1], matching="kth", k=3)
    lengths = [12, 2, 8]
    metric = torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(5))
    selection = policy.select(contexts.vision_block(lengths, 0, {KeyMean(0): metric}, TOWER))
    assert selection.counts == (1 + 3, 2, 1 + 2)
    ids = selection.group_id
    assert ids[0, [0, 3, 6, 9]].tolist() == [0, 1, 2, 3] and ids[0, 10:].tolist() == [-1, -1]
    assert ids[1].tolist() == [0, 1] + [-1] * 10  # too few for a group
    assert ids[2, [0, 3, 6]].tolist() == [0, 1, 2] and ids[2, 7:].tolist() == [-1] * 5
    pinned = torch.zeros(3, 12, dtype=torch.bool)
    pinned[0, 11] = True
    kept = policy.select(contexts.vision_block(lengths, 0, {KeyMean(0): metric}, TOWER, pinned=pinned))
    assert (
        kept.counts == (5, 2, 3)
        and kept.group_id[0, 10] == -1
        and (kept.group_id[0] == kept.group_id[0, 11]).sum() == 1
    )
