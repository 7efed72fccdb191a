"""One question asked of the dense and of the pruned model, with tokens, times and cache sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from vlmprune.api import Handle, applied
from vlmprune.core.errors import InputError
from vlmprune.core.policy import Policy
from vlmprune.core.report import Report
from vlmprune.evaluation.measure import cache_bytes
from vlmprune.evaluation.prompts import encode, generation_options, render_prompt, user_message
from vlmprune.loading import first_line
from vlmprune.plot import plot_selection


@dataclass(frozen=True)
class Outcome:
    """What one way of running the model gave.

    Attributes:
        answer: the new text.
        visual_tokens: visual tokens of the image after the last reduction.
        mean_visual_tokens: visual tokens, mean over decoder layers.
        prefill_ms: median milliseconds of the forward over the prompt, vision tower and selection included.
        answer_ms: median milliseconds of generating the answer, prefill included.
        kv_bytes: bytes of keys and values in the cache after the prefill, all layers; None where unknown.
    """

    answer: str
    visual_tokens: int
    mean_visual_tokens: float
    prefill_ms: float
    answer_ms: float
    kv_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """Dense and pruned outcome of one question. ``dense`` is None where only the pruned model was asked."""

    pruned: Outcome
    dense: Outcome | None
    report: Report
    overlay: Image.Image | None
    repeats: int


@dataclass
class _Side:
    """One of the two models to be run, and what was measured of it."""

    enter: Callable[[], Any]
    inputs: Any
    answer: str = ""
    kv_bytes: int | None = None
    prefill: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)


def compare(
    model: Any,
    processor: Any,
    image: Image.Image,
    prompt: str,
    policy: Policy,
    *,
    dense: bool = True,
    overlay: bool = True,
    max_new_tokens: int = 32,
    repeats: int = 3,
) -> Comparison:
    """Ask one question with and without pruning.

    Both models answer once to warm up; then they are timed in turn, the first to go changing every round.

    Args:
        model, processor: an unpruned model and its processor; left as they were.
        image: the picture.
        prompt: the whole prompt with the image placeholder (see :func:`chat_prompt` and :func:`raw_prompt`).
        policy: what to prune with.
        dense: also run the dense model.
        overlay: draw the kept tokens.
        max_new_tokens: longest answer. repeats: timed rounds, at least 1.

    Raises:
        InputError: image, prompt or policy do not fit the model.
    """
    if repeats < 1 or max_new_tokens < 1:
        raise InputError(f"repeats={repeats} and max_new_tokens={max_new_tokens} must be at least 1.")
    plain = _encode(model, processor, image, prompt) if dense else None
    with applied(model, policy, processor=processor) as handle, torch.no_grad():
        # Encoded again: a policy that acts on the image changes what the processor makes of it.
        sides = [_Side(nullcontext, _encode(model, processor, image, prompt))]
        if plain is not None:
            sides.append(_Side(handle.disabled, plain))
        report = _measure(model, processor, handle, sides, max_new_tokens, repeats)
        picture = plot_selection(image, report, processor=processor) if overlay else None
    kept, total = report.kept_tokens[0], report.visual_tokens[0]
    mean_kept = report.mean_kept_layers
    pruned = _outcome(sides[0], kept, kept if mean_kept is None else mean_kept)
    return Comparison(pruned, _outcome(sides[1], total, total) if plain is not None else None, report, picture, repeats)


def chat_prompt(processor: Any, question: str) -> str:
    """The prompt for one image and a question, by the processor's chat template.

    Raises:
        InputError: the question is empty or holds the image placeholder itself.
    """
    token = image_placeholder(processor)
    if not question.strip():
        raise InputError("The question is empty.")
    if token and token in question:
        raise InputError(f"The question holds the image placeholder {token!r}, which is added here; leave it out.")
    return render_prompt(processor, user_message(question, 1))


def raw_prompt(processor: Any, prompt: str) -> str:
    """Check a prompt that is passed on as it is.

    Raises:
        InputError: it does not hold the image placeholder exactly once.
    """
    token = image_placeholder(processor)
    found = prompt.count(token) if token else 1
    if found != 1:
        raise InputError(
            f"The raw prompt holds the image placeholder {token!r} {found} times; write it once, where the image goes."
        )
    return prompt


def image_placeholder(processor: Any) -> str | None:
    """The text that stands for an image in a prompt, or None where the processor names none."""
    token = getattr(processor, "image_token", None)
    return getattr(token, "content", token)


def _encode(model: Any, processor: Any, image: Image.Image, prompt: str) -> Any:
    try:
        return encode(model, processor, [prompt], [[image]])
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"The processor refuses this image and prompt: {first_line(error)}") from None


def _measure(
    model: Any, processor: Any, handle: Handle, sides: list[_Side], max_new_tokens: int, repeats: int
) -> Report:
    """Fill the sides; returns the pruned model's report."""
    options = generation_options(processor, {"max_new_tokens": max_new_tokens})

    def prefill(side: _Side) -> Any:
        return model(**side.inputs, use_cache=True, logits_to_keep=1)

    def answer(side: _Side) -> torch.Tensor:
        return model.generate(**side.inputs, **options)

    for side in sides:
        with side.enter():
            ids = answer(side)[0, side.inputs["input_ids"].shape[1] :]
            side.answer = processor.decode(ids, skip_special_tokens=True).strip()
            side.kv_bytes = cache_bytes(prefill(side).past_key_values)
    for side in _turns(sides, repeats):
        with side.enter():
            side.prefill.append(_milliseconds(model, prefill, side))
            side.total.append(_milliseconds(model, answer, side))
    if handle.last is None:
        raise InputError("The prompt brought no visual tokens to the model, so there was nothing to prune.")
    return handle.last


def _turns(sides: list[_Side], rounds: int) -> Iterator[_Side]:
    for number in range(rounds):
        yield from sides if number % 2 == 0 else reversed(sides)


def _milliseconds(model: Any, call: Callable[[_Side], Any], side: _Side) -> float:
    synchronise = torch.cuda.synchronize if model.device.type == "cuda" else (lambda: None)
    synchronise()
    start = time.perf_counter()
    call(side)
    synchronise()
    return (time.perf_counter() - start) * 1000


def _outcome(side: _Side, visual_tokens: int, mean_visual_tokens: float) -> Outcome:
    return Outcome(
        side.answer,
        visual_tokens,
        float(mean_visual_tokens),
        statistics.median(side.prefill),
        statistics.median(side.total),
        side.kv_bytes,
    )
