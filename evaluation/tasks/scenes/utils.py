"""Task `scenes`: generated pictures with unseen photos, digits and objects. The seed selects fresh scenes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vlmprune.embedded.questions import FAMILIES, HEADLINE_FAMILIES
from vlmprune.embedded.tasks import scene_questions
from vlmprune.evaluation.tasks.common import doc_to_target, doc_to_text, doc_to_visual, process_results

__all__ = ["doc_to_target", "doc_to_text", "doc_to_visual", "process_results"]

DEFAULT_SIZE = 1000
FAMILY_NAMES = FAMILIES
HEADLINE = HEADLINE_FAMILIES


def load_docs(seed: int, limit: int | None) -> list[dict[str, Any]]:
    """Make the questions: the first `limit` (default 1000) of the endless stream that belongs to `seed`."""
    number: Counter[str] = Counter()
    docs = []
    for row in scene_questions(seed, DEFAULT_SIZE if limit is None else limit):
        docs.append(
            {
                "doc_id": f"{row.image_id}/{number[row.image_id]}",
                "image": row.image,
                "image_id": row.image_id,
                "question": row.question,
                "answer": row.answer,
                "family": row.family,
            }
        )
        number[row.image_id] += 1
    return docs
