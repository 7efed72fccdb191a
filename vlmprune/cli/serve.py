"""``vlmprune demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmprune.cli.options import DeviceOption, DtypeOption, ModelOption


def demo(
    model: ModelOption = "tiny-llava",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 serves this machine only.")] = "127.0.0.1",
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Serve a web page that compares dense and pruned answers."""
    from vlmprune.cli.options import load
    from vlmprune.demos.app import serve

    serve(*load(model, dtype, device), name=model, host=host, port=port)
