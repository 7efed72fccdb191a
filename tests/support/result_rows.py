"""Rows of results files with made-up values, for tests of readers, tables and cards."""

from __future__ import annotations

from typing import Any

from vlmprune.evaluation.schema import ResultRow, SampleRow, Stamp


def a_stamp(**changes: Any) -> Stamp:
    values: dict[str, Any] = {
        "versions": {"torch": "2.0", "transformers": "5.0"},
        "device": "cpu (made up)",
        "dtype": "float32",
        "attention": "sdpa",
        "threads": 1,
        "runner": "native",
        "batch_size": 4,
        "git_revision": None,
        "package_version": "0",
        "weight_hash": "abc",
        "seeds": {"data": 7},
        "started": "2000-01-01T00:00:00+00:00",
    }
    return Stamp(**(values | changes))


def a_row(**changes: Any) -> ResultRow:
    values: dict[str, Any] = {
        "model": "toy",
        "task": "scenes",
        "family": "all",
        "policy": "hiprune",
        "params": {},
        "keep": 0.22,
        "basis": "site",
        "seed": None,
        "n": 40,
        "n_images": 8,
        "accuracy": 0.75,
        "ci_low": 0.6,
        "ci_high": 0.86,
        "retention": 0.9,
        "diff_random": 0.1,
        "diff_ci_low": 0.02,
        "diff_ci_high": 0.18,
        "mean_visual_tokens": 196.0,
        "mean_kept_tokens": 43.0,
        "mean_kept_layers": 43.0,
        "prefill_ms": 12.34,
        "prefill_ms_dense": 23.45,
        "kv_bytes": 338900,
        "kv_bytes_dense": 1279000,
        "stamp": a_stamp(),
    }
    return ResultRow(**(values | changes))


def a_sample(**changes: Any) -> SampleRow:
    values: dict[str, Any] = {
        "model": "toy",
        "doc_id": "a/0",
        "task": "scenes",
        "family": "shape",
        "image_id": "a",
        "question": "what shape is red?",
        "answer": "star",
        "prediction": "star",
        "correct": True,
        "policy": "hiprune",
        "params": {},
        "keep": 0.22,
        "seed": None,
        "visual_tokens": 196,
        "kept_tokens": 43,
        "kept_layers": 43.0,
    }
    return SampleRow(**(values | changes))
