"""Zero-TPrune against `tests/golden/zero_tprune.npz`: a float64 reference of the specification, and the authors'
early prototype.

Golden kinds and settings, each through the policy's own methods on a context: `reference` -> one pruning layer,
`ZeroTPrune(keep_rates=keep_rate, s_prune, iters, v_min, v_max, cls_boost, partition)`, and the steps inside it;
`early` -> `ZeroTPrune(fusion="scores", tau, iters=5, cls_boost=False)`, whose scores have mean 1 where the prototype's
sum to 1.
"""

from __future__ import annotations

from dataclasses import replace

import contexts
import pytest
import torch
from golden_io import Case
from torch import Tensor

from vlmprune.core.attention import DenseHeads
from vlmprune.core.context import Context
from vlmprune.core.signals import HeadAttention, Keys
from vlmprune.policies.zero_tprune import ZeroTPrune

PARTITIONS = ("seq_u", "seq_i", "alternate")
LAYER = 1
ROUNDS = 5


def tensor(array: object) -> Tensor:
    return torch.from_numpy(array)


def policy_of(case: Case) -> ZeroTPrune:
    return ZeroTPrune(
        keep_rates=case.ratio("keep_rate"),
        layers=(LAYER,),
        s_prune=case.integer("s_prune"),
        iters=case.integer("iters"),
        v_min=case.ratio("v_min"),
        v_max=case.ratio("v_max"),
        cls_boost=bool(case.integer("cls_boost")),
        partition=PARTITIONS[case.integer("partition")],
    )


def context_of(case: Case) -> Context:
    attention, keys = tensor(case.inputs["attn"]), tensor(case.inputs["keys"])
    prefix = case.integer("class_token")
    info = replace(contexts.LLAVA, vision_depth=3, feature_block=2, has_cls=bool(prefix), prefix_tokens=prefix)
    signals = {
        HeadAttention(LAYER - 1): DenseHeads(attention[None]),
        Keys("vision", LAYER - 1): keys.transpose(0, 1).flatten(1)[None],  # [1, N, H d]
    }
    return contexts.vision_block([attention.shape[1]], LAYER, signals, info)


@pytest.mark.golden("zero_tprune", "reference")
def test_kept_tokens(case: Case) -> None:
    selection = policy_of(case).select(context_of(case))
    assert selection.kept.tolist() == [case.outputs["kept"].tolist()]
    assert selection.counts == (len(case.outputs["kept"]),)


@pytest.mark.golden("zero_tprune", "reference")
def test_similar_tokens(case: Case) -> None:
    policy, context = policy_of(case), context_of(case)
    before = policy.importance(context, 1).importance
    torch.testing.assert_close(before[0], tensor(case.outputs["importance_pre"]), atol=1e-5, rtol=0)
    n = context.width - context.prefix
    removed = min(case.integer("s_prune"), n // 2)
    assert policy.similar(context, before, (n,), (removed,)).tolist() == [case.outputs["s_dropped"].tolist()]
    rest = set(range(context.width)) - set(case.outputs["s_dropped"].tolist())
    assert sorted(rest) == case.outputs["s_survivors"].tolist()


@pytest.mark.golden("zero_tprune", "reference")
def test_importance_of_the_survivors(case: Case) -> None:
    policy, context = policy_of(case), context_of(case)
    rounds, survivors = case.integer("iters"), tensor(case.outputs["s_survivors"])
    every = policy.head_scores(context, rounds)
    torch.testing.assert_close(every[0], tensor(case.outputs["wpr_full"]), atol=1e-5, rtol=1e-5)
    alive = torch.zeros_like(context.valid)
    alive[0, survivors] = True
    fused = policy.importance(context, rounds, alive)
    torch.testing.assert_close(fused.importance[0, survivors], tensor(case.outputs["importance"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.variance[0], tensor(case.outputs["head_var"]), atol=1e-5, rtol=1e-5)
    assert fused.kept[0].long().tolist() == case.outputs["head_kept"].tolist()


@pytest.mark.golden("zero_tprune", "early")
def test_prototype(case: Case) -> None:
    logits = tensor(case.inputs["logits"])
    batch, _, n, _ = logits.shape
    policy = ZeroTPrune(
        keep_rates=0.5,
        fusion="scores",
        tau=case.ratio("tau"),
        iters=ROUNDS,
        cls_boost=False,
        s_prune=0,
        layers=(LAYER,),
    )
    signals = {HeadAttention(LAYER - 1): DenseHeads(logits.softmax(-1))}
    info = replace(contexts.LLAVA, vision_depth=3, feature_block=2)
    context = contexts.vision_block([n] * batch, LAYER, signals, info)
    want = tensor(case.outputs["importance"])
    torch.testing.assert_close(policy.importance(context, ROUNDS).importance[:, 1:] / n, want, atol=1e-6, rtol=1e-5)
    selection = policy.select(context)
    for row, scores in zip(selection.kept, want, strict=True):
        best = scores.topk((n - 1) // 2).indices + 1
        assert row.tolist() == [0, *sorted(best.tolist())]
