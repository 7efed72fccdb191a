"""``vlmprune calibrate``: search a policy's parameters on a model."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import DeviceOption, DtypeOption, JsonOption, ModelOption, ParamOption, load, parse_parameters
from vlmprune.cli.output import print_error, print_json, print_table, print_text
from vlmprune.core.errors import InputError, VlmpruneError

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.calibration import Progress

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
DEFAULT_PROMPT = "Describe the image."
OTHER_SCENES = 900_000
"""Added to the seed of a task's questions, so that generated ones are not those that `eval` asks."""


def calibrate(
    policy: Annotated[str, typer.Argument(help="A policy that can be calibrated, such as vflowopt.")],
    output: Annotated[Path, typer.Option(help="JSON file for the result; an unfinished run goes on from it.")],
    model: ModelOption = "tiny-llava",
    keep: Annotated[str, typer.Option(help="Budget to search for, a share.")] = "0.25",
    images: Annotated[Path | None, typer.Option(help="Folder of pictures; without it --task is used.")] = None,
    prompt: Annotated[str, typer.Option(help="Question about each picture of --images.")] = DEFAULT_PROMPT,
    task: Annotated[str, typer.Option(help="Task whose questions are used, without their answers.")] = "scenes",
    samples: Annotated[int, typer.Option(min=1, help="Prompts.")] = 30,
    calls: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the search and of the choice of samples.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew even if the file holds calls.")] = False,
    param: ParamOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Search a policy's parameters: what changes the model's next word least. Exit code 1 if a run fails."""
    from vlmprune.cli.options import build_policy

    # What can be checked without the model comes first.
    chosen = build_policy(policy, keep, parse_parameters(param))
    prompts = _pictures(images, prompt, samples, seed) if images is not None else _questions(task, samples, seed)
    vlm, processor = load(model, dtype, device)

    from vlmprune.calibration import calibrate as run_calibration
    from vlmprune.demos.compare import chat_prompt
    from vlmprune.evaluation.prompts import encode

    data = [encode(vlm, processor, [chat_prompt(processor, text)], [[picture]]) for text, picture in prompts]
    try:
        with _bar(sys.stderr.isatty(), calls) as progress:
            found = run_calibration(
                vlm,
                chosen,
                data,
                processor=processor,
                calls=calls,
                seed=seed,
                output=output,
                resume=not fresh,
                progress=progress,
            )
    except VlmpruneError:
        raise
    except RuntimeError as error:
        print_error(f"The calibration stopped; what was found so far is in {output}: {error}")
        raise typer.Exit(1) from None
    if as_json:
        print_json(found.model_dump(exclude={"history"}))
        return
    print_table(("parameter", "best"), [(name, f"{value:.6g}") for name, value in found.best.items()])
    print_text(f"Agreement {found.value:.4f} of {found.samples} after {len(found.history)} calls, written to {output}")
    print_text(f"Use it: vlmprune.apply(model, {policy!r}, keep={keep}, artefact={str(output)!r})")


def _pictures(folder: Path, prompt: str, samples: int, seed: int) -> list[tuple[str, Image.Image]]:
    """The same question about some of a folder's pictures.

    Raises:
        InputError: no such folder, no picture in it, or one that cannot be read.
    """
    from vlmprune.loading import open_image

    if not folder.is_dir():
        raise InputError(f"Image folder {str(folder)!r} does not exist.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"Image folder {str(folder)!r} holds no picture ({', '.join(SUFFIXES)}).")
    if len(files) > samples:
        files = sorted(random.Random(seed).sample(files, samples))
    return [(prompt, open_image(path)) for path in files]


def _questions(name: str, samples: int, seed: int) -> list[tuple[str, Any]]:
    """Questions of a task with their pictures."""
    from vlmprune.evaluation.tasks.definition import DEFAULT_PROMPT as STYLE
    from vlmprune.evaluation.tasks.definition import load_task

    task = load_task(name)
    docs = task.load_docs(OTHER_SCENES + seed, samples)
    return [(task.text(doc, STYLE), task.doc_to_visual(doc)[0]) for doc in docs]


@contextmanager
def _bar(shown: bool, calls: int) -> Iterator[Progress | None]:
    """A progress bar on standard error with the best value so far, or nothing."""
    if not shown:
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("dense model", total=calls)

        def advance(done: int, total: int, value: float, best: float) -> None:
            bar.update(task, completed=done, total=total, description=f"best {best:.4f}")

        yield advance
