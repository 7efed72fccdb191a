"""Pictures of several sizes under the frozen tower of `tiny-qwen`, renewed a little with every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..easyvqa import EasyQuestion, EasyVQA, object_mask
from ..qwen_fast import tower_cells
from ..qwen_model import CELL
from ..scenes import Scene, for_size, generate_scene
from .labels import EasyPictures
from .scene_cache import TRAIN_SCENES, Entry


@dataclass(frozen=True)
class SizeShare:
    """A picture size in pixels `(height, width)`, its share of the steps, and the share of easy-VQA in it."""

    size: tuple[int, int]
    share: float
    easy: float = 0.0


SIZES = (
    SizeShare((224, 224), 0.50),
    SizeShare((160, 160), 0.24, easy=0.55),
    SizeShare((320, 320), 0.10),
    SizeShare((160, 256), 0.08),
    SizeShare((256, 192), 0.08),
)


class SizeCache:
    """One ring of encoded pictures per size."""

    def __init__(self, visual: Any, rng: np.random.Generator, total: int, easy: EasyVQA) -> None:
        self.visual, self.pictures = visual, EasyPictures(easy)
        self.by_image: dict[int, list[EasyQuestion]] = {}
        for row in easy.questions:
            self.by_image.setdefault(row.image_id, []).append(row)
        self.cells: list[Tensor] = []
        self.entries: list[list[Entry]] = [[] for _ in SIZES]
        self.next = [0] * len(SIZES)
        for number, item in enumerate(SIZES):
            count = max(8, int(total * item.share))
            rows, columns = item.size[0] // CELL, item.size[1] // CELL
            width = visual.config.hidden_size
            self.cells.append(torch.empty(count, rows * columns, visual.spatial_merge_unit, width).bfloat16())
            while len(self.entries[number]) < count:
                self.renew(rng, number, min(16, count - len(self.entries[number])))

    def renew(self, rng: np.random.Generator, number: int, count: int) -> None:
        """Replace the `count` oldest pictures of size `number`."""
        drawn = [self._draw(rng, SIZES[number]) for _ in range(count)]
        with torch.no_grad():
            cells = tower_cells(self.visual, torch.from_numpy(np.stack([image for image, _ in drawn]))).flatten(1, 2)
        entries, ring = self.entries[number], self.cells[number]
        for (_, entry), row in zip(drawn, cells, strict=True):
            slot = self.next[number] % len(ring)
            ring[slot] = row
            if slot < len(entries):
                entries[slot] = entry
            else:
                entries.append(entry)
            self.next[number] += 1

    def _draw(self, rng: np.random.Generator, item: SizeShare) -> tuple[np.ndarray, Entry]:
        if rng.random() < item.easy:
            image_id = self.pictures.ids[int(rng.integers(len(self.pictures.ids)))]
            picture = Image.fromarray(self.pictures.load(rng, image_id))
            image = np.asarray(picture.resize(item.size[::-1], Image.Resampling.BICUBIC))
            shape = (item.size[0] // CELL, CELL, item.size[1] // CELL, CELL)
            inside = object_mask(image).reshape(shape).sum(axis=(1, 3)).reshape(-1)
            return image, Entry(np.where(inside > 10, 0, -1).astype(np.int16), easy=tuple(self.by_image[image_id]))
        scene = generate_scene(rng, "train", for_size(TRAIN_SCENES, item.size))
        return scene.image, bare_entry(scene)

    def sample(self, rng: np.random.Generator, number: int, count: int) -> tuple[list[Entry], Tensor]:
        """Random entries of one size and their cells, bf16 `[count, N, 4, D]`."""
        picks = rng.integers(0, len(self.entries[number]), size=count)
        return [self.entries[number][int(i)] for i in picks], self.cells[number][torch.from_numpy(picks)]


def bare_entry(scene: Scene) -> Entry:
    """What questions need of a scene, without its picture."""
    bare = Scene(np.empty(0, np.uint8), scene.objects, scene.patch_object, scene.background)
    return Entry(scene.patch_object.reshape(-1), scene=bare)
