"""The command line: ``vlmprune list | info | run | eval | calibrate | bench | check | demo | quickstart | tasks-dir``.

Exit code 0: success; 1: a run failed; 2: bad input, with one line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from vlmprune.cli.app import build_app
from vlmprune.cli.output import print_error
from vlmprune.core.errors import VlmpruneError

# Newer typer brings its own copy of click, so the base of its errors is taken from a class that it exports.
USAGE_ERRORS: tuple[Any, ...] = tuple(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = build_app()(arguments or ["--help"], prog_name="vlmprune", standalone_mode=False)
    except USAGE_ERRORS as error:
        print_error(error.format_message())
        return 2
    except VlmpruneError as error:
        print_error(str(error))
        return 2
    except typer.Abort:
        print_error("stopped")
        return 130
    return code if isinstance(code, int) else 0
