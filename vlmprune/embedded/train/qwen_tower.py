"""Stage `qwen-tower`: distil tiny-llava's features into a windowed tower, on crops and mosaics of many sizes.

Windows and rotary positions do not know where in the picture they are, so most training is on small crops of
crowded scenes, where nearly every token shows an object; whole pictures and other sizes come at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..easyvqa import load_easy_vqa, object_mask
from ..qwen_fast import visual_tokens
from ..qwen_model import CELL, build_model
from ..scenes import GRID, HELD_OUT, generate_scene
from .common import StageSettings
from .labels import ALL_COLOURS, IGNORE, N_COLOURS, N_KINDS, SHAPES, EasyPictures
from .qwen_teacher import CROWDED, USUAL, Teacher, colour_index, kind_index, make_teacher, patch_centres, probe_losses
from .run import Run

CACHE_SEED, STAGE_SEED = 52, 53
CROP = (8, 8)
CROPS_UNTIL = 0.76  # of the time
# Rows and columns in visual tokens, with their shares, for the rest of the time.
LATE_SIZES = ((14, 14), (10, 10), (20, 20), (10, 16), (16, 10), (12, 20), (20, 12), (8, 8))
LATE_SHARES = (0.46, 0.12, 0.10, 0.06, 0.06, 0.04, 0.04, 0.12)
EASY_SHARE, EASY_CELLS = 0.07, (10, 10)
TOKENS = 1536  # visual tokens of a step, as many as 24 crops hold
DISTIL, KIND, COLOUR = 4.0, 1.0, 0.5
BACKGROUND = 0.1


class PictureCache:
    """Scenes with the teacher's targets, renewed a little with every step."""

    def __init__(self, teacher: Teacher, size: int) -> None:
        self.teacher, self.size, self.next = teacher, size, 0
        self.images = np.empty((size, GRID * CELL, GRID * CELL, 3), dtype=np.uint8)
        self.targets = torch.empty(size, GRID, GRID, teacher.place.shape[1], dtype=torch.bfloat16)
        self.owner = np.empty((size, GRID, GRID), dtype=np.int16)
        self.kinds: list[np.ndarray] = [np.empty(0)] * size
        self.colours: list[np.ndarray] = [np.empty(0)] * size
        self.boxes: list[np.ndarray] = [np.empty(0)] * size

    def renew(self, rng: np.random.Generator, count: int, crowded: float) -> None:
        """Replace the `count` oldest scenes; a share `crowded` of the new ones is full of digits and shapes."""
        scenes = [generate_scene(rng, "train", CROWDED if rng.random() < crowded else USUAL) for _ in range(count)]
        images = np.stack([s.image for s in scenes])
        centres = torch.from_numpy(np.stack([patch_centres(s) for s in scenes]))
        targets = self.teacher.targets(images, centres).view(count, GRID, GRID, -1)
        for i, scene in enumerate(scenes):
            slot = self.next % self.size
            self.images[slot], self.targets[slot], self.owner[slot] = images[i], targets[i], scene.patch_object
            self.kinds[slot] = np.asarray([*kind_index(scene), N_KINDS])
            self.colours[slot] = np.asarray([*colour_index(scene), N_COLOURS])
            self.boxes[slot] = np.asarray([o.bbox for o in scene.objects]).reshape(-1, 4)
            self.next += 1

    def piece(self, rng: np.random.Generator, rows: int, columns: int) -> tuple[int, slice, slice, np.ndarray]:
        """Scene number, rows and columns of the fullest of five crops, and which of its objects are whole."""
        slot = int(rng.integers(min(self.next, self.size)))
        box = self.boxes[slot]
        tops, lefts = rng.integers(0, (GRID - rows + 1, GRID - columns + 1), size=(5, 2)).T
        y0, x0 = tops[:, None] * CELL, lefts[:, None] * CELL
        inside = (box[:, 0] >= x0) & (box[:, 1] >= y0) & (box[:, 2] <= x0 + columns * CELL)
        inside &= box[:, 3] <= y0 + rows * CELL
        best = int(inside.sum(1).argmax())
        top, left = int(tops[best]), int(lefts[best])
        return slot, slice(top, top + rows), slice(left, left + columns), inside[best]


class TowerBatch:
    """Pictures of one size with per-token targets.

    Attributes:
        images: uint8 `[B, H, W, 3]`.
        targets: float32 `[B, h, w, C]`.
        kind, colour: classes `[B, h, w]`.
        weight: of a token in the loss `[B, h, w]`; 0 where an object is cut.
        distil: whether the targets count.
    """

    def __init__(self, batch: int, rows: int, columns: int, width: int) -> None:
        self.images = np.empty((batch, rows * CELL, columns * CELL, 3), dtype=np.uint8)
        self.targets = torch.zeros(batch, rows, columns, width)
        self.kind = np.full((batch, rows, columns), N_KINDS)
        self.colour = np.full((batch, rows, columns), N_COLOURS)
        self.weight = np.zeros((batch, rows, columns), dtype=np.float32)
        self.distil = True

    def paste(self, row: int, y: int, x: int, cache: PictureCache, piece: tuple[int, slice, slice, np.ndarray]) -> None:
        """Put a crop of a cached scene at cell `(y, x)` of picture `row`."""
        slot, rows, columns, whole = piece
        part = (row, slice(y, y + rows.stop - rows.start), slice(x, x + columns.stop - columns.start))
        pixels = (row, *(slice(s.start * CELL, s.stop * CELL) for s in part[1:]))
        source = (slot, *(slice(s.start * CELL, s.stop * CELL) for s in (rows, columns)))
        self.images[pixels] = cache.images[source]
        self.targets[part] = cache.targets[slot, rows, columns].float()
        owner = cache.owner[slot, rows, columns]
        kind = cache.kinds[slot]
        self.kind[part], self.colour[part] = kind[owner], cache.colours[slot][owner]
        weight = np.append(np.where(kind[:-1] >= len(SHAPES), 2.0, 1.0) * whole, BACKGROUND)
        self.weight[part] = weight[owner]


def draw_batch(rng: np.random.Generator, cache: PictureCache, rows: int, columns: int) -> TowerBatch:
    """Crops where a scene is large enough, else mosaics of two or four crops."""
    count = max(1, TOKENS // (rows * columns))
    batch = TowerBatch(count, rows, columns, cache.targets.shape[-1])
    heights = [rows] if rows <= GRID else [rows // 2, rows - rows // 2]
    widths = [columns] if columns <= GRID else [columns // 2, columns - columns // 2]
    for row in range(count):
        y = 0
        for height in heights:
            x = 0
            for width in widths:
                batch.paste(row, y, x, cache, cache.piece(rng, height, width))
                x += width
            y += height
    return batch


def draw_easy(rng: np.random.Generator, easy: EasyPictures, width: int) -> TowerBatch:
    """easy-VQA pictures at the processor's smallest size; labels only, since the teacher knows another size."""
    rows, columns = EASY_CELLS
    batch = TowerBatch(TOKENS // (rows * columns), rows, columns, width)
    batch.distil = False
    for row in range(len(batch.images)):
        image, shape, colour = easy.draw(rng)
        image = np.asarray(Image.fromarray(image).resize((columns * CELL, rows * CELL), Image.Resampling.BICUBIC))
        covered = object_mask(image).reshape(rows, CELL, columns, CELL).sum(axis=(1, 3)) > 10
        batch.images[row] = image
        batch.kind[row][covered] = IGNORE if shape is None else SHAPES.index(shape)
        batch.colour[row][covered] = IGNORE if colour is None else ALL_COLOURS.index(colour)
        batch.weight[row] = np.where(covered, 0.25, BACKGROUND)
    return batch


def tower_loss(visual: Any, teacher: Teacher, batch: TowerBatch) -> Tensor:
    """Distance to the teacher's features, and cross-entropy of its probes on the student's."""
    output = visual_tokens(visual, torch.from_numpy(batch.images))
    weight = torch.from_numpy(batch.weight).flatten()
    kind, colour = (torch.from_numpy(a).flatten() for a in (batch.kind, batch.colour))
    by_kind, by_colour = probe_losses(teacher.probe(output.flatten(0, 2)), kind, colour)
    loss = KIND * by_kind + COLOUR * by_colour
    if batch.distil:
        loss = loss + DISTIL * ((output - batch.targets) / teacher.scale).square().mean(-1).flatten()
    return (loss * weight).sum() / weight.sum()


@torch.no_grad()
def evaluate_tower(visual: Any, teacher: Teacher, n_scenes: int, seed: int = 99) -> dict[str, float]:
    """Held-out accuracy of the teacher's probes on the student at 224 x 224, and the distance to the teacher."""
    rng = np.random.default_rng(seed)
    scenes = [generate_scene(rng, "test", HELD_OUT) for _ in range(n_scenes)]
    hits: dict[str, list[float]] = {key: [] for key in ("shape", "digit", "colour", "false_object", "distance")}
    for start in range(0, n_scenes, 8):
        part = scenes[start : start + 8]
        images = np.stack([s.image for s in part])
        output = visual_tokens(visual, torch.from_numpy(images)).flatten(1, 2)
        targets = teacher.targets(images, torch.from_numpy(np.stack([patch_centres(s) for s in part])))
        error = ((output - targets) / teacher.scale).square().mean(-1).numpy()
        logits = teacher.probe(output)
        kinds, colours = logits[..., : N_KINDS + 1].softmax(-1).numpy(), logits[..., N_KINDS + 1 :].argmax(-1).numpy()
        for row, scene in enumerate(part):
            owner = scene.patch_object.reshape(-1)
            found = kinds[row].argmax(-1)
            hits["false_object"].append(float((found[owner < 0] != N_KINDS).mean()))
            hits["distance"].append(float(error[row][owner >= 0].mean()))
            for number, (kind, colour) in enumerate(zip(kind_index(scene), colour_index(scene), strict=True)):
                mine = owner == number
                votes = kinds[row][mine][:, :N_KINDS].sum(0)
                hits["shape" if kind < len(SHAPES) else "digit"].append(float(votes.argmax() == kind))
                hits["colour"].append(float((colours[row][mine] == colour).mean()))
    return {key: float(np.mean(values)) for key, values in hits.items()}


def train_qwen_tower(rank: int, world: int, out: Path, settings: StageSettings) -> None:
    """Run or resume the stage; checkpoints go to `out/qwen_tower.pt`, the curve to `out/curve.csv`."""
    visual = build_model(settings.seed).model.visual
    teacher = make_teacher(out / "teacher.pt", settings.seed)
    run = Run("qwen_tower", out, settings, [visual], rank, world)
    cache, rng = PictureCache(teacher, settings.cache), run.rng(CACHE_SEED)
    while cache.next < settings.cache:
        cache.renew(rng, min(32, settings.cache - cache.next), 0.8)
    easy = EasyPictures(load_easy_vqa("train"))
    run.begin()
    while run.progress < 1.0:
        rng, shared = run.rng(STAGE_SEED), run.rng(STAGE_SEED, shared=True)
        late = run.progress > CROPS_UNTIL
        cache.renew(rng, 2, 0.15 if run.progress > 0.6 else 0.8)
        size = LATE_SIZES[int(shared.choice(len(LATE_SIZES), p=LATE_SHARES))] if late else CROP
        if run.step > 200 and shared.random() < EASY_SHARE:
            batch = draw_easy(rng, easy, cache.targets.shape[-1])
        else:
            batch = draw_batch(rng, cache, *size)
        run.flat.zero_grad()
        loss = tower_loss(visual, teacher, batch)
        loss.backward()
        run.finish_step({"loss": loss.item()}, lambda: evaluate_tower(visual, teacher, settings.eval_scenes))
