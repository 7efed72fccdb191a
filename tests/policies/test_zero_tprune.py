"""Zero-TPrune against a slow definition of its own, and its budgets over whole towers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import contexts
import numpy as np
import pytest
import torch
from torch import Tensor

from vlmprune.core import config
from vlmprune.core.attention import AttentionHeads, DenseHeads, StreamedHeads
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.flops import tower_flops
from vlmprune.core.info import ModelInfo
from vlmprune.core.signals import HeadAttention, KeyMean, Keys
from vlmprune.policies.zero_tprune import ZeroTPrune

DEIT = replace(contexts.LLAVA, vision_depth=12, feature_block=11, vision_hidden=384, vision_heads=6, vision_ffn=1536)
GRID = replace(DEIT, grid=(14, 14), tokens_per_image=196)
LAYER = 2


def random_attention(n: int, heads: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[H, n, n]`` of which some columns get much."""
    generator = torch.Generator().manual_seed(seed)
    favour = torch.randn(heads, 1, n, generator=generator, dtype=dtype)
    return (0.7 * favour + torch.randn(heads, n, n, generator=generator, dtype=dtype)).softmax(2)


def random_keys(n: int, heads: int = 3, seed: int = 1) -> Tensor:
    """``[n, H * 4]``."""
    return torch.randn(n, heads * 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context_of(
    attention: Tensor | AttentionHeads, keys: Tensor, prefix: int = 1, keep: Any = 1.0, **fields: Any
) -> Context:
    """One view, or equal views, before block 2 of DeiT-S."""
    heads = (
        DenseHeads(attention if attention.ndim == 4 else attention[None])
        if isinstance(attention, Tensor)
        else attention
    )
    keys = keys if keys.ndim == 3 else keys[None]
    info = replace(DEIT, prefix_tokens=prefix, has_cls=prefix > 0)
    mean = keys.unflatten(2, (-1, 4)).mean(2)
    signals = {HeadAttention(LAYER - 1): heads, Keys("vision", LAYER - 1): keys, KeyMean(LAYER - 1): mean}
    return contexts.vision_block([keys.shape[1]] * len(keys), LAYER, signals, info, keep, **fields)


def one_layer(**settings: Any) -> ZeroTPrune:
    return ZeroTPrune(**{"layers": (LAYER,), "s_prune": 0, "keep_rates": 1.0, "iters": 5, **settings})


def kept(policy: ZeroTPrune, context: Context) -> list[int]:
    rows = contexts.kept_tokens(policy.select(context))
    assert len(rows) == 1
    return rows[0]


def slow_importance(
    attention: np.ndarray, prefix: int, iters: int, boost: bool, v_min: float, v_max: float
) -> np.ndarray:
    """Importance of the tokens of one view, by the definition."""
    heads, n, _ = attention.shape
    start = np.ones(n)
    if boost and prefix:
        start[0] = math.sqrt(n)
    start *= n / start.sum()
    scores = np.stack([start] * heads)
    for _ in range(iters):
        scores = np.einsum("hj,hji->hi", scores, attention)
    variance = scores[:, prefix:].var(axis=1)
    passed = [h for h in range(heads) if v_min <= variance[h] <= v_max] or list(range(heads))
    return np.sqrt((scores[passed] ** 2).mean(axis=0))


def slow_layer(attention: Tensor, keys: Tensor, prefix: int, policy: ZeroTPrune) -> list[int]:
    """Tokens that one pruning layer keeps, without ties."""
    full, n = attention.numpy(), attention.shape[1]
    options = (policy.cls_boost, policy.v_min, policy.v_max)
    first = slow_importance(full, prefix, 1, *options)
    order = sorted(range(prefix, n), key=lambda token: -first[token])
    m = len(order)
    if policy.partition == "seq_u":
        group_b, group_a = order[: math.ceil(m / 2)], order[math.ceil(m / 2) :]
    elif policy.partition == "seq_i":
        group_a, group_b = order[: m // 2], order[m // 2 :]
    elif policy.partition == "alternate":
        group_b, group_a = order[0::2], order[1::2]
    else:
        group_a = group_b = order[::-1]
    value = keys.numpy()

    def nearness(a: int, b: int) -> float:
        if policy.metric == "cosine":
            return value[a] @ value[b] / np.linalg.norm(value[a]) / np.linalg.norm(value[b])
        if policy.metric == "dot":
            return value[a] @ value[b]
        return -np.linalg.norm(value[a] - value[b], ord=2 if policy.metric == "euclidean" else 1)

    best = {a: max(round(nearness(a, b), 12) for b in group_b if b != a) for a in group_a}
    removed = sorted(group_a, key=lambda a: -best[a])[: min(policy.s_prune, m // 2)]
    rest = [token for token in range(n) if token not in removed]
    cut = full[:, rest][:, :, rest]
    importance = slow_importance(cut / cut.sum(2, keepdims=True), prefix, policy.iters, *options)
    number = max(1, math.floor(policy.keep_rates * (len(rest) - prefix)))
    ranked = sorted(range(prefix, len(rest)), key=lambda place: -importance[place])
    return [*range(prefix), *sorted(rest[place] for place in ranked[:number])]


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"partition": "seq_i", "iters": 30},
        {"partition": "alternate", "cls_boost": False},
        {"partition": "none", "s_prune": 3},
        {"metric": "dot", "v_max": 0.1},
        {"metric": "euclidean", "iters": 1},
        {"metric": "manhattan", "partition": "none", "keep_rates": 0.04},
        {"s_prune": 99, "keep_rates": 0.9},
    ],
)
def test_it_keeps_what_the_definition_keeps(settings: dict[str, Any], prefix: int) -> None:
    policy = one_layer(**{"s_prune": 6, "keep_rates": 0.7, **settings})
    for n in (26, 27):
        attention, keys = random_attention(n + prefix, seed=n), random_keys(n + prefix, seed=n)
        assert kept(policy, context_of(attention, keys, prefix)) == slow_layer(attention, keys, prefix, policy)


# Votes.


@pytest.mark.parametrize("boost", [True, False])
def test_votes_are_neither_lost_nor_made(boost: bool) -> None:
    context = context_of(random_attention(20), random_keys(20))
    policy = one_layer(cls_boost=boost)
    for iters in (0, 1, 2, 9):
        scores = policy.head_scores(context, iters)
        torch.testing.assert_close(scores.sum(2), torch.full((1, 3), 20.0, dtype=torch.float64))
    start = policy.head_scores(context, 0)[0, 0]
    torch.testing.assert_close(start[0] / start[1], torch.tensor(math.sqrt(20) if boost else 1.0, dtype=torch.float64))
    alive = torch.arange(20)[None] < 13
    cut = policy.head_scores(context, 4, alive)
    torch.testing.assert_close(cut.sum(2), torch.full((1, 3), 13.0, dtype=torch.float64))
    assert not cut[:, :, 13:].any()


def test_one_round_is_the_mean_of_the_columns() -> None:
    attention = random_attention(20)
    scores = one_layer(cls_boost=False).head_scores(context_of(attention, random_keys(20)), 1)
    torch.testing.assert_close(scores[0], attention.mean(1) * 20)


def test_many_rounds_reach_the_left_eigenvector() -> None:
    attention = random_attention(20)
    scores = one_layer().head_scores(context_of(attention, random_keys(20)), 200)[0]
    assert ((attention.mT @ scores[..., None])[..., 0] - scores).abs().max() < 1e-5


def test_attention_to_all_alike_ranks_by_index() -> None:
    context = context_of(torch.full((2, 13, 13), 1 / 13, dtype=torch.float64), random_keys(13))
    policy = one_layer(keep_rates=0.5, cls_boost=False)
    fused = policy.importance(context, 5)
    torch.testing.assert_close(fused.importance, torch.ones(1, 13, dtype=torch.float64))
    assert fused.variance.max() < 1e-12 and fused.kept.all()  # no head passes, so all count
    exact = context_of(torch.full((2, 17, 17), 1 / 16, dtype=torch.float64), random_keys(17), prefix=1)
    assert kept(policy, exact) == list(range(9))


def test_plain_mean_of_the_heads() -> None:
    attention = random_attention(20)
    attention[1] = 1 / 20  # rejected: its scores do not vary
    context = context_of(attention, random_keys(20))
    scores = one_layer().head_scores(context, 3)
    fused = one_layer(fusion="mean").importance(context, 3)
    assert fused.kept.tolist() == [[True, False, True]]
    torch.testing.assert_close(fused.importance, scores[:, [0, 2]].mean(1))
    torch.testing.assert_close(one_layer().importance(context, 3).importance, scores[:, [0, 2]].square().mean(1).sqrt())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_queries_and_keys_in_place_of_the_matrix(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(1, 2, 40, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    dense = DenseHeads((query @ key.mT / 2).softmax(-1))
    keys = key[0].transpose(0, 1).flatten(1)
    full = context_of(dense, keys)
    streamed = context_of(StreamedHeads(query.to(dtype), key.to(dtype)), keys.float())
    policy = one_layer(s_prune=5, keep_rates=0.6)
    alive = torch.rand(1, 40, generator=generator) < 0.8
    for mask in (None, alive):
        want = policy.importance(full, 5, mask).importance
        got = policy.importance(streamed, 5, mask).importance.double()
        torch.testing.assert_close(got, want, atol=0, rtol=tolerance)
    if dtype == torch.float32:
        assert kept(policy, streamed) == kept(policy, full)


# What stays.


def test_a_permutation_of_the_tokens_permutes_what_is_kept() -> None:
    attention, keys = random_attention(24), random_keys(24)
    order = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(23, generator=torch.Generator().manual_seed(2))]
    )
    policy = one_layer(s_prune=4, keep_rates=0.6)
    before = kept(policy, context_of(attention, keys))
    after = kept(policy, context_of(attention[:, order][:, :, order], keys[order]))
    assert sorted(order[after].tolist()) == before


def test_of_two_equal_tokens_the_less_important_goes() -> None:
    attention, keys = random_attention(25), random_keys(25)
    policy = one_layer(s_prune=1)
    first = policy.importance(context_of(attention, keys), 1).importance[0, 1:]
    ranked = (1 + first.argsort(descending=True)).tolist()
    for high, low in ((ranked[0], ranked[-1]), (ranked[11], ranked[12]), (ranked[3], ranked[15])):
        twins = keys.clone()
        twins[low] = 2.5 * keys[high]  # the cosine is 1 all the same
        assert kept(policy, context_of(attention, twins)) == [token for token in range(25) if token != low]


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_ends_of_the_range(prefix: int) -> None:
    attention, keys = random_attention(20), random_keys(20)
    context = context_of(attention, keys, prefix)
    assert kept(one_layer(), context) == list(range(20)) and not one_layer().reduces(DEIT)
    assert one_layer().requests(DEIT) == ()
    least = kept(one_layer(keep_rates=0.001), context)
    assert least[:-1] == list(range(prefix)) and len(least) == prefix + 1
    few = context_of(attention[:, : prefix + 1, : prefix + 1], keys[: prefix + 1], prefix)
    assert kept(one_layer(s_prune=5, keep_rates=0.5), few) == list(range(prefix + 1))


def test_pinned_tokens_are_part_of_the_budget() -> None:
    attention, keys = random_attention(25), random_keys(25)
    pinned = torch.zeros(1, 25, dtype=torch.bool)
    pinned[0, [3, 4, 24]] = True
    policy = ZeroTPrune(keep=10, layers=(LAYER,), s_prune=2)
    tokens = kept(policy, context_of(attention, keys, keep=10, pinned=pinned))
    assert len(tokens) == 11 and {0, 3, 4, 24} <= set(tokens)
    crowded = torch.arange(25)[None] >= 5
    tokens = kept(policy, context_of(attention, keys, keep=10, pinned=crowded))
    assert set(range(5, 25)) <= set(tokens) and len(tokens) == 22  # those, CLS, and one of the four others


def test_random_halves() -> None:
    attention, keys = torch.stack([random_attention(25)] * 2), torch.stack([random_keys(25)] * 2)
    policy = one_layer(s_prune=5, partition="random")
    rows = contexts.kept_tokens(policy.select(context_of(attention, keys, seeds=(1, 2))))
    again = contexts.kept_tokens(policy.select(context_of(attention, keys, seeds=(2, 1))))
    assert rows[0] != rows[1] and rows == again[::-1] and len(rows[0]) == 20
    assert policy.is_random(DEIT) and not one_layer(partition="random").is_random(DEIT)
    assert not one_layer(s_prune=5).is_random(DEIT)


def test_keys_of_the_mean_head() -> None:
    attention, keys = random_attention(25), random_keys(25)
    policy = one_layer(s_prune=6, features="mean")
    assert policy.requests(DEIT)[0].signals == (HeadAttention(1), KeyMean(1))
    mean = keys.unflatten(1, (3, 4)).mean(1)
    assert kept(policy, context_of(attention, keys)) == slow_layer(attention, mean, 1, policy)
    assert one_layer(keep_rates=0.5).requests(DEIT)[0].signals == (HeadAttention(1),)  # no S-stage, no keys


# Pruning layers and budgets.


def left_per_block(policy: ZeroTPrune, info: ModelInfo, n: int) -> list[int]:
    """Tokens in each block's attention, prefix included."""
    tokens, counts = [], dict(zip(policy.stages(info).layers, policy.plan(info, policy.budget, n), strict=True))
    for block in range(info.vision_depth or 0):
        n = counts[block][1] if block in counts else n
        tokens.append(n + info.prefix_tokens)
    return tokens


def test_the_paper_on_deit_s() -> None:
    policy = ZeroTPrune(preset="deit_s")
    assert policy.stages(DEIT).layers == (1, 3, 6, 9, 11) and policy.stages(DEIT).iters == (30, 5, 5, 1, 1)
    tokens = left_per_block(policy, DEIT, 196)
    assert tokens == [197, 187, 187, 159, 159, 159, 119, 119, 119, 76, 76, 66]
    share = (tower_flops(DEIT, tokens, tokens) or 0) / (tower_flops(DEIT, [197] * 12, [197] * 12) or 1)
    assert round(share, 3) == 0.674
    assert policy == ZeroTPrune(preset="deit_s", s_prune=None) and policy.reduces(DEIT)
    same = ZeroTPrune(keep_rates=[1, 0.9, 0.8, 0.7, 1], s_prune=10)
    assert left_per_block(same, DEIT, 196) == tokens


@pytest.mark.parametrize(
    ("depth", "feature", "layers", "cuts"),
    [
        (24, 22, (2, 6, 12, 18, 22), "01110"),
        (27, 26, (2, 7, 14, 20, 25), "01110"),
        (12, 10, (1, 3, 6, 9, 10), "01110"),
        (6, 4, (1, 2, 3, 4), "0111"),
        (4, 2, (1, 2), "11"),
        (2, 1, (1,), "1"),
    ],
)
def test_the_papers_layers_at_other_depths(depth: int, feature: int, layers: tuple[int, ...], cuts: str) -> None:
    info = replace(DEIT, vision_depth=depth, feature_block=feature)
    stages = ZeroTPrune(keep=0.5).stages(info)
    assert stages.layers == layers and stages.cuts == tuple(cut == "1" for cut in cuts)
    assert all(a >= b for a, b in zip(stages.iters, stages.iters[1:], strict=False))
    policy = ZeroTPrune(keep=0.25)
    assert policy.plan(info, policy.budget, 144)[-1][1] == 36


@pytest.mark.parametrize("n", [196, 60, 17, 3])
@pytest.mark.parametrize("keep", [0.02, 0.2, 0.5, 0.77, 0.9, 0.99, 1, 15])
@pytest.mark.parametrize(
    "settings", [{}, {"s_prune": 0}, {"s_prune": 40}, {"layers": (2, 5)}, {"layers": (0.25, 4, 8, 9)}]
)
def test_a_budget_is_what_is_left(settings: dict[str, Any], keep: Any, n: int) -> None:
    policy = ZeroTPrune(keep=keep, **settings)
    stages, counts = policy.stages(DEIT), policy.plan(DEIT, policy.budget, n)
    assert counts[-1][1] == policy.budget.count(n)
    rates, now = [], n
    for (removed, left), cut in zip(counts, stages.cuts, strict=True):
        assert 0 <= removed <= now // 2 and 0 < left <= now - removed
        if cut:
            rates.append((left / (now - removed), 1 / (now - removed)))
        else:
            assert left == now - removed
        now = left
    for (rate, _), (other, step) in zip(rates, rates[1:], strict=False):
        assert abs(rate - other) <= 2 * step + 1e-9  # one rate for all, up to whole tokens


def test_a_budget_over_a_whole_tower() -> None:
    """Views of different sizes, one pruning layer after another."""
    policy, lengths = ZeroTPrune(keep=0.3), [61, 41, 7]
    now, entered = list(lengths), tuple(lengths)
    for request in policy.requests(DEIT):
        signals = contexts.tower_signals(request.signals, now, (1, 2, 3))
        context = contexts.vision_block(now, request.layer or 0, signals, DEIT, policy.keep, entered=entered)
        selection = policy.select(context)
        assert all(row[0] == 0 for row in contexts.kept_tokens(selection))
        now = list(selection.out_counts())
    assert now == [1 + int(0.3 * (n - 1)) for n in lengths]


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("info", [DEIT, replace(contexts.QWEN, vision_depth=8, feature_block=7)])
def test_flops_are_met_within_one_token(share: float, info: ModelInfo) -> None:
    n, policy = 100, ZeroTPrune(keep=f"flops:{share}")

    def cost(candidate: ZeroTPrune) -> float:
        tokens = [
            (t - info.prefix_tokens) * info.merge_unit + info.prefix_tokens for t in left_per_block(candidate, info, n)
        ]
        return tower_flops(info, tokens, tokens) or 0.0

    dense = (
        tower_flops(
            info,
            [n * info.merge_unit + info.prefix_tokens] * (info.vision_depth or 0),
            [n * info.merge_unit + info.prefix_tokens] * (info.vision_depth or 0),
        )
        or 0.0
    )
    assert cost(policy) <= share * dense
    left = policy.plan(info, policy.budget, n)[-1][1]
    assert cost(ZeroTPrune(keep=left + 1)) > share * dense
    assert cost(ZeroTPrune(keep=left)) == cost(policy)


def test_flops_out_of_reach() -> None:
    policy = ZeroTPrune(keep="flops:0.2", layers=(6,))
    with pytest.raises(
        BudgetError, match=r"pruning before blocks \(6,\) costs 0\.5\d+ of the dense tower; ask for more than that"
    ):
        policy.check_count(GRID)
    policy.check_count(DEIT)  # how many tokens there are is not known yet
    with pytest.raises(BudgetError, match="sizes of the vision tower .* are not known"):
        policy.check_count(replace(DEIT, vision_ffn=None))
    for fine in (ZeroTPrune(keep="flops:0.6"), ZeroTPrune(keep=1), ZeroTPrune(preset="deit_s"), ZeroTPrune()):
        fine.check_count(GRID)
    signals = contexts.tower_signals(policy.requests(DEIT)[0].signals, [50], (1,))
    selection = policy.select(contexts.vision_block([50], 6, signals, DEIT, policy.keep))
    assert selection.counts == (2,) and "keep=flops:0.2 is out of reach" in selection.notes[0]
    with pytest.raises(BudgetError, match="attends in windows"):
        ZeroTPrune(keep=10).check_count(contexts.QWEN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "deit_b"}, "preset='deit_b' is unknown"),
        ({"keep": 0.5, "partition": "half"}, "partition='half' is unknown"),
        ({"keep": 0.5, "features": "values"}, "features='values' is unknown"),
        ({"keep": 0.5, "metric": "l2"}, "metric='l2' is unknown"),
        ({"keep": 0.5, "fusion": "max"}, "fusion='max' is unknown"),
        ({"keep": 0.5, "preset": "deit_s"}, "preset and keep say how much is kept"),
        ({"keep_rates": 0.5, "preset": "deit_s"}, "preset and keep_rates and keep say"),
        ({"keep_rates": (0.5, 0.0)}, "keep_rates=.* out of range"),
        ({"keep_rates": ()}, "keep_rates=.* out of range"),
        ({"keep": 0.5, "s_prune": -1}, "s_prune=-1 is out of range"),
        ({"keep": 0.5, "s_prune": 0.1}, "give whole numbers from 0"),
        ({"keep": 0.5, "iters": (5, 0)}, "iters=.* is out of range"),
        ({"keep": 0.5, "layers": ()}, "layers is empty"),
        ({"keep": 0.5, "tau": 0.0}, "tau=0.0"),
        ({"keep": 0.5, "v_min": 0.8}, "v_min=0.8"),
        ({"keep": (0.5, 0.4)}, "takes one budget"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ZeroTPrune(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.5, "layers": (3, 3)}, r"fall on blocks \(3, 3\) .* which do not increase"),
        ({"keep": 0.5, "layers": (0.25, 3)}, "which do not increase"),
        ({"keep": 0.5, "layers": (0, 3)}, "nothing comes before block 0"),
        ({"keep": 0.5, "layers": (12,)}, "out of range"),
        ({"keep": 0.5, "iters": (5, 1)}, "iters has 2 entries for 5 pruning layers"),
        ({"keep": 0.5, "s_prune": (5, 1)}, "s_prune has 2 entries"),
        ({"keep_rates": (0.5, 0.4)}, "keep_rates has 2 entries"),
    ],
)
def test_settings_that_do_not_fit_the_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ZeroTPrune(**settings).requests(DEIT)


def test_towers_that_are_too_shallow() -> None:
    shallow = replace(DEIT, vision_depth=4, feature_block=2)
    with pytest.raises(InputError, match="keep_rates has 5 entries for 2 pruning layers"):
        ZeroTPrune(preset="deit_s").requests(shallow)
    with pytest.raises(InputError, match="only one block"):
        ZeroTPrune(keep=0.5).requests(replace(DEIT, vision_depth=2, feature_block=0))


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "deit_s"},
        {"keep_rates": [0.5, 0.4], "layers": [0.5, 8], "s_prune": [3, 0], "iters": [4, 1]},
        {"keep_rates": 0.5, "s_prune": 3},
        {"keep": "flops:0.6", "partition": "none"},
    ],
)
def test_settings_survive_configs(settings: dict[str, Any]) -> None:
    policy = ZeroTPrune(**settings)
    again = config.from_dict(config.to_dict(policy))
    assert again == policy and hash(again) == hash(policy) and config.build("zero_tprune", settings) == policy
