"""Task `easy_vqa`: the public test split of easy-VQA 1.0 (1000 pictures, 9673 questions)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image

from vlmprune.embedded.easyvqa import EASY_COLOURS, EASY_SHAPES, EasyVQA, load_easy_vqa
from vlmprune.evaluation.tasks.common import doc_to_target, doc_to_text, doc_to_visual, process_results

__all__ = ["doc_to_target", "doc_to_text", "doc_to_visual", "process_results"]

DEFAULT_SIZE = 9673
FAMILY_NAMES = ("shape", "colour", "yes_no")
HEADLINE = FAMILY_NAMES


def load_docs(seed: int, limit: int | None) -> list[dict[str, Any]]:
    """Load the questions in published order.

    Args:
        seed: which questions `limit` draws. limit: how many; None or more than there are means all.
    """
    data = load_easy_vqa("test")
    total = len(data.questions)
    numbers = range(total) if limit is None or limit >= total else _draw(seed, total, limit)
    picture = functools.lru_cache(maxsize=None)(data.image)
    return [_doc(data, number, picture(data.questions[number].image_id)) for number in numbers]


def family(answer: str) -> str:
    """Family of a question by its answer.

    Raises:
        ValueError: no such answer in easy-VQA.
    """
    if answer in ("yes", "no"):
        return "yes_no"
    if answer in EASY_SHAPES:
        return "shape"
    if answer in EASY_COLOURS:
        return "colour"
    raise ValueError(f"{answer!r} is no answer of easy-VQA")


def _draw(seed: int, total: int, limit: int) -> list[int]:
    # The published order has about ten questions per picture in a row: the first few hundred would be few
    # pictures.
    return sorted(np.random.default_rng(seed).permutation(total)[:limit].tolist())


def _doc(data: EasyVQA, number: int, image: Image.Image) -> dict[str, Any]:
    question = data.questions[number]
    return {
        "doc_id": f"easy-vqa-test/{number}",
        "image": image,
        "image_id": f"easy-vqa-test-{question.image_id}",
        "question": question.question,
        "answer": question.answer,
        "family": family(question.answer),
    }
