"""The table of commands. Nothing heavy is imported until a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmprune._version import __version__
from vlmprune.cli import bench, calibrate, check, evaluate, policies, run, serve


def build_app() -> typer.Typer:
    """The command-line application."""
    app = typer.Typer(
        name="vlmprune",
        help="Visual token reduction for vision-language models.",
        add_completion=False,
        no_args_is_help=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    app.command("list")(policies.list_policies)
    app.command("info")(policies.info)
    app.command("run")(run.run)
    app.command("eval")(evaluate.evaluate)
    app.command("calibrate")(calibrate.calibrate)
    app.add_typer(bench.build_bench(), name="bench")
    app.command("check")(check.check)
    app.command("quickstart")(evaluate.quickstart)
    app.command("demo")(serve.demo)
    app.command("tasks-dir")(evaluate.tasks_dir)
    return app


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Visual token reduction for vision-language models."""
