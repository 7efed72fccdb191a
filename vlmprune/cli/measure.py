"""The part of ``vlmprune calibrate`` for policies that are measured on pictures, not searched."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmprune.cli.output import print_error, print_json, print_table, print_text
from vlmprune.cli.progress import progress_bar
from vlmprune.core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from vlmprune.core.measured import Measured
    from vlmprune.core.policy import Policy
    from vlmprune.loading import Prepare

ALLOWED = 0.05
"""Deviation from the budget, on pictures that were not measured, from which a note is printed."""
LEAST = 10
"""Batches that a measurement takes at least."""
HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 256

Pictures = Callable[[], Iterator["Image.Image"]]


def pictures_of(model: str, folder: Path | None, seed: int) -> tuple[Pictures, Pictures]:
    """Pictures to measure on, and others for the check: of a folder, or generated where the model is an embedded one.

    Args:
        model: as given on the command line. folder: of pictures. seed: of their order.

    Raises:
        InputError: no folder where one is needed, or fewer than two pictures in it.
    """
    from vlmprune.embedded import embedded_models, is_classifier
    from vlmprune.embedded.pictures import digit_pictures, scene_pictures
    from vlmprune.loading import open_image

    if folder is None:
        if model not in embedded_models():
            raise InputError(f"Give pictures for {model!r} to be measured on: --images FOLDER.")
        generated = digit_pictures if is_classifier(model) else scene_pictures
        return lambda: generated("train", seed), lambda: generated("test", seed)
    from vlmprune.cli.calibrate import picture_files

    files = picture_files(folder)
    if len(files) < 2:
        raise InputError(f"Image folder {str(folder)!r} holds one picture; a measurement and its check need two.")
    random.Random(seed).shuffle(files)
    apart = max(1, min(HELD_OUT_MOST, int(HELD_OUT_SHARE * len(files))))
    return lambda: map(open_image, files[apart:]), lambda: map(open_image, files[:apart])


def batched(prepare: Prepare, pictures: Iterable[Image.Image], size: int, most: int) -> Iterator[dict[str, Any]]:
    """Inputs of ``size`` pictures each, of at most ``most`` pictures; what is left over makes no batch."""
    source = islice(pictures, most)
    first = True
    while group := list(islice(source, size)):
        if first or len(group) == size:
            yield prepare(group)
        first = False


@dataclass(frozen=True)
class Options:
    """Pictures at most, pictures per batch, standard error at which it ends, seed of their order, and a fresh start."""

    samples: int
    batch: int
    tolerance: float
    seed: int
    fresh: bool


def run(
    policy: Policy,
    model: str,
    load: Callable[[], tuple[Any, Prepare]],
    folder: Path | None,
    output: Path,
    options: Options,
    as_json: bool,
) -> None:
    """Measure, check, write, and print what was found; ``load`` gives the model and what prepares pictures."""
    pictures, others = pictures_of(model, folder, options.seed)
    network, prepare = load()
    from vlmprune.measurement import measure

    batch, most = options.batch, min(options.samples, HELD_OUT_MOST)
    with progress_bar(sys.stderr.isatty(), options.samples // batch, "first batch") as advance:
        found = measure(
            network,
            policy,
            batched(prepare, pictures(), batch, options.samples),
            held_out=batched(prepare, others(), batch, most),
            tolerance=options.tolerance,
            least=LEAST,
            output=output,
            resume=not options.fresh,
            progress=None if advance is None else partial(_shown, advance),
        )
    if as_json:
        print_json(found.model_dump())
    else:
        _show(found, policy, output)
    if not found.converged and found.batches < LEAST:
        print_error(
            f"Only {found.batches} batches were measured of {LEAST} or more; give more pictures or a smaller --batch."
        )
    elif not found.converged:
        print_error(
            f"Some standard error is still above {found.tolerance:g}; more pictures (--samples) make it smaller."
        )
    if found.held_out is not None and abs(found.held_out.deviation) > ALLOWED:
        print_error(f"The pictures of the check keep {found.held_out.deviation:+.1%} of the tokens asked for.")


def _shown(advance: Callable[[int, str], None], done: int, error: float | None) -> None:
    advance(done, "" if error is None else f"standard error {error:.2g}")


def _show(found: Measured, policy: Policy, output: Path) -> None:
    rows = [
        (mean.layer, f"{mean.mean:.6f}", "–" if mean.standard_error is None else f"{mean.standard_error:.6f}")
        for mean in found.values
    ]
    print_table(("block", "mean", "standard error"), rows)
    print_text(f"{found.batches} batches, {found.samples} pictures, written to {output}")
    check = found.held_out
    if check is not None:
        print_text(
            f"On {check.samples} other pictures {check.left / check.samples:.1f} tokens are left of "
            f"{check.entered / check.samples:.1f}, {check.deviation:+.1%} of the {check.wanted / check.samples:.1f} "
            "asked for"
        )
    keep = policy.budget.describe()
    print_text(f"Use it: vlmprune.apply(model, {policy.name!r}, keep={keep}, artefact={str(output)!r})")
