"""VTC scores from files of samples."""

from __future__ import annotations

import pytest
from result_rows import a_sample

from vlmprune.core.errors import InputError
from vlmprune.evaluation.schema import SampleRow
from vlmprune.evaluation.vtc import vtc_scores


def run(policy: str, right: str, **changes: object) -> list[SampleRow]:
    """Samples of one run: one letter per question, r right, w wrong, - missing."""
    return [
        a_sample(doc_id=f"q{number}", policy=policy, correct=letter == "r", **changes)
        for number, letter in enumerate(right)
        if letter != "-"
    ]


def test_scores_by_hand() -> None:
    samples = run("dense", "rrrrrw", keep=1.0) + run("downsample", "rrwwwr") + run("todre", "rwrw-r")
    samples += run("random", "wwwwww", seed=0)
    scores = vtc_scores(samples)
    assert set(scores) == {("scenes", "todre", "keep=0.22"), ("scenes", "random", "keep=0.22 seed=0")}
    difficult, simple = scores["scenes", "todre", "keep=0.22"]
    assert (difficult.total, difficult.correct) == (3, 1)  # questions 2, 3 and the missing 4
    assert difficult.accuracy == pytest.approx(100 / 3)
    assert (simple.total, simple.correct, simple.accuracy) == (2, 1, 50.0)


def test_an_empty_group_has_no_accuracy() -> None:
    ((_, simple),) = vtc_scores(run("dense", "r") + run("downsample", "w") + run("grid", "r")).values()
    assert (simple.total, simple.accuracy, simple.ci_low) == (0, None, None)


@pytest.mark.parametrize("number", [0, 2])
def test_reference_runs_are_needed_exactly_once(number: int) -> None:
    samples = run("dense", "r") + run("grid", "r")
    for keep in (0.1, 0.2)[:number]:
        samples += run("downsample", "r", keep=keep)
    with pytest.raises(InputError, match=f"exactly one run of 'downsample'.*has {number}"):
        vtc_scores(samples)
