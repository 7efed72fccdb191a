"""Rows of the accuracy-throughput curve of an embedded classifier, and their table.

One file holds one row. A value that was not measured is null.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlmprune.core.errors import InputError
from vlmprune.evaluation.schema import DENSE, SCHEMA_VERSION, Stamp, first_error, write_text_atomically
from vlmprune.evaluation.tables import MISSING, percent

RANDOM_PATCHES = "random_patches"
"""Baseline of the harness: random patches are left out, and tokens are not merged."""


class CurveRow(BaseModel):
    """One policy with its parameters on held-out pictures.

    Attributes:
        model, task: names. policy: registered name, `"dense"` or `"random_patches"`.
        params: its parameters. seed: of its own draws, None where it draws nothing.
        n: pictures. right: one character per picture, `1` where the class is right; the pictures' seed is
            `stamp.seeds["data"]`.
        accuracy: share of right answers, 0..1. ci_low, ci_high: its 95 % Wilson interval.
        diff_dense, diff_dense_low, diff_dense_high: accuracy minus that of the dense model on the same pictures, with
            its 95 % paired bootstrap interval over handwritten digits. None for the dense model.
        diff_random, diff_random_low, diff_random_high: the same against random patches, of which as many are left in
            every block as the policy left (mean over the seeds). None for the dense model and the baseline.
        accuracy_random: of these random patches, per seed in `stamp.seeds["random"]`.
        tokens_attended, tokens_passed: mean tokens of a picture in the attention and in the MLP of every block, class
            token included. tokens_exit: behind the last block.
        flops, flops_dense: mean FLOPs of a picture by PyTorch's counter, the policy's own products included.
        images_per_s, images_per_s_dense: medians over rounds in which the two take turns.
        speedup, speedup_low, speedup_high: median, lowest and highest of the rounds' ratios.
        rounds: timed rounds of one batch of `stamp.batch_size` each.
        stamp: circumstances. stamp_times: of the times, None where there are none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["vlmprune-vit-curve"] = "vlmprune-vit-curve"
    schema_version: int = Field(default=SCHEMA_VERSION, le=SCHEMA_VERSION)
    model: str
    task: str
    policy: str
    params: dict[str, Any] = Field(default_factory=dict)
    seed: int | None
    n: int = Field(ge=1)
    right: str = Field(pattern="^[01]+$")
    accuracy: float = Field(ge=0, le=1)
    ci_low: float = Field(ge=0, le=1)
    ci_high: float = Field(ge=0, le=1)
    diff_dense: float | None
    diff_dense_low: float | None
    diff_dense_high: float | None
    diff_random: float | None
    diff_random_low: float | None
    diff_random_high: float | None
    accuracy_random: tuple[float, ...]
    tokens_attended: tuple[float, ...]
    tokens_passed: tuple[float, ...]
    tokens_exit: float
    flops: float = Field(gt=0)
    flops_dense: float = Field(gt=0)
    images_per_s: float | None
    images_per_s_dense: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    rounds: int = Field(ge=0)
    stamp: Stamp
    stamp_times: Stamp | None

    @property
    def mean_tokens(self) -> float:
        """Mean over blocks of the tokens in the attention."""
        return sum(self.tokens_attended) / len(self.tokens_attended)

    @property
    def flops_share(self) -> float:
        """FLOPs as a share of the dense model's."""
        return self.flops / self.flops_dense

    @property
    def title(self) -> str:
        """Policy with its parameters."""
        return cell_title(self.policy, self.params)


def cell_title(policy: str, params: Mapping[str, Any]) -> str:
    """`tome (r=13)`, `dymu (keep=0.5, calibrated)`."""
    shown = ", ".join("calibrated" if name == "artefact" else _part(name, value) for name, value in params.items())
    return policy + (f" ({shown})" if shown else "")


def row_path(folder: Path, model: str, policy: str, params: Mapping[str, Any]) -> Path:
    """File of a cell's row."""
    text = "-".join([model, policy, *(_part(name, value) for name, value in params.items())])
    return folder / (re.sub(r"[^\w.=-]+", "_", text) + ".json")


def write_row(path: Path, row: CurveRow) -> Path:
    """Write a row atomically."""
    return write_text_atomically(path, row.model_dump_json(indent=1) + "\n")


def read_row(path: Path) -> CurveRow:
    """Read a row.

    Raises:
        InputError: the file cannot be read or is not of this form.
    """
    try:
        return CurveRow.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValidationError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a row of the curve: {first_error(error)}") from None


def read_curve(folder: Path, model: str) -> list[CurveRow]:
    """The rows of a model: dense first, then by policy, FLOPs falling."""
    rows = [row for row in map(read_row, sorted(folder.glob("*.json"))) if row.model == model]
    order = {DENSE: 0, RANDOM_PATCHES: 2}
    return sorted(rows, key=lambda row: (order.get(row.policy, 1), row.policy, -row.flops, row.title))


def render_curve(rows: Sequence[CurveRow]) -> str:
    """A Markdown table, a line per row."""
    header = [
        "policy",
        "accuracy (95 % interval)",
        "vs dense",
        "vs random patches",
        "mean tokens",
        "tokens at the exit",
    ]
    header += ["FLOPs", "images/s (dense)", "speed-up (range)", "1 / FLOPs"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows:
        own = f"{percent(row.accuracy)} ({percent(row.ci_low)} to {percent(row.ci_high)})"
        lines.append(
            [
                row.title,
                own,
                _difference(row.diff_dense, row.diff_dense_low, row.diff_dense_high),
                _difference(row.diff_random, row.diff_random_low, row.diff_random_high),
                f"{row.mean_tokens:.1f}",
                f"{row.tokens_exit:.1f}",
                f"{percent(row.flops_share)} %",
                *_speed(row),
                f"{1 / row.flops_share:.2f}",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _difference(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return MISSING
    shown = percent(value, sign=True)
    return shown if low is None else f"{shown} ({percent(low, sign=True)} to {percent(high, sign=True)})"


def _speed(row: CurveRow) -> tuple[str, str]:
    if row.images_per_s is None or row.policy == DENSE:
        return MISSING if row.images_per_s is None else f"{row.images_per_s:.1f}", MISSING
    spread = f"{row.speedup_low:.2f} to {row.speedup_high:.2f}"
    return f"{row.images_per_s:.1f} ({row.images_per_s_dense:.1f})", f"{row.speedup:.2f} ({spread})"


def _part(name: str, value: Any) -> str:
    """A parameter as text without blanks; a path by its last part."""
    text = Path(value).stem if isinstance(value, str) and "/" in value else str(value)
    return f"{name}={text}".replace(" ", "")
