"""DyMU: thresholds against a slow search for them, merges over whole towers, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import contexts
import numpy as np
import pytest
import torch
from torch import Tensor

from vlmprune.core import config
from vlmprune.core.artefact import model_facts, write_artefact
from vlmprune.core.budget import Budget
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.info import ModelInfo
from vlmprune.core.measured import Measured, RunningMean
from vlmprune.core.records import SiteRecord
from vlmprune.core.selection import Selection
from vlmprune.core.signals import KeyMean
from vlmprune.core.sites import Site
from vlmprune.kernels.gather import compose_groups
from vlmprune.policies.dymu import DyMU
from vlmprune.policies.tome import ToMe

TOWER = replace(contexts.LLAVA, vision_depth=4, feature_block=3)
NO_CLS = replace(TOWER, prefix_tokens=0, has_cls=False)
INFOS = [pytest.param(TOWER, id="cls"), pytest.param(NO_CLS, id="none")]
N = 40
MAPS = [torch.randn(12, 8, generator=torch.Generator().manual_seed(90 + block)) for block in range(4)]


@dataclass
class Run:
    """A tower's blocks on a batch: the metric is a projection of the tokens, which change by the merges alone.

    Attributes:
        tokens, sizes: as they leave the tower. groups: ``[I, N]`` output of every token that entered.
        records: one per block that acted. metrics: what its matching was given.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    sizes: Tensor
    groups: Tensor
    records: list[SiteRecord] = field(default_factory=list)
    metrics: list[Tensor] = field(default_factory=list)

    @property
    def merged(self) -> list[list[int]]:
        """Merges per block and item."""
        pairs = [zip(record.tokens_in, record.tokens_out, strict=True) for record in self.records]
        return [[before - after for before, after in pair] for pair in pairs]


def pictures(count: int, info: ModelInfo, seed: int = 0) -> list[Tensor]:
    """Tokens ``[n, 12]`` of pictures from plain (few different tokens) to rich, prefix in front."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        noise = 0.15 + torch.rand(1, generator=generator)
        centres = torch.randn(6, 12, generator=generator)
        chosen = torch.randint(6, (N,), generator=generator)
        patches = centres[chosen] + noise * torch.randn(N, 12, generator=generator)
        found.append(torch.cat([torch.randn(info.prefix_tokens, 12, generator=generator), patches]))
    return found


def run(policy: DyMU | ToMe, info: ModelInfo, views: Sequence[Tensor]) -> Run:
    entered = tuple(len(view) for view in views)
    tokens = contexts.pad(views)
    state = Run(tokens, entered, torch.ones(tokens.shape[:2]), torch.arange(tokens.shape[1]).expand(tokens.shape[:2]))
    for request in policy.requests(info):
        block = request.layer or 0
        metric = state.tokens @ MAPS[block]
        context = contexts.vision_block(
            state.lengths, block, {KeyMean(block): metric}, info, policy.keep, entered=entered, sizes=state.sizes
        )
        selection = policy.select(context)
        state.metrics.append(metric)
        state.records.append(
            SiteRecord(policy.name, Site.VISION_BLOCK, block, "keep", context.sample, context.lengths, selection)
        )
        state.sizes = summed(selection, state.sizes)
        state.groups = compose_groups(state.groups, groups_of(selection))
        state.tokens, state.lengths = selection.apply(state.tokens), selection.out_counts()
    return state


def summed(selection: Selection, sizes: Tensor) -> Tensor:
    return (selection if selection.is_pruning else replace(selection, mode="sum")).apply(sizes)


def groups_of(selection: Selection) -> Tensor:
    if selection.group_id is not None:
        return selection.group_id
    index = torch.arange(selection.n_in).expand(len(selection.kept), -1)  # type: ignore[arg-type]
    return torch.where(index < torch.tensor(selection.counts)[:, None], index, -1)


def cosines(metric: Tensor, length: int, prefix: int) -> np.ndarray:
    """Best cosines of the even tokens of one item behind the prefix, in float64."""
    rows = metric[:length].double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    even = [i for i in range(0, length, 2) if i >= prefix]
    odd = [i for i in range(1, length, 2) if i >= prefix]
    return (rows[even] @ rows[odd].T).max(1)


@pytest.mark.parametrize("info", INFOS)
def test_a_picture_in_a_batch_is_what_it_is_alone(info: ModelInfo) -> None:
    """In every block, with pictures of other sizes and contents beside it."""
    views = [view[: len(view) - cut] for view, cut in zip(pictures(4, info), (0, 7, 0, 18), strict=True)]
    policy = DyMU(thresholds=(0.8, 0.7, 0.6, 0.5))
    batch = run(policy, info, views)
    assert len(set(batch.lengths)) > 1
    for item, view in enumerate(views):
        alone = run(policy, info, [view])
        count = alone.lengths[0]
        assert batch.lengths[item] == count
        assert [block[item] for block in batch.merged] == [block[0] for block in alone.merged]
        assert torch.equal(batch.groups[item, : len(view)], alone.groups[0])
        torch.testing.assert_close(batch.tokens[item, :count], alone.tokens[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("info", INFOS)
def test_every_token_is_in_one_group_and_sizes_count_them(info: ModelInfo) -> None:
    views = pictures(3, info)
    state = run(DyMU(thresholds=0.6), info, views)
    for item, count in enumerate(state.lengths):
        tracking = state.groups[item][None] == torch.arange(count)[:, None]
        assert torch.equal(tracking.sum(0), torch.ones(len(views[item]), dtype=torch.long))
        assert torch.equal(tracking.sum(1).float(), state.sizes[item, :count])
        mean = torch.stack([views[item][row].mean(0) for row in tracking])
        torch.testing.assert_close(state.tokens[item, :count], mean, atol=1e-5, rtol=0)
        if info.prefix_tokens:
            assert torch.equal(state.tokens[item, 0], views[item][0])


@pytest.mark.parametrize("info", INFOS)
def test_the_pairs_above_the_threshold_merge(info: ModelInfo) -> None:
    state = run(DyMU(thresholds=0.7), info, pictures(3, info))
    counted = 0
    for record, metric, merged in zip(state.records, state.metrics, state.merged, strict=True):
        for item, length in enumerate(record.lengths):
            best = cosines(metric[item], length, info.prefix_tokens)
            cap = (length - info.prefix_tokens) // 2
            assert merged[item] == min(int((best > 0.7).sum()), cap)
            counted += merged[item]
            scores = record.selection.scores[item, :length]  # type: ignore[index]
            even = scores[0::2][-len(best) :]
            np.testing.assert_allclose(even.numpy(), best, atol=1e-5)
            assert (scores[1::2] == -1).all() and scores.isfinite().all()
    assert counted > 0


@pytest.mark.parametrize("info", INFOS)
def test_the_extreme_thresholds(info: ModelInfo) -> None:
    assert DyMU(thresholds=1.0).requests(info) == ()
    assert [request.layer for request in DyMU(thresholds=[1.0, 0.5, 1, 0.5]).requests(info)] == [1, 3]
    context = contexts.vision_block([9], 0, {KeyMean(0): torch.ones(1, 9, 3)}, info)
    assert DyMU(thresholds=1.0).select(context).out_counts() == (9,)  # equal tokens are no more than 1 alike
    state = run(DyMU(thresholds=-1.0), info, pictures(2, info))
    for record, merged in zip(state.records, state.merged, strict=True):
        assert merged == [(length - info.prefix_tokens) // 2 for length in record.lengths]


@pytest.mark.parametrize("schedule", ["constant", "linear", "reverse_linear"])
@pytest.mark.parametrize("info", INFOS)
def test_thresholds_are_where_the_merges_of_a_batch_end(info: ModelInfo, schedule: Any) -> None:
    """Against a slow search: pool the best cosines of all pictures, merge the best, take the next one."""
    keep = 22
    policy = DyMU(keep=keep, schedule=schedule)
    measurement = policy.measurement(info, least=2)
    assert measurement is not None
    plan = policy.plan(info, Budget.parse(keep), N)
    assert sum(plan) == N - keep
    expected: dict[int, list[float]] = {}
    for seed in range(3):
        state = run(measurement.policy, info, pictures(5, info, seed))
        for record, metric, merged in zip(state.records, state.metrics, state.merged, strict=True):
            pool = [cosines(metric[i], n, info.prefix_tokens) for i, n in enumerate(record.lengths)]
            caps = [(n - info.prefix_tokens) // 2 for n in record.lengths]
            may = [np.sort(best)[::-1][:cap] for best, cap in zip(pool, caps, strict=True)]
            order = np.sort(np.concatenate(may))[::-1]
            number = 5 * plan[record.layer or 0]
            assert sum(merged) == number
            if number == 0:
                continue  # a block that the schedule leaves out is not measured
            bound = order[number - 1 : number + 1].mean()
            assert merged == [int((best > bound).sum()) for best in may]
            expected.setdefault(record.layer or 0, []).append(max(0.0, float(order[number])))
        measurement.update(state.records)
    assert [mean.layer for mean in measurement.means] == [block for block, r in enumerate(plan) if r > 0]
    for mean in measurement.means:
        values = np.array(expected[mean.layer])
        assert mean.mean == pytest.approx(values.mean(), abs=1e-6)
        assert mean.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(3), abs=1e-6)
    found = measurement.result().block_thresholds(info)
    assert found == pytest.approx([np.mean(expected[block]) if r else 1.0 for block, r in enumerate(plan)], abs=1e-6)


@pytest.mark.parametrize("info", INFOS)
def test_the_thresholds_of_one_batch_merge_what_it_merged(info: ModelInfo) -> None:
    views = pictures(6, info)
    for schedule in ("constant", "linear"):
        measurement = DyMU(keep=19, schedule=schedule).measurement(info)  # type: ignore[arg-type]
        assert measurement is not None
        measured = run(measurement.policy, info, views)
        measurement.update(measured.records)
        applied = run(measurement.result(), info, views)
        assert torch.equal(applied.groups, measured.groups) and len(set(applied.lengths)) > 1
        assert measurement.count(applied.records).left == 6 * 19


def test_windows_lose_parts_of_tokens_together() -> None:
    """Of 16 tokens in a window, 0.3 are 4.8: in 5 windows the batch keeps 24, not 20."""
    info = replace(NO_CLS, full_attention_blocks=(3,))
    views = [view[:16] for view in pictures(5, info)]
    measurement = DyMU(keep=0.3).measurement(info)
    assert measurement is not None
    measurement.update(run(measurement.policy, info, views).records)
    count = measurement.count(run(measurement.result(), info, views).records)
    assert (count.entered, count.wanted, count.left) == (80, 24, 24)
    count = replace(DyMU(keep=0.3), mode="instance")
    assert run(count, info, views).lengths == (4,) * 5


@pytest.mark.parametrize("info", INFOS)
def test_calibrated_thresholds_keep_the_budget_on_average(info: ModelInfo) -> None:
    keep, batches = 20, [pictures(16, info, seed) for seed in range(20)]
    measurement = DyMU(keep=keep).measurement(info, tolerance=1e-9)
    assert measurement is not None
    for views in batches:
        measurement.update(run(measurement.policy, info, views).records)
    entered = left = wanted = 0
    merged: list[list[int]] = [[] for _ in range(4)]
    for views in batches:
        state = run(measurement.result(), info, views)
        count = measurement.count(state.records)
        entered, left, wanted = entered + count.entered, left + count.left, wanted + count.wanted
        for block, numbers in enumerate(state.merged):
            merged[block] += numbers
    assert (entered, wanted) == (320 * N, 320 * keep)
    assert abs(left / wanted - 1) < 0.05
    for numbers in merged:
        assert np.mean(numbers) == pytest.approx(5.0, abs=0.5)
        assert np.std(numbers) > 1  # plain pictures lose more than rich ones


def test_a_batch_with_nothing_left_to_merge_ends_at_zero_or_at_the_last_pair() -> None:
    for info, last in ((TOWER, False), (NO_CLS, True)):
        metric = torch.ones(2, N + info.prefix_tokens, 3)
        selection = DyMU(keep=1, mode="batch", compat="official").select(
            contexts.vision_block([metric.shape[1]] * 2, 3, {KeyMean(3): metric}, info, 1, entered=(1000, 1000))
        )
        record = SiteRecord("dymu", Site.VISION_BLOCK, 3, "keep", (0, 1), (metric.shape[1],) * 2, selection)
        measurement = DyMU(keep=1).measurement(info)
        assert measurement is not None
        measurement.update([record])
        assert measurement.means[0].mean == (1.0 if last else 0.0)  # CLS has no pair: its row counts as none


def test_the_mean_of_many_batches_stays() -> None:
    """In bfloat16, where the official script keeps it, the same recurrence decays."""
    values = (0.85 + 0.02 * np.random.default_rng(0).standard_normal(1000)).tolist()
    mean = RunningMean(layer=0)
    narrow = torch.tensor(values[0], dtype=torch.bfloat16)
    for number, value in enumerate(values):
        mean.add(value)
        if number:
            narrow = (narrow * number + torch.tensor(value, dtype=torch.bfloat16)) / (number + 1)
    assert mean.count == 1000 and mean.mean == pytest.approx(np.mean(values), abs=1e-13)
    assert mean.standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(1000), abs=1e-13)
    assert abs(float(narrow) - np.mean(values)) > 0.1
    again = RunningMean.model_validate_json(mean.model_dump_json())
    assert again == mean


def test_it_ends_when_every_block_is_sure() -> None:
    measurement = DyMU(keep=20).measurement(TOWER, tolerance=0.01, least=4)
    assert measurement is not None and not measurement.converged
    steady, wild = RunningMean(layer=0), RunningMean(layer=1)
    measurement.means = [steady, wild]
    for number in range(400):
        steady.add(0.8)
        wild.add(0.5 + 0.1 * (-1) ** number)
        error = 0.1 / np.sqrt(number) if number else np.inf  # of n + 1 values at 0.4 and 0.6, about
        if number < 3:
            assert not measurement.converged
        elif abs(error - 0.01) > 1e-3:
            assert measurement.converged == (error < 0.01)
    assert measurement.converged


def test_positions() -> None:
    assert {request.positions for request in DyMU(thresholds=0.5).requests(TOWER)} == {"virtual"}
    for info, positions in ((TOWER, "compact"), (replace(TOWER, mrope=True), "keep")):
        requests = DyMU(thresholds=0.5, unmerge=False).requests(info)
        assert {request.positions for request in requests} == {positions}
        assert all(request.place == "middle" and request.size_bias for request in requests)
        assert [request.signals for request in requests] == [(KeyMean(block),) for block in range(4)]
    assert {request.positions for request in DyMU(thresholds=0.5, positions="keep").requests(TOWER)} == {"keep"}
    alone = replace(TOWER, text_depth=None)
    assert {request.positions for request in DyMU(thresholds=0.5).requests(alone)} == {"compact"}


def test_plain_mode_is_tome_with_the_same_schedule() -> None:
    views = pictures(3, TOWER)
    mine = run(DyMU(keep=18, mode="instance"), TOWER, views)
    theirs = run(ToMe(keep=18), TOWER, views)
    assert mine.lengths == theirs.lengths == (19,) * 3
    assert torch.equal(mine.groups, theirs.groups) and torch.equal(mine.tokens, theirs.tokens)
    views = pictures(1, NO_CLS)  # where the orders differ, from the second block on
    official = run(DyMU(keep=18, mode="instance", compat="official"), NO_CLS, views)
    assert torch.equal(official.groups, run(ToMe(keep=18), NO_CLS, views).groups)
    assert not torch.equal(run(DyMU(keep=18, mode="instance"), NO_CLS, views).groups, official.groups)


def test_a_limit_per_picture() -> None:
    """At most twice what the schedule takes from each: 5 tokens a block."""
    views = pictures(8, TOWER)
    free = run(DyMU(keep=20, mode="batch"), TOWER, views)
    limited = run(DyMU(keep=20, mode="batch", max_r_ratio=1.2), TOWER, views)
    assert max(free.merged[0]) > 6 and max(map(max, limited.merged)) == 6
    for record in limited.records:  # pairs beyond the limit are in no pool
        assert all(int((row > -1).sum()) <= 6 for row in record.selection.scores)  # type: ignore[union-attr]
    dynamic = run(DyMU(keep=20, thresholds=-1.0, max_r_ratio=1.2), TOWER, views)
    assert dynamic.merged == [[6] * 8] * 4


def test_late_blocks_that_cannot_halve_enough() -> None:
    policy = DyMU(keep=4, mode="instance")
    plan = policy.plan(TOWER, policy.budget, N)
    assert sum(plan) == 36 and plan[0] > 9 and run(policy, TOWER, pictures(1, TOWER)).lengths == (5,)
    official = replace(policy, compat="official")
    assert official.plan(TOWER, policy.budget, N) == (9, 9, 9, 9)
    fixed = replace(TOWER, grid=(8, 5))
    official.check_count(fixed)
    replace(policy, keep=3).check_count(fixed)
    with pytest.raises(BudgetError, match="keep=2 is out of reach: blocks that merge at most half each leave 3 of 40"):
        replace(policy, keep=2).check_count(fixed)
    with pytest.raises(BudgetError, match="out of reach"):
        replace(policy, keep=8, schedule="reverse_linear").check_count(fixed)
    (note,) = run(replace(policy, keep=2), TOWER, pictures(1, TOWER)).records[-1].selection.notes
    assert "keep=2 is out of reach" in note
    with pytest.raises(BudgetError, match="attends in windows"):
        policy.check_count(contexts.QWEN)


def artefact(info: ModelInfo = TOWER, **changes: Any) -> Measured:
    settings = {"keep": 0.5, "schedule": "linear", "max_r_ratio": None, "compat": None}
    values = [RunningMean(layer=0, count=3, mean=0.75), RunningMean(layer=2, count=3, mean=0.5)]
    fields = {"policy": "dymu", "settings": settings, "model": model_facts(info), "samples": 48, "data": "d"}
    return Measured(**{**fields, "tolerance": 1e-3, "values": values, "batches": 3, **changes})


def test_an_artefact_gives_the_thresholds(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    write_artefact(artefact(), path)
    policy = DyMU(keep=0.5, schedule="linear", artefact=path)
    assert policy.block_thresholds(TOWER) == (0.75, 1.0, 0.5, 1.0)
    assert [request.layer for request in policy.requests(TOWER)] == [0, 2]
    again = config.from_dict(config.to_dict(policy))
    assert again == policy and again.requests(TOWER) == policy.requests(TOWER)
    assert DyMU(artefact=path).requests(TOWER) == ()  # keep=1.0 is the dense model
    for parameters, message in (
        ({"keep": 0.4, "schedule": "linear"}, "calibrated for keep=0.5, not 0.4"),
        ({"keep": 0.5}, "calibrated for schedule=linear, not constant"),
        ({"keep": 0.5, "schedule": "linear", "thresholds": 0.5}, "thresholds and artefact both"),
        ({"keep": 0.5, "schedule": "linear", "mode": "instance"}, "uses no thresholds"),
    ):
        with pytest.raises(InputError, match=message):
            DyMU(artefact=path, **parameters)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="another model .vision_depth 4, not 24"):
        policy.requests(contexts.LLAVA)
    write_artefact(artefact(values=[]), path)
    with pytest.raises(InputError, match="no result yet"):
        DyMU(keep=0.5, schedule="linear", artefact=path)
    path.write_text('{"format": "vlmprune calibration"}')
    with pytest.raises(InputError, match="is no calibration artefact"):
        DyMU(keep=0.5, artefact=path)


def test_without_thresholds_it_says_how_to_get_them() -> None:
    with pytest.raises(InputError, match="vlmprune calibrate dymu --keep 0.33 --images FOLDER --output found.json"):
        DyMU(keep=0.33).requests(TOWER)
    assert DyMU().requests(TOWER) == () and not DyMU().reduces(TOWER)
    assert not DyMU(keep=40).reduces(replace(TOWER, grid=(8, 5)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"thresholds": 1.5}, "a cosine lies in"),
        ({"thresholds": ()}, "a cosine lies in"),
        ({"thresholds": float("nan")}, "a cosine lies in"),
        ({"keep": [0.5, 0.3]}, "one budget for all views"),
        ({"keep": 0.5, "mode": "other"}, "mode='other' is unknown; choose dynamic"),
        ({"keep": 0.5, "schedule": "flat"}, "schedule='flat' is unknown; choose constant"),
        ({"keep": 0.5, "compat": "old"}, "compat='old' is unknown"),
        ({"max_r_ratio": 2.0}, "a keep below 1.0"),
        ({"keep": 0.5, "max_r_ratio": 0.0}, "a number above 0"),
    ],
)
def test_bad_settings(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DyMU(**parameters)


def test_bad_settings_for_a_model() -> None:
    with pytest.raises(InputError, match="thresholds has 3 entries; LlavaForConditionalGeneration needs 4"):
        DyMU(thresholds=(0.5, 0.5, 0.5)).requests(TOWER)
    assert len(DyMU(thresholds=(0.5,) * 6).requests(replace(TOWER, vision_depth=6))) == 4
    with pytest.raises(BudgetError, match="takes a share or a number"):
        DyMU(keep="flops:0.5", thresholds=0.5).check_count(TOWER)
    for policy in (DyMU(keep=0.5, thresholds=0.5), DyMU(keep=0.5, mode="instance")):
        assert policy.measurement(TOWER) is None
    with pytest.raises(BudgetError, match="keep=1.0 keeps them"):
        DyMU().measurement(TOWER)
