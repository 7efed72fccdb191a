"""``vlmprune.measure``: what a policy has to know about a vision tower, from batches of images."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.detect import model_info
from vlmprune.api import Handle, applied
from vlmprune.core import config
from vlmprune.core.artefact import model_facts, write_artefact
from vlmprune.core.calibration import Measurement
from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.measured import Measured, TokenCount, read_measured
from vlmprune.core.policy import Policy
from vlmprune.core.records import SiteRecord
from vlmprune.provenance import add_to_digest, check_folder, check_same, package_versions, settings_of

IMAGE_INPUTS = ("pixel_", "image_", "spatial_shapes")
"""Beginnings of the names of a processor's outputs that a tower takes; the others are the text's."""
PACKAGES = ("torch", "transformers", "timm", "open_clip_torch")
ENCODERS = ("get_image_features", "encode_image")

Batch = Mapping[str, Any]
Progress = Callable[[int, float | None], None]
"""Told after every batch: batches done, and the largest standard error (None after the first)."""


def measure(
    model: nn.Module,
    policy: str | Policy,
    batches: Iterable[Batch],
    /,
    *,
    held_out: Iterable[Batch] = (),
    tolerance: float = 1e-3,
    least: int = 10,
    output: str | Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    **parameters: Any,
) -> Measured:
    """Measure what a policy needs to know about a vision tower, such as DyMU's thresholds.

    Only the tower is run, forward, with the policy's own settings for it. Every value is averaged over the batches in
    float64. It ends when the standard error of every mean is below ``tolerance``, or with the last batch.

    Args:
        model: a vision-language model or a vision tower that is not pruned, in eval mode.
        policy: its name or an instance with the budget to reach.
        batches: inputs of equally many images each, as an image processor returns them (``pixel_values``, ...; what
            belongs to a text is left out). Taken one by one as they are needed. The policy pools the images of a batch.
        held_out: batches of other images. On them the tokens left at the tower's exit are compared with the budget:
            see ``held_out.deviation`` of the result.
        tolerance: standard error (in units of the measured value, a cosine for DyMU) at which the measurement ends.
        least: batches that it takes at least, from 2.
        output: JSON file, written after every batch; ``apply(model, name, keep=..., artefact=output)`` loads it.
        resume: go on where ``output`` stops. The batches that it counts are drawn again and compared, not run.
        progress: see :data:`Progress`.
        parameters: ``keep`` and others, for a policy given by name.

    Returns:
        What was measured.

    Raises:
        InputError: no batch, pixels that are not finite, a model in train mode, a policy without a measurement, or an
            ``output`` of another one.
        UnsupportedError: a model whose tower cannot be pruned, or that gives no record of it.
        ActiveError: the model is pruned already.
    """
    if least < 2:
        raise InputError(f"least={least} is out of range; a standard error needs at least 2 batches.")
    if not tolerance > 0:
        raise InputError(f"tolerance={tolerance} is out of range; give a standard error above 0.")
    if model.training:
        raise InputError("The model is in train mode; call model.eval() first.")
    resolved, info = config.resolve(policy, **parameters), model_info(model)
    measurement = resolved.measurement(info, tolerance=tolerance, least=least)
    if measurement is None:
        raise InputError(f"{resolved.name!r} measures nothing; apply it as it is.")
    found = Measured(
        policy=resolved.name,
        settings=settings_of(resolved),
        model=model_facts(info),
        samples=0,
        data=hashlib.blake2b(digest_size=16).hexdigest(),
        versions=package_versions(PACKAGES),
        tolerance=tolerance,
    )
    stream = iter(batches)
    if output is not None:
        check_folder(output)
        if resume and Path(output).is_file():
            _resume(found, measurement, output, stream)
    _run(model, measurement, found, stream, output, progress)
    if not found.batches:
        raise InputError("There is no batch to measure on; give the inputs of at least one.")
    found.held_out = _check(model, measurement, held_out)
    if output is not None:
        write_artefact(found, output)
    return found


def run_tower(model: nn.Module, inputs: Batch) -> None:
    """Run a model's vision tower, and nothing behind it that reads text.

    Args:
        model: a vision-language model, a dual encoder, or a tower.
        inputs: what an image processor returns, on any device.

    Raises:
        InputError: there are no pixels in the inputs.
    """
    if not isinstance(inputs, Mapping):
        raise InputError(f"A batch is a dict such as {{'pixel_values': pixels}}, not {type(inputs).__name__}.")
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or not len(pixels):
        raise InputError(
            f"A batch needs pixel_values, a floating tensor of an image or more; it holds {sorted(inputs)}."
        )
    if not bool(pixels.isfinite().all()):
        raise InputError("The pixels of a batch hold NaN or infinity; look at how they are normalised.")
    first = next(model.parameters())
    given = {name: _placed(value, first) for name, value in inputs.items() if name.startswith(IMAGE_INPUTS)}
    encoder: Any = next((getattr(model, name) for name in ENCODERS if hasattr(model, name)), model)
    forward = encoder.forward if isinstance(encoder, nn.Module) else encoder
    with torch.no_grad():
        if "pixel_values" in inspect.signature(forward).parameters:
            encoder(**given)
        else:
            encoder(given["pixel_values"])


def count_images(inputs: Batch) -> int:
    """Images of a batch."""
    rows = inputs.get("image_grid_thw")
    return len(inputs["pixel_values"] if rows is None else rows)


def _run(
    model: nn.Module,
    measurement: Measurement,
    found: Measured,
    batches: Iterator[Batch],
    output: str | Path | None,
    progress: Progress | None,
) -> None:
    """Take in batches until nothing is left to learn."""
    if measurement.converged:
        return
    with applied(model, measurement.policy) as handle:
        for batch in batches:
            measurement.update(_records(handle, model, batch))
            found.values, found.converged = measurement.means, measurement.converged
            _count(found, batch)
            if output is not None:
                write_artefact(found, output)
            if progress is not None:
                errors = [mean.standard_error for mean in found.values]
                progress(found.batches, max((e for e in errors if e is not None), default=None))
            if found.converged:
                return


def _resume(found: Measured, measurement: Measurement, output: str | Path, batches: Iterator[Batch]) -> None:
    """Put back what an earlier run measured, and go past its batches.

    Raises:
        InputError: it measured something else, or on other inputs.
    """
    earlier = read_measured(output)
    check_same(earlier, found, ("policy", "settings", "model"), output)
    for batch in itertools.islice(batches, earlier.batches):
        _count(found, batch)
    check_same(earlier, found, ("batches", "data"), output)
    measurement.means = found.values = earlier.values
    found.converged = measurement.converged


def _check(model: nn.Module, measurement: Measurement, batches: Iterable[Batch]) -> TokenCount | None:
    """Tokens left on other inputs with what was found; None without inputs."""
    total = TokenCount()
    with applied(model, measurement.result()) as handle:
        for batch in batches:
            part = measurement.count(_records(handle, model, batch))
            total.samples += count_images(batch)
            total.entered += part.entered
            total.left += part.left
            total.wanted += part.wanted
    return total if total.samples else None


def _records(handle: Handle, model: nn.Module, batch: Batch) -> tuple[SiteRecord, ...]:
    """What happened in the tower on one batch.

    Raises:
        UnsupportedError: the model's adapter keeps no records of it.
    """
    before = handle.tower_sites
    run_tower(model, batch)
    if not handle.tower_sites or handle.tower_sites is before:
        raise UnsupportedError(f"{handle.info.model_class} gives no record of what happens in its tower.")
    return handle.tower_sites


def _count(found: Measured, batch: Batch) -> None:
    """Add a batch to the tally and the digest."""
    digest = hashlib.blake2b(found.data.encode(), digest_size=16)
    add_to_digest(digest, batch)
    found.data = digest.hexdigest()
    found.batches += 1
    found.samples += count_images(batch)


def _placed(value: Any, like: Tensor) -> Any:
    """A tensor on the model's device, floating values in its dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)
