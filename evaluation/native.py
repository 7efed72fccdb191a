"""Answers in this process, without a harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmprune.core.errors import VlmpruneError
from vlmprune.core.report import Report
from vlmprune.evaluation.prompts import answer_batch, count_image_tokens, render_prompt, user_message
from vlmprune.evaluation.tasks.definition import Task

if TYPE_CHECKING:
    from vlmprune.api import Handle


@dataclass(frozen=True)
class Answer:
    """What a model said and what it cost.

    Attributes:
        text: decoded new tokens.
        n_images: images in the prompt.
        visual, kept: visual tokens of the sample before any reduction and after the last site; None where
            unknown.
        layers: mean of the kept tokens over decoder layers.
        new_tokens: generated tokens.
    """

    text: str
    n_images: int
    visual: int | None
    kept: int | None
    layers: float | None
    new_tokens: int


class InactivePolicyError(VlmpruneError, RuntimeError):
    """A policy was applied, but the forward left no report: it saw no visual tokens."""


@dataclass(frozen=True)
class Request:
    """One question ready for the model: an id independent of the batch, a rendered prompt, its pictures."""

    sample_id: str
    prompt: str
    images: Sequence[Any]


def make_request(processor: Any, task: Task, doc: Mapping[str, Any], style: str, with_image: bool = True) -> Request:
    """The request of a document."""
    images = task.doc_to_visual(doc) if with_image else []
    prompt = render_prompt(processor, user_message(task.text(doc, style), len(images)))
    return Request(doc["doc_id"], prompt, images)


def answer_requests(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    generation: Mapping[str, Any],
    batch_size: int,
    handle: Handle | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Answer]:
    """Answer requests in their order, in batches of neighbours.

    Args:
        model, processor: the model, pruned already where `handle` is given.
        requests: what to ask. generation: arguments of `generate`. batch_size: rows per call.
        handle: of the applied policy; its sample ids are set, so that draws depend on neither batch nor
            order.
        advance: called with the number of answers after every batch.

    Raises:
        InactivePolicyError: the policy left no report.
        Exception: whatever a policy raised.
    """
    answers = []
    for start in range(0, len(requests), batch_size):
        answers += answer_one_batch(model, processor, requests[start : start + batch_size], generation, handle)
        advance(len(requests[start : start + batch_size]))
    return answers


def answer_one_batch(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    generation: Mapping[str, Any],
    handle: Handle | None,
) -> list[Answer]:
    """Answer the requests in one call of `generate`; see :func:`answer_requests`."""
    previous = None if handle is None else handle.last
    if handle is not None:
        handle.sample_ids = [request.sample_id for request in requests]
    try:
        prompts, images = [r.prompt for r in requests], [r.images for r in requests]
        texts, new_tokens, inputs = answer_batch(model, processor, prompts, images, generation)
    finally:
        if handle is not None:
            handle.sample_ids = None
    n_images = [len(row) for row in images]
    visual = count_image_tokens(model, inputs)
    kept: list[tuple[int | None, int | None, float | None]]
    if handle is None:
        kept = [(count, count, count) for count in visual]
    else:
        kept = _reported(handle, previous, len(requests), any(n_images))
    rows = zip(texts, n_images, kept, new_tokens, strict=True)
    return [Answer(text, n, *tokens, new) for text, n, tokens, new in rows]


def _reported(
    handle: Handle, previous: Report | None, rows: int, has_images: bool
) -> list[tuple[int | None, int | None, float | None]]:
    if handle.last_error is not None:
        raise handle.last_error
    report = handle.last
    if not has_images:
        return [(0, 0, 0.0)] * rows
    if report is None or report is previous or report.n_samples != rows:
        raise InactivePolicyError(
            f"{handle.policy.name} was applied, but the last forward left no report of {rows} rows."
        )
    per_layer = report.kept_tokens_per_layer
    layers = [sum(row) / len(per_layer) for row in zip(*per_layer, strict=True)] if per_layer else [None] * rows
    return list(zip(report.visual_tokens, report.kept_tokens, layers, strict=True))
