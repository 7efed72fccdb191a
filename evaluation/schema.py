"""Result files: `results.json` (a `ResultsFile`) and `samples.jsonl` (one `SampleRow` per line).

Both are written atomically: a reader sees the old file or the whole new one. A value that was not measured is
null, never 0. `SCHEMA_VERSION` grows with every change of meaning; a reader refuses files newer than itself.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlmprune.core.errors import InputError

SCHEMA_VERSION = 1
ALL_FAMILIES = "all"
DENSE = "dense"
RANDOM = "random"
TEXT_ONLY = "text_only"
RESULTS_NAME = "results.json"
SAMPLES_NAME = "samples.jsonl"

Keep = float | int | str | list[Any] | None


class _Strict(BaseModel):
    # Infinities and NaN have no JSON form, so they are refused here rather than written.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Stamp(_Strict):
    """Circumstances under which a row was measured.

    Attributes:
        versions: package name -> version, of what can change a result.
        device: e.g. `"cpu (Intel ...)"` or the name of the GPU.
        dtype: dtype of the weights. attention: attention implementation of the decoder.
        threads: CPU threads of torch.
        runner: `"native"` or `"lmms-eval"`.
        batch_size: rows per generate call (answers). Times and KV bytes are always measured on single
            prompts.
        git_revision: revision of the code, `+changes` behind it if files were changed; None outside a
            checkout.
        package_version: version of this package.
        weight_hash: digest of the model's parameters and buffers (`vlmprune.evaluation.stamp.weight_hash`).
        seeds: `data` (which questions), `bootstrap`, and `random` (list of seeds of the random rows).
        started: UTC time in ISO 8601 form.
    """

    versions: dict[str, str]
    device: str
    dtype: str
    attention: str | None
    threads: int
    runner: str
    batch_size: int
    git_revision: str | None
    package_version: str
    weight_hash: str
    seeds: dict[str, Any]
    started: str


class ResultRow(_Strict):
    """One policy at one budget on one task, over all its questions or over one family.

    Attributes:
        model: name or path that was given. task: task name.
        family: `"all"`, a question family, or `"headline"` (the headline families together, where they are
            not all).
        policy: registered name (`a+b` for a composition), `"dense"`, or `"text_only"` (no image in the
            prompt).
        params: hyper-parameters that differ from the defaults, without the budget.
        keep: the budget as `Budget.parse` reads it; 1.0 for dense, None for `text_only`.
        basis: what the budget is a share of: `site`, `final` or `mean_layers`.
        seed: seed of the policy's own draws, None where it draws nothing.
        n, n_images: questions and distinct images.
        accuracy: share of right answers, 0..1. ci_low, ci_high: its 95 % Wilson interval.
        retention: accuracy / dense accuracy on the same questions; None where dense has none right.
        diff_random: accuracy minus that of `random` at the same budget (mean over its seeds) on the same
            questions.
        diff_ci_low, diff_ci_high: its 95 % paired bootstrap interval over images. All three None for
            `random`, `dense`, `text_only`.
        mean_visual_tokens: visual tokens per image before any reduction.
        mean_kept_tokens: after the last site, per image. mean_kept_layers: mean over decoder layers, per
            image.
        prefill_ms, prefill_ms_dense: median milliseconds of one prompt's prefill (vision tower, policy,
            decoder; logits of the last position), measured in alternation. Only in rows with family `"all"`.
        kv_bytes, kv_bytes_dense: bytes of keys and values after the prefill of one prompt, mean over the
            timed prompts. Only in rows with family `"all"`.
    """

    model: str
    task: str
    family: str
    policy: str
    params: dict[str, Any] = Field(default_factory=dict)
    keep: Keep
    basis: str
    seed: int | None
    n: int = Field(ge=1)
    n_images: int = Field(ge=1)
    accuracy: float = Field(ge=0, le=1)
    ci_low: float = Field(ge=0, le=1)
    ci_high: float = Field(ge=0, le=1)
    retention: float | None
    diff_random: float | None
    diff_ci_low: float | None
    diff_ci_high: float | None
    mean_visual_tokens: float | None
    mean_kept_tokens: float | None
    mean_kept_layers: float | None
    prefill_ms: float | None
    prefill_ms_dense: float | None
    kv_bytes: int | None
    kv_bytes_dense: int | None
    stamp: Stamp


class FailedCell(_Strict):
    """A policy that raised on a task. It has no row, so no accuracy.

    Attributes:
        error: one line, exception class and message. traceback: the whole text.
    """

    model: str
    task: str
    policy: str
    params: dict[str, Any] = Field(default_factory=dict)
    keep: Keep
    seed: int | None
    error: str
    traceback: str


class SampleRow(_Strict):
    """One answer.

    Attributes:
        doc_id: id of the question, unique in its task and equal for every policy, so rows can be joined on
            it.
        image_id: id of the picture.
        answer: the target. prediction: the decoded new tokens. correct: exact match.
        visual_tokens, kept_tokens: of the sample, all its images together; kept_layers: mean over decoder
            layers.
    """

    model: str
    doc_id: str
    task: str
    family: str
    image_id: str
    question: str
    answer: str
    prediction: str
    correct: bool
    policy: str
    params: dict[str, Any] = Field(default_factory=dict)
    keep: Keep
    seed: int | None
    n_images: int = 1
    visual_tokens: int | None
    kept_tokens: int | None
    kept_layers: float | None


class ResultsFile(_Strict):
    """Content of `results.json`.

    Attributes:
        kind: constant, so that a reader can tell the file from other JSON.
        rows: finished cells. failed: cells whose policy raised.
        headline: task -> families that count for the headline (others are reported, but at or near chance).
    """

    kind: Literal["vlmprune-results"] = "vlmprune-results"
    schema_version: int = SCHEMA_VERSION
    rows: tuple[ResultRow, ...] = ()
    failed: tuple[FailedCell, ...] = ()
    headline: dict[str, tuple[str, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _not_newer(self) -> ResultsFile:
        if self.schema_version > SCHEMA_VERSION:
            raise ValueError(f"schema version {self.schema_version} is newer than {SCHEMA_VERSION}; update vlmprune")
        return self

    def select(self, **values: Any) -> list[ResultRow]:
        """Rows whose fields equal the given values, e.g. `select(task="scenes", family="all")`."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in values.items())]


def write_text_atomically(path: Path, text: str) -> Path:
    """Write UTF-8 text so that a reader never sees half of it; missing folders are made.

    Raises:
        InputError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}; give another output folder.") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_results(folder: Path, results: ResultsFile) -> Path:
    """Write `results.json` into a folder."""
    return write_text_atomically(folder / RESULTS_NAME, results.model_dump_json(indent=1) + "\n")


def write_samples(folder: Path, samples: Iterable[SampleRow]) -> Path:
    """Write `samples.jsonl` into a folder."""
    return write_text_atomically(folder / SAMPLES_NAME, "".join(row.model_dump_json() + "\n" for row in samples))


def read_results(path: Path) -> ResultsFile:
    """Read `results.json`, given as a file or as its folder.

    Raises:
        InputError: missing, not of this form, or of a newer schema version.
    """
    file = path / RESULTS_NAME if path.is_dir() else path
    try:
        return ResultsFile.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error.strerror}.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a results file: {first_error(error)}") from None


def read_samples(path: Path) -> list[SampleRow]:
    """Read `samples.jsonl`, given as a file or as its folder.

    Raises:
        InputError: missing, or a line is not of this form.
    """
    file = path / SAMPLES_NAME if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [SampleRow.model_validate_json(line) for line in lines if line.strip()]
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error.strerror}.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a file of samples: {first_error(error)}") from None


def first_error(error: ValueError) -> str:
    """The first finding of a validation error in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
