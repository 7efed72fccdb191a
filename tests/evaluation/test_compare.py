"""The comparison of all policies: complete, resumable, with calibrations where they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import vlmprune
from vlmprune.evaluation import compare
from vlmprune.evaluation.schema import read_results

ROOT = Path(__file__).parents[2]


def test_one_budget_on_a_few_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = {"budgets": (0.11,), "questions": 6, "folder": tmp_path, "random_seeds": 1, "progress": False}
    shutil.copytree(ROOT / compare.RESULTS / compare.CALIBRATIONS, tmp_path / compare.CALIBRATIONS)
    [path] = compare.compare("tiny-llava", **budget)
    results = read_results(path)
    policies = {row.policy for row in results.rows}
    assert policies == {"dense", *vlmprune.available(), *(f"tome+{name}" for name in compare.COMPOSED)}
    for row in results.select(policy="tome+todre", family="all"):
        assert row.params["tome"] in ({}, {"first_blocks": 2}, {"first_blocks": 1}) and row.mean_kept_tokens == 21
    assert len(results.select(policy="tome+todre", family="all")) == 3
    [searched] = results.select(policy="vflowopt", family="all")
    assert searched.params["artefact"].endswith("tiny-llava-vflowopt-0.11.json")
    assert not results.failed and all(row.prefill_ms is None for row in results.rows)

    kept = [row for row in results.rows if row.policy not in ("grid", "dense")]
    path.write_text(results.model_copy(update={"rows": tuple(kept)}).model_dump_json())
    assert compare.compare("tiny-llava", **(budget | {"questions": 3})) == [path]
    again = read_results(path)  # only what was missing was measured, on the same questions, and stands behind the rest
    assert {row.n for row in again.rows if row.family == "all"} == {6}
    assert list(again.rows[: len(kept)]) == kept
    assert {row.policy for row in again.rows[len(kept) :]} == {"grid", "dense"}

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(compare, "evaluate", refuse)
    assert compare.compare("tiny-llava", **budget) == [path]
    assert [file.rows for file in compare.read_all(tmp_path, "tiny-llava")] == [again.rows]
    assert compare.read_all(tmp_path, "tiny") == []


def test_files_are_read_by_falling_budget(tmp_path: Path) -> None:
    source = next((ROOT / compare.RESULTS).glob("tiny-llava-*.json"))
    for keep in (0.05, 1.0, 0.5):
        shutil.copy(source, compare.results_path(tmp_path, "b", "scenes", keep))
    shutil.copy(source, compare.results_path(tmp_path, "a", "scenes", 0.1))
    names = [path.name for path in sorted(tmp_path.iterdir(), key=compare._order)]
    assert names == ["a-scenes-keep0.1.json", *(f"b-scenes-keep{keep}.json" for keep in (1.0, 0.5, 0.05))]
    assert len(compare.read_all(tmp_path)) == 4
