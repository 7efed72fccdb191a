"""All policies on an embedded model at all budgets, one results file per task and budget.

python -m vlmprune.evaluation.compare --model tiny-llava   # goes on where an earlier run stopped
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmprune.adapters.detect import model_info
from vlmprune.core import config
from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry
from vlmprune.embedded import load_embedded
from vlmprune.evaluation.cells import Cell, policy_cell
from vlmprune.evaluation.runner import evaluate
from vlmprune.evaluation.schema import RANDOM, ResultRow, ResultsFile, read_results, write_text_atomically

RESULTS = Path("evaluation") / "results"
CALIBRATIONS = "calibration"
BUDGETS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.05)
COMPOSED = ("hiprune", "todre")
"""What chooses among the tokens that `tome` leaves inside the tower, merged in all of its blocks or the first ones."""
FIRST_BLOCKS = (None, 2, 1)
TOWER_SHARE = 0.5
"""Share of the tokens that the merge leaves in a composition."""
QUESTIONS = 500
SEED = 1


def results_path(folder: Path, model: str, task: str, keep: float) -> Path:
    """File of one budget's rows."""
    return folder / f"{model}-{task}-keep{keep}.json"


def policies_at(keep: float, model: str, folder: Path) -> list[Policy]:
    """Every policy with its defaults at a budget, and compositions; ``random`` runs beside anyway.

    A policy with a calibration of this model for this budget in ``folder`` uses it; one that cannot do without is
    left out where there is none.
    """
    chosen: list[Policy] = []
    for name in registry.available():
        parameters: dict[str, object] = {"keep": keep}
        artefact = folder / CALIBRATIONS / f"{model}-{name}-{keep}.json"
        if artefact.is_file():
            parameters["artefact"] = artefact.as_posix()
        elif not registry.get(name).meta.training_free and keep < 1:
            continue
        if name != RANDOM:
            chosen.append(config.build(name, parameters))
    if keep < TOWER_SHARE:
        rest = round(keep / TOWER_SHARE, 6)
        for first in FIRST_BLOCKS:
            tome = config.build("tome", {"keep": TOWER_SHARE, "first_blocks": first})
            chosen += [config.resolve([tome, config.build(name, {"keep": rest})]) for name in COMPOSED]
    return chosen


def compare(
    model: str = "tiny-llava",
    tasks: Sequence[str] = ("scenes",),
    budgets: Sequence[float] = BUDGETS,
    questions: int = QUESTIONS,
    folder: Path = RESULTS,
    seed: int = SEED,
    random_seeds: int = 3,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Path]:
    """Measure what is not there yet; policies that an earlier run did not know are added to its files.

    Args:
        model: embedded model. tasks, budgets: each budget of each task becomes a file.
        questions: per task; a file that exists goes on with as many as it has. seed: which ones.
        folder: of the files, and of calibrations in its sub-folder.
        random_seeds: seeds of ``random``. batch_size: questions per call. progress: show a progress bar.

    Returns:
        The files, old and new.

    Raises:
        CellsFailed: a policy raised; nothing is written for that budget.
    """
    vlm, processor = load_embedded(model)
    info = model_info(vlm)
    paths = []
    for task in tasks:
        for keep in budgets:
            paths.append(path := results_path(folder, model, task, keep))
            before = read_results(path) if path.is_file() else ResultsFile()
            there = {_setting(row) for row in before.rows}
            cells = [policy_cell(policy, info) for policy in policies_at(keep, model, folder)]
            missing = [cell.policy for cell in cells if _setting(cell) not in there]
            if not missing:
                continue
            results = evaluate(
                vlm,
                processor,
                model_name=model,
                policies=[policy for policy in missing if policy is not None],
                tasks=[task],
                limit=max((row.n for row in before.rows), default=questions),
                seed=seed,
                batch_size=batch_size,
                random_seeds=random_seeds if keep < 1 else 0,
                measure_time=False,
                progress=progress,
            )
            write_text_atomically(path, joined(before, results).model_dump_json() + "\n")
    return paths


def joined(before: ResultsFile, new: ResultsFile) -> ResultsFile:
    """Rows of an earlier run, and those of a later one that it has not: dense and ``random`` ran beside both."""
    known = {_cell_of(row) for row in before.rows}
    rows = (*before.rows, *(row for row in new.rows if _cell_of(row) not in known))
    return new.model_copy(update={"rows": rows})


def _setting(of: ResultRow | Cell) -> str:
    """Policy, parameters and budget of a row or of what would give one."""
    name = of.name if isinstance(of, Cell) else of.policy
    return json.dumps([name, of.params, of.keep], sort_keys=True)


def _cell_of(row: ResultRow) -> str:
    return json.dumps([row.task, row.family, row.policy, row.params, row.keep, row.seed], sort_keys=True)


def read_all(folder: Path = RESULTS, model: str | None = None) -> list[ResultsFile]:
    """The committed results, of one model or all, budgets falling."""
    files = [read_results(path) for path in sorted(folder.glob("*-keep*.json"), key=_order)]
    return [file for file in files if model is None or any(row.model == model for row in file.rows)]


def _order(path: Path) -> tuple[str, float]:
    head, _, keep = path.stem.rpartition("-keep")
    return head, -float(keep)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Compare all policies on an embedded model.")
    parser.add_argument("--model", default="tiny-llava")
    parser.add_argument("--tasks", nargs="+", default=["scenes"])
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    paths = compare(given.model, given.tasks, given.budgets, given.questions, progress=sys.stderr.isatty())
    sys.stdout.write("".join(f"{path}\n" for path in paths))


if __name__ == "__main__":
    main()
