"""``vlmprune eval``, ``quickstart`` and ``tasks-dir``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmprune.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    ParamOption,
    build_policy,
    load,
    parse_parameters,
    quiet,
)
from vlmprune.cli.output import print_error, print_text
from vlmprune.core.errors import InputError

if TYPE_CHECKING:
    from vlmprune.core.policy import Policy


def evaluate(
    model: ModelOption = "tiny-llava",
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="Policies, separated by commas; may be repeated.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="Budget as in `run`; may be repeated.", show_default="0.33"),
    ] = None,
    param: ParamOption = None,
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas.")] = "scenes",
    limit: Annotated[int | None, typer.Option(help="Questions per task; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the questions.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Questions per call of the model.")] = 16,
    random_seeds: Annotated[int, typer.Option(help="Seeds of the policy `random`, which runs beside.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder for results.json and samples.jsonl.")] = None,
    runner: Annotated[str, typer.Option(help="native or lmms-eval.")] = "native",
    time: Annotated[bool, typer.Option("--time/--no-time", help="Measure prefill times.")] = True,
    text_only: Annotated[bool, typer.Option("--text-only", help="Also ask without the image.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, tokens, times and cache size of policies, the dense model and random pruning."""
    policies = build_policies(policy or ["hiprune"], keep or [None], param)
    vlm, processor = load(model, dtype, device)

    from vlmprune.evaluation.runner import CellsFailed
    from vlmprune.evaluation.runner import evaluate as run_evaluation
    from vlmprune.evaluation.tables import render_table

    failure: CellsFailed | None = None
    try:
        results = run_evaluation(
            vlm,
            processor,
            model_name=model,
            policies=policies,
            tasks=[name.strip() for name in tasks.split(",") if name.strip()],
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            output=output,
            random_seeds=random_seeds,
            measure_time=time,
            text_only=text_only,
            runner=runner,
            progress=sys.stderr.isatty(),
        )
    except CellsFailed as error:
        failure, results = error, error.results
    print_text(results.model_dump_json(indent=2) if as_json else render_table(results.rows))
    if output is not None and not as_json:
        print_text(f"\nWritten to {output}")
    if failure is not None:
        print_error(str(failure))
        raise typer.Exit(1)


def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the table and the pictures.")] = Path("runs/demo"),
) -> None:
    """Ask and evaluate the embedded model, dense and pruned; writes a table and overlays."""
    from vlmprune.evaluation.quickstart import quickstart as run_quickstart
    from vlmprune.evaluation.runner import CellsFailed

    quiet()
    try:
        run_quickstart(output)
    except CellsFailed as error:
        print_error(str(error))
        raise typer.Exit(1) from None


def tasks_dir(
    tasks: Annotated[list[str] | None, typer.Argument(help="Tasks; default: all.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions per task; default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the questions.")] = 0,
) -> None:
    """Prepare tasks for lmms-eval's own command and print their folders, for its --include_path."""
    from vlmprune.evaluation.tasks.definition import load_tasks, task_names
    from vlmprune.evaluation.tasks.prepare import prepare_task

    for task in load_tasks(tasks or task_names()):
        print_text(str(prepare_task(task, task.load_docs(seed, limit))))


def build_policies(names: list[str], keeps: list[str] | list[None], param: list[str] | None) -> list[Policy]:
    """Every policy at every budget.

    Raises:
        InputError: unknown policy, bad budget, or parameters beside several policies.
    """
    chosen = [name.strip() for text in names for name in text.split(",") if name.strip()]
    parameters = parse_parameters(param)
    if not chosen:
        raise InputError("No policy was given; `vlmprune list` names them.")
    if parameters and len(chosen) > 1:
        raise InputError("--param goes with a single policy; evaluate them one after the other, or use config files.")
    return [build_policy(name, keep, parameters) for name in chosen for keep in keeps]
