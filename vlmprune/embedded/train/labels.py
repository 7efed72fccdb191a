"""Labels of stage 1: what every patch and every image shows."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..bank import SHAPES
from ..easyvqa import EASY_COLOURS, EasyVQA, image_facts, object_mask
from ..scenes import COLOURS, GRID, IMAGE_SIZE, KINDS, PATCH_SIZE, Scene

ALL_COLOURS = (*COLOURS, *(c for c in EASY_COLOURS if c not in COLOURS))
N_KINDS = len(SHAPES) + 10  # shapes, then digits; the class after the last is background
N_COLOURS = len(ALL_COLOURS)
N_PRESENCE = N_COLOURS * len(KINDS) + 10
IGNORE = -100


class Labels:
    """Arrays of one batch, filled image by image."""

    def __init__(self, batch: int) -> None:
        patches = GRID * GRID
        self.kind = np.full((batch, patches), N_KINDS, dtype=np.int64)
        self.colour = np.full((batch, patches), N_COLOURS, dtype=np.int64)
        self.centre = np.zeros((batch, patches), dtype=np.float32)
        self.xy = np.zeros((batch, patches, 2), dtype=np.float32)
        self.presence = np.zeros((batch, N_PRESENCE), dtype=np.float32)
        self.presence_known = np.ones(batch, dtype=np.float32)

    def fill_scene(self, row: int, scene: Scene) -> None:
        """Labels of one scene; index -1 of the lookup tables is the background."""
        kinds, colours, centres = [], [], []
        for item in scene.objects:
            kinds.append(SHAPES.index(item.kind) if item.digit is None else len(SHAPES) + item.digit)
            colours.append(ALL_COLOURS.index(item.colour))
            centres.append(item.centre)
            self.presence[row, colours[-1] * len(KINDS) + KINDS.index(item.kind)] = 1
            if item.digit is not None:
                self.presence[row, N_COLOURS * len(KINDS) + item.digit] = 1
            x, y = (int(c) // PATCH_SIZE for c in item.centre)
            self.centre[row, y * GRID + x] = 1
        owner = scene.patch_object.reshape(-1)
        self.kind[row] = np.asarray([*kinds, N_KINDS])[owner]
        self.colour[row] = np.asarray([*colours, N_COLOURS])[owner]
        table = np.asarray([*centres, (IMAGE_SIZE / 2, IMAGE_SIZE / 2)], dtype=np.float32)
        self.xy[row] = table[owner] / (IMAGE_SIZE / 2) - 1

    def fill_easy(self, row: int, image: np.ndarray, shape: str | None, colour: str | None) -> None:
        """Labels of an easy-VQA picture; what its questions do not tell is ignored."""
        mask = object_mask(image)
        covered = mask.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).sum(axis=(1, 3)).reshape(-1) > 10
        ys, xs = np.nonzero(mask)
        if len(ys) == 0:
            self.kind[row], self.colour[row], self.presence_known[row] = IGNORE, IGNORE, 0
            return
        x, y = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
        self.kind[row, covered] = IGNORE if shape is None else SHAPES.index(shape)
        self.colour[row, covered] = IGNORE if colour is None else ALL_COLOURS.index(colour)
        self.centre[row, int(y) // PATCH_SIZE * GRID + int(x) // PATCH_SIZE] = 1
        self.xy[row] = np.asarray((x, y), dtype=np.float32) / (IMAGE_SIZE / 2) - 1
        if shape is None or colour is None:
            self.presence_known[row] = 0
        else:
            self.presence[row, ALL_COLOURS.index(colour) * len(KINDS) + KINDS.index(shape)] = 1


class EasyPictures:
    """Random augmented easy-VQA training pictures with what their questions tell about them."""

    def __init__(self, data: EasyVQA) -> None:
        self.data = data
        pairs: dict[int, list[tuple[str, str]]] = {image_id: [] for image_id in data.png}
        for item in data.questions:
            pairs[item.image_id].append((item.question, item.answer))
        self.facts = {image_id: image_facts(rows) for image_id, rows in pairs.items()}
        self.ids = sorted(self.facts)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, str | None, str | None]:
        """uint8 `[224, 224, 3]`, shape and colour or None."""
        image_id = self.ids[int(rng.integers(len(self.ids)))]
        return self.load(rng, image_id), *self.facts[image_id]

    def load(self, rng: np.random.Generator, image_id: int) -> np.ndarray:
        """One picture, enlarged and randomly mirrored or transposed, uint8 `[224, 224, 3]`."""
        picture = self.data.image(image_id).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        image = np.asarray(picture)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        if rng.random() < 0.5:
            image = image[::-1]
        if rng.random() < 0.5:
            image = image.transpose(1, 0, 2)
        return np.ascontiguousarray(image)
