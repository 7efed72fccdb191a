"""``vlmprune calibrate``: search a policy's parameters on a model, or measure them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlmprune.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ParamOption,
    load,
    load_for_pictures,
    parse_parameters,
)
from vlmprune.cli.output import print_error, print_json, print_table, print_text
from vlmprune.cli.progress import progress_bar
from vlmprune.core.errors import InputError, VlmpruneError

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.core.artefact import Artefact
    from vlmprune.core.policy import Policy

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
DEFAULT_PROMPT = "Describe the image."
OTHER_SCENES = 900_000
"""Added to the seed of a task's questions, so that generated ones are not those that `eval` asks."""


SEARCH_SAMPLES, MEASURE_SAMPLES = 30, 4096


def calibrate(
    policy: Annotated[str, typer.Argument(help="A policy that can be calibrated, such as vflowopt or dymu.")],
    output: Annotated[Path, typer.Option(help="JSON file for the result; an unfinished run goes on from it.")],
    model: Annotated[
        str,
        typer.Option(
            help="tiny-llava, tiny-qwen, a local folder, or a hub id; a measurement also takes tiny-vit and timm:NAME."
        ),
    ] = "tiny-llava",
    keep: Annotated[str, typer.Option(help="Budget to calibrate for.")] = "0.25",
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures; without it --task is used, or the model's training pictures for dymu."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompts of a search (30), most pictures of a measurement (4096).", show_default=False
        ),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Search: question about each picture of --images.")] = DEFAULT_PROMPT,
    task: Annotated[str, typer.Option(help="Search: task whose questions are used, without answers.")] = "scenes",
    calls: Annotated[int, typer.Option(min=1, help="Search: settings to try.")] = 50,
    batch: Annotated[int, typer.Option(min=2, help="Measurement: pictures that are pooled.")] = 16,
    tolerance: Annotated[float, typer.Option(help="Measurement: standard error of each mean at which it ends.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the search and of the choice of samples.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew even if the file holds a run.")] = False,
    param: ParamOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Calibrate a policy on a model: search what changes its next word least (vflowopt), or measure its tower (dymu).

    Exit code 1 if a run fails.
    """
    from vlmprune.cli import measure
    from vlmprune.cli.options import build_policy

    chosen = build_policy(policy, keep, parse_parameters(param))
    try:
        if chosen.measured:
            options = measure.Options(samples or MEASURE_SAMPLES, batch, tolerance, seed, fresh)
            measure.run(
                chosen, model, partial(load_for_pictures, model, dtype, device), images, output, options, as_json
            )
            return
        # What can be checked without the model comes first.
        number = samples or SEARCH_SAMPLES
        prompts = _pictures(images, prompt, number, seed) if images is not None else _questions(task, number, seed)
        found = _search(chosen, load(model, dtype, device), prompts, calls, seed, output, fresh)
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


def _search(
    policy: Policy,
    loaded: tuple[Any, Any],
    prompts: list[tuple[str, Any]],
    calls: int,
    seed: int,
    output: Path,
    fresh: bool,
) -> Artefact:
    """Search with a progress bar."""
    from vlmprune.calibration import calibrate as run_calibration
    from vlmprune.demos.compare import chat_prompt
    from vlmprune.evaluation.prompts import encode

    model, processor = loaded
    data = [encode(model, processor, [chat_prompt(processor, text)], [[picture]]) for text, picture in prompts]
    with progress_bar(sys.stderr.isatty(), calls, "dense model") as advance:
        return run_calibration(
            model,
            policy,
            data,
            processor=processor,
            calls=calls,
            seed=seed,
            output=output,
            resume=not fresh,
            progress=None if advance is None else partial(_shown, advance),
        )


def _shown(advance: Callable[[int, str], None], done: int, total: int, value: float, best: float) -> None:
    advance(done, f"best {best:.4f}")


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        InputError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"Image folder {str(folder)!r} does not exist.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"Image folder {str(folder)!r} holds no picture ({', '.join(SUFFIXES)}).")
    return files


def _pictures(folder: Path, prompt: str, samples: int, seed: int) -> list[tuple[str, Image.Image]]:
    """The same question about some of a folder's pictures.

    Raises:
        InputError: no such folder, no picture in it, or one that cannot be read.
    """
    from vlmprune.loading import open_image

    files = picture_files(folder)
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
