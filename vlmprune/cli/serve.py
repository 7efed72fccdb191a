"""``vlmprune demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from vlmprune.cli.options import DeviceOption, DtypeOption, ModelOption, load
from vlmprune.cli.output import print_text


def demo(
    model: ModelOption = "tiny-llava",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes the first free one from 7860.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 serves this machine only.")] = "127.0.0.1",
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Serve a web page that compares dense and pruned answers."""
    from vlmprune.demos.app import build_app, import_gradio, launch, warm_up

    import_gradio()  # a missing package is said before a large model is loaded
    vlm, processor = load(model, dtype, device)
    app = build_app(vlm, processor, model)
    warm_up(vlm, processor)
    url = launch(app, host, port)
    print_text(f"Serving {model} on {url} (Ctrl+C stops)")
    app.block_thread()
