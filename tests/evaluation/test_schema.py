from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from result_rows import a_row, a_sample

from vlmprune.core.errors import InputError
from vlmprune.evaluation import schema
from vlmprune.evaluation.schema import (
    ResultsFile,
    read_results,
    read_samples,
    write_results,
    write_samples,
)

# The published names of a row; a change of one is a new schema version.
ROW_FIELDS = (
    "model task family policy params keep basis seed n n_images accuracy ci_low ci_high retention "
    "diff_random diff_ci_low diff_ci_high mean_visual_tokens mean_kept_tokens mean_kept_layers "
    "prefill_ms prefill_ms_dense kv_bytes kv_bytes_dense stamp"
).split()


def test_field_names() -> None:
    assert list(schema.ResultRow.model_fields) == ROW_FIELDS
    assert {"doc_id", "image_id", "answer", "prediction", "correct"} <= set(schema.SampleRow.model_fields)


def test_round_trip(tmp_path: Path) -> None:
    results = ResultsFile(rows=(a_row(), a_row(policy="dense", prefill_ms=None)))
    write_results(tmp_path / "new", results)
    assert read_results(tmp_path / "new") == results
    assert read_results(tmp_path / "new" / "results.json") == results
    samples = [a_sample(), a_sample(prediction='zwei\n"drei" ☃', kept_tokens=None)]
    write_samples(tmp_path, samples)
    assert read_samples(tmp_path) == samples


@pytest.mark.parametrize("keep", [0.22, 43, 1, 1.0, "flops:0.4", [0.5, 12], None])
def test_budgets_keep_their_meaning(tmp_path: Path, keep: Any) -> None:
    """`1` is one token, `1.0` is everything: the two must not meet in the file."""
    write_results(tmp_path, ResultsFile(rows=(a_row(keep=keep),)))
    stored = read_results(tmp_path).rows[0].keep
    assert stored == keep and type(stored) is type(keep)


def test_not_measured_is_null(tmp_path: Path) -> None:
    write_results(tmp_path, ResultsFile(rows=(a_row(kv_bytes=None, retention=None),)))
    row = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert row["kv_bytes"] is None and row["retention"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results(tmp_path, ResultsFile(rows=(a_row(),)))
    before = (tmp_path / "results.json").read_bytes()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(schema.os, "replace", full)
    with pytest.raises(OSError, match="space"):
        write_results(tmp_path, ResultsFile())
    assert (tmp_path / "results.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a results file"),
        ('{"rows": 3}', "rows"),
        ('{"unheard_of": 1}', "unheard_of"),
        ('{"schema_version": 999}', "newer"),
        ('{"kind": "other"}', "kind"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_results(tmp_path)


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot read"):
        read_results(tmp_path)
    with pytest.raises(InputError, match="Cannot read"):
        read_samples(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        write_results(tmp_path / "file" / "below", ResultsFile())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5])
def test_impossible_accuracies_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="accuracy"):
        a_row(accuracy=value)
