"""Running a policy at one site: context in, selection out, everything recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmprune.core.context import Context
from vlmprune.core.errors import SignalError
from vlmprune.core.info import ModelInfo
from vlmprune.core.policy import Policy
from vlmprune.core.report import Report, SiteRecord
from vlmprune.core.selection import Selection
from vlmprune.core.signals import Signal
from vlmprune.core.sites import Site, SiteRequest


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
                raise SignalError(f"{leaf.name!r} acts at {request.site}, but {info.model_class} offers {served}.")
            wanted = tuple(s for s in request.signals if type(s) in info.signals or not s.optional)
            for signal in wanted:
                if type(signal) not in info.signals:
                    raise SignalError(
                        f"{leaf.name!r} needs the signal {type(signal).__name__}, which {info.model_class} cannot give"
                        f"{_why(signal, info)}. Choose another policy: vlmprune.available()."
                    )
            steps.append(Step(leaf, replace(request, signals=wanted)))
    return tuple(steps)


def run_step(step: Step, context: Context, report: Report) -> Selection:
    """Let a policy decide and write down what it did."""
    start, stop = stopwatch(context.device)
    begun = start()
    selection = step.policy.select(context)
    report.sites.append(
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


def _why(signal: Signal, info: ModelInfo) -> str:
    if type(signal).__name__.startswith("Cls") and not info.has_cls:
        return " (its vision tower has no CLS token)"
    return " (it has no vision tower)" if info.vision_depth is None and signal.stack_name == "vision" else ""


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

