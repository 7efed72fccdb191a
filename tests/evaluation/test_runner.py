from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_policy import FixedKeep

from vlmprune.api import HANDLE, applied
from vlmprune.core import config
from vlmprune.core.context import Context
from vlmprune.core.errors import BudgetError, InputError
from vlmprune.core.selection import Selection
from vlmprune.evaluation import native
from vlmprune.evaluation.runner import CellsFailed, evaluate
from vlmprune.evaluation.schema import ResultRow, ResultsFile, SampleRow, read_results, read_samples
from vlmprune.evaluation.statistics import wilson
from vlmprune.evaluation.tasks.definition import load_task

LIMIT = 24
SETTINGS = {"model_name": "tiny-llava", "limit": LIMIT, "seed": 7, "batch_size": 8}


@dataclass(frozen=True)
class FailingPolicy(FixedKeep):
    """Raises on the second batch."""

    name = "failing"
    keep: float = 0.5
    kept: tuple[tuple[int, ...], ...] = ()

    def select(self, context: Context) -> Selection:
        if context.n_items != 8:
            raise RuntimeError("the policy broke")
        return Selection.from_mask(context.valid)


@pytest.fixture(scope="module")
def measured(tiny: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[ResultsFile, Path]:
    output = tmp_path_factory.mktemp("run")
    policies = [config.resolve("uniform", keep=0.11), config.resolve(["grid", "uniform"], keep=[0.5, 20])]
    settings = SETTINGS | {"random_seeds": 2, "measure_time": False, "text_only": True}
    results = evaluate(*tiny, policies=policies, output=output, **settings)
    return results, output


def samples_of(row: ResultRow, samples: list[SampleRow]) -> list[SampleRow]:
    return [
        s
        for s in samples
        if (s.policy, s.keep, s.seed) == (row.policy, row.keep, row.seed)
        and (row.family == "all" or s.family == row.family)
    ]


def test_every_cell_has_rows(measured: tuple[ResultsFile, Path]) -> None:
    results, output = measured
    assert read_results(output) == results and not results.failed
    cells = [(row.policy, row.keep, row.seed) for row in results.rows if row.family == "all"]
    assert cells == [
        ("dense", 1.0, None),
        ("text_only", None, None),
        ("uniform", 0.11, None),
        ("grid+uniform", [0.5, 20], None),
        ("random", 0.11, 0),
        ("random", 0.11, 1),
        ("random", 20, 0),  # the composition's mean over layers
        ("random", 20, 1),
    ]
    families = {row.family for row in results.rows}
    assert families == {*load_task("scenes").families, "all", "headline"}


def test_rows_follow_from_the_samples(measured: tuple[ResultsFile, Path]) -> None:
    results, output = measured
    samples = read_samples(output)
    assert len(samples) == 8 * LIMIT
    task = load_task("scenes")
    for row in results.rows:
        own = samples_of(row, samples)
        if row.family == "headline":
            cell = [s for s in samples if (s.policy, s.keep, s.seed) == (row.policy, row.keep, row.seed)]
            own = [s for s in cell if s.family in task.headline]
        assert row.n == len(own) and row.n_images == len({s.image_id for s in own})
        right = sum(s.correct for s in own)
        assert row.accuracy == right / row.n
        assert (row.ci_low, row.ci_high) == wilson(right, row.n)
        for sample in own:
            assert sample.correct == task.is_right({"answer": sample.answer}, sample.prediction)


def test_tokens(measured: tuple[ResultsFile, Path]) -> None:
    results, _ = measured
    tokens = {row.policy: (row.mean_visual_tokens, row.mean_kept_tokens, row.mean_kept_layers) for row in results.rows}
    assert tokens["dense"] == (196, 196, 196)
    assert tokens["text_only"] == (None, None, None)
    assert tokens["uniform"] == (196, 21, 21)  # floor(0.11 * 196)
    assert tokens["grid+uniform"][1] == 20


def test_bytes_of_the_cache(measured: tuple[ResultsFile, Path], tiny: tuple[Any, Any]) -> None:
    """2 x layers x key/value heads x head size x 4 bytes for every stored token; text tokens are the same."""
    results, _ = measured
    text = tiny[0].config.text_config
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    for row in results.select(family="all"):
        if row.policy == "text_only":
            assert row.kv_bytes is None
            continue
        assert row.kv_bytes_dense is not None and row.kv_bytes is not None
        dropped = (row.kv_bytes_dense - row.kv_bytes) / per_token
        assert dropped == pytest.approx(196 - row.mean_kept_layers, abs=0.01)
        assert row.prefill_ms is None and row.prefill_ms_dense is None


def test_comparisons(measured: tuple[ResultsFile, Path]) -> None:
    results, output = measured
    samples = read_samples(output)
    right = {}
    for s in samples:
        right[s.policy, str(s.keep), s.seed, s.doc_id] = s.correct
    ids = [s.doc_id for s in samples if s.policy == "dense"]
    for row in results.select(family="all"):
        own = [right[row.policy, str(row.keep), row.seed, i] for i in ids]
        dense = sum(right["dense", "1.0", None, i] for i in ids)
        assert row.retention == (sum(own) / dense if dense else None)
        if row.policy in ("dense", "random", "text_only"):
            assert row.diff_random is row.diff_ci_low is row.diff_ci_high is None
            continue
        keep = "20" if row.policy == "grid+uniform" else "0.11"
        random = [(right["random", keep, 0, i] + right["random", keep, 1, i]) / 2 for i in ids]
        assert row.diff_random == pytest.approx((sum(own) - sum(random)) / LIMIT)
        assert row.diff_ci_low <= row.diff_random <= row.diff_ci_high


def test_the_stamp(measured: tuple[ResultsFile, Path], tiny: tuple[Any, Any]) -> None:
    stamp = measured[0].rows[0].stamp
    assert stamp.versions["torch"] == torch.__version__.partition("+")[0]
    assert (stamp.dtype, stamp.attention, stamp.runner, stamp.batch_size) == ("float32", "sdpa", "native", 8)
    assert stamp.seeds == {"data": 7, "bootstrap": 7, "random": [0, 1]}
    from vlmprune.evaluation.stamp import weight_hash

    weights = tiny[0].model.multi_modal_projector.linear_1.bias
    before = weights.detach().clone()
    assert weight_hash(tiny[0]) == stamp.weight_hash
    with torch.no_grad():
        weights[3] += 1
        assert weight_hash(tiny[0]) != stamp.weight_hash
        weights.copy_(before)
    assert weight_hash(tiny[0]) == stamp.weight_hash


def test_draws_do_not_depend_on_the_batch(tiny: tuple[Any, Any]) -> None:
    task = load_task("scenes")
    requests = [native.make_request(tiny[1], task, doc, "default") for doc in task.load_docs(7, 6)]

    def kept(order: list[int], size: int) -> dict[str, list[int]]:
        found = {}
        with applied(tiny[0], "random", keep=0.1) as handle:
            for start in range(0, len(order), size):
                batch = [requests[i] for i in order[start : start + size]]
                native.answer_one_batch(*tiny, batch, {"max_new_tokens": 1}, handle)
                found |= {r.sample_id: handle.last.kept(sample=i) for i, r in enumerate(batch)}
        return found

    alone = kept([0, 1, 2, 3, 4, 5], 1)
    assert kept([5, 3, 1, 0, 2, 4], 3) == alone
    # Questions about one image draw differently: the id is the question's.
    assert len({tuple(tokens) for tokens in alone.values()}) == 6


def test_a_policy_that_raises_is_a_failed_cell(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    policies = [FailingPolicy(), config.resolve("uniform", keep=0.5)]
    with pytest.raises(CellsFailed, match="failing keep=0.5 failed on scenes.*the policy broke") as caught:
        evaluate(
            *tiny,
            policies=policies,
            output=tmp_path,
            measure_time=False,
            random_seeds=0,
            **(SETTINGS | {"limit": 10}),
        )
    results = read_results(tmp_path)
    assert caught.value.results == results
    (failed,) = results.failed
    assert failed.policy == "failing" and "the policy broke" in failed.traceback
    assert {row.policy for row in results.rows} == {"dense", "uniform"}
    assert {sample.policy for sample in read_samples(tmp_path)} == {"dense", "uniform"}
    assert HANDLE not in tiny[0].__dict__


def test_an_inactive_policy_is_a_failed_cell(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If the hooks never run, the dense answers must not be filed under the policy's name."""
    generate = tiny[0].generate

    def dense(**inputs: Any) -> torch.Tensor:
        handle = tiny[0].__dict__.get(HANDLE)
        if handle is None:
            return generate(**inputs)
        with handle.disabled():
            return generate(**inputs)

    monkeypatch.setattr(tiny[0], "generate", dense)
    with pytest.raises(CellsFailed, match="left no report"):
        evaluate(*tiny, policies=[config.resolve("uniform", keep=0.5)], random_seeds=0, **(SETTINGS | {"limit": 4}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tasks": ["scene"]}, InputError, "Did you mean 'scenes'"),
        ({"tasks": []}, InputError, "No task"),
        ({"runner": "nativ"}, InputError, "Did you mean 'native'"),
        ({"runner": "lmms-eval", "text_only": True}, InputError, "native runner"),
        ({"limit": 0}, InputError, "limit=0"),
        ({"batch_size": 0}, InputError, "batch_size=0"),
        ({"random_seeds": -1}, InputError, "random_seeds=-1"),
        ({"seed": -1}, InputError, "seed=-1"),
        ({"policies": [config.resolve("uniform", keep=197)]}, BudgetError, "196 visual tokens"),
        ({"policies": [config.resolve("uniform", keep=9)] * 2}, InputError, "given twice"),
    ],
)
def test_bad_input_is_found_before_any_work(
    tiny: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(tiny[0], "forward", never)
    output = tmp_path / "out"
    with pytest.raises(error, match=message):
        evaluate(*tiny, output=output, **(SETTINGS | changes))
    assert not output.exists()


def test_an_output_that_is_a_file_is_refused(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        evaluate(*tiny, output=tmp_path / "file", **SETTINGS)
