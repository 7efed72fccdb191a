"""DyMU against `tests/golden/dymu.npz`, made with the authors' functions.

Golden kinds and settings, each through `DyMU.select` on a context: `single` -> `DyMU(thresholds, compat="official")` on
one picture (without a class token it leaves tokens by rank); without `compat` the same groups in the order of
positions. `batch` -> `compat="official"` on several pictures (no limit to half of the tokens), padding behind the
tokens, and the authors' division by `size + 1e-4` applied to our exact mean. `calib` -> `DyMU(keep).measurement`, one
block. `rs` -> `DyMU(keep, schedule).plan`, with and without `compat`. `single` and `batch` also run on both
implementations of the kernel. `vtu`: see `test_dymu_unmerging.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import contexts
import pytest
import torch
from golden_io import Case
from torch import Tensor

from vlmprune.core.budget import Budget
from vlmprune.core.info import ModelInfo
from vlmprune.core.records import SiteRecord
from vlmprune.core.selection import Selection
from vlmprune.core.signals import KeyMean
from vlmprune.core.sites import Site
from vlmprune.kernels.bipartite import bipartite_match, merge_groups
from vlmprune.kernels.gather import compose_groups, segment_merge
from vlmprune.policies.dymu import DyMU

BACKENDS = ("reference", "torch")
COMPATS: tuple[Literal["official"] | None, ...] = (None, "official")
SCHEDULES: tuple[Literal["constant", "linear", "reverse_linear"], ...] = ("constant", "linear", "reverse_linear")


def tensor(array: object) -> Tensor:
    return torch.from_numpy(array)


def by_members(tracking: Tensor, *values: Tensor) -> dict[tuple[int, ...], list[Tensor]]:
    """Values of one sample's outputs by the tokens in them; padding left out."""
    found = {}
    for row, *rest in zip(tracking, *values, strict=True):
        members = tuple(row.nonzero()[:, 0].tolist())
        if members:
            found[members] = rest
    return found


@pytest.mark.golden("dymu", "single")
@pytest.mark.parametrize("backend", BACKENDS)
def test_single(case: Case, backend: str) -> None:
    x = tensor(case.inputs["x"])
    size = tensor(case.inputs["size"])[..., 0] if "size" in case.inputs else torch.ones(x.shape[:2])
    options = {"threshold": case.ratio("threshold"), "protect": case.integer("class_token"), "backend": backend}
    match = bipartite_match(tensor(case.inputs["metric"]), **options)
    count = int(match.counts)
    assert count == case.outputs["x"].shape[1]
    merged = merge_groups(x, match.group_id, match.n_out, "wavg", size, backend=backend)
    torch.testing.assert_close(merged[:, :count], tensor(case.outputs["x"]), atol=1e-5, rtol=0)
    assert not merged[:, count:].any()
    total = segment_merge(size[..., None], match.group_id, count, mode="sum")
    torch.testing.assert_close(total, tensor(case.outputs["size"]), atol=1e-5, rtol=0)
    tracking = match.group_id[:, None] == torch.arange(count)[:, None]
    assert torch.equal(tracking.long(), tensor(case.outputs["pos_tracking"]))


@pytest.mark.golden("dymu", "batch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch(case: Case, backend: str) -> None:
    x = tensor(case.inputs["x"])
    batch, n, _ = x.shape
    size, valid = torch.ones(batch, n), torch.ones(batch, n, dtype=torch.bool)
    groups = torch.arange(n).expand(batch, n)
    for layer in range(len(case.params["thresholds"])):
        slots = torch.arange(x.shape[1])
        match = bipartite_match(
            x @ tensor(case.inputs[f"w{layer}"]),
            threshold=round(float(case.params["thresholds"][layer]), 6),
            protect=case.integer("class_token"),
            order="position",
            split=(slots[0::2], slots[1::2]),  # the default halves, without the limit to half of the tokens
            valid=valid,
            backend=backend,
        )
        merged = merge_groups(x, match.group_id, match.n_out, "wavg", size, backend=backend)
        total = segment_merge(size[..., None], match.group_id, match.n_out, mode="sum")
        merged = merged * total / (total + 1e-4)
        members = compose_groups(groups, match.group_id)[:, None] == torch.arange(match.n_out)[:, None]
        # The next layer starts from the authors' layout: their sort may shuffle tokens.
        x, size, padding, tracking = (
            tensor(case.outputs[f"{name}{layer}"]) for name in ("x", "size", "padding", "pos_tracking")
        )
        for b in range(batch):
            got = by_members(members[b], merged[b], total[b])
            expected = by_members(tracking[b], x[b], size[b])
            assert got.keys() == expected.keys()
            assert len(got) == int(match.counts[b]) == int((padding[b] == 0).sum())
            for tokens, values in expected.items():
                torch.testing.assert_close(got[tokens], values, atol=1e-5, rtol=0)
        size, valid, groups = size[..., 0], padding == 0, tracking.argmax(1)


def tower(blocks: int, prefix: int) -> ModelInfo:
    """A tower of so many blocks, all of which feed what comes next."""
    return replace(
        contexts.LLAVA, vision_depth=blocks, feature_block=blocks - 1, prefix_tokens=prefix, has_cls=prefix > 0
    )


def summed(selection: Selection, values: Tensor) -> Tensor:
    """Sums over each output's tokens."""
    return (replace(selection, mode="sum") if selection.group_id is not None else selection).apply(values)


def tracking(groups: Tensor, count: int) -> Tensor:
    """``[B, count, N]``: 1 where a token of the tower belongs to an output."""
    return (groups[:, None] == torch.arange(count)[:, None]).long()


@pytest.mark.golden("dymu", "single")
@pytest.mark.parametrize("compat", COMPATS)
def test_policy_on_one_picture(case: Case, compat: Literal["official"] | None) -> None:
    x = tensor(case.inputs["x"])
    n = x.shape[1]
    size = tensor(case.inputs["size"])[..., 0] if "size" in case.inputs else None
    prefix = case.integer("class_token")
    policy = DyMU(thresholds=case.ratio("threshold"), compat=compat)
    metric = {KeyMean(0): tensor(case.inputs["metric"])}
    selection = policy.select(contexts.vision_block([n], 0, metric, tower(1, prefix), sizes=size))
    want = tensor(case.outputs["pos_tracking"])
    count = want.shape[1]
    assert selection.out_counts() == (count,) and selection.n_outputs == count
    groups = torch.arange(n)[None] if selection.group_id is None else selection.group_id
    total = summed(selection, torch.ones(1, n, 1) if size is None else size[..., None])
    mine = tracking(groups, count)
    if compat == "official" or prefix:
        assert torch.equal(mine, want)
        torch.testing.assert_close(selection.apply(x), tensor(case.outputs["x"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(total, tensor(case.outputs["size"]), atol=1e-5, rtol=0)
        return
    got = by_members(mine[0], selection.apply(x)[0], total[0])
    expected = by_members(want[0], tensor(case.outputs["x"])[0], tensor(case.outputs["size"])[0])
    assert got.keys() == expected.keys()
    for tokens, values in expected.items():
        torch.testing.assert_close(got[tokens], values, atol=1e-5, rtol=0)
    even = [tokens for tokens in got if tokens[0] % 2 == 0 and len(tokens) == 1]
    assert list(got)[: len(even)] == sorted(even)


@pytest.mark.golden("dymu", "batch")
def test_policy_on_a_batch(case: Case) -> None:
    """Layer after layer; the next one starts from the authors' layout, for their sort may shuffle tokens."""
    x = tensor(case.inputs["x"])
    batch, n, _ = x.shape
    size, lengths = torch.ones(batch, n), [n] * batch
    groups = torch.arange(n).expand(batch, n)
    thresholds = [round(float(value), 6) for value in case.params["thresholds"]]
    policy, info = DyMU(thresholds=thresholds, compat="official"), tower(len(thresholds), case.integer("class_token"))
    for layer in range(len(thresholds)):
        metric = {KeyMean(layer): x @ tensor(case.inputs[f"w{layer}"])}
        selection = policy.select(contexts.vision_block(lengths, layer, metric, info, sizes=size, entered=(n,) * batch))
        assert selection.group_id is not None
        total = summed(selection, size[..., None])
        merged = selection.apply(x) * total / (total + 1e-4)
        members = tracking(compose_groups(groups, selection.group_id), selection.n_outputs)
        x, size, padding, sources = (
            tensor(case.outputs[f"{name}{layer}"]) for name in ("x", "size", "padding", "pos_tracking")
        )
        lengths = (padding == 0).sum(1).tolist()
        assert list(selection.out_counts()) == lengths and selection.n_outputs == x.shape[1]
        for b in range(batch):
            got = by_members(members[b], merged[b], total[b])
            expected = by_members(sources[b], x[b], size[b])
            assert got.keys() == expected.keys()
            for tokens, values in expected.items():
                torch.testing.assert_close(got[tokens], values, atol=1e-5, rtol=0)
        # Tokens are followed by padding in the authors' layout, but their own ids are not a group per token.
        size, groups = size[..., 0], sources.argmax(1)


@pytest.mark.golden("dymu", "calib")
@pytest.mark.parametrize("compat", COMPATS)
def test_thresholds(case: Case, compat: Literal["official"] | None) -> None:
    want = case.outputs["batch_thresholds"]
    batch, n, _ = case.inputs["metric0"].shape
    info = tower(1, case.integer("class_token"))
    keep = n - info.prefix_tokens - case.integer("r")
    measurement = DyMU(keep=keep, compat=compat).measurement(info)
    assert measurement is not None
    for number, value in enumerate(want):
        metric = {KeyMean(0): tensor(case.inputs[f"metric{number}"])}
        context = contexts.vision_block([n] * batch, 0, metric, info, keep)
        selection = measurement.policy.select(context)
        assert sum(context.lengths) - sum(selection.out_counts()) == batch * case.integer("r")
        record = SiteRecord("dymu", Site.VISION_BLOCK, 0, "keep", context.sample, context.lengths, selection)
        alone = DyMU(keep=keep, compat=compat).measurement(info)
        assert alone is not None
        for each in (alone, measurement):
            each.update([record])
        assert alone.means[0].mean == pytest.approx(float(value), abs=1e-6)
    (mean,) = measurement.means
    assert mean.count == len(want) and mean.mean == pytest.approx(float(case.outputs["threshold"]), abs=1e-6)
    assert measurement.result().thresholds == (mean.mean,)


@pytest.mark.golden("dymu", "rs")
@pytest.mark.parametrize("compat", COMPATS)
def test_schedules(case: Case, compat: Literal["official"] | None) -> None:
    total, blocks = case.integer("r_total"), case.integer("layers")
    n = 4 * total  # no block is asked for more than half of what it gets
    policy = DyMU(keep=n - total, schedule=SCHEDULES[case.integer("schedule")], mode="instance", compat=compat)
    assert policy.plan(tower(blocks, 0), Budget.parse(n - total), n) == tuple(case.outputs["r"].tolist())
