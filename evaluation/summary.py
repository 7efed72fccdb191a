"""From answers to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmprune.evaluation.cells import Cell, random_budget
from vlmprune.evaluation.measure import Prefill
from vlmprune.evaluation.native import Answer
from vlmprune.evaluation.schema import ALL_FAMILIES, DENSE, RANDOM, TEXT_ONLY, Keep, ResultRow, SampleRow, Stamp
from vlmprune.evaluation.statistics import paired_bootstrap, wilson
from vlmprune.evaluation.tasks.definition import Task

HEADLINE = "headline"
NOT_MEASURED = Prefill(None, None, None, None)


@dataclass
class CellRun:
    """A finished cell on one task: its samples in question order, and its times."""

    cell: Cell
    samples: list[SampleRow]
    prefill: Prefill = NOT_MEASURED

    @property
    def random_budget(self) -> Keep:
        """The budget of `random` with which this cell is compared."""
        layers = mean_per_image([sample.kept_layers for sample in self.samples], self.samples)
        tokens = mean_per_image([sample.kept_tokens for sample in self.samples], self.samples)
        visual = mean_per_image([sample.visual_tokens for sample in self.samples], self.samples)
        return random_budget(self.cell, layers, tokens, visual)


@dataclass
class TaskRun:
    """All finished cells of one task. `docs` are the questions, in the order of every cell's samples."""

    task: Task
    docs: list[dict[str, Any]]
    style: str
    runs: dict[str, CellRun] = field(default_factory=dict)

    @property
    def dense(self) -> CellRun | None:
        """The dense run, if it is there."""
        return next((run for run in self.runs.values() if run.cell.name == DENSE), None)

    def randoms(self, cell: Cell) -> list[CellRun]:
        """The finished random runs at the budget with which a cell is compared."""
        if cell.is_reference or cell.name == RANDOM:
            return []
        budget = self.runs[cell.key].random_budget
        return [r for r in self.runs.values() if r.cell.name == RANDOM and not r.cell.params and r.cell.keep == budget]


def make_samples(
    model_name: str,
    task: Task,
    cell: Cell,
    docs: Sequence[Mapping[str, Any]],
    answers: Sequence[Answer],
    style: str,
) -> list[SampleRow]:
    """One sample row per question."""
    return [
        SampleRow(
            model=model_name,
            doc_id=doc["doc_id"],
            task=task.name,
            family=doc["family"],
            image_id=doc["image_id"],
            question=task.text(doc, style),
            answer=task.doc_to_target(doc),
            prediction=answer.text,
            correct=task.is_right(doc, answer.text),
            policy=cell.name,
            params=cell.params,
            keep=cell.keep,
            seed=cell.seed,
            n_images=answer.n_images,
            visual_tokens=answer.visual,
            kept_tokens=answer.kept,
            kept_layers=answer.layers,
        )
        for doc, answer in zip(docs, answers, strict=True)
    ]


def task_rows(model_name: str, run: TaskRun, stamp: Stamp, bootstrap_seed: int) -> list[ResultRow]:
    """Rows of every finished cell of a task: all questions, the headline families together, and each family.

    The headline row is left out where every family belongs to it.
    """
    present = [name for name in run.task.families if any(doc["family"] == name for doc in run.docs)]
    groups = {ALL_FAMILIES: list(range(len(run.docs)))}
    if set(present) - set(run.task.headline) and set(present) & set(run.task.headline):
        groups[HEADLINE] = [i for i, doc in enumerate(run.docs) if doc["family"] in run.task.headline]
    for name in present:
        groups[name] = [i for i, doc in enumerate(run.docs) if doc["family"] == name]
    return [
        _row(model_name, run, cell_run, family, chosen, stamp, bootstrap_seed)
        for cell_run in run.runs.values()
        for family, chosen in groups.items()
    ]


def mean_per_image(values: Sequence[float | None], samples: Sequence[SampleRow]) -> float | None:
    """Mean of per-sample values over images; None where one is unknown or there is no image."""
    n_images = sum(sample.n_images for sample in samples)
    if n_images == 0 or any(value is None for value in values):
        return None
    return sum(value for value in values if value is not None) / n_images


def _row(
    model_name: str,
    run: TaskRun,
    cell_run: CellRun,
    family: str,
    chosen: Sequence[int],
    stamp: Stamp,
    bootstrap_seed: int,
) -> ResultRow:
    cell, samples = cell_run.cell, [cell_run.samples[i] for i in chosen]
    right = sum(sample.correct for sample in samples)
    low, high = wilson(right, len(samples))
    difference = _difference(run, cell_run, chosen, bootstrap_seed)
    prefill = cell_run.prefill if family == ALL_FAMILIES else NOT_MEASURED
    is_dense = cell.name == DENSE
    return ResultRow(
        model=model_name,
        task=run.task.name,
        family=family,
        policy=cell.name,
        params=cell.params,
        keep=cell.keep,
        basis=cell.basis,
        seed=cell.seed,
        n=len(samples),
        n_images=len({sample.image_id for sample in samples}),
        accuracy=right / len(samples),
        ci_low=low,
        ci_high=high,
        retention=_retention(run, right, chosen),
        diff_random=difference[0],
        diff_ci_low=difference[1],
        diff_ci_high=difference[2],
        mean_visual_tokens=mean_per_image([s.visual_tokens for s in samples], samples),
        mean_kept_tokens=mean_per_image([s.kept_tokens for s in samples], samples),
        mean_kept_layers=mean_per_image([s.kept_layers for s in samples], samples),
        prefill_ms=prefill.ms_dense if is_dense else prefill.ms,
        prefill_ms_dense=prefill.ms_dense,
        kv_bytes=prefill.kv_bytes_dense if is_dense else prefill.kv_bytes,
        kv_bytes_dense=prefill.kv_bytes_dense,
        stamp=stamp,
    )


def _retention(run: TaskRun, right: int, chosen: Sequence[int]) -> float | None:
    dense = run.dense
    right_dense = 0 if dense is None else sum(dense.samples[i].correct for i in chosen)
    return right / right_dense if right_dense else None


def _difference(
    run: TaskRun, cell_run: CellRun, chosen: Sequence[int], seed: int
) -> tuple[float | None, float | None, float | None]:
    """Difference to the mean over the random runs, question by question."""
    randoms = run.randoms(cell_run.cell)
    if not randoms or cell_run.cell.name in (DENSE, TEXT_ONLY):
        return None, None, None
    own = [float(cell_run.samples[i].correct) for i in chosen]
    other = [sum(r.samples[i].correct for r in randoms) / len(randoms) for i in chosen]
    return paired_bootstrap(own, other, [cell_run.samples[i].image_id for i in chosen], seed)
