"""Held-out scene questions for evaluation: unseen photos, unseen digits, unseen scenes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmprune.core.errors import InputError

from .questions import FAMILIES, Question, ask
from .scenes import HELD_OUT, IMAGE_SIZE, for_size, generate_scene

MIN_OBJECTS = 4
HELD_OUT_STREAM = 7_001  # keeps these scenes apart from every training stream


@dataclass(frozen=True)
class SceneQuestion:
    """One held-out question.

    Attributes:
        image: RGB picture; questions of one scene share the object.
        image_id: name of the scene, unique over seeds.
        question: text without instruction.
        answer: a single lower-case word.
        family: question family.
    """

    image: Image.Image
    image_id: str
    question: str
    answer: str
    family: str


def scene_questions(
    seed: int = 0, n: int = 300, per_scene: int = 6, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
) -> list[SceneQuestion]:
    """Make `n` held-out questions over photographs with at least four objects; families are balanced.

    Args:
        seed: same seed, same questions; different seeds give different scenes.
        n: number of questions.
        per_scene: questions of one scene, between 1 and 8, all of different families.
        size: height and width of the pictures in pixels, multiples of 16 from 128 to 384.

    Raises:
        InputError: `n`, `per_scene` or `size` out of range.
    """
    if n < 1 or not 1 <= per_scene <= len(FAMILIES):
        raise InputError(f"need n >= 1 and 1 <= per_scene <= {len(FAMILIES)}, got n={n}, per_scene={per_scene}")
    if any(side % 16 or not 128 <= side <= 384 for side in size):
        raise InputError(f"need sides that are multiples of 16 from 128 to 384, got {size[0]} x {size[1]}")
    settings = for_size(HELD_OUT, size)
    rng = np.random.default_rng([HELD_OUT_STREAM, seed])
    used: Counter[str] = Counter(dict.fromkeys(FAMILIES, 0))
    rows: list[SceneQuestion] = []
    number = 0
    while len(rows) < n:
        scene = generate_scene(rng, "test", settings)
        if len(scene.objects) < MIN_OBJECTS:
            continue
        asked: list[Question] = []
        for family in sorted(FAMILIES, key=lambda f: (used[f], FAMILIES.index(f))):
            question = ask(rng, scene, family) if len(asked) < min(per_scene, n - len(rows)) else None
            if question is not None:
                asked.append(question)
                used[family] += 1
        image, name = Image.fromarray(scene.image), f"scene-{seed}-{number}"
        rows += [SceneQuestion(image, name, q.text, q.answer, q.family) for q in asked]
        number += 1
    return rows
