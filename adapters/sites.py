"""Running a policy at one site: context in, selection out, everything recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmprune.adapters.delivery import why_missing
from vlmprune.adapters.tower_plan import check_tower_layer, check_tower_steps
from vlmprune.core.context import Context
from vlmprune.core.errors import InputError, SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.report import SiteRecord
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Pixels, Signal
from vlmprune.core.sites import Site, SiteRequest
from vlmprune.kernels.gather import ordered_groups


@dataclass(frozen=True)
class Step:
    """One policy at one of the places that it asked for."""

    policy: Policy
    request: SiteRequest


def plan(policy: Policy, info: ModelInfo) -> tuple[Step, ...]:
    """What a policy and its members do on a model, checked.

    Raises:
        SignalError: a required signal or a site is one that the model cannot give.
        BudgetError, InputError: settings that do not fit the model.
    """
    steps = []
    for leaf in policy.leaves():
        leaf.check_count(info)
        for request in leaf.requests(info) if leaf.reduces(info) else ():
            if request.site not in info.sites:
                served = ", ".join(sorted(info.sites))
                raise SignalError(
                    f"{leaf.name!r} acts at {request.site}, but {info.model_class} offers {served}. "
                    "Choose another policy: vlmprune.available()."
                )
            _check_layer(leaf, request, info)
            _check_positions(leaf, request, info)
            missing = {signal: why_missing(signal, request, info) for signal in request.signals}
            for signal, reason in missing.items():
                if reason is not None and not signal.optional:
                    raise SignalError(
                        f"{leaf.name!r} needs the signal {signal}, {reason}. "
                        "Choose another policy: vlmprune.available()."
                    )
            wanted = tuple(signal for signal, reason in missing.items() if reason is None)
            steps.append(Step(leaf, replace(request, signals=wanted)))
    check_tower_steps(steps)
    return tuple(steps)


def _check_layer(leaf: Policy, request: SiteRequest, info: ModelInfo) -> None:
    """Refuse a layer at which a policy would never act."""
    if request.site == Site.VISION_BLOCK:
        check_tower_layer(leaf.name, request, info)
    depth = info.text_depth or 0
    if request.site in (Site.DECODER_LAYER, Site.KV_CACHE) and not 0 <= (request.layer or 0) < depth:
        raise InputError(
            f"{leaf.name!r} acts at {request.site} {request.layer}, but {info.model_class} has {depth} decoder "
            f"layers; give a layer from 0 to {depth - 1}."
        )


def _check_positions(leaf: Policy, request: SiteRequest, info: ModelInfo) -> None:
    """Refuse renumbering where positions have several axes (a token's place in the image is its position), and virtual
    positions inside the decoder."""
    if request.positions == "virtual" and request.site not in (Site.VISION_BLOCK, Site.POST_ENCODER):
        raise InputError(
            f"{leaf.name!r} asks for virtual positions at {request.site}, but tokens are unmerged virtually only if "
            "they were merged before the decoder; give 'keep' or 'compact'."
        )
    if info.mrope and request.positions == "compact":
        raise InputError(
            f"{leaf.name!r} asks for compact positions, but {info.model_class} numbers visual tokens by time, row and "
            "column, which cannot be closed up; leave positions at 'auto', or give 'keep'."
        )


def needs_pixels(steps: tuple[Step, ...]) -> bool:
    """True if a step asks for pixels, whose normalisation only the processor knows."""
    return any(isinstance(signal, Pixels) for step in steps for signal in step.request.signals)


def run_step(
    step: Step,
    context: Context,
    records: list[SiteRecord],
    finish: Callable[[Selection], Selection] | None = None,
) -> Selection:
    """Let a policy decide and append what it did to ``records``; ``finish`` changes the selection before that."""
    start, stop = stopwatch(context.device)
    begun = start()
    selection = step.policy.select(context)
    if finish is not None:
        selection = finish(selection)
    if selection.group_id is not None and context.site != Site.VISION_BLOCK:  # in the order in which they will stand
        group = ordered_groups(selection.group_id, selection.n_outputs)
        selection = replace(selection, group_id=group, pairs=None)
    records.append(
        SiteRecord(
            policy=step.policy.name,
            site=context.site,
            layer=context.layer,
            positions=step.request.positions,
            samples=context.sample,
            lengths=context.lengths,
            selection=selection,
            elapsed=stop(begun),
            flops=_flops(step.policy, context, selection),
        )
    )
    return selection


def stopwatch(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any], Callable[[], float | None]]]:
    """``start() -> mark`` and ``stop(mark) -> reader``; the reader gives milliseconds and syncs only when called."""
    if device.type != "cuda":
        return time.perf_counter, lambda mark: partial(float, (time.perf_counter() - mark) * 1e3)

    def start() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return start, lambda mark: partial(_elapsed, mark, start())


def _elapsed(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return begin.elapsed_time(end)


def _flops(policy: Policy, context: Context, selection: Selection) -> float | None:
    if selection.counts is None:
        return None
    each = [policy.selection_flops(context.info, n, k) for n, k in zip(context.lengths, selection.counts, strict=True)]
    return None if None in each else float(sum(f for f in each if f is not None))


def site_signals(
    step: Step, features: Tensor, give: Callable[[Signal], Any], chosen: Callable[[Any], Any]
) -> Mapping[Signal, Any]:
    """The signals of one step; per-token ones pass ``chosen``, which re-indexes them by earlier selections."""
    signals: dict[Signal, Any] = {}
    for signal in step.request.signals:
        try:
            value = give(signal)
        except SignalError:
            if not signal.optional:
                raise
            continue
        signals[signal] = chosen(value) if signal.per_token and value is not features else value
    return signals
