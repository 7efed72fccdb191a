"""Pictures without questions, for measurements on the embedded models: of the training photos, or of the held-out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

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
