"""Example pictures and questions of the demo: held-out scenes that the embedded model can be asked about."""

from __future__ import annotations

from PIL import Image

from vlmprune.embedded.tasks import scene_questions

SEED = 2024
COUNT = 4


def example_questions(count: int = COUNT) -> list[tuple[Image.Image, str]]:
    """Pictures of different scenes, each with a question."""
    return [(row.image, row.question) for row in scene_questions(SEED, count, per_scene=1)]
