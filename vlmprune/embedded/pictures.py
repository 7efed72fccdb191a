"""Pictures without questions, for measurements on the embedded models: of the training photos, or of the held-out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
from PIL import Image

from .digit_pictures import digit_picture
from .scenes import SceneSettings, generate_scene

STREAM = 7_005  # keeps these scenes apart from every training and every question


def scene_pictures(split: str = "train", seed: int = 0) -> Iterator[Image.Image]:
    """Scenes of 224 x 224 pixels without end.

    Args:
        split: ``"train"`` or ``"test"``: which photos and digits are used.
        seed: same seed, same pictures.

    Raises:
        InputError: unknown split.
    """
    rng = np.random.default_rng([STREAM, seed])
    while True:
        yield Image.fromarray(generate_scene(rng, split, SceneSettings()).image)


def digit_pictures(split: str = "train", seed: int = 0) -> Iterator[Image.Image]:
    """Pictures of one digit, of 224 x 224 pixels, without end; see :func:`~.digit_pictures.digit_picture`."""
    for number in count():
        yield Image.fromarray(digit_picture(number, split, seed).image)
