"""The functions that the tasks' YAML files name. A document is a dict with the keys of `DOC_KEYS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vlmprune.evaluation.tasks.scoring import exact_match

DOC_KEYS = ("doc_id", "image", "image_id", "question", "answer", "family")
METRIC = "exact_match"


def doc_to_visual(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The document's picture, RGB."""
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    """The question between the optional `pre_prompt` and `post_prompt`."""
    extra = lmms_eval_specific_kwargs or {}
    return f"{extra.get('pre_prompt', '')}{doc['question']}{extra.get('post_prompt', '')}"


def doc_to_target(doc: Mapping[str, Any]) -> str:
    """The right answer."""
    return str(doc["answer"])


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer: `{"exact_match": 0.0 or 1.0}`."""
    return {METRIC: float(exact_match(results[0], str(doc["answer"])))}
