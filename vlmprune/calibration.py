"""``vlmprune.calibrate``: search a policy by how little it changes what the model is about to say."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.adapters.detect import find_family
from vlmprune.adapters.family import Family
from vlmprune.api import applied
from vlmprune.core import config
from vlmprune.core.artefact import Artefact, Trial, model_facts, read_artefact, write_artefact
from vlmprune.core.calibration import Calibrator
from vlmprune.core.errors import InputError, UnsupportedError
from vlmprune.core.policy import Policy
from vlmprune.provenance import add_to_digest, check_folder, check_same, package_versions, settings_of

PACKAGES = ("torch", "transformers", "optuna")

Progress = Callable[[int, int, float, float], None]
"""Told after every call: calls done, calls in all, its objective, the best so far."""


def calibrate(
    model: nn.Module,
    policy: str | Policy,
    data: Iterable[Mapping[str, Any]],
    /,
    *,
    processor: Any = None,
    calls: int = 50,
    seed: int = 0,
    output: str | Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    **parameters: Any,
) -> Artefact:
    """Search a policy's parameters on a model.

    The objective is the sum over the samples of the cosine between the dense and the pruned model's hidden state of
    the last prompt token, after the final norm (a sample that gives NaN counts 0). Only prompts are run, nothing is
    generated, and no answers are needed. The dense model runs once per sample.

    Args:
        model: a vision-language model that is not pruned, in eval mode.
        policy: its name or an instance; parameters that it leaves open are searched.
        data: the model's inputs, as its processor returns them, one mapping per prompt (30 in VFlowOpt's paper).
        processor: needed where the policy reads pixels.
        calls: settings to try, the random ones at the start included.
        seed: of the search.
        output: JSON file, written after every call; ``apply(model, name, keep=..., artefact=output)`` loads it.
        resume: go on where ``output`` stops. It must stem from the same policy, model, data and seed.
        progress: see :data:`Progress`.
        parameters: ``keep`` and others, for a policy given by name.

    Returns:
        What was found, with every call.

    Raises:
        InputError: no data, a policy without a calibration, or an ``output`` of another calibration.
        UnsupportedError: a model that cannot be pruned, or a missing package.
        ActiveError: the model is pruned already.
    """
    resolved, family = config.resolve(policy, **parameters), find_family(model)
    calibrator = resolved.calibration(family.info(), calls=calls, seed=seed)
    if calibrator is None:
        if resolved.measured:
            raise InputError(f"{resolved.name!r} is measured, not searched: vlmprune.measure(model, policy, batches).")
        raise InputError(f"{resolved.name!r} has nothing to calibrate; apply it as it is.")
    samples = [dict(sample) for sample in data]
    if not samples:
        raise InputError("There are no samples to calibrate on; give the inputs of at least one prompt.")
    artefact = _new_artefact(resolved, family, samples, calls, seed)
    if output is not None:
        check_folder(output)
        if resume and Path(output).is_file():
            artefact.history = _history(artefact, output)
            for trial in artefact.history:
                calibrator.update(trial.settings, trial.measured)
    _take_result(artefact, calibrator)
    if len(artefact.history) < calls:
        _search(model, resolved, calibrator, artefact, samples, LastToken(family), processor, output, progress)
    return artefact


class LastToken:
    """Reads the last prompt token's hidden state behind the decoder's final norm.

    Raises:
        UnsupportedError: the model is a bare decoder.
    """

    def __init__(self, family: Family) -> None:
        if family.base is None:
            raise UnsupportedError("A calibration needs a model that encodes images, not a bare decoder.")
        self._base, self._text_model = family.base, family.text_model
        self._state: Tensor | None = None

    @torch.no_grad()
    def __call__(self, sample: Mapping[str, Any]) -> Tensor:
        """``[B, D]`` float32 on the host, one row per prompt of the sample."""
        device = next(self._text_model.parameters()).device
        inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in sample.items()}
        hook = self._text_model.register_forward_hook(self._take)
        try:
            self._base(**{**inputs, "use_cache": False})
        finally:
            hook.remove()
        states, self._state = self._state, None
        assert states is not None
        mask = inputs.get("attention_mask")
        last = torch.full((len(states),), states.shape[1] - 1, device=device)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            last = last - mask.flip(1).to(torch.int8).argmax(1)  # padding on the right
        return states[torch.arange(len(states), device=device), last].float().cpu()

    def _take(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._state = output[0].detach()


def agreement(dense: Sequence[Tensor], pruned: Sequence[Tensor]) -> float:
    """Sum of the cosines of the rows of two lists of states; NaN counts 0."""
    pairs = zip(dense, pruned, strict=True)
    return float(sum(nn.functional.cosine_similarity(a, b, dim=1).nan_to_num(nan=0.0).sum() for a, b in pairs))


def _search(
    model: nn.Module,
    policy: Policy,
    calibrator: Calibrator,
    artefact: Artefact,
    samples: Sequence[Mapping[str, Any]],
    last_token: LastToken,
    processor: Any,
    output: str | Path | None,
    progress: Progress | None,
) -> None:
    """Run the calls that are left."""
    dense: list[Tensor] = []
    while (settings := calibrator.propose()) is not None:
        trial = dataclasses.replace(policy, **settings)
        with applied(model, trial, processor=processor) as handle:
            if not dense:
                with handle.disabled():
                    dense = [last_token(sample) for sample in samples]
            measured = {"objective": agreement(dense, [last_token(sample) for sample in samples])}
        calibrator.update(settings, measured)
        artefact.history.append(Trial(settings=dict(settings), measured=measured))
        _take_result(artefact, calibrator)
        if output is not None:
            write_artefact(artefact, output)
        if progress is not None:
            progress(len(artefact.history), artefact.calls, measured["objective"], artefact.value or 0.0)


def _new_artefact(
    policy: Policy, family: Family, samples: Sequence[Mapping[str, Any]], calls: int, seed: int
) -> Artefact:
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        add_to_digest(digest, sample)
    return Artefact(
        policy=policy.name,
        settings=settings_of(policy),
        model=model_facts(family.info()),
        calls=calls,
        seed=seed,
        samples=len(samples),
        data=digest.hexdigest(),
        versions=package_versions(PACKAGES),
    )


def _history(fresh: Artefact, output: str | Path) -> list[Trial]:
    """The calls that an earlier run made.

    Raises:
        InputError: it was another calibration.
    """
    earlier = read_artefact(output)
    check_same(earlier, fresh, ("policy", "settings", "model", "seed", "data"), output)
    return earlier.history


def _take_result(artefact: Artefact, calibrator: Calibrator) -> None:
    found = calibrator.result()
    if found:
        artefact.best, artefact.value = dict(found["best"]), float(found["value"])
