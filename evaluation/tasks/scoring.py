"""Exact match of short answers. Used by every task, so that both runners score alike."""

from __future__ import annotations

import string

_STRIP = string.punctuation + "‘’“”…"


def normalise(text: str) -> list[str]:
    """Lower-case words of a text, punctuation at their edges removed, empty words left out."""
    words = (word.strip(_STRIP) for word in text.lower().split())
    return [word for word in words if word]


def exact_match(prediction: str, target: str) -> bool:
    """True if the prediction starts with the target's words: `"Yes, it is."` matches `"yes"`.

    An empty prediction is never right, nor is any prediction for an empty target.
    """
    wanted = normalise(target)
    return bool(wanted) and normalise(prediction)[: len(wanted)] == wanted
