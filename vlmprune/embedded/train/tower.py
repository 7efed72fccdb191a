"""Stage 1: train the vision tower with dense patch labels, and the CLS token with image-level labels.

The heads are thrown away afterwards. Without the image-level labels CLS attention would be untrained, and
policies that rank by it would have nothing to rank by.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bank import SHAPES
from ..easyvqa import load_easy_vqa
from ..fastpath import patchify, tower_features, tower_pooled
from ..model import WIDTH, build_model, vision_tower
from ..scenes import (
    GRID,
    HELD_OUT,
    IMAGE_SIZE,
    SceneSettings,
    generate_scene,
)
from .common import StageSettings
from .labels import IGNORE, N_COLOURS, N_KINDS, N_PRESENCE, EasyPictures, Labels
from .run import Run

EASY_SHARE = 0.1
STAGE_SEED = 11
ALL_PATCHES_FROM = 0.85  # of the time; until then half of the patches are dropped


class TowerHeads(nn.Module):
    """Linear heads on the normalised patch features and on the pooled CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.patch = nn.Linear(WIDTH, (N_KINDS + 1) + (N_COLOURS + 1) + 3)  # kind, colour, centre, x, y
        self.presence = nn.Linear(WIDTH, N_PRESENCE)

    def forward(self, patches: Tensor) -> tuple[Tensor, ...]:
        """`[B, P, C]` -> kind, colour, centre `[B, P]` and xy logits."""
        out = self.patch(self.norm(patches))
        return tuple(out.split([N_KINDS + 1, N_COLOURS + 1, 1, 2], dim=-1))


def scene_settings(progress: float) -> SceneSettings:
    """Digits are learned last, so most scenes are full of them and many backgrounds are plain until late."""
    heavy = (0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.15, 0.15)
    light = (0.08, 0.25, 0.27, 0.25, 0.15)
    return SceneSettings(
        digit_weights=heavy if progress < 0.7 else light,
        plain=0.3 if progress < 0.6 else 0.08,
        objects=(6, 10) if progress < 0.7 else (4, 9),
    )


def draw_batch(rng: np.random.Generator, batch: int, progress: float, easy: EasyPictures) -> tuple[np.ndarray, Labels]:
    """A training batch: uint8 images `[B, 224, 224, 3]` and labels."""
    labels, settings = Labels(batch), scene_settings(progress)
    images = np.empty((batch, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for row in range(batch):
        if rng.random() < EASY_SHARE:
            images[row], shape, colour = easy.draw(rng)
            labels.fill_easy(row, images[row], shape, colour)
        else:
            scene = generate_scene(rng, "train", settings)
            images[row] = scene.image
            labels.fill_scene(row, scene)
    return images, labels


def choose_patches(rng: np.random.Generator, labels: Labels, count: int) -> np.ndarray:
    """Ascending patch numbers `[B, count]`: object patches first, then random background."""
    priority = rng.random(labels.kind.shape) + 2.0 * (labels.kind != N_KINDS)
    return np.sort(np.argpartition(-priority, count - 1, axis=1)[:, :count], axis=1)


def tower_loss(tower: Any, heads: TowerHeads, images: np.ndarray, labels: Labels, index: np.ndarray) -> Tensor:
    """Weighted sum of the dense and the image-level losses."""
    chosen = torch.from_numpy(index)
    patches = patchify(torch.from_numpy(images))
    patches = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))
    features = tower_features(tower, patches, chosen)
    kind_logits, colour_logits, centre_logits, xy = heads(features[:, 1:])

    def pick(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        extra = tensor.shape[2:]
        return tensor.gather(1, chosen.view(*chosen.shape, *(1 for _ in extra)).expand(*chosen.shape, *extra))

    kind, colour, centre, target_xy = (
        pick(labels.kind),
        pick(labels.colour),
        pick(labels.centre),
        pick(labels.xy),
    )
    on_object = ((kind != N_KINDS) & (kind != IGNORE)).float()
    kind_weight = torch.where(kind == N_KINDS, 0.25, 1.0) + ((kind >= len(SHAPES)) & (kind < N_KINDS)).float()
    colour_weight = torch.where(colour == N_COLOURS, 0.25, 1.0)
    scale = on_object.sum().clamp(min=1.0)
    loss_kind = (F.cross_entropy(kind_logits.transpose(1, 2), kind, reduction="none") * kind_weight).sum() / scale
    loss_colour = (
        F.cross_entropy(colour_logits.transpose(1, 2), colour, reduction="none") * colour_weight
    ).sum() / scale
    four = torch.tensor(4.0)
    loss_centre = F.binary_cross_entropy_with_logits(centre_logits[..., 0], centre, pos_weight=four)
    loss_xy = ((xy - target_xy).abs().mean(-1) * on_object).sum() / scale
    presence = heads.presence(tower_pooled(tower, features))
    known = torch.from_numpy(labels.presence_known)
    target = torch.from_numpy(labels.presence)
    each = F.binary_cross_entropy_with_logits(presence, target, pos_weight=four, reduction="none").mean(-1)
    loss_presence = (each * known).sum() / known.sum().clamp(min=1.0)
    return 1.5 * loss_kind + loss_colour + 2 * loss_centre + 2 * loss_xy + 2 * loss_presence


@torch.no_grad()
def evaluate_tower(tower: Any, heads: TowerHeads, n_scenes: int = 128, seed: int = 99) -> dict[str, float]:
    """Held-out accuracy per object patch, per digit object, and false objects on the background."""
    rng = np.random.default_rng(seed)
    settings = replace(HELD_OUT, digit_weights=(0.0, 0.3, 0.4, 0.3))
    scenes = [generate_scene(rng, "test", settings) for _ in range(n_scenes)]
    labels = Labels(n_scenes)
    for row, scene in enumerate(scenes):
        labels.fill_scene(row, scene)
    parts = []
    for start in range(0, n_scenes, 32):
        images = torch.from_numpy(np.stack([s.image for s in scenes[start : start + 32]]))
        features = tower_features(tower, patchify(images))
        kind, colour, _, _ = heads(features[:, 1:])
        parts.append((kind.softmax(-1), colour.argmax(-1), heads.presence(tower_pooled(tower, features))))
    probability, colour, presence = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    kind = probability.argmax(-1)
    shape_patch, digit_patch = (
        labels.kind < len(SHAPES),
        (labels.kind >= len(SHAPES)) & (labels.kind < N_KINDS),
    )
    background = labels.kind == N_KINDS
    digit_right = []
    for row, scene in enumerate(scenes):
        owner = scene.patch_object.reshape(-1)
        for number, item in enumerate(scene.objects):
            if item.digit is not None:
                summed = probability[row][owner == number][:, len(SHAPES) : N_KINDS].sum(0)
                digit_right.append(int(summed.argmax()) == item.digit)
    return {
        "shape_patch": float((kind == labels.kind)[shape_patch].mean()),
        "digit_patch": float((kind == labels.kind)[digit_patch].mean()),
        "digit_object": float(np.mean(digit_right)),
        "colour_patch": float((colour == labels.colour)[~background].mean()),
        "false_object": float((kind != N_KINDS)[background].mean()),
        "presence_recall": float((presence > 0)[labels.presence > 0].mean()),
    }


def train_tower(rank: int, world: int, out: Path, settings: StageSettings) -> None:
    """Run or resume stage 1; checkpoints go to `out/tower.pt`, the curve to `out/curve.csv`."""
    model = build_model(settings.seed)
    tower = vision_tower(model)
    torch.manual_seed(settings.seed)
    heads = TowerHeads()
    run = Run("tower", out, settings, [tower, heads], rank, world)
    easy = EasyPictures(load_easy_vqa("train"))
    run.begin()
    while run.progress < 1.0:
        rng = run.rng(STAGE_SEED)
        images, labels = draw_batch(rng, settings.batch, run.progress, easy)
        index = choose_patches(rng, labels, 98 if run.progress < ALL_PATCHES_FROM else GRID * GRID)
        run.flat.zero_grad()
        loss = tower_loss(tower, heads, images, labels, index)
        loss.backward()
        run.finish_step({"loss": loss.item()}, lambda: evaluate_tower(tower, heads, settings.eval_scenes))
