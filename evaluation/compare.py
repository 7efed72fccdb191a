"""All policies on an embedded model at all budgets, one results file per task and budget.

python -m vlmprune.evaluation.compare --model tiny-llava   # goes on where an earlier run stopped
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmprune.core import config
from vlmprune.core.policy import Policy
from vlmprune.core.registry import registry
from vlmprune.embedded import load_embedded
from vlmprune.evaluation.runner import evaluate
from vlmprune.evaluation.schema import RANDOM, ResultsFile, read_results, write_text_atomically

RESULTS = Path("evaluation") / "results"
CALIBRATIONS = "calibration"
BUDGETS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.05)
QUESTIONS = 500
SEED = 1


def results_path(folder: Path, model: str, task: str, keep: float) -> Path:
    """File of one budget's rows."""
    return folder / f"{model}-{task}-keep{keep}.json"


def policies_at(keep: float, model: str, folder: Path) -> list[Policy]:
    """Every policy with its defaults at a budget; ``random`` runs beside anyway.

    A policy with a calibration of this model for this budget in ``folder`` uses it.
    """
    chosen = []
    for name in registry.available():
        parameters: dict[str, object] = {"keep": keep}
        artefact = folder / CALIBRATIONS / f"{model}-{name}-{keep}.json"
        if artefact.is_file():
            parameters["artefact"] = artefact.as_posix()
        if name != RANDOM:
            chosen.append(config.build(name, parameters))
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
    """Measure what is not there yet.

    Args:
        model: embedded model. tasks, budgets: each budget of each task becomes a file.
        questions: per task. seed: which ones.
        folder: of the files, and of calibrations in its sub-folder.
        random_seeds: seeds of ``random``. batch_size: questions per call. progress: show a progress bar.

    Returns:
        The files, old and new.

    Raises:
        CellsFailed: a policy raised; nothing is written for that budget.
    """
    vlm, processor = load_embedded(model)
    paths = []
    for task in tasks:
        for keep in budgets:
            paths.append(path := results_path(folder, model, task, keep))
            if path.is_file():
                continue
            results = evaluate(
                vlm,
                processor,
                model_name=model,
                policies=policies_at(keep, model, folder),
                tasks=[task],
                limit=questions,
                seed=seed,
                batch_size=batch_size,
                random_seeds=random_seeds if keep < 1 else 0,
                measure_time=False,
                progress=progress,
            )
            write_text_atomically(path, results.model_dump_json() + "\n")
    return paths


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
