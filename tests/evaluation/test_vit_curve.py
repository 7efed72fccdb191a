"""The accuracy-throughput curve: baseline, counting, rows, resuming. A stub stands for a policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from result_rows import a_stamp

pytest.importorskip("timm")

from vlmprune.core.errors import InputError
from vlmprune.embedded.vit_check import logits_of
from vlmprune.embedded.vit_model import build_vit
from vlmprune.evaluation import vit_curve
from vlmprune.evaluation.vit_curve import Settings, main, measure_curve, registered
from vlmprune.evaluation.vit_measure import RandomPatches, answers, measure_cost
from vlmprune.evaluation.vit_rows import CurveRow, read_curve, read_row, render_curve, row_path, write_row

SMALL = Settings(pictures=12, cost_pictures=2, batch=5, rounds=2, random_seeds=2)


@pytest.fixture(scope="module")
def vit():
    return build_vit(depth=3)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def cut_before(model, number, count):
    """Keep the first `count` tokens from block `number` on, by a hook."""
    return model.blocks[number].register_forward_pre_hook(lambda block, given: (given[0][:, :count],))


class Stub:
    """A policy that keeps the first `keep` tokens from the middle of the model on; records what it was told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.handles: list[SimpleNamespace] = []
        self.error = error

    @contextmanager
    def __call__(self, model, policy, **parameters) -> Iterator[SimpleNamespace]:
        self.calls.append((policy, parameters))
        self.handles.append(SimpleNamespace(sample_ids=None, last_error=self.error))
        hook = cut_before(model, 6, parameters["keep"])
        try:
            yield self.handles[-1]
        finally:
            hook.remove()


def a_curve_row(**changes) -> CurveRow:
    values = {
        "model": "tiny-vit", "task": "digits", "policy": "tome", "params": {"r": 13}, "seed": None, "n": 4,
        "right": "1101", "accuracy": 0.75, "ci_low": 0.3, "ci_high": 0.95, "diff_dense": -0.25, "diff_dense_low": -0.5,
        "diff_dense_high": 0.0, "diff_random": 0.125, "diff_random_low": None, "diff_random_high": None,
        "accuracy_random": (0.5, 0.75), "tokens_attended": (197.0, 100.0), "tokens_passed": (184.0, 90.0),
        "tokens_exit": 90.0, "flops": 6e8, "flops_dense": 8e8, "images_per_s": 130.0, "images_per_s_dense": 100.0,
        "speedup": 1.31, "speedup_low": 1.2, "speedup_high": 1.4, "rounds": 9, "stamp": a_stamp(),
        "stamp_times": None,
    }  # fmt: skip
    return CurveRow(**(values | changes))


def entering(model, pixels, counts, seed=3):
    """Logits under the baseline, and the tokens that enter each block."""
    seen = []
    with torch.no_grad(), RandomPatches(model, counts, seed) as baseline:
        baseline.sample_ids = [f"p{row}" for row in range(len(pixels))]
        hooks = [block.register_forward_pre_hook(lambda block, given: seen.append(given[0])) for block in model.blocks]
        logits = model(pixels)
    for hook in hooks:
        hook.remove()
    return logits, seen


def test_random_patches_are_those_of_a_model_that_never_had_the_others(vit, pixels):
    logits, seen = entering(vit, pixels, (50, 50, 50))
    with torch.no_grad():
        whole = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
    places = torch.stack([(whole[row][:, None] == seen[0][row]).all(-1).int().argmax(0) for row in range(len(pixels))])
    assert seen[0].shape[1] == 51 and (places[:, 0] == 0).all() and (places.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in places.tolist()}) == len(pixels)
    with torch.no_grad():
        torch.testing.assert_close(logits, logits_of(vit, pixels, places[:, 1:] - 1))


def test_random_patches_become_fewer_from_block_to_block(vit, pixels):
    _, seen = entering(vit, pixels, (196, 50, 20))
    assert [x.shape[1] for x in seen] == [197, 51, 21]
    with torch.no_grad():
        before = vit.blocks[1](seen[1])
    assert all((before[row][:, None] == seen[2][row]).all(-1).any(0).all() for row in range(len(pixels)))


def test_random_patches_depend_on_seed_and_name_only(vit, pixels):
    def logits(batch, names, seed=0):
        with torch.no_grad(), RandomPatches(vit, (30,) * 3, seed) as baseline:
            baseline.sample_ids = names
            return vit(batch)

    together = logits(pixels, ["a", "b", "c", "d"])
    torch.testing.assert_close(logits(pixels[2:3], ["c"])[0], together[2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(pixels, ["e", "b", "c", "d"])[0], together[0], atol=1e-3)
    assert not torch.allclose(logits(pixels, ["a", "b", "c", "d"], seed=1), together, atol=1e-3)
    with torch.no_grad():
        assert not vit.blocks[0]._forward_pre_hooks and vit(pixels).shape == (4, 10)


def test_cost_counts_tokens_and_flops(vit, pixels):
    @contextmanager
    def attach(model):
        hooks = [cut_before(model, 1, 120), cut_before(model, 2, 33)]
        yield None
        for hook in hooks:
            hook.remove()

    cost = measure_cost(vit, pixels, ["a", "b", "c", "d"], attach)
    assert cost.attended == cost.passed == (197, 120, 33) and cost.exit == 33
    width, mlp = 128, 256
    blocks = sum(8 * n * width**2 + 4 * n * n * width + 4 * n * width * mlp for n in cost.attended)
    assert cost.flops == blocks + 2 * 196 * 768 * width + 2 * width * 10


def test_an_error_inside_the_policy_is_raised(vit, pixels):
    stub = Stub(error=RuntimeError("no keys"))
    with pytest.raises(RuntimeError, match="no keys"):
        answers(vit, [pixels], ["a", "b", "c", "d"], lambda model: stub(build_vit(depth=7), "tome", keep=9))


def test_the_curve_measures_pairs_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    stub = Stub()
    monkeypatch.setattr(vit_curve, "applied", stub)
    plan = [("random_patches", {"keep": 0.1}), ("random", {"keep": 40, "seed": 5})]
    paths = measure_curve(plan, tmp_path, SMALL)
    rows = {row.policy: row for row in map(read_row, paths)}
    dense, control, own = rows["dense"], rows["random_patches"], rows["random"]
    assert dense.tokens_attended == (197,) * 12 and dense.flops_share == 1 and dense.diff_dense is None
    assert dense.accuracy == dense.right.count("1") / 12 >= 0.75
    assert control.tokens_attended == (20,) * 12 and control.diff_random is None and control.seed == 0
    assert own.tokens_attended == (197,) * 6 + (40,) * 6 == own.tokens_passed and own.tokens_exit == 40
    assert own.seed == 5 and stub.calls == [("random", {"keep": 40, "seed": 5})] * 3
    marks = [(int(a) - int(b)) / 12 for a, b in zip(own.right, dense.right, strict=True)]
    assert own.diff_dense == pytest.approx(sum(marks)) and len(own.accuracy_random) == 2
    assert own.diff_random == pytest.approx(own.accuracy - sum(own.accuracy_random) / 2)
    assert own.speedup_low <= own.speedup <= own.speedup_high and own.images_per_s > 0
    assert own.stamp.versions["timm"] and own.stamp.attention == "sdpa" and own.stamp.seeds["data"] == 1
    assert stub.handles[1].sample_ids == ["digit-1-10", "digit-1-11"]  # of the last batch of answers

    paths[2].unlink()
    before = paths[1].read_text()
    assert measure_curve(plan, tmp_path, SMALL) == paths
    assert len(stub.calls) == 6 and paths[1].read_text() == before
    former = read_row(paths[2])
    assert former.right == own.right
    again = Settings(pictures=12, cost_pictures=2, batch=5, rounds=3, random_seeds=2)
    timed = [read_row(path) for path in measure_curve(plan, tmp_path, again)]
    assert len(stub.calls) == 7 and [row.rounds for row in timed] == [3] * 3
    assert (timed[2].right, timed[2].stamp, timed[2].flops) == (former.right, former.stamp, former.flops)
    assert timed[2].stamp_times is not None and timed[2].speedup != former.speedup
    fewer = Settings(pictures=11, cost_pictures=2, batch=5, rounds=0, random_seeds=0)
    rows = [read_row(path) for path in measure_curve(plan, tmp_path, fewer)]
    assert [(row.n, row.rounds, row.stamp_times) for row in rows] == [(11, 0, None)] * 3
    assert rows[2].speedup is None and rows[2].diff_random is None


def test_the_plan_is_checked_before_anything_runs(tmp_path, monkeypatch):
    assert {policy for policy, _ in registered()} >= {"random_patches"}
    assert registered([("no_such_policy", {}), ("random_patches", {"keep": 0.5})]) == [
        ("random_patches", {"keep": 0.5})
    ]
    with pytest.raises(InputError, match="random_patches"):
        measure_curve([("random_patch", {"keep": 0.5})], tmp_path, SMALL)
    for params in ({}, {"keep": 0}, {"keep": 1.5}, {"keep": 0.5, "r": 1}):
        with pytest.raises(InputError, match="takes keep"):
            measure_curve([("random_patches", params)], tmp_path, SMALL)
    with pytest.raises(InputError, match="batch is 0"):
        measure_curve([], tmp_path, Settings(batch=0))
    with pytest.raises(InputError, match="key=value"):
        main(["--policy", "random_patches", "--param", "keep"])
    assert not list(tmp_path.iterdir())


def test_rows_survive_their_files_and_bad_ones_are_refused(tmp_path):
    row = a_curve_row(params={"artefact": "some/folder/dymu-0.5.json", "r": [1, 2]})
    path = write_row(row_path(tmp_path, row.model, row.policy, row.params), row)
    assert path.name == "tiny-vit-tome-artefact=dymu-0.5-r=_1_2_.json" and read_row(path) == row
    path.write_text("{")
    with pytest.raises(InputError, match="not a row"):
        read_row(path)
    with pytest.raises(InputError, match="Cannot read"):
        read_row(tmp_path / "none.json")


def test_the_table_shows_what_was_measured(tmp_path):
    nothing = {"diff_dense": None, "diff_dense_low": None, "diff_dense_high": None, "diff_random": None}
    rows = [
        a_curve_row(),
        a_curve_row(policy="random_patches", params={"keep": 0.5}, **{**nothing, "diff_dense": -0.5}),
        a_curve_row(params={"r": 4}, flops=7e8, images_per_s=None, speedup=None),
        a_curve_row(policy="dense", params={}, flops=8e8, images_per_s=101.0, **nothing),
    ]
    for row in rows:
        write_row(row_path(tmp_path, row.model, row.policy, row.params), row)
    found = read_curve(tmp_path, "tiny-vit")
    assert [row.title for row in found] == ["dense", "tome (r=4)", "tome (r=13)", "random_patches (keep=0.5)"]
    lines = render_curve(found).splitlines()
    assert lines[2].startswith("| dense | 75.0 (30.0 to 95.0) | – | – | 148.5 | 90.0 | 100.0 % | 101.0 | – |")
    assert lines[4] == (
        "| tome (r=13) | 75.0 (30.0 to 95.0) | -25.0 (-50.0 to +0.0) | +12.5 | 148.5 | 90.0 | 75.0 % | 130.0 (100.0) | "
        "1.31 (1.20 to 1.40) | 1.33 |"
    )
    assert "| – | – | 1.14 |" in lines[3]
    assert read_curve(tmp_path, "other") == []
