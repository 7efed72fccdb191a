"""Stage `vit`: train the classifier `tiny-vit` on pictures of one digit.

The loss is cross-entropy of the class token's logits. In the first part of the time every patch of the card must
tell the digit too, through a head that is thrown away; and for most of the time most patches, all of them
background, are left out. The last part sees whole pictures with the class loss alone.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..digit_pictures import CLASSES, HARDER, DigitPicture, PictureSettings, digit_picture, draw_picture
from ..fastpath import patchify
from ..model import WIDTH
from ..scenes import GRID
from ..vit_fast import vit_features, vit_logits
from ..vit_model import start_vit
from .common import StageSettings
from .run import Run

STAGE_SEED = 41
KEPT_PATCHES = (40, 48, 80)  # one of these per step
ALL_PATCHES_FROM = 0.9  # of the time
PATCH_LABELS_UNTIL = 0.6  # of the time; their weight falls linearly from 1 to 0
LABELLED = 0.3  # least share of a patch that the card must cover
BACKGROUND, IGNORE = len(CLASSES), -100
BACKGROUND_WEIGHT = 0.1
TRAINING = PictureSettings(
    size=(32, 52), contrast=(60.0, 220.0), opacity=(0.5, 1.0), angle=12.0, shear=0.15, plain=0.05
)
EVALUATION_SEED = 99
SIZES = ((32, 38), (39, 45), (46, 52))


class PatchHead(nn.Module):
    """Digit or background of each patch, from its features `[B, P, C]` before the last block: `[B, P, 11]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BACKGROUND + 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


def patch_labels(picture: DigitPicture) -> np.ndarray:
    """`[196]`: the digit on patches that its card covers enough, background where it does not reach, else ignored."""
    coverage = picture.coverage.reshape(-1)
    labels = np.where(coverage > 0, IGNORE, BACKGROUND)
    return np.where(coverage >= LABELLED, picture.label, labels)


def choose_patches(rng: np.random.Generator, pictures: list[DigitPicture], count: int) -> np.ndarray:
    """Ascending patch numbers `[B, count]`: all patches of the digit and random others."""
    digit = np.stack([picture.patches.reshape(-1) for picture in pictures])
    priority = rng.random(digit.shape) + digit
    return np.sort(np.argpartition(-priority, count - 1, axis=1)[:, :count], axis=1)


def patch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over labelled patches; background counts little. `[B, P, 11]`, `[B, P]`."""
    weight = torch.ones(BACKGROUND + 1)
    weight[BACKGROUND] = BACKGROUND_WEIGHT
    return F.cross_entropy(logits.transpose(1, 2), labels, weight, ignore_index=IGNORE)


@functools.lru_cache(maxsize=1)
def _held_out(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 `[n, 224, 224, 3]`, labels and sizes `[n]`."""
    pictures = [digit_picture(index, "test", EVALUATION_SEED, HARDER) for index in range(count)]
    images = np.stack([picture.image for picture in pictures])
    return images, np.array([p.label for p in pictures]), np.array([p.size for p in pictures])


@torch.no_grad()
def evaluate_vit(model: nn.Module, count: int, batch: int = 50) -> dict[str, float]:
    """Accuracy on harder held-out pictures, of all and by the digit's size, and the loss."""
    images, labels, sizes = _held_out(count)
    parts = [torch.from_numpy(images[start : start + batch]) for start in range(0, count, batch)]
    logits = torch.cat([vit_logits(model, vit_features(model, patchify(part))) for part in parts])
    right = logits.argmax(-1).numpy() == labels
    metrics = {"held_out": float(right.mean())}
    for low, high in SIZES:
        chosen = right[(sizes >= low) & (sizes <= high)]
        metrics[f"size_{low}_{high}"] = float(chosen.mean()) if len(chosen) else 0.0
    return {**metrics, "held_out_loss": float(F.cross_entropy(logits, torch.from_numpy(labels)))}


def vit_loss(
    model: nn.Module, head: PatchHead, rng: np.random.Generator, pictures: list[DigitPicture], progress: float
) -> tuple[Tensor, float]:
    """Loss of a batch at a share of the training time, and the share of right answers."""
    patches = patchify(torch.from_numpy(np.stack([picture.image for picture in pictures])))
    labels = torch.tensor([picture.label for picture in pictures])
    count = int(rng.choice(KEPT_PATCHES)) if progress < ALL_PATCHES_FROM else GRID * GRID
    index = torch.from_numpy(choose_patches(rng, pictures, count))
    chosen = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
    features = vit_features(model, chosen, index)
    logits = vit_logits(model, features)
    loss = F.cross_entropy(logits, labels)
    weight = max(0.0, 1.0 - progress / PATCH_LABELS_UNTIL)
    if weight:
        dense = torch.from_numpy(np.stack([patch_labels(picture) for picture in pictures])).gather(1, index)
        loss = loss + weight * patch_loss(head(features[:, 1:]), dense)
    return loss, float((logits.argmax(-1) == labels).float().mean())


def train_vit(rank: int, world: int, out: Path, settings: StageSettings) -> None:
    """Run or resume the stage; checkpoints go to `out/vit.pt`, the curve to `out/curve.csv`."""
    model = start_vit()
    torch.manual_seed(settings.seed)
    head = PatchHead()
    run = Run("vit", out, settings, [model, head], rank, world)
    run.begin()
    while run.progress < 1.0:
        rng = run.rng(STAGE_SEED)
        pictures = [draw_picture(rng, "train", TRAINING) for _ in range(settings.batch)]
        run.flat.zero_grad()
        loss, right = vit_loss(model, head, rng, pictures, run.progress)
        loss.backward()
        recent = {"loss": loss.item(), "train": right}
        run.finish_step(recent, lambda: evaluate_vit(model, settings.eval_scenes))
