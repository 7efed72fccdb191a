"""Evaluation of policies: dense, `random` at every budget and the named policies on the same questions."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmprune.core.errors import InputError, VlmpruneError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.registry import suggest
from vlmprune.evaluation import measure, native
from vlmprune.evaluation.cells import Cell, first_cells, policy_cell, random_cell
from vlmprune.evaluation.progress import Progress
from vlmprune.evaluation.schema import DENSE, TEXT_ONLY, FailedCell, ResultsFile, write_results, write_samples
from vlmprune.evaluation.stamp import make_stamp
from vlmprune.evaluation.summary import CellRun, TaskRun, make_samples, task_rows
from vlmprune.evaluation.tasks.definition import DEFAULT_PROMPT, INSTRUCT_PROMPT, load_tasks

if TYPE_CHECKING:
    from vlmprune.api import Handle

logger = logging.getLogger("vlmprune")
RUNNERS = ("native", "lmms-eval")


class CellsFailed(VlmpruneError, RuntimeError):
    """At least one policy raised. `results` holds what finished and, under `failed`, what did not."""

    def __init__(self, results: ResultsFile) -> None:
        first = results.failed[0]
        more = f" (and {len(results.failed) - 1} more)" if len(results.failed) > 1 else ""
        super().__init__(f"{first.policy} keep={first.keep} failed on {first.task}{more}: {first.error}")
        self.results = results


class Engine(Protocol):
    """Produces the answers of one cell on one task, in the order of the documents."""

    def answer(
        self, run: TaskRun, cell: Cell, handle: Handle | None, advance: Callable[[int], None]
    ) -> list[native.Answer]: ...


@dataclass
class NativeEngine:
    """Answers in this process."""

    model: Any
    processor: Any
    batch_size: int

    def answer(
        self, run: TaskRun, cell: Cell, handle: Handle | None, advance: Callable[[int], None]
    ) -> list[native.Answer]:
        """See :class:`Engine`."""
        with_image = cell.name != TEXT_ONLY
        requests = [native.make_request(self.processor, run.task, doc, run.style, with_image) for doc in run.docs]
        return native.answer_requests(
            self.model, self.processor, requests, run.task.generation, self.batch_size, handle, advance
        )


@dataclass
class _State:
    """What `evaluate` was asked for, and what came out so far."""

    model: Any
    processor: Any
    model_name: str
    info: ModelInfo
    engine: Engine
    measure_time: bool
    random_seeds: range
    progress: Progress
    failed: list[FailedCell] = field(default_factory=list)


def evaluate(
    model: Any,
    processor: Any,
    *,
    model_name: str,
    policies: Sequence[Policy] = (),
    tasks: Sequence[str] = ("scenes",),
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    output: str | Path | None = None,
    random_seeds: int = 1,
    measure_time: bool = True,
    text_only: bool = False,
    runner: str = "native",
    progress: bool = False,
    cache: Path | None = None,
) -> ResultsFile:
    """Evaluate policies on tasks; everything is checked before any work starts.

    Dense and `random` (at each policy's budget) always run beside. Answers are greedy.

    Args:
        model, processor: a vision-language model without an applied policy, and its processor.
        model_name: name for the reports; embedded models are asked without an instruction.
        policies: what to evaluate.
        tasks: names of tasks. limit: questions per task, None for the task's size.
        seed: which questions (and, for `scenes`, which pictures) are used, and the bootstrap's draws.
        batch_size: questions per generate call.
        output: folder for `results.json` and `samples.jsonl`; None writes nothing.
        random_seeds: number of seeds of `random`, 0 leaves it out.
        measure_time: measure prefill times; False leaves them null.
        text_only: also ask without any image (the blind score); native runner only.
        runner: `"native"` or `"lmms-eval"`; both give the same answers.
        progress: show a progress bar on standard error.
        cache: folder for lmms-eval's task files, None for the user's cache folder.

    Returns:
        The rows.

    Raises:
        InputError: unknown task or runner, a number out of range, or a policy or budget that does not fit the
        model. CellsFailed: a policy raised while it ran; files are written, and the error carries the
        results.
    """
    _check_numbers(limit, batch_size, random_seeds, seed)
    if runner not in RUNNERS:
        raise InputError(f"Unknown runner {runner!r}.{suggest(runner, list(RUNNERS))}")
    if text_only and runner != "native":
        raise InputError("The text-only score needs the native runner: the harness's prompts hold the image.")
    loaded = load_tasks(list(tasks))
    info = _check_policies(model, processor, policies)
    style = prompt_style(model_name)
    seeds = range(random_seeds)
    cells = first_cells(policies, info, text_only, seeds)
    folder = None if output is None else _writable(Path(output))
    engine = _make_engine(runner, model, processor, batch_size, style, cache)
    runs = [TaskRun(task, task.load_docs(seed, limit), style) for task in loaded]
    stamp_seeds = {"data": seed, "bootstrap": seed, "random": list(seeds)}
    stamp = make_stamp(model, runner, batch_size, stamp_seeds)
    with Progress(progress, len(cells) * sum(len(run.docs) for run in runs)) as bar:
        state = _State(model, processor, model_name, info, engine, measure_time, seeds, bar)
        for run in runs:
            _run_task(state, run, cells)
    rows = [row for run in runs for row in task_rows(model_name, run, stamp, seed)]
    headline = {run.task.name: run.task.headline for run in runs}
    results = ResultsFile(rows=tuple(rows), failed=tuple(state.failed), headline=headline)
    if folder is not None:
        write_samples(folder, [s for run in runs for cell_run in run.runs.values() for s in cell_run.samples])
        write_results(folder, results)
    if state.failed:
        raise CellsFailed(results)
    return results


def prompt_style(model_name: str) -> str:
    """Prompt style of a model: embedded ones answer in one word anyway, others are told to."""
    from vlmprune.embedded import embedded_models

    return DEFAULT_PROMPT if Path(model_name).name in embedded_models() else INSTRUCT_PROMPT


def _run_task(state: _State, run: TaskRun, cells: Sequence[Cell]) -> None:
    for cell in cells:
        _run_cell(state, run, cell)
        if cell.name == DENSE and not run.runs:
            return  # without the dense answers nothing can be compared
    for cell_run in list(run.runs.values()):
        budget = cell_run.random_budget
        for extra in [] if budget is None else [random_cell(budget, seed, state.info) for seed in state.random_seeds]:
            if extra.key not in run.runs and not any(extra.key == cell.key for cell in cells):
                state.progress.extend(len(run.docs))
                _run_cell(state, run, extra)
    _measure_dense(state, run)


def _run_cell(state: _State, run: TaskRun, cell: Cell) -> None:
    """Run one cell and file it under the finished or the failed ones."""
    state.progress.describe(f"{run.task.name}: {cell.title}")
    try:
        with _applied(state, cell) as handle:
            answers = state.engine.answer(run, cell, handle, state.progress.advance)
            samples = make_samples(state.model_name, run.task, cell, run.docs, answers, run.style)
            finished = CellRun(cell, samples)
            if handle is not None:
                finished.prefill = _measure(state, run, handle)
    except Exception as error:  # whatever a policy raises must end in a failed cell, never in wrong answers
        logger.error("%s failed on %s: %s", cell.title, run.task.name, error)
        state.failed.append(
            FailedCell(
                model=state.model_name,
                task=run.task.name,
                policy=cell.name,
                params=cell.params,
                keep=cell.keep,
                seed=cell.seed,
                error=f"{type(error).__name__}: {error}",
                traceback=traceback.format_exc(),
            )
        )
        return
    run.runs[cell.key] = finished


def _measure(state: _State, run: TaskRun, handle: Handle | None) -> measure.Prefill:
    docs = measure.spread(run.docs, measure.PROMPTS)
    requests = [native.make_request(state.processor, run.task, doc, run.style) for doc in docs]
    return measure.measure_prefill(state.model, state.processor, requests, handle, state.measure_time)


def _measure_dense(state: _State, run: TaskRun) -> None:
    """Give the dense row its own measurement."""
    if run.dense is not None:
        run.dense.prefill = _measure(state, run, None)


@contextmanager
def _applied(state: _State, cell: Cell) -> Iterator[Handle | None]:
    if cell.policy is None:
        yield None
        return
    from vlmprune.api import applied

    with applied(state.model, cell.policy, processor=state.processor) as handle:
        yield handle


def _make_engine(runner: str, model: Any, processor: Any, batch_size: int, style: str, cache: Path | None) -> Engine:
    if runner == "native":
        return NativeEngine(model, processor, batch_size)
    from vlmprune.evaluation.lmms_engine import LmmsEngine

    return LmmsEngine.create(model, processor, batch_size, style, cache)


def _check_numbers(limit: int | None, batch_size: int, random_seeds: int, seed: int) -> None:
    for name, value, least in (
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("random_seeds", random_seeds, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"{name}={value} is out of range; give at least {least}.")
    if seed < 0:
        raise InputError(f"seed={seed} is out of range; give 0 or more.")


def _check_policies(model: Any, processor: Any, policies: Sequence[Policy]) -> ModelInfo:
    """Apply and remove every policy once, so that a budget that does not fit is found before any work."""
    from vlmprune.adapters.detect import model_info
    from vlmprune.api import applied

    info = model_info(model)
    keys = [policy_cell(policy, info).key for policy in policies]
    if len(set(keys)) != len(keys):
        raise InputError("A policy was given twice with the same settings.")
    for policy in policies:
        try:
            with applied(model, policy, processor=processor):
                pass
        except VlmpruneError:
            raise
        except Exception:
            logger.debug("%s raised when applied; its cells will fail", policy.name, exc_info=True)
    return info


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Output folder {folder} cannot be made: {error.strerror}.") from None
    return folder
