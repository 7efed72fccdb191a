"""``vlmprune bench``: speed of token reduction on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmprune.cli.options import DeviceOption, JsonOption
from vlmprune.cli.output import print_json, print_table, print_text
from vlmprune.core.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


def build_bench() -> typer.Typer:
    """The commands behind ``vlmprune bench``."""
    bench = typer.Typer(help="Measure speed.", no_args_is_help=True, rich_markup_mode=None)
    bench.callback()(_group)
    bench.command("vit")(vit)
    return bench


def vit(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A plain vision transformer of timm; may be repeated.",
            show_default="vit_base_patch16_224, vit_large_patch16_384, vit_base_patch16_384",
        ),
    ] = None,
    r: Annotated[
        int | None, typer.Option("--r", help="Tokens merged per block.", show_default="13 at 224, 23 at 384 pixels")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's choice.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 10,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option(help="CSV file to append the rows to.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time ToMe, the dense model and a textbook ToMe in turns on random weights."""
    import torch

    from vlmprune.cli.options import choose_device
    from vlmprune.evaluation.bench.bench_vit import DEFAULT_R, run

    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}; choose {', '.join(DTYPES)}.")
    rows = list(
        run(
            model or list(DEFAULT_R),
            r,
            batch=batch,
            repeats=repeats,
            threads=threads,
            dtype=getattr(torch, dtype),
            device=choose_device(device),
            output=output,
        )
    )
    if as_json:
        print_json(rows)
        return
    columns = ("model", "r", "dense", "textbook", "ours", "textbook x", "ours x", "FLOPs x", "ours of FLOPs")
    cells = [
        (
            row["model"],
            row["r"],
            *(row[f"{name}_images_s"] for name in ("dense", "textbook", "ours")),
            *(f"{row[name]:.2f}" for name in ("speedup_textbook", "speedup_ours", "flop_ratio")),
            f"{100 * row['share_ours']:.0f} %",
        )
        for row in rows
    ]
    print_table(columns, cells, right=columns[1:])
    first = rows[0]
    place = f"{first['device']}, {first['threads']} threads" if first["threads"] else first["device"]
    print_text(f"Images/s and speed-up over dense; batch {batch}, {dtype}, {place}, load {first['load']}")


def _group() -> None:
    """Measure speed."""
