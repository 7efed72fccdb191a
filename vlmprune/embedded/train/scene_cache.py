"""Features of many scenes under the frozen tower, renewed a little with every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..easyvqa import EasyQuestion, EasyVQA, object_mask
from ..fastpath import patchify, tower_features
from ..questions import Question, draw_questions
from ..scenes import GRID, IMAGE_SIZE, PATCH_SIZE, Scene, SceneSettings, generate_scene
from .labels import EasyPictures

TRAIN_SCENES = SceneSettings(digit_weights=(0.06, 0.34, 0.36, 0.24), objects=(4, 9), plain=0.05)


@dataclass
class Entry:
    """What a question needs of one picture: scene with its image dropped, or easy-VQA questions."""

    owner: np.ndarray  # int16 [196], object index or -1
    scene: Scene | None = None
    easy: tuple[EasyQuestion, ...] = ()

    def positions(self) -> np.ndarray:
        """Centre of the object on each patch, -1..1 in x and y, float32 `[196, 2]`; NaN where there is none."""
        if self.scene is None:
            return np.full((len(self.owner), 2), np.nan, dtype=np.float32)
        centres = [item.centre for item in self.scene.objects]
        table = np.full((len(centres) + 1, 2), np.nan, dtype=np.float32)  # the last row serves index -1
        table[:-1] = np.asarray(centres).reshape(-1, 2) / (IMAGE_SIZE / 2) - 1
        return table[self.owner]

    def questions(self, rng: np.random.Generator, count: int, weights: dict[str, float]) -> list[Question]:
        """Draw `count` questions; the object of an easy-VQA picture decides all of its questions."""
        if self.scene is not None:
            return draw_questions(rng, self.scene, count, weights)
        picks = rng.integers(0, len(self.easy), size=count)
        rows = [self.easy[int(i)] for i in picks]
        return [Question("easy", row.question, row.answer, (0,), (0,)) for row in rows]


class SceneCache:
    """A ring of encoded pictures: mostly scenes, a share of easy-VQA."""

    def __init__(
        self,
        tower: Any,
        rng: np.random.Generator,
        size: int,
        easy: EasyVQA | None,
        easy_share: float = 0.15,
    ) -> None:
        self.tower, self.easy_share = tower, easy_share
        self.pictures = EasyPictures(easy) if easy is not None else None
        self.by_image: dict[int, list[EasyQuestion]] = {}
        for row in easy.questions if easy is not None else ():
            self.by_image.setdefault(row.image_id, []).append(row)
        self.features = torch.empty(size, GRID * GRID, 128, dtype=torch.bfloat16)
        self.entries: list[Entry] = []
        self.next = 0
        while len(self.entries) < size:
            self.renew(rng, min(32, size - len(self.entries)))

    def renew(self, rng: np.random.Generator, count: int) -> None:
        """Replace the `count` oldest pictures."""
        images, entries = [], []
        for _ in range(count):
            image, entry = self._draw(rng)
            images.append(image)
            entries.append(entry)
        with torch.no_grad():
            features = tower_features(self.tower, patchify(torch.from_numpy(np.stack(images))))[:, 1:]
        for entry, row in zip(entries, features, strict=True):
            slot = self.next % len(self.features)
            self.features[slot] = row
            if slot < len(self.entries):
                self.entries[slot] = entry
            else:
                self.entries.append(entry)
            self.next += 1

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, Entry]:
        if self.pictures is not None and rng.random() < self.easy_share:
            image_id = self.pictures.ids[int(rng.integers(len(self.pictures.ids)))]
            image = self.pictures.load(rng, image_id)
            cells = object_mask(image).reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).sum(axis=(1, 3)).reshape(-1)
            return image, Entry(np.where(cells > 10, 0, -1).astype(np.int16), easy=tuple(self.by_image[image_id]))
        scene = generate_scene(rng, "train", TRAIN_SCENES)
        bare = Scene(np.empty(0, np.uint8), scene.objects, scene.patch_object, scene.background)
        return scene.image, Entry(scene.patch_object.reshape(-1), scene=bare)

    def sample(self, rng: np.random.Generator, count: int) -> tuple[list[Entry], Tensor]:
        """Random entries and their features, bf16 `[count, 196, C]`."""
        picks = rng.integers(0, len(self.entries), size=count)
        return [self.entries[int(i)] for i in picks], self.features[torch.from_numpy(picks)]
