"""Prefill time and KV bytes of a policy and of the dense model, on the same prompts, in alternation."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlmprune.evaluation.native import Request
from vlmprune.evaluation.prompts import encode

if TYPE_CHECKING:
    from vlmprune.api import Handle

PROMPTS = 6
REPEATS = 5


@dataclass(frozen=True)
class Prefill:
    """Medians over prompts and repeats in milliseconds, and mean bytes; None where not measured.

    Attributes:
        ms, kv_bytes: of the policy; None without one.
        ms_dense, kv_bytes_dense: of the dense model.
    """

    ms: float | None
    ms_dense: float | None
    kv_bytes: int | None
    kv_bytes_dense: int | None


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly spaced."""
    count = min(count, len(items))
    return [items[int((i + 0.5) * len(items) / count)] for i in range(count)]


def measure_prefill(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    handle: Handle | None = None,
    with_time: bool = True,
    prompts: int = PROMPTS,
    repeats: int = REPEATS,
) -> Prefill:
    """Measure single-prompt prefills: vision tower, policy and decoder, logits of the last position only.

    Policy and dense take turns on every prompt (A B A B), so that clock changes and warm-up hit both. One
    unmeasured round comes first; KV bytes are read in it.

    Args:
        model, processor: the model, pruned already where `handle` is given.
        requests: what may be asked; up to `prompts` of them are used.
        handle: of the applied policy. with_time: False reads KV bytes only. repeats: timed rounds.
    """
    times: dict[bool, list[float]] = {True: [], False: []}
    stored: dict[bool, list[int]] = {True: [], False: []}
    for request in spread(requests, prompts):
        inputs = _encode_both(model, processor, request, handle)
        for turn in range(1 + (repeats if with_time else 0)):
            for dense in inputs:
                active = None if dense else handle
                milliseconds, size = _one_prefill(model, inputs[dense], active, handle, request.sample_id)
                if turn:
                    times[dense].append(milliseconds)
                elif size is not None:
                    stored[dense].append(size)
    return Prefill(_median(times[False]), _median(times[True]), _mean(stored[False]), _mean(stored[True]))


def cache_bytes(cache: Any) -> int | None:
    """Bytes of all keys and values in a cache of transformers, or None where its layout is unknown."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def _encode_both(model: Any, processor: Any, request: Request, handle: Handle | None) -> dict[bool, Any]:
    """Inputs of the dense run (key True) and of the policy's: image-site policies act on the processor."""
    with nullcontext() if handle is None else handle.disabled():
        inputs = {True: encode(model, processor, [request.prompt], [request.images])}
    if handle is not None:
        inputs[False] = encode(model, processor, [request.prompt], [request.images])
    return inputs


def _one_prefill(
    model: Any, inputs: Any, active: Handle | None, handle: Handle | None, sample_id: str
) -> tuple[float, int | None]:
    """Milliseconds and stored bytes of one forward; dense where `active` is None."""
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    if active is not None:
        active.sample_ids = [sample_id]
    dense = nullcontext() if handle is None or active is not None else handle.disabled()
    with torch.inference_mode(), dense:
        _synchronise(model.device)
        start = time.perf_counter()
        output = model(**inputs, **options)
        _synchronise(model.device)
        milliseconds = 1000 * (time.perf_counter() - start)
    if active is None:
        return milliseconds, cache_bytes(output.past_key_values)
    active.sample_ids = None
    if active.last_error is not None:
        raise active.last_error
    return milliseconds, None if active.last is None else active.last.kv_bytes


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: Sequence[int]) -> int | None:
    return round(statistics.mean(values)) if values else None
